"""Columns of numbers and texts of rows that come block by block: in memory, or in a file and read where they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch
from torch import Tensor

from inference.core.files import AnyPath, Unreadable, synchronise

# Bytes that are read at once to be compared with their digest.
_BYTES = 2**20

# Texts whose places are kept, lest one that many rows share be written for each of them.
_TEXTS = 4096

# Rows whose places of texts are read at once.
_ROWS = 4096


class Columns:
    """Columns of N rows in memory, made once: numbers as tensors, texts as tuples.

    Args:
        number: N.
    """

    def __init__(self, number: int) -> None:
        self._number, self._found = number, dict[str, Any]()

    def write(self, start: int, columns: Mapping[str, Tensor | Sequence[str]]) -> None:
        """Fill in the values of some columns from a row on."""
        for name, values in columns.items():
            whole = values.new_empty(self._number) if isinstance(values, Tensor) else [""] * self._number
            self._found.setdefault(name, whole)[start : start + len(values)] = values

    def numbers(self, name: str, rows: int) -> Tensor:
        """The first rows of a column of numbers."""
        column: Tensor = self._found[name][:rows]
        return column

    def texts(self, name: str, rows: int) -> Sequence[str]:
        """The first rows of a column of texts."""
        return tuple(self._found[name][:rows])


class FileColumns:
    """Columns of N rows in a file: of which no more is in memory than is looked at, and no page of that is anonymous.

    The file holds one column after the other, N numbers of eight bytes each: float64, or the places where texts begin
    and end; then the texts in UTF-8. Nothing in it changes once it is written.

    Args:
        path: The file; one that is there is kept until :meth:`write`.
        number: N.
        numbers: Names of the columns of float64.
        texts: Names of the columns of texts.
    """

    def __init__(self, path: AnyPath, number: int, *, numbers: Sequence[str], texts: Sequence[str]) -> None:
        self._path, self._number = Path(path), number
        names = [*numbers, *(end for name in texts for end in _ends(name))]
        self._places = {name: 8 * number * i for i, name in enumerate(names)}
        self._content = self._end = 8 * number * len(names)
        self._known, self._digests = dict[str, tuple[int, int]](), dict[str, Any]()

    def write(self, start: int, columns: Mapping[str, Tensor | Sequence[str]]) -> None:
        """Write the values of some columns from a row on, the same ones for all rows before.

        Raises:
            OSError: If the file cannot be written.
        """
        if start == 0:
            self._path.unlink(missing_ok=True)  # not written over: another result may be a view of it
            self._path.touch()
        with open(self._path, "r+b") as file:
            for name, values in columns.items():
                if isinstance(values, Tensor):
                    self._put(file, name, start, values.detach().cpu().double().numpy())
                    continue
                places = np.array([self._place(file, text) for text in values], np.int64)
                for end, column in zip(_ends(name), places.T, strict=True):
                    self._put(file, end, start, column)

    def _put(self, file: BinaryIO, name: str, start: int, values: Any) -> None:
        content = np.ascontiguousarray(values).tobytes()
        file.seek(self._places[name] + 8 * start)
        file.write(content)
        self._digests.setdefault(name, hashlib.sha256()).update(content)

    def _place(self, file: BinaryIO, text: str) -> tuple[int, int]:
        """Where a text begins and ends behind the columns."""
        if text not in self._known:
            content, begin = text.encode(), self._end - self._content
            file.seek(self._end)
            file.write(content)
            self._digests.setdefault("", hashlib.sha256()).update(content)
            self._end += len(content)
            if len(self._known) >= _TEXTS:
                self._known.clear()
            self._known[text] = begin, begin + len(content)
        return self._known[text]

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` needs to know of all that is written."""
        digests = {name: total.hexdigest() for name, total in self._digests.items()}
        return {"texts": self._end - self._content, "digests": digests}

    def synchronise(self) -> None:
        """Wait until all that is written is on the disk.

        Raises:
            OSError: If the file cannot be written.
        """
        synchronise(self._path)

    def resume(self, rows: int, state: Mapping[str, Any]) -> None:
        """Go on after the first rows, if the file holds what it held when :meth:`state` was asked.

        Raises:
            Unreadable: If it does not.
        """
        with open(self._path, "rb") as file:
            for name, digest in state["digests"].items():
                begin, size = (self._places[name], 8 * rows) if name else (self._content, state["texts"])
                self._digests[name] = total = _digest(file, begin, size)
                if total.hexdigest() != digest:
                    raise Unreadable(f"does not fit {self._path}, which is damaged or of another run")
        self._end = self._content + int(state["texts"])

    def numbers(self, name: str, rows: int) -> Tensor:
        """The first rows of a column of numbers; what is written into them does not reach the file."""
        return torch.from_numpy(self._mapped(self._places[name], np.float64, rows))

    def texts(self, name: str, rows: int) -> Texts:
        """The first rows of a column of texts."""
        starts, ends = (self._mapped(self._places[end], np.int64, rows) for end in _ends(name))
        return Texts(starts, ends, self._mapped(self._content, np.uint8, self._end - self._content))

    def _mapped(self, begin: int, dtype: Any, size: int) -> np.ndarray:
        return np.asarray(np.memmap(self._path, dtype, "c", begin, (size,))) if size else np.empty(0, dtype)


class Texts(Sequence[str]):
    """Texts of rows that stay in a file, each read when it is asked for; equal to a tuple of the same.

    Args:
        starts: Where each text begins in the content, (N,).
        ends: Where it ends.
        content: Bytes in UTF-8.
    """

    def __init__(self, starts: np.ndarray, ends: np.ndarray, content: np.ndarray) -> None:
        self._starts, self._ends, self._content = starts, ends, content

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _ROWS):
            yield from self[first : first + _ROWS]

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...

    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(map(self._text, self._starts[place].tolist(), self._ends[place].tolist()))
        return self._text(int(self._starts[place]), int(self._ends[place]))

    def _text(self, start: int, end: int) -> str:
        return self._content[start:end].tobytes().decode()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"<{len(self)} texts: {', '.join(map(repr, self[:3]))}{', ...' if len(self) > 3 else ''}>"


def _ends(name: str) -> tuple[str, str]:
    """The columns of the places where texts begin and end."""
    return f"{name} begins", f"{name} ends"


def _digest(file: BinaryIO, begin: int, size: int) -> Any:
    total = hashlib.sha256()
    file.seek(begin)
    while size > 0 and (content := file.read(min(size, _BYTES))):
        total.update(content)
        size -= len(content)
    return total
