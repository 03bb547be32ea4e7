"""What a classic model is, and integrals on grids that its reference answers come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Classic:
    """A Pyro model whose latents all data share, with reference answers, all in float64.

    Attributes:
        name: Its name.
        model: Pyro model, to be taken with ``whole=True``.
        args: Its arguments, the data.
        log_evidence: log p of all data, in nats.
        moments: Posterior mean and standard deviation of latent sites, where they are known.
    """

    name: str
    model: Callable[..., Any] = field(repr=False)
    args: tuple[Tensor, ...] = field(repr=False)
    log_evidence: float
    moments: Mapping[str, Moments] = field(default_factory=dict, repr=False)


def log_integral(log_values: Tensor, step: float) -> float:
    """Log of an integral by the trapezoidal rule, of values on an even grid that vanish at its ends."""
    return float(log_values.flatten().logsumexp(0)) + math.log(step)


def grid_moments(log_values: Tensor, points: Tensor) -> Moments:
    """Mean and standard deviation of points (M,) or (M, K), given log values (M,) of their density on an even grid."""
    weight = log_values.softmax(0).reshape(-1, *(1,) * (points.dim() - 1))
    mean = (weight * points).sum(0)
    return mean, (weight * (points - mean).square()).sum(0).sqrt()


def gaussian_posterior(design: Tensor, prior: Tensor, sigma: float, y: Tensor) -> tuple[float, Moments]:
    """log p(y), and moments of z, for y = design z + noise and a Gaussian z of covariance ``prior``."""
    covariance = design @ prior @ design.T + sigma**2 * torch.eye(len(y), dtype=y.dtype)
    evidence = MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    gain = torch.linalg.solve(covariance, design @ prior).T
    return float(evidence), (gain @ y, (prior - gain @ design @ prior).diagonal().sqrt())
