"""Preprocessing with its log-determinant, by which densities of the result become densities of the original data."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from inference.core.checks import check_positive


class Transform(Protocol):
    """A preprocessing of rows; it acts on each row alone, but for noise."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y of shape (N, D) and the log-determinants, shape (N,), nats."""

    def inverse(self, y: Tensor) -> Tensor:
        """Return x for y of shape (..., D)."""


@dataclass(frozen=True)
class Raw:
    """Leave the data as they are: y = x, log-determinant 0.

    Example:
        >>> Raw()(torch.tensor([[1.0, 2.0]]))
        (tensor([[1., 2.]]), tensor([0.]))
    """

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and zeros."""
        return x, x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        """Return y."""
        return y


@dataclass(frozen=True)
class Scaled:
    r"""Divide the data by a number: :math:`y = x / c`, :math:`\log |\det| = -D \log c`.

    Args:
        divisor: c > 0, e.g. the largest value.

    Raises:
        ValueError: the divisor is not positive and finite.

    Example:
        >>> Scaled(4.0)(torch.tensor([[1.0, 2.0]]))
        (tensor([[0.2500, 0.5000]]), tensor([-2.7726]))
    """

    divisor: float

    def __post_init__(self) -> None:
        check_positive(self.divisor, "divisor")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and its log-determinants."""
        y = x / self.divisor
        return y, y.new_full((len(y),), -y.shape[-1] * math.log(self.divisor))

    def inverse(self, y: Tensor) -> Tensor:
        """Return x = c y, of the shape of y."""
        return y * self.divisor


@dataclass(frozen=True)
class Logit:
    r"""Dequantise integers 0..L-1 with uniform noise and map them to the real line.

    .. math::
        p = \alpha + (1 - 2\alpha)\,\frac{x + u}{L}, \quad u \sim U[0, 1)^D, \qquad y = \log\frac{p}{1 - p},
        \qquad \log\Bigl|\det\frac{\partial y}{\partial (x + u)}\Bigr|
        = D \log\frac{1 - 2\alpha}{L} - \sum_d \log\bigl(p_d (1 - p_d)\bigr)

    Warning:
        The density is that of x + u, on unit bins: log p(y) + log det, in expectation over u, is a *lower
        bound* of the log-probability of the integers, not its value. One u per data point is drawn and kept; it
        depends on the seed and the row's place alone. Computed in float64: 1 - p loses its digits in float32.

    References:
        A note on the evaluation of generative models, Theis et al., 2016, arXiv:1511.01844 (the bound).
        Masked Autoregressive Flow for Density Estimation, Papamakarios et al., 2017, arXiv:1705.07057.

    Args:
        levels: L, the number of integer levels: 17 for the digits, 256 for bytes.
        alpha: distance kept from 0 and 1, in [0, 1/2).
        seed: seed of `numpy.random.RandomState`, whose stream NumPy keeps for ever.

    Raises:
        ValueError: levels or alpha out of range; on call, a value that is not one of the integers 0..L-1.

    Example:
        >>> logit = Logit(levels=17)
        >>> y, log_det = logit(torch.tensor([[0, 3, 16]]))
        >>> logit.inverse(y).floor()
        tensor([[ 0.,  3., 16.]], dtype=torch.float64)
    """

    levels: int
    alpha: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.levels < 2 or not 0 <= self.alpha < 0.5:
            raise ValueError(f"expected levels >= 2 and 0 <= alpha < 1/2, got {self.levels}, {self.alpha}")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and its log-determinants, float64."""
        bad = x[(x < 0) | (x >= self.levels) | (x != x.floor())]
        if len(bad):
            raise ValueError(f"expected integers 0..{self.levels - 1}, got {len(bad)} others, e.g. {bad[0]}")
        noise = torch.from_numpy(np.random.RandomState(self.seed).random_sample(x.shape)).to(x.device)
        p = self.alpha + (1 - 2 * self.alpha) * (x + noise) / self.levels
        log_p, log_q = p.log(), (-p).log1p()
        log_slope = x.shape[-1] * (math.log1p(-2 * self.alpha) - math.log(self.levels))
        return log_p - log_q, log_slope - (log_p + log_q).sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x + u, whose floor is x; a model's far tails leave [0, L], by at most about alpha L."""
        return (y.sigmoid() - self.alpha) / (1 - 2 * self.alpha) * self.levels


RAW = Raw()
UNIT = Scaled(255.0)
