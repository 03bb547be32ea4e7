"""An encoder network trained elsewhere, as a guide, so that it can be measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from guides.base import Guide, Local
from guides.local import local_gaussian


class WrappedEncoder(Guide):
    r"""A plain torch encoder as a guide, with the distribution that its training assumed.

    .. math:: q(z \mid x) = \text{distribution}(\text{network}(x))

    Args:
        network: From (N, D) to whatever ``distribution`` takes.
        distribution: Makes the distribution of z from the network's output: batch (N,), event (K,). To be exported, it
            is made with ``validate_args=False``: validation asks for values, which a graph of any N has not.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> guide = WrappedEncoder(
        ...     torch.nn.Linear(5, 4), lambda out: dist.Normal(out[:, :2], (0.5 * out[:, 2:]).exp()).to_event(1)
        ... )
        >>> guide(torch.zeros(3, 5)).shape
        torch.Size([3, 2])
    """

    def __init__(self, network: nn.Module, distribution: Callable[[Any], Distribution]) -> None:
        super().__init__()
        self.network, self._distribution = network, distribution

    @torch.no_grad()
    def local(self, x: Tensor) -> Local:
        """The guide of these data (N, D), with a Gaussian of the encoder's kind free for each data point.

        Raises:
            TypeError: If the distribution is not Gaussian.
        """
        return local_gaussian(x, self.posterior(x))

    def posterior(self, x: Tensor) -> Distribution:
        """Distribution of z given x (N, D): batch (N,), event (K,).

        Raises:
            ValueError: If the distribution has another batch or event.
        """
        distribution = self._distribution(self.network(x))
        batch, event = distribution.batch_shape, distribution.event_shape
        if batch != x.shape[:1] or len(event) != 1:
            raise ValueError(
                f"expected the encoder's distribution to have batch ({len(x)},) and event (K,), got {tuple(batch)} and "
                f"{tuple(event)}: is .to_event(1) missing?"
            )
        return distribution
