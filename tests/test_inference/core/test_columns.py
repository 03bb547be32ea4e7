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
MANY = torch.arange(2.0 * N).view(2, N)


def filled(columns, start=0, stop=N, block=4):
    for i in range(start, stop, block):
        part = slice(i, min(i + block, stop))
        some = {"value": VALUES[part], "kind": WORDS[part], "sign": VALUES[part] > 0, "many": MANY[:, part]}
        columns.add(some | {"never": None, "sometimes": None if i else VALUES[part]})
    return columns


def in_file(path):
    return FileColumns(N, path)


@pytest.fixture(params=["memory", "file"])
def columns(request, tmp_path):
    return filled(Columns(N) if request.param == "memory" else in_file(tmp_path / "rows"))


def test_what_blocks_write_is_read_back(columns):
    found = columns.whole()
    assert list(found) == ["value", "kind", "sign", "many"]
    for name, want in (("value", VALUES), ("sign", VALUES > 0), ("many", MANY)):
        torch.testing.assert_close(found[name], want, rtol=0, atol=0)
    assert found["kind"] == WORDS == found["kind"]
    assert (columns.rows, columns.blocks) == (N, 3)


def test_a_part_of_the_rows_is_the_first_of_them(tmp_path):
    for part in (Columns(N), in_file(tmp_path / "part")):
        found = filled(part, stop=4).whole()
        assert torch.equal(found["many"], MANY[:, :4])
        assert found["kind"] == WORDS[:4] != WORDS


def test_one_block_says_how_many_rows_there_are(tmp_path):
    for whole in (Columns(None), FileColumns(None, tmp_path / "whole")):
        assert torch.equal(filled(whole, block=N).whole()["value"], VALUES)


def test_texts_of_a_file_are_a_sequence_of_their_own(tmp_path):
    words = filled(in_file(tmp_path / "rows")).whole()["kind"]
    assert (len(words), words[3], words[-1], words[1:4]) == (N, WORDS[3], WORDS[-1], WORDS[1:4])
    assert set(words) == set(WORDS)
    assert copy.deepcopy(words) == pickle.loads(pickle.dumps(words)) == WORDS
    assert repr(words) == "<11 texts: '', 'exact', 'exact', ...>"


def test_a_text_of_many_rows_is_written_once(tmp_path):
    filled(in_file(tmp_path / "rows"))
    assert (tmp_path / "rows").read_bytes().count(b"exact") == 1


def test_writing_into_a_view_does_not_reach_the_file(tmp_path):
    columns = filled(in_file(tmp_path / "rows"))
    columns.whole()["value"].zero_()
    assert torch.equal(columns.whole()["value"], VALUES)


def test_a_new_file_leaves_the_views_of_the_old_one(tmp_path):
    view = filled(in_file(tmp_path / "rows")).whole()["value"]
    in_file(tmp_path / "rows").add({"value": torch.zeros(N)})
    assert torch.equal(view, VALUES)


def test_a_file_goes_on_where_its_state_was_asked(tmp_path):
    """What was written later is written over."""
    first = filled(in_file(tmp_path / "rows"), stop=4)
    state = first.state()
    filled(first, start=0, stop=4)
    second = in_file(tmp_path / "rows")
    second.resume(state, 4)
    filled(second, start=4)
    third = in_file(tmp_path / "rows")
    third.resume(second.state(), 4)
    assert torch.equal(third.whole()["value"], VALUES)
    assert third.whole()["kind"] == WORDS


@pytest.mark.parametrize("place", [3, 8 * N * 3 + 5, 8 * N * 5 + 3, -1])
def test_a_changed_byte_is_found(place, tmp_path):
    state = filled(in_file(tmp_path / "rows")).state()
    content = bytearray((tmp_path / "rows").read_bytes())
    content[place] ^= 1
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(Unreadable, match="damaged or of another run"):
        in_file(tmp_path / "rows").resume(state, 4)
    (tmp_path / "rows").write_bytes(content[: len(content) // 2])
    with pytest.raises(Unreadable, match="damaged or of another run"):
        in_file(tmp_path / "rows").resume(state, 4)


def without_first_name(state):
    return state | {"names": state["names"][1:]}


def without_first_digest(state):
    return state | {"digests": dict(list(state["digests"].items())[1:])}


def of_many_lines(state):
    return state | {"kinds": state["kinds"] | {"value": ["float64", 10**9]}}


@pytest.mark.parametrize("change", [without_first_name, without_first_digest, of_many_lines])
def test_a_state_that_lacks_a_digest_of_what_is_read_is_refused(change, tmp_path):
    state = filled(in_file(tmp_path / "rows")).state()
    with pytest.raises(Unreadable, match="its columns have not so many digests"):
        in_file(tmp_path / "rows").resume(change(state), 4)


def test_a_state_of_more_texts_than_the_file_holds_is_refused(tmp_path):
    """All that it holds has the right digest."""
    state = filled(in_file(tmp_path / "rows")).state()
    with pytest.raises(Unreadable, match="damaged or of another run"):
        in_file(tmp_path / "rows").resume(state | {"texts": state["texts"] + 1}, 4)


@pytest.mark.parametrize("kind", [["int64", {}], ["int64", 0], ["int64", True], ["int64", "2"], ["object", None]])
@pytest.mark.parametrize("named", [True, False])
def test_a_state_with_a_kind_of_columns_that_there_is_not_is_refused(kind, named, tmp_path):
    """Also one of a column that is not read: some of these counts pass for one line until they are."""
    state = filled(in_file(tmp_path / "rows")).state()
    kinds = state["kinds"] | {"value" if named else "another": kind}
    with pytest.raises(Unreadable, match="is damaged: a column is of kind"):
        in_file(tmp_path / "rows").resume(state | {"kinds": kinds}, 4)
