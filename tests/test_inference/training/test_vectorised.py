"""Pairs trained together become what they become alone."""

import copy
import math
import operator

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from guides import Exact, Linear, MeanField
from inference import (
    IWELBO,
    AnalyticBetaELBO,
    AnalyticELBO,
    AnalyticKLELBO,
    AnnealedPrecision,
    BetaELBO,
    GeometricAnnealing,
    LinearAnnealing,
    elbo,
    fit,
    fit_many,
    log_weights,
)
from inference.training import vectorised
from zoo import IMAVAE, DeepGaussianVAE, FixedNoise, LinearVAE, Uniform

OPTIONS = {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-2), "seed": 3, "progress": False}


def linear_pairs(num):
    return [(LinearVAE(4, 2).double(), Linear(4, 2).double()) for _ in range(num)]


def states(pairs):
    return [torch.nn.ModuleList(pair).state_dict() for pair in pairs]


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_without_noise_each_pair_becomes_what_it_becomes_alone(shared, batch_size):
    data = torch.randn(3, 20, 4).double()
    rows = [data[0] if shared else x for x in data]
    together = linear_pairs(3)
    alone = copy.deepcopy(together)
    options = OPTIONS | {"steps": 30, "batch_size": batch_size}
    history = fit_many(together, data[0] if shared else list(data), objective=AnalyticELBO(), **options)
    losses = [fit(*pair, x, objective=AnalyticELBO(), **options).loss for pair, x in zip(alone, rows, strict=True)]
    for one, other in zip(states(together), states(alone), strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(history.loss, np.sum(losses, 0), rtol=1e-9)
    assert not any(half.training for pair in together for half in pair)


def test_an_interrupt_among_swapped_tensors_leaves_pairs_their_own(monkeypatch, tmp_path):
    """As one that comes between the swap of ``functional_call`` and the block that would undo it."""
    calls = []

    def swapped(both, tensors, args):
        calls.append(args)
        if len(calls) < 8:
            return functional_call(both, tensors, args)
        for name, tensor in tensors.items():
            owner, _, last = name.rpartition(".")
            module = both.get_submodule(owner)
            (module._parameters if last in module._parameters else module._buffers)[last] = tensor
        raise KeyboardInterrupt

    monkeypatch.setattr(vectorised, "functional_call", swapped)
    pairs, x = linear_pairs(2), torch.randn(20, 4).double()
    own = [[*model.parameters(), *guide.parameters()] for model, guide in pairs]
    before = copy.deepcopy(states(pairs))
    with pytest.raises(KeyboardInterrupt):
        fit_many(pairs, x, objective=AnalyticELBO(), **OPTIONS, steps=10, checkpoint=tmp_path / "sweep.safetensors")
    for (model, guide), parameters, old in zip(pairs, own, before, strict=True):
        assert all(map(operator.is_, [*model.parameters(), *guide.parameters()], parameters))
        new = torch.nn.ModuleList((model, guide)).state_dict()
        assert any(not torch.equal(new[name], old[name]) for name in new)  # of the steps that were made
        assert all(value.isfinite().all() for value in new.values())


def mean_elbo(pair, x):
    return float(elbo(log_weights(*pair, x, num_samples=20)).value.mean())


def bounded_pair():
    model = IMAVAE(3, 2, hidden=(8,), prior=Uniform(2, -0.5, 0.5)).double()
    return model, MeanField(3, 2, hidden=(8,), support=model.prior().support).double()


@pytest.mark.parametrize("objective", [AnalyticKLELBO, lambda: IWELBO(num_particles=5)])
def test_each_pair_has_its_own_noise_and_the_single_expected_step(objective):
    # One step of plain descent from one starting point for all pairs: its mean over many pairs is that of many single
    # steps, in each of some hundred coordinates within the 4.5 standard errors that chance leaves at odds of 1 : 1000.
    num, x = 100, torch.randn(6, 3).double()
    start = bounded_pair()

    def moves(train):
        pairs = [copy.deepcopy(start) for _ in range(num)]
        train(pairs)
        return torch.stack([parameters_to_vector(torch.nn.ModuleList(p).parameters()) for p in pairs]).detach()

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e-3)

    options = {"steps": 1, "optimizer": sgd, "progress": False}

    def singly(pairs):
        for seed, pair in enumerate(pairs):
            fit(*pair, x, objective=objective(), seed=seed, **options)

    one = moves(lambda pairs: fit_many(pairs, x, objective=objective(), seed=0, **options))
    other = moves(singly)
    spread = (one.var(0) + other.var(0)).sqrt() / math.sqrt(num)
    noisy = spread > 0
    assert int(noisy.sum()) > 20
    score = ((one.mean(0) - other.mean(0))[noisy] / spread[noisy]).abs()
    assert float(score.max()) < 4.5
    torch.testing.assert_close(one.std(0)[noisy], other.std(0)[noisy], rtol=4 * math.sqrt(1 / num), atol=0)
    assert len(one.unique(dim=0)) == num


def test_schedules_and_buffers_are_handed_back():
    pairs = [bounded_pair() for _ in range(2)]
    x = [5 * s + torch.randn(30, 3).double() for s in (1, 2)]
    for (model, guide), rows in zip(pairs, x, strict=True):
        model.standardise_by(rows), guide.standardise_by(rows)
    shifts = [model.standardise.shift.clone() for model, _ in pairs]
    objective = AnnealedPrecision(AnalyticKLELBO(), GeometricAnnealing(10, 10.0, 1e3))
    before = [mean_elbo(pair, rows) for pair, rows in zip(pairs, x, strict=True)]
    fit_many(pairs, x, objective=objective, steps=200, **OPTIONS)
    for (model, guide), rows, shift, worse in zip(pairs, x, shifts, before, strict=True):
        assert float(model.gamma2) == pytest.approx(1e3)
        assert torch.equal(model.standardise.shift, shift)
        assert mean_elbo((model, guide), rows) > worse + 1


def test_an_interrupted_sweep_goes_on_to_the_same_bits(tmp_path):
    torch.manual_seed(1)
    start, x = [bounded_pair() for _ in range(2)], torch.randn(20, 3).double()
    options = OPTIONS | {"batch_size": 8, "objective": AnalyticKLELBO()}
    whole, resumed, first = (copy.deepcopy(start) for _ in range(3))
    fit_many(whole, x, steps=12, **options)
    fit_many(first, x, steps=5, checkpoint=tmp_path / "sweep.safetensors", **options)
    fit_many(resumed, x, steps=12, checkpoint=tmp_path / "sweep.safetensors", **options)
    for one, other in zip(states(whole), states(resumed), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_frozen_parameters_stay_and_guides_see_their_model():
    pairs = [(model, Exact(model)) for model, _ in linear_pairs(2)]
    for model, _ in pairs:
        model.log_sigma.requires_grad_(False)
    alone = copy.deepcopy(pairs)
    x = torch.randn(20, 4).double()
    fit_many(pairs, x, objective=AnalyticELBO(), steps=20, **OPTIONS)
    for pair in alone:
        fit(*pair, x, objective=AnalyticELBO(), steps=20, **OPTIONS)
    for one, other in zip(states(pairs), states(alone), strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-11)


def test_pairs_and_data_that_do_not_fit_are_refused():
    x = torch.randn(20, 4).double()
    options = OPTIONS | {"steps": 1}
    with pytest.raises(ValueError, match="expected one pair or more, got none"):
        fit_many([], x, **options)
    with pytest.raises(ValueError, match=r"one architecture, got ones that differ in \['guide"):
        fit_many([*linear_pairs(1), (LinearVAE(4, 2).double(), MeanField(4, 2).double())], x, **options)
    with pytest.raises(ValueError, match="expected one tensor, or 2 of one shape, got 1"):
        fit_many(linear_pairs(2), [x], **options)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 4\), got \(20, 3\)"):
        fit_many(linear_pairs(2), x[:, :3], **options)
    with pytest.raises(TypeError, match="expected pairs of modules, got function"):
        fit_many([(lambda x: x, lambda x: x)], x, **options)


class StockGuide(torch.nn.Module):
    """A guide on a distribution of Pyro's own, whose sampler writes its noise in place."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(4, 2).double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(5.0, self.encoder(x), 1.0).to_event(1))


def test_a_stock_sampler_is_refused_with_the_rule_that_it_breaks():
    pairs, x = [(LinearVAE(4, 2).double(), StockGuide()) for _ in range(2)], torch.randn(20, 4).double()
    fit(*copy.deepcopy(pairs[0]), x, steps=2, progress=False)  # by itself it trains
    with pytest.raises(ValueError, match=r"noise by torch.randn or torch.rand.*got StudentT at site 'z'"):
        fit_many(pairs, x, steps=2, progress=False)


def test_pairs_get_their_last_good_state_back_from_an_error(tmp_path):
    def interrupted(parameters):
        made, updates = torch.optim.Adam(parameters, 1e-2), []

        def after(*_):
            updates.append(1)
            if len(updates) == 5:
                raise KeyboardInterrupt

        made.register_step_post_hook(after)
        return made

    x, options = torch.randn(20, 5).double(), {"seed": 0, "progress": False}
    plain = {**options, "optimizer": lambda p: torch.optim.Adam(p, 1e-2)}
    torch.manual_seed(1)
    stopped, expected = ([(LinearVAE(5, 2).double(), MeanField(5, 2).double()) for _ in range(2)] for _ in range(2))
    for a, b in zip(stopped, expected, strict=True):
        for half, other in zip(a, b, strict=True):
            half.load_state_dict(other.state_dict())
    with pytest.raises(KeyboardInterrupt):
        fit_many(stopped, x, steps=9, optimizer=interrupted, checkpoint=tmp_path / "sweep.safetensors", **options)
    fit_many(expected, x, steps=4, **plain)
    for a, b in zip(stopped, expected, strict=True):
        for half, other in zip(a, b, strict=True):
            assert not half.training
            assert all(torch.equal(p, q) for p, q in zip(half.parameters(), other.parameters(), strict=True))


# --- what differs from pair to pair --------------------------------------------------------------------------------

KINDS = {
    "Adam": lambda p, lr=1.0: torch.optim.Adam(p, lr=lr),
    "AdamW": lambda p, lr=1.0: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "SGD": lambda p, lr=1.0: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.01),
    "RMSprop": lambda p, lr=1.0: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
}


def assert_each_as_alone(together, alone):
    for one, other in zip(states(together), states(alone), strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_learning_rates_by_pair_are_those_of_each_alone(make):
    x, rates = torch.randn(20, 4).double(), [1e-2, 3e-4, 2e-3]
    together = linear_pairs(3)
    alone = copy.deepcopy(together)
    options = {"objective": AnalyticELBO(), "steps": 30, "seed": 3, "progress": False}
    options["scheduler"] = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.95)
    fit_many(together, x, optimizer=make, learning_rate=rates, capture="off", **options)
    for pair, rate in zip(alone, rates, strict=True):
        fit(*pair, x, optimizer=lambda p, rate=rate: make(p, rate), **options)
    assert_each_as_alone(together, alone)


@pytest.mark.parametrize("make", [None, KINDS["SGD"]], ids=["in bunches", "singly"])
def test_learning_rates_by_pair_keep_their_bits_when_captured(make):
    start, trained = linear_pairs(3), []
    for level in ("off", "graph"):
        pairs = copy.deepcopy(start)
        options = {"steps": 20, "learning_rate": [0.1, 0.01, 0.001], "capture": level, "progress": False, "seed": 0}
        options |= {} if make is None else {"optimizer": make}
        trained.append((fit_many(pairs, torch.ones(8, 4).double(), **options).loss, states(pairs)))
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(trained[0][1], trained[1][1], strict=True) for n in a)


def linear_betas(betas):
    return [AnalyticBetaELBO(beta) for beta in betas]


@pytest.mark.parametrize("capture", ["off", "graph"])
def test_betas_by_pair_are_those_of_each_alone(capture):
    objectives, x, together = linear_betas([0.5, 1.0, 3.0]), torch.randn(20, 4).double(), linear_pairs(3)
    alone = copy.deepcopy(together)
    options = OPTIONS | {"steps": 30, "capture": capture}
    history = fit_many(together, x, objective=objectives, **options)
    losses = [fit(*pair, x, objective=o, **options).loss for pair, o in zip(alone, objectives, strict=True)]
    assert_each_as_alone(together, alone)
    np.testing.assert_allclose(history.loss, np.sum(losses, 0), rtol=1e-9)
    assert [o.beta for o in objectives] == [0.5, 1.0, 3.0]


def test_schedules_of_beta_by_pair_are_those_of_each_step():
    # Guide and model do not move: the losses differ by the weight alone, and by the rate that it multiplies.
    schedules = [0.0, 1.0, LinearAnnealing(4, start=0.0)]
    start, x = linear_pairs(1)[0], torch.randn(500, 4).double()
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "steps": 5, "seed": 0, "progress": False}

    def losses(chosen):
        pairs = [copy.deepcopy(start) for _ in chosen]
        return np.array(fit_many(pairs, x, objective=[BetaELBO(s) for s in chosen], **options).loss)

    zero, one, rising = (losses([schedule] * 3) for schedule in schedules)
    np.testing.assert_allclose(rising, zero + [0, 0.25, 0.5, 0.75, 1] * (one - zero), rtol=1e-12)
    mixed = losses(schedules)
    assert np.all(np.abs(mixed - (zero + one + rising) / 3) < 0.1 * (one - zero))
    assert np.all(one - zero > 0.1)


def test_precisions_by_pair_follow_schedules_of_their_own():
    schedules = [GeometricAnnealing(5, 10.0, end) for end in (1e2, 1e4)]
    pairs = [(IMAVAE(3, 2, hidden=(4,)), MeanField(3, 2, hidden=(4,))) for _ in schedules]
    objectives = [AnnealedPrecision(AnalyticKLELBO(), schedule) for schedule in schedules]
    fit_many(pairs, torch.randn(12, 3), objective=objectives, steps=8, progress=False)
    assert [round(float(model.gamma2)) for model, _ in pairs] == [100, 10000]


def test_fixed_variances_by_pair_are_those_of_each_alone():
    x = torch.randn(20, 4).double()
    together = [
        (DeepGaussianVAE(4, 2, hidden=(3,), noise=FixedNoise(sigma)).double(), MeanField(4, 2, hidden=(3,)).double())
        for sigma in (0.3, 1.0)
    ]
    before = [float(elbo(log_weights(*pair, x, num_samples=10, seed=0)).value.mean()) for pair in together]
    fit_many(together, x, steps=20, **OPTIONS)
    after = [float(elbo(log_weights(*pair, x, num_samples=10, seed=0)).value.mean()) for pair in together]
    assert after[0] - before[0] > 5 * (after[1] - before[1]) > 0  # noise of .3 leaves 11 times the error to explain


ALIKE = "expected pairs that differ in their parameters and buffers alone, got pair 1 where"
DIFFERENT = {
    "two seeds": ({"seed": [0, 1]}, ValueError, r"expected one seed.*got \[0, 1\].*made under them"),
    "a rate too few": ({"learning_rate": [0.1]}, ValueError, r"for each of 2 pairs, got \[0.1\]"),
    "a negative rate": ({"learning_rate": [0.1, -1.0]}, ValueError, "positive learning rate"),
    "an objective too few": ({"objective": [AnalyticELBO()]}, ValueError, "one for each of 2 pairs, got 1"),
    "two classes": ({"objective": [AnalyticELBO(), AnalyticKLELBO()]}, ValueError, "their weights alone.*class"),
    "two numbers": ({"objective": [IWELBO(2), IWELBO(3)]}, ValueError, "their weights alone.*num_particles"),
    "LBFGS": ({"learning_rate": [0.1, 0.2], "optimizer": torch.optim.LBFGS}, TypeError, "proportional.*got LBFGS"),
}


@pytest.mark.parametrize(("options", "kind", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_cannot_differ_by_pair_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        fit_many(linear_pairs(2), torch.ones(6, 4).double(), steps=1, progress=False, **options)


def test_pairs_of_different_python_are_refused():
    pairs = [(LinearVAE(4, 2), Linear(4, 2)) for _ in range(2)]
    pairs[1][0].factor = 2.0
    with pytest.raises(ValueError, match=f"{ALIKE}.*factor"):
        fit_many(pairs, torch.ones(6, 4), steps=1, progress=False)
    priors = [Uniform(2, -end, end) for end in (0.5, 2.0)]
    bounded = [
        (IMAVAE(3, 2, hidden=(8,), prior=prior), MeanField(3, 2, hidden=(8,), support=prior().support))
        for prior in priors
    ]
    with pytest.raises(ValueError, match=ALIKE):
        fit_many(bounded, torch.ones(6, 3), steps=1, progress=False)


def test_a_sweep_of_other_learning_rates_is_another_run(tmp_path):
    options = {"steps": 4, "seed": 0, "checkpoint": tmp_path / "run.safetensors", "progress": False}
    fit_many(linear_pairs(2), torch.ones(6, 4).double(), learning_rate=[0.1, 0.2], **options)
    with pytest.raises(ValueError, match="belongs to another one"):
        fit_many(linear_pairs(2), torch.ones(6, 4).double(), learning_rate=[0.1, 0.3], **options)
