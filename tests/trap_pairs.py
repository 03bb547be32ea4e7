"""Gaussian pairs that several tests of Pyro's traps share."""

import functools
import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

Normal = functools.partial(dist.Normal, validate_args=False)


def reference(loc, sigma):
    """torch's own Gaussian, in float64 whatever comes in."""
    return torch.distributions.Normal(*(torch.as_tensor(v, dtype=torch.float64) for v in (loc, sigma)))


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_exact(weights, log_evidence):
    """Every importance weight of the exact posterior is the evidence itself, to rounding."""
    torch.testing.assert_close(weights, log_evidence.expand_as(weights), rtol=1e-10, atol=1e-10)


# --- users' pairs that share names train independently ---------------------------------------------------


# Each is z ~ N(0, 1), x | z ~ N(a z + b, sigma^2) with a linear guide; ``tensors`` is all that is to be trained.


def story(decoder, sigma, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", Normal(zeros(len(x)), 1.0))
        return pyro.sample("x", Normal(decoder(z[..., None])[..., 0], sigma), obs=x)


def posterior(encoder, x):
    mean, log_sigma = encoder(x[:, None]).unbind(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("z", Normal(mean, log_sigma.exp()))


def networks():
    return nn.Linear(1, 1).double(), nn.Linear(1, 2).double()


class PlainModule(nn.Module):
    """Model and guide as two methods of one module, as in Pyro's VAE tutorial."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = networks()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        return story(self.decoder, 0.5, x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        return posterior(self.encoder, x)


# --- an objective forgets the last pair ------------------------------------------------------------------


def grid_model(x):
    """x_nj ~ N(z_n, 1): the data at dimension -2, their entries at -1."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", Normal(zeros(len(x), 1), 1.0))
        with pyro.plate("entries", x.shape[1], dim=-1):
            return pyro.sample("x", Normal(z, 1.0), obs=x)


def grid_guide(x):
    """Its exact posterior."""
    precision = 1.0 + x.shape[1]
    with pyro.plate("data", len(x), dim=-2):
        return pyro.sample("z", Normal(x.sum(1, keepdim=True) / precision, precision**-0.5))


def equicorrelated(num, noise=1.0):
    """N(0, 1 1' + noise I), in which z is integrated out of ``num`` entries."""
    covariance = torch.ones(num, num, dtype=torch.float64) + noise * torch.eye(num, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(zeros(num), covariance)


# --- structures: the weights of the exact posterior are the evidence, written out ------------------------


def rows_case():
    x = randn(6)

    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", Normal(pyro.sample("w", Normal(zeros(len(x)), 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("w", Normal(x / 2, 0.5**0.5))

    return model, guide, (x,), "rows", reference(0.0, 2**0.5).log_prob(x)


def chain_case():
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1), which the guide samples in the other order."""
    x = randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Normal(zeros(len(x)), 1.0))
            pyro.sample("x", Normal(pyro.sample("z2", Normal(z1, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("z1", Normal(z2 / 2, 0.5**0.5))

    return model, guide, (x,), None, reference(0.0, 3**0.5).log_prob(x)


def discrete_case():
    """A coin that decides the mean; the guide is the exact posterior."""
    x = randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.full_like(x, 0.3)))
            pyro.sample("x", Normal(2 * k, 1.0), obs=x)

    log_joint = torch.stack([reference(2.0 * k, 1.0).log_prob(x) + math.log((0.7, 0.3)[k]) for k in (0, 1)])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=log_joint[1] - log_joint[0]))

    return model, guide, (x,), None, log_joint.logsumexp(0)
