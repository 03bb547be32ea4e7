r"""Distributions on bounded supports: the push-forward of a distribution over unconstrained vectors.

.. math:: u \sim q_0, \quad z = T(u), \quad \log q(z) = \log q_0(T^{-1}(z)) - \log |\det T'(u)|
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, biject_to, constraints, register_kl
from torch.distributions import Independent as TorchIndependent
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from inference.distributions.expectations import expectation
from inference.distributions.gaussian import (
    DiagNormal,
    coordinate_factors,
    coordinate_kl,
    gaussian_kl,
    gaussian_marginals,
    marginal_kl,
)


class Transformed(TorchDistribution):
    """The distribution of T(u) for u of a given distribution, where T leads from all vectors to a support.

    Mean and variance are by quadrature where ``base_dist`` is Gaussian and T acts on each coordinate; then there is a
    KL against any prior with independent coordinates, too, see :func:`inference.distributions.expectations.expectation`
    for its domain of validity.

    Args:
        base_dist: Distribution of unconstrained vectors, event (K,).
        support: Of the transformed vector.

    Example:
        >>> distribution = Transformed(DiagNormal(torch.zeros(4, 3), torch.ones(1)), constraints.unit_interval)
        >>> distribution.mean[0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, base_dist: Distribution, support: Constraint) -> None:
        self.base_dist = base_dist
        self._support = vector_support(support)
        # Remembers the last draw's u: near the end of a support it cannot be found again from z.
        self.transform: Transform = biject_to(self._support).with_cache(1)
        event_shape = self.transform.forward_shape(base_dist.event_shape)
        super().__init__(base_dist.batch_shape, event_shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        """The support of z."""
        return self._support

    @property
    def has_rsample(self) -> bool:
        """Whether the distribution of u is reparameterised."""
        return self.base_dist.has_rsample

    @property
    def coordinate_transform(self) -> Transform:
        """T for each coordinate.

        Raises:
            NotImplementedError: If T mixes coordinates.
        """
        support = coordinate_support(self._support)
        if support.event_dim:
            raise NotImplementedError(f"expected a support of each coordinate by itself, got {self._support}")
        return biject_to(support)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Transformed:
        """The same distribution over a larger batch."""
        if Size(batch_shape) == self.batch_shape:
            return self
        return Transformed(self.base_dist.expand(Size(batch_shape)), self._support)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws without gradient, ``sample_shape`` + batch + (K,)."""
        with torch.no_grad():
            return self.transform(self.base_dist.sample(Size(sample_shape)))

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, ``sample_shape`` + batch + (K,)."""
        return self.transform(self.base_dist.rsample(Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, one per batch member; minus infinity outside the support."""
        u = self.transform.inv(value)
        log_prob = self.base_dist.log_prob(u) - self.transform.log_abs_det_jacobian(u, value)
        return torch.where(self._support.check(value), log_prob, -torch.inf)

    @property
    def mean(self) -> Tensor:
        """Mean, (..., K), by quadrature.

        Raises:
            NotImplementedError: If the distribution of u is not Gaussian or T mixes coordinates.
        """
        return self._expectation(self.coordinate_transform)

    @property
    def variance(self) -> Tensor:
        """Variances, (..., K), by quadrature.

        Raises:
            NotImplementedError: As :attr:`mean`.
        """
        mean, transform = self.mean, self.coordinate_transform
        return self._expectation(lambda u: (transform(u) - mean).square())

    def _expectation(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        marginals = gaussian_marginals(self.base_dist)
        if marginals is None:
            raise NotImplementedError(f"no moments of {type(self.base_dist).__name__} on {self._support}")
        return expectation(function, *marginals)


def vector_support(support: Constraint) -> Constraint:
    """The support of a vector, from that of the vector or of each coordinate.

    Raises:
        TypeError: If it is no constraint.
        ValueError: If it is discrete, of matrices, or has more entries than free coordinates, as a simplex has.
    """
    if not isinstance(support, Constraint):
        raise TypeError(f"expected a constraint of torch.distributions as support, got {type(support).__name__}")
    vector = constraints.independent(support, 1) if support.event_dim == 0 else support
    if vector.is_discrete or vector.event_dim != 1:
        raise ValueError(f"expected the support of a continuous vector, got {support}")
    if coordinate_support(vector).event_dim and biject_to(vector).inverse_shape(Size([7])) != (7,):
        raise ValueError(f"expected a support with one free coordinate for each of the latent's, got {support}")
    return vector


def coordinate_support(support: Constraint) -> Constraint:
    """The support of each coordinate of one that treats them alike; else the support itself."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_unbounded(support: Constraint) -> bool:
    """Whether a support is all vectors."""
    return isinstance(coordinate_support(support), type(constraints.real))  # a copy of it counts, too


def push_forward(distribution: Any, support: Constraint) -> Any:
    """The push-forward of a distribution of unconstrained vectors to a support; itself where that is all vectors."""
    return distribution if is_unbounded(support) else Transformed(distribution, support)


@coordinate_kl.register
def _coordinate_kl(q: Transformed, p: Any) -> Tensor:
    marginals, factors = gaussian_marginals(q.base_dist), coordinate_factors(p)
    if marginals is None or factors is None:
        raise TypeError(
            f"expected a transformed Gaussian against a distribution with independent coordinates, got "
            f"{type(q.base_dist).__name__} on {q.support} against {type(p).__name__}"
        )
    return marginal_kl(*marginals, factors, q.coordinate_transform)


@register_kl(Transformed, TorchIndependent)
@register_kl(Transformed, DiagNormal)
def _kl_transformed(q: Transformed, p: Any) -> Tensor:
    factors = coordinate_factors(p)
    if factors is None:
        raise NotImplementedError(f"no KL between a distribution on {q.support} and {type(p).__name__}")
    return gaussian_kl(q.base_dist, factors, q.coordinate_transform)
