"""Evidence of blocks of rows as that of all of them, in memory or in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inference.core.columns import FileColumns, columns_of
from inference.core.files import AnyPath
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


class Joined:
    """Evidence of blocks of rows as it comes, in columns of all rows; what is whole is a view of their file, if any.

    Args:
        number: Rows of all blocks; None takes those of the first one.
        path: The file; None keeps all in memory.
    """

    def __init__(self, number: int | None, path: AnyPath | None = None) -> None:
        self._columns, self._noted = columns_of(number, path), False
        self._common, self._cost = dict[str, Any](), 0.0

    @property
    def blocks(self) -> int:
        """Blocks so far."""
        return self._columns.blocks

    def add(self, part: Evidence) -> None:
        """Take in the evidence of the next block; of optional numbers those alone that all blocks have."""
        size = len(part.value)
        texts = {"guarantee": part.guarantee, "notes": part.notes or ("",) * size}
        self._columns.add({name: getattr(part, name) for name in _NUMBERS} | texts)
        self._common = self._common or {"level": part.level, "method": part.method, "num_samples": 0, "seconds": 0.0}
        self._common["num_samples"] = max(self._common["num_samples"], part.num_samples)
        self._common["seconds"] += part.seconds
        self._noted, self._cost = self._noted or len(part.notes) > 0, self._cost + size * part.evaluations

    def whole(self) -> Evidence:
        """The evidence of all rows so far."""
        found = self._columns.whole()
        if not self._noted:
            del found["notes"]
        return Evidence(**found, **self._common, evaluations=self._cost / self._columns.rows)

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` needs to know, of a size that does not grow with the rows."""
        own = {"noted": self._noted, "common": dict(self._common), "cost": self._cost}
        return own | {"columns": self._file.state()}

    def synchronise(self) -> None:
        """Wait until all rows so far are on the disk.

        Raises:
            OSError: If the file cannot be written.
        """
        self._file.synchronise()

    def resume(self, state: Mapping[str, Any], size: int | None = None) -> None:
        """Go on from a state, see :meth:`inference.core.columns.FileColumns.resume`."""
        self._file.resume(state["columns"], size)
        self._noted, self._cost = bool(state["noted"]), float(state["cost"])
        kinds = {"level": float, "method": str, "num_samples": int, "seconds": float}
        self._common = {name: kind(state["common"][name]) for name, kind in kinds.items()}
        self.whole()

    @property
    def _file(self) -> FileColumns:
        assert isinstance(self._columns, FileColumns)
        return self._columns
