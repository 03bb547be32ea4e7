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

# The kind of a column of texts.
_TEXT = "text"


def columns_of(number: int | None, path: AnyPath | None) -> Columns:
    """Columns of so many rows: in a file, where one is given, else in memory."""
    return Columns(number) if path is None else FileColumns(number, path)


class Columns:
    """Columns of N rows in memory, made once: numbers as tensors (..., N), texts as tuples.

    Parts that are kept as they are lie between the large tensors that each block makes and frees, so that the process
    cannot use that memory again: it would grow by some megabytes a block.

    Args:
        number: N; None takes the rows of the first block.

    Attributes:
        rows: Rows so far.
        blocks: Blocks so far.
    """

    def __init__(self, number: int | None) -> None:
        self._number, self.rows, self.blocks = number, 0, 0
        self._names, self._found = list[str](), dict[str, Any]()

    def add(self, columns: Mapping[str, Tensor | Sequence[str] | None]) -> None:
        """Take in the next block: of the columns of the first one those alone that all blocks have, which are no None.

        Raises:
            OSError: If the file cannot be written, where there is one.
        """
        given = {name: values for name, values in columns.items() if values is not None}
        size = next(v.shape[-1] if isinstance(v, Tensor) else len(v) for v in given.values())
        if self.blocks == 0:
            self._number, self._names = size if self._number is None else self._number, list(given)
            self._begin(given)
        self._names = [name for name in self._names if name in given]
        self._write({name: given[name] for name in self._names})
        self.rows, self.blocks = self.rows + size, self.blocks + 1

    def whole(self) -> dict[str, Any]:
        """The columns of all rows so far, by name."""
        return {name: self._column(name) for name in self._names}

    def _begin(self, columns: Mapping[str, Tensor | Sequence[str]]) -> None:
        for name, values in columns.items():
            made = isinstance(values, Tensor)
            self._found[name] = values.new_empty(*values.shape[:-1], self._number) if made else [""] * self._number  # type: ignore

    def _write(self, columns: Mapping[str, Tensor | Sequence[str]]) -> None:
        for name, values in columns.items():
            if isinstance(values, Tensor):
                self._found[name][..., self.rows : self.rows + values.shape[-1]] = values
            else:
                self._found[name][self.rows : self.rows + len(values)] = values

    def _column(self, name: str) -> Any:
        found = self._found[name]
        return found[..., : self.rows] if isinstance(found, Tensor) else tuple(found[: self.rows])


class FileColumns(Columns):
    """Columns of N rows in a file: of which no more is in memory than is looked at, and no page of that is anonymous.

    The file holds one line of N numbers after the other, of at most eight bytes each: of each column its lines, or the
    places where texts begin and end; then the texts in UTF-8. Nothing in it changes once it is written.

    Args:
        number: N; None takes the rows of the first block.
        path: The file; one that is there is kept until :meth:`add`.
    """

    def __init__(self, number: int | None, path: AnyPath) -> None:
        super().__init__(number)
        self._path = Path(path)
        self._kinds, self._places = dict[str, tuple[str, int | None]](), dict[str, int]()
        self._content, self._end = 0, 0
        self._known, self._digests = dict[str, tuple[int, int]](), dict[str, Any]()

    def _begin(self, columns: Mapping[str, Tensor | Sequence[str]]) -> None:
        self._path.unlink(missing_ok=True)  # not written over: another result may be a view of it
        self._path.touch()
        self._lay_out({name: _kind(values) for name, values in columns.items()})

    def _lay_out(self, kinds: dict[str, tuple[str, int | None]]) -> None:
        self._kinds = kinds
        for name in kinds:
            self._places[name] = self._content
            self._content += self._stride * self._number_of_lines(name)
        self._end = self._content

    @property
    def _stride(self) -> int:
        assert self._number is not None
        return 8 * self._number

    def _write(self, columns: Mapping[str, Tensor | Sequence[str]]) -> None:
        with open(self._path, "r+b") as file:
            for name, values in columns.items():
                if isinstance(values, Tensor):
                    lines = np.atleast_2d(values.detach().cpu().numpy())
                else:
                    lines = np.array([self._place(file, text) for text in values], np.int64).T
                dtype = _dtype(self._kinds[name][0])
                for i, line in enumerate(lines):
                    content = np.ascontiguousarray(line, dtype).tobytes()
                    file.seek(self._places[name] + self._stride * i + dtype.itemsize * self.rows)
                    file.write(content)
                    self._digests.setdefault(f"{i} {name}", hashlib.sha256()).update(content)

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
        """What :meth:`resume` needs to know of all that is written, of a size that does not grow with the rows."""
        digests = {line: self._digests[line].hexdigest() for line in self._lines_of_names()}
        kinds = {name: list(kind) for name, kind in self._kinds.items()}
        counts = {"rows": self.rows, "blocks": self.blocks, "names": list(self._names)}
        return counts | {"kinds": kinds, "texts": self._end - self._content, "digests": digests}

    def synchronise(self) -> None:
        """Wait until all that is written is on the disk.

        Raises:
            OSError: If the file cannot be written.
        """
        synchronise(self._path)

    def resume(self, state: Mapping[str, Any], size: int | None = None) -> None:
        """Go on from a state and the columns in the file, if it holds what it held when :meth:`state` was asked.

        Args:
            state: From :meth:`state`.
            size: Rows of a block; None believes that the file fits, of which all rows are there.

        Raises:
            Unreadable: If the two do not fit, or the state is not what it should be.
        """
        self.rows, self.blocks = int(state["rows"]), int(state["blocks"])
        self._number = self.rows if self._number is None else self._number
        self._names = [str(name) for name in state["names"]]
        self._lay_out({str(name): _known_kind(*kind) for name, kind in state["kinds"].items()})
        self._end = self._content + int(state["texts"])
        if size is None:
            return
        if not 0 < self.rows <= self._number or self.rows != min(self._number, self.blocks * size):
            raise Unreadable(f"is damaged: {self.blocks} blocks have {self.rows} rows of {self._number}")
        self._check_content(state["digests"])

    def _check_content(self, digests: Mapping[str, str]) -> None:
        """Check that all that is read later is what it was, and take it into the digests."""
        if sum(map(self._number_of_lines, self._names)) + self._has_texts != len(digests):
            raise Unreadable("is damaged: its columns have not so many digests")
        with open(self._path, "rb") as file:
            for line in self._lines_of_names():
                begin, size = self._extent(line)
                self._digests[line] = total = _digest(file, begin, size)
                if begin + size > self._path.stat().st_size or total.hexdigest() != digests[line]:
                    raise Unreadable(f"does not fit {self._path}, which is damaged or of another run")

    def _lines_of_names(self) -> Iterator[str]:
        """All that is read: the lines of each column that all blocks have, and the texts, without a name."""
        for name in self._names:
            yield from (f"{i} {name}" for i in range(self._number_of_lines(name)))
        if self._has_texts:
            yield ""

    def _number_of_lines(self, name: str) -> int:
        kind, lines = self._kinds[name]
        return 2 if kind == _TEXT else lines or 1

    @property
    def _has_texts(self) -> bool:
        return any(self._kinds[name][0] == _TEXT for name in self._names)

    def _extent(self, line: str) -> tuple[int, int]:
        """Where a line begins in the file, and of how many bytes it is; or all texts, without a name."""
        if not line:
            return self._content, self._end - self._content
        i, _, name = line.partition(" ")
        return self._places[name] + self._stride * int(i), _dtype(self._kinds[name][0]).itemsize * self.rows

    def _column(self, name: str) -> Any:
        """A column of numbers, what is written into which does not reach the file; or of texts."""
        kind, lines = self._kinds[name]
        if kind == _TEXT:
            starts, ends = self._lines(name, 2)
            return Texts(starts, ends, self._mapped(self._content, self._end - self._content))
        return torch.from_numpy(self._lines(name, 1)[0] if lines is None else self._lines(name, lines))

    def _lines(self, name: str, number: int) -> np.ndarray:
        dtype = _dtype(self._kinds[name][0])
        mapped = self._mapped(self._places[name], self._stride * (number - 1) + dtype.itemsize * self.rows)
        return np.ndarray((number, self.rows), dtype, mapped, strides=(self._stride, dtype.itemsize))

    def _mapped(self, begin: int, size: int) -> np.ndarray:
        return np.asarray(np.memmap(self._path, np.uint8, "c", begin, (size,))) if size else np.empty(0, np.uint8)


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


def _kind(values: Tensor | Sequence[str]) -> tuple[str, int | None]:
    """The dtype of a column's numbers, and how many lines it has where it has several."""
    if not isinstance(values, Tensor):
        return _TEXT, None
    return str(values.dtype).removeprefix("torch."), len(values) if values.dim() > 1 else None


def _known_kind(kind: Any, lines: Any) -> tuple[str, int | None]:
    """A kind that :func:`_kind` may give, as it is read from a file.

    Raises:
        Unreadable: If it is none.
    """
    known = isinstance(kind, str) and (kind == _TEXT or isinstance(getattr(torch, kind, None), torch.dtype))
    if not known or not (lines is None or (type(lines) is int and lines > 0)):
        raise Unreadable(f"is damaged: a column is of kind {kind!r} with {lines!r} lines")
    return kind, lines


def _dtype(kind: str) -> np.dtype:
    return np.dtype("int64" if kind == _TEXT else kind)


def _digest(file: BinaryIO, begin: int, size: int) -> Any:
    total = hashlib.sha256()
    file.seek(begin)
    while size > 0 and (content := file.read(min(size, _BYTES))):
        total.update(content)
        size -= len(content)
    return total
