"""Data of a training run: arrays and loaders train as the tensor does, and a loader's run resumes to the same bits."""

from itertools import chain

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim import LBFGS
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from guides import MeanField
from inference import Callback, fit, fit_best
from inference.core.checks import check_finite
from zoo import LinearVAE

N, D = 20, 4
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))


class Stream(IterableDataset):
    """Rows that come once: each pass goes on where the last one ended."""

    def __init__(self, x=X):
        self.rows = iter(x)

    def __iter__(self):
        return self.rows


class Interrupt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, moment):
        if moment.step == self.step:
            raise KeyboardInterrupt


def pair():
    torch.manual_seed(0)
    return LinearVAE(D, 2), MeanField(D, 2, hidden=(8,))


def trained(data, **options):
    """The parameters after some steps, and the history."""
    model, guide = pair()
    history = fit(model, guide, data, progress=False, **{"steps": 7, "seed": 3} | options)
    return torch.cat([p.detach().flatten() for half in (model, guide) for p in half.parameters()]), history


def memory_map(folder):
    np.save(folder / "x.npy", X.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


@pytest.mark.parametrize("name", ["array", "memory map", "data frame", "tuple"])
def test_arrays_train_to_the_bits_of_the_tensor(name, tmp_path):
    sources = {
        "array": X.numpy(),
        "memory map": memory_map(tmp_path),
        "data frame": pd.DataFrame(X.numpy()),
        "tuple": (X.numpy(),),
    }
    options = {"batch_size": 6, "validation": sources[name], "evaluate_every": 3}
    expected, first = trained(X, **options | {"validation": X})
    got, second = trained(sources[name], **options)
    assert torch.equal(got, expected)
    assert first.validation == second.validation


def test_a_loader_in_order_trains_as_a_stream_of_its_rows():
    in_order, _ = trained(DataLoader(TensorDataset(X), batch_size=5), steps=4)
    assert torch.equal(in_order, trained(Stream(), batch_size=5, steps=4)[0])


class Seen(Callback):
    """The rows of each step, by their first entries."""

    def __init__(self, guide):
        self.batches = []
        guide.register_forward_pre_hook(lambda _, args: self.rows(args[0]))

    def rows(self, x):
        self.last = x

    def on_step(self, _):
        self.batches.append(self.last[:, 0].tolist())


def batches_of(data, **options):
    model, guide = pair()
    seen = Seen(guide)
    fit(model, guide, data, progress=False, callbacks=[seen], **{"steps": 7, "seed": 3} | options)
    return seen.batches


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_round_of_a_loader_is_an_epoch_of_all_rows(shuffle):
    batches = batches_of(DataLoader(TensorDataset(X), batch_size=6, shuffle=shuffle), steps=8)
    assert [len(batch) for batch in batches] == [6, 6, 6, 2] * 2
    first, second = list(chain(*batches[:4])), list(chain(*batches[4:]))
    assert sorted(first) == sorted(second) == sorted(X[:, 0].tolist())
    assert (first == second) is not shuffle


def test_the_rows_of_a_stream_are_each_seen_once_and_in_order():
    batches = batches_of(Stream(), batch_size=5, steps=4)
    assert list(chain(*batches)) == X[:, 0].tolist()


def test_a_stream_that_ends_too_early_says_so():
    with pytest.raises(ValueError, match="expected a loader of at least one batch, got none in epoch 1"):
        trained(Stream(), batch_size=5, steps=5)
    with pytest.raises(ValueError, match="expected a loader of at least one batch, got none"):
        trained(DataLoader(Stream(X[:0])))


def loaders():
    own = torch.Generator().manual_seed(5)
    return {
        "in order": DataLoader(TensorDataset(X), batch_size=6),
        "shuffled": DataLoader(TensorDataset(X), batch_size=6, shuffle=True),
        "own generator": DataLoader(TensorDataset(X), batch_size=6, shuffle=True, generator=own),
        "with replacement": DataLoader(TensorDataset(X), 6, sampler=RandomSampler(X, replacement=True, num_samples=13)),
    }


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize("name", loaders())
def test_a_loader_s_run_resumes_to_the_same_bits(name, stop, tmp_path):
    expected, whole = trained(loaders()[name], steps=9, checkpoint=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(loaders()[name], steps=9, checkpoint=tmp_path / "run", callbacks=[Interrupt(stop)])
    got, history = trained(loaders()[name], steps=9, checkpoint=tmp_path / "run")
    assert torch.equal(got, expected)
    assert history.loss == whole.loss


class Changing(torch.utils.data.Dataset):
    """Rows that after the first batch are others each time that they are read: their noise is no torch generator's."""

    noise = np.random.default_rng(0)

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i] + (i >= 6) * torch.from_numpy(self.noise.normal(size=D)).float()


def test_a_loader_that_draws_elsewhere_is_refused_on_resumption(tmp_path):
    loader = DataLoader(Changing(), batch_size=6)
    with pytest.raises(KeyboardInterrupt):
        trained(loader, checkpoint=tmp_path / "run", callbacks=[Interrupt(3)])
    with pytest.raises(ValueError, match="expected the loader to give again the batches of the interrupted run"):
        trained(loader, checkpoint=tmp_path / "run")


def test_another_loader_does_not_resume_a_run(tmp_path):
    trained(loaders()["shuffled"], checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="belongs to another one"):
        trained(DataLoader(TensorDataset(X + 1), batch_size=6, shuffle=True), checkpoint=tmp_path / "run", steps=9)


REFUSED = {
    "size given twice": (DataLoader(TensorDataset(X)), {"batch_size": 3}, "expected no batch_size beside a DataLoader"),
    "stream without size": (Stream(), {}, "expected a batch_size for an IterableDataset"),
    "stream with checkpoint": (Stream(), {"batch_size": 3, "checkpoint": "run"}, "got Stream, an IterableDataset"),
    "no seed": (DataLoader(TensorDataset(X)), {"seed": None, "checkpoint": "run"}, "expected a seed for a checkpoint"),
    "whole": (DataLoader(TensorDataset(X)), {"whole": True}, "expected data in memory for whole=True"),
    "full batch": (DataLoader(TensorDataset(X)), {"optimizer": LBFGS}, "expected the full batch for LBFGS"),
    "validation": (X, {"validation": DataLoader(TensorDataset(X), shuffle=True)}, "expected a DataLoader of all rows"),
    "not finite": (DataLoader(TensorDataset(X.clone().index_fill_(0, torch.tensor(9), torch.nan)), 4), {}, "of step 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_loader_cannot_do_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trained(data, **options)


def test_a_run_leaves_the_callers_random_state_as_it_was():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    trained(loaders()["shuffled"], seed=3)
    model, guide = pair()
    torch.set_rng_state(before)
    fit(model, guide, loaders()["shuffled"], steps=2, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_data_are_read_a_block_at_a_time(monkeypatch):
    """The largest tensor that is made of the data before the first step is a batch's."""
    x = torch.randn(50_000, D)
    largest = []
    finite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda t: largest.append(t.numel()) or finite(t))
    check_finite(x)
    trained(x, batch_size=10, steps=1)
    assert max(largest, default=0) < x.numel()


def test_data_are_hashed_once_a_run(tmp_path, monkeypatch):
    from inference.pair import fingerprint

    hashed, digest = [], fingerprint.tensor_digest
    monkeypatch.setattr(fingerprint, "tensor_digest", lambda t: hashed.append(t.shape) or digest(t))
    trained(X, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert hashed.count(X.shape) == 1


class Weighted(nn.Module):
    """A model or guide of rows with weights, a second argument."""

    def __init__(self, half):
        super().__init__()
        self.half, self.shift = half, nn.Parameter(torch.zeros(()))

    def forward(self, x, weight):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.shift, 1.0).expand([len(x)]))
            if self.half == "model":
                pyro.sample("x", dist.Normal((z * weight).unsqueeze(-1), x.new_ones(D)).to_event(1), obs=x)


def test_arguments_one_by_one_train_as_those_in_a_tuple():
    weight = torch.linspace(1, 2, N)
    runs = []
    for data in (((X, weight),), (X, weight)):
        halves = Weighted("model"), Weighted("guide")
        runs.append(fit(*halves, *data, steps=5, batch_size=8, seed=0, progress=False).loss)
    assert runs[0] == runs[1]
    found = fit_best(lambda: (Weighted("model"), Weighted("guide")), X, weight, seeds=[0], steps=5, progress=False)
    assert found.seed == 0


@pytest.mark.parametrize("data", [(X,), DataLoader(TensorDataset(X))])
def test_all_arguments_and_more_are_refused(data):
    with pytest.raises(TypeError, match=r"in one tuple or one by one, as in fit\(model, guide, x, y, steps=\.\.\.\)"):
        fit(*pair(), data, X, steps=1)
