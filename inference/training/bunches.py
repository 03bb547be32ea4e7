"""Bunches of steps: a captured step with Adam's update, several times over, as one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from inference.core.seeding import random_state, random_states, set_random_states
from inference.numerics.device_graphs import DeviceReplay
from inference.numerics.graphs import FlatGraph, Replay, compiled, flat_graph, scripted
from inference.objectives.base import Objective
from inference.training.agreement import Stale, all_close, all_same, check_agreement, compared, reason_of
from inference.training.recorded_adam import FusedAdam, PlainAdam

if TYPE_CHECKING:
    from inference.training.trainer import Trainer

# Steps of a bunch. More of them cost a compiler minutes and gain little.
BUNCH = 4

Batch = tuple[Any, ...]


class Bunch:
    """The captured steps of one form of batch, taken in one replay.

    Args:
        trainer: The run, whose optimiser has updated every parameter before.
        fixed: Tensors of the pair.
        step: Loss, gradients, and whether assumptions hold, of these, the objective's step and a batch.
        parameters: Those that get a gradient.
        batches: Some of the form.
        eager: Takes one step by the pair's own Python, and gives its loss.
        exactly: To the bits of the pair's own Python; else it is compiled.

    Attributes:
        unchecked: Steps since the last check.
        interval: Steps until the next one.

    Raises:
        Exception: Whatever a program or a compiler may fail of.
    """

    def __init__(
        self,
        trainer: Trainer,
        fixed: list[Tensor],
        step: FlatGraph,
        parameters: list[Tensor],
        batches: list[Batch],
        *,
        eager: Callable[[Batch], Tensor],
        exactly: bool,
    ) -> None:
        self._trainer, self._fixed, self._eager, self._exactly = trainer, fixed, eager, exactly
        self._adam = (FusedAdam if exactly else PlainAdam)(trainer.optimizer, parameters)
        if not self._adam.is_begun:
            raise Stale("the optimiser has not updated every parameter before")
        self._batches, self._settings, self._assumes = batches, self._adam.settings(), step.assumes
        self.unchecked, self.interval = 0, BUNCH
        before = self.state()
        try:
            flat = self._recorded(step, batches)
        finally:
            self.set_state(before)
        replay = scripted(flat) if exactly else compiled(flat)
        self._replay: Replay = DeviceReplay(replay, len(fixed) + len(self._adam.tensors()))

    @property
    def is_ready(self) -> bool:
        """Whether the optimiser is as it was recorded."""
        return self._adam.is_begun and self._adam.settings() == self._settings

    def run(self, batches: list[Batch]) -> tuple[list[Tensor], Tensor | None]:
        """Take steps; their losses, and whether what they assume holds.

        Raises:
            Stale: If that cannot be done.
        """
        learning_rates = self._trainer.learning_rates(len(batches))
        if not self.is_ready:
            raise Stale("the schedule changes more than the learning rate")
        self._batches, self.unchecked = batches, self.unchecked + len(batches)
        losses, holds = self._run(batches, learning_rates)
        for parameter in self._trainer.parameters:  # those of the last step are in no tensor
            parameter.grad = None
        if isinstance(self._trainer.objective, Objective):
            self._trainer.objective.step = self._trainer.objective.step + len(batches)
        return list(losses), holds

    def check(self) -> None:
        """Compare the steps with the pair's own on the last batches; what they change is put back.

        Raises:
            Stale: If they differ.
        """
        trainer, before = self._trainer, self.state()
        step = getattr(trainer.objective, "step", None)

        def restore() -> None:
            self.set_state(before)
            if step is not None:
                trainer.objective.step = step

        def compare() -> None:
            restore()
            expected = self._outcome(torch.stack([self._own_step(batch) for batch in self._batches]))
            restore()
            losses, holds = self._run(self._batches, [self._rates()] * len(self._batches))
            if holds is not None and not bool(holds):
                raise Stale("a branch or a check of arguments in it depends on values")
            self._compare(self._outcome(losses), expected)

        try:
            compared(compare)
        except Exception as error:  # the pair itself may refuse its values
            raise Stale(reason_of(error)) from error
        finally:
            restore()

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of what steps change: tensors, and the state of the random generators."""
        return [tensor.detach().clone() for tensor in self._changing()], random_states()

    @torch.no_grad()
    def set_state(self, state: tuple[list[Tensor], list[Tensor]]) -> None:
        """Go back to what :meth:`state` returned."""
        for tensor, value in zip(self._changing(), state[0], strict=True):
            tensor.copy_(value)
        set_random_states(state[1])

    def _changing(self) -> list[Tensor]:
        return [*self._trainer.tensors(), *self._adam.tensors()]

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self._trainer.optimizer.param_groups]

    def _inputs(self, batches: list[Batch], rates: Tensor) -> list[Tensor]:
        leaves = [leaf for batch in batches for leaf in _tensors(batch)]
        return [*self._fixed, *self._adam.tensors(), rates, *self._step(), *leaves]

    def _step(self) -> list[Tensor]:
        step = getattr(self._trainer.objective, "step", None)
        return [step] if isinstance(step, Tensor) else []

    def _recorded(self, step: FlatGraph, batches: list[Batch]) -> FlatGraph:
        module, number = GraphModule(step.constants, step.graph), len(self._adam.parameters)
        rates = self._adam.rates([self._rates()] * len(batches))
        inputs, count = self._inputs(batches, rates), self._step()

        def steps() -> list[Tensor]:
            losses, holds = [], []
            for i, batch in enumerate(batches):
                loss, *results = module(*self._fixed, *(s + i for s in count), *_tensors(batch))
                self._adam.update(results[:number], rates[i])
                losses.append(loss)
                holds += results[number : number + step.assumes]
            return [torch.stack(losses), *([torch.stack(holds).all()] if holds else [])]

        with torch.no_grad():
            return flat_graph(steps, inputs)

    def _run(self, batches: list[Batch], learning_rates: list[list[float]]) -> tuple[Tensor, Tensor | None]:
        try:
            losses, *results = self._replay(self._inputs(batches, self._adam.rates(learning_rates)))
        except RuntimeError as error:
            raise Stale(reason_of(error)) from error
        return losses, results[0] if self._assumes else None

    def _own_step(self, batch: Batch) -> Tensor:
        trainer = self._trainer
        loss: Any = trainer.optimizer.step(lambda: self._eager(batch))  # type: ignore[arg-type, return-value]
        if isinstance(trainer.objective, Objective):
            trainer.objective.advance()
        return loss

    def _outcome(self, losses: Tensor) -> dict[str, list[Tensor]]:
        """What steps gave and left behind."""
        trainer, number = self._trainer, len(self._adam.parameters)
        tensors, random = self.state()
        tensors, moments = tensors[: -3 * number], tensors[-3 * number :]
        return {
            "loss": [losses],
            "parameters": tensors[: len(trainer.parameters)],
            "buffers": tensors[len(trainer.parameters) :],
            "mean gradient": moments[:number],
            "mean squared gradient": moments[number : 2 * number],
            "count of steps": moments[2 * number :],
            "random state": random,
        }

    def _compare(self, one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> None:
        """Compare outcomes; where they are compiled, parameters by their next loss, and by those before.

        Adam moves a parameter whose gradient is rounding alone by as much as any other: there compiled steps may go
        another way, which no loss can tell.
        """
        if self._exactly:
            return check_agreement(all_same, [(name, value, other[name]) for name, value in one.items()])
        parts = [(name, value, other[name]) for name, value in one.items() if name != "parameters"]
        close = partial(all_close, loss=float(other["loss"][0].norm()))
        check_agreement(close, [*parts, ("loss after it", [self._loss_at(one)], [self._loss_at(other)])])

    @torch.no_grad()
    def _loss_at(self, outcome: dict[str, list[Tensor]]) -> Tensor:
        for tensor, value in zip(self._trainer.tensors(), outcome["parameters"] + outcome["buffers"], strict=True):
            tensor.copy_(value)
        with random_state(0):
            return torch.tensor(self._trainer.loss.value(self._batches[-1]), dtype=outcome["loss"][0].dtype)


def leaves_of(batch: Batch) -> Sequence[Any]:
    """All that a batch holds, one by one."""
    return batch if all(isinstance(part, Tensor) for part in batch) else tree_leaves(batch)


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]
