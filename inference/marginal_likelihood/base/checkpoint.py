"""The file of an estimate in blocks: the finished ones, and by what the estimate is recognised."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inference.core.files import Unreadable, reading
from inference.core.memory import at_once
from inference.core.storage import load_tree, save_tree
from inference.marginal_likelihood.base.method import Problem
from inference.marginal_likelihood.base.result import Evidence, Joined, concatenate
from inference.pair.fingerprint import described, probe, same_numbers, say_differences, unchanged

_KIND = "a checkpoint of this estimate"

# A block is written at once unless the last writing took more than this share of the time since.
_SHARE = 0.05


class Blocks:
    """The finished blocks of an estimate, kept in a file where one is given.

    An estimate is recognised by everything that changes its result: the pair's classes, attributes, constants,
    parameters and modes, its log-densities at a fixed draw, the method and its settings, data, level, seed and blocks.

    Args:
        path: The file; None keeps the blocks in memory alone.
        problem: The call and the level.
        first: The problem of its first block, which is run.
        settings: Further settings that change the result.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, problem: Problem, first: Problem, settings: dict[str, Any]
    ) -> None:
        several = first.call.num_rows != problem.call.num_rows
        self.path, self.done = None if path is None else Path(path), Joined(problem.call.num_rows if several else None)
        self._written, self._ended, self._seconds = 0, 0.0, 0.0
        if self.path is None:
            return
        self.dtype = getattr(problem.call.args[0], "dtype", torch.float32)
        before = _programs(problem)
        self.probe = probe(first.probe)
        self.fingerprint = unchanged(before, _programs(problem)) | _settings(problem) | described(settings)

    def load(self) -> list[Evidence]:
        """The blocks that the file holds, none where there is no file.

        Raises:
            ValueError: If the file is damaged or belongs to another estimate.
        """
        return self._load(self.path) if self.path is not None and self.path.exists() else []

    def _load(self, path: Path) -> list[Evidence]:
        tree = load_tree(path, _KIND)
        with reading(path, _KIND):
            got = tree.get("fingerprint") if isinstance(tree, dict) else None
            text = say_differences(got, self.fingerprint) if isinstance(got, dict) else "it has another content"
            if not text and not same_numbers(tree["probe"], self.probe, self.dtype):
                text = "its log-densities at a fixed draw are others"
            if text:
                raise ValueError(
                    f"expected {_KIND}, but {path} belongs to another one, {text}: remove it or give another name"
                )
            done = [Evidence(**part) for part in tree["parts"]]
            whole = concatenate(done)
            if {t.shape for t in (whole.value, whole.lower, whole.upper, whole.standard_error)} != {whole.value.shape}:
                raise Unreadable("holds numbers of other shapes")
        self._written = len(done)
        return done

    def add(self, part: Evidence) -> None:
        """Keep a block, and write all to the file unless writing takes longer than the blocks do."""
        self.done.add(part)
        if self._seconds <= _SHARE * (time.perf_counter() - self._ended):
            self.write()

    def write(self) -> None:
        """Write what is not written yet.

        Raises:
            OSError: If the file cannot be written.
        """
        if self.path is None or self._written == len(self.done):
            return
        start = time.perf_counter()
        parts = [dict(vars(part)) for part in self.done.parts()]
        save_tree(self.path, {"fingerprint": self.fingerprint, "probe": self.probe, "parts": parts})
        self._written, self._ended = len(self.done), time.perf_counter()
        self._seconds = self._ended - start


def _programs(problem: Problem) -> dict[str, Any]:
    halves = {"model": problem.call.model, "guide": problem.call.guide}
    modules = {name: [m.training for m in h.modules()] for name, h in halves.items() if isinstance(h, nn.Module)}
    return {name: described(half) for name, half in halves.items()} | {"train_mode": modules}


def _settings(problem: Problem) -> dict[str, Any]:
    call = problem.call
    return {
        "level": problem.level,
        "plate": call.plate,
        "broadcast": call.broadcast,
        "whole": call.whole,
        "missing": call.missing,
        "rows": None if call.stated_rows is None else sorted(map(str, call.stated_rows)),
        "data": described(list(call.args)),
        "keywords": described(dict(call.kwargs)),
        "memory_limit": at_once(2**20),
    }
