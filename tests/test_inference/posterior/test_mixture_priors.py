"""Latents whose prior is a mixture: their coordinates are those of the components' common support."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch

from inference import evidence

SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
CENTRES = torch.tensor([-2.0, 2.0], dtype=torch.float64)


def mixture(components):
    return dist.MixtureSameFamily(dist.Categorical(SHARES), components)


def model_of(prior, decode=lambda z: z, scale=0.5):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(decode(z), scale), obs=x)

    return model


X = torch.tensor([-2.0, 0.0, 2.5], dtype=torch.float64)


@pytest.mark.parametrize(("method", "tolerance"), [("quadrature", 1e-6), ("adaptive", 0.05), ("annealed", 0.5)])
def test_evidence_under_a_mixture_of_gaussians_is_their_convolution(method, tolerance):
    spread = torch.tensor([0.5, 1.0]).double()
    model, truth = (
        model_of(mixture(dist.Normal(CENTRES, spread))),
        mixture(dist.Normal(CENTRES, spread.hypot(spread[0]))),
    )
    found = evidence(model, X, method=method, seed=0, progress=False)
    torch.testing.assert_close(found.value, truth.log_prob(X), rtol=0, atol=tolerance)


def test_evidence_under_a_mixture_on_an_interval_is_scipys_integral():
    a, b = torch.tensor([2.0, 8.0]).double(), torch.tensor([8.0, 2.0]).double()
    found = evidence(model_of(mixture(dist.Beta(a, b)), scale=0.2), X, seed=0, progress=False)

    def integrand(z, x):
        prior = sum(w * scipy.stats.beta.pdf(z, *ab) for w, *ab in zip(SHARES.numpy(), a.numpy(), b.numpy()))
        return prior * scipy.stats.norm.pdf(x, z, 0.2)

    truth = [np.log(scipy.integrate.quad(integrand, 0, 1, args=(x,), epsabs=0, limit=200)[0]) for x in X.tolist()]
    np.testing.assert_allclose(found.value, truth, atol=1e-6)


def test_a_mixture_of_gaussian_vectors_has_its_evidence():
    centres = torch.stack([CENTRES, -CENTRES], -1)
    prior = mixture(dist.Normal(centres, 1.0).to_event(1))
    model = model_of(prior, decode=lambda z: z.sum(-1), scale=1.0)
    truth = dist.Normal(0.0, 3.0**0.5)  # either component's sum is centred at zero
    found = evidence(model, X, seed=0, progress=False)
    torch.testing.assert_close(found.value, truth.log_prob(X), rtol=0, atol=1e-6)


def test_components_on_different_supports_are_refused_by_name():
    uniforms = dist.Uniform(torch.zeros(2).double(), torch.tensor([1.0, 2.0]).double())
    with pytest.raises(ValueError, match="known support at latent site 'z', got MixtureSameFamily"):
        evidence(model_of(mixture(uniforms)), X, method="quadrature", progress=False)
