"""Learning rates that differ by pair, of an optimiser whose parameters are stacked pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from inference.training.makers import optimizer_maker

_PROPORTIONAL = (Adam, AdamW, SGD, RMSprop)


class PairRates:
    """Steps of which each pair takes its own share: that of its learning rate in the largest one.

    Args:
        shares: By pair, at most one.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares, self._before = tuple(shares), list[Tensor]()

    def attach(self, optimizer: Optimizer) -> None:
        """Have every step of an optimiser shared out."""
        optimizer.register_step_pre_hook(self.keep)
        optimizer.register_step_post_hook(self.share_out)

    def keep(self, optimizer: Optimizer, *_: Any) -> None:
        """Keep the parameters as they are before a step."""
        self._before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def share_out(self, optimizer: Optimizer, *_: Any) -> None:
        """Put each pair so far along its step as its share says."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p, before in zip(parameters, self._before, strict=True):
            shares = torch.tensor(self.shares, dtype=p.dtype, device=p.device)
            p.copy_(before.lerp(p, shares.reshape(-1, *[1] * (p.ndim - 1))))
        self._before = []


def with_pair_rates(make: Any, rates: Sequence[float], num_pairs: int) -> Callable[[list[Tensor]], Optimizer]:
    """A function that makes an optimiser, with a learning rate for each pair in place of its own.

    Raises:
        TypeError: When called, if it makes none whose step is proportional to its learning rate.
        ValueError: If there are not as many rates as pairs, or one is not positive; when called, if the optimiser has
            several parameter groups.
    """
    numbers, make = [float(rate) for rate in rates], optimizer_maker(make)
    if len(numbers) != num_pairs or not all(0 < rate < math.inf for rate in numbers):
        raise ValueError(f"expected a positive learning rate for each of {num_pairs} pairs, got {numbers}")
    largest = max(numbers)

    def made(parameters: list[Tensor]) -> Optimizer:
        optimizer = make(parameters)
        if type(optimizer) not in _PROPORTIONAL:
            known = ", ".join(kind.__name__ for kind in _PROPORTIONAL)
            raise TypeError(
                f"expected one of {known} for learning rates by pair, whose step is proportional to its learning rate, "
                f"got {type(optimizer).__name__}"
            )
        if len(optimizer.param_groups) > 1:
            raise ValueError(
                f"expected one parameter group for learning rates by pair, got {len(optimizer.param_groups)}"
            )
        optimizer.param_groups[0]["lr"] = largest
        vars(optimizer)["pair_rates"] = numbers  # a run is recognised by its optimiser's settings
        PairRates([rate / largest for rate in numbers]).attach(optimizer)
        return optimizer

    return made
