"""Evidence with its interval and guarantee, from importance weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from inference.core.estimates import normal_quantile
from inference.marginal_likelihood.base.result import ASYMPTOTIC, PROBABILISTIC, Evidence, weakest
from inference.weights.pareto_smoothing import tail_length
from inference.weights.summary import WeightSummary

# Above this k-hat the weights have no variance, and a normal interval means nothing.
_MAX_PARETO_K = 0.5

# Nats by which a sound unbiased estimate exceeds the truth with a probability of at most e^-9, by Markov's inequality.
MOST_EXCESS = 9.0

# Rounding of a log joint density, relative to its size and in nats, that is no contradiction.
_ROUNDING = 1e-6
_CONTRADICTED = "a lower bound of the same call lies above the upper end, which it contradicts"


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
    kinds = (PROBABILISTIC if one else kind for one, kind in zip(where.tolist(), found.guarantee, strict=True))
    lower = torch.where(where, torch.minimum(_raw_lower(found) + math.log(1 - found.level), found.value), found.lower)
    return replace(found, lower=lower, upper=torch.where(where, math.inf, found.upper), guarantee=tuple(kinds))


def from_narrow_guide(found: Evidence, latents: Sequence[str]) -> Evidence:
    """Evidence from a guide that has no density on part of the support of some latents: a lower bound alone.

    Args:
        found: From that guide's weights.
        latents: Names of these latents; without any the evidence stays as it is.
    """
    if not latents:
        return found
    note = f"the guide has no density on part of the support of {', '.join(map(repr, latents))}: a lower bound alone"
    everywhere = torch.ones_like(found.value, dtype=torch.bool)
    return replace(without_upper_end(found, everywhere), notes=(note,) * len(found.value))


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


class Ends(NamedTuple):
    """Several intervals of one number as one.

    Attributes:
        lower: (N,).
        upper: (N,).
        contradicted: Whether a lower end lay above an upper end, (N,); the interval is the hull of all there.
    """

    lower: Tensor
    upper: Tensor
    contradicted: Tensor


def combine_ends(lower: Tensor, upper: Tensor) -> Ends:
    """Intervals of the same numbers as one: their intersection, or their hull where that is empty.

    Args:
        lower: Lower ends of m intervals, (m, N). For the result to hold at level 1 - alpha, each is at 1 - alpha / m.
        upper: Upper ends, (m, N); infinite where there is none.

    Example:
        >>> combine_ends(torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[2.0, 2.0], [4.0, 4.0]]))
        Ends(lower=tensor([1., 0.]), upper=tensor([2., 4.]), contradicted=tensor([False,  True]))
    """
    most, least = lower.amax(0), upper.amin(0)
    contradicted = most > least
    return Ends(
        torch.where(contradicted, lower.amin(0), most), torch.where(contradicted, upper.amax(0), least), contradicted
    )


def combine(parts: Sequence[Evidence]) -> tuple[Evidence, Tensor]:
    """Evidence of the same data points by several methods as one, and where the methods contradict each other, (N,).

    Their ends are compared, each at its share of the risk, never their values. A contradiction gives the hull of all
    intervals, and the weakest guarantee. The value is that of the narrowest two-sided interval, or the largest of
    lower bounds.

    Args:
        parts: From importance weights, at one level.
    """
    level = parts[0].level
    each = [_at_level(part, 1 - (1 - level) / len(parts)) for part in parts]
    ends = combine_ends(torch.stack([e.lower for e in each]), torch.stack([e.upper for e in each]))
    values, errors = torch.stack([e.value for e in each]), torch.stack([e.standard_error for e in each])
    two_sided = torch.stack([e.upper.isfinite() for e in each])
    chosen = torch.where(two_sided.any(0), torch.where(two_sided, -errors, -math.inf), values).argmax(0, keepdim=True)
    hull = (ends.upper - ends.lower) / (2 * normal_quantile(level))
    error = torch.where(ends.contradicted, hull, errors.gather(0, chosen)[0])
    lowest = torch.stack([_raw_lower(e) for e in each]).logsumexp(0) - math.log(len(each))
    combined = replace(
        parts[0],
        value=values.gather(0, chosen)[0].maximum(ends.lower).minimum(ends.upper),
        lower=ends.lower,
        upper=ends.upper,
        standard_error=error,
        guarantee=tuple(map(weakest, zip(*(e.guarantee for e in each)))),
        method=" and ".join(e.method for e in each),
        raw_lower=lowest,
        spread=values.amax(0) - values.amin(0),
        num_samples=max(e.num_samples for e in each),
        evaluations=sum(e.evaluations for e in each),
    )
    return combined, ends.contradicted


def joint_level(level: float, count: int) -> float:
    """The level of each of several intervals that all hold together with probability ``level``, by Bonferroni."""
    return 1 - (1 - level) / max(1, count)


def confronted(found: Evidence, lower: Tensor, each: float) -> tuple[Evidence, Tensor]:
    """Evidence compared with lower ends of log p that the same call computed, and where one contradicts it, (N,).

    Where a lower end lies above the upper end, beyond both errors and rounding, the evidence is not what it says: it
    keeps the least lower end and no upper one, at most the guarantee ``"asymptotic"``, and a note.

    Args:
        found: Evidence of N data points.
        lower: Lower ends, (m, N).
        each: The level of each, which :func:`joint_level` gives for m times as many as all data points.
    """
    quantile = normal_quantile(each)
    upper = torch.maximum(found.upper, found.value + quantile * found.standard_error)
    upper = upper + _ROUNDING * (1 + found.value.abs())
    ends = combine_ends(
        torch.cat([found.lower.unsqueeze(0), lower]), torch.stack([upper, *[upper + math.inf] * len(lower)])
    )
    if not bool(ends.contradicted.any()):
        return found, ends.contradicted
    against = ends.contradicted.tolist()
    kinds = (weakest((kind, ASYMPTOTIC)) if bad else kind for kind, bad in zip(found.guarantee, against, strict=True))
    notes = found.notes or ("",) * len(against)
    said = (f"{note}; {_CONTRADICTED}".lstrip("; ") if bad else note for note, bad in zip(notes, against, strict=True))
    off = torch.maximum(found.standard_error, lower.amax(0) - found.value)
    changed = replace(
        found,
        lower=torch.where(ends.contradicted, ends.lower, found.lower),
        upper=torch.where(ends.contradicted, math.inf, found.upper),
        standard_error=torch.where(ends.contradicted, off, found.standard_error),
        guarantee=tuple(kinds),
        notes=tuple(said),
    )
    return changed, ends.contradicted


def _at_level(found: Evidence, level: float) -> Evidence:
    """Evidence from importance weights, at another level."""
    two_sided, width = found.upper.isfinite(), normal_quantile(level) * found.standard_error
    markov = torch.minimum(_raw_lower(found) + math.log(1 - level), found.value)
    lower = torch.where(two_sided, found.value - width, markov)
    return replace(found, lower=lower, upper=torch.where(two_sided, found.value + width, found.upper), level=level)


def _raw_lower(found: Evidence) -> Tensor:
    """The log of an unbiased estimate of p(x), which evidence from importance weights has."""
    assert found.raw_lower is not None
    return found.raw_lower


def agree(first: Evidence, second: Evidence) -> Tensor:
    """Whether two independent estimates are two-sided and differ by no more than their errors at the level, (N,)."""
    error = torch.hypot(first.standard_error, second.standard_error)
    close = (first.value - second.value).abs() <= normal_quantile(first.level) * error
    return close & first.upper.isfinite() & second.upper.isfinite()


def reaching(found: Evidence, other: Tensor) -> Evidence:
    """Evidence whose two-sided intervals are as wide as its distance from another estimate, (N,), at least."""
    distance = (found.value - other).abs() / normal_quantile(found.level)
    wider = torch.where(found.upper.isfinite(), found.standard_error.maximum(distance), found.standard_error)
    return replace_estimate(found, found.value, wider, method=found.method)
