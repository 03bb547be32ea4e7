"""Fingerprints: what changes a result is told apart, what does not is not."""

import functools

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from guides import MeanField
from inference import BetaELBO, FreeBitsELBO, LinearAnnealing
from inference.pair.fingerprint import described, differences_of, same_numbers, unchanged
from zoo import IMAVAE, DeepGaussianVAE, Laplace, LinearVAE

CONSTANT = 1.0


def reads_a_constant(x):
    return x * CONSTANT


def function(scale, shift=0.0):
    def inner(x, *, power=2):
        return scale * x**power + shift

    return inner


class Callable_:
    def __init__(self, size):
        self.size = size

    def __call__(self, x):
        return x * self.size


class Scaled(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size, self.layers = size, nn.Linear(2, 2)


SAME_AND_OTHER = {
    "number": lambda v: 1.0 + v,
    "tensor": lambda v: torch.ones(2) * v,
    "array": lambda v: np.ones(2) * v,
    "nested": lambda v: {"a": [1, (2, {"b": v})]},
    "closure": lambda v: function(v),
    "deeper closure": lambda v: function(function(v)),
    "partial": lambda v: functools.partial(function, v),
    "bound method": lambda v: Callable_(v).__call__,
    "callable object": lambda v: Callable_(v),
    "attribute": lambda v: (torch.manual_seed(0), Scaled(v))[1],
    "distribution": lambda v: dist.Normal(0.0, 1.0 + v).to_event(0),
    "support": lambda v: constraints.interval(0.0, 1.0 + v),
    "objective": lambda v: BetaELBO(v),
    "schedule of an objective": lambda v: BetaELBO(LinearAnnealing(3 + v)),
    "free bits": lambda v: FreeBitsELBO(float(v)),
    "activation": lambda v: nn.Sequential(nn.ReLU() if v else nn.SiLU()),
    "precision": lambda v: IMAVAE(5, 2, gamma2=25.0 + v, hidden=(8,)),
}


@pytest.mark.parametrize("make", SAME_AND_OTHER.values(), ids=SAME_AND_OTHER)
def test_equal_things_are_described_alike_and_others_not(make):
    assert described(make(1), values=False) == described(make(1), values=False)
    assert described(make(1), values=False) != described(make(0), values=False)


def test_constants_of_functions_and_of_their_module_count(monkeypatch):
    before = described(reads_a_constant)
    assert described(lambda x: x + 1) != described(lambda x: x + 2)
    monkeypatch.setitem(globals(), "CONSTANT", 2.0)
    assert described(reads_a_constant) != before


def test_a_prior_of_another_class_is_told_by_the_model():
    a, b = DeepGaussianVAE(5, 2, hidden=(8,)), DeepGaussianVAE(5, 2, hidden=(8,), prior=Laplace(2))
    assert any("prior_module.class" in text for text in differences_of(described(a), described(b)))


def test_parameters_count_by_their_values_or_by_their_shapes():
    pairs = [[LinearVAE(5, 2), MeanField(5, 2)] for _ in range(2)]
    a, b = ([described(pair, values=values) for pair in pairs] for values in (True, False))
    assert a[0] != a[1]
    assert b[0] == b[1]


def test_what_a_run_changes_is_left_out():
    model = Scaled(1)
    model.calls, model.cache = 0, None
    before = described(model)
    model.calls, model.cache, model.made = 1, torch.ones(2), 3
    kept = unchanged(before, described(model))
    assert differences_of(before, kept) == [
        "calls: expected 0, got 'changes when it runs'",
        "cache: expected None, got 'changes when it runs'",
    ]


def test_a_circle_of_references_ends():
    first, second = Scaled(1), Scaled(2)
    first.other, second.other = (second,), (first,)
    assert described(first) == described(first)


def test_numbers_agree_within_the_rounding_of_their_dtype():
    assert same_numbers([1.0, float("nan")], [1.0 + 1e-9, float("nan")], torch.float64)
    assert not same_numbers([1.0], [1.0 + 1e-5], torch.float64)
    assert same_numbers([1.0], [1.0 + 1e-5], torch.float32)
    assert not same_numbers([1.0], [1.0, 2.0], torch.float64)
    assert same_numbers(None, [1.0], torch.float64)
