r"""A bounded, scale-invariant Gaussian likelihood without learnt variances, after the abstract of Fyffe 2019.

.. math:: v_d = \frac1N \sum_n r_{nd}^2 + b \operatorname{Var}_n(x_{nd}), \quad r = x - f(z), \quad b = 2^{-2k}

This is a reconstruction: the paper's own formula (BAGGINS) was not at hand. It has what the abstract asks for:
Gaussian, bounded, no learnt variances, scale-invariant, an aggregate over the batch, a presumed information content of
k bits per dimension. Units drop out: data times c have a log-likelihood that is D log c lower.
"""

from __future__ import annotations

import math

from torch import Tensor

from inference.core.checks import check_count
from zoo.models.noise import BatchNoise


class _Baggins(BatchNoise):
    """Holds b, the least share of the data's variance that the noise keeps."""

    def __init__(self, size: int, bits: float) -> None:
        super().__init__(size)
        if not 0 <= bits < math.inf:
            raise ValueError(f"expected a finite number of bits of at least zero, got {bits}")
        self.bits = bits
        self.floor = 2.0 ** (-2 * bits)


class BagginsReconstruction(_Baggins):
    r"""BAGGINS noise (a reconstruction) per dimension: squared residuals of the batch and a share of its variance.

    .. math:: \sigma_d^2 = \frac1N \sum_n (x_{nd} - f_d(z_n))^2 + 2^{-2k} \operatorname{Var}_n(x_{nd})

    A reconstruction from the abstract of the paper below, not its formula.

    Warning:
        A batch-dependent distribution is not a model: it serves training, and ``freeze`` turns it into one. A dimension
        that is constant over the batch has no bound; :class:`PooledBagginsReconstruction` has one.

    References:
        Fyffe, 2019, arXiv 1912.10309.

    Args:
        data_dim: D.
        bits: k, the most information in a dimension: Shannon's capacity at that ratio of variances.

    Raises:
        ValueError: If k is negative or not finite.
    """

    def __init__(self, data_dim: int, bits: float = 8.0) -> None:
        check_count(data_dim, "data_dim")
        super().__init__(data_dim, bits)

    def variance_of(self, squares: Tensor, spread: Tensor) -> Tensor:
        """Mean squared residuals and the share of the variance, (D,)."""
        return squares + self.floor * spread


class PooledBagginsReconstruction(_Baggins):
    r"""Pooled BAGGINS noise (a reconstruction): one variance, the mean of those of :class:`BagginsReconstruction`.

    .. math::
        \sigma^2 = \frac1D \sum_d \left[\frac1N \sum_n (x_{nd} - f_d(z_n))^2
        + 2^{-2k} \operatorname{Var}_n(x_{nd})\right]

    A reconstruction from the abstract of the paper below, not its formula.

    Warning:
        A batch-dependent distribution is not a model: it serves training, and ``freeze`` turns it into one.

    References:
        Fyffe, 2019, arXiv 1912.10309.

    Args:
        bits: k, the most information in a dimension.

    Raises:
        ValueError: If k is negative or not finite.
    """

    def __init__(self, bits: float = 8.0) -> None:
        super().__init__(1, bits)

    def variance_of(self, squares: Tensor, spread: Tensor) -> Tensor:
        """Mean over dimensions of squared residuals and the share of the variance, (1,)."""
        return (squares + self.floor * spread).mean(-1, keepdim=True)
