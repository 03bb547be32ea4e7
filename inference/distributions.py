"""Gaussians that vmap, trace and stay on the GPU: no validation, noise by ``torch.randn``, scalar spherical sigma."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Independent as TorchIndependent
from torch.distributions import MultivariateNormal as TorchMultivariateNormal
from torch.distributions import Normal as TorchNormal
from torch.distributions import constraints, kl_divergence, register_kl

LOG_2PI = math.log(2 * math.pi)


class DiagNormal(TorchDistribution):
    r"""Gaussian with independent coordinates, spherical where sigma has a last dimension of one.

    .. math:: N(x; \mu, \operatorname{diag} \sigma^2)

    Args:
        loc: Mean, shape (..., D).
        sigma: Standard deviations, broadcastable to ``loc``; (..., 1) for one sigma shared by all coordinates.

    Example:
        >>> DiagNormal(torch.zeros(4, 3), torch.ones(1)).log_prob(torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    arg_constraints = {"loc": constraints.real_vector, "sigma": constraints.positive}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, sigma: Tensor) -> None:
        batch_shape = loc.shape[:-1]
        if sigma.dim() > 1 and sigma.shape[:-1] != batch_shape:
            batch_shape = torch.broadcast_shapes(batch_shape, sigma.shape[:-1])
            loc = loc.expand(batch_shape + loc.shape[-1:])
        self.loc = loc
        self.sigma = sigma
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> DiagNormal:
        """The same law over a larger batch; sigma is not copied."""
        batch_shape = Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        return type(self)(self.loc.expand(batch_shape + self.event_shape), self.sigma)

    @property
    def mean(self) -> Tensor:
        """Mean, (..., D)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variances, (..., D)."""
        return self.sigma.square().expand(self.loc.shape)

    @property
    def _log_det_sigma(self) -> Tensor:
        return self.sigma.log().sum(-1) * (self.event_shape[0] / self.sigma.shape[-1])

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, shape ``sample_shape`` + batch + (D,)."""
        shape = self._extended_shape(Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, self.sigma, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, one per batch member."""
        residual = value - self.loc
        if self.sigma.shape[-1] == 1:
            squares = residual.square().sum(-1) / self.sigma.squeeze(-1).square()
        else:
            squares = (residual / self.sigma).square().sum(-1)
        return -0.5 * squares - self._log_det_sigma - 0.5 * self.event_shape[0] * LOG_2PI

    def entropy(self) -> Tensor:
        """Differential entropy in nats, one per batch member."""
        entropy = self._log_det_sigma + 0.5 * self.event_shape[0] * (1 + LOG_2PI)
        return entropy.expand(self.batch_shape)


class FullNormal(MultivariateNormal):
    """Multivariate Gaussian by its Cholesky factor: shape (..., K) and (..., K, K) or a factor shared by the batch."""

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(loc, scale_tril=scale_tril, validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> FullNormal:
        """The same law over a larger batch; the factor is not copied."""
        batch_shape = Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        return type(self)(self.loc.expand(batch_shape + self.event_shape), self._unbroadcasted_scale_tril)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, shape ``sample_shape`` + batch + (K,)."""
        shape = self._extended_shape(Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        factor = self._unbroadcasted_scale_tril
        if factor.dim() == 2:
            return self.loc + noise @ factor.mT
        return self.loc + (factor @ noise.unsqueeze(-1)).squeeze(-1)


def as_full_normal(law: Any) -> TorchMultivariateNormal | None:
    """A Gaussian law of any of the known classes as a multivariate normal, or None where it is not one.

    Args:
        law: A distribution over vectors.
    """
    if isinstance(law, TorchMultivariateNormal):
        return law
    moments = diagonal_moments(law)
    return None if moments is None else FullNormal(moments[0], torch.diag_embed(moments[1]))


def diagonal_moments(law: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviations (..., K) of a Gaussian law with independent coordinates, else None."""
    if isinstance(law, DiagNormal):
        return law.loc, law.sigma.expand(law.loc.shape)
    if isinstance(law, TorchIndependent):
        if law.reinterpreted_batch_ndims == 0:
            return diagonal_moments(law.base_dist)
        if law.reinterpreted_batch_ndims == 1 and isinstance(law.base_dist, TorchNormal):
            return law.base_dist.loc, law.base_dist.scale
    return None


def coordinate_kl(q: Any, p: Any) -> Tensor:
    r"""KL between the marginals of each coordinate of two Gaussian laws, (..., K) in nats.

    .. math:: KL(q(z_k) \| p(z_k))

    Args:
        q: Gaussian over vectors; with a full covariance its marginals count.
        p: Gaussian with independent coordinates.

    Raises:
        TypeError: If one of them is not of that kind.
    """
    target, full = diagonal_moments(p), as_full_normal(q)
    if target is None or full is None:
        raise TypeError(
            f"expected a Gaussian against a Gaussian with independent coordinates, got {type(q).__name__} against "
            f"{type(p).__name__}"
        )
    marginal = diagonal_moments(q)
    mean, sigma = (full.loc, full.variance.sqrt()) if marginal is None else marginal
    ratio = sigma / target[1]
    return 0.5 * (ratio.square() + ((mean - target[0]) / target[1]).square() - 1) - ratio.log()


@register_kl(DiagNormal, DiagNormal)
def _kl_diag_diag(q: DiagNormal, p: DiagNormal) -> Tensor:
    dim = q.event_shape[0]
    variances = (q.sigma / p.sigma).square()
    means = ((q.loc - p.loc) / p.sigma).square()
    trace = variances.sum(-1) * (dim / variances.shape[-1])
    return 0.5 * (trace + means.sum(-1) - dim) + p._log_det_sigma - q._log_det_sigma


@register_kl(TorchMultivariateNormal, DiagNormal)
def _kl_full_diag(q: TorchMultivariateNormal, p: DiagNormal) -> Tensor:
    factor = q._unbroadcasted_scale_tril
    log_det_q = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = (factor / p.sigma.unsqueeze(-1)).square().sum((-2, -1))
    means = ((q.loc - p.loc) / p.sigma).square().sum(-1)
    return 0.5 * (trace + means - q.event_shape[0]) + p._log_det_sigma - log_det_q


@register_kl(DiagNormal, TorchMultivariateNormal)
def _kl_diag_full(q: DiagNormal, p: TorchMultivariateNormal) -> Tensor:
    return kl_divergence(FullNormal(q.loc, torch.diag_embed(q.sigma.expand(q.loc.shape))), p)


def _as_diag(law: Any) -> Any:
    moments = diagonal_moments(law)
    return law if moments is None else DiagNormal(*moments)


# torch knows independent normals by another class: where they are Gaussian, take the closed forms above.
@register_kl(DiagNormal, TorchIndependent)
@register_kl(TorchIndependent, DiagNormal)
@register_kl(TorchMultivariateNormal, TorchIndependent)
@register_kl(TorchIndependent, TorchMultivariateNormal)
def _kl_of_independent(q: Any, p: Any) -> Tensor:
    laws = (_as_diag(q), _as_diag(p))
    if any(isinstance(law, TorchIndependent) for law in laws):
        raise NotImplementedError(f"no closed-form KL between {type(q).__name__} and {type(p).__name__}")
    return kl_divergence(*laws)
