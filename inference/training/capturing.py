"""Captured training: the step of a run as a graph that is replayed without Python, checked against the pair's own.

A graph knows tensors alone. What else a pair's Python does must be the same in every step: that is looked at when a
step is captured, and the graph is compared with the pair itself on the same noise, again and again along the run.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.core.seeding import random_states, set_random_states
from inference.numerics.device_graphs import DeviceReplay
from inference.numerics.graphs import FlatGraph, Level, Replay, compiled, flat_graph, folded, own_memory, scripted
from inference.objectives.base import Objective
from inference.pair.fingerprint import described, iterators_in, python_state, say_differences
from inference.training.agreement import Stale, Tensors, all_close, all_same, check_agreement, compared, reason_of
from inference.training.bunches import BUNCH, Bunch, leaves_of
from inference.training.callbacks import Callback
from inference.training.losses import PairLoss
from inference.training.recorded_adam import adam_obstacle
from inference.training.shares import SharedLoss

if TYPE_CHECKING:
    from inference.training.trainer import Trainer

_logger = logging.getLogger(__name__)

# Automatic capture waits for so many batches of a form, and wants so many more to come: it takes about as long as a
# hundred steps.
_WAIT, _WORTH = 50, 500

# Graphs at most: batches of further forms are not captured.
_MOST = 8

# What a batch may hold beside tensors: constants of its form.
_PLAIN = bool | int | float | str | None

# Replays of a graph between two checks, at most.
_LAST_CHECK = 1000


@dataclass(eq=False)
class _Graph:
    """The captured step of one form of batch.

    Attributes:
        flat: Loss, gradients, and whether its assumptions hold, of parameters, buffers, step and batch.
        replay: Its replay.
        has_gradient: Of each parameter, whether it gets one.
        batch: The last batch.
        unchecked: Replays since the last check.
        interval: Replays until the next one.
    """

    flat: FlatGraph
    replay: Replay
    has_gradient: list[bool]
    batch: tuple[Any, ...]
    unchecked: int = 0
    interval: int = 1


class Capture:
    """The gradients of a run's batches: by the pair's own Python, or by replays of graphs that were captured of it.

    Args:
        trainer: The run, with its optimiser.
        level: See :func:`inference.fit`.
        steps: Steps at which the run ends.
    """

    def __init__(self, trainer: Trainer, level: Level, steps: int) -> None:
        self._trainer, self._level, self._steps = trainer, level, steps
        self._graphs, self._bunches = dict[Any, _Graph](), dict[Any, Bunch]()
        self._seen, self._calls = Counter[Any](), 0
        self._holds: list[Tensor] = []
        self._fixed, self._buffers, self._python = list[Tensor](), list[Tensor](), dict[str, Any]()
        self._off, self._exactly = level == "off", level != "compile"
        self._takes_bunches = not adam_obstacle(trainer.optimizer, trainer.scheduler, exactly=self._exactly)
        if not self._off and (reason := self._obstacle()):
            self.give_up(reason)

    @property
    def is_checked(self) -> bool:
        """Whether every step so far is the pair's own, or of a graph that has been checked since."""
        return not any(graph.unchecked for graph in self._all())

    @property
    def at_once(self) -> int:
        """Steps that are best taken in one go, where none of them but the last is looked at."""
        return BUNCH if self._takes_bunches and self._graphs and not self._off else 1

    def backward(self, batch: tuple[Any, ...]) -> Tensor:
        """The loss of a batch in nats per data point, after the parameters have got its gradient in place of theirs.

        Raises:
            Stale: If a graph cannot be replayed.
        """
        if self._off:
            return self._eager(batch)
        form = self._form(batch)
        graph, self._calls = self._graphs.get(form), self._calls + 1
        if graph is not None:
            return self._replayed(graph, batch)
        self._seen[form] += 1
        return self._capture(form, batch) if self._is_worth(form) else self._eager(batch)

    def bunch(self, batches: list[tuple[Any, ...]]) -> list[Tensor] | None:
        """The losses of steps on batches of one form, taken in one replay; None where they are to be taken singly.

        Raises:
            Stale: If the graph cannot be replayed.
        """
        form = None if self._off or not self._takes_bunches else self._form(batches[0])
        if form not in self._graphs:
            return None
        if form not in self._bunches:
            self._record(form, batches)
        bunch = self._bunches.get(form)
        if bunch is None or not bunch.is_ready:
            return None
        losses, holds = bunch.run(batches)
        self._holds += [] if holds is None else [holds]
        self._calls += len(batches)
        return losses

    def check(self, final: bool) -> None:
        """Compare graphs that are due with the pair itself; after it nothing has changed.

        Args:
            final: Check all that ran since their last check: the state is about to be read.

        Raises:
            Stale: If one differs.
        """
        holds, self._holds = self._holds, []
        if holds and not bool(torch.stack(holds).all()):
            raise Stale("a branch or a check of arguments in it depends on values")
        due = [g for g in self._all() if g.unchecked and (final or g.unchecked >= g.interval)]
        gradients = self._gradients()
        try:
            for graph in due:
                graph.check() if isinstance(graph, Bunch) else self._check_graph(graph)
        finally:
            self._set_gradients(gradients)
        if due:
            self._check_python()
        for graph in due:
            graph.interval, graph.unchecked = min(2 * max(graph.unchecked, graph.interval), _LAST_CHECK), 0

    def give_up(self, reason: str) -> None:
        """Go on without graphs, and say why."""
        self._off = True
        self._graphs, self._bunches, self._holds = {}, {}, []
        level = logging.INFO if self._level == "auto" else logging.WARNING
        _logger.log(level, "the steps run as the pair's own Python: %s", reason)

    def after_callbacks(self) -> None:
        """Go on without graphs where callbacks have changed more of the pair than its tensors."""
        if self._graphs and not self._off:
            try:
                self._check_python()
            except Stale as stale:
                self.give_up(f"{stale}, by a callback")

    def _all(self) -> list[_Graph | Bunch]:
        return [*self._graphs.values(), *self._bunches.values()]

    def _obstacle(self) -> str:
        """Why no step can be captured; empty where nothing speaks against it."""
        if isinstance(self._trainer.loss, SharedLoss):
            return "several ranks share each batch"
        if not self._trainer.supply.can_be_repeated:
            return "an IterableDataset gives its batches once, and what a graph took in vain is taken again"
        if not self._trainer.loss.is_differentiable:
            return f"{type(self._trainer.objective).__name__} has only loss_and_grads"
        if any(_is_foreign(callback) for callback in self._trainer.callbacks):
            return "a callback on every step may change the pair"
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self._trainer.parameters):
            return "a hook waits for a parameter's gradient"
        return ""

    def _tensors(self) -> list[Tensor]:
        """Parameters that are trained, then buffers, then all others."""
        t = self._trainer
        tensors, known = t.tensors(), {id(tensor) for tensor in t.tensors()}
        frozen = [p for module in t.modules for p in module.parameters() if id(p) not in known]
        return [*tensors, *frozen]

    def _inputs(self, batch: tuple[Any, ...]) -> list[Tensor]:
        step = getattr(self._trainer.objective, "step", None)
        steps = [step] if isinstance(step, Tensor) else []
        return [*self._fixed, *steps, *(leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor))]

    def _form(self, batch: tuple[Any, ...]) -> Any:
        """All of a batch but its numbers, and which parameters are trained."""
        forms = (
            (x.shape, x.stride(), x.dtype, x.device)
            if isinstance(x, Tensor)
            else (type(x), x if isinstance(x, _PLAIN) else None)
            for x in leaves_of(batch)
        )
        return (*forms, *(p.requires_grad for p in self._trainer.parameters))

    def _is_worth(self, form: Any) -> bool:
        if len(self._graphs) >= _MOST:
            return False
        if self._level != "auto":
            return True
        remaining = self._steps - self._trainer.steps_taken
        return self._seen[form] > _WAIT and remaining * self._seen[form] / self._calls >= _WORTH

    def _eager(self, batch: tuple[Any, ...]) -> Tensor:
        for parameter in self._trainer.parameters:
            parameter.grad = None
        return self._trainer.loss.backward(batch, self._trainer.parameters)

    def _replayed(self, graph: _Graph, batch: tuple[Any, ...]) -> Tensor:
        graph.batch, graph.unchecked = batch, graph.unchecked + 1
        loss, gradients, holds = self._run(graph, batch)
        self._set_gradients(gradients)
        if holds is not None:
            self._holds.append(holds)
        return loss

    def _run(self, graph: _Graph, batch: tuple[Any, ...]) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        try:
            loss, *results = graph.replay(self._inputs(batch))
        except RuntimeError as error:
            raise Stale(reason_of(error)) from error
        found = iter(results)
        gradients = [next(found) if has else None for has in graph.has_gradient]
        return loss, gradients, next(found) if graph.flat.assumes else None

    def _capture(self, form: Any, batch: tuple[Any, ...]) -> Tensor:
        """The loss of a step by the pair's own Python, and a graph of it for the next ones."""
        try:
            self._look(batch)
        except Stale as stale:
            return self._eager_from_here(stale, batch)
        before, loss = self._state(), self._eager(batch)
        after, gradients = self._state(), self._gradients()
        try:
            self._check_python()
            self._set_state(before)
            graph = self._traced(batch)
            self._set_state(before)
            self._compare(graph, batch, loss, gradients, after)
            self._check_python()
        except Exception as error:  # a user's program may fail to trace in any way
            self._set_state(after)
            self.check(final=True)
            self.give_up(reason_of(error))
        else:
            self._graphs[form] = graph
            _logger.info("steps on batches like that of step %d are replayed", self._trainer.steps_taken)
        self._set_state(after)
        self._set_gradients(gradients)
        return loss

    def _record(self, form: Any, batches: list[tuple[Any, ...]]) -> None:
        """Record a bunch of steps and compare it with the pair's own; where that fails, steps are taken singly."""
        t, graph = self._trainer, self._graphs[form]
        parameters = [p for p, has in zip(t.parameters, graph.has_gradient, strict=True) if has]
        gradients = self._gradients()
        try:
            bunch = Bunch(t, self._fixed, graph.flat, parameters, batches, eager=self._eager, exactly=self._exactly)
            bunch.check()
            self._check_python()
        except Exception as error:  # a compiler may fail in any way
            self._takes_bunches = False
            level = logging.INFO if self._exactly else logging.WARNING
            _logger.log(level, "steps are replayed one by one: %s", reason_of(error))
        else:
            self._bunches[form] = bunch
            _logger.info("steps on batches like that of step %d are replayed %d at once", t.steps_taken, len(batches))
        finally:
            self._set_gradients(gradients)

    def _look(self, batch: tuple[Any, ...]) -> None:
        """Find the tensors of the pair and what else must stay as it is."""
        for leaf in leaves_of(batch):
            if not isinstance(leaf, Tensor | _PLAIN):
                raise Stale(f"an argument is a {type(leaf).__name__}")
        if not self._graphs:
            t = self._trainer
            self._fixed, self._python = self._tensors(), self._described()
            self._buffers = self._fixed[len(t.parameters) : len(t.tensors())]
            if iterators := iterators_in(self._python):
                raise Stale(f"the pair holds a {iterators[0]}, whose place cannot be seen")

    def _eager_from_here(self, stale: Stale, batch: tuple[Any, ...]) -> Tensor:
        self.check(final=True)
        self.give_up(str(stale))
        return self._eager(batch)

    def _traced(self, batch: tuple[Any, ...]) -> _Graph:
        inputs, parameters, whole = self._inputs(batch), self._trainer.parameters, self._trainer.loss
        assert isinstance(whole, PairLoss)  # several ranks are an obstacle
        has_gradient: list[bool] = []

        def step() -> list[Tensor]:
            loss = whole.with_gradient(batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            has_gradient[:] = [gradient is not None for gradient in gradients]
            given = [(g, p.detach()) for g, p in zip(gradients, parameters, strict=True) if g is not None]
            return [loss.detach(), *own_memory([g for g, _ in given], [p for _, p in given], inputs)]

        flat = folded(flat_graph(step, inputs), constants=False)
        # Compiled bunches take most of the steps, where there are any.
        make = compiled if self._level == "compile" and not self._takes_bunches else scripted
        return _Graph(flat, DeviceReplay(make(flat), len(self._fixed)), has_gradient, batch)

    def _check_graph(self, graph: _Graph) -> None:
        """Compare a graph with the pair itself on its last batch; the state is put back."""
        before = self._state()

        def compare() -> None:
            self._set_state(before)
            loss = self._eager(graph.batch)
            after, expected = self._state(), self._gradients()
            self._set_state(before)
            self._compare(graph, graph.batch, loss, expected, after)

        try:
            compared(compare)
        except Exception as error:  # the pair itself may refuse its values
            raise Stale(reason_of(error)) from error
        finally:
            self._set_state(before)

    def _compare(
        self,
        graph: _Graph,
        batch: tuple[Any, ...],
        loss: Tensor,
        gradients: list[Tensor | None],
        after: tuple[list[Tensor], list[Tensor]],
    ) -> None:
        """Run a graph and compare what it gives and leaves behind with what the pair's own Python did."""
        got_loss, got_gradients, holds = self._run(graph, batch)
        buffers, states = self._state()
        if holds is not None and not bool(holds):
            raise Stale("a branch or a check of arguments in it depends on values")
        if not all(map(torch.equal, states, after[1])):
            raise Stale("it draws other random numbers")
        exactly = self._exactly or self._takes_bunches
        agree = all_same if exactly else partial(all_close, loss=abs(float(loss)))
        parts: list[tuple[str, Tensors, Tensors]] = [
            ("loss", [got_loss], [loss]),
            ("gradient", got_gradients, gradients),
            ("buffers", buffers, after[0]),
        ]
        check_agreement(agree, parts)

    def _state(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of what a forward changes: buffers, and the state of the random generators."""
        return [buffer.detach().clone() for buffer in self._buffers], random_states()

    @torch.no_grad()
    def _set_state(self, state: tuple[list[Tensor], list[Tensor]]) -> None:
        for buffer, value in zip(self._buffers, state[0], strict=True):
            buffer.copy_(value)
        set_random_states(state[1])

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self._trainer.parameters]

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._trainer.parameters, gradients, strict=True):
            parameter.grad = gradient

    def _described(self) -> dict[str, Any]:
        """What must stay as it is for a graph to hold, as far as it can be seen.

        Raises:
            Stale: If the pair holds what cannot be described.
        """
        try:
            return self._description()
        except Exception as error:  # of objects of a user's own
            raise Stale(f"the pair cannot be described, {reason_of(error)}") from error

    def _description(self) -> dict[str, Any]:
        t = self._trainer
        return {
            **python_state({name: getattr(t, name) for name in ("model", "guide", "objective")}, t.modules),
            "count": None if isinstance(t.objective, Objective) else described(getattr(t.objective, "step", None)),
            "hooks": described(self._hooks()),
            "tensors": [id(tensor) for tensor in self._tensors()],
        }

    def _hooks(self) -> list[Any]:
        """Functions that run in a step beside the pair's own, which may keep something, too."""
        t = self._trainer
        hooks = [hook for p in t.parameters for hook in (p._backward_hooks or {}).values()]
        parts = [part for module in t.modules for part in module.modules()]
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        return [*hooks, *(hook for part in parts for kind in kinds for hook in getattr(part, kind).values())]

    def _check_python(self) -> None:
        if text := say_differences(self._python, self._described()):
            raise Stale(f"the pair's Python has changed ({text})")


def _is_foreign(callback: Callback) -> bool:
    """Whether a callback that is no part of this library looks at every step."""
    kind = type(callback)
    return kind.on_step is not Callback.on_step and not kind.__module__.startswith("inference.")
