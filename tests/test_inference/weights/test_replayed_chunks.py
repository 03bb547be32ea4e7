"""Chunks of importance weights by replays of a graph: the bits that the pair's own Python gives, and never others."""

import array
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from registry import MODELS, data_for
from torch import nn

from guides import Flow, FullRank, LowRank, MeanField, Mixture
from inference import iter_log_weights, log_weights
from inference.weights import replayed_chunks
from zoo import DeepGaussianVAE

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
OPTIONS = {"num_samples": 203, "chunk": 5, "seed": 1, "progress": False}  # 40 chunks and a rest


@pytest.fixture
def by_python(monkeypatch):
    """A function that takes log weights by the pair's own Python alone."""

    def run(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(replayed_chunks, "WORTH_RECORDING", 10**9)
            return log_weights(*args, **kwargs)

    return run


@pytest.fixture
def replays(monkeypatch):
    """How many chunks each group of accepted replays held."""
    sizes, replayed = [], replayed_chunks._replayed
    monkeypatch.setattr(
        replayed_chunks, "_replayed", lambda *args: (group := replayed(*args), sizes.append(len(group)))[0]
    )
    return sizes


def data_of(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return data_for(model, 6)


@pytest.mark.parametrize("guide", [MeanField, FullRank, LowRank, Mixture, Flow], ids=lambda kind: kind.__name__)
def test_each_guide_gives_the_bits_of_its_python(guide, by_python, replays):
    torch.manual_seed(0)
    pair = DeepGaussianVAE(5, 2, hidden=(8,)), guide(5, 2, hidden=(8,))
    expected = by_python(*pair, X, **OPTIONS)
    assert torch.equal(log_weights(*pair, X, **OPTIONS), expected)
    assert replays == [1, 8, 29]


@pytest.mark.parametrize("name", MODELS)
def test_each_model_gives_the_bits_of_its_python(name, by_python, replays):
    torch.manual_seed(0)
    model = MODELS[name]()
    x = data_of(model)
    guide = MeanField(x.shape[1], model.latent_dim, hidden=(4,), support=model.prior().support).to(x.dtype)
    options = {"num_samples": 60, "chunk": 2, "seed": 1, "progress": False}
    assert torch.equal(log_weights(model, guide, x, **options), by_python(model, guide, x, **options))
    assert sum(replays) == 28


class Scaled(nn.Module):
    """A model with one more number in its noise."""

    def scale(self, _):
        return 1.0

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = z.sum(-1, keepdim=True).expand(*z.shape[:-1], x.shape[-1])
            pyro.sample("x", dist.Normal(mean, self.scale(z)).to_event(1), obs=x)


class Counting(Scaled):
    """It warms up, in a counter that can be seen."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def scale(self, _):
        self.calls += 1
        return 1.0 + self.calls * 1e-6  # within the tolerance of the check that it is a density


class CountingInABuffer(Scaled):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def scale(self, _):
        self.calls.add_(1)
        return 1.0 + self.calls * 1e-6


class Branching(Scaled):
    def scale(self, z):
        return 1.0 if bool(z.mean() > 0) else 2.0


class Reading(Scaled):
    def scale(self, z):
        return 1.0 + abs(float(z.mean()))


class Iterating(Scaled):
    def __init__(self):
        super().__init__()
        self.numbers = itertools.count()

    def scale(self, _):
        return 1.0 + next(self.numbers) * 1e-6


class BranchingRarely(Scaled):
    """By numbers of which torch sees nothing."""

    def scale(self, z):
        return 2.0 if max(z.reshape(-1).tolist()) > 2.5 else 1.0


@pytest.mark.parametrize("kind", [Counting, CountingInABuffer, Branching, BranchingRarely, Reading, Iterating])
def test_state_in_python_is_not_frozen(kind, by_python):
    torch.manual_seed(0)
    guide, options = MeanField(5, 2, hidden=(4,)), {**OPTIONS, "num_samples": 40, "chunk": 1}
    expected = by_python(kind(), guide, X, **options)
    assert torch.equal(log_weights(kind(), guide, X, **options), expected)


class Hidden(Scaled):
    """Its noise changes at a call that nobody can foresee, by what nobody can see."""

    def __init__(self, change):
        super().__init__()
        self.calls, self.change = array.array("q", [0]), change

    def scale(self, _):
        self.calls[0] += 1
        return 1.0 if self.calls[0] < self.change else 3.0


def test_a_hidden_change_is_found_before_a_chunk_is_given(by_python, replays):
    torch.manual_seed(0)
    guide = MeanField(5, 2, hidden=(4,))
    log_weights(Hidden(10**9), guide, X, num_samples=5, seed=0)
    before, after = (by_python(Hidden(change), guide, X, **OPTIONS) for change in (10**9, 0))
    model = Hidden(10**9)
    chunks = iter_log_weights(model, guide, X, **OPTIONS)
    found = [next(chunks) for _ in range(11)]  # one by Python, one recorded, replays of one and of eight
    model.calls[0], model.change = 0, 1
    found = torch.cat([*found, *chunks])
    assert torch.equal(found[:55], before[:55])
    assert torch.equal(found[55:], after[55:])
    assert not torch.equal(before[55:], after[55:])
    assert replays == [1, 8, 0]


def test_the_callers_random_state_is_as_it_was_between_chunks(replays):
    torch.manual_seed(0)
    pair = DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    state = torch.get_rng_state()
    whole = log_weights(*pair, X, **OPTIONS)
    parts = []
    for chunk in iter_log_weights(*pair, X, **OPTIONS):
        assert torch.equal(torch.get_rng_state(), state)
        torch.randn(3)
        state = torch.get_rng_state()
        parts.append(chunk)
    assert torch.equal(torch.cat(parts), whole)
    assert sum(replays) == 2 * 38


def test_without_a_seed_the_callers_random_numbers_are_drawn(by_python, replays):
    torch.manual_seed(0)
    pair, found = (DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))), []
    for run in (by_python, log_weights):
        torch.manual_seed(5)
        found.append((run(*pair, X, **{**OPTIONS, "seed": None}), torch.rand(())))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert sum(replays) == 38


def test_large_chunks_are_not_held_in_groups(replays):
    torch.manual_seed(0)
    pair = DeepGaussianVAE(5, 2, hidden=(4,)), MeanField(5, 2, hidden=(4,))
    held = [len(group) for group in replayed_chunks.chunks_in_groups(lambda: torch.zeros(1, 1), pair, 50, 7)]
    assert held == [1] * 50
    assert not replays
