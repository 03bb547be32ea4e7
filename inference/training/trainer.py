"""A training run: its steps, what they change, and what it falls back to."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from inference.core.display import as_html
from inference.core.memory import at_once
from inference.core.ranks import alone, ranks
from inference.core.seeding import random_state, random_states, set_random_states
from inference.numerics.graphs import Level
from inference.objectives.base import Objective
from inference.pair.fingerprint import described
from inference.pair.handlers import LocalParams
from inference.pair.module import Module
from inference.pair.run import Program, modules_of
from inference.training.agreement import Stale
from inference.training.batches import Supply
from inference.training.callbacks import Callback, Moment
from inference.training.capturing import Capture
from inference.training.checkpoint import Checkpoint
from inference.training.losses import PairLoss
from inference.training.mixed_precision import Precision, check_dtypes
from inference.training.shares import SharedLoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Losses are read from the device, checked and shown once in so many steps.
_FLUSH_EVERY = 50
_VALIDATION_BATCH = 4096
_VALIDATION_SEED = 0

# Rows by which ranks compare their data.
_COMPARED = 16


@dataclass(kw_only=True)
class History:
    """History of a training run.

    Attributes:
        loss: The objective's loss at each step, in nats per data point of its mini-batch (before the step's update).
        validation: (step, loss per data point of the validation data) at each evaluation.
        seconds: Time in training, over all resumed runs.
        best_step: Step with the least validation loss, whose parameters the pair holds; None without validation.
        stopped_early: Whether patience ran out.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    best_step: int | None = None
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.loss)

    def __repr__(self) -> str:
        """One line: how many steps, from which loss to which, and the best evaluation."""
        text = f"{self.steps} steps in {self.seconds:.1f} s"
        if self.loss:
            text += f", loss {self.loss[0]:.4f} -> {self.loss[-1]:.4f} nats per data point"
        if self.best_step is not None:
            text += f", validation loss {dict(self.validation)[self.best_step]:.4f} at step {self.best_step}, the best"
        return f"<History of {text}>"

    def _repr_html_(self) -> str:
        import pandas as pd

        return as_html(repr(self), pd.DataFrame({"loss": self.loss}).rename_axis("step"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the loss over the steps, with the validation loss and its best step where there are some.

        Args:
            ax: Where to draw; a new figure, ``.figure`` of the result, if None.
        """
        from inference.core.figures import COLOURS, legend_above, one_panel

        ax = one_panel(ax, (5.6, 3.6))
        ax.plot(range(self.steps), self.loss, linewidth=0.8, color=COLOURS[0], label="training")
        if self.validation:
            ax.plot(*zip(*self.validation, strict=True), ".-", color=COLOURS[1], label="validation")
        if self.best_step is not None:
            ax.axvline(self.best_step, color="black", linewidth=0.8, linestyle=":", label="best evaluation")
        ax.set_xlabel("step")
        ax.set_ylabel("loss (nats per data point)")
        legend_above(ax)
        return ax


def trainable_parameters(
    model: Program, guide: Program, loss: PairLoss | SharedLoss, batch: tuple[Any, ...]
) -> list[Tensor]:
    """Every trainable tensor of a pair once: modules' parameters, and what functions name in param statements.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        loss: Runs the pair once to find param statements, which modules of ours do not need.
        batch: Arguments of that run.

    Raises:
        ValueError: If there is none.
    """
    found: list[Tensor] = []
    if not (isinstance(model, Module) and isinstance(guide, Module)):
        with LocalParams() as handler, random_state(None):
            loss.find_parameters(batch)
        found += handler.seen
    for module in modules_of(model, guide):
        found += module.parameters()
    parameters = list({id(p): p for p in found if p.requires_grad}.values())
    if not parameters:
        raise ValueError("expected a pair with at least one trainable parameter, got none")
    for parameter in parameters:
        parameter.grad = None
    return parameters


@dataclass(frozen=True)
class State:
    """All that the next step depends on, as copies.

    Attributes:
        steps: Steps taken.
        tensors: Parameters, those in Pyro's store, and buffers.
        optimizer: The optimiser's state.
        scheduler: The schedule's; None without one.
        objective: The objective's step; None if it counts none.
        random: States of torch's generators.
        best: ``tensors`` of the best evaluation; None before there is one.
        best_step: Its step.
        num_evaluations: Evaluations so far.
        stopped_early: Whether patience ran out.
    """

    steps: int
    tensors: list[Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    objective: Tensor | None
    random: list[Tensor]
    best: list[Tensor] | None
    best_step: int | None
    num_evaluations: int
    stopped_early: bool


class Trainer:
    """One training run: its steps, and the last good state to which it falls back where a step fails."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        supply: Supply,
        validation: tuple[Any, ...] | None,
        objective: pyro.infer.ELBO,
        seed: int | None,
        *,
        order_seed: int,
        precision: Precision = "full",
    ) -> None:
        self.model, self.guide, self.objective, self.seed = model, guide, objective, seed
        self.supply, self.validation, self.layout = supply, validation, supply.layout
        self.loss: PairLoss | SharedLoss = PairLoss(objective, model, guide, self.layout.count, precision)
        self.precision = precision
        self.modules = modules_of(model, guide)
        self.history = History()
        self.order_seed = order_seed
        self.best: list[Tensor] | None = None
        self.pending: list[Tensor] = []
        self.latest: State | None = None
        self.last_loss: Tensor | None = None
        self.callbacks: tuple[Callback, ...] = ()
        self.level: Level = "off"

    def prepare(
        self,
        optimizer: Callable[[list[Tensor]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        evaluate_every: int,
    ) -> None:
        """Make optimiser and schedule, and begin the objective's own schedule anew."""
        if isinstance(self.objective, Objective):
            self.objective.step = torch.zeros_like(self.objective.step)
        self.evaluate_every = evaluate_every
        self.parameters = trainable_parameters(self.model, self.guide, self.loss, self.supply.first)
        check_dtypes(self.precision, self.parameters)
        self.optimizer = optimizer(self.parameters)
        self.settings = optimizer_settings(self.optimizer)
        if isinstance(self.optimizer, torch.optim.LBFGS) and not self.supply.full:
            raise ValueError(
                f"expected the full batch for LBFGS, got batches of {self.layout.count(self.supply.first)}"
            )
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise TypeError("expected a schedule that depends on the step alone, got ReduceLROnPlateau")

    def share(self) -> None:
        """Compute with the other ranks: begin where the first one does, and take a share of each batch.

        Raises:
            ValueError: If the ranks have other data, or as :class:`inference.training.shares.SharedLoss`.
        """
        group = ranks()
        if group.size == 1 or isinstance(self.loss, SharedLoss):
            return
        group.check_same(described(list(self.layout.take(self.supply.first, slice(0, _COMPARED)))), "data")
        group.copy_first(self.tensors())
        self.loss = SharedLoss(self.loss, self.layout, group, self.supply.first, self.modules)

    def resume(self, checkpoint: Checkpoint | None, steps: int, patience: int | None) -> None:
        """Go on from the first rank's checkpoint, if there is one, on all ranks."""
        group = ranks()
        saved = group.of_first(lambda: self._resumed(checkpoint, steps, patience))
        if saved is not None and not group.first:
            state, self.history, self.order_seed = saved
            self.restore(state)

    def _resumed(
        self, checkpoint: Checkpoint | None, steps: int, patience: int | None
    ) -> tuple[State, History, int] | None:
        if checkpoint is None:
            return None
        checkpoint.load(steps, patience)
        return self.state(), self.history, self.order_seed

    def run(
        self, steps: int, patience: int | None, checkpoint: Checkpoint | None, checkpoint_every: int, progress: bool
    ) -> History:
        """Take steps until there are ``steps`` of them in all.

        Whatever ends the run, the pair is left in eval mode, in its last good state or the best one where there is
        validation, and that state is saved. An error carries the history as its attribute ``history``.
        """
        self.history.stopped_early = self._out_of_patience(patience)
        self.good, self.latest = self.state(), None
        self.checked, self.capture = self.good, Capture(self, self.level, steps)
        # Buffers may be infinite by intention, as masks are.
        self.watched = [t for t in self.tensors() if t.is_floating_point() and bool(t.isfinite().all())]
        self.watched += [p for p in self.parameters if not any(p is t for t in self.watched)]
        self._train_mode(True)
        try:
            hidden = not (progress and ranks().first)
            with tqdm(total=steps, initial=self.history.steps, disable=hidden, desc="fit", unit="step") as bar:
                self._take_steps(steps, patience, checkpoint, checkpoint_every, bar)
        except BaseException as error:
            self._fall_back(error)
            error.history = self.history  # type: ignore[attr-defined]
            self._train_mode(False)
            if checkpoint is not None:
                checkpoint.save_after(error)
            raise
        finally:
            self._restore_best()
            self._train_mode(False)
        return self.history

    def _take_steps(
        self, steps: int, patience: int | None, checkpoint: Checkpoint | None, checkpoint_every: int, bar: Any
    ) -> None:
        """Take all steps, those again that a captured graph took in vain."""
        while True:
            try:
                return self._go_on(steps, patience, checkpoint, checkpoint_every, bar)
            except Stale as stale:
                self._repeat(stale)
                bar.update(self.history.steps - bar.n)

    def _repeat(self, stale: Stale) -> None:
        """Go back to where the captured step was last known to be the pair's own, and go on without it."""
        taken = self.steps_taken
        self.restore(self.checked)
        self.good = self.latest = self.checked = self.state()  # what was restored shares the optimiser's memory
        warnings.warn(
            f"the captured step is not what the pair does: {stale}; steps {self.history.steps} to {taken} are taken "
            "again, and all others, without it",
            stacklevel=2,
        )
        self.capture.give_up(str(stale))

    def _go_on(
        self, steps: int, patience: int | None, checkpoint: Checkpoint | None, checkpoint_every: int, bar: Any
    ) -> None:
        history, start = self.history, time.perf_counter() - self.history.seconds
        every = self._looked_at(steps, checkpoint_every if checkpoint is not None else None)
        for step, batches in self.supply.from_step(history.steps, self.order_seed, lambda at: self._at_once(at, every)):
            if step >= steps or history.stopped_early:
                break
            self.pending += self._steps(batches)
            self.last_loss, step = self.pending[-1], step + len(batches) - 1
            stop = self._tell(Callback.on_step)
            last = step + 1 == steps or stop
            evaluate = self.validation is not None and (step + 1) % self.evaluate_every == 0
            save = checkpoint is not None and ((step + 1) % checkpoint_every == 0 or last)
            if len(self.pending) >= _FLUSH_EVERY or evaluate or save or last:
                self.capture.check(final=evaluate or save or last)
                self._flush(bar)
                if evaluate:
                    self._evaluate(patience)
                    stop |= self._tell(Callback.on_evaluate)
                history.stopped_early |= stop
                history.seconds = time.perf_counter() - start
                self.good = self.latest = self.state()
                self.checked = self.good if self.capture.is_checked else self.checked
            elif checkpoint is not None:
                self.latest = self.state()
            if checkpoint is not None and (save or history.stopped_early):
                checkpoint.save()
                history.stopped_early |= self._tell(Callback.on_checkpoint)
            if last or history.stopped_early:  # before another batch is read
                break
        # An evaluation beside the others is no part of the file, for a longer run has none here.
        if self.validation is not None and history.steps % self.evaluate_every and not history.stopped_early:
            self._evaluate(patience)
            self._tell(Callback.on_evaluate)
            history.seconds = time.perf_counter() - start
        self._tell(Callback.on_end)

    def _tell(self, hook: Callable[[Any, Moment], Any]) -> bool:
        """Call a hook of all callbacks; whether one wants to stop."""
        if not self.callbacks or self.last_loss is None:
            return False
        return ranks().of_first(lambda: self._wishes(hook))

    def _wishes(self, hook: Callable[[Any, Moment], Any]) -> bool:
        assert self.last_loss is not None
        now = Moment(
            model=self.model, guide=self.guide, step=self.steps_taken, history=self.history, last_loss=self.last_loss
        )
        self._train_mode(False)
        with random_state(None), alone():  # the run goes on as without
            wishes = [bool(getattr(callback, hook.__name__)(now)) for callback in self.callbacks]
        self._train_mode(True)
        if hook is not Callback.on_step:  # a callback of a user's own on every step stands against capture
            self.capture.after_callbacks()
        return any(wishes)

    def _looked_at(self, steps: int, checkpoint_every: int | None) -> list[int]:
        """Multiples of which numbers of steps are followed by more than the next one."""
        told = [c for c in self.callbacks if type(c).on_step is not Callback.on_step]
        every = [self.evaluate_every if self.validation is not None else None, checkpoint_every]
        return [steps, *(getattr(callback, "every", 1) for callback in told), *(n for n in every if n is not None)]

    def _at_once(self, step: int, every: list[int]) -> int:
        """Steps that may be taken in one go from a step on."""
        number = self.capture.at_once
        return number if all(n - step % n >= number for n in every) else 1

    def learning_rates(self, number: int) -> list[list[float]]:
        """Those of the next steps, by parameter group; the schedule moves on by as many."""
        rates = []
        for _ in range(number):
            rates.append([group["lr"] for group in self.optimizer.param_groups])
            if self.scheduler is not None:
                self.scheduler.step()
        return rates

    def _steps(self, batches: list[tuple[Any, ...]]) -> list[Tensor]:
        losses = self.capture.bunch(batches) if len(batches) > 1 else None
        return [self._step(batch) for batch in batches] if losses is None else losses

    def _step(self, batch: tuple[Any, ...]) -> Tensor:
        loss: Any = self.optimizer.step(lambda: self.capture.backward(batch))  # type: ignore[arg-type, return-value]
        if isinstance(self.objective, Objective):
            self.objective.advance()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.detach()

    def _flush(self, bar: Any) -> None:
        """Read the losses of the last steps from the device, and whether what they made is finite."""
        finite = sum(((t.detach() * 0).sum() for t in self.watched), self.pending[0].new_zeros(()) * 0)
        *losses, unchanged = torch.stack([*self.pending, finite.to(self.pending[0])]).double().tolist()
        bar.update(len(losses))
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                self.capture.check(final=True)  # whose own error may say more
                step = self.history.steps + offset
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}: try a smaller learning rate, standardised data or float64"
                )
        if unchanged != 0:
            self.capture.check(final=True)
            first, last = self.history.steps, self.history.steps + len(losses) - 1
            raise FloatingPointError(
                f"a parameter or buffer is NaN or infinite after steps {first} to {last}, though the loss is finite: a "
                "gradient breaks down; try a smaller learning rate, clipped gradients or float64"
            )
        self.history.loss += losses
        self.pending = []
        bar.set_postfix(loss=f"{losses[-1]:.4f}")

    @torch.no_grad()
    def _evaluate(self, patience: int | None) -> None:
        assert self.validation is not None
        self._train_mode(False)
        total, num_data = 0.0, self.layout.count(self.validation)
        with random_state(_VALIDATION_SEED):
            for batch in self.layout.split(self.validation, at_once(_VALIDATION_BATCH)):
                total += self.loss.value(batch) * self.layout.count(batch) / num_data
        self._train_mode(True)
        history = self.history
        if total < min((loss for _, loss in history.validation), default=math.inf):
            history.best_step, self.best = history.steps, [t.detach().clone() for t in self.tensors()]
        history.validation.append((history.steps, total if math.isfinite(total) else math.inf))
        history.stopped_early = self._out_of_patience(patience)

    def _out_of_patience(self, patience: int | None) -> bool:
        return self.steps_with(patience) is not None

    def steps_with(self, patience: int | None) -> int | None:
        """The step at which patience runs out in the evaluations so far; None where it does not."""
        losses = [loss for _, loss in self.history.validation]
        for i, (step, _) in enumerate(self.history.validation):
            if patience is not None and i - losses.index(min(losses[: i + 1])) >= patience:
                return step
        return None

    @property
    def steps_taken(self) -> int:
        """Steps so far, those included whose losses have not been read."""
        return self.history.steps + len(self.pending)

    def tensors(self) -> list[Tensor]:
        """All tensors that training changes: parameters, those in Pyro's store, and buffers."""
        buffers = [b for module in self.modules for b in module.buffers()]
        return [*self.parameters, *buffers]

    def state(self) -> State:
        """A copy of all that the next step depends on."""
        return State(
            steps=self.steps_taken,
            tensors=[t.detach().clone() for t in self.tensors()],
            optimizer=tree_map(_copied, self.optimizer.state_dict()),
            scheduler=None if self.scheduler is None else copy.deepcopy(_plain(self.scheduler.state_dict())),
            objective=self.objective.step if isinstance(self.objective, Objective) else None,
            random=random_states(),
            best=self.best,
            best_step=self.history.best_step,
            num_evaluations=len(self.history.validation),
            stopped_early=self.history.stopped_early,
        )

    def restore(self, state: State) -> None:
        """Go back to a state; losses and evaluations after it are forgotten."""
        self._set_tensors(state.tensors)
        self.optimizer.load_state_dict(state.optimizer)
        if self.scheduler is not None and state.scheduler is not None:
            self.scheduler.load_state_dict(state.scheduler)
        if isinstance(self.objective, Objective) and state.objective is not None:
            self.objective.step = state.objective
        set_random_states(state.random)
        self.best, history = state.best, self.history
        losses = torch.stack(self.pending).double().tolist() if self.pending else []
        history.loss, self.pending = [*history.loss, *losses][: state.steps], []
        del history.validation[state.num_evaluations :]
        history.best_step, history.stopped_early = state.best_step, state.stopped_early

    def _fall_back(self, error: BaseException) -> None:
        """To the last step that was whole and is finite: an error may have come in the midst of the next one."""
        latest = self.latest
        whole = latest is not None and not isinstance(error, FloatingPointError)
        if whole and latest is not None and latest is not self.good:
            whole = all(bool(t.isfinite().all()) for t in [*latest.tensors[: len(self.parameters)], *self.pending])
        self.restore(latest if whole and latest is not None else self.good)

    @torch.no_grad()
    def _set_tensors(self, saved: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors(), saved, strict=True):
            tensor.copy_(value)

    def _restore_best(self) -> None:
        if self.best is not None:
            self._set_tensors(self.best)

    def _train_mode(self, mode: bool) -> None:
        for module in self.modules:
            module.train(mode)


def optimizer_settings(optimizer: Optimizer) -> list[Any]:
    """Class and settings of an optimiser that has not run; of a learning rate that moves, the first."""
    groups = [{k: len(v) if k == "params" else v for k, v in g.items()} for g in optimizer.param_groups]
    own = {k: v for k, v in vars(optimizer).items() if not k.startswith("_") and k not in ("state", "param_groups")}
    return described([type(optimizer), groups, own], values=False)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's state without functions, which cannot be written and which the caller's factory makes again."""
    return {
        key: value
        for key, value in state.items()
        if value is None or isinstance(value, str | int | float | bool | list | tuple | dict | Tensor)
    }
