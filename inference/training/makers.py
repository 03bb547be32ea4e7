"""What makes the optimiser and the schedule of a run: checked before anything runs, and when it has made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def optimizer_maker(optimizer: Any) -> Callable[[list[Tensor]], Optimizer]:
    """A function that makes a torch optimiser of the parameters.

    Raises:
        TypeError: If it is none, such as a ready optimiser or one of Pyro's.
    """
    wanted = "optimizer as a function of the parameters, such as torch.optim.Adam or lambda p: torch.optim.Adam(p, .01)"
    return _maker(optimizer, wanted, (Optimizer, PyroOptim), Optimizer)


def scheduler_maker(scheduler: Any) -> Callable[[Optimizer], LRScheduler] | None:
    """A function that makes a learning-rate schedule of the optimiser, or None.

    Raises:
        TypeError: If it is none, such as a name or a ready schedule.
    """
    if scheduler is None:
        return None
    wanted = "scheduler as a function of the optimiser, such as lambda o: torch.optim.lr_scheduler.StepLR(o, 1000)"
    return _maker(scheduler, wanted, (LRScheduler,), LRScheduler | ReduceLROnPlateau)


def _maker(given: Any, wanted: str, ready: tuple[type, ...], result: Any) -> Callable[[Any], Any]:
    if isinstance(given, ready) or not callable(given):
        raise TypeError(f"expected {wanted}, got {_shown(given)}")

    def make(argument: Any) -> Any:
        made = given(argument)
        if not isinstance(made, result):
            raise TypeError(f"expected {wanted}, got a function that returns {_shown(made)}")
        return made

    return make


def _shown(value: Any) -> str:
    kind = type(value)
    return repr(value) if isinstance(value, str) or value is None else f"a ready {kind.__module__}.{kind.__name__}"
