"""The state of a training run: what a step changes, and what a checkpoint holds."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from inference.core.handlers import LocalParams
from inference.core.memory import at_once
from inference.core.module import Module
from inference.core.run import Program, modules_of
from inference.core.seeding import random_state
from inference.core.storage import load_tree, save_tree, tensor_digest
from inference.objectives.base import Objective
from inference.training.batches import Batches
from inference.training.losses import PairLoss

# Losses are read from the device, checked and shown once in so many steps.
_FLUSH_EVERY = 50
_VALIDATION_BATCH = 4096
_VALIDATION_SEED = 0


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


def trainable_parameters(model: Program, guide: Program, loss: PairLoss, batch: tuple[Any, ...]) -> list[Tensor]:
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


class Trainer:
    """The state of one training run: what a step changes, and what a checkpoint holds."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: tuple[Any, ...],
        validation: tuple[Any, ...] | None,
        objective: pyro.infer.ELBO,
        seed: int | None,
        *,
        layout: Batches,
    ) -> None:
        self.model, self.guide, self.objective, self.seed = model, guide, objective, seed
        self.data, self.validation, self.layout = data, validation, layout
        self.loss = PairLoss(objective, model, guide, self.layout.count)
        self.modules = modules_of(model, guide)
        self.history = History()
        self.order_seed = int(torch.randint(2**31, ()))
        self.best: list[Tensor] | None = None

    def prepare(
        self,
        optimizer: Callable[[list[Tensor]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        batch_size: int,
    ) -> None:
        """Make optimiser and schedule, and begin the objective's own schedule anew."""
        if isinstance(self.objective, Objective):
            self.objective.step = torch.zeros_like(self.objective.step)
        self.batch_size = batch_size
        self.parameters = trainable_parameters(self.model, self.guide, self.loss, self.data)
        self.optimizer = optimizer(self.parameters)
        self.settings = repr([{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups])
        if isinstance(self.optimizer, torch.optim.LBFGS) and batch_size < self.layout.count(self.data):
            raise ValueError(
                f"expected the full batch for LBFGS, got batch_size={batch_size} of {self.layout.count(self.data)}"
            )
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise TypeError("expected a schedule that depends on the step alone, got ReduceLROnPlateau")

    def run(
        self,
        steps: int,
        evaluate_every: int,
        patience: int | None,
        checkpoint: Path | None,
        checkpoint_every: int,
        progress: bool,
    ) -> History:
        """Take steps until there are ``steps`` of them in all."""
        self.history.stopped_early = self._out_of_patience(patience)
        start, history = time.perf_counter() - self.history.seconds, self.history
        pending: list[Tensor] = []
        self._train_mode(True)
        with tqdm(total=steps, initial=history.steps, disable=not progress, desc="fit", unit="step") as bar:
            for step, batch in self._batches(history.steps):
                if step >= steps or history.stopped_early:
                    break
                pending.append(self._step(batch))
                evaluate = self.validation is not None and ((step + 1) % evaluate_every == 0 or step + 1 == steps)
                save = checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps)
                if len(pending) == _FLUSH_EVERY or evaluate or save or step + 1 == steps:
                    self._flush(pending, bar)
                if evaluate:
                    self._evaluate(patience)
                history.seconds = time.perf_counter() - start
                if checkpoint is not None and (save or history.stopped_early):
                    self.save(checkpoint)
        self._restore_best()
        self._train_mode(False)
        return history

    def _batches(self, first: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Batches from step ``first`` on; an epoch's order depends on the seed and its number alone."""
        num_data = self.layout.count(self.data)
        if self.batch_size == num_data:
            for step in itertools.count(first):
                yield step, self.data
        per_epoch = math.ceil(num_data / self.batch_size)
        generator, order, epoch = torch.Generator(), None, -1
        for step in itertools.count(first):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator.manual_seed(self.order_seed + epoch)
                order = torch.randperm(num_data, generator=generator)
            assert order is not None
            at = step % per_epoch * self.batch_size
            yield step, self.layout.take(self.data, order[at : at + self.batch_size])

    def _step(self, batch: tuple[Any, ...]) -> Tensor:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            return self.loss.backward(batch, self.parameters)

        loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]
        if isinstance(self.objective, Objective):
            self.objective.advance()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.detach()

    def _flush(self, pending: list[Tensor], bar: Any) -> None:
        losses = torch.stack(pending).double().tolist()
        bar.update(len(pending))
        pending.clear()
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.history.steps + offset
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}: try a smaller learning rate, standardised data or float64"
                )
        self.history.loss += losses
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
        history.validation.append((history.steps, total))
        best = min(range(len(history.validation)), key=lambda i: history.validation[i][1])
        if best == len(history.validation) - 1:
            history.best_step, self.best = history.steps, [t.detach().clone() for t in self._state()]
        history.stopped_early = self._out_of_patience(patience)

    def _out_of_patience(self, patience: int | None) -> bool:
        losses = [loss for _, loss in self.history.validation]
        return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def _state(self) -> list[Tensor]:
        """All tensors that training changes: parameters, those in Pyro's store, and buffers."""
        buffers = [b for module in self.modules for b in module.buffers()]
        return [*self.parameters, *buffers]

    @torch.no_grad()
    def _restore(self, saved: list[Tensor]) -> None:
        for tensor, value in zip(self._state(), saved, strict=True):
            tensor.copy_(value)

    def _restore_best(self) -> None:
        if self.best is not None:
            self._restore(self.best)

    def _train_mode(self, mode: bool) -> None:
        for module in self.modules:
            module.train(mode)

    def _fingerprint(self) -> dict[str, Any]:
        """What must agree for a checkpoint to belong to this run; of a learning rate that moves, the first."""
        return {
            "seed": self.seed,
            "parameters": [list(p.shape) for p in self.parameters],
            "optimizer": [type(self.optimizer).__name__, self.settings],
            "objective": [type(self.objective).__name__, self.objective.num_particles],
            "batch_size": self.batch_size,
            "data": [_described(leaf) for leaf in tree_leaves(self.data)],
            "layout": [sorted(map(str, self.layout.rows)), self.layout.whole],
        }

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on, atomically."""
        tree = {
            "fingerprint": self._fingerprint(),
            "history": vars(self.history),
            "state": self._state(),
            "best": self.best,
            "objective": self.objective.step if isinstance(self.objective, Objective) else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else _plain(self.scheduler.state_dict()),
            "order_seed": self.order_seed,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        save_tree(path, tree)

    def load(self, path: Path) -> None:
        """Go back to a saved state.

        Raises:
            ValueError: If the file is damaged or belongs to another run.
        """
        tree = load_tree(path)
        expected, got = self._fingerprint(), tree.get("fingerprint") if isinstance(tree, dict) else None
        if got != expected:
            raise ValueError(f"expected a checkpoint of this run, {expected}, got {got} in {path}: remove it or rename")
        self.history = History(**tree["history"])
        self._restore(tree["state"])
        self.best = tree["best"]
        if isinstance(self.objective, Objective):
            self.objective.step = tree["objective"]
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(tree["scheduler"])
        self.order_seed = tree["order_seed"]
        torch.set_rng_state(tree["random"])
        if tree["random_cuda"]:
            torch.cuda.set_rng_state_all(tree["random_cuda"])


def _described(leaf: Any) -> Any:
    return [list(leaf.shape), str(leaf.dtype), tensor_digest(leaf)] if isinstance(leaf, Tensor) else repr(leaf)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's state without functions, which cannot be written and which the caller's factory makes again."""
    return {
        key: value
        for key, value in state.items()
        if value is None or isinstance(value, str | int | float | bool | list | tuple | dict | Tensor)
    }
