"""Pareto-smoothed importance sampling: ArviZ's smoothing from the largest weights alone, and what is claimed of it."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from linear_problems import GUIDES, Perturbed, half_width, keeps_its_word, problem, record, trained

from inference import Importance, SmoothedImportance, evidence, summarise
from inference.marginal_likelihood.base.result import PROBABILISTIC
from inference.marginal_likelihood.importance.pareto_smoothed import smoothed_mean
from inference.weights.pareto_smoothing import num_kept, smooth_tail, tail_length


def heavy_weights(num_samples, num_data=4, k=0.6):
    """Log weights with Pareto tails."""
    return -k * torch.rand(num_samples, num_data).double().log() - 50


def smoothed_by_arviz(log_weights):
    """Of either of ArviZ's lines, with the constant by which the smallest weight, never smoothed, stays."""
    if importlib.util.find_spec("arviz_stats") is None:
        import arviz

        return arviz.psislw(log_weights, normalize=False)[0]
    from arviz_stats.base import array_stats

    # 1.x rounds the length of the tail, 3 sqrt(S / r_eff), down, where 0.x and the paper round up.
    num_samples = log_weights.shape[-1]
    r_eff = 1 if num_samples <= 225 else 9 * num_samples / (tail_length(num_samples) + 0.5) ** 2
    smooth = array_stats.psislw(-log_weights, r_eff=r_eff, axis=-1)[0]
    return smooth + (log_weights.min(-1) - smooth.min(-1))[:, None]


@pytest.mark.parametrize("num_samples", [30, 100, 2000])
def test_smoothing_is_arvizs_of_all_weights(num_samples):
    log_weights = heavy_weights(num_samples)
    expected = smoothed_by_arviz(log_weights.numpy().T.copy())
    top = log_weights.topk(num_kept(num_samples), 0)[0]
    smooth = smooth_tail(top, num_samples)
    np.testing.assert_allclose(smooth.numpy(), np.sort(expected)[:, -len(top) :].T, rtol=1e-10)
    got = smoothed_mean(summarise([log_weights], num_samples))
    weights = np.exp(expected + 50)
    np.testing.assert_allclose(got.value.numpy() + 50, np.log(weights.mean(-1)), rtol=1e-9, atol=1e-11)
    error = weights.std(-1, ddof=1) / math.sqrt(num_samples) / weights.mean(-1)
    np.testing.assert_allclose(got.standard_error.numpy(), error, rtol=1e-8)


@pytest.mark.parametrize("num_samples", [1, 2, 29])
def test_a_few_weights_are_left_as_they_are(num_samples):
    log_weights = heavy_weights(num_samples)
    summary = summarise([log_weights], num_samples)
    torch.testing.assert_close(smoothed_mean(summary).value, summary.iwae.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(smoothed_mean(summary).standard_error, summary.iwae.standard_error)


def test_weights_without_a_tail_are_left_as_they_are():
    log_weights = torch.full((100, 3), -2.0).double()
    log_weights[5:, 1] = -math.inf
    log_weights[:, 2] = -math.inf
    summary = summarise([log_weights], 100)
    value, error = smoothed_mean(summary)
    np.testing.assert_allclose(value.numpy(), [-2, -2 + math.log(0.05), -math.inf], rtol=1e-12)
    assert float(error[0]) == pytest.approx(0, abs=1e-7)
    assert float(error[2]) == math.inf


def test_smoothing_lessens_the_error_where_weights_have_no_variance():
    """Pareto weights of k = 0.7, whose mean is 1 / (1 - k)."""
    summary = summarise([heavy_weights(1000, 4000, k=0.7)], 1000)
    truth = -50 - math.log(0.3)
    raw, smooth = ((value - truth).square() for value in (summary.iwae.value, smoothed_mean(summary).value))
    gain = raw - smooth
    assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(len(gain))


def test_one_sided_bounds_are_those_of_the_raw_weights():
    model, x, _ = problem(1, 5)
    guide = Perturbed(model, half_width)
    raw, smooth = (
        evidence(model, x, method=method, guide=guide, seed=0, progress=False)
        for method in (Importance(1000), SmoothedImportance(1000))
    )
    assert smooth.guarantee == (PROBABILISTIC,) * 5
    assert torch.equal(smooth.raw_lower, raw.raw_lower)
    assert torch.equal(smooth.lower, torch.minimum(raw.lower, smooth.value))
    assert not torch.equal(smooth.value, raw.value)


@pytest.mark.slow
def test_a_hundred_problems_are_covered():
    assert keeps_its_word(record(SmoothedImportance(2000), trained, num_models=6, num_data=17))
    assert not keeps_its_word(record(SmoothedImportance(2000), trained, num_models=6, num_data=17, shrink=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "smoothed"])
@pytest.mark.parametrize("change", GUIDES.values(), ids=GUIDES)
def test_a_thousand_problems_are_covered(method, change):
    result = record(method, change, num_models=60, num_data=17)
    print(method, change.__name__, result.line)
    assert result.num >= 1000
    assert keeps_its_word(result)
