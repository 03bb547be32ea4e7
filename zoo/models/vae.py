r"""Variational autoencoder (VAE) of a prior, a decoder network and a factorised likelihood.

.. math:: z \sim p(z), \quad x \mid z \sim \prod_d p(x_d \mid f_d(z))

It is for binary and categorical data; for Gaussian noise that does not depend on z see :class:`zoo.DeepGaussianVAE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from guides.networks import hidden_widths, mlp
from zoo.base import LatentVariableModel
from zoo.models.likelihoods import BernoulliLikelihood, Likelihood
from zoo.models.networks import decode_rows
from zoo.priors.factorised import StandardNormal


class VAE(LatentVariableModel):
    r"""Variational autoencoder (VAE) whose likelihood factorises over the dimensions of the data.

    .. math:: z \sim p(z), \quad x \mid z \sim \prod_d p(x_d \mid f_d(z))

    References:
        Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, arXiv 1312.6114.

    Args:
        data_dim: D.
        latent_dim: K.
        likelihood: One of :class:`zoo.BernoulliLikelihood` (the default), :class:`zoo.CategoricalLikelihood` and
            :class:`zoo.GaussianLikelihood`.
        hidden: Widths of the hidden layers of the default decoder.
        network: Any decoder from (M, K) to (M, D P), with P parameters of the likelihood per dimension.
        prior: One of :mod:`zoo.priors.factorised` with the same K; standard normal by default.

    Attributes:
        observation: The likelihood as a module.

    Example:
        >>> from zoo import CategoricalLikelihood
        >>> VAE(5, 2, likelihood=CategoricalLikelihood(4))(n=3).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        likelihood: Likelihood | None = None,
        hidden: Sequence[int] = (128, 128),
        network: nn.Module | None = None,
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__(data_dim, latent_dim, prior=prior)
        self.observation = BernoulliLikelihood() if likelihood is None else likelihood
        self._hidden = None if network is not None else hidden_widths(hidden)
        width = data_dim * self.observation.num_parameters
        self.network = mlp(latent_dim, width, hidden) if network is None else network

    def likelihood(self, z: Tensor) -> Distribution:
        """Distribution of x given z (..., K): batch (...), event (D,); the network sees the batch flattened to (M, K).

        Raises:
            ValueError: If the network's output is not (M, D P).
        """
        num = self.observation.num_parameters
        output = decode_rows(self.network, z, self.data_dim * num)
        return self.observation(output.unflatten(-1, (self.data_dim, num)))

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] for z (..., K): (..., D)."""
        return self.likelihood(z).mean

    def check_data(self, x: Any) -> None:
        """Check that ``x`` are data for this model.

        Raises:
            TypeError: If ``x`` is not a floating tensor of the parameters' dtype.
            ValueError: If ``x`` is not (N, D), not finite or outside the likelihood's support.
        """
        super().check_data(x)
        self.observation.check_data(x)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, unless network, likelihood or prior are not the default."""
        defaults = type(self.observation) is BernoulliLikelihood and type(self.prior_module) is StandardNormal
        if self._hidden is None or not defaults:
            return super().config()
        return {"data_dim": self.data_dim, "latent_dim": self.latent_dim, "hidden": self._hidden}
