"""Evidence of blocks of rows as that of all of them, in memory or in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inference.core.columns import Columns, FileColumns
from inference.core.files import Unreadable
from inference.marginal_likelihood.base.result import Evidence

# What an Evidence holds of each row; all else is of them all.
_NUMBERS = (
    "value",
    "lower",
    "upper",
    "standard_error",
    "pareto_k",
    "effective_sample_size",
    "raw_lower",
    "raw_upper",
    "spread",
)
_TEXTS = ("guarantee", "notes")


class Joined:
    """Evidence of blocks of rows as it comes, in columns that are made once, for all rows.

    Parts that are kept as they are lie between the large tensors that each block makes and frees, so that the process
    cannot use that memory again: it would grow by some megabytes a block.

    Args:
        number: Rows of all blocks; None takes those of the first one.

    Attributes:
        rows: Rows so far.
        blocks: Blocks so far.
    """

    def __init__(self, number: int | None) -> None:
        self._number = number
        self._columns: Columns | FileColumns
        self.rows, self.blocks = 0, 0
        self._numbers, self._noted = list[str](), False
        self._common, self._cost = dict[str, Any](), 0.0

    def add(self, part: Evidence) -> None:
        """Take in the evidence of the next block; of optional numbers those alone that all blocks have."""
        size = len(part.value)
        given = {name: getattr(part, name) for name in _NUMBERS if getattr(part, name) is not None}
        if self.blocks == 0:
            self._begin(part, size, list(given))
        self._numbers = [name for name in self._numbers if name in given]
        self._noted = self._noted or len(part.notes) > 0
        texts = {"guarantee": part.guarantee, "notes": part.notes or ("",) * size}
        self._columns.write(self.rows, {name: given[name] for name in self._numbers} | texts)
        self._common["num_samples"] = max(self._common["num_samples"], part.num_samples)
        self._common["seconds"] += part.seconds
        self._cost += size * part.evaluations
        self.rows, self.blocks = self.rows + size, self.blocks + 1

    def _begin(self, part: Evidence, size: int, numbers: list[str]) -> None:
        self._columns, self._numbers = self._made(size if self._number is None else self._number), numbers
        self._common = {"level": part.level, "method": part.method, "num_samples": 0, "seconds": 0.0}

    def _made(self, number: int) -> Columns | FileColumns:
        return Columns(number)

    def whole(self) -> Evidence:
        """The evidence of all rows so far."""
        found: dict[str, Any] = {name: self._columns.numbers(name, self.rows) for name in self._numbers}
        for name in _TEXTS if self._noted else _TEXTS[:1]:
            found[name] = self._columns.texts(name, self.rows)
        return Evidence(**found, **self._common, evaluations=self._cost / self.rows)


class JoinedInFile(Joined):
    """Evidence of blocks of rows as it comes, in a file: what is whole is a view of it and takes no memory.

    Args:
        number: Rows of all blocks; None takes those of the first one.
        path: The file.
    """

    def __init__(self, number: int | None, path: Path) -> None:
        super().__init__(number)
        self._path = path
        self._file: FileColumns

    def _made(self, number: int) -> FileColumns:
        self._file = FileColumns(self._path, number, numbers=_NUMBERS, texts=_TEXTS)
        return self._file

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` needs to know, of a size that does not grow with the rows."""
        names = ("rows", "blocks", "_numbers", "_noted", "_common", "_cost")
        return {name.lstrip("_"): getattr(self, name) for name in names} | {"columns": self._file.state()}

    def synchronise(self) -> None:
        """Wait until all rows so far are on the disk, where they are kept in a file.

        Raises:
            OSError: If the file cannot be written.
        """
        self._file.synchronise()

    def resume(self, state: Mapping[str, Any], size: int) -> None:
        """Go on from a state and the columns in the file.

        Args:
            state: From :meth:`state`.
            size: Rows of a block.

        Raises:
            Unreadable: If the two do not fit, or the state is not what it should be.
        """
        self.rows, self.blocks, self._noted = int(state["rows"]), int(state["blocks"]), bool(state["noted"])
        number = self.rows if self._number is None else self._number
        if not 0 < self.rows <= number or self.rows != min(number, self.blocks * size):
            raise Unreadable(f"is damaged: {self.blocks} blocks have {self.rows} rows of {number}")
        self._numbers, self._cost = [str(name) for name in state["numbers"]], float(state["cost"])
        kinds = {"level": float, "method": str, "num_samples": int, "seconds": float}
        self._common = {name: kind(state["common"][name]) for name, kind in kinds.items()}
        self._columns = self._made(number)
        self._file.resume(self.rows, state["columns"])
        self.whole()
