"""Planted defects of a pair: each is named by the rule that it breaks, with a remedy; pairs without one pass."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from registry import PAIRS, build_pair, data_for
from torch import nn
from torch.distributions import constraints

from guides import MeanField, WrappedEncoder
from inference import check_pair
from zoo import DeepGaussianVAE, LinearVAE, WrappedDecoder

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
W = torch.randn(5, generator=torch.Generator().manual_seed(1)).double()


class Model(nn.Module):
    """A model of a user's kind, whose parts a defect replaces."""

    def __init__(self, **changes):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.part = {
            "plate": "data",
            "prior": dist.Normal(X.new_zeros(()), 1.0),
            "see": lambda x: x,
            "shift": lambda _: 0.0,
            "decode": lambda z: z.unsqueeze(-1) * W,
            "event": 1,
            "like": lambda mean: dist.Normal(mean, 1.0),
            "rows": None,
        } | changes

    def forward(self, x):
        size = self.part["rows"]
        with pyro.plate(self.part["plate"], size or len(x), subsample_size=len(x) if size else None):
            z = pyro.sample("z", self.part["prior"])
            mean = self.part["decode"](z) + self.mean + self.part["shift"](x)
            pyro.sample("x", self.part["like"](mean).to_event(self.part["event"]), obs=self.part["see"](x))


class Guide(nn.Module):
    """A guide of a user's kind, whose parts a defect replaces."""

    def __init__(self, **changes):
        super().__init__()
        self.weight = nn.Parameter(torch.full((5,), 0.1, dtype=torch.float64))
        self.part = {"plate": "data", "name": "z", "mean": lambda x, w: x @ w, "extra": None} | changes

    def forward(self, x):
        with pyro.plate(self.part["plate"], len(x)):
            pyro.sample(self.part["name"], dist.Normal(self.part["mean"](x, self.weight), 0.8))
            if self.part["extra"]:
                pyro.sample(self.part["extra"], dist.Normal(x[:, 0], 1.0))


class OutsidePlate(nn.Module):
    """A latent of all data points at once, in a pair whose data points have one each."""

    def forward(self, x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * W, 1.0).to_event(1), obs=x)


class Twice(nn.Module):
    """A model with a second latent, or a factor."""

    def __init__(self, second=None, factor=None):
        super().__init__()
        self.second, self.factor = second, factor

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if self.second is not None:
                z = pyro.sample(self.second, dist.Normal(z, 1.0))
            if self.factor is not None:
                pyro.factor("factor", self.factor * z)
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * W, 1.0).to_event(1), obs=x)


class Positive(Guide):
    """A guide on the positive numbers."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x @ self.weight, 0.8))


class Unobserved(Model):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.part["prior"])


def trained(module):
    return module.double().train()


def batch_normalised():
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    return trained(WrappedEncoder(network, lambda o: dist.Normal(o[..., :2], o[..., 2:].exp()).to_event(1)))


def dropping():
    network = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5))
    return trained(WrappedEncoder(network, lambda o: dist.Normal(o[..., :2], o[..., 2:].exp()).to_event(1)))


HIDDEN = nn.Linear(5, 1).double()
REPLAYED = poutine.replay(Model(), trace=poutine.trace(Guide()).get_trace(X))
BETA = dist.Beta(X.new_tensor(2.0), X.new_tensor(2.0))
ANGLE = dist.VonMises(X.new_zeros(()), X.new_ones(()))
LINEAR = LinearVAE(5, 2).double()

# Name of the defect: model, guide, data, the rule that it breaks, what is said of it, and of the remedy.
DEFECTS = {
    "halves swapped": (Guide(), Model(), X, "pair", "are model and guide swapped", "the model first"),
    "nothing observed": (Unobserved(), Guide(), X, "pair", "a model that observes data", "an observed site"),
    "another latent's name": (Model(), Guide(name="w"), X, "pair", "latent sites .'z'. ?.*, got .'w'.", "same names"),
    "a latent too many": (Model(), Guide(extra="w"), X, "pair", r"got \['w', 'z'\]", "and no others"),
    "another plate": (
        Model(plate="rows"),
        Guide(plate="rows"),
        X,
        "pair",
        r"in plates \['rows'\]",
        "name it by plate=",
    ),
    "no plate": (OutsidePlate(), Guide(), X, "pair", "model site 'z' in plates", "one `with pyro.plate"),
    "no to_event": (Model(event=0), Guide(), X, "pair", "plate|batch|shape|broadcast", ""),
    "latent of another size": (LINEAR, MeanField(5, 3).double(), X, "pair", r"event shape \(2,\)", "latent dimensions"),
    "float32 data": (LINEAR, MeanField(5, 2).double(), X.float(), "data", "expected x of dtype", "convert once"),
    "a missing value": (Model(), Guide(), X.clone().fill_diagonal_(math.nan), "data", "to be finite", "missing values"),
    "labels": (LINEAR, MeanField(5, 2).double(), (X, X[:, 0]), "data", "no use for", "second argument"),
    "batch normalisation": (LINEAR, batch_normalised(), X, "eval mode", "train mode", "guide.eval()"),
    "dropout": (LINEAR, dropping(), X, "eval mode", "got Dropout", "guide.eval()"),
    "a point mass": (Model(), AutoDelta(Model()), X, "pair", "expected a density at guide site 'z'", "AutoNormal"),
    "a scaled site": (poutine.scale(Model(), 2.0), Guide(), X, "density", "carry no scale", "poutine.scale"),
    "a masked prior": (poutine.mask(Model(), X[:, 0] > 0), Guide(), X, "density", "same mask", "mask the latent alike"),
    "a bounded latent": (Model(prior=BETA), Guide(), X, "density", "", "latent's support"),
    "an angle": (Model(prior=ANGLE), Guide(), X, "density", "on one support", "latent's support"),
    "own noise": (Model(shift=lambda x: torch.randn_like(x)), Guide(), X, "repeatable", "randomness", "pyro.sample"),
    "a network aside": (Model(shift=HIDDEN), Guide(), X, "training", r"Linear\.weight", "pyro.module"),
    "detached": (
        Model(),
        Guide(mean=lambda x, w: x @ w.detach()),
        X,
        "training",
        r"none for \['Guide.weight'\]",
        "detach",
    ),
    "batch statistics": (
        Model(shift=lambda x: x.mean()),
        Guide(),
        X,
        "rows",
        "the log joint density at a row",
        "batch",
    ),
    "rows outside": (Model(shift=lambda x: X[: len(x)]), Guide(), X, "rows", "outside its arguments", "as an argument"),
    "transformed data": (
        Model(see=lambda x: x.exp()),
        Guide(),
        X,
        "simulation",
        "every observed value to be an argument",
        "observe the argument",
    ),
    "torch's distribution": (
        Model(prior=torch.distributions.Normal(X.new_zeros(()), 1.0)),
        Guide(),
        X,
        "log joint",
        "site 'z', got torch's own Normal",
        "pyro.distributions",
    ),
    "a class": (LinearVAE, Guide(), X, "data", "got the class LinearVAE", ""),
    "a torch module": (nn.Linear(5, 2).double(), Guide(), X, "pair", "without a sample site", "an observed site"),
    "an encoder for guide": (Model(), nn.Linear(5, 1).double(), X, "pair", "without a sample site", "same names"),
    "counts that are none": (
        Model(like=lambda mean: dist.Poisson(mean.exp())),
        Guide(),
        X,
        "training",
        "data at site 'x' in",
        "in the distribution's support",
    ),
    "a scale below zero": (
        Model(like=lambda m: dist.Normal(m, -1.0)),
        Guide(),
        X,
        "pair",
        "parameter scale",
        "softplus",
    ),
    "a factor of NaN": (Twice(factor=math.nan), Guide(), X, "pair", "parameter log_factor", "look for NaN"),
    "one name twice": (Twice(second="z"), Guide(), X, "pair", "a name of its own, got 'z' twice", "also in a loop"),
    "a hidden latent": (poutine.block(Twice(second="w"), hide=["w"]), Guide(), X, "repeatable", "hidden by", "block"),
    "a replayed latent": (REPLAYED, Guide(), X, "pair", r"poutine\.replay", ""),
    "a guide on half the line": (Model(), Positive(), X, "density", "on all of the latent's support", "support"),
    "a subsampled model": (Model(rows=24), Guide(), X, "pair", "to have one dimension and size", "both plates"),
    "factors for data": (Twice(factor=0.0), Guide(), X, "simulation", r"got pyro\.factor at \['factor'\]", ""),
    "raw pixels": (
        DeepGaussianVAE(5, 2).double(),
        MeanField(5, 2).double(),
        255 * X.abs(),
        "units",
        "unit of",
        "standardise_by",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_named_with_its_remedy(name):
    model, guide, data, rule, problem, remedy = DEFECTS[name]
    found = check_pair(model, guide, *(data if isinstance(data, tuple) else (data,)))
    assert not found.ok
    assert rule in found.problems, found
    door = next(door for door in found.doors if door.name == rule)
    assert re.search(problem, door.problem), door
    assert remedy in door.remedy, door
    assert door.problem in str(found)


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (Model(), Guide()),
        (LINEAR, MeanField(5, 2).double()),
        (
            WrappedDecoder(nn.Linear(2, 5).double(), lambda m: dist.Normal(m, 1.0).to_event(1), 5, 2),
            MeanField(5, 2).double(),
        ),
    ],
    ids=["own", "ours", "wrapped"],
)
def test_a_pair_without_defect_passes(model, guide):
    found = check_pair(model, guide, X)
    assert found.ok, found


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_pairs_of_the_registry_keep_every_rule(names):
    model, guide = build_pair(*names)
    found = check_pair(model, guide, data_for(model))
    assert set(found.problems) <= {"units"}, found


def test_an_autoguide_keeps_its_rows():
    found = check_pair(Model(), AutoNormal(Model()), X)
    assert set(found.problems) == {"rows"}
    assert "an AutoGuide keeps the rows" in str(found)


def test_what_only_some_pairs_offer_is_no_defect():
    found = check_pair(DeepGaussianVAE(5, 2).double(), MeanField(5, 2).double(), X)
    doors = {door.name: door for door in found.doors}
    assert found.ok
    assert doors["closed form"].problem.startswith("expected a model with log_evidence(x), got DeepGaussianVAE")
    assert not doors["free guide"].problem
    assert not doors["modules"].problem
    assert check_pair(Model().forward, Guide().forward, X).ok


def test_a_check_leaves_random_state_store_and_modules_alone():
    state, store = torch.get_rng_state(), set(pyro.get_param_store().keys())
    model, guide = Model(), Guide()
    model.train()
    check_pair(model, guide, X)
    assert torch.equal(state, torch.get_rng_state())
    assert set(pyro.get_param_store().keys()) == store
    assert model.training
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])


def test_the_support_of_the_remedy_mends_it():
    class Bounded(Model):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Beta(x.new_full((1,), 2.0), x.new_full((1,), 2.0)).to_event(1))
                pyro.sample("x", dist.Normal(z * W + self.mean, 1.0).to_event(1), obs=x)

    assert "density" in check_pair(Bounded(), MeanField(5, 1).double(), X).problems
    assert check_pair(Bounded(), MeanField(5, 1, support=constraints.unit_interval).double(), X).ok
