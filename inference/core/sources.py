"""Sources of data: what stands for a tensor with one row per data point, and is read without a copy of the whole.

A NumPy array, a memory-mapped one and a data frame become tensors of the same memory. A ``DataLoader`` over a data set
whose rows have numbers becomes one :class:`Column` per part of a row, of which rows are read when they are taken.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from inference.core.memory import at_once

# Elements that are read at once where all of a source is read.
_ELEMENTS = 2**22


class Column:
    """One part of each row of a data set that gives rows by their numbers.

    Args:
        rows: The rows of the data set.
        part: Which of the parts of a row.
    """

    def __init__(self, rows: _Dataset, part: int) -> None:
        self._rows, self._part = rows, part

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> torch.Size:
        """(N, ...), as of the tensor of all rows."""
        return torch.Size((len(self), *self._rows.first[self._part].shape[1:]))

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Chosen rows, (M,) integers or a slice, as one tensor."""
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return self._rows.read(tuple(numbers))[self._part]


class _Dataset:
    """The rows of a loader's data set; the last ones that were read are kept, for all parts of a row.

    Attributes:
        first: The parts of the first row.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._dataset: Any = loader.dataset
        self._collate = default_collate if loader.batch_size is None else loader.collate_fn
        self._last: tuple[tuple[int, ...], tuple[Any, ...]] = ((), ())
        self.first = self.read((0,))

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, numbers: tuple[int, ...]) -> tuple[Any, ...]:
        """The parts of rows, each (M, ...)."""
        if self._last[0] != numbers:
            many = getattr(self._dataset, "__getitems__", None)
            rows = many(list(numbers)) if many is not None else [self._dataset[i] for i in numbers]
            self._last = numbers, as_batch(self._collate(rows))
        return self._last[1]


def as_batch(batch: Any) -> tuple[Any, ...]:
    """What a loader yields as the positional arguments of a pair."""
    parts = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    return tuple(map(as_tensors, parts))


def as_tensors(value: Any) -> Any:
    """A value with each array and data frame in it as a tensor of the same memory.

    Raises:
        TypeError: If one holds other things than numbers; the message names the columns.
    """
    return value if isinstance(value, Tensor) else tree_map(_as_tensor, value)


def opened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a pair with the data set of a loader, the first of them, as columns that are read when taken.

    Raises:
        TypeError: See :func:`columns`.
        ValueError: See :func:`columns`.
    """
    if args and isinstance(args[0], DataLoader | IterableDataset):
        return (*columns(args[0]), *args[1:])
    return args


def as_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a pair with the sources among them as tensors: a loader's data set is read, if not opened.

    The first argument is data, and so are all others with as many rows; arrays of other lengths stay as they are.

    Raises:
        TypeError: See :func:`as_tensors` and :func:`columns`.
        ValueError: See :func:`columns`.
    """
    if all(isinstance(value, Tensor) for value in args) and not kwargs:
        return args, kwargs
    if args and isinstance(args[0], DataLoader | IterableDataset):
        args = tuple(part[:] if isinstance(part, Column) else part for part in opened(args))
    number = next((len(leaf) for leaf in tree_leaves((args, kwargs)) if _is_source(leaf) and len(leaf.shape) > 0), None)

    def convert(value: Any) -> Any:
        return _as_tensor(value) if _is_source(value) and len(value.shape) > 0 and len(value) == number else value

    return tuple(tree_map(convert, list(args))), tree_map(convert, dict(kwargs))


def columns(loader: Any) -> tuple[Any, ...]:
    """The parts of the rows of a loader's data set: its tensors, or else columns.

    Raises:
        TypeError: If the data set has no numbers of rows.
        ValueError: If the loader shuffles rows, or leaves some out.
    """
    dataset: Any = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"expected a data set whose rows have numbers, got {type(dataset).__name__}, an IterableDataset: only fit "
            "takes it; write it to a memory-mapped array, or measure its batches one by one"
        )
    sampler = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
    plain = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    if not plain or not isinstance(sampler, SequentialSampler):
        raise ValueError(
            f"expected a DataLoader of all rows in their order, got one with {type(sampler).__name__}: a result per "
            "data point would not tell which is which; measure with shuffle=False"
        )
    if loader.drop_last and len(dataset) % loader.batch_size:
        raise ValueError("expected a DataLoader of all rows, got one with drop_last=True")
    if isinstance(dataset, TensorDataset) and loader.collate_fn is default_collate:
        return dataset.tensors
    rows = _Dataset(loader)
    kinds = [type(part).__name__ for part in rows.first]
    if set(kinds) != {"Tensor"}:
        raise TypeError(f"expected a data set whose rows are tensors or tuples of them, got batches of {kinds}")
    return tuple(Column(rows, part) for part in range(len(kinds)))


def blocks_of(x: Tensor) -> list[Tensor]:
    """A tensor in blocks of rows, without a copy."""
    if x.dim() == 0 or x.numel() == 0:
        return [x]
    return list(x.split(at_once(_ELEMENTS, max(1, x[0].numel()))))


def _is_source(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | Column) or _is_frame(value)


def _is_frame(value: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series)


def _as_tensor(value: Any) -> Any:
    if _is_frame(value):
        value = _numbers_of(value)
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind not in "fiubc":
        raise TypeError(f"expected an array of numbers, got dtype {value.dtype}")
    if any(stride < 0 for stride in value.strides):
        value = value.copy()
    with warnings.catch_warnings():
        # An array that may not be written, as a memory map: nothing of ours writes into data.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(value)


def _numbers_of(frame: Any) -> np.ndarray:
    values = frame.to_numpy()
    if values.dtype.kind not in "fiub":
        kinds = {str(name): str(kind) for name, kind in frame.dtypes.items()} if frame.ndim == 2 else {}
        odd = [f"{name} ({kind})" for name, kind in kinds.items() if kind[:3] not in ("flo", "int", "uin", "boo")]
        raise TypeError(
            f"expected a data frame whose columns hold numbers, got {', '.join(odd) or values.dtype}: choose columns, "
            "and convert the frame, say by frame.astype('float32')"
        )
    return values
