"""Several intervals of one number as one: by their ends, at shared risk, and contradictions are said."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from inference.core.estimates import normal_quantile
from inference.marginal_likelihood.base.intervals import (
    agree,
    combine,
    combine_ends,
    confronted,
    evidence_from_weights,
    joint_level,
    reaching,
)
from inference.marginal_likelihood.base.result import (
    ASYMPTOTIC,
    EXACT,
    NUMERICAL,
    PROBABILISTIC,
    Evidence,
    weakest,
)
from inference.weights.summary import summarise


def test_ends_are_the_intersection_or_the_hull():
    rng = np.random.default_rng(0)
    lower = rng.normal(size=(3, 200))
    upper = lower + rng.exponential(2.0, size=(3, 200))
    upper[0, ::3] = math.inf
    got = combine_ends(torch.from_numpy(lower), torch.from_numpy(upper))
    for n in range(200):
        low, high = max(lower[:, n]), min(upper[:, n])
        expected = (low, high) if low <= high else (min(lower[:, n]), max(upper[:, n]))
        assert (float(got.lower[n]), float(got.upper[n])) == expected
        assert bool(got.contradicted[n]) == (low > high)
    assert 0 < int(got.contradicted.sum()) < 200
    assert bool((got.lower <= got.upper).all())


def test_several_intervals_share_the_risk_that_one_is_wrong():
    assert joint_level(0.9, 4) == pytest.approx(0.975)
    assert joint_level(0.9, 0) == pytest.approx(0.9)


def numerical(value):
    """Evidence that claims to know its values to 1e-8."""
    value = torch.tensor(value, dtype=torch.float64)
    kinds = {"guarantee": (NUMERICAL,) * len(value), "level": 0.95, "method": "quadrature"}
    return Evidence(value=value, lower=value - 1e-8, upper=value + 1e-8, standard_error=0 * value, **kinds)


def test_a_lower_end_above_the_upper_takes_interval_and_guarantee():
    lower = torch.tensor([[-3.0, -50.0, -40.0], [-9.0, -12.0, -46.5]], dtype=torch.float64)
    got, contradicted = confronted(numerical([-3.0 - 1e-9, -46.0, -46.0]), lower, joint_level(0.95, 6))
    assert contradicted.tolist() == [False, True, True]  # the first is rounding
    assert got.guarantee == (NUMERICAL, ASYMPTOTIC, ASYMPTOTIC)
    assert got.upper[1:].isinf().all()
    assert got.lower[1:].tolist() == [-50.0, -46.5]
    assert got.standard_error.tolist() == [0.0, 34.0, 6.0]
    assert [bool(note) for note in got.notes] == [False, True, True]


def test_noisy_lower_bounds_contradict_no_more_often_than_said():
    """ELBOs of exact guides: each is log p with an error, so that half of them lie above it."""
    rng, size, errors = np.random.default_rng(0), 200, np.full((2, 200), 0.1)
    wrong = 0
    for _ in range(200):
        elbos = 0.1 * rng.standard_normal((2, size))
        each = joint_level(0.95, 2 * size)
        lower = torch.from_numpy(elbos - normal_quantile(each) * errors)
        wrong += bool(confronted(numerical([0.0] * size), lower, each)[1].any())
    assert wrong <= scipy.stats.binom.ppf(0.999, 200, 0.05)


@pytest.mark.parametrize(("num_parts", "holds"), [(4, True), (1, False)])
def test_ends_at_a_share_of_the_risk_keep_the_level(num_parts, holds):
    """Four intervals at 1 - alpha / 4 each; the twin, at 1 - alpha each, does not cover."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(4, 20_000, generator=generator, dtype=torch.float64)
    width = normal_quantile(1 - 0.05 / num_parts)
    lower, upper, contradicted = combine_ends(value - width, value + width)
    held = int(((lower <= 0) & (upper >= 0)).sum())
    assert (held >= scipy.stats.binom.ppf(0.001, 20_000, 0.95)) == holds
    assert int(contradicted.sum()) < 0.05 * 20_000


def of_weights(mean, sd, num_samples=1000, num_data=3):
    weights = mean + sd * torch.randn(num_samples, num_data, dtype=torch.float64)
    return evidence_from_weights(summarise([weights], num_samples))


def test_a_two_sided_and_a_lower_bound_share_the_risk():
    narrow, bound = of_weights(0.0, 0.1), of_weights(-1.0, 0.1, num_samples=20)
    got, contradicted = combine([bound, narrow])
    assert not contradicted.any()
    assert got.guarantee == (ASYMPTOTIC,) * 3
    assert torch.equal(got.value, narrow.value)
    width = normal_quantile(0.975) * narrow.standard_error
    torch.testing.assert_close(got.lower, narrow.value - width)
    torch.testing.assert_close(got.upper, narrow.value + width)
    torch.testing.assert_close(got.raw_lower.exp(), (narrow.raw_lower.exp() + bound.raw_lower.exp()) / 2)


def test_two_lower_bounds_are_one_at_half_the_risk():
    first, second = of_weights(0.0, 1.0, num_samples=20), of_weights(-1.0, 0.1, num_samples=20)
    got, contradicted = combine([first, second])
    assert got.guarantee == (PROBABILISTIC,) * 3
    assert not contradicted.any()
    assert bool((got.upper == math.inf).all())
    torch.testing.assert_close(got.lower, torch.maximum(first.value, second.value) - math.log(40))


def test_a_contradiction_gives_the_hull_and_the_weaker_guarantee():
    narrow, above = of_weights(0.0, 0.1), of_weights(9.0, 0.1, num_samples=20)
    got, contradicted = combine([narrow, above])
    assert contradicted.all()
    assert got.guarantee == (ASYMPTOTIC,) * 3
    assert bool((got.lower < narrow.value).all())
    assert bool((got.upper == math.inf).all())
    assert got.mean.upper == math.inf
    assert bool((got.standard_error == math.inf).all())


def test_the_error_of_a_hull_is_that_of_its_width():
    got, contradicted = combine([of_weights(0.0, 0.1), of_weights(9.0, 0.1)])
    assert contradicted.all()
    torch.testing.assert_close(got.standard_error, (got.upper - got.lower) / (2 * normal_quantile(got.level)))


def test_estimates_agree_within_their_errors_alone():
    first = of_weights(0.0, 0.1)
    assert agree(first, of_weights(0.0, 0.1, num_samples=20)).tolist() == [False] * 3  # no upper end
    assert agree(first, of_weights(0.1, 0.1)).tolist() == [False] * 3
    same = of_weights(0.0, 0.1, num_data=2000), of_weights(0.0, 0.1, num_data=2000)
    low, high = scipy.stats.binom.ppf([5e-4, 1 - 5e-4], 2000, 0.95)
    both = same[0].upper.isfinite() & same[1].upper.isfinite()
    assert low - int((~both).sum()) <= int(agree(*same).sum()) <= high


def test_an_interval_reaches_another_estimate_of_the_same():
    found = of_weights(0.0, 0.1)
    assert bool(found.upper.isfinite().all())
    other = found.value + torch.tensor([0.0, 0.5, -0.5])
    wide = reaching(found, other)
    assert torch.equal(wide.value, found.value)
    torch.testing.assert_close(torch.stack([wide.upper[1], wide.lower[2]]), other[1:])
    torch.testing.assert_close(wide.upper - wide.value, normal_quantile(found.level) * wide.standard_error)
    assert (wide.lower[0], wide.upper[0]) == (found.lower[0], found.upper[0])
    one_sided = of_weights(0.0, 0.1, num_samples=20)
    assert torch.equal(reaching(one_sided, other).lower, one_sided.lower)


def test_the_weakest_guarantee_is_named():
    assert weakest([EXACT, NUMERICAL]) == NUMERICAL
    assert weakest([ASYMPTOTIC, PROBABILISTIC, EXACT]) == ASYMPTOTIC
