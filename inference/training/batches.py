"""Mini-batches of the arguments of a pair: which of them are rows of data, and some of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro.infer
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from inference.core.call import Call
from inference.core.rows import with_known_rows
from inference.objectives.base import Objective


@contextmanager
def laid_out(objective: pyro.infer.ELBO, plate: str | None, whole: bool) -> Iterator[None]:
    """Let an objective of ours know, while the block runs, how the data are laid out; stock ones sum everything."""
    if not isinstance(objective, Objective):
        yield
        return
    if plate is not None and objective.plate not in (None, plate):
        raise ValueError(f"expected one plate over the data, got plate={plate!r} and the objective's {objective.plate!r}")
    before = objective.plate, objective.whole
    objective.plate, objective.whole = plate or objective.plate, whole
    try:
        yield
    finally:
        objective.plate, objective.whole = before


def num_rows(call: Call) -> int:
    """Data points of a call: the rows of its first tensor, or one."""
    return 1 if call.whole else call.num_rows or 1


def rows_of(call: Call) -> frozenset[int | str]:
    """The arguments that are rows of data, see :func:`inference.core.rows.with_known_rows`.

    Where that cannot be checked, as in batch-dependent training, all with as many rows as the first are.
    """
    with torch.no_grad():
        try:
            known = with_known_rows(call, call.probe()).row_arguments
        except (ValueError, RuntimeError):
            known = None
    return frozenset(call.candidates()) if known is None else known


def rows(batch: tuple[Any, ...], index: Any, positions: frozenset[int | str]) -> tuple[Any, ...]:
    """The arguments of chosen data points."""
    call = replace(Call(_no_program, None, batch), row_arguments=positions)
    return call.rows(index).args


def _no_program() -> None:
    """The program of a call that is not run."""
