"""Gaussian pairs whose divergences and information are written out."""

import functools
import math

import pyro
import pyro.distributions as dist
import torch

from guides import Linear
from zoo import LinearVAE, Scaled, digits, digits_logit
from zoo.linear.estimation import spectrum

# A defect must be told with a p-value below 1e-6: a two-sided normal deviate of 4.9.
PASS, DETECT = 4.0, 4.9


def eye(k):
    return torch.eye(k, dtype=torch.float64)


def function_pair(posterior, prior=None, latent_dim=2, **plate):
    """A model and guide made of functions, with any distributions of the site "code"."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1, **plate):
            distribution = dist.Normal(torch.zeros(latent_dim).to(x), 1.0).to_event(1) if prior is None else prior(x)
            z = pyro.sample("code", distribution)
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[: len(z), :1])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1, **plate):
            pyro.sample("code", posterior(x))

    return model, guide


# --- the linear VAE at its optimum -----------------------------------------------------------------------


DIGITS, LOGITS = (
    functools.cache(lambda: digits(test_size=0, transform=Scaled(16.0)).train),
    functools.cache(lambda: digits_logit(test_size=0).train),
)


@torch.no_grad()
def optimum(x, latent_dim, sigma2):
    """The linear VAE's global optimum at fixed noise, in closed form, and the eigenvalues of the data."""
    values, axes = spectrum(x).eigenvalues, spectrum(x).eigenvectors
    model = LinearVAE(x.shape[1], latent_dim, sigma=sigma2**0.5, learn_sigma=False).double()
    guide = Linear(x.shape[1], latent_dim).double()
    model.mu.copy_(x.mean(0))
    model.log_sigma.fill_(0.5 * math.log(sigma2))
    model.W.copy_(axes[:, :latent_dim] * (values[:latent_dim] - sigma2).clamp(min=0).sqrt())
    precision = model.W.mT @ model.W + sigma2 * eye(latent_dim)
    guide.V.copy_(torch.linalg.solve(precision, model.W.mT))
    guide.bias.copy_(-guide.V @ model.mu)
    guide.log_sigma.copy_(0.5 * (sigma2 / precision.diagonal()).log())
    return model, guide, values
