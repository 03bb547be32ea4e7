r"""Gaussian observation noise around a decoder's mean, in four kinds.

.. math:: p(x \mid z) = N(x; f(z), \operatorname{diag} \sigma^2)

:class:`FixedNoise`, :class:`LearntNoise` (one sigma), :class:`LearntNoisePerDim`, and :class:`OptimalNoise` (the
variance of the residuals, in closed form at every step). A model holds one of them; sigma is in the units of its
decoder's output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from inference.checks import check_count
from inference.distributions import LOG_2PI, DiagNormal


def _log_sigma(sigma: float) -> float:
    if not 0 < sigma < math.inf:
        raise ValueError(f"expected a positive finite sigma, got {sigma}")
    return math.log(sigma)


class GaussianNoise(nn.Module):
    """Base of the kinds whose sigma does not depend on the batch; a subclass provides ``log_sigma``, (1,) or (D,)."""

    log_sigma: Tensor

    @property
    def sigma(self) -> Tensor:
        """Standard deviation, (1,) or (D,)."""
        return self.log_sigma.exp()

    def forward(self, mean: Tensor, scale: Tensor) -> Distribution:
        """Law of x around its mean (..., D), sigma multiplied by the scale () of the data."""
        return DiagNormal(mean, self.sigma * scale)


class FixedNoise(GaussianNoise):
    """Noise of a standard deviation that is given and stays.

    Args:
        sigma: Standard deviation.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("log_sigma", torch.tensor([_log_sigma(sigma)]))


class LearntNoise(GaussianNoise):
    """Noise of one standard deviation for all dimensions, learnt by gradients as its logarithm.

    Args:
        sigma: Initial standard deviation.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor([_log_sigma(sigma)]))


class LearntNoisePerDim(GaussianNoise):
    """Noise with a standard deviation for each dimension, learnt by gradients as its logarithm.

    Warning:
        A dimension that the decoder fits exactly, a constant pixel say, sends its sigma to zero and the evidence to
        infinity.

    Args:
        data_dim: D.
        sigma: Initial standard deviation.
    """

    def __init__(self, data_dim: int, sigma: float = 1.0) -> None:
        super().__init__()
        check_count(data_dim, "data_dim")
        self.log_sigma = nn.Parameter(torch.full((data_dim,), _log_sigma(sigma)))


class OptimalNoise(nn.Module):
    r"""Noise whose variance is, in every batch, the one that fits the batch's residuals best.

    .. math:: \sigma^2 = \frac{1}{N D} \sum_n \|x_n - f(z_n)\|^2

    Warning:
        A law that depends on the batch is no model. It serves training; :meth:`freeze` and eval mode then turn it
        into one, and evidence and comparison refuse it before.

    References:
        Rybkin, Daniilidis, Levine, "Simple and Effective VAE Training with Calibrated Decoders", 2021,
        arXiv 2006.13202.

    Attributes:
        frozen: Whether sigma is set.
        log_sigma: (1,) buffer, NaN until frozen.
    """

    log_sigma: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_sigma", torch.full((1,), math.nan))

    @property
    def frozen(self) -> bool:
        """Whether sigma is set."""
        return not bool(self.log_sigma.isnan())

    @property
    def sigma(self) -> Tensor:
        """Standard deviation, (1,); NaN until frozen."""
        return self.log_sigma.exp()

    @torch.no_grad()
    def freeze(self, sigma: Tensor | float) -> None:
        """Set sigma for good.

        Args:
            sigma: Standard deviation in the units of the decoder's output.

        Raises:
            ValueError: If it is not positive and finite.
        """
        self.log_sigma.fill_(_log_sigma(float(sigma)))

    def forward(self, mean: Tensor, scale: Tensor) -> Distribution:
        """Law of x around its mean (..., D): fitted to what it scores in train mode and until frozen."""
        if self.training or not self.frozen:
            return ResidualNormal(mean)
        return DiagNormal(mean, self.sigma * scale)


class ResidualNormal(TorchDistribution):
    """Spherical Gaussian whose variance is the mean square of all residuals of the batch that it scores.

    Args:
        loc: Mean, (..., D).
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean, (..., D)."""
        return self.loc

    def expand(self, batch_shape: Size, _instance: Any = None) -> ResidualNormal:
        """The same law over a larger batch."""
        return ResidualNormal(self.loc.expand(Size(batch_shape) + self.event_shape))

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: ARG002, B008
        """Refuse: without data there is no variance.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("expected frozen noise to sample from, got OptimalNoise in training: call freeze first")

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats at the best variance for this very batch."""
        squares = (value - self.loc).square()
        variance = squares.mean()
        return -0.5 * (squares.sum(-1) / variance + squares.shape[-1] * (variance.log() + LOG_2PI))
