"""Protocols: what a model or guide may offer beyond being called. Inference depends on these alone."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn
from torch.distributions import Distribution


@runtime_checkable
class SupportsLogEvidence(Protocol):
    """A model whose evidence is known in closed form."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x_n), (N,) in nats and float64."""
        ...


@runtime_checkable
class SupportsPosterior(Protocol):
    """A model or guide that can give the distribution of its one latent given the data."""

    def posterior(self, x: Tensor) -> Distribution:
        """Distribution of z given x: batch (N,), event (K,)."""
        ...


@runtime_checkable
class SupportsDecoder(Protocol):
    """A model whose likelihood factorises around a mean."""

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], shape ``z.shape[:-1] + (D,)``."""
        ...


@runtime_checkable
class SupportsExpectedLogLikelihood(Protocol):
    """A model that integrates its log-likelihood over a Gaussian in closed form."""

    def expected_log_likelihood(self, x: Tensor, posterior: Distribution) -> Tensor:
        """E_q[log p(x_n | z)] for a Gaussian q, (N,) in nats."""
        ...

    def prior(self) -> Distribution:
        """Distribution of one latent, event (K,)."""
        ...


@runtime_checkable
class SupportsLocal(Protocol):
    """A guide with a non-amortised version, which has free parameters for each data point."""

    def local(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The guide of these data: each of its parameters has one row for each data point, (N, ...)."""
        ...


@runtime_checkable
class SupportsRows(Protocol):
    """A guide bound to its data that can be restricted to some of the rows."""

    def rows(self, index: Tensor) -> Any:
        """The guide of chosen rows, (M,) integers."""
        ...


@runtime_checkable
class SupportsComponents(Protocol):
    """A distribution that is a mixture of C Gaussians with independent coordinates.

    Attributes:
        log_weights: (..., C).
        locs: Means, (..., C, K).
        sigmas: Standard deviations, (..., C, K).
    """

    log_weights: Tensor
    locs: Tensor
    sigmas: Tensor


class Simulates(Protocol):
    """A model that is called with a number of data points in place of data, and returns those that it simulates."""

    def __call__(self, *args: Any, n: int, **kwargs: Any) -> Tensor:
        """Simulated data, (n, D)."""
        ...


class SupportsGaussianDecoder(Protocol):
    """A model of one latent ``"z"`` with Gaussian noise around a decoder.

    Attributes:
        data_dim: D.
        latent_dim: K.
    """

    data_dim: int
    latent_dim: int

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise in units of x, (1,) or (D,)."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], shape ``z.shape[:-1] + (D,)``."""
        ...

    def prior(self) -> Distribution:
        """Distribution of one latent, event (K,)."""
        ...


def supports_gaussian_decoder(model: Any) -> TypeGuard[SupportsGaussianDecoder]:
    """Whether a model has all of :class:`SupportsGaussianDecoder`; its sigma may be a parameter or buffer.

    From Python 3.12 on ``isinstance`` does not see those, which ``nn.Module`` looks up by ``__getattr__``.
    """
    return all(hasattr(model, name) for name in ("data_dim", "latent_dim", "sigma", "decode", "prior"))


@runtime_checkable
class SupportsPrecision(Protocol):
    """A model with Gaussian noise of a precision that can be set."""

    def set_precision(self, gamma2: Tensor) -> None:
        """Set the precision of the noise."""
        ...


class SupportsFreeze(Protocol):
    """A module whose output depends on the batch until it is frozen."""

    @property
    def frozen(self) -> bool:
        """Whether it is."""
        ...

    def freeze(self, *args: Any) -> None:
        """Turn what depends on the batch into numbers."""
        ...


def supports_freeze(module: Any) -> TypeGuard[SupportsFreeze]:
    """Whether a module is a :class:`SupportsFreeze`, by its class: no tensor is read, as ``isinstance`` may do."""
    return hasattr(type(module), "freeze") and hasattr(type(module), "frozen")
