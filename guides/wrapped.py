"""An encoder network trained elsewhere, as a guide: for measuring what one already has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from guides.base import Guide, Local
from guides.local import local_gaussian


class WrappedEncoder(Guide):
    r"""A plain torch encoder with the law that its training assumed.

    .. math:: q(z \mid x) = \text{law}(\text{network}(x))

    Args:
        network: From (N, D) to whatever ``law`` takes.
        law: Makes the distribution of z from the network's output: batch (N,), event (K,).

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> guide = WrappedEncoder(
        ...     torch.nn.Linear(5, 4), lambda out: dist.Normal(out[:, :2], (0.5 * out[:, 2:]).exp()).to_event(1)
        ... )
        >>> guide(torch.zeros(3, 5)).shape
        torch.Size([3, 2])
    """

    def __init__(self, network: nn.Module, law: Callable[[Any], Distribution]) -> None:
        super().__init__()
        self.network, self._law = network, law

    @torch.no_grad()
    def local(self, x: Tensor) -> Local:
        """The guide of these data (N, D), with a Gaussian of the encoder's kind free for each datum.

        Raises:
            TypeError: If the law is not Gaussian.
        """
        return local_gaussian(x, self.posterior(x))

    def posterior(self, x: Tensor) -> Distribution:
        """Law of z given x (N, D): batch (N,), event (K,).

        Raises:
            ValueError: If the law has another batch or event.
        """
        law = self._law(self.network(x))
        if law.batch_shape != (len(x),) or len(law.event_shape) != 1:
            raise ValueError(
                f"expected the encoder's law to have batch ({len(x)},) and event (K,), got {tuple(law.batch_shape)} "
                f"and {tuple(law.event_shape)}: is .to_event(1) missing?"
            )
        return law
