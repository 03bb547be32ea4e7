r"""A Gaussian guide with one variance for all coordinates and all data points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from guides.gaussian import NetworkGuide
from guides.supports import Bounds
from inference.core.checks import check_positive
from inference.distributions.gaussian import DiagNormal


class ConstantVariance(NetworkGuide):
    r"""Constant-variance guide: an amortised Gaussian whose network gives the mean alone.

    .. math:: q(z \mid x) = N(m(x), s^2 I)

    Where the prior learns its own scale, as the floating one does, s = 1 loses nothing, and ``learn_sigma=False``
    keeps it there.

    References:
        Fyffe, 2019, arXiv 1912.10309.

    Args:
        data_dim: D.
        latent_dim: K.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to the mean, (N, K).
        support: Of the latent, see :class:`guides.EncoderGuide`.
        sigma: Initial s.
        learn_sigma: Whether s is trained or stays as given.

    Attributes:
        log_sigma: log s, (1,).

    Raises:
        ValueError: If sigma is not positive and finite.

    Example:
        >>> ConstantVariance(5, 2).posterior(torch.zeros(4, 5)).variance[0]
        tensor([1., 1.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (128, 128),
        encoder: nn.Module | None = None,
        support: Constraint | Bounds = constraints.real_vector,
        sigma: float = 1.0,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__(data_dim, latent_dim, latent_dim, hidden, encoder, support)
        check_positive(sigma, "sigma")
        self.log_sigma = nn.Parameter(torch.tensor([math.log(sigma)]), requires_grad=learn_sigma)

    def family(self, parameters: Tensor) -> DiagNormal:
        """The Gaussian with the given mean (N, K)."""
        return DiagNormal(parameters, self.log_sigma.exp())

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return super().config() | {"learn_sigma": self.log_sigma.requires_grad}
