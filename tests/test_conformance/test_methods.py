"""Every evidence method of the registry against known answers, by one score that planted defects must fail."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from linear_problems import Perturbed, trained
from references import EXACT, reference_marginal
from registry import METHODS, MODELS, data_for, models_with
from torch import Tensor

import inference.marginal_likelihood.estimate
from inference import evidence
from inference.marginal_likelihood.base.method import Method
from inference.marginal_likelihood.base.result import ASYMPTOTIC, NUMERICAL, PROBABILISTIC, Evidence
from inference.marginal_likelihood.base.result import EXACT as CLOSED_FORM
from zoo import known_answers

# Truths and answers are rounded; NumPy's determinants at little noise lose the most.
ROUNDING = 1e-7
# Half of the bias that must be found: a method at home is nearer than that to the median truth.
TOLERANCE = 0.25
# Data points of each case of the ladder.
NUM_DATA = 12
KINDS = {CLOSED_FORM, NUMERICAL, PROBABILISTIC, ASYMPTOTIC}


class Case(NamedTuple):
    """A problem with its answer: what a model, a guide of the quality that training yields, and data evaluate to."""

    model: Any
    guide: Any
    x: Tensor
    truth: Tensor


@cache
def ladder():
    """The known answers by family and sigma."""
    sigmas = sorted({sigma for member in METHODS.values() for sigma in member.sigmas})
    with torch.random.fork_rng(devices=[]):
        return {(k.family, k.sigma): k for k in known_answers([1, 4], sigmas, num_data=NUM_DATA)}


def rungs(member):
    """The cases of the ladder that a method claims."""
    found = [ladder()[family, sigma] for family in member.families for sigma in member.sigmas]
    return [Case(k.model, k.guide, k.x, k.log_evidence) for k in found]


def closed_forms():
    """A case of each registered model whose evidence is known, by a dense Gaussian; the guide is a little off."""
    with torch.no_grad():
        models = [MODELS[name]().requires_grad_(False) for name in models_with(*EXACT)]
        data = [data_for(model) for model in models]
        return [Case(m, Perturbed(m, trained), x, reference_marginal(m).log_prob(x)) for m, x in zip(models, data)]


class Score(NamedTuple):
    """What a method said of several cases.

    Attributes:
        sure: Intervals that claim to hold always.
        sure_inside: Those of them that hold the truth.
        two_sided: Intervals at a level of confidence that claim both ends.
        inside: Those of them that hold the truth.
        one_sided: Intervals by Markov's inequality.
        wrong: Those of them that do not hold the truth.
        worst: The largest over the cases of the median distance from the truth, in nats.
    """

    sure: int
    sure_inside: int
    two_sided: int
    inside: int
    one_sided: int
    wrong: int
    worst: float


def measured(method, cases, guided=True):
    """What a method says of each case."""
    options = {"method": method, "seed": 0, "progress": False}
    return [evidence(case.model, case.x, guide=case.guide if guided else None, **options) for case in cases]


@cache
def measured_at_home(name):
    """What a method says of its rungs, measured once for all the tests that look at it."""
    member = METHODS[name]
    return measured(member.method, rungs(member), member.guided)


def score(found, cases):
    """What a method said of cases, beside their truths."""
    kinds, holds, worst = [], [], 0.0
    for got, case in zip(found, cases, strict=True):
        holds.append(((got.lower <= case.truth + ROUNDING) & (case.truth <= got.upper + ROUNDING)).numpy())
        kinds.append(np.array(got.guarantee))
        # A value that is no number is no answer.
        worst = max(worst, float((got.value - case.truth).nan_to_num(nan=math.inf).median().abs()))
    kind, inside = np.concatenate(kinds), np.concatenate(holds)
    assert set(kind) <= KINDS
    sure, two, one = np.isin(kind, [CLOSED_FORM, NUMERICAL]), kind == ASYMPTOTIC, kind == PROBABILISTIC
    counts = (sure.sum(), (sure & inside).sum(), two.sum(), (two & inside).sum(), one.sum(), (one & ~inside).sum())
    return Score(*map(int, counts), worst)


def answers(found, level=0.95):
    """Whether all that is sure holds, coverage is at least the level at 99.9 %, and the values are near the truth."""
    return (
        found.sure_inside == found.sure
        and found.inside >= scipy.stats.binom.ppf(0.001, found.two_sided, level)
        and found.wrong <= scipy.stats.binom.ppf(0.999, found.one_sided, 1 - level)
        and found.worst < TOLERANCE
    )


# --- the methods -----------------------------------------------------------------------------------


def test_every_method_is_registered():
    assert {name: type(member.method) for name, member in METHODS.items()} == (
        inference.marginal_likelihood.estimate.METHODS
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_answers_where_it_is_at_home(name):
    cases = rungs(METHODS[name])
    found = score(measured_at_home(name), cases)
    assert found.sure + found.two_sided + found.one_sided == NUM_DATA * len(cases)
    assert answers(found), found


# Quadrature in three dimensions at its own tolerance takes as long as all others together; at home it has fewer. Of
# those that draw from a guide one stands for all.
SLOW = {key: [pytest.mark.slow] for key in ("quadrature", "smoothed", "defensive", "bridge")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, [])) for name, member in METHODS.items() if member.registered]
)
def test_a_method_answers_for_registered_models_in_closed_form(name):
    member = METHODS[name]
    cases = closed_forms()
    found = score(measured(member.method, cases, member.guided), cases)
    assert answers(found), found


# --- planted defects -------------------------------------------------------------------------------


def moved(got, shift):
    """An evidence with its value and interval moved."""
    return replace(got, **{end: getattr(got, end) + shift for end in ("value", "lower", "upper")})


@pytest.mark.parametrize("shift", [0.5, -0.5])
@pytest.mark.parametrize("name", METHODS)
def test_a_bias_of_half_a_nat_is_found(name, shift):
    found = [moved(got, shift) for got in measured_at_home(name)[:2]]
    assert not answers(score(found, rungs(METHODS[name])[:2]))


@dataclass(frozen=True)
class HarmonicMean(Method):
    """The harmonic mean of likelihoods at draws of the guide, with the interval of a mean: the worst of estimators.

    References:
        Newton, Raftery, "Approximate Bayesian Inference with the Weighted Likelihood Bootstrap", 1994. Neal, "The
        Harmonic Mean of the Likelihood: Worst Monte Carlo Method Ever", 2008.
    """

    num_samples: int = 2000
    name: ClassVar[str] = "harmonic-mean"

    @torch.no_grad()
    def estimate(self, problem):
        """The evidence of all data of the problem, (N,)."""
        problem.require_guide(self.name)
        draw = problem.call.run(self.num_samples)
        inverse = -draw.total(draw.model_sites, observed=True)
        value = math.log(self.num_samples) - inverse.logsumexp(0)
        share = inverse.softmax(0)
        error = (share.square().sum(0) - 1 / self.num_samples).clamp(min=0).sqrt()
        width = 1.96 * error
        return Evidence(
            value=value,
            lower=value - width,
            upper=value + width,
            standard_error=error,
            guarantee=(ASYMPTOTIC,) * len(value),
            level=problem.level,
            method=self.name,
            num_samples=self.num_samples,
        )


@pytest.mark.parametrize("family", ["linear K=1", "linear K=4", "bimodal", "ring"])
def test_a_harmonic_mean_is_found(family):
    found = ladder()[family, 0.1]
    cases = [Case(found.model, found.guide, found.x, found.log_evidence)]
    assert not answers(score(measured(HarmonicMean(), cases), cases))


def test_a_harmonic_mean_is_found_on_the_registered_models():
    cases = closed_forms()
    assert not answers(score(measured(HarmonicMean(), cases), cases))


def narrowed(got):
    """An evidence with an interval of a third of the width."""
    return replace(got, **{end: got.value + (getattr(got, end) - got.value) / 3 for end in ("lower", "upper")})


@pytest.mark.parametrize("name", [name for name, member in METHODS.items() if member.two_sided])
def test_an_interval_that_is_too_narrow_is_found(name):
    assert not answers(score(map(narrowed, measured_at_home(name)), rungs(METHODS[name])))
