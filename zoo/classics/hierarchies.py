r"""Hierarchies: eight schools, and a funnel that is seen through noise.

.. math:: \mu \sim N(0, 10^2), \; \tau \sim C^+(25), \; \eta_j \sim N(0, 1), \; y_j \sim N(\mu + \tau \eta_j, s_j^2)

.. math:: v \sim N(0, 3^2), \quad z_j \sim N(0, e^v), \quad y_j \sim N(z_j, 1)

References:
    Rubin, "Estimation in Parallel Randomized Experiments", 1981, Journal of Educational Statistics 6(4) (the schools).
    Neal, "Slice Sampling", 2003, Annals of Statistics 31(3) (the funnel).
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import HalfCauchy, MultivariateNormal, Normal

from zoo.classics.reference import Classic, grid_moments, log_integral

_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
_STEP = 0.01


def schools_model(y: Tensor, errors: Tensor) -> None:
    """Effects of coaching in eight schools, with standard errors, each (8,); non-centred."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(25.0)))
    eta = pyro.sample("eta", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1) + tau.unsqueeze(-1) * eta, errors).to_event(1), obs=y)


def eight_schools() -> Classic:
    """Eight schools: mu and eta are integrated out in closed form, tau on a grid."""
    y, errors = (torch.tensor(values, dtype=torch.float64) for values in (_EFFECTS, _ERRORS))
    log_tau = torch.arange(-30.0, 15.0, _STEP, dtype=torch.float64)
    tau = log_tau.exp()
    variance = errors.square() + tau.square().unsqueeze(-1)
    law = MultivariateNormal(torch.zeros_like(y), torch.diag_embed(variance) + 100.0)
    values = law.log_prob(y) + HalfCauchy(tau.new_tensor(25.0)).log_prob(tau) + log_tau
    precision = 0.01 + (1 / variance).sum(-1)
    mean = (y / variance).sum(-1) / precision  # of mu, given tau
    centre, spread = grid_moments(values, mean)
    within = (values.softmax(0) / precision).sum()
    moments = {"mu": (centre, (spread.square() + within).sqrt())}
    evidence = log_integral(values, _STEP)
    return Classic(name="eight schools", model=schools_model, args=(y, errors), log_evidence=evidence, moments=moments)


def funnel_model(y: Tensor) -> None:
    """A scale with a wide prior, and as many values of that scale as there are data (N,)."""
    v = pyro.sample("v", dist.Normal(y.new_zeros(()), 3.0))
    scale = (v / 2).exp().unsqueeze(-1).expand(*v.shape, len(y))
    z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def funnel(num_data: int = 9) -> Classic:
    """A funnel: z is integrated out in closed form, v on a grid."""
    y = torch.randn(num_data, dtype=torch.float64) * math.sqrt(2)
    v = torch.arange(-40.0, 40.0, _STEP, dtype=torch.float64)
    values = Normal(0.0, (1 + v.exp()).sqrt().unsqueeze(-1)).log_prob(y).sum(-1)
    values = values + Normal(v.new_zeros(()), 3.0).log_prob(v)
    moments = {"v": grid_moments(values, v)}
    return Classic(
        name="funnel", model=funnel_model, args=(y,), log_evidence=log_integral(values, _STEP), moments=moments
    )
