r"""A deep Gaussian variational autoencoder: a decoder network with Gaussian noise.

.. math:: z \sim p(z), \quad x \mid z \sim N(f(z), \sigma^2 I_D)

The prior is standard normal unless another is given. The evidence is not known in closed form; with a linear network
and the standard normal prior it is that of :class:`zoo.LinearVAE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from guides.networks import mlp
from inference.core.call import Call
from inference.core.checks import check_arguments
from inference.core.run import Program
from inference.core.standardisation import Standardise
from zoo.base import LatentVariableModel
from zoo.models.networks import decode_rows
from zoo.models.noise import BatchNoise, GaussianNoise, LearntNoise
from zoo.priors.factorised import StandardNormal

_BATCH = 1024


class DeepGaussianVAE(LatentVariableModel):
    r"""Variational autoencoder with a decoder network and Gaussian observation noise.

    .. math:: x = s \, (f(z) + \sigma \epsilon) + m

    with shift m and scale s of the data (buffers, identity unless :meth:`standardise_by` is called). What the methods
    return is in the units of x; the noise's sigma is in standardised units.

    References:
        Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, arXiv 1312.6114. Lucas, Tucker, Grosse, Norouzi,
        "Don't Blame the ELBO!", 2019, arXiv 1911.02469 (sigma and posterior collapse).

    Args:
        data_dim: D.
        latent_dim: K.
        hidden: Widths of the hidden layers of the default decoder.
        noise: One of :class:`zoo.FixedNoise`, :class:`zoo.LearntNoise` (the default, from sigma = 1),
            :class:`zoo.LearntNoisePerDim`, :class:`zoo.OptimalNoise`, :class:`zoo.BagginsReconstruction` and
            :class:`zoo.PooledBagginsReconstruction`.
        network: Any decoder from (M, K) to (M, D), a convolutional one say.
        prior: One of :mod:`zoo.priors.factorised` with the same K; standard normal by default.

    Example:
        >>> DeepGaussianVAE(5, 2)(n=3).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (128, 128),
        noise: GaussianNoise | BatchNoise | None = None,
        network: nn.Module | None = None,
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__(data_dim, latent_dim, prior=prior)
        self._hidden = None if network is not None else list(hidden)
        self.network = mlp(latent_dim, data_dim, hidden) if network is None else network
        self.noise = LearntNoise() if noise is None else noise
        self.standardise = Standardise(data_dim)

    def standardise_by(self, x: Tensor) -> DeepGaussianVAE:
        """Express the decoder's output in units of ``x`` (N, D): its mean and one global scale; returns the model.

        Raises:
            ValueError: If ``x`` is not (N, D), not finite or constant.
        """
        self.standardise.fit(x)
        return self

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise in units of x, (1,) or (D,)."""
        return self.noise.sigma * self.standardise.scale

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] for z (..., K), in units of x: (..., D); the network sees the batch flattened to (M, K).

        Raises:
            ValueError: If the network's output is not (M, D).
        """
        mean = decode_rows(self.network, z, self.data_dim)
        return mean * self.standardise.scale + self.standardise.shift

    def likelihood(self, z: Tensor) -> Distribution:
        """Law of x given z (..., K): batch (...), event (D,)."""
        return self.noise(self.decode(z), self.standardise.scale)

    @torch.no_grad()
    def freeze(self, guide: Program, x: Tensor, *, num_samples: int = 1) -> None:
        r"""Turn noise that depends on the batch into a number: the residuals of the training data, sampled once.

        .. math:: \sigma^2 = \frac{1}{N D} \sum_n E_{q(z \mid x_n)} \|x_n - f(z)\|^2

        or what else the noise makes of the residuals.

        Args:
            guide: The guide that the model was trained with.
            x: Training data, (N, D).
            num_samples: Latents per datum.

        Raises:
            TypeError: If the noise does not depend on the batch.
        """
        if not isinstance(self.noise, BatchNoise):
            raise TypeError(f"expected OptimalNoise to freeze, got {type(self.noise).__name__}")
        check_arguments((self, guide), (x,), {})
        total = x.new_zeros(self.data_dim)
        for batch in x.split(_BATCH):
            (z,) = Call(self, guide, (batch,)).run(num_samples).latents.values()
            total += (batch - self.decode(z)).square().flatten(0, -2).sum(0) / num_samples
        variance = self.noise.variance_of(total / len(x), x.var(0, correction=0))
        self.noise.freeze(variance.sqrt() / self.standardise.scale)
        self.eval()

    def config(self) -> dict[str, Any]:
        """Constructor arguments, unless network, noise or prior are not the default."""
        if self._hidden is None or type(self.noise) is not LearntNoise or type(self.prior_module) is not StandardNormal:
            return super().config()
        return {"data_dim": self.data_dim, "latent_dim": self.latent_dim, "hidden": self._hidden}
