"""Base of the zoo's models: a prior over latents and a likelihood of the data."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from inference.core.checks import MatrixDataMixin, check_count, check_layout
from inference.pair.module import Module
from zoo.priors.factorised import StandardNormal, check_prior


class LatentVariableModel(MatrixDataMixin, Module):
    r"""A Pyro model with one latent ``"z"`` and one observation ``"x"`` per data point.

    .. math:: z_n \sim p(z), \quad x_n \sim p(x \mid z_n), \quad n = 1..N

    A subclass gives :meth:`likelihood`.

    Args:
        data_dim: D.
        latent_dim: K.
        prior: Makes the distribution of one latent, one of :mod:`zoo.priors.factorised` or any module whose call
            returns a distribution with batch () and event (K,); standard normal by default.

    Attributes:
        prior_module: The prior as a module, with its parameters.

    Raises:
        TypeError: If the prior is not a module or returns no distribution, or a dimension is not an integer.
        ValueError: If the distribution is not one of K coordinates, or a dimension is below one.
    """

    _like: Tensor

    def __init__(self, data_dim: int, latent_dim: int, *, prior: nn.Module | None = None) -> None:
        super().__init__()
        check_count(data_dim, "data_dim")
        check_count(latent_dim, "latent_dim")
        self.data_dim, self.latent_dim = data_dim, latent_dim
        if prior is not None:
            check_prior(prior, latent_dim)
        self.prior_module = StandardNormal(latent_dim) if prior is None else prior
        # It follows the module's dtype and device, which data are checked against.
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def prior(self) -> Distribution:
        """Distribution of one latent: batch (), event (K,)."""
        return self.prior_module()

    def likelihood(self, z: Tensor) -> Distribution:
        """Distribution of x given z (..., K): batch ``z.shape[:-1]``, event (D,); data points are independent."""
        raise NotImplementedError

    def _check_layout(self, x: Any) -> None:
        check_layout(x, data_dim=self.data_dim, dtype=self._like.dtype, device=self._like.device)

    def forward(self, x: Tensor | None = None, n: int | None = None) -> Tensor:
        """The generative story: latents, then data, in the plate ``"data"`` at dim -1.

        Args:
            x: Observations, (N, D); None samples them.
            n: Number of data points to sample where ``x`` is None.

        Returns:
            The observations or samples, (N, D).

        Raises:
            TypeError: If ``x`` is not a floating tensor of the parameters' dtype.
            ValueError: If ``x`` is not (N, D), or neither ``x`` nor ``n`` is given.
        """
        if x is not None:
            self._check_layout(x)
            n = len(x)
        check_count(n, "n, the number of data points to sample where x is None,")
        with pyro.plate("data", n, dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)
