"""Readers of data files into NumPy: arrays (`.npy`, `.npz`, `.csv`), images (`.npz`, IDX folders), OpenML.

Nothing here unpickles, and a failure is one sentence with the file, what was expected and what came.
"""

import gzip
import http.client
import logging
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
_logger = logging.getLogger(__name__)

_UNREADABLE = (  # what zipfile and NumPy's header parser raise on damaged files, found by flipping bytes
    ValueError,
    OSError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    TypeError,  # of keys that are no names
    SyntaxError,  # of types that are read as Python
    LookupError,
    ArithmeticError,
    AttributeError,
)
_IDX_HEADER = b"\0\0\x08\x03"  # unsigned bytes, three dimensions
# Data unpack to less than so many times their packed size; only what is larger than these bytes is asked for it.
_RATIO, _SMALL = 64, 2**25


def as_rows(array: Array, source: str) -> tuple[Array, tuple[int, ...] | None]:
    """Check an array of numbers and flatten it to float64 rows; used on every array that a user brings.

    Args:
        array: shape (N, D), or (N, ...) with more dimensions (images), which are flattened.
        source: what the error messages call the array.

    Returns:
        The rows, a copy of shape (N, D), and the shape of one data point, None where it was flat already.

    Raises:
        ValueError: no numbers, fewer than two dimensions, empty, or a value that is NaN or infinite.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{source}: expected real numbers, got an array of dtype {array.dtype}")
    if array.ndim < 2 or array.size == 0:
        raise ValueError(f"{source}: expected shape (N, D) or (N, ...) with N, D > 0, got {array.shape}")
    rows = array.reshape(len(array), -1).astype(np.float64)
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(
            f"{source}: expected finite values, got {len(bad)} NaN or infinite of {rows.size}, "
            f"the first ({rows[row, column]}) at row {row}, column {column}"
        )
    return rows, array.shape[1:] if array.ndim > 2 else None


def read_arrays(path: str | os.PathLike[str]) -> tuple[Array, Array | None]:
    """Read a user's file; one array, or the two of a ready-made split.

    Args:
        path: a `.npy`, a `.npz` (one array, or the keys `x_train` and `x_test`) or a `.csv` (numbers between
            commas, read by pandas; a first line without any number is a header; what follows a # is skipped).

    Returns:
        The array and None, or the training and the test array.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown suffix, damaged file, pickled objects, unexpected keys, a cell that is not a number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a .npy, .npz or .csv file, but {_missing(path)}")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".npy":
        return _read_npy(path), None
    if path.suffix == ".csv":
        return _read_csv(path), None
    raise ValueError(f"{path}: expected the suffix .npy, .npz or .csv, got {path.suffix!r}")


def read_images(path: str | os.PathLike[str]) -> tuple[Array, Array]:
    """Read the training and test images of an MNIST-like data set.

    Args:
        path: a `.npz` with the keys `x_train` and `x_test`, or a folder with the two original IDX files
            (`train-images-idx3-ubyte`, `t10k-images-idx3-ubyte`), gzipped (`.gz`) or not.

    Returns:
        Two uint8 arrays of shapes (N, 28, 28) or (N, 784), and (M, 28, 28) or (M, 784).

    Raises:
        FileNotFoundError: no such file or folder, or no IDX file in it.
        ValueError: a damaged file, unexpected keys, another dtype or another shape.
    """
    path = Path(path)
    if path.is_dir():
        train, test = (_read_idx(_find_idx(path, part)) for part in ("train", "t10k"))
    elif path.is_file():
        train, single = _read_npz(path)
        if single is None:
            raise ValueError(f"{path}: expected the keys x_train and x_test, got one array")
        test = single
    else:
        raise FileNotFoundError(
            f"{path}: there is no such file or folder; expected a .npz with the keys x_train and x_test, "
            "a folder of IDX files, or path=None to download"
        )
    return _check_images(train, f"{path}, train"), _check_images(test, f"{path}, test")


def download_images(name: str, cache: str | os.PathLike[str] | None = None) -> tuple[Array, Array]:
    """Fetch an MNIST-like data set from OpenML (70000 rows, the first 60000 for training) with scikit-learn.

    Args:
        name: OpenML's name, `mnist_784` or `Fashion-MNIST`; always version 1.
        cache: folder in which scikit-learn keeps the download; None for its default.

    Returns:
        uint8 arrays of shapes (60000, 784) and (10000, 784).

    Raises:
        ConnectionError: OpenML cannot be reached.
        ValueError: what came is not the expected data.
    """
    from sklearn.datasets import fetch_openml

    _logger.info("fetching %s from OpenML, or from the cache", name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # retries: it succeeds, or the error below states the cause
            data = fetch_openml(name, version=1, as_frame=False, data_home=cache, parser="liac-arff").data
    except (URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"could not download {name} from OpenML ({error}): check the network, or pass path= "
            "a local .npz with the keys x_train and x_test, or a folder of IDX files"
        ) from error
    if data.shape != (70000, 784) or data.min() < 0 or data.max() > 255:
        raise ValueError(f"OpenML, {name}: expected bytes of shape (70000, 784), got shape {data.shape}")
    pixels = data.astype(np.uint8)
    return pixels[:60000], pixels[60000:]


def _check_images(images: Array, source: str) -> Array:
    if images.dtype != np.uint8 or images.shape[1:] not in ((28, 28), (784,)) or len(images) == 0:
        came = f"{images.dtype} of shape {images.shape}"
        raise ValueError(f"{source}: expected uint8 of shape (N, 28, 28) or (N, 784), got {came}")
    return images


def _read_npz(path: Path) -> tuple[Array, Array | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            arrays = [_read_member(archive, members[key]) for key in _wanted(set(members))]
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not arrays:
        raise ValueError(f"{path}: expected one array, or the keys x_train and x_test, got {sorted(members)}")
    return arrays[0], arrays[1] if len(arrays) == 2 else None


def _wanted(keys: set[str]) -> tuple[str, ...]:
    """The split, else the only key, else nothing."""
    if {"x_train", "x_test"} <= keys:
        return "x_train", "x_test"
    return tuple(keys) if len(keys) == 1 else ()


def _read_member(archive: zipfile.ZipFile, name: str) -> Array:
    info = archive.getinfo(name)
    _check_ratio(info.file_size, info.compress_size)
    with archive.open(name) as file:
        return _read_array(file, info.file_size)


def _check_ratio(size: int, packed: int) -> None:
    if size > _SMALL and size > _RATIO * packed:
        raise ValueError(
            f"expected data that unpack to at most {_RATIO} times {packed} bytes, got {size}: save unpacked"
        )


def _read_array(file: IO[bytes], size: int) -> Array:
    """Read a `.npy` of so many bytes, whose header is checked before anything is made."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"expected version 1.0 or 2.0 of the format, got {version}")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("expected plain numbers, got objects")
    needed, got = math.prod(shape) * dtype.itemsize, size - file.tell()
    if needed != got:
        raise ValueError(f"expected {needed} bytes for shape {shape}, got {got}")
    flat = np.frombuffer(bytearray(file.read(needed)), dtype=dtype, count=math.prod(shape))
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_npy(path: Path) -> Array:
    try:
        with path.open("rb") as file:
            return _read_array(file, path.stat().st_size)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable {path.suffix} of plain numbers (pickles are refused): {error}")


def _missing(path: Path) -> str:
    return "that is a folder" if path.is_dir() else "there is no such file"


def _read_csv(path: Path) -> Array:
    import pandas as pd

    try:  # as text, for NumPy reads all digits of a number, and a cell that is none is named
        cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, comment="#", encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        return np.empty((0, 0))
    except ValueError as error:  # bytes that are no text, lines of more cells than the first
        raise ValueError(f"{path}: not a readable .csv: {str(error).strip()}") from error
    table = cells.fillna("").to_numpy(object)
    if not any(_is_number(cell) for cell in table[0]):
        table = table[1:]
    for row, column in np.argwhere(~np.frompyfunc(_is_number, 1, 1)(table).astype(bool)):
        raise ValueError(
            f"{path}, row {row}, column {column}: expected a number, got {table[row, column]!r}{_hint(table)}"
        )
    return table.astype(np.float64)


def _hint(table: NDArray[np.object_]) -> str:
    """What may be wrong with a table that is not of numbers, as the end of a sentence."""
    if table.shape[1] == 1 and any(mark in str(table[0, 0]) for mark in ";\t|"):
        return ": cells are separated by commas"
    return ""


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _find_idx(folder: Path, part: str) -> Path:
    stems = (f"{part}-images-idx3-ubyte", f"{part}-images.idx3-ubyte")
    for name in (stem + suffix for stem in stems for suffix in ("", ".gz")):
        if (folder / name).is_file():
            return folder / name
    found = sorted(entry.name for entry in folder.iterdir())[:8]
    raise FileNotFoundError(f"{folder}: expected the file {stems[0]} or {stems[0]}.gz, got {found}")


def _read_idx(path: Path) -> Array:
    packed = path.stat().st_size
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _idx_shape(path, file.read(16), packed)
            content = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable gzip file: {error}") from error
    if len(content) != math.prod(shape):
        came = "more" if len(content) > math.prod(shape) else len(content)
        raise ValueError(f"{path}: expected {math.prod(shape)} bytes for {shape}, got {came}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _idx_shape(path: Path, header: bytes, packed: int) -> tuple[int, ...]:
    if len(header) < 16 or header[:4] != _IDX_HEADER:
        raise ValueError(f"{path}: expected the IDX header {_IDX_HEADER!r}, got {header[:4]!r}")
    shape = struct.unpack(">3I", header[4:16])
    try:
        _check_ratio(math.prod(shape), packed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return shape
