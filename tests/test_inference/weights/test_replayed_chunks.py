"""Chunks of importance weights by replays of a graph: the bits that the pair's own Python gives, and never others."""

import array
import itertools
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from registry import MODELS, data_for
from torch import nn

from guides import Flow, FullRank, LowRank, MeanField, Mixture
from inference import iter_log_weights, log_weights
from inference.numerics import graphs
from inference.weights import replayed_chunks
from zoo import DeepGaussianVAE

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
OPTIONS = {"num_samples": 203, "chunk": 5, "seed": 1, "progress": False}  # 40 chunks and a rest


@pytest.fixture
def by_python(monkeypatch):
    """A function that takes log weights by the pair's own Python alone."""

    def run(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(replayed_chunks, "_WORTH_RECORDING", 10**9)
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
    assert replays == [8, 30]


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
    found = [next(chunks) for _ in range(10)]  # one by Python, one recorded, and eight replays
    model.calls[0], model.change = 0, 1
    found = torch.cat([*found, *chunks])
    assert torch.equal(found[:50], before[:50])
    assert torch.equal(found[50:], after[50:])
    assert not torch.equal(before[50:], after[50:])
    assert replays == [8, 0]


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


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
FEW = {"num_samples": 20, "chunk": 4, "seed": 1, "progress": False}  # 5 chunks: not worth a record


def small_pair():
    torch.manual_seed(0)
    return DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))


@pytest.mark.parametrize(("level", "sizes"), [("auto", []), ("off", []), ("graph", [3])])
def test_the_level_says_whether_chunks_are_replayed(level, sizes, replays):
    pair = small_pair()
    expected = log_weights(*pair, X, **FEW, capture="off")
    assert torch.equal(log_weights(*pair, X, **FEW, capture=level), expected)
    assert replays == sizes


def test_many_rows_are_replayed_where_asked(replays):
    """In several blocks of rows, which the default runs one by one."""
    pair, x = small_pair(), torch.randn(5000, 5)
    expected, graph = (log_weights(*pair, x, **FEW, capture=level) for level in ("auto", "graph"))
    assert torch.equal(graph, expected)
    assert replays == [3]


@needs_compiler
def test_compiled_chunks_agree_within_rounding_on_the_same_noise(replays):
    pair = small_pair()
    expected, got, again = (log_weights(*pair, X, **OPTIONS, capture=level) for level in ("off", "compile", "compile"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(again, got)
    assert replays == [8, 30] * 2


@needs_compiler
def test_one_compilation_serves_pairs_of_the_same_sizes(monkeypatch):
    compiled, by_inductor = [], graphs._by_inductor
    monkeypatch.setattr(graphs, "_COMPILED", {})
    monkeypatch.setattr(graphs, "_by_inductor", lambda *args: compiled.append(1) or by_inductor(*args))
    pair, other = small_pair(), small_pair()
    with torch.no_grad():
        for parameter in other[0].parameters():
            parameter.mul_(0.5)
    found = [log_weights(*p, x, **FEW, capture="compile") for p, x in ((pair, X), (other, X), (other, 2 * X))]
    for got, (p, x) in zip(found, ((pair, X), (other, X), (other, 2 * X)), strict=True):
        torch.testing.assert_close(got, log_weights(*p, x, **FEW, capture="off"), rtol=1e-5, atol=1e-4)
    assert len(compiled) == 1


def test_where_nothing_compiles_the_pairs_python_goes_on_and_says_so(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no compiler found\nat all")

    monkeypatch.setattr(graphs, "_COMPILED", {})
    monkeypatch.setattr(graphs, "_by_inductor", fail)
    pair = small_pair()
    got = log_weights(*pair, X, **FEW, capture="compile")
    assert torch.equal(got, log_weights(*pair, X, **FEW, capture="off"))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "chunks run as the pair's own Python: RuntimeError: no compiler found"


def test_another_result_of_a_compiler_is_found(monkeypatch, caplog):
    def wrong(graph, _):
        return lambda *inputs: [result * 1.001 for result in graph(*inputs)]

    monkeypatch.setattr(graphs, "_COMPILED", {})
    monkeypatch.setattr(graphs, "_by_inductor", wrong)
    pair = small_pair()
    got = log_weights(*pair, X, **FEW, capture="compile")
    assert torch.equal(got, log_weights(*pair, X, **FEW, capture="off"))
    assert "another on the same noise" in caplog.text


@pytest.mark.parametrize("kind", [Counting, Branching, Reading])
def test_what_cannot_be_replayed_is_said_where_it_was_asked_for(kind, caplog):
    torch.manual_seed(0)
    guide, options = MeanField(5, 2, hidden=(4,)), {**FEW, "chunk": 1}
    expected = log_weights(kind(), guide, X, **options, capture="off")
    assert not caplog.records
    assert torch.equal(log_weights(kind(), guide, X, **options, capture="graph"), expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_an_unknown_level_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="expected capture as one of 'auto', 'off', 'graph', 'compile', got 'fast'"):
        log_weights(*small_pair(), X, num_samples=2, capture="fast")
