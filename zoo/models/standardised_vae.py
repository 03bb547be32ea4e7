"""What variational autoencoders with Gaussian noise share: a decoder network, in units of the data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from guides.networks import hidden_widths, mlp
from inference.core.standardisation import Standardise, StandardisesData
from zoo.base import LatentVariableModel
from zoo.models.networks import decode_rows


class StandardisedVAE(StandardisesData, LatentVariableModel):
    r"""Base of the models x = s (f(z) + noise) + m, whose shift m and scale s are those of the data.

    A subclass gives the noise: ``sigma``, in units of x, and ``likelihood(z)``.

    Args:
        data_dim: D.
        latent_dim: K.
        hidden: Widths of the hidden layers of the default decoder.
        network: Any decoder from (M, K) to (M, D).
        prior: One of the zoo's priors with the same K; standard normal by default.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        hidden: Sequence[int],
        network: nn.Module | None,
        prior: nn.Module | None,
    ) -> None:
        super().__init__(data_dim, latent_dim, prior=prior)
        self._hidden = None if network is not None else hidden_widths(hidden)
        self.network = mlp(latent_dim, data_dim, hidden) if network is None else network
        self.standardise = Standardise(data_dim)

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] for z (..., K), in units of x: (..., D); the network sees the batch flattened to (M, K).

        Raises:
            ValueError: If the network's output is not (M, D).
        """
        return self.standardise.inverse(decode_rows(self.network, z, self.data_dim))
