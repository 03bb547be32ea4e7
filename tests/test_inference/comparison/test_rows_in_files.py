"""Gap and comparison with a checkpoint: their rows are in files, the same numbers, and an interrupted call goes on."""

import pytest
import torch

import inference.comparison.gap_decomposition as gap_decomposition
import inference.comparison.guide_comparison as guide_comparison
from guides import FullRank, MeanField
from inference import Evidence, Importance, compare, evidence, gap
from inference.comparison import local_problem
from zoo import DeepGaussianVAE, LinearVAE

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
FEW = {"method": Importance(16), "num_samples": 16, "restarts": 0, "max_steps": 2, "seed": 0, "progress": False}
BLOCKS = {"num_samples": 30, "block": 10, "seed": 0, "progress": False}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Three blocks of a gap."""
    monkeypatch.setattr(local_problem, "_DRAWS", 16 * 8 * 10)


def split(checkpoint=None, **changes):
    torch.manual_seed(0)
    model, guide = DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    return gap(model, guide, X, checkpoint=checkpoint, **FEW | changes)


def tabulated(checkpoint=None, **changes):
    torch.manual_seed(0)
    own = LinearVAE(5, 2), MeanField(5, 2, hidden=(4,))
    guides = {"a": MeanField(5, 2, hidden=(8,)), "b": FullRank(5, 2, hidden=(4,)), "own": own}
    options = BLOCKS | {"held_out": X[:5], "checkpoint": checkpoint} | changes
    return compare(DeepGaussianVAE(5, 2, hidden=(8,)), guides, X, **options)


def assert_same_split(found, expected):
    for name, want in vars(expected).items():
        got = getattr(found, name)
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        else:
            assert isinstance(want, Evidence) or got == want, name
    assert torch.equal(found.evidence.upper, expected.evidence.upper)
    assert found.evidence.guarantee == expected.evidence.guarantee
    assert (found.mean, str(found)) == (expected.mean, str(expected))


def assert_same_table(found, expected):
    for group in ("train", "held_out"):
        assert (
            found[group]
            .to_dataset()
            .drop_vars(["seconds", "memory"])
            .identical(expected[group].to_dataset().drop_vars(["seconds", "memory"]))
        )


DOORS = {
    "gap": (split, assert_same_split, gap_decomposition, "_split"),
    "compare": (tabulated, assert_same_table, guide_comparison, "_measure"),
}


@pytest.mark.parametrize("door", DOORS)
def test_rows_in_a_file_are_those_in_memory(door, tmp_path):
    call, assert_same, _, _ = DOORS[door]
    expected = call()
    for _ in range(2):  # written, and read
        assert_same(call(tmp_path / "rows"), expected)


@pytest.mark.parametrize("door", DOORS)
def test_an_interrupted_call_goes_on_after_its_last_block(door, tmp_path, monkeypatch):
    call, assert_same, module, name = DOORS[door]
    expected, original, done = call(), getattr(module, name), []

    def interrupted(*args, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(original(*args, **kwargs))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "rows")
    counted = []
    monkeypatch.setattr(module, name, lambda *a, **k: (counted.append(1), original(*a, **k))[1])
    assert_same(call(tmp_path / "rows"), expected)
    assert len(counted) == (1 if door == "gap" else 2)  # the last block; of held-out rows their one block


@pytest.mark.parametrize("door", DOORS)
def test_the_file_of_another_call_is_refused(door, tmp_path):
    call = DOORS[door][0]
    call(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"expected a checkpoint of this estimate, but .* belongs to another"):
        call(tmp_path / "rows", num_samples=20)
    with pytest.raises(ValueError, match="expected a seed for an estimate with a checkpoint"):
        call(tmp_path / "rows", seed=None)


@pytest.mark.parametrize("door", DOORS)
def test_a_place_that_cannot_be_written_is_found_before_the_work(door, tmp_path, monkeypatch):
    call, _, module, name = DOORS[door]
    (tmp_path / "file").touch()
    for work in (name, "evidence_of_call"):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("it began"), raising=False)
    with pytest.raises(OSError, match=r"cannot read or write .*file/rows"):
        call(tmp_path / "file" / "rows")
    (tmp_path / "rows.held_out.0.rows").mkdir()
    (tmp_path / "rows").mkdir()  # of a comparison the beginning of names alone
    with pytest.raises(OSError, match=r"cannot read or write .*it is a folder"):
        call(tmp_path / "rows")


def test_a_gap_of_known_evidence_is_recognised_by_it_and_its_level(tmp_path):
    """By its texts, too; a closed form has no level, but the ELBO's interval has."""
    model, guide, known = LinearVAE(5, 2), MeanField(5, 2, hidden=(8,)), evidence(LinearVAE(5, 2), X, method="exact")
    options = FEW | {"max_steps": 1, "known": known, "level": 0.9, "checkpoint": tmp_path / "rows"}
    gap(model, guide, X, **options)
    others = [{"known": Evidence(**vars(known) | {name: ("another",) * len(X)})} for name in ("guarantee", "notes")]
    for change in [*others, {"level": 0.8}]:
        with pytest.raises(ValueError, match="belongs to another"):
            gap(model, guide, X, **options | change)


FILES = {
    "gap": ("rows", "rows.rows", "rows.evidence", "rows.evidence.rows"),
    "compare": ("rows.train.0", "rows.train.0.rows", "rows.train.0.0.rows", "rows.train.0.1.rows"),
}


@pytest.mark.parametrize("door", DOORS)
def test_files_of_another_call_or_cut_are_refused_by_name(door, tmp_path):
    """Whichever of a call's files is cut, or another's: of the same layout, or any other of the same call."""
    call, names = DOORS[door][0], FILES[door]
    call(tmp_path / "rows")
    (tmp_path / "other").mkdir()
    call(tmp_path / "other" / "rows", seed=1)
    sound = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        wrong = [sound[other] for other in names if other != name]
        wrong += [sound[name][: len(sound[name]) // 2], (tmp_path / "other" / name).read_bytes()]
        for content in {*wrong} - {sound[name]}:  # a closed form's rows are those of every seed
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"expected a checkpoint of this estimate, but .*{name}"):
                call(tmp_path / "rows")
        (tmp_path / name).write_bytes(sound[name])
    call(tmp_path / "rows")


@pytest.mark.slow
def test_an_elbo_above_the_evidence_is_said_in_a_file_too(tmp_path):
    """A contradiction changes the evidence, of which the file holds what is changed."""
    known = split().evidence
    known = Evidence(**vars(known) | {"upper": known.value - 50, "value": known.value - 50, "lower": known.value - 51})
    found = [split(file, known=known) for file in (None, tmp_path / "rows")]
    assert bool(found[0].contradicted.all())
    assert bool(found[0].evidence.upper.isinf().all())
    assert_same_split(found[1], found[0])
    assert found[1].evidence.notes == found[0].evidence.notes
