"""A comparison survives its file; what cannot work is refused before anything is measured."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from guides import Linear
from inference.comparison.guide_comparison import compare
from inference.comparison.paired_differences import (
    load_comparison,
    save_comparison,
)
from inference.comparison.tables import table
from zoo import LinearVAE

# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["case", "seeded_tree", "pooled"])
def test_a_comparison_survives_the_file(which, request, tmp_path):
    tree = next(part for part in request.getfixturevalue(which) if isinstance(part, xr.DataTree))
    path = tmp_path / "folder" / "comparison.nc"
    save_comparison(tree, path)
    assert list(path.parent.iterdir()) == [path]
    loaded = load_comparison(path)
    path.unlink()  # it was read, not opened
    assert loaded.identical(tree)
    assert table(loaded) == table(tree)


def test_an_interrupted_save_leaves_the_old_file(tree, tmp_path, monkeypatch):
    path = tmp_path / "comparison.nc"
    save_comparison(tree, path)
    before = path.read_bytes()

    def interrupted(_, target, **__):
        with open(target, "wb") as file:
            file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(xr.DataTree, "to_netcdf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_comparison(tree, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_reads_the_old_file_during_a_save_reads_it_to_the_end(tree, tmp_path):
    path = tmp_path / "comparison.nc"
    save_comparison(tree, path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        save_comparison(tree.isel(datum=slice(3)), path)
        assert reader.read() == before
    assert load_comparison(path)["train"].sizes["datum"] == 3


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a comparison at .*none\.nc, found no file"):
        load_comparison(tmp_path / "none.nc")


# --- files and arguments that cannot work ----------------------------------------------------------------


def test_a_damaged_comparison_is_refused_by_its_name(tmp_path):
    sound = tmp_path / "sound.nc"
    model, guide, x = LinearVAE(5, 2).double(), Linear(5, 2).double(), torch.randn(10, 5).double()
    save_comparison(compare(model, {"mine": guide}, x, num_samples=5, progress=False), sound)
    content = sound.read_bytes()
    damaged = [content[: len(content) * i // 5] for i in range(5)] + [b"no such file at all" * 50]
    for place in range(0, len(content), len(content) // 40):
        damaged.append(content[:place] + bytes([content[place] ^ 85]) + content[place + 1 :])
    for i, bad in enumerate(damaged):
        (tmp_path / f"{i}.nc").write_bytes(bad)
        with pytest.raises(ValueError, match=rf"/{i}\.nc (is damaged|has no digest)"):
            load_comparison(tmp_path / f"{i}.nc")


def test_a_comparison_of_an_older_version_is_named_as_such(tmp_path):
    xr.DataTree.from_dict({"train": xr.Dataset({"elbo": 1.0})}).to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    with pytest.raises(
        ValueError, match=r"old\.nc has no digest at its end: it was cut, or written by a version before"
    ):
        load_comparison(tmp_path / "old.nc")


TOO_LATE = {
    "simulated": ({"simulated": 20}, "expected simulated to be 0 or at least 100"),
    "split": ({"split": 41}, "expected split of at most the 40 rows of x, got 41"),
    "split of held out": ({"split": 30, "held_out": torch.zeros(20, 5).double()}, "at most the 20 rows of held_out"),
    "name": ({"guides": {"a\0b": Linear(5, 2).double()}}, "expected printable text as every guide's name"),
    "number for a name": (
        {"guides": {3: Linear(5, 2).double()}},
        "expected printable text as every guide's name, got 3",
    ),
    "seed twice": ({"guides": {"a": lambda _: Linear(5, 2).double()}, "seeds": [1, 1]}, "all different"),
    "chunk": ({"chunk": 0}, "expected chunk to be at least 1, got 0"),
}


@pytest.mark.parametrize(("change", "message"), TOO_LATE.values(), ids=TOO_LATE)
def test_what_cannot_work_is_refused_before_anything_is_measured(change, message, monkeypatch):
    monkeypatch.setattr("inference.comparison.guide_comparison._measure", lambda *_, **__: pytest.fail("it began"))
    options = {"guides": {"a": Linear(5, 2).double()}, "num_samples": 5, "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        compare(LinearVAE(5, 2).double(), options.pop("guides"), torch.zeros(40, 5).double(), **options)


def test_a_model_that_cannot_be_simulated_is_refused_first(monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.sum(-1))

    monkeypatch.setattr("inference.comparison.guide_comparison._measure", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(ValueError, match="argument"):
        compare(model, {"a": Linear(5, 2).double()}, torch.zeros(40, 5).double(), simulated=100, progress=False)
