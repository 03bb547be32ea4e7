"""Habits of torch's and Pyro's users: each works, or is one sentence that names the argument and what to pass."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from torch import nn

from guides import Exact, Linear, MeanField
from inference import (
    AnalyticKLELBO,
    BetaELBO,
    Importance,
    bdmc,
    compare,
    evidence,
    fit,
    fit_many,
    gap,
    gradient_noise,
    log_weights,
    memory_limit,
)
from zoo import (
    IMAVAE,
    PPCA,
    DeepGaussianVAE,
    LinearVAE,
    WrappedDecoder,
    card,
    linear_gaussian,
    load,
    named_dataset,
)

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
    "a guide's name": (
        lambda: fit(MODEL, "mean_field", X, steps=2),
        TypeError,
        "each as a Pyro program, a module or a function, got str",
    ),
    "the data first": (lambda: gap(X, MODEL, GUIDE), TypeError, "each as a Pyro program, .*, got Tensor"),
    "a pair for evidence": (lambda: evidence((MODEL, GUIDE), X), TypeError, "each as a Pyro program, .*, got tuple"),
    "a class for evidence": (lambda: evidence(LinearVAE, X), TypeError, "instances, got the class LinearVAE"),
    "a class for an exact guide": (lambda: Exact(PPCA), TypeError, "instances, got the class PPCA"),
    "a torch module for evidence": (
        lambda: evidence(nn.Linear(5, 2).double(), X),
        ValueError,
        "expected a Pyro model, got a program without a sample site",
    ),
    "a level in words": (lambda: evidence(MODEL, X, level="0.9"), TypeError, "level to be a number, got '0.9'"),
    "a tolerance in words": (lambda: evidence(MODEL, X, tolerance="1"), TypeError, "tolerance to be a number, got '1'"),
    "a weight in words": (lambda: BetaELBO("1"), TypeError, "expected beta to be a number, got '1'"),
    "a precision in words": (lambda: IMAVAE(5, 2, gamma2="9"), TypeError, "expected gamma2 to be a number, got '9'"),
    "a limit in words": (lambda: memory_limit("64"), TypeError, "number of megabytes to be a number, got '64'"),
    "one row argument": (lambda: evidence(MODEL, X, rows=0), TypeError, r"rows as a list of positions .*, got 0"),
    "a seed too large": (
        lambda: train(seed=2**64),
        ValueError,
        r"expected seed below 2\*\*63, got 18",
    ),
    "sparse data": (lambda: fit(MODEL, GUIDE, X.to_sparse(), steps=2), TypeError, r"expected dense .* by x\.to_dense"),
    "an optimiser of nothing": (lambda: train(optimizer=lambda: READY), TypeError, OPTIMISER + "a function that fails"),
    "a schedule's class": (
        lambda: train(scheduler=torch.optim.lr_scheduler.StepLR),
        TypeError,
        SCHEDULE + "a function that fails: .* 'step_size'",
    ),
    "a size in words": (lambda: Linear("5", 2), TypeError, "expected data_dim to be an integer, got '5'"),
    "no latents": (lambda: MeanField(5, 0), ValueError, "expected latent_dim to be at least 1, got 0"),
    "one hidden width": (lambda: MeanField(5, 2, hidden=8), TypeError, "widths of all hidden layers, .*, got 8"),
    "a hidden width below one": (lambda: DeepGaussianVAE(5, 2, hidden=(8, 0)), ValueError, "a hidden width .* got 0"),
    "another method for bdmc": (
        lambda: bdmc(MODEL, 4, method=Importance(5)),
        TypeError,
        "method as Annealed",
    ),
    "a card of an array": (
        lambda: card(MODEL, GUIDE, X.numpy()),
        TypeError,
        "data as a tensor .*, got ndarray",
    ),
    "a tensor's name": (lambda: named_dataset(X), TypeError, "name of a data set or a path, got Tensor"),
    "a folder for a file": (lambda: named_dataset("/"), FileNotFoundError, "but that is a folder"),
    "a pair with a slip": (lambda: load("linear_vae/digit"), ValueError, "did you mean linear_vae/digits"),
    "a guide of another width": (
        lambda: fit(MODEL, Linear(4, 2).double(), X, steps=2),
        ValueError,
        r"^Linear: expected x of shape \(N, 4\), got \(40, 5\)",
    ),
    "a guide of another dtype": (
        lambda: log_weights(MODEL, Linear(5, 2), X, num_samples=2),
        TypeError,
        "^Linear: expected x of dtype torch.float32, .*, got torch.float64",
    ),
    "one row": (lambda: PPCA.from_data(X[:1], 2), ValueError, "the data are constant, or a single row"),
    "missing values": (lambda: evidence(lambda x: MODEL(x), X * torch.nan, guide=GUIDE), ValueError, "expected x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_habit_that_cannot_work_is_one_sentence(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert len(str(caught.value)) < (900 if name == "a pair with a slip" else 300)  # which lists all pairs
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
    fit(LinearVAE(5, 2).double().requires_grad_(False), MeanField(5, 2).double().standardise_by(raw), raw, steps=2)
    assert "standardise_by" not in caplog.text  # of what another way has fitted there is nothing to say
