"""Amortised guides: a distribution of the latent ``"z"`` for each data point, computed from the data point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from guides.supports import Bounds, read_support
from inference.core.checks import MatrixDataMixin, check_count, check_layout
from inference.core.standardisation import Standardise, StandardisesData
from inference.distributions.gaussian import as_full_normal
from inference.distributions.transformed import push_forward
from inference.pair.module import Module


class Guide(MatrixDataMixin, Module):
    """A guide of the latent site ``"z"`` of shape (N, K), in the plate ``"data"`` at dim -1.

    A subclass gives :meth:`posterior`. The call signature is the model's, so that both halves of a pair take the
    same arguments.

    Attributes:
        has_density: True; of a :class:`guides.SampledGuide` only samples are known.
    """

    has_density: ClassVar[bool] = True

    def posterior(self, x: Tensor) -> Distribution:
        """Distribution of z given x (N, D): batch (N,), event (K,)."""
        raise NotImplementedError

    def forward(self, x: Tensor | None = None, n: int | None = None) -> Tensor:
        """Sample ``"z"`` from the posterior of each data point.

        Args:
            x: Data, (N, D).
            n: The model's number of data points without observations; unused by a guide.

        Returns:
            z, (N, K).

        Raises:
            ValueError: If there are no data.
        """
        if x is not None:
            self._check_layout(x)
        return sample_latent(self.posterior, x, n)


def sample_latent(distribution: Callable[[Tensor], Distribution], x: Tensor | None, n: int | None) -> Tensor:
    """Sample the site ``"z"`` from ``distribution(x)`` in the plate ``"data"``.

    Raises:
        ValueError: If there are no data.
    """
    if x is None:
        raise ValueError(f"expected a guide to be given data x of shape (N, D), got x=None, n={n}")
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("z", distribution(x))


class EncoderGuide(StandardisesData, Guide):
    r"""A guide whose posterior is ``family(encode(x))``: a network's output, read as the parameters of a distribution.

    .. math:: z = T(u), \quad u \mid x \sim \text{family}(\text{encode}(x))

    T leads from all vectors to the latent's support; it is the identity by default. A Gaussian's parameters begin with
    its mean.

    Args:
        data_dim: D.
        latent_dim: K.
        support: Of the latent: ``model.prior().support``, or that of each coordinate, for example
            ``constraints.unit_interval``, or two bounds of which one may be None.

    Attributes:
        support: Of the latent, as a constraint on vectors.
        standardise: The encoder's view of the data, see :meth:`standardise_by`.

    Raises:
        TypeError: If ``support`` is not a support, or a dimension is not an integer.
        ValueError: If a dimension is below one, or the support is discrete, of matrices, or has more entries than free
            coordinates.
    """

    def __init__(
        self, data_dim: int, latent_dim: int, *, support: Constraint | Bounds = constraints.real_vector
    ) -> None:
        super().__init__()
        check_count(data_dim, "data_dim")
        check_count(latent_dim, "latent_dim")
        self.data_dim, self.latent_dim = data_dim, latent_dim
        self.support = read_support(support)
        self.standardise = Standardise(data_dim)

    def encode(self, x: Tensor) -> Tensor:
        """The parameters of the distribution, (N, P), from data (N, D)."""
        raise NotImplementedError

    def family(self, parameters: Tensor) -> Distribution:
        """The distribution of u with the given parameters (N, P): batch (N,), event (K,), on all vectors."""
        raise NotImplementedError

    def posterior(self, x: Tensor) -> Distribution:
        """Distribution of z given x (N, D): batch (N,), event (K,), on the support."""
        return push_forward(self.family(self.encode(x)), self.support)

    @torch.no_grad()
    def local(self, x: Tensor) -> Local:
        """The non-amortised guide of these data: free parameters for each data point, started at the encoder's output.

        Args:
            x: Data, (N, D).
        """
        start = self.encode(x)
        return Local(x, start, self.natural_units(start), family=self.family, support=self.support)

    def natural_units(self, parameters: Tensor) -> Tensor:
        """The scale of each of the parameters (N, P): the standard deviation for a mean, one for all others."""
        full = as_full_normal(self.family(parameters))
        if full is None:
            return torch.ones_like(parameters)
        sigma = full.variance.sqrt().expand(len(parameters), -1)  # a Gaussian's parameters begin with its mean
        return torch.cat([sigma, torch.ones_like(parameters[:, self.latent_dim :])], -1)

    def _check_layout(self, x: Any) -> None:
        like = self.standardise.shift
        check_layout(x, data_dim=self.data_dim, dtype=like.dtype, device=like.device)


class Local(Guide):
    r"""Non-amortised guide: free parameters for each data point, in the family of an amortised guide.

    .. math:: q_n(z) = \text{family}(\phi_n), \quad \phi_n = \phi_n^0 + s_n \odot \delta_n

    The gap that the best of these leaves is the approximation gap of the family; what an encoder loses beyond it is the
    amortisation gap.

    References:
        Cremer, Li, Duvenaud, "Inference Suboptimality in Variational Autoencoders", 2018, arXiv 1801.03558.

    Args:
        x: The data, (N, D).
        start: Parameters to start from, (N, P).
        scales: A natural unit of each, (N, P).
        family: From parameters (N, P) to a distribution of unconstrained vectors: batch (N,), event (K,).
        support: Of the latent.

    Attributes:
        offsets: What is free, in natural units, (N, P): zero at the start.

    Example:
        >>> from guides import MeanField
        >>> MeanField(5, 2).local(torch.zeros(4, 5)).offsets.shape
        torch.Size([4, 4])
    """

    x: Tensor
    start: Tensor
    scales: Tensor

    def __init__(
        self, x: Tensor, start: Tensor, scales: Tensor, *, family: Callable[[Tensor], Distribution], support: Constraint
    ) -> None:
        super().__init__()
        self.register_buffer("x", x)
        self.register_buffer("start", start.detach())
        self.register_buffer("scales", scales.detach())
        self.offsets = nn.Parameter(torch.zeros_like(self.start))
        # In a tuple: the guide whose method this is stays outside of this one.
        self._family, self.support = (family,), support

    def posterior(self, x: Tensor) -> Distribution:
        """Distribution of z given x (N, D): batch (N,), event (K,), on the support.

        Raises:
            ValueError: If ``x`` are other data than the guide's own.
        """
        self._check_own(x)
        return push_forward(self._family[0](self.start + self.scales * self.offsets), self.support)

    @torch.no_grad()
    def local(self, x: Tensor) -> Local:
        """A new guide of the same data, started where this one is.

        Raises:
            ValueError: If ``x`` are other data than the guide's own.
        """
        self._check_own(x)
        return self.rows(torch.arange(len(x), device=x.device))

    @torch.no_grad()
    def rows(self, index: Tensor) -> Local:
        """A new guide of chosen data points, (M,) integers, started where this one is."""
        start = self.start + self.scales * self.offsets
        family, support = self._family[0], self.support
        return Local(self.x[index], start[index], self.scales[index], family=family, support=support)

    def _check_own(self, x: Tensor) -> None:
        if x is not self.x and (x.shape != self.x.shape or not torch.equal(x, self.x)):
            raise ValueError(
                f"expected the data that the local guide was made for, {tuple(self.x.shape)}, got others of shape "
                f"{tuple(x.shape)}: row n's parameters are for data point n"
            )
