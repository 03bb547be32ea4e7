"""Mini-batches of the arguments of a pair: which of them are rows of data, and some of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from inference.core.call import Call, num_rows, rows_of
from inference.core.rows import with_known_rows
from inference.objectives.base import Objective


@contextmanager
def laid_out(objective: pyro.infer.ELBO, plate: str | None, whole: bool) -> Iterator[None]:
    """Let an objective of ours know, while the block runs, how the data are laid out; stock ones sum everything."""
    if not isinstance(objective, Objective):
        yield
        return
    if plate is not None and objective.plate not in (None, plate):
        raise ValueError(f"expected one plate over the data, got {plate!r} and the objective's {objective.plate!r}")
    before = objective.plate, objective.whole
    objective.plate, objective.whole = plate or objective.plate, whole
    try:
        yield
    finally:
        objective.plate, objective.whole = before


@dataclass(frozen=True)
class Batches:
    """Which positional arguments of a pair are rows of data.

    Attributes:
        rows: Their positions.
        whole: Whether all data are one data point, of which there are no rows.
    """

    rows: frozenset[int | str]
    whole: bool = False

    @classmethod
    def of(cls, call: Call, *, partly: bool) -> Batches:
        """The rows of a call, checked where only some are taken, see :func:`inference.core.rows.with_known_rows`.

        Where that cannot be checked, as in batch-dependent training, all with as many rows as the first are.
        """
        if call.whole:
            return cls(frozenset(), whole=True)
        rows = None
        if partly and len(call.args) > 1:
            with torch.no_grad(), suppress(ValueError, RuntimeError):
                rows = with_known_rows(call, call.probe()).row_arguments
        return cls(frozenset(call.candidates()) if rows is None else rows)

    def count(self, batch: tuple[Any, ...]) -> int:
        """Data points of a batch."""
        return 1 if self.whole else num_rows([part for i, part in enumerate(batch) if i in self.rows])

    def take(self, batch: tuple[Any, ...], index: Tensor) -> tuple[Any, ...]:
        """The arguments of chosen data points."""
        number = self.count(batch)
        return tuple(rows_of(part, index, number) if i in self.rows else part for i, part in enumerate(batch))

    def split(self, batch: tuple[Any, ...], size: int) -> Iterator[tuple[Any, ...]]:
        """The arguments in parts of so many data points."""
        if self.whole:
            yield batch
            return
        for index in torch.arange(self.count(batch)).split(size):
            yield self.take(batch, index)
