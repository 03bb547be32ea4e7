r"""A Gaussian guide whose covariance is a diagonal plus a matrix of low rank.

.. math:: q(z \mid x) = N(m(x), F(x) F(x)^T + \operatorname{diag} d(x)^2)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from guides.gaussian import NetworkGuide
from guides.supports import Bounds
from inference.core.checks import check_count
from inference.distributions.gaussian import FullNormal
from inference.numerics.linalg import cholesky_of_sum


class LowRank(NetworkGuide):
    r"""Low-rank guide: an amortised Gaussian whose covariance is a diagonal plus a matrix of low rank.

    .. math:: q(z \mid x) = N(z; m(x), F(x) F(x)^T + \operatorname{diag} d(x)^2), \quad F \in R^{K \times R}

    The network's output grows as K R, that of :class:`guides.FullRank` as K^2; the distribution itself is computed by
    the Cholesky factor of its covariance, in O(K^2 (K + R)) per data point.

    References:
        Ong, Nott, Smith, "Gaussian Variational Approximation with a Factor Covariance Structure", 2018,
        arXiv 1701.03208.

    Args:
        data_dim: D.
        latent_dim: K.
        rank: R.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to (N, (2 + R) K): means, log d, then F row by row.
        support: Of the latent, see :class:`guides.EncoderGuide`.

    Example:
        >>> LowRank(5, 3, rank=1).posterior(torch.zeros(4, 5)).covariance_matrix.shape
        torch.Size([4, 3, 3])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        rank: int = 1,
        hidden: Sequence[int] = (128, 128),
        encoder: nn.Module | None = None,
        support: Constraint | Bounds = constraints.real_vector,
    ) -> None:
        check_count(rank, "rank")
        super().__init__(data_dim, latent_dim, (2 + rank) * latent_dim, hidden, encoder, support)
        self.rank = rank

    def family(self, parameters: Tensor) -> FullNormal:
        """The Gaussian with mean, log d and F side by side in (N, (2 + R) K)."""
        k = self.latent_dim
        mean, log_d, entries = parameters.split([k, k, k * self.rank], dim=-1)
        factor = entries.unflatten(-1, (k, self.rank))
        return FullNormal(mean, cholesky_of_sum(torch.diag_embed(log_d.exp()), factor))

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return super().config() | {"rank": self.rank}
