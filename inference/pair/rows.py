"""Which arguments of a call are rows of data: found by comparing some rows with the whole run, not guessed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from inference.core.checks import check_arguments, check_count
from inference.core.memory import at_once
from inference.core.ranks import ranks
from inference.core.seeding import block_seed, seeded
from inference.core.sources import Column
from inference.pair.draw import Draw
from inference.pair.improper import is_delta
from inference.pair.simulated import replay

if TYPE_CHECKING:
    from inference.pair.call import Call

T = TypeVar("T")


class RowsNotFollowed(ValueError):
    """No program can be run on some of its data points alone; what each run says of them all may be right."""


# Rows that are tried, and choices of arguments.
_ROWS, _CHOICES = 5, 32

# Elements of the draws of a block of rows by default, as in the largest chunk of importance weights.
_ELEMENTS = 2**23

# Rows beyond which the first of them stand for the whole run.
_MANY = 4096


def as_stated(rows: Any) -> frozenset[int | str] | None:
    """Positions and names of the arguments that a caller says are rows of data; None where nothing is said.

    Raises:
        TypeError: If they are not a list.
    """
    if rows is None:
        return None
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise TypeError(f"expected rows as a list of positions and names of arguments, such as [0, 'y'], got {rows!r}")
    return frozenset(rows)


@torch.no_grad()
def with_known_rows(call: Call, whole: Draw | None = None, *, probe: Callable[[Call], Draw] | None = None) -> Call:
    """The call with the names of the arguments that are rows of data.

    Of the arguments with one row per data point as many are taken as give the same density of some rows by themselves
    as the whole run has there; where the caller states which, those or none. Twice the cost of a run where that is so
    at once.

    Args:
        call: What is run, on all its data.
        whole: One sample of it; None runs it here, and of many rows the first alone.
        probe: Runs a call once for that; :meth:`inference.pair.call.Call.probe` if None.

    Raises:
        RowsNotFollowed: If no choice of arguments can be run on some rows.
        ValueError: If one can, and none gives the same density, or a stated argument has not one row per data point.
    """
    if call.row_arguments is not None:
        return call
    run = (lambda part: part.probe()) if probe is None else probe
    many = whole is None and call.num_rows is not None and call.num_rows > at_once(_MANY)
    if whole is None and not many:
        whole = run(call.settled())
    number = call.num_rows if whole is None else whole.layout.num_data
    assert number is not None
    error, differs = None, False
    for names in islice(_choices(call, number), _CHOICES):
        chosen = replace(call, row_arguments=frozenset(names))
        try:
            part = chosen.rows(slice(0, at_once(_MANY)), number) if many else chosen
            seen = run(part) if whole is None else whole
            index = _some_rows(seen.layout.num_data)
            off = _difference(part.rows(index, seen.layout.num_data), seen, index)
        except (RuntimeError, ValueError, IndexError, TypeError) as failure:
            error = error or failure
            continue
        if off is None:
            return chosen
        differs = True
        error = error or ValueError(f"the {off} at a row differs")
    said = "" if call.stated_rows is None else f" with rows={sorted(call.stated_rows, key=str)}"
    raise (ValueError if differs or call.stated_rows is not None else RowsNotFollowed)(
        f"expected the density of some of the {number} rows, run by themselves{said}, to be what it is in the whole "
        f"run, got another ({error}): is an argument with {number} rows shared by all data points, has a plate a "
        "constant size, or does a program hold a tensor with one row per data point outside its arguments?"
    ) from error


class RowBlocks(Sequence["Call"]):
    """A call in blocks of rows, each of which is made when it is asked for: the data are never copied as a whole.

    Args:
        call: The call, whose arguments that are rows are known where there is more than one block.
        size: Rows of a block; None takes all as one.
    """

    def __init__(self, call: Call, size: int | None) -> None:
        self.call = call
        rows = None if call.whole or size is None else call.num_rows
        self._starts = range(1) if rows is None or size is None else range(0, rows, size)
        self._reads = any(isinstance(leaf, Column) for leaf in tree_leaves((call.args, dict(call.kwargs))))

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def number(self) -> int | None:
        """Rows of all blocks; None where there is one block."""
        return self._starts.stop if len(self) > 1 else None

    @property
    def size(self) -> int:
        """Rows of a block at most."""
        return self._starts.step if len(self) > 1 else sys.maxsize

    def place(self, i: int) -> slice:
        """The rows of one block."""
        return slice(None) if len(self) == 1 else slice(self._starts[i], self._starts[i] + self._starts.step)

    def in_turn(self, compute: Callable[[int], T], seed: int | None, start: int = 0) -> Iterator[T]:
        """Results of the blocks in their order, shared among the ranks; each of several has a seed of its own.

        Args:
            compute: Does the block of a number.
            seed: Seed of all; None draws from the caller's state, on one rank.
            start: The first block that is to be done.
        """
        group = ranks()
        seed = group.agreed(seed)

        def compute_seeded(i: int) -> T:
            with seeded(seed if len(self) == 1 else block_seed(seed, i)):
                return compute(i)

        return group.in_turn(len(self), compute_seeded, start)

    @overload
    def __getitem__(self, place: int) -> Call: ...

    @overload
    def __getitem__(self, place: slice) -> list[Call]: ...

    def __getitem__(self, place: int | slice) -> Call | list[Call]:
        """The call of one block, with its data in float64 where they are to be, or of several."""
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        if not 0 <= place < len(self):
            raise IndexError(f"expected a block below {len(self)}, got {place}")
        if len(self) == 1:
            return self.call.settled()
        part = self.call.rows(self.place(place))
        if self._reads:
            check_arguments((), part.args, part.kwargs, missing=part.missing)
        return part


def blocks_of_draws(call: Call, block: int | None, num_samples: int) -> RowBlocks:
    """:func:`row_blocks` for so many draws of each row; None chooses by the size of a row of the first argument.

    Raises:
        TypeError: If the block is no number.
        ValueError: If it is not positive, or as :func:`row_blocks`.
    """
    if block is None:
        shape = next((leaf.shape[1:] for leaf in tree_leaves(call.args) if isinstance(leaf, Tensor | Column)), ())
        block = at_once(_ELEMENTS, num_samples * max(1, math.prod(shape)))
    check_count(block, "block")
    return row_blocks(call, block)


def row_blocks(call: Call, size: int) -> RowBlocks:
    """The call in blocks of so many rows; as one where it has no more, or subsamples, or rows cannot be run alone.

    Raises:
        ValueError: If the arguments that the caller has named are not rows of data.
    """
    if call.stated_rows is not None:  # checked where they are stated, used or not
        call = with_known_rows(call)
    if call.whole or call.num_rows is None or call.num_rows <= size:
        return RowBlocks(call, None)
    try:
        blocks = RowBlocks(with_known_rows(call), size)
        return blocks if blocks[0].probe().layout.plate_scale == 1 else RowBlocks(call, None)
    except ValueError:
        return RowBlocks(call, None)


def _candidates(call: Call, number: int) -> list[int | str]:
    try:
        return call.candidates(number)
    except ValueError as error:
        raise RowsNotFollowed(*error.args) from None


def _choices(call: Call, number: int) -> Iterator[tuple[int | str, ...]]:
    """Subsets of the arguments that may be data, the largest first; the stated one alone where there is one."""
    names = _candidates(call, number)
    if call.stated_rows is not None:
        if unfit := call.stated_rows - set(names):
            raise ValueError(
                f"expected rows to name arguments that are tensors with one row for each of {number} data points "
                f"({sorted(names, key=str)}), got {sorted(unfit, key=str)}"
            )
        yield tuple(call.stated_rows)
        return
    for size in range(len(names), 0, -1):
        yield from combinations(names, size)


def _some_rows(number: int) -> Tensor:
    """Rows from the last to the first, one of them twice, and not as many as there are."""
    index = torch.linspace(number - 1, 0, min(_ROWS, number)).round().long()
    index = torch.cat([index, index[:1]])
    return torch.cat([index, index[:1]]) if len(index) == number else index


def _difference(part: Call, whole: Draw, index: Tensor) -> str | None:
    """Which density of the chosen rows is not that of the whole run; None where all agree."""
    values = {name: _rows_of(whole, name, index) for name in whole.model_sites if _is_drawn(whole, name)}
    subsamples = {name: i for name, i in whole.subsamples.items() if name != whole.layout.plate}
    draw = replay(part, replace(whole.layout, num_data=len(index)), values | subsamples)
    draw = replace(draw, model_sites={name: draw.model_sites[name] for name in whole.model_sites})
    pairs = [("log joint density", draw.log_joint, whole.log_joint)]
    if part.guide is not None and whole.guide_sites:
        pairs.append(("guide's log-density", draw.log_guide, whole.log_guide))
    for name, ours, theirs in pairs:
        tolerance = 1e-6 if ours.dtype == theirs.dtype == torch.float64 else 1e-3
        if not torch.allclose(ours.double(), theirs[:, index].double(), tolerance, tolerance, equal_nan=True):
            return name
    return None


def _is_drawn(whole: Draw, name: str) -> bool:
    site = whole.model_sites[name]
    return not (site.is_observed or is_delta(site.fn))


def _rows_of(whole: Draw, name: str, index: Tensor) -> Tensor:
    site = whole.model_sites[name]
    value, dim = site.value, whole.layout.dim - len(site.fn.event_shape)
    return value.index_select(dim, index.to(value.device)) if value.shape[dim] != 1 else value
