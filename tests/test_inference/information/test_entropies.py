"""The sum of three entropies that the ELBO equals where it is stationary, and does not elsewhere."""

import math

import pytest
import torch

from guides import Flow, MeanField, TiedMeanField
from inference import elbo_entropies
from inference.information import rate_distortion
from zoo import VAE, DeepGaussianVAE, LinearVAE
from zoo.linear import spectrum, stationary_points_of_learned_noise


def elbo(model, guide, x):
    return -rate_distortion(model, guide, x).total.value


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 4, generator=generator).double() * torch.tensor([3.0, 2.0, 1.0, 0.5]).double()


def test_the_elbo_is_the_sum_at_every_point_with_learnt_noise(x):
    x = x - x.mean(0)
    eigen = spectrum(x)
    points = list(stationary_points_of_learned_noise(eigen.eigenvalues, eigen.eigenvectors, 2))
    assert len(points) == 4
    for point in points:
        model = LinearVAE(4, 2).double()
        model.W.data, model.log_sigma.data = point.W, torch.tensor(0.5 * math.log(point.var)).double()
        guide = TiedMeanField(model)
        assert float(elbo_entropies(model, guide, x).total) == pytest.approx(elbo(model, guide, x), abs=1e-6)


def test_off_a_stationary_point_it_differs_by_what_theory_says(x):
    model = LinearVAE.optimum(x, 2)
    model.log_sigma.data += 0.1  # the noise is no longer at its optimum
    guide = TiedMeanField(model)
    posterior = guide.posterior(x)
    own = model.linear_gaussian
    error = (x - model.decode(posterior.mean)).square().sum(-1).mean() + (own.W.square() * posterior.variance[0]).sum()
    square = (posterior.mean.square() + posterior.variance).sum(-1).mean()
    expected = -0.5 * (error / own.sigma**2 - 4) - 0.5 * (square - 2)
    difference = elbo(model, guide, x) - elbo_entropies(model, guide, x).total
    assert abs(float(difference)) > 1e-3
    torch.testing.assert_close(difference, expected.detach(), rtol=1e-6, atol=1e-9)


def test_entropies_are_those_of_the_distributions(x):
    model, guide = DeepGaussianVAE(4, 2).double(), MeanField(4, 2).double()
    found = elbo_entropies(model, guide, x)
    z = guide.posterior(x).mean
    torch.testing.assert_close(found.noise, model.likelihood(z).entropy()[0].detach())
    torch.testing.assert_close(found.posterior, guide.posterior(x).entropy().detach())
    assert float(found.prior) == pytest.approx(math.log(2 * math.pi * math.e))


def test_it_refuses_what_has_no_gaussian_noise_or_posterior(x):
    with pytest.raises(TypeError, match="expected a model with decode"):
        elbo_entropies(VAE(4, 2).double(), MeanField(4, 2).double(), x)
    with pytest.raises(TypeError, match="expected a guide with a Gaussian posterior"):
        elbo_entropies(DeepGaussianVAE(4, 2).double(), Flow(4, 2).double(), x)
