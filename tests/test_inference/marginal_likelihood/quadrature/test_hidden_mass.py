"""Mass that nodes hardly meet: ridges that narrow without end, and tails that fall as slowly as they may."""

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats

from inference import evidence

QUIET = {"seed": 0, "progress": False}
DOUBLE = {"dtype": torch.float64}


def mixture(x):
    """An even mixture of a standard normal and one of free place and scale, for each data point by itself."""
    with pyro.plate("data", len(x)):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(len(x)), 3.0))
        scale = pyro.sample("scale", dist.HalfCauchy(x.new_ones(len(x))))
        locs = torch.stack(torch.broadcast_tensors(torch.zeros_like(mean), mean), -1)
        scales = torch.stack(torch.broadcast_tensors(torch.ones_like(scale), scale), -1)
        parts = dist.Normal(locs, scales)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones_like(locs)), parts), obs=x)


def over_scales(density):
    """The integral over log scales of a density times the prior's, from e^-60 to e^40."""
    edges = np.linspace(-60, 40, 300)

    def weighted(u):
        return stats.halfcauchy.pdf(math.exp(u)) * math.exp(u) * density(math.exp(u))

    return sum(integrate.quad(weighted, a, b, epsabs=0, epsrel=1e-10)[0] for a, b in pairwise(edges))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW)])
def test_a_ridge_that_narrows_without_end_is_followed(seed):
    data = [0.5, -2.0]
    normal = stats.norm.pdf
    parts = [over_scales(lambda s, x=x: normal(x) + normal(x, 0, math.sqrt(9 + s * s))) for x in data]
    truth = torch.tensor(parts, **DOUBLE).log() - math.log(2)
    found = evidence(mixture, torch.tensor(data, **DOUBLE), seed=seed, progress=False)
    assert found.guarantee == ("numerical",) * 2
    torch.testing.assert_close(found.value, truth, rtol=0, atol=3e-7)


def several(x):
    """One place and scale for all data, and mixture densities without a second derivative far from their kink."""
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 3.0))
    scale = pyro.sample("scale", dist.HalfCauchy(x.new_ones(())))
    with pyro.plate("data", len(x)):
        term = torch.logaddexp(dist.Normal(0.0, 1.0).log_prob(x), dist.Normal(mean, scale).log_prob(x))
        pyro.factor("mixture", term - math.log(2))
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=torch.zeros_like(x))


@pytest.mark.slow
def test_ridges_of_several_data_are_followed():
    x = np.array([-1.0, 0.3, 2.0, 2.5])

    def marginal(ours, square):
        """The density of data around one mean, which is integrated out."""
        k, spread = len(ours), ours.var() * len(ours)
        log_density = -k / 2 * math.log(2 * math.pi * square) - 0.5 * math.log1p(9 * k / square)
        return math.exp(log_density - spread / (2 * square) - k * ours.mean() ** 2 / (2 * (square + 9 * k)))

    def over_means(scale):
        """Over all choices of the data that are of the second normal."""
        total = 0.0
        for chosen in np.ndindex(2, 2, 2, 2):
            ours = np.array(chosen, bool)
            total += stats.norm.pdf(x[~ours]).prod() * (marginal(x[ours], scale**2) if ours.any() else 1.0)
        return total / 16

    truth = math.log(over_scales(over_means)) + 4 * stats.norm.logpdf(0)
    found = evidence(several, torch.tensor(x, **DOUBLE), whole=True, **QUIET)
    assert found.guarantee == ("numerical",)
    assert abs(float(found.value) - truth) < 3e-7


def squashed(freedom):
    """A Student-t prior, and a likelihood with a limit far out."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(torch.full((len(x),), freedom, **DOUBLE), 0.0, 1.0))
            pyro.sample("x", dist.Normal(z / (1 + z.abs()), 0.3), obs=x)

    return model


@pytest.mark.parametrize("freedom", [0.5, 0.1, *(pytest.param(f, marks=SLOW) for f in (2.0, 1.0, 0.2))])
def test_slow_tails_are_in_the_error(freedom):
    data = [0.0, 1.5]
    most = 60 / freedom

    def density(t, x):
        """In t, the inverse hyperbolic sine of z."""
        log_prior = (
            special.gammaln((freedom + 1) / 2) - special.gammaln(freedom / 2) - 0.5 * math.log(freedom * math.pi)
        )
        log_z = abs(t) if abs(t) > 300 else math.log(math.cosh(t))
        log_square = 2 * abs(t) - 2 * math.log(2) if abs(t) > 300 else math.log(math.sinh(t) ** 2 + 1e-300)
        log_prior -= (freedom + 1) / 2 * np.logaddexp(0.0, log_square - math.log(freedom))
        z = math.copysign(1.0, t) if abs(t) > 300 else math.sinh(t) / (1 + abs(math.sinh(t)))
        return math.exp(log_prior + log_z - (math.log(2) if abs(t) > 300 else 0.0) + stats.norm.logpdf(x, z, 0.3))

    edges = np.concatenate([-np.geomspace(most, 0.1, 40), [0.0], np.geomspace(0.1, most, 40)])
    cells = list(pairwise(edges))
    parts = [sum(integrate.quad(density, *cell, (x,), epsabs=0, epsrel=1e-9)[0] for cell in cells) for x in data]
    truth = torch.tensor(parts, **DOUBLE).log()
    found = evidence(squashed(freedom), torch.tensor(data, **DOUBLE), **QUIET)
    assert ((found.lower <= truth + 1e-8) & (truth <= found.upper + 1e-8)).all()
    assert found.guarantee == ("numerical",) * 2
    assert (found.upper - found.lower < 1.0).all()


def test_an_infinite_integral_has_no_upper_end():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(x.new_zeros(len(x)), 1.0))
            pyro.factor("slower", 0.5 * torch.log1p(z.square()))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    found = evidence(model, torch.zeros(1, **DOUBLE), **QUIET)
    assert found.guarantee == ("probabilistic",)
    assert found.upper.isinf().all()
