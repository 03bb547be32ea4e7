"""Chunks of samples as replays of a recorded one: the same random numbers, without the pair's Python.

A replay has the bits of the pair's Python, or agrees with it within rounding where it is compiled.

What a graph assumes of a pair is looked at, and the graph is compared with the pair itself on the same noise, before
any of its chunks is handed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.utils._python_dispatch import _get_current_dispatch_mode

from inference.core.display import first_line
from inference.core.seeding import random_states, set_random_states
from inference.numerics.graphs import FlatGraph, Level, Replay, compiled, flat_graph, folded, same_bits, scripted
from inference.pair.fingerprint import iterators_in, python_state
from inference.pair.run import Program, modules_of

Run = Callable[[], Tensor]

_logger = logging.getLogger(__name__)

# To record a chunk and to compare replays with it takes about as long as so many chunks save.
_WORTH_RECORDING = 24

# Replays before the first comparison, then so many times more each time, up to a limit; and what must be held at once,
# below which a replay saves less than the comparisons cost.
_GROWTH, _LEAST, _MOST = 8, 8, 128

# Compiled replays agree to such a share of their digits in the mean square.
_DIGITS = 0.75


class _Graph(NamedTuple):
    """A recorded chunk, with what replays it, and what tells whether it gives the same."""

    flat: FlatGraph
    replay: Replay
    log_weights: Tensor
    same: Callable[[Tensor, Tensor], bool]


def chunks_in_groups(
    run: Run, programs: tuple[Program, ...], number: int, held: int, level: Level = "auto"
) -> Iterator[list[Tensor]]:
    """So many chunks, in groups that are drawn at once: of one chunk, but for replays.

    Args:
        run: Draws a chunk and returns its log weights, without gradient.
        programs: What it runs.
        number: How many chunks.
        held: How many may be held at once.
        level: How they run, see :func:`inference.weights.importance_weights.iter_log_weights`.
    """
    graph = None
    if _is_to_be_recorded(level, number, held):
        before = _state(programs)
        yield [run()]
        if before is None or _state(programs) != before:  # its Python counts, or keeps something
            _give_up(level, "the pair's Python changes, or cannot be described")
            number -= 1
        else:
            log_weights, graph = _recorded(run, level)
            yield [log_weights]
            number -= 2
    size = min(_GROWTH, held)
    while number:
        group = [] if graph is None else _replayed(graph, run, min(size, number), level)
        if not group:
            graph, group = None, [run()]
        yield group
        number, size = number - len(group), min(_GROWTH * size, held, _MOST)


def _is_to_be_recorded(level: Level, number: int, held: int) -> bool:
    if level == "off" or _is_watched():
        return False
    if level == "auto":
        return number >= _WORTH_RECORDING and held >= _LEAST
    return number > 2


def _give_up(level: Level, reason: str) -> None:
    _logger.log(logging.INFO if level == "auto" else logging.WARNING, "chunks run as the pair's own Python: %s", reason)


def _is_watched() -> bool:
    """Whether a transform or a mode of torch sees each operation, which is then to be the pair's own."""
    return maybe_current_level() is not None or _get_current_dispatch_mode() is not None


def _state(programs: tuple[Program, ...]) -> dict[str, Any] | None:
    """What must stay as it is for a graph to hold; None where that cannot be seen."""
    modules = modules_of(*programs)
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    try:
        state = python_state(dict(zip(("model", "guide"), programs, strict=False)), modules)
        state["tensors"] = [(id(tensor), tensor._version) for tensor in tensors]
    except Exception:  # of objects of a user's own
        return None
    return None if iterators_in(state) else state


def _recorded(run: Run, level: Level) -> tuple[Tensor, _Graph | None]:
    """A chunk, and a graph of it where it has one."""
    states, chunks = random_states(), list[Tensor]()

    def recorded() -> list[Tensor]:
        chunks[:] = [run()]
        return chunks

    try:
        flat = folded(flat_graph(recorded, []))
        make, same = (compiled, _is_close) if level == "compile" else (scripted, same_bits)
        return chunks[0], _Graph(flat, make(flat), chunks[0], same)
    except Exception as error:  # a user's program may fail to be recorded in any way
        _give_up(level, first_line(error))
        set_random_states(states)
        return run(), None


def _replayed(graph: _Graph, run: Run, size: int, level: Level) -> list[Tensor]:
    """Chunks by replays; none, from the same random state, where the last one is not what the pair gives."""
    states = before = random_states()
    # In memory that is made once: see :func:`inference.core.memory.joined`.
    group, holds = list(graph.log_weights.new_empty(size, *graph.log_weights.shape)), list[Tensor]()
    reason = "a replay is another on the same noise"
    try:
        for i, chunk in enumerate(group):
            before = random_states() if i == size - 1 else before
            log_weights, *others = graph.replay([])
            chunk.copy_(log_weights)
            holds += others[: graph.flat.assumes]
        after = random_states()
        set_random_states(before)
        same = graph.same(group[-1], run()) and all(map(torch.equal, random_states(), after))
    except Exception as error:  # the pair itself may refuse its values, and a compiler fail
        same, reason = False, first_line(error)
    if same and all(map(bool, holds)):
        return group
    _give_up(level, reason)
    set_random_states(states)
    return []


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether log weights agree but for rounding; what is not finite is so in both."""
    finite = other.isfinite()
    if not torch.equal(one.isfinite(), finite):
        return False
    allowed = torch.finfo(other.dtype).eps ** _DIGITS * float(other[finite].norm())
    return float((one - other)[finite].norm()) <= allowed
