"""A decoder network trained elsewhere, as a model of the zoo: for measuring what one already has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from zoo.base import LatentVariableModel


class WrappedDecoder(LatentVariableModel):
    r"""A plain torch decoder as a model, with the distribution that its training assumed.

    .. math:: z \sim N(0, I_K) \text{ or the given prior}, \quad x \mid z \sim \text{distribution}(\text{network}(z))

    Args:
        network: From (M, K) to a tensor with leading dimension M, or to a tuple of such tensors.
        distribution: Makes the distribution of x from the network's output, whose leading dimensions are those of z
            again (so take parts of it by ``out[..., :D]``): the same batch, event (D,). The constants count: a squared
            error stands for a Gaussian of a certain sigma, and the evidence depends on it. To be exported, it is made
            with ``validate_args=False``: validation asks for values, which a graph of any N has not.
        data_dim: D.
        latent_dim: K.
        prior: Distribution of one latent, event (K,); standard normal by default.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> from guides import WrappedEncoder
        >>> from inference import compare, table
        >>> decoder, encoder = torch.nn.Linear(2, 5), torch.nn.Linear(5, 4)  # trained by your own code
        >>> model = WrappedDecoder(decoder, lambda mean: dist.Normal(mean, 0.1).to_event(1), 5, 2)
        >>> guide = WrappedEncoder(encoder, lambda out: dist.Normal(out[..., :2], out[..., 2:].exp()).to_event(1))
        >>> result = compare(model, {"mine": guide}, torch.randn(8, 5), num_samples=100, progress=False)
        >>> print(table(result).splitlines()[1].split())
        ['guide', 'ELBO', 'log', 'p', 'gap']
    """

    def __init__(
        self,
        network: nn.Module,
        distribution: Callable[[Any], Distribution],
        data_dim: int,
        latent_dim: int,
        *,
        prior: Distribution | None = None,
    ) -> None:
        super().__init__(data_dim, latent_dim)
        if prior is not None and (prior.event_shape != (latent_dim,) or prior.batch_shape != ()):
            raise ValueError(
                f"expected a prior with batch () and event ({latent_dim},), got {tuple(prior.batch_shape)} and "
                f"{tuple(prior.event_shape)}"
            )
        self.network, self._distribution, self._prior = network, distribution, prior
        for like in network.parameters():
            self.to(dtype=like.dtype, device=like.device)
            break

    def prior(self) -> Distribution:
        """Distribution of one latent: batch (), event (K,)."""
        return super().prior() if self._prior is None else self._prior

    def likelihood(self, z: Tensor) -> Distribution:
        """Distribution of x given z (..., K): batch (...), event (D,); the network gets z flattened to (M, K)."""
        batch = z.shape[:-1]
        try:
            output = self.network(z.reshape(-1, self.latent_dim))
        except RuntimeError as error:
            if "shape" not in str(error):
                raise
            raise ValueError(
                f"expected a network of inputs (M, latent_dim={self.latent_dim}), but it failed: {error}"
            ) from error
        if isinstance(output, tuple):
            output = tuple(part.reshape(batch + part.shape[1:]) for part in output)
        else:
            output = output.reshape(batch + output.shape[1:])
        distribution = self._distribution(output)
        if distribution.batch_shape != batch or distribution.event_shape != (self.data_dim,):
            raise ValueError(
                f"expected the decoder's distribution to have batch {tuple(batch)} and event ({self.data_dim},), got "
                f"{tuple(distribution.batch_shape)} and {tuple(distribution.event_shape)}: is .to_event(1) missing?"
            )
        return distribution

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] for z (..., K): (..., D)."""
        return self.likelihood(z).mean
