r"""Gaussian observation noise around a decoder's mean, in four kinds.

.. math:: p(x \mid z) = N(x; f(z), \operatorname{diag} \sigma^2)

:class:`FixedNoise`, :class:`LearntNoise` (one sigma), :class:`LearntNoisePerDim`, and :class:`OptimalNoise` (the
variance of the residuals, in closed form at every step). :mod:`zoo.models.baggins` has two more of the last sort. A
model holds one of them; sigma is in the units of its decoder's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from inference.core.checks import check_count, check_positive
from inference.core.ranks import batch_mean
from inference.distributions.gaussian import DiagNormal


def _log_sigma(sigma: float) -> float:
    check_positive(sigma, "sigma")
    return math.log(sigma)


class GaussianNoise(nn.Module):
    """Base of the kinds whose sigma does not depend on the batch; a subclass provides ``log_sigma``, (1,) or (D,)."""

    log_sigma: Tensor

    @property
    def sigma(self) -> Tensor:
        """Standard deviation, (1,) or (D,)."""
        return self.log_sigma.exp()

    def forward(self, mean: Tensor, scale: Tensor) -> Distribution:
        """Distribution of x around its mean (..., D), sigma multiplied by the scale () of the data."""
        return DiagNormal(mean, self.sigma * scale)


class FixedNoise(GaussianNoise):
    """Gaussian noise of a fixed standard deviation.

    Args:
        sigma: Standard deviation.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("log_sigma", torch.tensor([_log_sigma(sigma)]))


class LearntNoise(GaussianNoise):
    """Gaussian noise of one standard deviation for all dimensions, learnt by gradients as its logarithm.

    Args:
        sigma: Initial standard deviation.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor([_log_sigma(sigma)]))


class LearntNoisePerDim(GaussianNoise):
    """Gaussian noise with a standard deviation for each dimension, learnt by gradients as its logarithm.

    Warning:
        A dimension that the decoder fits exactly, for example a constant pixel, sends its sigma to zero and the
        evidence to infinity.

    Args:
        data_dim: D.
        sigma: Initial standard deviation.
    """

    def __init__(self, data_dim: int, sigma: float = 1.0) -> None:
        super().__init__()
        check_count(data_dim, "data_dim")
        self.log_sigma = nn.Parameter(torch.full((data_dim,), _log_sigma(sigma)))


class BatchNoise(nn.Module):
    """Base of the kinds whose variance is fitted to the batch; a subclass gives :meth:`variance_of`.

    Warning:
        A batch-dependent distribution is not a model. It serves training; :meth:`freeze` and eval mode then turn it
        into one, and evidence and comparison refuse it before.

    Args:
        size: Number of variances, one or D.

    Attributes:
        log_sigma: (size,) buffer, NaN until frozen.
    """

    log_sigma: Tensor

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.register_buffer("log_sigma", torch.full((size,), math.nan))

    def variance_of(self, squares: Tensor, spread: Tensor) -> Tensor:
        """The variance, (size,), from the mean squares of the residuals and the variances of the data, (D,) each."""
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        """Whether sigma is set."""
        return not bool(self.log_sigma.isnan().any())

    @property
    def sigma(self) -> Tensor:
        """Standard deviation, (size,); NaN until frozen."""
        return self.log_sigma.exp()

    @torch.no_grad()
    def freeze(self, sigma: Tensor | float) -> None:
        """Set sigma for good.

        Args:
            sigma: Standard deviation in the units of the decoder's output, one or (size,).

        Raises:
            ValueError: If it is not positive and finite.
        """
        sigma = torch.as_tensor(sigma).to(self.log_sigma).expand_as(self.log_sigma)
        if not bool(((sigma > 0) & sigma.isfinite()).all()):
            raise ValueError(f"expected a positive finite sigma, got {sigma.tolist()}")
        self.log_sigma.copy_(sigma.log())

    def forward(self, mean: Tensor, scale: Tensor) -> Distribution:
        """Distribution of x around its mean (..., D): fitted to what it scores in train mode and until frozen."""
        if self.training or not self.frozen:
            return ResidualNormal(mean, self.variance_of)
        return DiagNormal(mean, self.sigma * scale)


class OptimalNoise(BatchNoise):
    r"""Optimal-sigma noise: in every batch the variance is the maximum-likelihood one of the batch's residuals.

    .. math:: \sigma^2 = \frac{1}{N D} \sum_n \|x_n - f(z_n)\|^2

    Warning:
        A batch-dependent distribution is not a model. It serves training; :meth:`freeze` and eval mode then turn it
        into one, and evidence and comparison refuse it before.

    References:
        Rybkin, Daniilidis, Levine, "Simple and Effective VAE Training with Calibrated Decoders", 2021,
        arXiv 2006.13202.

    Attributes:
        frozen: Whether sigma is set.
        log_sigma: (1,) buffer, NaN until frozen.
    """

    def __init__(self) -> None:
        super().__init__()

    def variance_of(self, squares: Tensor, spread: Tensor) -> Tensor:  # noqa: ARG002
        """The mean of the squared residuals, (1,)."""
        return squares.mean(-1, keepdim=True)


class ResidualNormal(TorchDistribution):
    """Gaussian whose variance is a function of the residuals and the data of the batch that it scores.

    Args:
        loc: Mean, (..., D).
        variance_of: Makes the variance, (1,) or (D,), from the residuals' mean squares and the data's variances, (D,).
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, loc: Tensor, variance_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loc, self.variance_of = loc, variance_of
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean, (..., D)."""
        return self.loc

    def expand(self, batch_shape: Size, _instance: Any = None) -> ResidualNormal:
        """The same distribution over a larger batch."""
        return ResidualNormal(self.loc.expand(Size(batch_shape) + self.event_shape), self.variance_of)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: ARG002, B008
        """Raise an error: without data there is no variance.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "expected frozen noise to sample from, got noise of the batch in training: call freeze first"
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats at the variance for this very batch."""
        squares = (value - self.loc).square()
        data = value.expand_as(squares).flatten(0, -2)
        spread = batch_mean((data - batch_mean(data, 0)).square(), 0)
        variance = self.variance_of(batch_mean(squares.flatten(0, -2), 0), spread)
        return DiagNormal(self.loc, variance.sqrt()).log_prob(value)
