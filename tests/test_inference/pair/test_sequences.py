"""Sequences of different lengths and observations that were not made: against a Kalman filter and closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro import poutine

from inference import LogJoint, evidence, iwae, log_weights

torch.manual_seed(0)
X = torch.randn(3, 4, dtype=torch.float64)
LENGTHS = torch.tensor([4, 1, 2])
QUIET = {"seed": 0, "progress": False}


def states(x, lengths, observe):
    z = x.new_zeros(len(x))
    for t in range(x.shape[1]):
        with poutine.mask(mask=t < lengths):
            z = pyro.sample(
                f"z_{t}", dist.Normal(0.9 * z, 0.7) if observe else dist.Normal(0.4 * z + 0.5 * x[:, t], 0.6)
            )
            if observe:
                pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])


def model(x, lengths):
    """States that follow each other; what is beyond a sequence's length is masked."""
    with pyro.plate("data", len(x)):
        states(x, lengths, True)


def guide(x, lengths):
    with pyro.plate("data", len(x)):
        states(x, lengths, False)


def kalman_filter(sequence):
    mean, var, total = torch.zeros(()).double(), torch.zeros(()).double(), torch.zeros(()).double()
    for value in sequence:
        mean, var = 0.9 * mean, 0.81 * var + 0.49
        total = total + td.Normal(mean, (var + 0.25).sqrt()).log_prob(value)
        gain = var / (var + 0.25)
        mean, var = mean + gain * (value - mean), (1 - gain) * var
    return total


TRUTH = torch.stack([kalman_filter(row[:n]) for row, n in zip(X, LENGTHS, strict=True)])


@pytest.mark.parametrize("method", ["auto", "adaptive", "laplace", "bridge", "importance"])
def test_ragged_sequences_have_the_kalman_filter_s_evidence(method):
    proposal = guide if method in ("bridge", "importance") else None
    got = evidence(model, X, LENGTHS, method=method, guide=proposal, level=0.9999, **QUIET)
    assert bool(((got.lower - 1e-6 <= TRUTH) & (got.upper + 1e-6 >= TRUTH)).all())
    assert float((got.value - TRUTH).abs().max()) < 0.1


def test_weights_of_a_short_sequence_are_those_of_it_alone():
    padded = log_weights(model, guide, X, LENGTHS, num_samples=4000, seed=0)
    alone = log_weights(model, guide, X[1:2, :1], torch.tensor([1]), num_samples=4000, seed=0)
    assert abs(float(iwae(padded[:, 1:2]).value - TRUTH[1])) < 0.1
    assert abs(float(padded[:, 1].std() / alone.std()) - 1) < 0.1


SEEN = torch.tensor([True, False, True])


def partly_seen(x, seen):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) + x.new_zeros(4), 1.0).to_event(1), obs=x, obs_mask=seen)


def guide_of_seen(x, seen):
    precision = 1 + 4.0 * seen
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(seen * x.sum(-1) / precision, precision**-0.5))


def test_observations_that_were_not_made_are_left_out():
    covariance = torch.eye(4).double() + 1
    truth = SEEN * td.MultivariateNormal(torch.zeros(4).double(), covariance).log_prob(X)
    got = evidence(partly_seen, X, SEEN, progress=False)
    torch.testing.assert_close(got.value, truth, atol=1e-6, rtol=0)
    weights = log_weights(partly_seen, guide_of_seen, X, SEEN, num_samples=5)
    torch.testing.assert_close(weights, truth.expand(5, 3), atol=1e-6, rtol=0)
    assert LogJoint(partly_seen, X, SEEN).sites == ("z",)


def missing_covariate(x, seen):
    """A covariate that was not seen in each row, on which the response depends."""
    with pyro.plate("data", len(x)):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 0], obs_mask=seen)
        pyro.sample("y", dist.Normal(w, 1.0), obs=x[:, 1])


def test_a_missing_covariate_is_a_latent():
    w, y = X[:, 0], X[:, 1]
    seen = td.Normal(0.0, 1.0).log_prob(w) + td.Normal(w, 1.0).log_prob(y)
    truth = torch.where(SEEN, seen, td.Normal(0.0, 2**0.5).log_prob(y))
    got = evidence(missing_covariate, X, SEEN, progress=False)
    torch.testing.assert_close(got.value, truth, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"expected the guide to sample \['w_unobserved'\], on which other sites"):
        log_weights(missing_covariate, lambda x, seen: None, X, SEEN, num_samples=1)  # noqa: ARG005
