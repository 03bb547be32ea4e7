r"""The evidence by importance sampling from a guide.

.. math:: \log \hat p(x_n) = \log \frac1S \sum_s \frac{p(x_n, z_s)}{q(z_s \mid x_n)}
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.core.checks import check_count
from inference.core.estimates import normal_quantile
from inference.estimates import ASYMPTOTIC, PROBABILISTIC, Evidence
from inference.methods import Method, Problem
from inference.weights.importance_weights import iter_log_weights
from inference.weights.pareto_smoothing import tail_length
from inference.weights.summary import WeightSummary, summarise

# Above this k-hat the weights have no variance, and a normal interval means nothing.
_MAX_PARETO_K = 0.5


@dataclass(frozen=True)
class Importance(Method):
    r"""Importance sampling from a guide: the log of the mean weight, which underestimates log p(x) on average.

    Warning:
        Where k-hat and its error leave no doubt that the weights have a variance, the interval is two-sided and
        asymptotic. Elsewhere only Markov's inequality speaks: a lower bound. Neither sees a mode of the posterior
        that the guide never visits.

        The level is that of all data asked for. Where the true k is near 0.5 and few data of a guide pass, those few
        were let through by the same luck that moves the value: at k = 0.48 and S = 1000, 2% pass, and half of their
        intervals miss the truth. Distrust the two-sided intervals of a guide of which most are one-sided.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv 1509.00519.

    Args:
        num_samples: S, samples per datum.
        chunk: See :func:`inference.weights.importance_weights.iter_log_weights`.
    """

    num_samples: int = 10_000
    chunk: int | None = None
    name: ClassVar[str] = "importance"

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples")

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If there is no guide, or pair or data are unfit.
        """
        return from_weights(weigh(problem, self.name, self.num_samples, self.chunk), problem.level)

    def refined(self) -> Importance:
        """With four times the samples."""
        return replace(self, num_samples=4 * self.num_samples)


def weigh(problem: Problem, method: str, num_samples: int, chunk: int | None) -> WeightSummary:
    """Draw importance weights from the problem's guide, in constant memory.

    Args:
        problem: See :class:`inference.methods.Problem`.
        method: Name of the method, for the error where there is no guide.
        num_samples: S, samples per datum.
        chunk: See :func:`inference.weights.importance_weights.iter_log_weights`.

    Raises:
        ValueError: If there is no guide, or pair or data are unfit.
    """
    chunks = iter_log_weights(
        problem.model,
        problem.require_guide(method),
        *problem.args,
        num_samples=num_samples,
        chunk=chunk if problem.broadcast else 1,
        plate=problem.plate,
        **problem.kwargs,
    )
    return summarise(chunks, num_samples)


def from_weights(summary: WeightSummary, level: float = 0.95, *, method: str = Importance.name) -> Evidence:
    """The evidence that importance weights support.

    Args:
        summary: Summary of the weights, from draws that nothing was adapted to.
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
        value,
        lower,
        upper,
        error,
        tuple(ASYMPTOTIC if two else PROBABILISTIC for two in two_sided.tolist()),
        level,
        method,
        k,
        summary.effective_sample_size.value,
        raw_lower=value,
        num_samples=summary.num_samples,
        evaluations=float(summary.num_samples),
    )


def with_value(plain: Evidence, value: Tensor, standard_error: Tensor, *, method: str) -> Evidence:
    """Evidence of importance weights with a better estimate in its place; what is unbiased stays that of the weights.

    Two-sided intervals become normal ones around the value; Markov's lower bound stays, or is the value if that is
    lower still.

    Args:
        plain: From :func:`from_weights`.
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
