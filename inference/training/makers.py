"""What makes the optimiser and the schedule of a run: checked before anything runs, and when it has made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def optimizer_maker(optimizer: Any) -> Callable[[list[Tensor]], Optimizer]:
    """A function that makes a torch optimiser of the parameters.

    Raises:
        TypeError: If it is none, such as a ready optimiser or one of Pyro's.
    """
    wanted = "optimizer as a function of the parameters, such as torch.optim.Adam or lambda p: torch.optim.Adam(p, .01)"
    return _maker(optimizer, wanted, Optimizer)


def scheduler_maker(scheduler: Any) -> Callable[[Optimizer], LRScheduler] | None:
    """A function that makes a learning-rate schedule of the optimiser, or None.

    Raises:
        TypeError: If it is none, such as a name or a ready schedule.
    """
    if scheduler is None:
        return None
    wanted = "scheduler as a function of the optimiser, such as lambda o: torch.optim.lr_scheduler.StepLR(o, 1000)"
    return _maker(scheduler, wanted, LRScheduler | ReduceLROnPlateau)


def _maker(given: Any, wanted: str, result: Any) -> Callable[[Any], Any]:
    if isinstance(given, result) or _of_pyro(given) or not callable(given):
        raise TypeError(f"expected {wanted}, got {_shown(given)}")

    def make(argument: Any) -> Any:
        try:
            made = given(argument)
        except TypeError as error:
            raise TypeError(f"expected {wanted}, got a function that fails: {error}") from error
        if not isinstance(made, result):
            raise TypeError(f"expected {wanted}, got a function that returns {_shown(made)}")
        return made

    return make


def _of_pyro(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("pyro.optim")


def _shown(value: Any) -> str:
    if isinstance(value, str | int | float) or value is None:
        return repr(value)
    kind = type(value)
    return "one of pyro.optim" if _of_pyro(value) else f"a ready {kind.__module__}.{kind.__name__}"
