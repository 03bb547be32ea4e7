r"""A guide with heavy tails: independent Student-t coordinates, reparameterised in all three parameters.

.. math:: q(z \mid x) = \prod_k t_{\nu_k(x)}\left(z_k; m_k(x), \sigma_k(x)\right)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from guides.gaussian import NetworkGuide
from guides.supports import Bounds

# The degrees of freedom are above the least, so that a variance exists, by a factor whose log the encoder gives.
_LEAST_DEGREES = 2.0
_EXCESS = 8.0

# Half the degrees of freedom above which the norm is given by a series.
_LARGE = 100.0


class StudentT(NetworkGuide):
    r"""Amortised Student-t guide with independent coordinates, whose tails outweigh a Gaussian's.

    .. math:: q(z \mid x) = \prod_k t_{\nu_k(x)}\left(z_k; m_k(x), \sigma_k(x)\right), \quad \nu_k(x) > 2

    Importance weights of a Gaussian guide that is too narrow have no variance; those of this one have, where the
    posterior's tails are Gaussian.

    Warning:
        There is no closed-form KL: train with an objective that samples, such as :class:`inference.ELBO`.

    References:
        Bailey, "Polar Generation of Random Variates with the t-Distribution", 1994, Math. Comp. 62.
        Domke, Sheldon, "Importance Weighting and Variational Inference", 2018, arXiv 1808.09034.

    Args:
        data_dim: D.
        latent_dim: K.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to (N, 3 K): locations, log scales, and log((nu - 2) / 8).
        support: Of the latent, see :class:`guides.EncoderGuide`.

    Example:
        >>> StudentT(5, 2).posterior(torch.zeros(4, 5)).rsample((3,)).shape
        torch.Size([3, 4, 2])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (128, 128),
        encoder: nn.Module | None = None,
        support: Constraint | Bounds = constraints.real_vector,
    ) -> None:
        super().__init__(data_dim, latent_dim, 3 * latent_dim, hidden, encoder, support)

    def family(self, parameters: Tensor) -> DiagStudentT:
        """The distribution with locations, log scales and log degrees of freedom side by side in (N, 3 K)."""
        loc, log_sigma, log_excess = parameters.chunk(3, dim=-1)
        return DiagStudentT(loc, log_sigma.exp(), _LEAST_DEGREES + _EXCESS * log_excess.exp())


class DiagStudentT(TorchDistribution):
    r"""Student-t distributions of independent coordinates.

    .. math:: z_k = m_k + \sigma_k \sqrt{\nu_k \left(U^{-2 / \nu_k} - 1\right)} \cos 2 \pi V

    with U and V uniform: Bailey's polar method, of which the Box-Muller transform of a Gaussian is the limit. Unlike a
    ratio of a Gaussian and a gamma variable it is differentiable in the degrees of freedom.

    Args:
        loc: Locations, (..., K).
        sigma: Scales, (..., K); the standard deviation is sqrt(nu / (nu - 2)) times that.
        degrees: Degrees of freedom nu, (..., K).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, sigma: Tensor, degrees: Tensor) -> None:
        self.loc, self.sigma, self.degrees = loc, sigma, degrees
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> DiagStudentT:
        """The same distribution over a larger batch."""
        batch_shape = Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        shape = batch_shape + self.event_shape
        return DiagStudentT(*(t.expand(shape) for t in (self.loc, self.sigma, self.degrees)))

    @property
    def mean(self) -> Tensor:
        """Mean, (..., K); it exists above one degree of freedom."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variances, (..., K); they exist above two degrees of freedom."""
        return self.sigma.square() * self.degrees / (self.degrees - 2)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, ``sample_shape`` + batch + (K,)."""
        shape = self._extended_shape(Size(sample_shape))
        first, second = (torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device) for _ in range(2))
        # -log U, away from zero, where the root below has no derivative.
        energy = -torch.log1p(-first).clamp(max=-(torch.finfo(self.loc.dtype).eps ** 2))
        radius = (self.degrees * torch.expm1(2 * energy / self.degrees)).sqrt()
        return torch.addcmul(self.loc, self.sigma, radius * torch.cos(2 * math.pi * second))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, one per batch member."""
        degrees, standardised = self.degrees, (value - self.loc) / self.sigma
        log_norm = _log_gamma_ratio(0.5 * degrees) + 0.5 * (math.pi * degrees).log()
        tail = 0.5 * (degrees + 1) * torch.log1p(standardised.square() / degrees)
        return -(log_norm + self.sigma.log() + tail).sum(-1)


def _log_gamma_ratio(a: Tensor) -> Tensor:
    """log Gamma(a) - log Gamma(a + 1/2): at large a by its series, where the two are large and nearly the same.

    Their rounding errors would grow as a log a, and an optimiser would find them.
    """
    safe = a.clamp(max=_LARGE)
    small = torch.lgamma(safe) - torch.lgamma(safe + 0.5)
    inverse = 1 / a.clamp(min=_LARGE)
    series = inverse / 8 * (1 - inverse.square() / 24 * (1 - 0.3 * inverse.square()))
    return torch.where(a > _LARGE, series - 0.5 * a.log(), small)
