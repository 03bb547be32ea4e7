"""Chunks of log importance weights: by the pair's own Python, and where many are to come by replays of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from inference.core.fingerprint import described, iterators_in, say_differences
from inference.core.graphs import Replay, flat_graph, scripted
from inference.core.rows import RowBlocks
from inference.core.run import modules_of
from inference.core.seeding import random_states, set_random_states

# Chunks below which recording one does not pay.
_WORTH = 32

# A replay is compared with the pair itself at the first chunk, and when so many times as many have been replayed.
_GROWTH = 4


class Chunks:
    """Draws the log weights of one chunk of samples after the other.

    Of a pair in one block of rows the second of many chunks is recorded as a graph of tensor operations, and the
    further ones are replayed, to the same bits. A graph knows tensors alone: the pair's Python must not change from
    chunk to chunk, which is looked at before and after, and by comparison on the same noise in between.

    Args:
        blocks: The call, in blocks of rows.
        values: Values to keep, see :meth:`inference.core.call.Call.run`.
        samples: Of a chunk.
        number: Of chunks of so many samples.
    """

    def __init__(self, blocks: RowBlocks, values: Mapping[str, Tensor], samples: int, number: int) -> None:
        self._blocks, self._values, self._samples, self._number = blocks, values, samples, number
        self._is_worth = number >= _WORTH and len(blocks) == 1
        self._drawn, self._next_check = 0, 1
        self._python: Any = None
        self._replay: Replay | None = None
        self._assumes = False
        self._inputs: list[Tensor] = []

    def draw(self, samples: int) -> Tensor:
        """The log weights of the next chunk, (samples, N).

        Raises:
            RuntimeError: If the pair's Python changed unseen after its graph had been recorded.
        """
        self._drawn += 1
        if not self._is_worth or samples != self._samples:
            return self._eager(samples)
        if self._replay is not None:
            return self._replayed(samples, self._replay)
        return self._first(samples) if self._drawn == 1 else self._recorded(samples)

    def _eager(self, samples: int) -> Tensor:
        draws = (block.run(samples, values=self._values, enumerate_guide=True) for block in self._blocks)
        return torch.cat([draw.log_weights for draw in draws], -1)

    def _first(self, samples: int) -> Tensor:
        """By the pair itself, whose Python is to be what it was."""
        before, log_weights = self._description(), self._eager(samples)
        self._python = self._description()
        if before is None or before != self._python or iterators_in(before):
            self._is_worth = False
        return log_weights

    def _recorded(self, samples: int) -> Tensor:
        """By the pair itself while it is recorded; the replay must give the same bits and draw the same numbers."""
        before = random_states()
        try:
            self._inputs = self._tensors()
            kept = list[Tensor]()

            def one() -> list[Tensor]:
                kept.append(self._eager(samples))
                return kept

            flat = flat_graph(one, self._inputs)
            (log_weights,), after, replay = kept, random_states(), scripted(flat)
            self._is_worth = _same(self._at(before, lambda: replay(self._inputs)[0]), log_weights)
            self._is_worth &= all(map(torch.equal, random_states(), after))
        except Exception:  # a user's program may fail to be recorded in any way, and runs as it is
            self._is_worth = False
            return self._at(before, lambda: self._eager(samples))
        self._replay, self._assumes = (replay, flat.assumes) if self._is_worth else (None, False)
        set_random_states(after)
        return log_weights

    def _replayed(self, samples: int, replay: Replay) -> Tensor:
        before = random_states()
        log_weights, *others = replay(self._inputs)
        if self._assumes and not bool(others[0]):  # a branch, or a check of arguments, that another way follows now
            self._is_worth = False
            return self._at(before, lambda: self._eager(samples))
        if self._drawn >= self._next_check or self._drawn == self._number:
            self._next_check, after = _GROWTH * self._drawn, random_states()
            own = self._at(before, lambda: self._eager(samples))
            changed = "" if _same(log_weights, own) else "its log weights are others on the same noise"
            changed = changed or say_differences(self._python, self._description())
            set_random_states(after)
            if changed:
                raise RuntimeError(
                    f"expected a pair whose Python does not change between chunks of samples, got one where {changed}: "
                    "give it one chunk, or fewer samples"
                )
        return log_weights

    @staticmethod
    def _at(states: list[Tensor], draw: Callable[[], Tensor]) -> Tensor:
        """What is drawn from given states of the random generators."""
        set_random_states(states)
        return draw()

    def _tensors(self) -> list[Tensor]:
        return [t for m in modules_of(*self._blocks[0].programs) for t in (*m.parameters(), *m.buffers())]

    def _description(self) -> Any:
        """What must stay as it is; None where the pair cannot be described."""
        try:
            return described(list(self._blocks[0].programs), values=False)
        except Exception:  # of objects of a user's own
            return None


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())
