"""Linear algebra that torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_of_sum(*factors: Tensor) -> Tensor:
    r"""The Cholesky factor of a sum of squares, from the factors and without the squares, which lose half the digits.

    .. math:: L L^T = \sum_i F_i F_i^T

    Args:
        factors: F_i, (..., K, R_i), of rank K together.

    Returns:
        L, (..., K, K), lower triangular with a positive diagonal.
    """
    upper = torch.linalg.qr(torch.cat(factors, -1).mT)[1]
    sign = torch.sign(upper.diagonal(dim1=-2, dim2=-1))
    return (upper * sign.unsqueeze(-1)).mT
