"""Intervals of a gap and of its parts, from given ELBOs and evidence: by hand, with SciPy's quantiles."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from inference import Evidence
from inference.comparison.gap_decomposition import Gap, _split

N, LEVEL, EVALUATED = 50, 0.9, 8
FOUND = {
    "own_elbo": torch.linspace(-9, -8, N).double(),
    "own_standard_error": torch.linspace(0.1, 0.3, N).double(),
    "elbo": torch.linspace(-7.5, -7.2, N).double(),
    "standard_error": torch.linspace(0.02, 0.05, N).double(),
    "improvement": torch.linspace(1.5, 0.8, N).double(),
    "improvement_error": torch.linspace(0.2, 0.7, N).double(),
    "gradient_norm": torch.zeros(N).double(),
    "converged": torch.ones(N, dtype=torch.bool),
    "steps": torch.full((N,), 7),
}
# Kept beside FOUND, for NumPy.
E = {name: values.double().numpy() for name, values in FOUND.items()}


def evidence_of(value=-7.0, width=0.4, error=0.1):
    value = torch.full((N,), value).double()
    ends = {"value": value, "lower": value - width, "upper": value + 2 * width}
    kinds = {"guarantee": ("asymptotic",) * N, "level": LEVEL, "method": "importance"}
    return Evidence(**ends, standard_error=torch.full_like(value, error), **kinds)


def quantile(level=LEVEL):
    return scipy.stats.t.ppf((1 + level) / 2, EVALUATED - 1)


def gap_of(known, found):
    columns = _split(found, known, LEVEL, N)
    own = {name: value for name, value in columns.items() if not name.startswith("evidence ")}
    names = ("approximation", "approximation_error", "approximation_upper", "amortisation", "amortisation_error")
    unknown = dict.fromkeys((*names, "amortisation_lower", "gradient_norm", "converged", "steps"))
    return Gap(evidence=known, level=LEVEL, **unknown | own)


def close(got, expected):
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_intervals_of_each_row_add_both_errors():
    known = evidence_of()
    got, t = gap_of(known, FOUND), quantile()
    close(got.total, -7.0 - E["own_elbo"])
    close(got.total_error, np.hypot(0.1, E["own_standard_error"]))
    close(got.total_lower, np.maximum(-7.4 - E["own_elbo"] - t * E["own_standard_error"], 0))
    close(got.total_upper, -6.2 - E["own_elbo"] + t * E["own_standard_error"])
    close(got.approximation, -7.0 - E["elbo"])
    close(got.approximation_error, E["standard_error"])
    close(got.approximation_upper, np.maximum(-6.2 - E["elbo"] + t * E["standard_error"], 0))
    close(got.amortisation, E["improvement"])
    close(got.amortisation_lower, np.maximum(E["improvement"] - t * E["improvement_error"], 0))
    assert not got.contradicted.any()
    assert (got.amortisation_lower == 0).any()
    assert str(got).count(" = ") == 1


def test_intervals_of_the_mean_add_that_of_the_evidence():
    known = evidence_of()
    got, truth, t = gap_of(known, FOUND).mean, known.mean, quantile()
    above, below = truth.upper - truth.value, truth.value - truth.lower
    assert min(above, below) > 0
    for name, own, of in (("gap", "own_standard_error", "own_elbo"), ("approximation", "standard_error", "elbo")):
        error = np.sqrt((E[own] ** 2).sum()) / N
        value = (-7.0 - E[of]).mean()
        lower = max(0, value - below - t * error) if name == "gap" else 0
        expected = (value, lower, value + above + t * error, math.hypot(error, truth.standard_error))
        np.testing.assert_allclose(got[name], expected, rtol=1e-12)
    error = np.sqrt((E["improvement_error"] ** 2).sum()) / N
    won = (E["improvement"].mean(), E["improvement"].mean() - t * error, got["gap"].upper, error)
    np.testing.assert_allclose(got["amortisation"], won, rtol=1e-12)


@pytest.mark.parametrize("refitted", [True, False])
def test_a_contradiction_is_one_of_all_rows_and_elbos_together(refitted):
    """At the level of each of 50 or 100 lower ends, of which at most a tenth may be wrong by chance all together."""
    each = 1 - (1 - LEVEL) / (N * (2 if refitted else 1))
    factor = torch.full((N,), -50.0).double()
    factor[:2] = torch.tensor([0.99, 1.01]) * quantile(each)
    error = FOUND["own_standard_error"]
    found = (FOUND if refitted else {}) | {"own_elbo": -7.0 + factor * error, "own_standard_error": error}
    if refitted:
        found["elbo"] = FOUND["elbo"] - 50
    columns = _split(found, evidence_of(width=0.0, error=0.0), LEVEL, N)
    assert columns["contradicted"].nonzero().tolist() == [[1]]
    assert columns["evidence upper"].isinf().nonzero().tolist() == [[1]]
    assert ("approximation" in columns) == refitted


def test_a_gap_without_parts_says_so():
    got = gap_of(evidence_of(), {name: FOUND[name] for name in ("own_elbo", "own_standard_error")})
    assert list(got.mean) == ["gap"]
    assert str(got).endswith(" nats, approximation: unknown, amortisation: unknown")
