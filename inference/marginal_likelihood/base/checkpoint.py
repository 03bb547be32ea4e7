"""The files of an estimate in blocks: the rows of the finished ones, and by what the estimate is recognised."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inference.core.files import check_writable, reading
from inference.core.memory import at_once
from inference.core.storage import load_tree, save_tree
from inference.marginal_likelihood.base.joined import Joined, JoinedInFile
from inference.marginal_likelihood.base.method import Problem
from inference.marginal_likelihood.base.result import Evidence
from inference.pair.fingerprint import described, probe, same_numbers, say_differences, unchanged

_KIND = "a checkpoint of this estimate"

# A block is noted at once unless the last note took more than this share of the time since.
_SHARE = 0.05


class Blocks:
    """The finished blocks of an estimate, kept in files where one is given.

    Their rows are written as they come, into a file beside the given one, of the same name and ``.rows``; the given one
    is replaced at once and says how many there are, with their digests. Its cost does not grow with the rows.

    An estimate is recognised by everything that changes its result: the pair's classes, attributes, constants,
    parameters and modes, its log-densities at a fixed draw, the method and its settings, data, level, seed and blocks.

    Args:
        path: The file; None keeps the blocks in memory alone.
        problem: The call and the level.
        first: The problem of its first block, which is run.
        settings: Further settings that change the result.
        number: Rows of all blocks; None where there is one block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        problem: Problem,
        first: Problem,
        settings: dict[str, Any],
        number: int | None,
    ) -> None:
        self._file = None if path is None else JoinedInFile(number, Path(f"{os.fspath(path)}.rows"))
        self.done = Joined(number) if self._file is None else self._file
        if path is None:
            return
        self._path, self._size = Path(path), settings["block"]
        check_writable(f"{os.fspath(path)}.rows")
        self._state: dict[str, Any] | None = None  # after the last block that is whole
        self._written, self._ended, self._seconds = 0, 0.0, 0.0
        self._dtype = getattr(problem.call.args[0], "dtype", torch.float32)
        before = _programs(problem)
        self._probe = probe(first.probe)
        self._fingerprint = unchanged(before, _programs(problem)) | _settings(problem) | described(settings)

    def load(self) -> tuple[int, Evidence | None]:
        """Take in the blocks that the file holds, if there is one: how many, and what they say.

        Raises:
            ValueError: If the file is damaged or belongs to another estimate.
        """
        if self._file is None or not self._path.exists():
            return 0, None
        tree = load_tree(self._path, _KIND)
        with reading(self._path, _KIND):
            self._check_same(tree)
            self._file.resume(tree["done"], self._size)
        self._state, self._written = tree["done"], self._file.blocks
        return self._file.blocks, self._file.whole()

    def _check_same(self, tree: Any) -> None:
        got = tree.get("fingerprint") if isinstance(tree, dict) else None
        text = say_differences(got, self._fingerprint) if isinstance(got, dict) else "it has another content"
        if not text and not same_numbers(tree["probe"], self._probe, self._dtype):
            text = "its log-densities at a fixed draw are others"
        if text:
            raise ValueError(
                f"expected {_KIND}, but {self._path} belongs to another one, {text}: remove it or give another name"
            )

    def add(self, part: Evidence) -> None:
        """Keep a block, and note it in the file unless that takes longer than the blocks do."""
        self.done.add(part)
        if self._file is None:
            return
        self._state = self._file.state()
        if self._seconds <= _SHARE * (time.perf_counter() - self._ended):
            self.write()

    def write(self) -> None:
        """Note what is not noted yet.

        Raises:
            OSError: If the file cannot be written.
        """
        if self._file is None or self._state is None or self._written == self._state["blocks"]:
            return
        start = time.perf_counter()
        self._file.synchronise()
        save_tree(self._path, {"fingerprint": self._fingerprint, "probe": self._probe, "done": self._state})
        self._written, self._ended = self._state["blocks"], time.perf_counter()
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
