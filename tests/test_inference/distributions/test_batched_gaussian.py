"""Gaussians, one per data point, against torch's distributions."""

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from inference.distributions.batched_gaussian import Gaussians


def make(is_diagonal):
    mean = torch.randn(6, 3).double()
    if is_diagonal:
        factor = torch.rand(6, 3).double() + 0.5
        return Gaussians(mean, factor), Independent(Normal(mean, factor), 1)
    factor = torch.randn(6, 3, 3).double().tril(-1) + torch.diag_embed(torch.rand(6, 3).double() + 0.5)
    return Gaussians(mean, factor), MultivariateNormal(mean, scale_tril=factor)


@pytest.mark.parametrize("is_diagonal", [True, False])
def test_the_density_is_linear_in_the_features(is_diagonal):
    gaussians, reference = make(is_diagonal)
    z = torch.randn(4, 3).double() * 3
    weights, constant = gaussians.coefficients()
    got = gaussians.features(z) @ weights.mT + constant
    assert torch.allclose(got, reference.log_prob(z.unsqueeze(1)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_diagonal", [True, False])
def test_moments_and_draws_are_those_of_the_distribution(is_diagonal):
    gaussians, reference = make(is_diagonal)
    covariance = torch.diag_embed(reference.variance) if is_diagonal else reference.covariance_matrix
    assert torch.allclose(gaussians.var, reference.variance, rtol=1e-12)
    assert torch.allclose(gaussians.mean_covariance, covariance.mean(0), rtol=1e-12)
    assert torch.allclose(gaussians.log_det_factor, covariance.logdet() / 2, rtol=1e-11)
    noise = torch.randn(6, 3).double()
    whitened = gaussians.transform(noise)
    want = reference.log_prob(reference.mean) - noise.square().sum(-1) / 2
    assert torch.allclose(reference.log_prob(whitened), want, rtol=1e-11)
