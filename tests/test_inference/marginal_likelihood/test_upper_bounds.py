"""Upper bounds from a pair's samples, against closed forms and NumPy."""

import math

import numpy as np
import pytest
import torch
from linear_problems import rescaled
from torch.distributions import kl_divergence

from guides import MeanField
from inference import cubo, eubo, log_weights, posterior_draws, simulated_draws, summarise
from zoo import LinearVAE


def linear_model(data_dim=6, latent_dim=3):
    torch.manual_seed(0)
    return LinearVAE(data_dim, latent_dim, sigma=0.5).double().requires_grad_(False)


def data_of(model):
    return simulated_draws(model, 20, seed=1).x


def test_eubo_is_the_evidence_plus_the_reverse_kl():
    model = linear_model()
    guide = MeanField(6, 3, hidden=(8,)).double()
    x = data_of(model)
    got = eubo(model, guide, posterior_draws(model, x, num_samples=2000, seed=0))
    with torch.no_grad():
        kl = kl_divergence(model.posterior(x), guide.posterior(x))
    assert bool(((got.value - model.log_evidence(x) - kl).abs() <= 4 * got.standard_error).all())
    assert float((kl / got.standard_error).min()) > 8  # it is not the evidence itself


def test_eubo_of_simulated_data_bounds_their_mean():
    model = linear_model()
    guide = MeanField(6, 3, hidden=(8,)).double()
    draws = simulated_draws(model, 4000, seed=0)
    got = eubo(model, guide, draws)
    with torch.no_grad():
        kl = kl_divergence(model.posterior(draws.x), guide.posterior(draws.x))
    assert bool((got.standard_error == math.inf).all())
    off = got.value - model.log_evidence(draws.x) - kl
    assert abs(float(off.mean())) <= 4 * float(off.std()) / math.sqrt(4000)


def test_cubo_is_the_log_of_the_second_moment():
    model = linear_model()
    x = data_of(model)
    torch.manual_seed(0)
    got = cubo(summarise([log_weights(model, rescaled(model, 1.3), x, num_samples=20_000)], 20_000))
    # E (p / q)^2 of two centred Gaussians of variances 1 and s^2: s^2 / sqrt(2 s^2 - 1) for each coordinate.
    expected = model.log_evidence(x) + 0.5 * 3 * math.log(1.3**2 / math.sqrt(2 * 1.3**2 - 1))
    assert bool(((got.value - expected).abs() <= 4 * got.standard_error).all())
    assert bool((got.value - model.log_evidence(x) > 4 * got.standard_error).all())


def test_cubo_from_samples_of_a_narrow_guide_lies_below_the_evidence():
    model = linear_model(data_dim=12, latent_dim=10)
    x = data_of(model)
    torch.manual_seed(0)
    got = cubo(summarise([log_weights(model, rescaled(model, 0.2), x, num_samples=1000)], 1000))
    assert float((got.value - model.log_evidence(x)).mean()) < -1


@pytest.mark.parametrize("num_samples", [1, 2, 3, 50])
def test_cubo_of_given_weights_is_numpys_by_the_delta_method(num_samples):
    weights = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(0)).double()
    got = cubo(summarise([weights], num_samples))
    squares = np.exp(2 * weights.numpy())
    np.testing.assert_allclose(got.value.numpy(), 0.5 * np.log(squares.mean(0)), rtol=1e-12)
    if num_samples == 1:
        assert bool((got.standard_error == math.inf).all())
        return
    expected = 0.5 * squares.std(0, ddof=1) / math.sqrt(num_samples) / squares.mean(0)
    np.testing.assert_allclose(got.standard_error.numpy(), expected, rtol=1e-10)
