"""Files that are whole or not there: atomic writing, locks, digests, and errors that are one sentence with the name."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AnyPath = str | os.PathLike[str]

# Ends a file of another format that we write: a line of this and the digest of all before it.
_SEAL = b"\nelbozoo sha256 "
_SEALED = len(_SEAL) + 64 + 1

# What the libraries below raise on damaged content.
_DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    AssertionError,
    EOFError,
)


class Unreadable(ValueError):
    """What is wrong with a file, as the rest of a sentence that begins with its name."""


@contextmanager
def atomic_path(path: AnyPath) -> Iterator[Path]:
    """A temporary path next to ``path`` that replaces it when the block succeeds, and is removed otherwise.

    Temporary files that a killed process left for this path are removed.

    Raises:
        OSError: If the file cannot be written, with its name.
    """
    path = Path(path)
    _make_folder(path)
    _remove_orphans(path)
    temporary = _temporary(path)
    try:
        yield temporary
        synchronise(temporary)
        os.replace(temporary, path)
        synchronise(path.parent)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_writable(path: AnyPath) -> None:
    """Try to write a file, and leave it as it is: what cannot be saved is found before the work.

    Temporary files that a killed process left for this path are removed.

    Raises:
        OSError: If it cannot be written, with its name.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # a name that is too long
    except OSError as error:
        raise _named(error, path) from error
    _make_folder(path)
    _remove_orphans(path)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(b"0")
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def locked(path: AnyPath | None) -> Iterator[None]:
    """Try whether a file can be written, and hold it for one run: no other run may write it, in any process.

    Does nothing for None; systems without ``flock`` do not lock.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If another run holds it.
    """
    if path is not None:
        check_writable(path)
    if path is None or sys.platform == "win32":
        yield
        return
    import fcntl

    lock = Path(path).with_name(f"{_prefix(Path(path))}lock")
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(descriptor), os.stat(lock))  # not one that its holder has just removed
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise ValueError(f"expected {path} for this run alone, but another run is writing it: give each its own")
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextmanager
def reading(path: AnyPath, what: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into one sentence with its name.

    Args:
        path: The file.
        what: What was expected, such as ``"a file written by save_pair"``.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
        ValueError: If the block raises what damaged content makes the libraries raise.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"expected {what} at {os.fspath(path)}, found a folder")
    if not os.path.exists(path):
        raise FileNotFoundError(f"expected {what} at {os.fspath(path)}, found no file")
    try:
        yield
    except OSError as error:
        raise error if os.fspath(path) in str(error) else _named(error, Path(path)) from error
    except Unreadable as error:
        raise ValueError(f"expected {what}, but {os.fspath(path)} {error}") from error
    except _DAMAGE as error:
        if os.fspath(path) in str(error):
            raise
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"expected {what}, but {os.fspath(path)} is damaged or of another kind: {text}") from error


def seal(path: AnyPath) -> None:
    """Append the digest of its content to a file whose format allows of more bytes at the end."""
    with open(path, "r+b") as file:
        content = file.read()
        file.write(_SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n")


def check_seal(path: AnyPath) -> bytes:
    """The content of a file that :func:`seal` ended.

    Raises:
        Unreadable: If the content is not what was sealed.
    """
    whole = Path(path).read_bytes()
    content, end = whole[:-_SEALED], whole[-_SEALED:]
    if not end.startswith(_SEAL):
        raise Unreadable("has no digest at its end: it was cut, or written by a version before 0.2.0")
    if end != _SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n":
        raise Unreadable("is damaged: its content is not that of its digest")
    return content


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    """The same error with the file's name."""
    return OSError(error.errno or 5, f"cannot read or write {path}: {error.strerror or error}")


def _prefix(path: Path) -> str:
    """How the names of a file's temporary companions begin: short, so that every name that fits has some."""
    return f".{hashlib.sha256(path.name.encode(errors='surrogateescape')).hexdigest()[:12]}-"


def _temporary(path: Path) -> Path:
    """A new name beside a file, by which :func:`_remove_orphans` knows the process that is to remove it."""
    return path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}{path.suffix[-16:]}")


def _remove_orphans(path: Path) -> None:
    """Remove what a process that is no more has left half-written for a path."""
    for left in path.parent.glob(f"{_prefix(path)}*-*"):
        number = left.name.removeprefix(_prefix(path)).split("-")[0]
        if number.isdigit() and not _alive(int(number)):
            with suppress(OSError):
                left.unlink()


def _alive(process: int) -> bool:
    if sys.platform == "win32":  # where signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def synchronise(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
