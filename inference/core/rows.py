"""Which arguments of a call are rows of data: found by comparing some rows with the whole run, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.core.draw import Draw
from inference.core.simulated import replay

if TYPE_CHECKING:
    from inference.core.call import Call


class RowsNotFollowed(ValueError):
    """No program can be run on some of its data points alone; what each run says of them all may be right."""


# Rows that are tried, and choices of arguments.
_ROWS, _CHOICES = 5, 32


@torch.no_grad()
def with_known_rows(call: Call, whole: Draw) -> Call:
    """The call with the names of the arguments that are rows of data.

    Of the arguments with one row per data point as many are taken as give the same density of some rows by themselves
    as the whole run has there. Twice the cost of a run where that is so at once.

    Args:
        call: What was run, on all its data.
        whole: One sample of it.

    Raises:
        RowsNotFollowed: If no choice of arguments can be run on some rows.
        ValueError: If one can, and none gives the same density.
    """
    if call.row_arguments is not None:
        return call
    number = whole.layout.num_data
    index, error, differs = _some_rows(number), None, False
    for names in islice(_choices(_candidates(call, number)), _CHOICES):
        chosen = replace(call, row_arguments=frozenset(names))
        try:
            off = _difference(chosen.rows(index, number), whole, index)
        except (RuntimeError, ValueError, IndexError, TypeError) as failure:
            error = error or failure
            continue
        if off is None:
            return chosen
        differs = True
        error = error or ValueError(f"the {off} at a row differs")
    raise (ValueError if differs else RowsNotFollowed)(
        f"expected the density of some of the {number} rows, run by themselves, to be what it is in the whole run, got "
        f"another ({error}): is an argument with {number} rows shared by all data points, has a plate a constant size, "
        "or does a program hold a tensor with one row per data point outside its arguments?"
    ) from error


def _candidates(call: Call, number: int) -> list[int | str]:
    try:
        return call.candidates(number)
    except ValueError as error:
        raise RowsNotFollowed(*error.args) from None


def _choices(names: list[int | str]) -> Iterator[tuple[int | str, ...]]:
    """Subsets of the arguments that may be data, the largest first."""
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
    return not whole.model_sites[name].is_observed


def _rows_of(whole: Draw, name: str, index: Tensor) -> Tensor:
    site = whole.model_sites[name]
    value, dim = site.value, whole.layout.dim - len(site.fn.event_shape)
    return value.index_select(dim, index.to(value.device)) if value.shape[dim] != 1 else value
