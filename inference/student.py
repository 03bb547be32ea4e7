"""Multivariate Student-t laws, one per datum, as proposals with tails heavier than a Gaussian's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inference.hmc import Gaussian


class Student(NamedTuple):
    r"""One Student-t law per datum.

    .. math:: u = m + \sqrt{\nu / c} \, L \epsilon, \quad \epsilon \sim N(0, I), \quad c \sim \chi^2_\nu

    Attributes:
        gaussian: Location m and factor L, the law without its heavy tails.
        degrees: Degrees of freedom, nu.
    """

    gaussian: Gaussian
    degrees: float

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws u (S, N, d), and their log-density (S, N) in nats."""
        loc = self.gaussian.loc
        noise = torch.randn(num_samples, *loc.shape, dtype=loc.dtype, device=loc.device)
        half = torch.full(noise.shape[:2], self.degrees / 2, dtype=loc.dtype, device=loc.device)
        chi_squared = 2 * torch.distributions.Gamma(half, torch.ones_like(half), validate_args=False).sample()
        v = noise * (self.degrees / chi_squared).sqrt().unsqueeze(-1)
        return self.gaussian.colour(v), self.log_prob_whitened(v)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density at u (S, N, d), (S, N) in nats."""
        return self.log_prob_whitened(self.gaussian.whiten(u))

    def rows(self, index: Tensor) -> Student:
        """The laws of chosen data, (M,) integers."""
        return Student(Gaussian(*(part[index] for part in self.gaussian)), self.degrees)

    @property
    def log_det(self) -> Tensor:
        """log det L, (N,)."""
        return self.gaussian.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob_whitened(self, v: Tensor) -> Tensor:
        """Log-density of u = m + L v, as a density of u, at v (S, N, d): (S, N) in nats."""
        dim, nu = v.shape[-1], self.degrees
        constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - dim / 2 * math.log(nu * math.pi)
        return constant - self.log_det - (nu + dim) / 2 * torch.log1p(v.square().sum(-1) / nu)


def mixture_log_prob(laws: Sequence[Student], u: Tensor) -> Tensor:
    """Log-density of the mixture of laws in equal parts at u (S, N, d), (S, N) in nats."""
    return torch.stack([law.log_prob(u) for law in laws]).logsumexp(0) - math.log(len(laws))


def moment_fit(u: Tensor, log_weights: Tensor, before: Student) -> Student:
    """The law with the weighted mean and covariance of draws, drawn towards the one before where they are few.

    The covariance counts as many draws as the effective sample size, and the one before as d + 1 more; where all
    weights are zero, or their covariance has no factor, the law is the one before.

    Args:
        u: (S, N, d).
        log_weights: (S, N).
        before: What is drawn towards.
    """
    dim, factor = u.shape[-1], before.gaussian.factor
    weights = torch.softmax(log_weights, 0).nan_to_num(0.0)
    mean = torch.einsum("sn,sni->ni", weights, u)
    residual = u - mean
    covariance = torch.einsum("sn,sni,snj->nij", weights, residual, residual)
    size = (1 / weights.square().sum(0).clamp(min=1e-300)).reshape(-1, 1, 1)
    covariance = (size * covariance + (dim + 1) * factor @ factor.mT) / (size + dim + 1)
    fitted, info = torch.linalg.cholesky_ex(covariance)
    sound = (info == 0) & (weights.sum(0) > 0.5) & fitted.isfinite().all(-1).all(-1)
    loc = torch.where(sound.unsqueeze(-1), mean, before.gaussian.loc)
    return Student(Gaussian(loc, torch.where(sound.reshape(-1, 1, 1), fitted, factor)), before.degrees)


def temperatures(log_weights: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Powers in (0, 1] of weights (S, N) by which their effective sample size is kept at a number, by bisection.

    Args:
        log_weights: (S, N) in nats.
        least: Effective sample size that is asked for; the power is one where the weights have it already.

    Returns:
        The powers and the effective sample sizes that they leave, each (N,).
    """

    def size(power: Tensor) -> Tensor:
        weights = torch.softmax(power * log_weights, 0)
        return 1 / weights.square().sum(0)

    high = log_weights.new_ones(log_weights.shape[1])
    low = torch.zeros_like(high)
    power = high
    for _ in range(24):
        enough = ~(size(power) < least)
        low, high = torch.where(enough, power, low), torch.where(enough, high, power)
        if bool((low == 1).all()):
            break
        power = torch.where(low == 1, low, (low + high) / 2)
    low = low.clamp(min=2**-24)
    return low, size(low)
