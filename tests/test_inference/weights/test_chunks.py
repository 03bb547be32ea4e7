"""Chunks that are replayed: the bits of the pair's own Python, or the pair's own Python."""

import itertools

import pytest
import torch
from registry import data_for, under

from guides import MeanField
from inference import iter_log_weights, log_weights
from inference.weights import chunks
from zoo import DeepGaussianVAE

NUM = 45


@pytest.fixture
def replays(monkeypatch):
    """The number of chunks that were replayed."""
    seen, replayed = [], chunks.Chunks._replayed

    def noted(self, *args):
        seen.append(1)
        return replayed(self, *args)

    monkeypatch.setattr(chunks.Chunks, "_replayed", noted)
    return seen


def by_chunks(pair, x, monkeypatch, *, worth):
    monkeypatch.setattr(chunks, "_WORTH", worth)
    return log_weights(*pair, x, num_samples=2 * NUM + 1, chunk=2, seed=0, progress=False)


@under("ELBO")
def test_replayed_chunks_have_the_bits_of_the_pair(make_pair, objective, monkeypatch, replays):  # noqa: ARG001
    model, guide = make_pair()
    x = data_for(model)
    own = by_chunks((model, guide), x, monkeypatch, worth=10**9)
    assert not replays
    assert torch.equal(by_chunks((model, guide), x, monkeypatch, worth=2), own)
    assert len(replays) == NUM - 2


def small(model=DeepGaussianVAE):
    torch.manual_seed(0)
    return model(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))


def rows(num=6):
    return torch.randn(num, 5, generator=torch.Generator().manual_seed(1))


def test_few_chunks_and_blocks_of_rows_are_not_recorded(monkeypatch, replays):
    log_weights(*small(), rows(), num_samples=20, chunk=2, progress=False)
    from inference.weights import importance_weights

    monkeypatch.setattr(importance_weights, "_ROWS", 3)
    log_weights(*small(), rows(), num_samples=80, chunk=2, progress=False)
    assert not replays


def test_parameters_that_change_between_chunks_are_seen(monkeypatch):
    monkeypatch.setattr(chunks, "_WORTH", 2)
    results = []
    for worth in (2, 10**9):
        monkeypatch.setattr(chunks, "_WORTH", worth)
        pair = small()
        own = []
        for chunk in iter_log_weights(*pair, rows(), num_samples=20, chunk=2, seed=0, progress=False):
            own.append(chunk)
            with torch.no_grad():
                next(pair[0].parameters()).add_(0.1)
        results.append(torch.cat(own))
    assert torch.equal(*results)


class Counting(DeepGaussianVAE):
    """Warms up by a count of its own calls."""

    calls = 0

    def likelihood(self, z):
        self.calls += 1
        return super().likelihood(z * min(self.calls / 30, 1.0))


class Branching(DeepGaussianVAE):
    """Takes another way where a parameter is positive, as it comes to be."""

    def likelihood(self, z):
        return super().likelihood(z if next(self.parameters()).mean() > 0 else -2 * z)


class Drawing(DeepGaussianVAE):
    """Reads a number of a tensor."""

    def likelihood(self, z):
        return super().likelihood(z * float(next(self.parameters()).detach().mean()))


@pytest.mark.parametrize("model", [Counting, Drawing])
def test_python_that_no_graph_can_hold_runs_as_it_is(model, monkeypatch, replays):
    own = by_chunks(small(model), rows(), monkeypatch, worth=10**9)
    assert torch.equal(by_chunks(small(model), rows(), monkeypatch, worth=2), own)
    assert not replays


def test_a_branch_that_no_longer_holds_ends_the_replays(monkeypatch, replays):
    results = []
    for worth in (10**9, 2):
        monkeypatch.setattr(chunks, "_WORTH", worth)
        pair, own = small(Branching), []
        with torch.no_grad():
            next(pair[0].parameters()).copy_(-torch.ones(8, 2))
        for chunk in iter_log_weights(*pair, rows(), num_samples=30, chunk=2, seed=0, progress=False):
            own.append(chunk)
            with torch.no_grad():
                next(pair[0].parameters()).add_(0.3)
        results.append(torch.cat(own))
    assert torch.equal(*results)
    assert len(replays) == 3  # of which the last does not hold


class Hidden(DeepGaussianVAE):
    """Changes after so many calls, which nobody sees."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count = itertools.count().__next__

    def likelihood(self, z):
        return super().likelihood(z if self.count() < 8 else 2 * z)


def test_a_hidden_change_is_an_error(monkeypatch):
    monkeypatch.setattr(chunks, "_WORTH", 2)
    pair = small(Hidden)
    with pytest.raises(RuntimeError, match=r"does not change between chunks of samples.*its log weights are others"):
        log_weights(*pair, rows(), num_samples=300, chunk=2, seed=0, progress=False)
