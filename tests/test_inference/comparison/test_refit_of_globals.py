"""Refits of guides of all data: families with several parts, and parameters that are named by ``pyro.param``."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import autoguide
from pyro_problems import guide_of_parts

from inference import gap, refit

QUIET = {"whole": True, "seed": 0, "progress": False, "num_samples": 64, "restarts": 0}
DOUBLE = {"dtype": torch.float64}
X = torch.tensor([0.5, 1.5, -0.3, 2.0])
# Posterior precision of (a, b), and log p: x is Gaussian, of covariance 5 everywhere and 0.64 more on the diagonal.
PRECISION = torch.tensor([[2.0, -1.0], [-1.0, 1.0]], **DOUBLE) + 4 / 0.64
COVARIANCE = 5 * torch.ones(4, 4, **DOUBLE) + 0.64 * torch.eye(4, **DOUBLE)
EVIDENCE = float(dist.MultivariateNormal(torch.zeros(4, **DOUBLE), COVARIANCE).log_prob(X.double()))
# What independent coordinates leave: half the log of the precision's diagonal over its determinant.
INDEPENDENT = 0.5 * math.log(float(PRECISION.diagonal().prod() / PRECISION.det()))


def model(x):
    a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    with pyro.plate("points", len(x)):
        pyro.sample("x", dist.Normal(a + b, 0.8), obs=x)


class Easy(EasyGuide):
    """Both sites by one Gaussian of full covariance."""

    def guide(self, x):
        loc = pyro.param("loc", x.new_zeros(2))
        factor = pyro.param("factor", 0.5 * torch.eye(2).to(x), constraint=dist.constraints.lower_cholesky)
        self.group(match=".*").sample("both", dist.MultivariateNormal(loc, scale_tril=factor))


def in_words(x):
    """A chain of two Gaussians, as a function."""
    zero, some = x.new_zeros(()), x.new_tensor(0.3)
    positive = {"constraint": dist.constraints.positive}
    a = pyro.sample("a", dist.Normal(pyro.param("a_loc", zero), pyro.param("a_scale", some, **positive)))
    b_loc = pyro.param("b_loc", zero) + pyro.param("slope", zero) * a
    pyro.sample("b", dist.Normal(b_loc, pyro.param("b_scale", some, **positive)))


def structured(model):
    kinds = {"a": "normal", "b": "normal"}
    return autoguide.AutoStructured(model, conditionals=kinds, dependencies={"b": {"a": "linear"}})


CASES = {
    "AutoStructured": (structured, 0.0),
    "AutoGuideList": (lambda m: guide_of_parts(m, "a", "b"), INDEPENDENT),
    "EasyGuide": (Easy, 0.0),
    "function": (lambda _: in_words, 0.0),
}


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_the_gap_are_those_of_the_family(name):
    make, least = CASES[name]
    guide = make(model)
    x = X if name in ("AutoStructured", "AutoGuideList") else X.double()
    guide(x)
    before = {key: value.detach().clone() for key, value in pyro.get_param_store().items()}
    found = gap(model, guide, x, **QUIET)
    assert found.second == "optimisation"
    assert abs(float(found.evidence.value) - EVIDENCE) < 1e-4
    assert abs(float(found.approximation) - least) < 0.02 + 4 * float(found.approximation_error)
    assert float(found.amortisation) > 1.0
    assert all(torch.equal(value, pyro.get_param_store()[key]) for key, value in before.items())


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
def test_what_is_refitted_is_a_guide_with_parameters_of_its_own():
    in_words(X.double())
    refitted = refit(model, in_words, X.double(), **QUIET).guide
    assert {p.numel() for p in refitted.parameters()} == {1}
    sites = poutine.trace(refitted).get_trace(X.double()).nodes
    mean = torch.linalg.solve(PRECISION, torch.full((2,), float(X.sum()) / 0.64, **DOUBLE))
    assert abs(float(sites["a"]["fn"].loc.detach() - mean[0])) < 0.02
    assert float(pyro.param("a_loc").detach()) == 0.0


def test_a_function_around_a_network_cannot_be_freed():
    net = torch.nn.Linear(1, 1)

    def guide(x):
        pyro.module("net", net)
        a = pyro.sample("a", dist.Normal(net(x[:1])[0], 1.0))
        pyro.sample("b", dist.Normal(a, pyro.param("scale", x.new_tensor(1.0))))

    assert gap(model, guide, X, **QUIET).approximation is None
    with pytest.raises(TypeError, match="parameters of its own, got function"):
        refit(model, guide, X, **QUIET)
