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

from inference.core.checks import check_arguments
from inference.core.memory import at_once
from inference.pair.call import Call
from inference.pair.run import Program
from zoo.models.noise import BatchNoise, GaussianNoise, LearntNoise
from zoo.models.standardised_vae import StandardisedVAE
from zoo.priors.factorised import StandardNormal

_BATCH = 1024


class DeepGaussianVAE(StandardisedVAE):
    r"""Variational autoencoder (VAE) with a decoder network and Gaussian observation noise.

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
        network: Any decoder from (M, K) to (M, D), for example a convolutional one.
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
        super().__init__(data_dim, latent_dim, hidden=hidden, network=network, prior=prior)
        self.noise = LearntNoise() if noise is None else noise

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise in units of x, (1,) or (D,)."""
        return self.noise.sigma * self.standardise.scale

    def likelihood(self, z: Tensor) -> Distribution:
        """Distribution of x given z (..., K): batch (...), event (D,)."""
        return self.noise(self.decode(z), self.standardise.scale)

    @torch.no_grad()
    def freeze(self, guide: Program, x: Tensor, *, num_samples: int = 1) -> None:
        r"""Turn noise that depends on the batch into a number: the residuals of the training data, sampled once.

        .. math:: \sigma^2 = \frac{1}{N D} \sum_n E_{q(z \mid x_n)} \|x_n - f(z)\|^2

        or the corresponding formula of another kind of noise.

        Args:
            guide: The guide that the model was trained with.
            x: Training data, (N, D).
            num_samples: Latents per data point.

        Raises:
            TypeError: If the noise does not depend on the batch.
        """
        if not isinstance(self.noise, BatchNoise):
            raise TypeError(f"expected OptimalNoise to freeze, got {type(self.noise).__name__}")
        check_arguments((self, guide), (x,), {})
        total = x.new_zeros(self.data_dim)
        for batch in x.split(at_once(_BATCH)):
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
