"""Measurements in blocks of rows, and their files: the finished blocks, and by what a measurement is recognised."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from inference.core.files import AnyPath, check_writable, locked, reading
from inference.core.memory import at_once
from inference.core.ranks import ranks
from inference.core.storage import load_tree, save_tree
from inference.pair.call import Call
from inference.pair.draw import Draw
from inference.pair.fingerprint import described, probe, same_numbers, say_differences, unchanged
from inference.pair.rows import RowBlocks

_logger = logging.getLogger(__name__)

_KIND = "a checkpoint of this estimate"

# A block is noted at once unless the last note took more than this share of the time since.
_SHARE = 0.05

P = TypeVar("P", contravariant=True)
W = TypeVar("W", covariant=True)


class Done(Protocol[P, W]):
    """The finished blocks of a measurement."""

    @property
    def blocks(self) -> int:
        """Blocks so far."""

    def add(self, part: P, /) -> None:
        """Take in the next block."""

    def whole(self) -> W:
        """What all blocks so far say."""


class DoneInFile(Done[P, W], Protocol[P, W]):
    """The finished blocks of a measurement, in a file."""

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` needs to know, of a size that does not grow with the rows."""

    def synchronise(self) -> None:
        """Wait until all rows so far are on the disk."""

    def resume(self, state: Mapping[str, Any], size: int | None = None) -> None:
        """Go on from a state, see :meth:`inference.core.columns.FileColumns.resume`."""


@dataclass(frozen=True)
class Recognised:
    """By what a measurement is recognised: everything that changes its result.

    That is the pairs' classes, attributes, constants, parameters and modes, their log-densities at a fixed draw, method
    and settings, data, level, seed and blocks.

    Attributes:
        call: The data and how they are run.
        pairs: The calls whose programs count.
        probes: Run each of the pairs once.
        settings: All further settings that change the result.
    """

    call: Call
    pairs: Sequence[Call]
    probes: Sequence[Callable[[], Draw]]
    settings: Mapping[str, Any]

    def numbers(self) -> tuple[dict[str, Any], list[Any]]:
        """What is compared by itself, and the log-densities, which are so up to rounding."""
        before = self._programs()
        found = [probe(run) for run in self.probes]
        return unchanged(before, self._programs()) | _settings(self.call) | described(dict(self.settings)), found

    def _programs(self) -> dict[str, Any]:
        return {str(i): _programs(pair) for i, pair in enumerate(self.pairs)}


def check_checkpoints(seed: int | None, *checkpoints: AnyPath | None) -> None:
    """Check that a measurement with checkpoints has a seed, and that they can be written; before the work.

    Args:
        seed: The seed.
        checkpoints: Those given to :func:`in_blocks`; None are none.

    Raises:
        ValueError: If it has no seed.
        OSError: If one cannot be written, on all ranks.
    """
    places = [os.fspath(path) for path in checkpoints if path is not None]
    if places and seed is None:
        raise ValueError("expected a seed for an estimate with a checkpoint, got none")

    def check() -> None:
        for path in places:
            check_writable(path)
            check_writable(f"{path}.rows")

    if places:
        ranks().of_first(check)


def in_blocks(
    done: Done[P, W],
    blocks: RowBlocks,
    compute: Callable[[int], P],
    *,
    seed: int | None,
    recognised: Callable[[], Recognised],
    checkpoint: AnyPath | None = None,
    progress: bool = True,
    name: str = "evidence",
) -> W:
    """What is computed block by block, shared among the ranks: all of it on each, or in the file that all of them read.

    Args:
        done: Takes in the blocks; in a file where there is a checkpoint.
        blocks: The blocks.
        compute: Does the block of a number.
        seed: See :meth:`inference.pair.rows.RowBlocks.in_turn`.
        recognised: By what the measurement is recognised, where there is a checkpoint.
        checkpoint: File that says which blocks are finished; their rows are in files beside it.
        progress: Show a progress bar.
        name: What to call the measurement there.

    Raises:
        ValueError: If the checkpoint is damaged, belongs to another measurement, or is not seen by all ranks.
        OSError: If it cannot be written.
    """
    group = ranks()
    hidden = not (progress and group.first) or len(blocks) == 1
    with ExitStack() as stack:
        file: Blocks[P, W] | None = None
        if checkpoint is not None and group.first:
            stack.enter_context(locked(checkpoint))
            file = Blocks(checkpoint, cast("DoneInFile[P, W]", done), blocks)
            stack.callback(file.end)
        begun = 0 if checkpoint is None else group.of_first(lambda: file.load(recognised()) if file else 0)
        if begun:
            _logger.info("%s goes on from block %d of %d in %s", name, begun, len(blocks), checkpoint)
        with tqdm(total=len(blocks), initial=begun, disable=hidden, desc=name, unit="block") as bar:
            for part in blocks.in_turn(compute, seed, begun):
                if file is not None:
                    file.add(part)
                elif checkpoint is None:
                    done.add(part)
                bar.update()
        if checkpoint is not None and group.size > 1:
            kept = cast("DoneInFile[P, W]", done)
            state = group.of_first(kept.state)
            if not group.first:
                _read(kept, state, checkpoint)
    return done.whole()


def _read(done: DoneInFile[Any, Any], state: Mapping[str, Any], checkpoint: AnyPath) -> None:
    """Let another rank see the first one's file."""
    done.resume(state)
    try:
        done.whole()
    except OSError as error:
        raise ValueError(
            f"expected the files beside {checkpoint}, which the first rank has written, to be seen by rank "
            f"{ranks().rank}, got none: give a folder that all ranks share"
        ) from error


class Blocks(Generic[P, W]):
    """The finished blocks of a measurement, kept in files.

    Their rows are written as they come, into files beside the given one, of the same name and ``.rows``; the given one
    is replaced at once and says how many there are, with their digests. Its cost does not grow with the rows.

    Args:
        path: The file.
        done: Takes in the blocks, in a file.
        blocks: The blocks.
    """

    def __init__(self, path: AnyPath, done: DoneInFile[P, W], blocks: RowBlocks) -> None:
        self.done, self._path, self._blocks = done, Path(path), blocks
        self._state: dict[str, Any] | None = None  # after the last block that is whole
        self._written, self._ended, self._seconds = 0, 0.0, 0.0
        self._fingerprint, self._probe = dict[str, Any](), list[Any]()

    def load(self, recognised: Recognised) -> int:
        """Take in the blocks that the file holds, if there is one, and say how many.

        Raises:
            ValueError: If the file is damaged or belongs to another measurement.
        """
        self._fingerprint, self._probe = recognised.numbers()
        if not self._path.exists():
            return 0
        tree = load_tree(self._path, _KIND)
        dtype = getattr(recognised.call.args[0], "dtype", torch.float32)
        with reading(self._path, _KIND):
            self._check_same(tree, dtype)
            self.done.resume(tree["done"], self._blocks.size)
        self._state, self._written = tree["done"], self.done.blocks
        return self.done.blocks

    def _check_same(self, tree: Any, dtype: torch.dtype) -> None:
        got = tree.get("fingerprint") if isinstance(tree, dict) else None
        text = say_differences(got, self._fingerprint) if isinstance(got, dict) else "it has another content"
        pairs = [] if text else zip(tree["probe"], self._probe, strict=True)
        if not all(same_numbers(old, new, dtype) for old, new in pairs):
            text = "its log-densities at a fixed draw are others"
        if text:
            raise ValueError(
                f"expected {_KIND}, but {self._path} belongs to another one, {text}: remove it or give another name"
            )

    def add(self, part: P) -> None:
        """Keep a block, and note it in the file unless that takes longer than the blocks do."""
        self.done.add(part)
        self._state = self.done.state()
        if self._seconds <= _SHARE * (time.perf_counter() - self._ended):
            self.write()

    def write(self) -> None:
        """Note what is not noted yet.

        Raises:
            OSError: If the file cannot be written.
        """
        if self._state is None or self._written == self.done.blocks:
            return
        start = time.perf_counter()
        self.done.synchronise()
        save_tree(self._path, {"fingerprint": self._fingerprint, "probe": self._probe, "done": self._state})
        self._written, self._ended = self.done.blocks, time.perf_counter()
        self._seconds = self._ended - start

    def end(self) -> None:
        """Note what is not noted yet, also where an interrupt comes while that is done.

        Raises:
            OSError: If the file cannot be written.
        """
        try:
            self.write()
        except KeyboardInterrupt:
            self.write()
            raise


def _programs(call: Call) -> dict[str, Any]:
    halves = {"model": call.model, "guide": call.guide}
    modules = {name: [m.training for m in h.modules()] for name, h in halves.items() if isinstance(h, nn.Module)}
    return {name: described(half) for name, half in halves.items()} | {"train_mode": modules}


def _settings(call: Call) -> dict[str, Any]:
    return {
        "plate": call.plate,
        "broadcast": call.broadcast,
        "whole": call.whole,
        "missing": call.missing,
        "rows": None if call.stated_rows is None else sorted(map(str, call.stated_rows)),
        "data": described(list(call.args)),
        "keywords": described(dict(call.kwargs)),
        "memory_limit": at_once(2**20),
    }
