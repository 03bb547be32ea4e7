"""Gaussians that vmap, trace and stay on the GPU: no validation, noise by ``torch.randn``, scalar spherical sigma."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, Transform, constraints, kl_divergence, register_kl
from torch.distributions import Independent as TorchIndependent
from torch.distributions import MultivariateNormal as TorchMultivariateNormal
from torch.distributions import Normal as TorchNormal

from inference.distributions.expectations import expected_log_density, independent_factors

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
        """The same distribution over a larger batch; sigma is not copied."""
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
    """Multivariate Gaussian by its Cholesky factor: (..., K) and (..., K, K), or one factor shared by the batch."""

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(loc, scale_tril=scale_tril, validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> FullNormal:
        """The same distribution over a larger batch; the factor is not copied."""
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


def as_full_normal(distribution: Any) -> TorchMultivariateNormal | None:
    """A Gaussian of any of the known classes as a multivariate normal; None for another distribution.

    Args:
        distribution: A distribution over vectors.
    """
    if isinstance(distribution, TorchMultivariateNormal):
        return distribution
    moments = diagonal_moments(distribution)
    return None if moments is None else FullNormal(moments[0], torch.diag_embed(moments[1]))


def diagonal_moments(distribution: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviations (..., K) of a Gaussian distribution with independent coordinates, else None."""
    if isinstance(distribution, DiagNormal):
        return distribution.loc, distribution.sigma.expand(distribution.loc.shape)
    if isinstance(distribution, TorchIndependent):
        if distribution.reinterpreted_batch_ndims == 0:
            return diagonal_moments(distribution.base_dist)
        if distribution.reinterpreted_batch_ndims == 1 and isinstance(distribution.base_dist, TorchNormal):
            return distribution.base_dist.loc, distribution.base_dist.scale
    return None


def gaussian_marginals(distribution: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviations (..., K) of each coordinate of a Gaussian distribution, else None."""
    moments, full = diagonal_moments(distribution), as_full_normal(distribution)
    return (full.loc, full.variance.sqrt()) if moments is None and full is not None else moments


def coordinate_factors(distribution: Any) -> Distribution | None:
    """The distributions of independent coordinates, batch (..., K); None where coordinates are not independent."""
    moments = diagonal_moments(distribution)
    return independent_factors(distribution) if moments is None else TorchNormal(*moments, validate_args=False)


@singledispatch
def coordinate_kl(q: Any, p: Any) -> Tensor:
    r"""KL between the marginals of each coordinate of two distributions, (..., K) in nats.

    .. math:: KL(q(z_k) \| p(z_k))

    In closed form between Gaussians and for a Laplace p, else by quadrature, see
    :func:`inference.distributions.expectations.expectation` for its accuracy.

    Args:
        q: Gaussian over vectors, or one transformed to a support; of a full covariance only the marginals matter.
        p: Any distribution with independent coordinates.

    Raises:
        TypeError: If one of them is not of that kind.
        ValueError: If p is bounded and q is not.
    """
    marginals, factors = gaussian_marginals(q), coordinate_factors(p)
    if marginals is None or factors is None:
        raise TypeError(
            f"expected a Gaussian against a distribution with independent coordinates, got {type(q).__name__} against "
            f"{type(p).__name__}"
        )
    return marginal_kl(*marginals, factors)


def marginal_kl(mean: Tensor, sigma: Tensor, prior: Distribution, transform: Transform | None = None) -> Tensor:
    """KL of transformed Gaussian coordinates (..., K) against a prior of one coordinate, in nats.

    Args:
        mean: (..., K).
        sigma: Standard deviations, (..., K).
        prior: Batch broadcastable to (..., K).
        transform: Acts on each coordinate; None for the identity.

    Raises:
        ValueError: If the prior is bounded and the transform the identity.
    """
    if transform is None and isinstance(prior, TorchNormal):
        ratio = sigma / prior.scale
        return 0.5 * (ratio.square() + ((mean - prior.loc) / prior.scale).square() - 1) - ratio.log()
    negative_entropy = -sigma.log() - 0.5 * (1 + LOG_2PI)
    return negative_entropy - expected_log_density(prior, mean, sigma, transform)


def gaussian_kl(q: Any, prior: Distribution, transform: Transform | None = None) -> Tensor:
    """KL of a transformed Gaussian against a prior with independent coordinates, (...) in nats.

    Its covariance may be full: of the expected log-density only the marginals matter.

    Args:
        q: Gaussian, batch (...), event (K,).
        prior: Distribution of one coordinate, batch broadcastable to (..., K).
        transform: Acts on each coordinate; None for the identity.

    Raises:
        NotImplementedError: If ``q`` is not Gaussian.
        ValueError: If the prior is bounded and the transform the identity.
    """
    marginals = gaussian_marginals(q)
    if marginals is None:
        raise NotImplementedError(f"no KL of {type(q).__name__} against independent coordinates")
    return -q.entropy() - expected_log_density(prior, *marginals, transform).sum(-1)


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


def _as_diag(distribution: Any) -> Any:
    moments = diagonal_moments(distribution)
    return distribution if moments is None else DiagNormal(*moments)


# torch knows independent normals by another class: where they are Gaussian, take the closed forms above; a Gaussian
# against any other independent coordinates goes one coordinate at a time.
@register_kl(DiagNormal, TorchIndependent)
@register_kl(TorchIndependent, DiagNormal)
@register_kl(TorchMultivariateNormal, TorchIndependent)
@register_kl(TorchIndependent, TorchMultivariateNormal)
def _kl_of_independent(q: Any, p: Any) -> Tensor:
    distributions = (_as_diag(q), _as_diag(p))
    if not any(isinstance(distribution, TorchIndependent) for distribution in distributions):
        return kl_divergence(*distributions)
    factors = coordinate_factors(p)
    if factors is None or isinstance(distributions[0], TorchIndependent):
        raise NotImplementedError(f"no closed-form KL between {type(q).__name__} and {type(p).__name__}")
    return gaussian_kl(distributions[0], factors)
