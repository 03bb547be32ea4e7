"""Refits of mixtures against brute force, and the mixtures that they start from."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from squared_problem import elbo_on_grid, squared_model

from guides import Mixture
from inference import LogJoint, refit
from inference.comparison.mixture_starts import Components, _divided, _with_misfit, axes_of, best_of, mixtures
from inference.distributions.batched_gaussian import Gaussian


def best_mixture(x, rng):
    """The highest ELBO of two components from many starts; sigmas below .02 would hide between the grid's points."""

    def loss(point):
        sigmas = 0.02 + np.logaddexp(0, point[3:])
        return -elbo_on_grid(x, scipy.special.expit(np.clip(point[0], -12, 12)), point[1:3], sigmas)

    starts = rng.normal(size=(8, 5)) * [1, 1, 1, 0.3, 0.3] - [0, 0, 0, 1.5, 1.5]
    return max(-scipy.optimize.minimize(loss, start, method="BFGS").fun for start in starts)


@pytest.mark.slow
def test_the_refit_of_a_mixture_is_its_best_by_brute_force():
    x, rng = torch.tensor([[0.0], [1.0]]).double(), np.random.default_rng(0)
    best = torch.tensor([best_mixture(float(row), rng) for row in x])
    guide = Mixture(1, 1, hidden=(4,)).double()
    found = refit(squared_model, guide, x, restarts=0, max_steps=100, seed=0, progress=False)
    q = found.guide.posterior(x)
    parts = (q.log_weights.exp()[:, 0], q.locs[..., 0], q.sigmas[..., 0])
    real = [elbo_on_grid(float(row), *(p.numpy() for p in n)) for row, *n in zip(x, *(t.detach() for t in parts))]
    assert (best - torch.tensor(real)).max() < 5e-3
    assert ((found.elbo - torch.tensor(real)).abs() < 5 * found.standard_error + 1e-6).all()
    assert found.converged.all()


def test_components_that_start_alike_come_apart():
    x, guide = torch.tensor([[1.0]]).double(), Mixture(1, 1, hidden=(4,)).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.zero_()
    found = refit(squared_model, guide, x, restarts=0, max_steps=50, seed=0, progress=False)
    locs = found.guide.posterior(x).locs.detach()[0, :, 0]
    assert locs.min() < -0.9 < 0.9 < locs.max()


def test_a_division_keeps_mean_and_variance_along_each_axis():
    torch.manual_seed(0)
    loc, sigma = torch.randn(3, 1, 2).double(), torch.rand(3, 1, 2).double() + 0.5
    axes = torch.tensor([[1.0, 0.0], [0.6, -0.8]]).double().unsqueeze(1).expand(-1, 3, -1)
    for number in (2, 3, 4):
        parts = _divided(Components(torch.zeros(3, 1).double(), loc, sigma), axes, number)
        weights = parts.log_weights.exp().unsqueeze(-1)
        assert parts.locs.shape == (3, number, 2)
        torch.testing.assert_close(weights.sum(1), torch.ones(3, 1).double())
        torch.testing.assert_close((weights * parts.locs).sum(1), loc[:, 0])
        square = (weights * (parts.sigmas.square() + (parts.locs - loc).square())).sum(1)
        torch.testing.assert_close(square, sigma[:, 0].square())


def test_gaussians_that_are_alike_count_once_and_the_best_comes_first():
    rows = torch.tensor([0, 1, 0, 1, 0])
    loc = torch.tensor([[0.0], [5.0], [1e-3], [-5.0], [3.0]]).double()
    found = best_of(rows, Gaussian(loc, torch.ones(5, 1, 1).double()), torch.tensor([1.0, 2.0, 0.9, 4.0, 3.0]).double())
    assert found.elbo.tolist() == [[3.0, 4.0], [1.0, 2.0], [-math.inf, -math.inf]]
    assert found.locs[0, :, 0].tolist() == [3.0, -5.0]
    assert found.place[:2].tolist() == [[4, 3], [0, 1]]


def test_mixtures_have_components_at_different_modes():
    x = torch.tensor([[1.0], [0.0]]).double()
    loc = torch.tensor([[1.0], [0.0], [-1.0]]).double()
    gaussians, rows = Gaussian(loc, torch.full((3, 1, 1), 0.2).double()), torch.tensor([0, 1, 0])
    found = best_of(rows, gaussians, torch.tensor([1.0, 1.0, 1.0]).double())
    starts = mixtures(LogJoint(squared_model, x), found, axes_of(found, gaussians), 2)
    chosen, pair = starts[-1]
    assert chosen.tolist() == [0]
    assert sorted(pair.locs[0, :, 0].tolist()) == [-1.0, 1.0]
    torch.testing.assert_close(pair.log_weights, torch.full((1, 2), math.log(0.5)).double())


def test_a_second_component_stands_where_the_posterior_exceeds_most():
    torch.manual_seed(0)
    x = torch.tensor([[0.36]]).double()
    first = Components(
        *(torch.full(shape, value).double() for shape, value in (((1, 1), 0.0), ((1, 1, 1), 0.0))),
        torch.ones(1, 1, 1).double(),
    )
    second = _with_misfit(LogJoint(squared_model, x), first).locs[0, 1, 0]
    assert abs(abs(float(second)) - 0.6) < 0.1  # of log p(x | z) alone, as q is the prior
