"""Posteriors whose modes are easily missed, or whose coordinates saturate: right, or without a numerical guarantee."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch

import inference.marginal_likelihood.quadrature.adaptive_quadrature as quadrature
from inference import LogJoint, evidence
from inference.core.seeding import seeded
from inference.marginal_likelihood.base.result import NUMERICAL, PROBABILISTIC
from inference.marginal_likelihood.quadrature.check import contradicts, importance_estimate
from inference.posterior.modes import find_modes, prior_scale, search_modes

BUMP_SIGMA, WAVE_SIGMA = 0.01, 0.01


def data(*columns):
    return torch.stack([torch.as_tensor(column, dtype=torch.float64) for column in columns], -1)


def bumps(width):
    """x = 3 on a bump of given width about c, and 0 elsewhere; the data say 2.9."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[:, 0]), 1.0))
            mean = 3 * (-0.5 * ((z - x[:, 1]) / width) ** 2).exp()
            pyro.sample("x", dist.Normal(mean, BUMP_SIGMA), obs=x[:, 0])

    c = np.linspace(-2, 2, 21)
    near = np.linspace(-8 * width, 8 * width, 400_001)
    mean = 3 * np.exp(-0.5 * (near / width) ** 2)
    log_f = scipy.stats.norm.logpdf(c[:, None] + near) + scipy.stats.norm.logpdf(2.9, loc=mean, scale=BUMP_SIGMA)
    truth = scipy.special.logsumexp(log_f, axis=1) + math.log(near[1] - near[0])
    return model, data(np.full(21, 2.9), c), torch.from_numpy(truth)


def holds(got, truth):
    return (got.lower <= truth + 1e-8) & (truth - 1e-8 <= got.upper) & got.value.isfinite()


@pytest.mark.parametrize("width", [0.05, 0.015, 0.005])
def test_narrow_bumps_anywhere_in_the_prior_are_found(width):
    model, x, truth = bumps(width)
    got = evidence(model, x, method="quadrature", seed=0, progress=False)
    assert holds(got, truth).all()
    assert got.guarantee.count(NUMERICAL) >= 20
    assert got.mean.lower <= float(truth.mean()) <= got.mean.upper


def test_bumps_that_the_search_does_not_find_are_not_numerical(monkeypatch):
    """The twin: Newton's method from a few draws alone passes the bumps by, and the check's draws meet most."""

    def one_start(log_joint, draws, *units, **_):
        return find_modes(log_joint, draws[0][:1], *units)

    monkeypatch.setattr(quadrature, "search_modes", one_start)
    monkeypatch.setattr("inference.marginal_likelihood.quadrature.peaks._LOOKS", 0)
    model, x, truth = bumps(0.05)
    got = evidence(model, x, method=quadrature.Quadrature(grid=5), seed=0, progress=False)
    wrong = (got.value - truth).abs() > 1
    assert wrong.sum() + got.guarantee.count(PROBABILISTIC) > 10
    numerical = torch.tensor([kind == NUMERICAL for kind in got.guarantee])
    assert not (wrong & numerical).any()
    assert holds(got, truth).double().mean() >= 0.95


@pytest.mark.parametrize("frequency", [20.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_dozens_of_thin_modes_are_all_found(frequency):
    def mean(z):
        return np.sin(frequency * z) + 0.3 * z

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[:, 0]), 1.0))
            pyro.sample("x", dist.Normal((frequency * z).sin() + 0.3 * z, WAVE_SIGMA), obs=x[:, 0])

    rng = np.random.default_rng(1)
    x = mean(rng.normal(size=8)) + WAVE_SIGMA * rng.normal(size=8)
    grid = np.linspace(-8, 8, 3_200_001)
    log_f = [scipy.stats.norm.logpdf(grid) + scipy.stats.norm.logpdf(v, loc=mean(grid), scale=WAVE_SIGMA) for v in x]
    truth = torch.tensor([scipy.special.logsumexp(f) for f in log_f]) + math.log(grid[1] - grid[0])
    got = evidence(model, data(x), method="quadrature", seed=0, progress=False)
    assert holds(got, truth).all()
    assert got.guarantee == (NUMERICAL,) * 8


def test_a_check_contradicts_a_value_that_lacks_half_the_mass_only():
    model, x, truth = bumps(0.1)
    log_joint = LogJoint(model, x)
    with seeded(0):
        location, scale = prior_scale(log_joint)
        modes = search_modes(log_joint, [log_joint.sample_prior(16)], location, scale)
        check = importance_estimate(log_joint, modes, location, scale, 512, 0.95)
    nothing = torch.zeros_like(truth)
    assert not contradicts(check, truth, nothing).any()
    assert contradicts(check, truth - math.log(2), nothing).all()
    assert not contradicts(check, truth - math.log(2), nothing + 1).any()


def coin(prior):
    """Successes of a hundred trials, with a prior of their probability."""

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", prior)
            pyro.sample("x", dist.Binomial(100, p), obs=x[:, 0])

    return model


def beta_binomial(a, b, count):
    betaln, ln = scipy.special.betaln, scipy.special.gammaln
    return ln(101) - ln(count + 1) - ln(101 - count) + betaln(a + count, b + 100 - count) - betaln(a, b)


def small(value):
    return torch.tensor(value, dtype=torch.float64)


def test_mass_where_coordinates_saturate_has_no_numerical_guarantee():
    """Kumaraswamy's distribution of parameters 1 and b is Beta(1, b), but its density is known from the value alone."""
    count = np.array([0.0, 50.0, 100.0])
    model, truth = coin(dist.Kumaraswamy(small(1.0), small(0.2))), torch.from_numpy(beta_binomial(1, 0.2, count))
    got = evidence(model, data(count), method="quadrature", seed=0, progress=False)
    assert got.guarantee == (NUMERICAL, NUMERICAL, PROBABILISTIC)
    assert holds(got, truth).all()


def test_mass_below_the_least_number_has_no_numerical_guarantee():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(small(0.01), small(1.0)))
            pyro.sample("x", dist.Poisson(rate), obs=x[:, 0])

    count = np.array([0.0, 3.0])
    got = evidence(model, data(count), method="quadrature", seed=0, progress=False)
    assert got.guarantee == (PROBABILISTIC, NUMERICAL)
    assert holds(got, torch.from_numpy(scipy.stats.nbinom.logpmf(count, 0.01, 0.5))).all()


def test_a_density_that_overflows_where_nothing_is_stays_numerical():
    """A mean and its variance: at a variance of e^-680 the density of the mean is no number, far below the mass."""
    a, b, k = 3.0, 2.0, 1.5

    def model(x):
        with pyro.plate("data", len(x)):
            variance = pyro.sample("variance", dist.InverseGamma(small(a), small(b)))
            mean = pyro.sample("mean", dist.Normal(0.0, (variance / k).sqrt()))
            noise = dist.Normal(mean.unsqueeze(-1), variance.sqrt().unsqueeze(-1)).expand((*mean.shape, 5))
            pyro.sample("x", noise.to_event(1), obs=x)

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 5)))
    shape = (b / a) * (np.eye(5) + np.ones((5, 5)) / k)
    truth = torch.from_numpy(scipy.stats.multivariate_t(np.zeros(5), shape, df=2 * a).logpdf(x.numpy()))
    got = evidence(model, x, method="quadrature", seed=0, progress=False)
    assert got.guarantee == (NUMERICAL,) * 4
    assert holds(got, truth).all()


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (0.01, 0.01), (0.05, 1.5), (2.0, 3.0), (1.0, 1.0)])
def test_both_ends_of_the_unit_interval_are_resolved(a, b):
    count = np.array([0.0, 1.0, 50.0, 99.0, 100.0])
    got = evidence(coin(dist.Beta(small(a), small(b))), data(count), method="quadrature", seed=0, progress=False)
    truth = torch.from_numpy(beta_binomial(a, b, count))
    assert got.guarantee == (NUMERICAL,) * 5
    assert holds(got, truth).all()
    torch.testing.assert_close(got.value, truth, rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", [(0.3, 0.3, 0.3), (0.05, 0.5, 0.2), (2.0, 3.0, 4.0)])
def test_all_ends_of_a_simplex_are_resolved(alpha):
    alpha = torch.tensor(alpha, dtype=torch.float64)
    x = torch.tensor([[10.0, 0, 0], [0, 10, 0], [0, 0, 10], [3, 3, 4]], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(alpha))
            pyro.sample("x", dist.Multinomial(10, p, validate_args=False), obs=x)

    got = evidence(model, x, method="quadrature", seed=0, progress=False)
    truth = torch.from_numpy(scipy.stats.dirichlet_multinomial.logpmf(x.numpy(), alpha.numpy(), 10))
    assert holds(got, truth).all()
    torch.testing.assert_close(got.value, truth, rtol=0, atol=1e-8)
