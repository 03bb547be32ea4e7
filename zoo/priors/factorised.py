r"""Priors of one latent z in R^K: modules whose call, without arguments, returns the distribution.

A distribution has batch () and event (K,), and a ``support`` that ``biject_to`` knows, so that guides and samplers can
reach it from unconstrained space. What is learnt is the module's parameters.

Fixed: :class:`StandardNormal`, :class:`Uniform`, :class:`Laplace`, :class:`Beta`. Learnt: :class:`LearntBeta`,
:class:`LearntDiagonal`, :class:`zoo.MixtureOfGaussians`, :class:`zoo.VampPrior`, :class:`zoo.AutoregressiveFlow`.
Fitted to the codes of each batch: :class:`zoo.FloatingPrior`.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from inference.core.checks import check_count
from inference.distributions.gaussian import DiagNormal


def check_prior(prior: nn.Module, latent_dim: int) -> None:
    """Check that a module returns a distribution of one latent.

    Args:
        prior: The module.
        latent_dim: K.

    Raises:
        TypeError: If its call does not return a distribution.
        ValueError: If the distribution has not batch () and event (K,).
    """
    if not isinstance(prior, nn.Module):
        raise TypeError(f"expected the prior as an nn.Module that returns a distribution, got {type(prior).__name__}")
    with torch.no_grad():
        distribution = prior()
    if not isinstance(distribution, Distribution):
        raise TypeError(f"expected the prior's call to return a distribution, got {type(distribution).__name__}")
    if distribution.batch_shape != () or distribution.event_shape != (latent_dim,):
        raise ValueError(
            f"expected a prior with batch () and event ({latent_dim},), got {tuple(distribution.batch_shape)} and "
            f"{tuple(distribution.event_shape)}"
        )


class Prior(nn.Module):
    """Base of the zoo's priors; a subclass returns the distribution from ``forward()``.

    Args:
        latent_dim: K.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_count(latent_dim, "latent_dim")
        self.latent_dim = latent_dim

    def forward(self) -> Distribution:
        """The distribution: batch (), event (K,)."""
        raise NotImplementedError

    def _independent(self, distribution: Distribution) -> Distribution:
        """K independent copies of a univariate distribution, as a distribution of a vector."""
        return dist.Independent(distribution.expand((self.latent_dim,)), 1, validate_args=False)


class StandardNormal(Prior):
    r"""Standard normal prior.

    .. math:: p(z) = N(z; 0, I_K)

    Args:
        latent_dim: K.

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    sigma: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.register_buffer("sigma", torch.ones(1), persistent=False)

    def forward(self) -> DiagNormal:
        """The distribution: batch (), event (K,)."""
        return DiagNormal(self.sigma.new_zeros(self.latent_dim), self.sigma)


class Uniform(Prior):
    r"""Uniform prior with independent coordinates.

    .. math:: p(z) = (b - a)^{-K}, \quad a < z_k < b

    Args:
        latent_dim: K.
        low: a.
        high: b.

    Raises:
        ValueError: If a is not below b, or one is not finite.
    """

    low: Tensor
    high: Tensor

    def __init__(self, latent_dim: int, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(latent_dim)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"expected finite bounds, low below high, got {low} and {high}")
        self.register_buffer("low", torch.tensor(float(low)))
        self.register_buffer("high", torch.tensor(float(high)))

    def forward(self) -> Distribution:
        """The distribution: batch (), event (K,)."""
        return self._independent(dist.Uniform(self.low, self.high, validate_args=False))


class Laplace(Prior):
    r"""Standard Laplace prior with independent coordinates, of variance two.

    .. math:: p(z) = \prod_k \tfrac12 e^{-|z_k|}

    Args:
        latent_dim: K.
    """

    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self) -> Distribution:
        """The distribution: batch (), event (K,)."""
        return self._independent(_Laplace(torch.zeros_like(self.scale), self.scale, validate_args=False))


class _Laplace(dist.Laplace):
    """Torch's Laplace distribution with noise by ``torch.rand``: torch draws in place, which vmap refuses."""

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(Size(sample_shape))
        like = self.loc
        # The sign and the size of a Laplace variable are independent; 1 - u is in (0, 1], so its logarithm is finite.
        size = -torch.log1p(-torch.rand(shape, dtype=like.dtype, device=like.device))
        sign = torch.rand(shape, dtype=like.dtype, device=like.device) < 0.5
        return like + self.scale * torch.where(sign, size, -size)


class _Beta(dist.Beta):
    """Torch's beta distribution with draws that vmap supports: torch makes them by an autograd function."""

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(Size(sample_shape))
        with torch.no_grad():
            return torch._sample_dirichlet(self._dirichlet.concentration.expand(*shape, 2).contiguous())[..., 0]


class Beta(Prior):
    r"""Beta prior with independent coordinates and given parameters.

    .. math:: p(z) = \prod_k \frac{z_k^{a-1} (1 - z_k)^{b-1}}{B(a, b)}, \quad 0 < z_k < 1

    Args:
        latent_dim: K.
        a: First parameter, of the behaviour at zero.
        b: Second parameter, of the behaviour at one.

    Raises:
        ValueError: If one is not positive and finite.
    """

    a: Tensor
    b: Tensor

    def __init__(self, latent_dim: int, a: float, b: float) -> None:
        super().__init__(latent_dim)
        _check_positive(a=a, b=b)
        self.register_buffer("a", torch.tensor(float(a)))
        self.register_buffer("b", torch.tensor(float(b)))

    def forward(self) -> Distribution:
        """The distribution: batch (), event (K,)."""
        return self._independent(_Beta(self.a, self.b, validate_args=False))


class LearntBeta(Prior):
    r"""Learnt beta prior: independent coordinates, each with two parameters learnt as their logarithms.

    .. math:: p(z) = \prod_k \frac{z_k^{a_k-1} (1 - z_k)^{b_k-1}}{B(a_k, b_k)}, \quad 0 < z_k < 1

    Args:
        latent_dim: K.
        a: Initial first parameter.
        b: Initial second parameter.

    Raises:
        ValueError: If one is not positive and finite.
    """

    def __init__(self, latent_dim: int, a: float = 1.0, b: float = 1.0) -> None:
        super().__init__(latent_dim)
        _check_positive(a=a, b=b)
        self.log_a = nn.Parameter(torch.full((latent_dim,), math.log(a)))
        self.log_b = nn.Parameter(torch.full((latent_dim,), math.log(b)))

    def forward(self) -> Distribution:
        """The distribution: batch (), event (K,)."""
        return self._independent(_Beta(self.log_a.exp(), self.log_b.exp(), validate_args=False))


class LearntDiagonal(Prior):
    r"""Learnt Gaussian prior with independent coordinates; standard normal at first.

    .. math:: p(z) = \prod_k N(z_k; m_k, \sigma_k^2)

    Args:
        latent_dim: K.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_sigma = nn.Parameter(torch.zeros(latent_dim))

    def forward(self) -> DiagNormal:
        """The distribution: batch (), event (K,)."""
        return DiagNormal(self.loc, self.log_sigma.exp())


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"expected {name} to be positive and finite, got {value}")
