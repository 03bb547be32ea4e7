r"""Tall-skinny QR (TSQR): mean and triangular factor of data whose rows several ranks share.

.. math:: X - 1 \bar x^T = Q R, \qquad \tfrac1N R^T R = \text{covariance}

The singular values of R are the standard deviations along the principal axes, right to a part in 1e16 of the largest
one. Sums of squares, which square that part too, lose a noise of 1e-6 of the signal.

References:
    Demmel, Grigori, Hoemmen, Langou, "Communication-optimal Parallel and Sequential QR and LU Factorizations", 2012,
    arXiv 0808.2664.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Factor:
    """Count, mean (D,) and triangular factor (D, D) of the centred rows seen so far.

    Args:
        data_dim: D.
    """

    def __init__(self, data_dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(data_dim)
        self.triangle = np.zeros((data_dim, data_dim))

    def add(self, rows: Array) -> Factor:
        """Take in rows (M, D)."""
        mean = rows.mean(0)
        return self._take(rows - mean, len(rows), mean)

    def merge(self, other: Factor) -> Factor:
        """Take in all that another has seen."""
        return self._take(other.triangle, other.count, other.mean) if other.count else self

    def _take(self, centred: Array, count: int, mean: Array) -> Factor:
        """Rows around a mean of their own, which differs from the one so far by one row more."""
        shift, weight = mean - self.mean, count / (self.count + count)
        stacked = np.vstack([self.triangle, centred, shift * np.sqrt(self.count * weight)])
        self.triangle = scipy.linalg.qr(stacked, mode="r", overwrite_a=True, check_finite=False)[0][: len(self.mean)]
        self.mean, self.count = self.mean + shift * weight, self.count + count
        return self

    def spectrum(self) -> tuple[Array, Array]:
        """Variances along the principal axes, descending (D,), and the axes in columns (D, D)."""
        _, deviations, axes = scipy.linalg.svd(self.triangle, check_finite=False)
        return deviations**2 / self.count, axes.T


def merged(factors: Iterable[Factor]) -> Factor:
    """The factor of all that several have seen."""
    return functools.reduce(Factor.merge, factors)
