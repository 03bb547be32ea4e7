r"""Gaussian guides whose parameters come from a network.

.. math:: q(z \mid x) = N(m(x), \Sigma(x))

:class:`MeanField` has a diagonal covariance, :class:`FullRank` any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from guides.base import EncoderGuide
from guides.networks import hidden_widths, mlp
from guides.parametrisation import diagonal_normal, full_normal, triangle_places
from guides.supports import Bounds, describe_support
from inference.distributions.gaussian import DiagNormal, FullNormal


class NetworkGuide(EncoderGuide):
    """Base of guides that hold an encoder network; checks that its output has the width that the family needs.

    Args:
        data_dim: D.
        latent_dim: K.
        num_parameters: P, what the family needs.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to (N, P), or None for the default one.
        support: Of the latent, see :class:`guides.EncoderGuide`.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        num_parameters: int,
        hidden: Sequence[int],
        encoder: nn.Module | None,
        support: Constraint | Bounds,
    ) -> None:
        super().__init__(data_dim, latent_dim, support=support)
        self.num_parameters = num_parameters
        self._hidden = None if encoder is not None else hidden_widths(hidden)
        self.encoder = mlp(data_dim, num_parameters, hidden) if encoder is None else encoder

    def encode(self, x: Tensor) -> Tensor:
        """Output of the encoder network, (N, P), on standardised data (N, D)."""
        parameters = self.encoder(self.standardise(x))
        if not isinstance(parameters, Tensor) or parameters.shape != (x.shape[0], self.num_parameters):
            got = tuple(parameters.shape) if isinstance(parameters, Tensor) else type(parameters).__name__
            raise ValueError(f"expected the encoder's output of shape {(len(x), self.num_parameters)}, got {got}")
        return parameters

    def config(self) -> dict[str, Any]:
        """Constructor arguments.

        Raises:
            NotImplementedError: If the encoder is the user's own, or JSON cannot describe the support.
        """
        if self._hidden is None:
            return super().config()
        sizes = {"data_dim": self.data_dim, "latent_dim": self.latent_dim, "hidden": self._hidden}
        return sizes | describe_support(self.support)


class MeanField(NetworkGuide):
    r"""Mean-field guide: an amortised Gaussian with independent coordinates.

    .. math:: q(z \mid x) = \prod_k N(z_k; m_k(x), \sigma_k^2(x))

    References:
        Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, arXiv 1312.6114.

    Args:
        data_dim: D.
        latent_dim: K.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to (N, 2 K), means first and log standard deviations second.
        support: Of the latent, see :class:`guides.EncoderGuide`.

    Example:
        >>> import torch
        >>> MeanField(5, 2).posterior(torch.zeros(4, 5)).event_shape
        torch.Size([2])
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
        super().__init__(data_dim, latent_dim, 2 * latent_dim, hidden, encoder, support)

    def family(self, parameters: Tensor) -> DiagNormal:
        """The Gaussian with means and log standard deviations side by side in (N, 2 K)."""
        return diagonal_normal(parameters)


class FullRank(NetworkGuide):
    r"""Full-rank guide: an amortised Gaussian with a full covariance.

    .. math:: q(z \mid x) = N(z; m(x), L(x) L(x)^T)

    Args:
        data_dim: D.
        latent_dim: K.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to (N, K + K (K + 1) / 2): means, log diagonal of L, then its strictly
            lower triangle row by row.
        support: Of the latent, see :class:`guides.EncoderGuide`.

    Example:
        >>> import torch
        >>> FullRank(5, 2).posterior(torch.zeros(4, 5)).covariance_matrix.shape
        torch.Size([4, 2, 2])
    """

    places: Tensor

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (128, 128),
        encoder: nn.Module | None = None,
        support: Constraint | Bounds = constraints.real_vector,
    ) -> None:
        num_parameters = 2 * latent_dim + latent_dim * (latent_dim - 1) // 2
        super().__init__(data_dim, latent_dim, num_parameters, hidden, encoder, support)
        self.register_buffer("places", triangle_places(latent_dim), persistent=False)

    def family(self, parameters: Tensor) -> FullNormal:
        """The Gaussian with mean, log diagonal and lower triangle side by side in (N, K + K (K + 1) / 2)."""
        return full_normal(parameters, self.places)
