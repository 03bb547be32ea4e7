"""Laplace's approximation: exact for Gaussians, Stirling's for a gamma, and without a claim."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from linear_problems import problem
from pyro_problems import SQUARES, one_mode_guide, square_evidence, square_model

from inference import Laplace, evidence


def laplace(model, x, guide=None, **options):
    return evidence(model, x, method=Laplace(**options), guide=guide, seed=0, progress=False)


@pytest.mark.parametrize("seed", range(12))
def test_a_gaussian_posterior_has_its_evidence_to_rounding(seed):
    model, x, truth = problem(seed, 3)
    np.testing.assert_allclose(laplace(model, x).value.numpy(), truth, rtol=1e-8, atol=1e-7)


def test_a_gammas_evidence_is_stirlings():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), x.new_tensor(0.5)))
            pyro.sample("x", dist.Poisson(rate.unsqueeze(-1)).expand([*rate.shape, 4]).to_event(1), obs=x)

    x = torch.tensor([[0.0, 0.0, 1.0, 2.0], [5.0, 9.0, 3.0, 4.0], [50.0, 61.0, 44.0, 57.0]]).double()
    shape = 2 + x.numpy().sum(-1)
    exact = (
        2 * math.log(0.5)
        - shape * math.log(4.5)
        + scipy.special.gammaln(shape)
        - scipy.special.gammaln(x.numpy() + 1).sum(-1)
    )
    # In the logarithm of the rate, Gamma(s) is the integral of exp(s u - e^u), with mode log s and curvature s.
    stirling = shape * np.log(shape) - shape + 0.5 * np.log(2 * np.pi / shape)
    got = laplace(model, x)
    np.testing.assert_allclose(got.value.numpy(), exact - scipy.special.gammaln(shape) + stirling, rtol=1e-10)
    # The error falls with the number of observations, here of events.
    np.testing.assert_allclose(exact - got.value.numpy(), 1 / (12 * shape), rtol=1e-2)


def test_nothing_is_claimed():
    model, x, _ = problem(1, 3)
    got = laplace(model, x)
    assert bool((got.lower == -math.inf).all())
    assert bool((got.upper == math.inf).all())
    assert got.guarantee == ("asymptotic",) * 3
    assert (got.mean.lower, got.mean.upper) == (-math.inf, math.inf)


def test_of_two_equal_modes_one_counts():
    truth = square_evidence(SQUARES)
    for guide in (one_mode_guide, None):
        got = laplace(square_model, SQUARES, guide).value.numpy()
        np.testing.assert_allclose(got + math.log(2), truth, atol=0.02)


def test_a_ridge_has_no_value():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("x", (0.5 - x[:, 0]) * z.square() - z**4)

    got = laplace(model, torch.tensor([[0.0], [2.0]]).double()).value
    assert got.isnan().tolist() == [True, False]
    expected = 0.5 * math.log(2 * math.pi) - 0.5 * math.log(4) - 0.5 * math.log(2 * math.pi)
    assert float(got[1]) == pytest.approx(expected, abs=1e-9)


def test_no_start_is_refused():
    with pytest.raises(ValueError, match="num_starts to be at least 1, got 0"):
        Laplace(0)
