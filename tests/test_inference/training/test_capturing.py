"""Captured training: the bits of the pair's own Python, or the pair's own Python."""

import collections
import copy
import itertools
import logging
import math
import random
import shutil
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from captured_pairs import Late, same
from registry import OBJECTIVES, data_for, under
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from guides import MeanField
from inference import (
    ELBO,
    AnalyticKLELBO,
    AnnealedPrecision,
    BetaELBO,
    Callback,
    LinearAnnealing,
    Snapshots,
    fit,
    fit_many,
)
from inference.training import capturing
from inference.training.agreement import Rounded, Stale, all_close, all_same, check_agreement, compared
from inference.training.bunches import BUNCH
from zoo import IMAVAE, DeepGaussianVAE

QUIET = {"progress": False}
LOGGER = "inference.training.capturing"


def rate(value, **options):
    return lambda parameters: Adam(parameters, lr=value, **options)


def ways(caplog):
    """What the log says about the way in which steps ran."""
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def both(pair, x, caplog, *, objective=ELBO, level="graph", **options):
    """A pair trained by its own Python, and a copy of it by a captured step, with both histories."""
    options = {"steps": 10, "seed": 3, "optimizer": rate(0.01)} | options | QUIET
    other = copy.deepcopy(pair)
    eager = fit(*pair, x, objective=objective(), capture="off", **options)
    caplog.set_level(logging.INFO, LOGGER)
    captured = fit(*other, x, objective=objective(), capture=level, **options)
    return eager, captured, other


def assert_captured(pair, x, caplog, **options):
    eager, captured, other = both(pair, x, caplog, **options)
    assert captured.loss == eager.loss
    assert captured.validation == eager.validation
    assert same(pair, other)
    assert all("are replayed" in way for way in ways(caplog)), ways(caplog)
    assert ways(caplog)


def assert_eager(pair, x, caplog, reason, **options):
    eager, captured, other = both(pair, x, caplog, **options)
    assert captured.loss == eager.loss
    assert same(pair, other)
    assert reason in ways(caplog)[-1]


def small(seed=0):
    torch.manual_seed(seed)
    return DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))


def rows(num=24):
    return torch.randn(num, 5, generator=torch.Generator().manual_seed(1))


# --- the same bits -----------------------------------------------------------------------------------------------

# Everything of ours; Trace_ELBO reads numbers from tensors.
CAPTURED = [name for name in OBJECTIVES if name != "Trace_ELBO"]


@under(*CAPTURED)
def test_ten_captured_steps_have_the_bits_of_ten_steps(make_pair, objective, caplog, monkeypatch):
    monkeypatch.setattr("inference.training.capturing.BUNCH", 2)  # four take as long again to record
    model, guide = make_pair()
    pair = objective.program(model), guide
    assert_captured(pair, data_for(model), caplog, objective=objective, optimizer=rate(0.01, fused=True))
    assert "2 at once" in ways(caplog)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 10])  # of 20: batches of two forms, or of one, which come in bunches
@under(*CAPTURED)
def test_two_hundred_captured_steps_have_the_same_bits(make_pair, objective, batch_size, caplog):
    model, guide = make_pair()
    pair = objective.program(model), guide
    options = {"steps": 200, "batch_size": batch_size, "optimizer": rate(0.01, fused=True)}
    assert_captured(pair, data_for(model), caplog, objective=objective, **options)
    assert any(f"{BUNCH} at once" in way for way in ways(caplog)) == (batch_size == 10)


@pytest.mark.parametrize("level", ["auto", "graph"])
def test_batches_of_two_sizes_have_a_graph_each(level, caplog, monkeypatch):
    monkeypatch.setattr(capturing, "_WAIT", 10)
    monkeypatch.setattr(capturing, "_WORTH", 20)
    assert_captured(small(), rows(), caplog, level=level, steps=120, batch_size=10)
    assert len(ways(caplog)) == 2


def test_a_short_run_is_not_captured_by_itself(caplog):
    assert_eager_silently(small(), rows(), caplog, level="auto", steps=100)


def assert_eager_silently(pair, x, caplog, **options):
    eager, captured, other = both(pair, x, caplog, **options)
    assert captured.loss == eager.loss
    assert same(pair, other)
    assert not ways(caplog)


class Clipped(Adam):
    """Clips gradients in place."""

    def step(self, closure=None):
        loss = closure()
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.1)
        super().step()
        return loss


OPTIONS = {
    "momentum": {"optimizer": lambda p: SGD(p, lr=1e-3, momentum=0.9)},
    "fused": {"optimizer": lambda p: Adam(p, lr=0.01, fused=True)},
    "LBFGS": {"optimizer": lambda p: LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"), "objective": AnalyticKLELBO},
    "clipped": {"optimizer": Clipped},
    "learning-rate schedule": {"scheduler": lambda o: ExponentialLR(o, 0.9), "batch_size": 8},
    "schedule of beta": {"objective": lambda: BetaELBO(LinearAnnealing(20)), "steps": 30},
    "validation": {"validation": rows(30), "evaluate_every": 4, "patience": 3, "steps": 60, "batch_size": 8},
    "snapshots": {"callbacks": [Snapshots(3)]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_else_a_run_has_keeps_its_bits(options, caplog):
    assert_captured(small(), rows(), caplog, **options)


def test_a_precision_that_rises_is_the_same_in_the_model(caplog):
    torch.manual_seed(0)
    pair = IMAVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    schedule = LinearAnnealing(20, start=0.2)
    assert_captured(pair, rows(), caplog, objective=lambda: AnnealedPrecision(ELBO(), schedule), steps=30)
    assert float(pair[0].gamma2) == 1.0


class Normalised(MeanField):
    """A guide with batch normalisation and dropout on its data."""

    def __init__(self):
        super().__init__(5, 2, hidden=(8,))
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.3)

    def forward(self, x=None, n=None):
        return super().forward(self.drop(self.norm(x)), n)


def test_batch_normalisation_and_dropout_keep_their_bits(caplog):
    torch.manual_seed(0)
    pair = DeepGaussianVAE(5, 2, hidden=(8,)), Normalised()
    assert_captured(pair, 5 + rows(), caplog, batch_size=8, steps=40)
    assert int(pair[1].norm.num_batches_tracked) >= 40
    assert float(pair[1].norm.running_mean.mean()) > 2


def function_pair():
    """Functions that name their parameters in param statements, on Pyro's own distributions."""

    def model(x):
        loading = pyro.param("loading", torch.ones(2, 5))
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loading, sigma).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.full((5, 2), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, 0.5).to_event(1))

    return model, guide


def test_functions_with_param_statements_and_checks_are_captured(caplog):
    results = []
    for level in ("off", "graph"):
        pyro.clear_param_store()
        caplog.set_level(logging.INFO, LOGGER)
        history = fit(*function_pair(), rows(), steps=30, seed=0, capture=level, optimizer=rate(0.05), **QUIET)
        results.append((history.loss, {k: v.detach().clone() for k, v in pyro.get_param_store().items()}))
    (loss, store), (other_loss, other_store) = results
    assert loss == other_loss
    assert all(torch.equal(value, other_store[name]) for name, value in store.items())
    assert ["are replayed" in way for way in ways(caplog)] == [True]


def test_pairs_trained_together_are_captured(caplog):
    torch.manual_seed(0)
    start = [small(seed) for seed in range(3)]
    trained = []
    for level in ("off", "graph"):
        caplog.set_level(logging.INFO, LOGGER)
        pairs = copy.deepcopy(start)
        history = fit_many(pairs, rows(), steps=20, seed=0, batch_size=8, capture=level, **QUIET)
        trained.append((history.loss, pairs))
    assert trained[0][0] == trained[1][0]
    assert all(map(same, trained[0][1], trained[1][1]))
    assert ["are replayed" in way for way in ways(caplog)] == [True, True]


# --- what a graph cannot know ------------------------------------------------------------------------------------


class Counting(DeepGaussianVAE):
    """Warms up by a count of its own calls."""

    def __init__(self):
        super().__init__(5, 2, hidden=(8,))
        self.calls = 0

    def likelihood(self, z):
        self.calls += 1
        return super().likelihood(z * min(self.calls / 100, 1.0))


def test_a_count_of_calls_is_seen_before_anything_is_captured(caplog):
    pair = Counting(), MeanField(5, 2, hidden=(8,))
    assert_eager(pair, rows(), caplog, "calls", steps=60)


class Shared(DeepGaussianVAE):
    """Counts for all of its class."""

    calls = 0

    def likelihood(self, z):
        type(self).calls += 1
        return super().likelihood(z if self.calls < 1000 else 2 * z)


def test_a_count_of_a_class_is_seen_too(caplog):
    pair = Shared(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    assert_eager(pair, rows(), caplog, "calls", steps=20)


def test_a_hook_that_counts_is_seen(caplog):
    pair, calls = small(), []
    caplog.set_level(logging.INFO, LOGGER)
    next(pair[0].parameters()).register_hook(lambda gradient: calls.append(1) or gradient / len(calls))
    fit(*pair, rows(), steps=5, capture="graph", **QUIET)
    assert len(calls) >= 5
    assert "hooks" in ways(caplog)[-1]


class Slotted:
    """Keeps a count outside a dictionary."""

    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def next(self):
        self.calls += 1
        return self.calls


def count_itself():
    count_itself.calls += 1
    return count_itself.calls


class Warming(DeepGaussianVAE):
    """Warms up late, by a count of some kind."""

    def __init__(self, count):
        super().__init__(5, 2, hidden=(8,))
        self.count = count

    def likelihood(self, z):
        return super().likelihood(z if self.count() < 30 else 2 * z)


def counts_up():
    numbers = itertools.count()
    return lambda: next(numbers)


def counts_by_queue():
    calls = collections.deque()
    return lambda: calls.append(1) or len(calls)


def counts_by_attribute():
    count_itself.calls = 0
    return count_itself


@pytest.mark.parametrize("count", [counts_up, counts_by_queue, counts_by_attribute, lambda: Slotted().next])
def test_a_warm_up_that_begins_late_keeps_its_bits(count, caplog):
    trained = []
    caplog.set_level(logging.INFO, LOGGER)
    for level in ("off", "graph"):
        torch.manual_seed(0)
        pair = Warming(count()), MeanField(5, 2, hidden=(8,))
        trained.append((fit(*pair, rows(), steps=60, seed=3, capture=level, **QUIET).loss, pair))
    assert trained[0][0] == trained[1][0]
    assert same(trained[0][1], trained[1][1])
    assert "the pair's own Python" in ways(caplog)[-1]


def test_a_hidden_change_is_found_by_comparison_and_undone(caplog):
    pair = Late(2), MeanField(5, 2, hidden=(8,))  # the step, its capture, and then the first check
    caplog.set_level(logging.INFO, LOGGER)
    with pytest.warns(UserWarning, match="not what the pair does: its loss is another.*steps 0 to 50 are taken again"):
        history = fit(*pair, rows(), capture="graph", steps=60, seed=3, **QUIET)
    assert history.steps == 60
    assert "another on the same noise" in ways(caplog)[-1]


class Branching(DeepGaussianVAE):
    """Takes another way on data of a large mean."""

    def likelihood(self, z):
        if z.mean() > 0:
            return super().likelihood(z)
        return super().likelihood(-2 * z)


def test_a_branch_on_values_ends_the_capture_and_keeps_the_bits(caplog):
    torch.manual_seed(0)
    pair = Branching(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    with pytest.warns(UserWarning, match="depends on values; steps 0 to"):
        assert_eager(pair, rows(), caplog, "depends on values", steps=120, batch_size=8)


class Tracked(DeepGaussianVAE):
    """Reads a number of a tensor."""

    def likelihood(self, z):
        return super().likelihood(z * float(z.detach().std()))


class Compressing(DeepGaussianVAE):
    """Takes the rows of a mask, as many as there are."""

    def likelihood(self, z):
        return super().likelihood(z + z[z > 0].mean())


class Drawing(DeepGaussianVAE):
    """Draws from Python's generator."""

    def likelihood(self, z):
        return super().likelihood(z + random.random())


class Numpy(DeepGaussianVAE):
    """Goes through NumPy, of which no trace sees anything."""

    def likelihood(self, z):
        return super().likelihood(z * float(z.detach().numpy().std()))


UNSEEN = {
    "a number": (Tracked, "a number is read from a tensor"),
    "a shape": (Compressing, "depends on values"),
    "Python's generator": (Drawing, "the state of random"),
}


@pytest.mark.parametrize(("model", "reason"), UNSEEN.values(), ids=UNSEEN)
def test_what_cannot_be_captured_runs_as_it_is(model, reason, caplog):
    torch.manual_seed(0)
    random.seed(0)
    pair = model(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    options = {"steps": 12, "seed": 0, "optimizer": rate(0.01), **QUIET}
    results = []
    for level in ("off", "graph"):
        random.seed(0)
        trained = copy.deepcopy(pair)
        caplog.set_level(logging.INFO, LOGGER)
        results.append((fit(*trained, rows(), capture=level, **options).loss, trained))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    assert reason in ways(caplog)[-1]


def test_a_second_form_that_fails_checks_the_first(caplog):
    class Ragged(DeepGaussianVAE):
        def likelihood(self, z):
            return super().likelihood(z if len(z) == 10 else z * float(z.detach().std()))

    torch.manual_seed(0)
    pair = Ragged(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    assert_eager(pair, rows(), caplog, "a number is read from a tensor", batch_size=10, steps=20)
    assert "are replayed" in ways(caplog)[0]


def test_forms_beyond_some_are_not_captured(caplog, monkeypatch):
    monkeypatch.setattr(capturing, "_MOST", 1)
    assert_captured(small(), rows(), caplog, batch_size=10)
    assert len(ways(caplog)) == 1


def test_numbers_that_go_through_numpy_are_not_captured(caplog):
    torch.manual_seed(0)
    pair = Numpy(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    assert_eager(pair, rows(), caplog, "reads numbers from tensors, by numpy", steps=120)


class Anneal(Callback):
    """Changes the model as it trains."""

    def on_step(self, moment):
        moment.model.weight = moment.step


class Evaluated(Callback):
    def on_evaluate(self, moment):
        moment.model.factor = 2.0


class Weighted(DeepGaussianVAE):
    factor = 1.0

    def likelihood(self, z):
        return super().likelihood(self.factor * z)


def test_what_callbacks_change_is_seen(caplog):
    torch.manual_seed(0)
    pair = Weighted(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
    assert_eager(copy.deepcopy(pair), rows(), caplog, "a callback on every step", callbacks=[Anneal()])
    options = {"callbacks": [Evaluated()], "validation": rows(30), "evaluate_every": 7, "steps": 20}
    assert_eager(pair, rows(), caplog, "by a callback", **options)


def falling(x):
    """A model whose second scale falls to zero and on, by one step a time."""
    weight = pyro.param("weight", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + weight, 1.0), obs=x + 3)
        pyro.sample("y", dist.Normal(0.0, 1.5 - weight), obs=torch.zeros(len(x)))


def standing(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5).expand([len(x)]))


def test_an_argument_out_of_its_domain_is_the_same_error():
    losses = []
    for level in ("off", "graph"):
        pyro.clear_param_store()
        noticed = pytest.warns(UserWarning, match="depends on values") if level == "graph" else nullcontext()
        with pytest.raises(ValueError, match="Expected parameter scale") as error, noticed:
            fit(falling, standing, rows()[:, 0], steps=400, seed=0, capture=level, optimizer=rate(0.02), **QUIET)
        losses.append(error.value.history.loss)
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 50


def test_a_loss_that_is_not_finite_is_the_same_error(caplog):
    errors = []
    for level in ("off", "graph"):
        pair = small()
        caplog.set_level(logging.INFO, LOGGER)
        with pytest.raises(FloatingPointError, match="at step") as error:
            fit(*pair, rows(), steps=400, seed=0, capture=level, optimizer=lambda p: SGD(p, lr=2.0), **QUIET)
        errors.append((str(error.value), error.value.history.loss, pair))
    assert errors[0][:2] == errors[1][:2]
    assert same(errors[0][2], errors[1][2])
    assert "are replayed" in ways(caplog)[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_step_agrees_within_rounding(caplog):
    pair = small()
    eager, compiled, other = both(pair, rows(), caplog, level="compile", steps=60, batch_size=8)
    assert ["are replayed" in way for way in ways(caplog)] == [True, True]
    torch.testing.assert_close(torch.tensor(compiled.loss), torch.tensor(eager.loss), rtol=1e-4, atol=1e-4)
    for one, two in zip(pair, other, strict=True):
        torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=1e-3, atol=1e-4)


def test_levels_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match=r"expected capture as one of 'auto', .*got 'cuda'"):
        fit(*small(), rows(), steps=1, capture="cuda", **QUIET)


# --- resuming ----------------------------------------------------------------------------------------------------


class Interrupting(Callback):
    """Interrupts from within an evaluation."""

    def __init__(self, at):
        self.at = at

    def on_evaluate(self, moment):
        if moment.step >= self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("first", ["off", "graph"])
def test_a_captured_run_resumes_to_the_same_bits(first, tmp_path):
    options = {"steps": 90, "seed": 3, "optimizer": rate(0.01), "batch_size": 8, **QUIET}
    options |= {"validation": rows(30), "evaluate_every": 20}
    files = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 30}
    straight, stopped, resumed = small(), small(), small()
    expected = fit(*straight, rows(), capture="off", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(*stopped, rows(), capture=first, callbacks=[Interrupting(50)], **options, **files)
    history = fit(*resumed, rows(), capture="graph", **options, **files)
    assert history.loss == expected.loss
    assert history.validation == expected.validation
    assert same(straight, resumed)


def test_a_compiled_gradient_may_round_what_cancels_and_nothing_more():
    large, small = torch.full((50,), 10.0), torch.tensor([0.1])
    assert all_close([large, small + 5e-5], [large, small])
    assert not all_close([small + 5e-4], [small])
    assert not all_close([large * 1.001, small], [large, small])
    assert not all_close([large, small * 1.1], [large, small])
    assert all_close([small + 5e-5], [small], loss=1e3)  # a noise variance, whose terms are those of the loss
    assert not all_close([small + 5e-4], [small], loss=1e3)
    assert not all_close([large, None], [large, small])


def test_kernels_that_do_not_repeat_their_bits_are_compared_anew():
    tries = []

    def compare(rounds):
        tries.append(1)
        other = torch.ones(4)
        check_agreement(all_same, [("loss", [other + 1e-6 * (len(tries) <= rounds)], [other])])

    compared(lambda: compare(2))
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(Rounded, match="by rounding alone"):
        compared(lambda: compare(3))
    assert len(tries) == 3
    with pytest.raises(Stale, match=r"its loss is another on the same noise$") as error:
        compared(lambda: check_agreement(all_same, [("loss", [torch.ones(2)], [torch.zeros(2)])]))
    assert not isinstance(error.value, Rounded)


def test_what_is_not_finite_agrees_where_it_is_so_in_both():
    broken = torch.tensor([math.nan, math.inf, 1.0])
    assert all_close([broken], [broken.clone()])
    assert not all_close([broken], [torch.ones(3)])
    assert not all_close([torch.ones(3)], [broken])
    assert not all_close([broken + 0.1], [broken])
