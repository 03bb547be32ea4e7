"""Columns of rows: what is written block by block is read back, from memory and from a file that takes none."""

import copy
import pickle

import pytest
import torch

from inference.core.columns import Columns, FileColumns
from inference.core.files import Unreadable

N = 11
VALUES = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WORDS = ("", "exact", "exact", "größer als alles", *"abcdef", "exact")
NAMES = {"numbers": ("value", "never"), "texts": ("kind", "note")}


def filled(columns, start=0, stop=N, block=4):
    for i in range(start, stop, block):
        part = slice(i, min(i + block, stop))
        columns.write(i, {"value": VALUES[part], "kind": WORDS[part]})
    return columns


def in_file(path):
    return FileColumns(path, N, **NAMES)


@pytest.fixture(params=["memory", "file"])
def columns(request, tmp_path):
    return filled(Columns(N) if request.param == "memory" else in_file(tmp_path / "rows"))


def test_what_blocks_write_is_read_back(columns):
    assert torch.equal(columns.numbers("value", N), VALUES)
    assert torch.equal(columns.numbers("value", 5), VALUES[:5])
    assert columns.texts("kind", N) == WORDS == columns.texts("kind", N)
    assert columns.texts("kind", 5) != WORDS


def test_texts_of_a_file_are_a_sequence_of_their_own(tmp_path):
    words = filled(in_file(tmp_path / "rows")).texts("kind", N)
    assert (len(words), words[3], words[-1], words[1:4]) == (N, WORDS[3], WORDS[-1], WORDS[1:4])
    assert set(words) == set(WORDS)
    assert copy.deepcopy(words) == pickle.loads(pickle.dumps(words)) == WORDS
    assert repr(words) == "<11 texts: '', 'exact', 'exact', ...>"


def test_a_text_of_many_rows_is_written_once(tmp_path):
    filled(in_file(tmp_path / "rows"))
    assert (tmp_path / "rows").read_bytes().count(b"exact") == 1


def test_writing_into_a_view_does_not_reach_the_file(tmp_path):
    columns = filled(in_file(tmp_path / "rows"))
    columns.numbers("value", N).zero_()
    assert torch.equal(columns.numbers("value", N), VALUES)


def test_a_new_file_leaves_the_views_of_the_old_one(tmp_path):
    view = filled(in_file(tmp_path / "rows")).numbers("value", N)
    in_file(tmp_path / "rows").write(0, {"value": torch.zeros(N)})
    assert torch.equal(view, VALUES)


def test_a_file_goes_on_where_its_state_was_asked(tmp_path):
    """What was written later is written over."""
    first = filled(in_file(tmp_path / "rows"), stop=4)
    state = first.state()
    first.write(4, {"value": VALUES[:4], "kind": ["other"] * 4})
    second = in_file(tmp_path / "rows")
    second.resume(4, state)
    filled(second, start=4)
    third = in_file(tmp_path / "rows")
    third.resume(N, second.state())
    assert torch.equal(third.numbers("value", N), VALUES)
    assert third.texts("kind", N) == WORDS


@pytest.mark.parametrize("place", [3, 8 * N * 3 + 5, -1])
def test_a_changed_byte_is_found(place, tmp_path):
    state = filled(in_file(tmp_path / "rows")).state()
    content = bytearray((tmp_path / "rows").read_bytes())
    content[place] ^= 1
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(Unreadable, match="damaged or of another run"):
        in_file(tmp_path / "rows").resume(N, state)
    (tmp_path / "rows").write_bytes(content[: len(content) // 2])
    with pytest.raises(Unreadable, match="damaged or of another run"):
        in_file(tmp_path / "rows").resume(N, state)
