"""Habits of torch's and Pyro's users: each works, or is one sentence that names the argument and what to pass."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from torch import nn

from guides import Linear
from inference import AnalyticKLELBO, Importance, compare, evidence, fit, fit_many, gap, gradient_noise, log_weights
from zoo import PPCA, LinearVAE, WrappedDecoder, linear_gaussian, named_dataset

X = linear_gaussian(40, 5, 2).train
MODEL, GUIDE = LinearVAE(5, 2).double(), Linear(5, 2).double()
READY = torch.optim.Adam(GUIDE.parameters())


def train(**options):
    return fit(MODEL, GUIDE, X, steps=2, progress=False, **options)


OPTIMISER = "expected optimizer as a function of the parameters, such as torch.optim.Adam or lambda p: .*, got "
SCHEDULE = "expected scheduler as a function of the optimiser, such as lambda o: .*, got "
REFUSED = {
    "a ready optimiser": (lambda: train(optimizer=READY), TypeError, OPTIMISER + r"a ready torch\.optim\.adam\.Adam"),
    "Pyro's optimiser": (lambda: train(optimizer=pyro.optim.Adam({"lr": 1e-3})), TypeError, OPTIMISER + "one of pyro"),
    "Pyro's maker": (
        lambda: train(optimizer=pyro.optim.Adam),
        TypeError,
        OPTIMISER + "one of pyro",
    ),
    "an optimiser's name": (lambda: train(optimizer="adam"), TypeError, OPTIMISER + "'adam'"),
    "a schedule's name": (lambda: train(scheduler="cosine"), TypeError, SCHEDULE + "'cosine'"),
    "an objective's class": (lambda: train(objective=AnalyticKLELBO), TypeError, r"mean objective=AnalyticKLELBO\(\)"),
    "an objective's name": (lambda: train(objective="elbo"), TypeError, "expected an objective, such as .*, got str"),
    "a class for many": (
        lambda: fit_many([(MODEL, GUIDE)], X, steps=1, objective=AnalyticKLELBO),
        TypeError,
        "expected an objective, got a class",
    ),
    "a class for noise": (
        lambda: gradient_noise(AnalyticKLELBO, MODEL, GUIDE, X, num_repeats=2),
        TypeError,
        "expected an objective, got a class",
    ),
    "a method's class": (
        lambda: evidence(MODEL, X, guide=GUIDE, method=Importance),
        TypeError,
        r"got its class: did you mean Importance\(\)\?",
    ),
    "a seed in words": (
        lambda: log_weights(MODEL, GUIDE, X, num_samples=2, seed="3"),
        TypeError,
        "expected seed to be an",
    ),
    "half a seed": (lambda: train(seed=1.5), TypeError, "expected seed to be an integer, got 1.5"),
    "a negative seed": (lambda: evidence(MODEL, X, seed=-1), ValueError, "expected seed to be at least 0, got -1"),
    "a guide for guides": (lambda: compare(MODEL, GUIDE, X), ValueError, "mapping from names .*, got Linear$"),
    "more rows than data": (
        lambda: compare(MODEL, {"a": GUIDE}, X, split=41),
        ValueError,
        "expected split of at most the 40 rows of x, got 41",
    ),
    "a name with a slip": (lambda: named_dataset("minst"), FileNotFoundError, "one of digits, .*, got 'minst'"),
    "a decoder of another size": (
        lambda: WrappedDecoder(nn.Linear(2, 5), lambda m: torch.distributions.Normal(m, 1.0), 5, 3)(n=4),
        ValueError,
        r"expected a network of inputs \(M, latent_dim=3\)",
    ),
    "a data frame with text": (
        lambda: PPCA.from_data(pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}), 1),
        TypeError,
        "a data frame whose columns hold numbers, got b",
    ),
    "a learning rate": (lambda: train(optimizer=1e-3), TypeError, OPTIMISER + "0.001"),
    "a function for callbacks": (lambda: train(callbacks=print), TypeError, "callbacks as a list of .*, got <built-in"),
    "a model's class": (lambda: fit(LinearVAE, GUIDE, X, steps=2), TypeError, "instances, got the class LinearVAE"),
    "a guide's class": (
        lambda: log_weights(MODEL, Linear, X, num_samples=2),
        TypeError,
        "instances, got the class Linear",
    ),
    "a number for evidence": (lambda: gap(MODEL, GUIDE, X, known=-3.0), TypeError, "expected known= as what"),
    "a torch module for a model": (
        lambda: fit(nn.Linear(5, 2).double(), GUIDE, X, steps=2, progress=False),
        ValueError,
        "without a sample site",
    ),
    "halves swapped, for evidence": (lambda: evidence(GUIDE, X, guide=MODEL), ValueError, "model and guide swapped"),
    "one row": (lambda: PPCA.from_data(X[:1], 2), ValueError, "the data are constant, or a single row"),
    "missing values": (lambda: evidence(lambda x: MODEL(x), X * torch.nan, guide=GUIDE), ValueError, "expected x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_habit_that_cannot_work_is_one_sentence(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": torch.optim.Adam},
        {"optimizer": torch.optim.LBFGS},
        {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 10)},
        {"objective": pyro.infer.Trace_ELBO()},
        {"seed": np.int64(3)},
    ],
    ids=["class", "LBFGS", "schedule", "Pyro's objective", "NumPy's seed"],
)
def test_a_habit_that_can_work_does(options):
    assert train(**options).steps == 2


def test_a_numpy_seed_is_the_seed():
    draws = [log_weights(MODEL, GUIDE, X, num_samples=2, seed=seed) for seed in (3, np.int64(3))]
    assert torch.equal(*draws)


def test_data_far_from_the_networks_unit_are_warned_of(caplog):
    raw = 255 * X
    fit(LinearVAE(5, 2).double(), Linear(5, 2).double(), raw, steps=2, progress=False)
    assert caplog.text.count("call standardise_by(x_train)") == 2
    caplog.clear()
    fit(*(half.double().standardise_by(raw) for half in (LinearVAE(5, 2), Linear(5, 2))), raw, steps=2, progress=False)
    assert "standardise_by" not in caplog.text
