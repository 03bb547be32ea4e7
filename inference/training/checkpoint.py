"""The file of a training run: what it holds, and by what it is recognised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from inference.core.files import reading
from inference.core.memory import at_once
from inference.core.protocols import supports_freeze
from inference.core.storage import load_tree, save_tree, tensor_digest
from inference.pair.call import Call
from inference.pair.fingerprint import described, probe, same_numbers, say_differences, unchanged
from inference.training.batches import Loaded

if TYPE_CHECKING:
    from inference.training.trainer import Trainer

_KIND = "a checkpoint of this run"

# Rows at which a pair is run to be recognised: a file costs the same whatever the number of data points.
_PROBED = 1024


class Checkpoint:
    """The file of one training run.

    A run is recognised by everything that changes its result: the pair's classes, attributes and constants, its
    log-densities at a fixed draw, the objective and its settings, optimiser, schedule, data, validation and seed. Of a
    pair's buffers the values at the start or those in the file; of its parameters the shapes alone, for the file has
    them. Hooks are not looked at.

    Args:
        trainer: The run, before its first step.
        path: The file.
    """

    def __init__(self, trainer: Trainer, path: str | os.PathLike[str]) -> None:
        self.trainer, self.path = trainer, Path(path)
        before = self._described()
        self.probe()
        self.fingerprint = unchanged(before, self._described()) | self._settings()
        self.buffers = self._buffers()

    def _described(self) -> dict[str, Any]:
        t = self.trainer
        parts = {"model": t.model, "guide": t.guide, "objective": t.objective, "schedule": t.scheduler}
        return {name: described(part, values=False) for name, part in parts.items()}

    def _settings(self) -> dict[str, Any]:
        t = self.trainer
        return {
            "seed": t.seed,
            "parameters": [list(p.shape) for p in t.parameters],
            "optimizer": t.settings,
            **t.supply.described(),
            "validation": None if t.validation is None else [described(list(t.validation)), t.evaluate_every],
            "layout": [sorted(map(str, t.layout.rows)), t.layout.whole],
            "memory_limit": at_once(2**20),
            **({} if t.precision == "full" else {"precision": t.precision}),
        }

    def _buffers(self) -> dict[str, str]:
        """Digests of buffers; of those that freezing sets, which are no constants, the names alone."""
        found = {}
        for i, module in enumerate(self.trainer.modules):
            results = [name for name, part in module.named_modules() if supports_freeze(part)]
            for name, buffer in module.named_buffers():
                is_result = any(name.startswith(f"{prefix}." if prefix else "") for prefix in results)
                found[f"{i}.{name}"] = "" if is_result else tensor_digest(buffer)
        return found

    def probe(self) -> list[float] | None:
        """Log-densities of the pair at a fixed draw, see :func:`inference.pair.fingerprint.probe`."""
        t = self.trainer
        first = t.supply.first
        batch = t.layout.take(first, slice(0, min(t.layout.count(first), _PROBED)))
        plate = getattr(t.objective, "plate", None)
        call = Call(t.model, t.guide, batch, plate=plate, whole=t.layout.whole)
        modes = [(m, m.training) for module in t.modules for m in module.modules()]
        for module in t.modules:
            module.eval()
        try:
            return probe(call.run)
        finally:
            for m, training in modes:
                m.training = training

    def save(self) -> None:
        """Write everything that the next step depends on, atomically.

        Raises:
            OSError: If it cannot be written.
        """
        t, state = self.trainer, self.trainer.state()
        history = t.history
        tree = {
            "fingerprint": self.fingerprint,
            "buffers": self.buffers,
            "probe": self.probe(),
            "loss": torch.tensor(history.loss, dtype=torch.float64),
            "validation": torch.tensor(history.validation, dtype=torch.float64).reshape(-1, 2),
            "seconds": history.seconds,
            "order_seed": t.order_seed,
            "last_batch": t.supply.digest_before(state.steps) if isinstance(t.supply, Loaded) else None,
            "state": {name: getattr(state, name) for name in state.__dataclass_fields__},
        }
        save_tree(self.path, tree)

    def save_after(self, error: BaseException) -> None:
        """Write the file after an error; where that fails, the error says so and the file stays as it was."""
        try:
            self.save()
        except OSError as failed:
            if failed is not error and hasattr(error, "add_note"):
                error.add_note(f"the checkpoint was not written: {failed}")

    def load(self, steps: int, patience: int | None) -> None:
        """Go back to the saved state, if there is one.

        Raises:
            ValueError: If the file is damaged or belongs to another run, or to a longer one.
        """
        if not self.path.exists():
            return
        tree = load_tree(self.path, _KIND)
        with reading(self.path, _KIND):
            self._check(tree)
            before = self.trainer.state()
            try:
                self._take(tree)
                self._check_pair(tree["probe"])
                self._check_length(steps, patience)
            except BaseException:
                self.trainer.history = type(self.trainer.history)()
                self.trainer.restore(before)
                raise

    def _check(self, tree: Any) -> None:
        got = tree.get("fingerprint") if isinstance(tree, dict) else None
        if not isinstance(got, dict):
            self._refuse("has another content")
        if text := say_differences(got, self.fingerprint):
            self._refuse(f"belongs to another one, {text}")
        shapes = [t.shape for t in self.trainer.tensors()]
        for saved in (tree["state"]["tensors"], tree["state"]["best"]):
            if saved is not None and [t.shape for t in saved] != shapes:
                self._refuse("holds tensors of other shapes")
        state = tree["state"]["tensors"][len(self.trainer.parameters) :]
        in_file = dict(zip(tree["buffers"], map(tensor_digest, state), strict=True))
        for name, start in tree["buffers"].items():
            if self.buffers.get(name) not in (start, in_file[name]):
                self._refuse(f"belongs to another one, whose buffer {name} has other values")

    def _take(self, tree: dict[str, Any]) -> None:
        from inference.training.trainer import State

        t, history = self.trainer, self.trainer.history
        history.loss = tree["loss"].tolist()
        history.validation = [(int(step), loss) for step, loss in tree["validation"].tolist()]
        history.seconds, t.order_seed = float(tree["seconds"]), int(tree["order_seed"])
        if isinstance(t.supply, Loaded):
            t.supply.expected = tree["last_batch"]
        t.restore(State(**tree["state"]))

    def _check_pair(self, expected: list[float] | None) -> None:
        dtype = next((p.dtype for p in self.trainer.parameters), torch.float32)
        if not same_numbers(expected, self.probe(), dtype):
            self._refuse("belongs to another one, whose log-densities at a fixed draw are others")

    def _check_length(self, steps: int, patience: int | None) -> None:
        history = self.trainer.history
        stop = self.trainer.steps_with(patience)
        if history.steps > steps:
            self._refuse(f"holds {history.steps} steps already, more than steps={steps}")
        if stop is not None and stop < history.steps:
            self._refuse(f"holds {history.steps} steps, while patience={patience} ends the run after {stop}")

    def _refuse(self, text: str) -> NoReturn:
        raise ValueError(f"expected {_KIND}, but {self.path} {text}: remove it or give another name")
