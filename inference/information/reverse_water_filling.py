r"""Reverse water-filling: rate and distortion of the best linear Gaussian code, from the eigenvalues of the data.

.. math:: z \sim N(0, I_K), \quad x \mid z \sim N(W z + \mu, \sigma^2 I_D), \quad q(z \mid x) = N(V (x - \mu), \Delta)

At a fixed sigma^2 the minimum of D + beta R over W, V and Delta is reverse water-filling, truncated at K: the water
level is theta = beta sigma^2, and of the first K principal components those above it are sent,

.. math::
    R = \tfrac12 \sum_{j \le K} \log^+ \frac{\lambda_j}{\theta}, \qquad
    D = \tfrac D2 \log 2 \pi \sigma^2 + \frac{q \theta + \sum_{j \text{ not sent}} \lambda_j}{2 \sigma^2},

where q components are sent.

References:
    Berger, "Rate Distortion Theory", 1971 (reverse water-filling). Alemi et al., "Fixing a Broken ELBO", 2018,
    arXiv 1711.00464 (rate and distortion of a VAE). Lucas et al., "Don't Blame the ELBO!", 2019, arXiv 1911.02469.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inference.core.checks import check_count, check_positive
from inference.distributions.gaussian import LOG_2PI


class GaussianPoint(NamedTuple):
    """One point of the closed-form curve.

    Attributes:
        rate: R in nats per data point.
        distortion: D in nats per data point; negative where the density is above one.
        beta: Minus the slope of the curve, -dD/dR.
    """

    rate: float
    distortion: float
    beta: float


def water_filling(eigenvalues: Tensor, var: float, latent_dim: int, *, beta: float = 1.0) -> GaussianPoint:
    r"""Reverse water-filling: the minimum of D + beta R over linear Gaussian codes with K latents, at fixed sigma^2.

    Warning:
        Holds for the mean over data with this covariance; information about x in the sense of Shannon is this rate
        only where the data are Gaussian.

    Args:
        eigenvalues: Variances of the data along the principal axes (divisor N), all D of them, (D,), in any order.
        var: sigma^2.
        latent_dim: K, up to D.
        beta: Weight of the rate.

    Raises:
        TypeError: If the eigenvalues are not a tensor, or latent_dim is not an integer.
        ValueError: If an argument is out of range.

    Example:
        >>> point = water_filling(torch.tensor([4.0, 2.0, 0.5]), var=1.0, latent_dim=2)
        >>> math.isclose(point.rate, math.log(8) / 2)
        True
    """
    lam = _check(eigenvalues, var, latent_dim)
    check_positive(beta, "beta")
    level = beta * var
    sent = (lam > level) & (torch.arange(len(lam), device=lam.device) < latent_dim)
    rate = 0.5 * torch.where(sent, lam / level, 1.0).log().sum()
    error = torch.where(sent, level, lam).sum()
    distortion = 0.5 * (len(lam) * (LOG_2PI + math.log(var)) + error / var)
    return GaussianPoint(float(rate), float(distortion), beta)


def water_filling_at_rate(eigenvalues: Tensor, var: float, latent_dim: int, *, rate: float) -> GaussianPoint:
    r"""The point of the curve at a given positive rate: the least distortion at that rate.

    For every number q of components the level theta_q at which the first q of them cost the rate R is explicit,

    .. math:: \log \theta_q = \frac1q \left( \sum_{j \le q} \log \lambda_j - 2 R \right),

    and as the positive parts are at least those terms, the level is the largest of the theta_q.

    Args:
        eigenvalues: See :func:`water_filling`.
        var: sigma^2.
        latent_dim: K.
        rate: R > 0 in nats per data point.

    Raises:
        TypeError: See :func:`water_filling`.
        ValueError: See :func:`water_filling`; and if the rate is not positive, or all data are constant.
    """
    lam = _check(eigenvalues, var, latent_dim)
    check_positive(rate, "rate")
    logs = lam[:latent_dim].log()
    numbers = torch.arange(1, latent_dim + 1, dtype=lam.dtype, device=lam.device)
    level = float(((logs.cumsum(0) - 2 * rate) / numbers).max().exp())
    if level == 0:
        raise ValueError("expected data with a positive variance, got eigenvalues that are all zero")
    return water_filling(lam, var, latent_dim, beta=level / var)


def _check(eigenvalues: Tensor, var: float, latent_dim: int) -> Tensor:
    """The eigenvalues in float64 and descending."""
    if not isinstance(eigenvalues, Tensor):
        raise TypeError(f"expected eigenvalues as a tensor (D,), got {type(eigenvalues).__name__}")
    if eigenvalues.dim() != 1 or not len(eigenvalues) or not bool(((eigenvalues >= 0) & eigenvalues.isfinite()).all()):
        raise ValueError(f"expected eigenvalues (D,), finite and at least zero, got {eigenvalues}")
    check_count(latent_dim, "latent_dim")
    if latent_dim > len(eigenvalues):
        raise ValueError(f"expected latent_dim up to D = {len(eigenvalues)}, got {latent_dim}")
    check_positive(var, "sigma^2")
    return eigenvalues.detach().double().sort(descending=True).values
