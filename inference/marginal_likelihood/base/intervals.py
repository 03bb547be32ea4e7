"""Evidence with its interval and guarantee, from importance weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from inference.core.estimates import normal_quantile
from inference.marginal_likelihood.base.result import ASYMPTOTIC, PROBABILISTIC, Evidence
from inference.weights.pareto_smoothing import tail_length
from inference.weights.summary import WeightSummary

# Above this k-hat the weights have no variance, and a normal interval means nothing.
_MAX_PARETO_K = 0.5


def evidence_from_weights(summary: WeightSummary, level: float = 0.95, *, method: str = "importance") -> Evidence:
    """Evidence from importance weights: log of the mean weight, with its interval and guarantee.

    Args:
        summary: Summary of the weights, of draws to which nothing was adapted.
        level: Confidence level of the intervals.
        method: The method that made the weights.
    """
    value, error = summary.iwae
    k = summary.pareto_k.value
    margin = 2 * (1 + k).clamp(min=0) / math.sqrt(tail_length(summary.num_samples))
    two_sided = (k == -math.inf) | (k + margin < _MAX_PARETO_K)
    width = normal_quantile(level) * error
    lower = torch.where(two_sided, value - width, value - math.log(1 / (1 - level)))
    upper = torch.where(two_sided, value + width, torch.full_like(value, math.inf))
    return Evidence(
        value=value,
        lower=lower,
        upper=upper,
        standard_error=error,
        guarantee=tuple(ASYMPTOTIC if two else PROBABILISTIC for two in two_sided.tolist()),
        level=level,
        method=method,
        pareto_k=k,
        effective_sample_size=summary.effective_sample_size.value,
        raw_lower=value,
        num_samples=summary.num_samples,
        evaluations=float(summary.num_samples),
    )


def without_upper_end(found: Evidence, where: Tensor) -> Evidence:
    """Evidence that keeps Markov's lower bound alone for chosen data points.

    Args:
        found: With an unbiased estimate of p(x) in ``raw_lower``.
        where: The chosen ones, (N,) bool.
    """
    assert found.raw_lower is not None
    kinds = (PROBABILISTIC if one else kind for one, kind in zip(where.tolist(), found.guarantee, strict=True))
    lower = torch.where(where, torch.minimum(found.raw_lower + math.log(1 - found.level), found.value), found.lower)
    return replace(found, lower=lower, upper=torch.where(where, math.inf, found.upper), guarantee=tuple(kinds))


def replace_estimate(plain: Evidence, value: Tensor, standard_error: Tensor, *, method: str) -> Evidence:
    """Evidence from importance weights with its value replaced by a better estimate; unbiased bounds are kept.

    Two-sided intervals become normal ones around the value; Markov's lower bound stays, or is the value if that is
    lower still.

    Args:
        plain: From :func:`evidence_from_weights`.
        value: (N,).
        standard_error: Its standard error, (N,).
        method: The method that made it.
    """
    two_sided = torch.isfinite(plain.upper)
    width = normal_quantile(plain.level) * standard_error
    return replace(
        plain,
        value=value,
        lower=torch.where(two_sided, value - width, torch.minimum(plain.lower, value)),
        upper=torch.where(two_sided, value + width, plain.upper),
        standard_error=standard_error,
        method=method,
    )
