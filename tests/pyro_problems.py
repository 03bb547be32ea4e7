"""Small Pyro pairs of a user's kind, with their evidence by quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import autoguide

COUNTS = torch.tensor([[3.0, 5.0, 9.0], [0.0, 1.0, 0.0], [7.0, 4.0, 2.0]]).double()
TIMES = torch.tensor([-1.0, 0.0, 1.0]).double()


def guide_of_parts(model, first, second):
    """Independent Gaussians over one site, and over another, as one AutoGuide."""
    parts = autoguide.AutoGuideList(model)
    parts.append(autoguide.AutoNormal(poutine.block(model, expose=[first])))
    parts.append(autoguide.AutoDiagonalNormal(poutine.block(model, expose=[second])))
    return parts


def noisy(f, latent_dim, sigma):
    """x = f(z) + sigma noise, z standard normal."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(f(z), sigma).to_event(1), obs=x)

    return model


def poisson_model(x):
    """Counts with a positive base rate and a slope: two latent sites, one bounded."""
    with pyro.plate("data", len(x)):
        base = pyro.sample("base", dist.HalfNormal(x.new_tensor(4.0)))
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
        rate = base.unsqueeze(-1) * (slope.unsqueeze(-1) * TIMES).exp()
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def poisson_guide(x):
    """A crude guide, which samples the sites in the other order."""
    with pyro.plate("data", len(x)):
        pyro.sample("slope", dist.Normal(torch.zeros_like(x[:, 0]), 0.7))
        pyro.sample("base", dist.LogNormal((x.mean(-1) + 0.5).log(), 0.6))


def poisson_evidence(x):
    """log p(x) of each data point by the trapezoidal rule in log base and slope, which is exact to rounding here."""
    log_base, slope = np.linspace(-40, 5, 4001)[:, None], np.linspace(-8, 8, 801)
    prior = scipy.stats.halfnorm.logpdf(np.exp(log_base), scale=4) + log_base + scipy.stats.norm.logpdf(slope)
    cell = math.log(45 / 4000 * 16 / 800)
    values = []
    for counts in x.numpy():
        log_rate = log_base[..., None] + slope[:, None] * TIMES.numpy()
        terms = counts * log_rate - np.exp(log_rate) - scipy.special.gammaln(counts + 1)
        values.append(scipy.special.logsumexp(prior + terms.sum(-1)) + cell)
    return np.array(values)


def square_model(x):
    """x = z^2 + noise: two modes of equal mass, at plus and minus the root."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.square(), 0.1), obs=x[:, 0])


def one_mode_guide(x):
    """Sees the positive root alone."""
    with pyro.plate("data", len(x)):
        root = x[:, 0].sqrt()
        pyro.sample("z", dist.Normal(root, 0.06 / root))


def square_evidence(x):
    def density(z, value):
        return scipy.stats.norm.pdf(z) * scipy.stats.norm.pdf(value, z * z, 0.1)

    return np.log(
        [
            2 * scipy.integrate.quad(density, 0, 6, args=(float(v),), points=[float(v) ** 0.5], epsabs=1e-13)[0]
            for v in x
        ]
    )


SQUARES = torch.tensor([[1.0], [1.5], [2.0]]).double()
