r"""The guide of the linear VAE: mean linear in the data, one diagonal covariance for all of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from guides.base import EncoderGuide
from guides.parametrisation import diagonal_normal
from guides.supports import Bounds, describe_support
from inference.distributions.gaussian import DiagNormal


class Linear(EncoderGuide):
    r"""Linear Gaussian guide: the mean is linear in the data, the diagonal covariance the same for all.

    .. math:: q(z \mid x) = N(V (x - \mu) , D), \quad D \text{ diagonal, the same for every } x

    The term -V mu is kept as one bias of its own, so that the guide needs nothing of the model. After
    :meth:`standardise_by`, V and the bias act on standardised data.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469.

    Args:
        data_dim: D.
        latent_dim: K.
        support: Of the latent, see :class:`guides.EncoderGuide`.

    Attributes:
        V: (K, D).
        bias: (K,).
        log_sigma: Half the log of D's diagonal, (K,).
    """

    def __init__(
        self, data_dim: int, latent_dim: int, *, support: Constraint | Bounds = constraints.real_vector
    ) -> None:
        super().__init__(data_dim, latent_dim, support=support)
        self.V = nn.Parameter(torch.randn(latent_dim, data_dim) / math.sqrt(data_dim))
        self.bias = nn.Parameter(torch.zeros(latent_dim))
        self.log_sigma = nn.Parameter(torch.zeros(latent_dim))

    def encode(self, x: Tensor) -> Tensor:
        """Means, and log standard deviations that are the same for all data, side by side in (N, 2 K)."""
        mean = nn.functional.linear(self.standardise(x), self.V, self.bias)
        return torch.cat([mean, self.log_sigma.expand_as(mean)], -1)

    def family(self, parameters: Tensor) -> DiagNormal:
        """The Gaussian with means and log standard deviations side by side in (N, 2 K)."""
        return diagonal_normal(parameters)

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"data_dim": self.data_dim, "latent_dim": self.latent_dim} | describe_support(self.support)
