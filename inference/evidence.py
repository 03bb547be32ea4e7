r"""The evidence log p(x) of a model, per datum, with its error and the kind of guarantee that stands behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.importance import WeightSummary, iter_log_weights, summarise
from inference.pair import Program, refuse_batch_laws
from inference.protocols import SupportsLogEvidence
from inference.psis import tail_length
from inference.seeding import seeded

EXACT = "exact"
ASYMPTOTIC = "asymptotic"
MARKOV = "lower bound by Markov's inequality"

# Above this k-hat the weights have no variance, and a normal interval means nothing.
_MAX_PARETO_K = 0.5


class Interval(NamedTuple):
    """An estimate of one number.

    Attributes:
        value: The estimate.
        lower: Lower end of its interval.
        upper: Upper end.
        standard_error: Standard error.
    """

    value: float
    lower: float
    upper: float
    standard_error: float


@dataclass(frozen=True)
class Evidence:
    """log p(x_n) in nats, per datum.

    Attributes:
        value: The estimate, (N,) float64.
        lower: Lower end of the interval, (N,).
        upper: Upper end, (N,); infinite where nothing bounds it.
        standard_error: Standard error of the value, (N,); zero where it is exact.
        guarantee: What the interval means, one string a datum: "exact", "asymptotic" (two-sided, at the stated level,
            by the normal approximation of a mean of weights whose variance exists), or "lower bound by Markov's
            inequality" (the truth is above ``lower`` with probability at least ``level``, whatever the guide).
        level: Confidence level of the intervals that are not exact.
        method: The method that made it.
        pareto_k: Tail shape of the importance weights, (N,); None where there are none.
        effective_sample_size: (N,); None where there are no weights.
        num_samples: Samples per datum; 0 for a closed form.
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    standard_error: Tensor
    guarantee: tuple[str, ...]
    level: float
    method: str
    pareto_k: Tensor | None = None
    effective_sample_size: Tensor | None = None
    num_samples: int = 0

    @property
    def mean(self) -> Interval:
        r"""The data set's mean log-evidence, in nats per datum, with an interval of its own.

        The errors of the data are independent. Where one of them has no two-sided interval, neither has the mean;
        Markov's inequality then holds for the product of all estimates, and costs log(1 / (1 - level)) / N nats.
        """
        num_data, value = len(self.value), float(self.value.mean())
        error = float(self.standard_error.square().sum().sqrt()) / num_data
        if all(g == EXACT for g in self.guarantee):
            return Interval(value, value, value, 0.0)
        if MARKOV in self.guarantee:
            return Interval(value, value - math.log(1 / (1 - self.level)) / num_data, math.inf, error)
        width = _normal_quantile(self.level) * error
        return Interval(value, value - width, value + width, error)


def concatenate(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several blocks of data as that of all of them; one method and level.

    Args:
        parts: At least one.
    """
    joined: dict[str, Any] = {}
    for name in ("value", "lower", "upper", "standard_error", "pareto_k", "effective_sample_size"):
        values = [getattr(part, name) for part in parts]
        joined[name] = None if values[0] is None else torch.cat(values)
    return replace(parts[0], guarantee=tuple(g for part in parts for g in part.guarantee), **joined)


def evidence(
    model: Program,
    x: Any,
    *args: Any,
    method: str = "exact",
    guide: Program | None = None,
    num_samples: int = 10_000,
    chunk: int | None = None,
    plate: str | None = None,
    level: float = 0.95,
    seed: int | None = None,
    **kwargs: Any,
) -> Evidence:
    """The evidence of a model, per datum.

    Args:
        model: Pyro model.
        x: Data, (N, D): the model's first argument.
        *args: Further arguments of the model and the guide.
        method: ``"exact"``, the model's own closed form, or ``"importance"``, importance sampling from a guide.
        guide: The guide to sample from; for ``"importance"``.
        num_samples: Samples per datum; for ``"importance"``.
        chunk: See :func:`inference.importance.iter_log_weights`.
        plate: See :func:`inference.importance.iter_log_weights`.
        level: Confidence level of the intervals.
        seed: Seed of the samples; leaves the global random state as it was.
        **kwargs: Keyword arguments of the model and the guide.

    Raises:
        TypeError: If ``method="exact"`` and the model has no closed form, or the data are of the wrong type.
        ValueError: If the method is unknown, the guide is missing, or the data are unfit; before anything runs.
    """
    if method == "exact" and guide is not None:
        raise ValueError("expected no guide for method='exact', got one: did you mean method='importance'?")
    if method == "exact" and (args or kwargs):
        raise TypeError(f"expected no arguments beyond the data for method='exact', got {args} and {kwargs}")
    methods: dict[str, Callable[[], Evidence]] = {
        "exact": lambda: exact_evidence(model, x),
        "importance": lambda: importance_evidence(
            model,
            guide,
            x,
            *args,
            num_samples=num_samples,
            chunk=chunk,
            plate=plate,
            level=level,
            seed=seed,
            **kwargs,
        ),
    }
    if method not in methods:
        raise ValueError(f"expected method to be one of {sorted(methods)}, got {method!r}")
    check_level(level)
    return methods[method]()


def check_level(level: float) -> None:
    """Refuse what is no confidence level.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected level between 0 and 1, got {level}")


@torch.no_grad()
def exact_evidence(model: Program, x: Tensor) -> Evidence:
    """The model's own closed form, in float64.

    Raises:
        TypeError: If the model has none.
        ValueError: If the data are unfit.
    """
    if not isinstance(model, SupportsLogEvidence):
        raise TypeError(
            f"expected a model with log_evidence(x) for method='exact', got {type(model).__name__}: "
            "use method='importance' with a guide"
        )
    with refuse_batch_laws(model):
        value = model.log_evidence(x)
    return Evidence(value, value, value, torch.zeros_like(value), (EXACT,) * len(value), 1.0, "exact")


def importance_evidence(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int,
    chunk: int | None = None,
    plate: str | None = None,
    level: float = 0.95,
    seed: int | None = None,
    **kwargs: Any,
) -> Evidence:
    r"""Importance sampling from a guide: the log of the mean weight, which underestimates log p(x) on average.

    .. math:: \log \hat p(x_n) = \log \frac1S \sum_s \frac{p(x_n, z_s)}{q(z_s \mid x_n)}

    Warning:
        Where k-hat and its error leave no doubt that the weights have a variance, the interval is two-sided and
        asymptotic. Elsewhere only Markov's inequality speaks: a lower bound. Neither sees a mode of the posterior
        that the guide never visits.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv 1509.00519.

    Raises:
        ValueError: If there is no guide, or pair or data are unfit.
    """
    if guide is None:
        raise ValueError("expected a guide for method='importance', got none")
    with seeded(seed):
        chunks = iter_log_weights(model, guide, *args, num_samples=num_samples, chunk=chunk, plate=plate, **kwargs)
        return from_weights(summarise(chunks, num_samples), level)


def from_weights(summary: WeightSummary, level: float = 0.95) -> Evidence:
    """The evidence that importance weights support.

    Args:
        summary: Summary of the weights.
        level: Confidence level of the intervals.
    """
    value, error = summary.iwae
    k = summary.pareto_k.value
    margin = 2 * (1 + k).clamp(min=0) / math.sqrt(tail_length(summary.num_samples))
    two_sided = (k == -math.inf) | (k + margin < _MAX_PARETO_K)
    width = _normal_quantile(level) * error
    lower = torch.where(two_sided, value - width, value - math.log(1 / (1 - level)))
    upper = torch.where(two_sided, value + width, torch.full_like(value, math.inf))
    return Evidence(
        value,
        lower,
        upper,
        error,
        tuple(ASYMPTOTIC if two else MARKOV for two in two_sided.tolist()),
        level,
        "importance",
        k,
        summary.effective_sample_size.value,
        summary.num_samples,
    )


def _normal_quantile(level: float) -> float:
    """Half-width in standard errors of a two-sided normal interval."""
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
