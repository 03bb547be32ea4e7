"""Sources of data: arrays, memory maps, data frames and loaders count as the tensor of their rows, without a copy."""

import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from guides import MeanField
from inference import (
    Importance,
    compare,
    evidence,
    fit,
    gap,
    information_bounds,
    latent_kl,
    log_weights,
    posterior_error,
    posterior_means,
    predictive,
    rate_distortion,
    refit,
    sbc,
    self_consistency,
    simulate,
)
from inference.core.checks import check_finite
from inference.core.memory import memory_limit
from inference.core.sources import as_arguments, columns, opened
from inference.core.storage import tensor_digest
from inference.pair.call import Call
from inference.pair.rows import RowBlocks, with_known_rows
from zoo import LinearVAE

N, D = 12, 5
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Rows(Dataset):
    """Rows that are read one by one, and counted."""

    def __init__(self, x):
        self.x, self.read = x, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.read += 1
        return self.x[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


def memory_map(folder):
    path = folder / "x.npy"
    np.save(path, X.numpy())
    return np.load(path, mmap_mode="r")


SOURCES = {
    "array": lambda _: X.numpy(),
    "Fortran order": lambda _: np.asfortranarray(X.numpy()),
    "memory map": memory_map,
    "data frame": lambda _: pd.DataFrame(X.numpy(), columns=list("abcde")),
    "loader of tensors": lambda _: DataLoader(TensorDataset(X), batch_size=5),
    "loader of rows": lambda _: DataLoader(Rows(X), batch_size=5),
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return SOURCES[request.param](tmp_path)


def new_pair():
    torch.manual_seed(0)
    return LinearVAE(D, 2).double(), MeanField(D, 2, hidden=(8,)).double()


@pytest.fixture
def pair():
    return new_pair()


QUIET = {"seed": 1, "progress": False}
DOORS = {
    "evidence": lambda m, _, x: evidence(m, x, **QUIET).value,
    "evidence by blocks": lambda m, g, x: evidence(m, x, method=Importance(50), guide=g, block=5, **QUIET).value,
    "gap": lambda m, g, x: gap(m, g, x, num_samples=8, restarts=0, max_steps=3, **QUIET).total,
    "compare": lambda m, g, x: torch.as_tensor(
        compare(m, {"a": g}, x, num_samples=50, block=5, **QUIET)["train"]["elbo"].values
    ),
    "log weights": lambda m, g, x: log_weights(m, g, x, num_samples=3, **QUIET),
    "simulation": lambda m, g, x: (
        sbc(simulate(m, g, x, num_simulations=24, num_samples=19, **QUIET), num_bins=4, seed=0).p_value
    ),
    "latent KL": lambda m, g, x: latent_kl(m, g, x, block=5, progress=False),
    "rate": lambda m, g, x: rate_distortion(m, g, x, num_samples=3, **QUIET).totals.value,
    "posterior error": lambda m, g, x: posterior_error(m, g, x, num_samples=9, block=5, seed=1).kl.value,
    "information": lambda m, g, x: information_bounds(m, g, x, block=5, **QUIET).per_datum,
    "predictions": lambda m, g, x: predictive(m, g, x, num_samples=2, block=5, seed=1)["x"],
    "self-consistency": lambda m, g, x: self_consistency(m, g, x, block=5, progress=False).reconstruction,
    "refit": lambda m, g, x: refit(m, g, x, num_samples=8, restarts=0, max_steps=2, **QUIET).own_elbo,
    "standardisation": lambda m, _, x: type(m)(D, 2).double().standardise_by(x).standardise.scale,
    "means": lambda m, g, x: posterior_means(m, g, x, block=5, progress=False),
}

NO_LOADERS = {"self-consistency", "standardisation"}


@cache
def of_the_tensor(door):
    """What a call gives for the data as one tensor."""
    return torch.as_tensor(DOORS[door](*new_pair(), X))


@pytest.mark.parametrize("door", DOORS)
def test_every_source_gives_what_the_tensor_gives(door, source, pair):
    if isinstance(source, DataLoader) and door in NO_LOADERS:
        pytest.skip("takes no loader")
    got = torch.as_tensor(DOORS[door](*pair, source))
    torch.testing.assert_close(got, of_the_tensor(door), rtol=1e-10, atol=1e-10)  # sums over columns have another order


@pytest.mark.parametrize("name", ["array", "Fortran order", "memory map", "data frame"])
def test_arrays_and_frames_are_read_where_they_are(name, tmp_path):
    source = SOURCES[name](tmp_path)
    (x,), _ = as_arguments((source,), {})
    values = source.to_numpy() if isinstance(source, pd.DataFrame) else source
    assert x.data_ptr() == values.__array_interface__["data"][0]
    assert torch.equal(x, X)


def test_blocks_of_rows_are_views_of_the_data(pair):
    call = with_known_rows(Call(*pair, (X,)))
    blocks = RowBlocks(call, 5)
    assert [len(block.args[0]) for block in blocks] == [5, 5, 2]
    assert [block.args[0].data_ptr() for block in blocks] == [X[i].data_ptr() for i in (0, 5, 10)]


def test_blocks_convert_their_own_rows_alone(pair):
    call = Call(pair[0].float(), pair[1].float(), (X.float(),)).double_by_rows()
    assert call.args[0].dtype == torch.float32
    assert RowBlocks(call, 5)[1].args[0].dtype == torch.float64


def test_rows_of_a_loader_are_read_once_and_block_by_block():
    rows = Rows(X)
    given = opened((DataLoader(rows, batch_size=3),))
    blocks = RowBlocks(Call(lambda x: x, None, given), 5)
    rows.read = 0
    assert torch.equal(torch.cat([block.args[0] for block in blocks]), X)
    assert rows.read == N


def test_an_array_that_is_not_of_the_rows_stays_as_it_is():
    weights = np.ones(3)
    args, kwargs = as_arguments((X.numpy(), weights), {"y": X.numpy()[:, 0]})
    assert args[1] is weights
    assert torch.equal(kwargs["y"], X[:, 0])


BAD = {
    "shuffled": (DataLoader(TensorDataset(X), shuffle=True), ValueError, "expected a DataLoader of all rows in their"),
    "last dropped": (DataLoader(TensorDataset(X), 5, drop_last=True), ValueError, "got one with drop_last=True"),
    "stream": (DataLoader(Stream()), TypeError, "expected a data set whose rows have numbers, got Stream"),
    "labels": (DataLoader([{"x": row} for row in X]), TypeError, r"got batches of \['dict'\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_loaders_that_cannot_be_measured_are_refused_by_name(name, pair):
    loader, error, message = BAD[name]
    with pytest.raises(error, match=message):
        evidence(pair[0], loader)
    with pytest.raises(error, match=message):
        columns(loader)


def test_a_frame_with_text_is_refused_with_its_columns(pair):
    frame = pd.DataFrame({"length": [1.0, 2.0], "species": ["a", "b"]})
    with pytest.raises(TypeError, match=r"whose columns hold numbers, got species \((object|str)\)"):
        evidence(pair[0], frame)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finiteness_is_found_in_any_block_with_its_place(bad, dtype):
    x = torch.zeros(50, 4, dtype=dtype)
    x[37, 2] = bad
    with memory_limit(1e-4), pytest.raises(ValueError, match=r"got 1 NaN or infinite of 200 .* at \(37, 2\)"):
        check_finite(x)


def test_finite_data_whose_sum_overflows_are_finite():
    check_finite(torch.full((10, 3), 1e38))
    check_finite(torch.tensor([1e38, float("nan"), 3e38, 3e38]), missing=True)


def test_a_digest_does_not_depend_on_layout_or_blocks():
    with memory_limit(1e-4):
        blocks = tensor_digest(X)
    assert tensor_digest(X) == blocks == tensor_digest(X.mT.contiguous().mT)
    assert tensor_digest(X.clone().index_fill_(0, torch.tensor([7]), 0.0)) != blocks


ROWS = 9000  # more than are run at once


def test_weights_of_many_rows_are_drawn_block_by_block(pair, monkeypatch):
    """Each row's weights have the mean that they have by themselves, and no run sees more rows than a block has."""
    model, guide = pair
    x, seen, forward = X[:4].repeat(ROWS // 4, 1), [], type(guide).forward
    monkeypatch.setattr(type(guide), "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    weights = log_weights(model, guide, x, num_samples=2, **QUIET)
    rates = rate_distortion(model, guide, x, num_samples=2, **QUIET)
    assert max(seen) <= 4096
    assert weights.shape == (2, ROWS)
    few = log_weights(model, guide, X[:4], num_samples=20_000, **QUIET)
    for n in range(4):
        alone = few[:, n]
        for found in (weights[:, n::4].flatten(), -rates.totals.value[n::4]):
            error = (found.var() / len(found) + alone.var() / len(alone)).sqrt()
            assert abs(found.mean() - alone.mean()) < 4.5 * error


class AnonymousMemory:
    """The most memory that is not a file's while the block runs, above what it was before, in bytes."""

    def __enter__(self):
        self.before = self.most = self.now()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.used = self.most - self.before

    def watch(self):
        while not self.over.wait(0.002):
            self.most = max(self.most, self.now())

    def now(self):
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


WIDE = 256
MANY_ROWS = {
    "training": lambda m, g, x: fit(m, g, x, steps=3, batch_size=64, seed=0, progress=False),
    "closed form": lambda m, _, x: evidence(m, x, progress=False),
    "importance": lambda m, g, x: evidence(m, x, method=Importance(2), guide=g, **QUIET),
    "latent KL": lambda m, g, x: latent_kl(m, g, x, progress=False),
    "rate": lambda m, g, x: rate_distortion(m, g, x, num_samples=2, **QUIET),
    "posterior error": lambda m, g, x: posterior_error(m, g, x, block=2048, seed=0),
}


def grown(name, path):
    """How many bytes a call on a memory-mapped file takes, in a process that has done it with few rows before."""
    torch.manual_seed(0)
    model, guide = LinearVAE(WIDE, 2), MeanField(WIDE, 2, hidden=(8,))
    x = np.load(path, mmap_mode="r")
    MANY_ROWS[name](model, guide, x[:9000])
    with AnonymousMemory() as memory:
        MANY_ROWS[name](model, guide, x)
    return memory.used


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name", [name if name == "training" else pytest.param(name, marks=pytest.mark.slow) for name in MANY_ROWS]
)
def test_a_memory_map_is_never_in_memory_as_a_whole(name, tmp_path):
    rows, path = 200_000, tmp_path / "x.npy"
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, WIDE))
    for start in range(0, rows, 8000):
        x[start : start + 8000] = np.random.default_rng(start).standard_normal((8000, WIDE), np.float32)
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2]), *sys.path]
    code = f"import sys; sys.path[:0] = {folders}; import test_sources as t; print(t.grown({name!r}, {str(path)!r}))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed.splitlines()[-1]) < x.nbytes / 2  # of which a copy in float64 would be four times as much
