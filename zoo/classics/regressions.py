r"""Regressions: linear, logistic, by a Gaussian process, and with a horseshoe prior.

.. math:: y_n \sim N(x_n^T w, \sigma^2), \quad y_n \sim \mathrm{Bernoulli}(\sigma(x_n^T w)), \quad y_n \sim N(f(t_n),
    \sigma^2), \quad w_k = \tau \lambda_k b_k, \; \tau, \lambda_k \sim C^+(1)

References:
    Carvalho, Polson, Scott, "The Horseshoe Estimator for Sparse Signals", 2010, Biometrika 97(2).
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import HalfCauchy, Normal

from zoo.classics.reference import Classic, gaussian_posterior, grid_moments, log_integral

_SIGMA = 0.5
_STEP = 0.02


def linear_model(x: Tensor, y: Tensor) -> None:
    """Linear regression of y (N,) on x (N, D), with a standard normal prior and known noise."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w @ x.T, _SIGMA).to_event(1), obs=y)


def linear_regression(num_data: int = 20, data_dim: int = 3) -> Classic:
    """Bayesian linear regression, in closed form."""
    x = torch.randn(num_data, data_dim, dtype=torch.float64)
    y = x @ torch.randn(data_dim, dtype=torch.float64) + _SIGMA * torch.randn(num_data, dtype=torch.float64)
    evidence, moments = gaussian_posterior(x, torch.eye(data_dim, dtype=torch.float64), _SIGMA, y)
    args = (x, y)
    return Classic(
        name="linear regression", model=linear_model, args=args, log_evidence=evidence, moments={"w": moments}
    )


def _kernel(t: Tensor) -> Tensor:
    jitter = 1e-6 * torch.eye(len(t), dtype=t.dtype)
    return (-0.5 * (t - t.unsqueeze(-1)).square()).exp() + jitter


def process_model(t: Tensor, y: Tensor) -> None:
    """Regression of y (N,) at times t (N,) by a Gaussian process with a squared exponential kernel."""
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(t), _kernel(t)))
    pyro.sample("y", dist.Normal(f, _SIGMA).to_event(1), obs=y)


def gaussian_process(num_data: int = 10) -> Classic:
    """Gaussian process regression, in closed form."""
    t = torch.linspace(-3, 3, num_data, dtype=torch.float64)
    y = t.sin() + _SIGMA * torch.randn_like(t)
    evidence, moments = gaussian_posterior(torch.eye(num_data, dtype=t.dtype), _kernel(t), _SIGMA, y)
    return Classic(
        name="Gaussian process", model=process_model, args=(t, y), log_evidence=evidence, moments={"f": moments}
    )


def logistic_model(x: Tensor, y: Tensor) -> None:
    """Logistic regression of y (N,), zeros and ones, on x (N, D)."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=w @ x.T).to_event(1), obs=y)


def logistic_regression(num_data: int = 30) -> Classic:
    """Logistic regression on a constant and one covariate, by a grid over the two coefficients."""
    covariate = torch.randn(num_data, dtype=torch.float64)
    x = torch.stack([torch.ones_like(covariate), covariate], -1)
    y = torch.bernoulli((0.5 + 1.5 * covariate).sigmoid())
    line = torch.arange(-10.0, 10.0, 0.05, dtype=torch.float64)
    w = torch.cartesian_prod(line, line)
    values = Normal(w.new_zeros(()), 2.0).log_prob(w).sum(-1) + ((2 * y - 1) * (w @ x.T)).sigmoid().log().sum(-1)
    evidence, moments = log_integral(values, 0.05**2), {"w": grid_moments(values, w)}
    return Classic(
        name="logistic regression", model=logistic_model, args=(x, y), log_evidence=evidence, moments=moments
    )


def horseshoe_model(x: Tensor, y: Tensor) -> None:
    """Linear regression of y (N,) on x (N, D), most coefficients near zero, the others free; non-centred."""
    tau = pyro.sample("tau", dist.HalfCauchy(x.new_ones(())))
    local = pyro.sample("local", dist.HalfCauchy(x.new_ones(x.shape[1])).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    w = tau.unsqueeze(-1) * local * b
    pyro.sample("y", dist.Normal(w @ x.T, _SIGMA).to_event(1), obs=y)


def horseshoe_regression(num_data: int = 20, data_dim: int = 4) -> Classic:
    """Horseshoe regression on orthogonal columns, which are apart given tau: each local scale on a grid, then tau."""
    x, _ = torch.linalg.qr(torch.randn(num_data, data_dim, dtype=torch.float64))
    w = torch.zeros(data_dim, dtype=torch.float64)
    w[0] = 3.0
    y = x @ w + _SIGMA * torch.randn(num_data, dtype=torch.float64)
    log_scale = torch.arange(-40.0, 40.0, _STEP * 2, dtype=torch.float64)
    prior = HalfCauchy(1.0).log_prob(log_scale.exp()) + log_scale
    sd = ((log_scale + log_scale.unsqueeze(-1)).mul(2).exp() + _SIGMA**2).sqrt()  # of a projection, by tau and local
    values = prior
    for projection in x.T @ y:
        terms = Normal(0.0, sd).log_prob(projection) + prior
        values = values + terms.logsumexp(-1) + math.log(_STEP * 2)
    rest = (y.square().sum() - (x.T @ y).square().sum()) / _SIGMA**2
    outside = -0.5 * rest - (num_data - data_dim) * (math.log(_SIGMA) + 0.5 * math.log(2 * math.pi))
    evidence = log_integral(values, _STEP * 2) + float(outside)
    moments = {"tau": grid_moments(values, log_scale.exp())}
    return Classic(
        name="horseshoe regression", model=horseshoe_model, args=(x, y), log_evidence=evidence, moments=moments
    )
