"""The log joint as a function of unconstrained latents: against densities written out by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.distributions as td
from pyro import poutine
from registry import data_for

from guides import MeanField
from inference import LogJoint, log_weights
from zoo import LinearVAE

COUNTS = torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0], dtype=torch.float64)


def story(x):
    """Positive, bounded by an earlier latent, a simplex, and a nested plate; Poisson data."""
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
        b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
        pyro.sample("w", dist.Dirichlet(x.new_ones(3)))
        with pyro.plate("inner", 2, dim=-2):
            c = pyro.sample("c", dist.Normal(b, 1.0))
        pyro.sample("x", dist.Poisson(a + b + c[..., :1, :].exp()), obs=x)


def by_hand(u):
    """The same density in plain torch: u (..., 5, 6) -> (..., 5)."""
    a = u[..., 0].exp()
    s = u[..., 1].sigmoid()
    b, c = a * s, u[..., 4:]
    simplex = td.biject_to(td.constraints.simplex)
    w = simplex(u[..., 2:4])
    rate = a + b + c[..., 0].exp()
    prior = (a.log() - a) - a.log() + math.log(2.0) - 0.5 * ((c - b[..., None]) ** 2).sum(-1) - math.log(2 * math.pi)
    log_det = u[..., 0] + a.log() + s.log() + (1 - s).log() + simplex.log_abs_det_jacobian(u[..., 2:4], w)
    return prior + log_det, COUNTS * rate.log() - rate - torch.lgamma(COUNTS + 1)


@pytest.mark.parametrize("samples", [(), (1,), (7,)])
def test_prior_and_likelihood_are_those_written_by_hand(samples):
    log_joint = LogJoint(story, COUNTS)
    u = torch.randn(*samples, 5, 6, dtype=torch.float64)
    prior, likelihood = by_hand(u)
    got = log_joint.terms(u)
    torch.testing.assert_close(got.prior, prior, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.likelihood, likelihood, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_joint(u), prior + likelihood, rtol=1e-12, atol=1e-12)


def test_coordinates_and_values_are_inverse_to_each_other():
    log_joint = LogJoint(story, COUNTS)
    u = torch.randn(7, 5, 6, dtype=torch.float64)
    back, log_det = log_joint.unconstrain(log_joint.constrain(u), 7)
    torch.testing.assert_close(back, u, rtol=1e-9, atol=1e-9)
    a, s = u[..., 0].exp(), u[..., 1].sigmoid()
    simplex = td.biject_to(td.constraints.simplex)
    expected = u[..., 0] + (a * s * (1 - s)).log() + simplex.log_abs_det_jacobian(u[..., 2:4], simplex(u[..., 2:4]))
    torch.testing.assert_close(log_det, expected, rtol=1e-9, atol=1e-9)


def test_chosen_rows_are_those_of_the_whole():
    log_joint = LogJoint(story, COUNTS)
    u, index = torch.randn(3, 5, 6, dtype=torch.float64), torch.tensor([4, 1, 1])
    whole = log_joint(u)
    assert torch.equal(log_joint.rows(index)(u[:, index]), whole[:, index])
    assert log_joint.evaluations == 3 * 5 + 3 * 3


def test_the_density_integrates_to_the_evidence():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), 2.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    log_joint = LogJoint(model, COUNTS)
    for n, count in enumerate(COUNTS.tolist()):

        def density(u, n=n):
            at = torch.full((5, 1), u, dtype=torch.float64)
            return float(log_joint(at)[n].exp())

        integral, _ = scipy.integrate.quad(density, -20, 10, epsabs=1e-14)
        # Poisson with a Gamma rate: negative binomial
        truth = scipy.stats.nbinom.logpmf(count, 3, 2 / 3)
        assert math.log(integral) == pytest.approx(truth, abs=1e-9)


def test_a_draw_from_the_guide_has_the_importance_weights_of_the_pair():
    model = LinearVAE(5, 2, sigma=0.5).double()
    guide, x = MeanField(5, 2, hidden=(8,)).double(), data_for(model)
    log_joint = LogJoint(model, x)
    torch.manual_seed(3)
    u, log_q = log_joint.sample_guide(guide, 11)
    torch.manual_seed(3)
    expected = log_weights(model, guide, x, num_samples=11)
    torch.testing.assert_close((log_joint(u) - log_q).detach(), expected, rtol=1e-12, atol=1e-12)


def test_draws_from_the_prior_have_its_distribution():
    u = LogJoint(story, COUNTS).sample_prior(4000)
    a = u[..., 0].exp().flatten()
    ratio = u[..., 1].sigmoid().flatten()
    assert u.shape == (4000, 5, 6)
    for sample, mean, sd in ((a, 2.0, math.sqrt(2.0)), (ratio, 0.5, math.sqrt(1 / 12))):
        assert abs(float(sample.mean()) - mean) < 4 * sd / math.sqrt(len(sample))


def test_gradients_reach_u_and_each_datum_has_its_own():
    log_joint = LogJoint(story, COUNTS)
    u = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_joint(u)[1, 3], u)
    others = gradient.clone()
    others[1, 3] = 0
    assert gradient[1, 3].abs().min() > 0
    assert not others.any()


def test_models_that_cannot_broadcast_are_run_one_sample_at_a_time():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            assert z.dim() == 1
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    log_joint = LogJoint(model, COUNTS, broadcast=False)
    u = torch.randn(3, 5, 1, dtype=torch.float64)
    expected = td.Normal(0.0, 1.0).log_prob(u[..., 0]) + td.Normal(u[..., 0], 1.0).log_prob(COUNTS)
    torch.testing.assert_close(log_joint(u), expected)
    assert log_joint.sample_prior(3).shape == (3, 5, 1)


def outside(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def discrete(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Poisson(torch.ones(())))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def scaled(x):
    with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def masked(x):
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=x > 1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


REFUSED = {
    outside: "model site 'mu' in plates",
    discrete: "continuous distribution with a known support at latent site 'k', got Poisson",
    scaled: "expected site 'z' to carry no scale",
    masked: "expected no site that depends on a masked latent, got a density of 'x' that changes with one",
    observed: "expected a model with a latent site, got only observed",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_models_without_such_a_density_are_refused_by_name(model):
    with pytest.raises(ValueError, match=REFUSED[model]):
        LogJoint(model, COUNTS)


def test_wrong_coordinates_are_refused():
    with pytest.raises(ValueError, match=r"expected u of shape \(S, 5, 6\), got \(2, 5, 5\)"):
        LogJoint(story, COUNTS)(torch.zeros(2, 5, 5, dtype=torch.float64))
