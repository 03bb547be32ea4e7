"""Structures of plates and sites: the weights of the exact posterior are the evidence, written out."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from trap_pairs import (
    Normal,
    assert_exact,
    chain_case,
    discrete_case,
    equicorrelated,
    grid_guide,
    grid_model,
    randn,
    reference,
    rows_case,
    zeros,
)

from inference import (
    ELBO,
    AnalyticKLELBO,
    iwae,
    log_weights,
)

# --- structures: the weights of the exact posterior are the evidence, written out ------------------------


def grid_case():
    x = randn(6, 3)
    return grid_model, grid_guide, (x,), None, equicorrelated(3).log_prob(x)


def transposed_grid_case():
    """The entries' plate left of the data's."""
    x = randn(3, 6)

    def model(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", Normal(zeros(x.shape[1]), 1.0))
            with pyro.plate("entries", len(x), dim=-2):
                pyro.sample("x", Normal(z, 1.0), obs=x)

    def guide(x):
        precision = 1.0 + len(x)
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", Normal(x.sum(0) / precision, precision**-0.5))

    return model, guide, (x,), None, equicorrelated(3).log_prob(x.T)


def two_level_case(exact=True):
    """u_n ~ N(0, 1), z_nj ~ N(u_n, 1), x_nj ~ N(z_nj, 1): a latent of the datum and one of each of its entries."""
    x = randn(6, 3)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            u = pyro.sample("u", Normal(zeros(len(x), 1), 1.0))
            with pyro.plate("entries", x.shape[1], dim=-1):
                z = pyro.sample("z", Normal(u.expand(*u.shape[:-1], x.shape[1]), 1.0))
                pyro.sample("x", Normal(z, 1.0), obs=x)

    def guide(x):
        precision = 1.0 + x.shape[1] / 2 if exact else 1.0
        with pyro.plate("data", len(x), dim=-2):
            u = pyro.sample("u", Normal(x.sum(1, keepdim=True) / 2 / precision, precision**-0.5))
            with pyro.plate("entries", x.shape[1], dim=-1):
                pyro.sample("z", Normal((u + x) / 2, 0.5**0.5))

    return model, guide, (x,), None, equicorrelated(3, noise=2.0).log_prob(x)


def missing_entries_case():
    """Entries that were not seen are masked, and hold rubbish."""
    x, seen = randn(6, 3), torch.rand(6, 3) < 0.6
    x = torch.where(seen, x, 1e3)

    def model(x, seen):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", Normal(zeros(len(x), 1), 1.0))
            with pyro.plate("entries", x.shape[1], dim=-1), poutine.mask(mask=seen):
                pyro.sample("x", Normal(z, 1.0), obs=x)

    def guide(x, seen):
        precision = 1.0 + seen.double().sum(1, keepdim=True)
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", Normal((x * seen).sum(1, keepdim=True) / precision, precision**-0.5))

    truth = [equicorrelated(int(s.sum())).log_prob(row[s]) if s.any() else zeros() for row, s in zip(x, seen)]
    return model, guide, (x, seen), None, torch.stack(truth)


def masked_data_case():
    x, seen = randn(6), torch.tensor([True, False, True, True, False, True])

    def model(x, seen):
        with poutine.mask(mask=seen), pyro.plate("data", len(x)):
            pyro.sample("x", Normal(pyro.sample("z", Normal(zeros(len(x)), 1.0)), 1.0), obs=x)

    def guide(x, seen):
        with poutine.mask(mask=seen), pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x / 2, 0.5**0.5))

    return model, guide, (x, seen), None, reference(0.0, 2**0.5).log_prob(x) * seen


def two_observations_case():
    """x ~ N(z, 1) and t ~ N(2 z, 1) of one latent, as two arguments."""
    x, t = randn(6), randn(6)

    def model(x, t):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(zeros(len(x)), 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=x)
            pyro.sample("t", Normal(2 * z, 1.0), obs=t)

    def guide(x, t):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal((x + 2 * t) / 6, 6**-0.5))

    W = torch.tensor([1.0, 2.0], dtype=torch.float64)
    distribution = torch.distributions.MultivariateNormal(zeros(2), torch.outer(W, W) + torch.eye(2))
    return model, guide, (x, t), None, distribution.log_prob(torch.stack([x, t], -1))


def event_case():
    """Latents and data are vectors; x = (z_1, z_2, z_1 + z_2) + noise."""
    x = randn(6, 3)
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    precision = W.T @ W + torch.eye(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", Normal(z @ W.T, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = torch.linalg.solve(precision, W.T @ x.T).T
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

    distribution = torch.distributions.MultivariateNormal(zeros(3), W @ W.T + torch.eye(3))
    return model, guide, (x,), None, distribution.log_prob(x)


def given_subsample_case():
    x, index = randn(20), torch.tensor([3, 1, 17, 8])

    def model(x, index):
        with pyro.plate("data", len(x), subsample=index) as i:
            pyro.sample("x", Normal(pyro.sample("z", Normal(zeros(len(i)), 1.0)), 1.0), obs=x[i])

    def guide(x, index):
        with pyro.plate("data", len(x), subsample=index) as i:
            pyro.sample("z", Normal(x[i] / 2, 0.5**0.5))

    return model, guide, (x, index), None, reference(0.0, 2**0.5).log_prob(x[index])


CASES = [
    rows_case,
    grid_case,
    transposed_grid_case,
    two_level_case,
    chain_case,
    missing_entries_case,
    masked_data_case,
    two_observations_case,
    event_case,
    given_subsample_case,
    discrete_case,
]


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_weights_of_the_exact_posterior_are_the_evidence(case, chunk):
    model, guide, args, plate, truth = case()
    weights = log_weights(model, guide, *args, num_samples=7, chunk=chunk, plate=plate)
    assert weights.shape == (7, len(truth))
    assert_exact(weights, truth)


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("case", [c for c in CASES if c is not discrete_case])
def test_the_elbo_of_the_exact_posterior_is_the_evidence(case, num_particles):
    model, guide, args, plate, truth = case()
    objective = ELBO(num_particles, plate=plate)
    torch.testing.assert_close(objective.per_datum(model, guide, *args), truth)
    scale = len(args[0]) / len(truth) if case is given_subsample_case else 1
    assert objective.loss(model, guide, *args) == pytest.approx(-scale * float(truth.sum()))


@pytest.mark.parametrize("case", [rows_case, grid_case, transposed_grid_case, masked_data_case, event_case])
def test_the_elbo_with_a_closed_form_kl_averages_to_the_evidence(case):
    model, guide, args, plate, truth = case()
    draws = torch.stack([AnalyticKLELBO(plate=plate).per_datum(model, guide, *args) for _ in range(400)])
    error = draws.std(0) / 20
    # Rounding alone is left where a datum is masked.
    assert bool(((draws.mean(0) - truth).abs() <= 5 * error + 1e-12).all())


def test_weights_of_a_wrong_guide_average_to_the_evidence():
    model, guide, args, _, truth = two_level_case(exact=False)
    value, error = iwae(log_weights(model, guide, *args, num_samples=50_000))
    assert float(error.max()) < 0.05
    assert float(((value - truth).abs() / error).max()) < 5
