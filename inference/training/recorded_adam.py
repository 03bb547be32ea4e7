"""Adam's update as operations on tensors, so that a graph can hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from inference.training.pair_rates import PairRates


class RecordedAdam(ABC):
    """Adam's updates of chosen parameters, as operations on tensors that a graph can hold.

    Args:
        optimizer: One without an obstacle.
        parameters: Those that get a gradient; it has updated each of them before.
    """

    def __init__(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._groups = [groups[id(p)] for p in parameters]

    def tensors(self) -> list[Tensor]:
        """The two moments of each parameter, then the counts of their steps; what an update changes beside them."""
        states = [self.optimizer.state[p] for p in self.parameters]
        return [state[name] for name in ("exp_avg", "exp_avg_sq", "step") for state in states]

    @property
    def is_begun(self) -> bool:
        """Whether every parameter has been updated before, and has its moments."""
        return all("step" in self.optimizer.state.get(p, ()) for p in self.parameters)

    def settings(self) -> list[Any]:
        """All but the learning rates, which a graph holds as numbers, group by group."""
        groups = self.optimizer.param_groups
        return [{k: v for k, v in g.items() if k not in ("params", "lr", "initial_lr")} for g in groups]

    @abstractmethod
    def rates(self, learning_rates: list[list[float]]) -> Tensor:
        """What changes from step to step beside the moments, (steps, ...), of the learning rates by step and group."""

    @abstractmethod
    def update(self, gradients: Sequence[Tensor], rates: Tensor) -> None:
        """Change parameters, moments and counts in place."""


class FusedAdam(RecordedAdam):
    """Adam by the very operations of torch's fused step, to the same bits."""

    def rates(self, learning_rates: list[list[float]]) -> Tensor:
        """The learning rates, (steps, groups)."""
        return torch.tensor(learning_rates, dtype=torch.float64)

    def update(self, gradients: Sequence[Tensor], rates: Tensor) -> None:
        """See :class:`RecordedAdam`."""
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        with _learning_rates(self.optimizer, list(rates)):
            self.optimizer.step()


class PlainAdam(RecordedAdam):
    r"""Adam by its formula, which a compiler joins with what makes the gradients.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
    """

    def rates(self, learning_rates: list[list[float]]) -> Tensor:
        """Learning rate, the same over the correction of the mean, and that of the square, (steps, groups, 3)."""
        taken = self._steps_taken()
        return torch.tensor(
            [
                [self._rate(group, at, lr) for group, at, lr in zip(self.settings(), taken, rates, strict=True)]
                for rates, taken in ((rates, [t + i + 1 for t in taken]) for i, rates in enumerate(learning_rates))
            ],
            dtype=torch.float64,
            device=self.parameters[0].device,
        )

    def _steps_taken(self) -> list[float]:
        """Steps so far, by group.

        Raises:
            RuntimeError: If parameters of a group have not as many.
        """
        taken = [set[float]() for _ in self.optimizer.param_groups]
        for p, group in zip(self.parameters, self._groups, strict=True):
            taken[group].add(float(self.optimizer.state[p]["step"]))
        if any(len(numbers) > 1 for numbers in taken):
            raise RuntimeError("the parameters of a group have been updated in different numbers of steps")
        return [next(iter(numbers), 0.0) for numbers in taken]

    @staticmethod
    def _rate(settings: dict[str, Any], step: float, learning_rate: float) -> list[float]:
        first, second = settings["betas"]
        return [learning_rate, learning_rate / (1 - first**step), (1 - second**step) ** -0.5]

    def update(self, gradients: Sequence[Tensor], rates: Tensor) -> None:
        """See :class:`RecordedAdam`."""
        settings, states = self.settings(), [self.optimizer.state[p] for p in self.parameters]
        for p, gradient, state, group in zip(self.parameters, gradients, states, self._groups, strict=True):
            first, second = settings[group]["betas"]
            decay, epsilon = settings[group]["weight_decay"], settings[group]["eps"]
            rate, corrected, root = rates[group].to(p.dtype).unbind()
            if decay and settings[group]["decoupled_weight_decay"]:
                p.mul_(1 - decay * rate)
            elif decay:
                gradient = gradient + decay * p
            mean = state["exp_avg"].lerp_(gradient, 1 - first)
            square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            p.sub_(corrected * mean / (square.sqrt() * root + epsilon))
            state["step"].add_(1)


def adam_obstacle(optimizer: Optimizer, scheduler: LRScheduler | None, *, exactly: bool) -> str:
    """Why an optimiser's steps are recorded by no graph; empty where nothing speaks against it.

    Args:
        optimizer: The optimiser.
        scheduler: Its schedule of the learning rate.
        exactly: To the same bits.
    """
    if type(optimizer) not in (Adam, AdamW):
        return f"the optimiser is {type(optimizer).__name__}, not Adam"
    own = vars(optimizer).get("step")
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    foreign = [hook for hook in hooks if not (exactly and isinstance(getattr(hook, "__self__", None), PairRates))]
    if foreign or not (own is None or hasattr(own, "_wrapped_by_lr_sched")):
        return "the optimiser's step has hooks"
    if isinstance(scheduler, CyclicLR | OneCycleLR):
        return f"{type(scheduler).__name__} may change more than the learning rate"
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) or any(group[name] for name in ("amsgrad", "maximize", "capturable")):
            return "Adam has amsgrad, maximize, capturable or a tensor as learning rate"
        if exactly and not group["fused"]:
            return "Adam is not fused"
    return ""


@contextmanager
def _learning_rates(optimizer: Optimizer, rates: list[Any]) -> Iterator[None]:
    """Set learning rates, group by group, while a block runs."""
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
