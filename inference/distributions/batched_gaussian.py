"""Gaussians, one per data point: posteriors of a pair's one latent site, and starting points of chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.distributions.gaussian import LOG_2PI


@dataclass(frozen=True)
class Gaussians:
    """The distributions q(z | x_n): means (N, K) and standard deviations (N, K) or Cholesky factors (N, K, K)."""

    mean: Tensor
    factor: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether the coordinates are independent."""
        return self.factor.dim() == 2

    @property
    def var(self) -> Tensor:
        """Variance of each coordinate, (N, K)."""
        return self.factor.square() if self.is_diagonal else self.factor.square().sum(-1)

    @property
    def mean_covariance(self) -> Tensor:
        """Mean of the covariances, (K, K)."""
        if self.is_diagonal:
            return self.factor.square().mean(0).diag()
        return torch.einsum("nij,nkj->ik", self.factor, self.factor) / len(self.mean)

    @property
    def log_det_factor(self) -> Tensor:
        """Half the log-determinant of the covariance, (N,)."""
        diagonal = self.factor if self.is_diagonal else self.factor.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)

    def transform(self, noise: Tensor) -> Tensor:
        """Draws from standard noise (N, K), one a distribution."""
        scaled = self.factor * noise if self.is_diagonal else torch.einsum("nij,nj->ni", self.factor, noise)
        return self.mean + scaled

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """log q(z | x_n) as a linear function of :meth:`features`: weights (N, F) and constants (N,)."""
        if self.is_diagonal:
            precision = self.factor.square().reciprocal()
            linear, quadratic = precision * self.mean, precision
        else:
            eye = torch.eye(self.mean.shape[1], dtype=self.mean.dtype, device=self.mean.device)
            inverse = torch.linalg.solve_triangular(self.factor, eye.expand_as(self.factor), upper=False)
            linear = torch.einsum("nji,njk,nk->ni", inverse, inverse, self.mean)
            quadratic = (inverse.mT @ inverse).flatten(1)
        constant = -0.5 * ((linear * self.mean).sum(-1) + self.mean.shape[1] * LOG_2PI) - self.log_det_factor
        return torch.cat([-0.5 * quadratic, linear], -1), constant

    def features(self, z: Tensor) -> Tensor:
        """Second and first powers of z (B, K): (B, F)."""
        squares = z.square() if self.is_diagonal else (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(1)
        return torch.cat([squares, z], -1)


class Gaussian(NamedTuple):
    """One Gaussian per data point: the start of the path, and the coordinates in which chains move.

    Attributes:
        loc: Means m, (N, d).
        factor: Cholesky factors L, (N, d, d).
    """

    loc: Tensor
    factor: Tensor

    def colour(self, v: Tensor) -> Tensor:
        """u = m + L v for v (S, N, d)."""
        return self.loc + torch.einsum("nij,snj->sni", self.factor, v)

    def whiten(self, u: Tensor) -> Tensor:
        """The inverse of :meth:`colour`, (S, N, d)."""
        residual = (u - self.loc).permute(1, 2, 0)
        return torch.linalg.solve_triangular(self.factor, residual, upper=False).permute(2, 0, 1)
