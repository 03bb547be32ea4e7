"""Files are whole or not there, held by one run, readable by whom the umask says, and named in every error."""

import os
import subprocess
import sys
import threading

import pytest

from inference.core.files import Unreadable, atomic_path, check_seal, check_writable, locked, reading, seal

KILLED = """
import os, sys
from inference.core.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os._exit(9)
"""


def write(path, text="new"):
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def test_what_a_killed_process_left_is_removed_by_the_next_writing(tmp_path):
    path = tmp_path / "file.txt"
    write(path, "old")
    assert subprocess.run([sys.executable, "-c", KILLED, path], check=False).returncode == 9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "new"


def test_what_a_process_killed_while_it_tried_has_left_is_removed(tmp_path):
    """Of a file that is never replaced at once, such as that of rows, trying alone comes again."""
    path = tmp_path / "file.rows"
    assert subprocess.run([sys.executable, "-c", KILLED, path], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    check_writable(path)
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_file_of_a_living_process_stays(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("slow")
        write(path, "fast")
        assert temporary.exists()
    assert path.read_text() == "slow"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_has_the_mode_of_the_umask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write(tmp_path / "file.txt")
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == mode


def places(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    return [tmp_path / "file" / "run.txt", tmp_path / ("a" * 300), "/proc/run.txt", tmp_path / "folder"]


@pytest.mark.parametrize("number", range(4), ids=["below a file", "long name", "proc", "folder"])
@pytest.mark.parametrize("door", [check_writable, write])
def test_a_place_that_cannot_be_written_is_an_error_with_its_name(door, number, tmp_path):
    path = places(tmp_path)[number]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"cannot read or write .*") as error:
        door(path)
    assert str(path) in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_longest_name_that_fits_is_written(tmp_path):
    path = tmp_path / ("a" * 251 + ".txt")
    check_writable(path)
    write(path)
    assert path.read_text() == "new"


def test_trying_to_write_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_held_by_one_run(tmp_path):
    path, refused = tmp_path / "file.txt", []

    def second():
        try:
            with locked(path):
                pass
        except ValueError as error:
            refused.append(str(error))

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        with locked(tmp_path / "other.txt"):
            pass
    assert [text.startswith(f"expected {path} for this run alone") for text in refused] == [True]
    with locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_process_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    path = tmp_path / "file.txt"
    holder = "import os, sys\nfrom inference.core.files import locked\nwith locked(sys.argv[1]):\n    os._exit(9)"
    with locked(path):
        done = subprocess.run([sys.executable, "-c", holder, path], capture_output=True, text=True, check=False)
    assert f"ValueError: expected {path} for this run alone" in done.stderr
    assert subprocess.run([sys.executable, "-c", holder, path], check=False).returncode == 9
    with locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_place_needs_no_lock():
    with locked(None), locked(None):
        pass


def test_a_sealed_file_is_read_as_it_was_and_not_otherwise(tmp_path):
    path = tmp_path / "file.bin"
    content = bytes(range(256))
    path.write_bytes(content)
    with pytest.raises(
        Unreadable, match=r"has no digest at its end: it was cut, or written by a version before 0\.2\.0"
    ):
        check_seal(path)
    seal(path)
    assert check_seal(path) == content
    sealed = path.read_bytes()
    for place in range(0, len(sealed), 7):
        path.write_bytes(sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :])
        with pytest.raises(Unreadable):
            check_seal(path)


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError("deep"), UnicodeDecodeError("a", b"", 0, 1, "b")])
def test_errors_of_libraries_become_a_sentence_with_the_name(error, tmp_path):
    path = tmp_path / "file.bin"
    path.touch()
    with (
        pytest.raises(ValueError, match=r"expected a list, but .*file\.bin is damaged or of another kind"),
        reading(path, "a list"),
    ):
        raise error


def enter(path):
    with reading(path, "a list"):
        pass


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"expected a list at {tmp_path}, found a folder"):
        enter(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"expected a list at {tmp_path}/x, found no file"):
        enter(tmp_path / "x")
