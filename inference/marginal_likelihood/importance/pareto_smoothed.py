r"""Pareto-smoothed importance sampling (PSIS) of the evidence, from a guide.

.. math:: \log \hat p(x_n) = \log \frac1S \sum_s \tilde w_{sn}

The largest weights are replaced by quantiles of the generalised Pareto distribution that is fitted to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.core.checks import check_count
from inference.core.estimates import Estimate
from inference.marginal_likelihood.base.intervals import evidence_from_weights, from_narrow_guide, replace_estimate
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.importance.importance_sampling import density_of_guide, draw_weights
from inference.marginal_likelihood.importance.unvisited import two_sided_where_visited
from inference.weights.pareto_smoothing import smooth_tail
from inference.weights.summary import WeightSummary


@dataclass(frozen=True)
class SmoothedImportance(Method):
    r"""Pareto-smoothed importance sampling (PSIS) from a guide: less variance for a little bias.

    Warning:
        The smoothed mean is not unbiased and bounds nothing: ``raw_lower`` and one-sided intervals are those of the
        raw weights. Where k-hat shows a variance, the interval is two-sided and asymptotic around the smoothed value.
        For k-hat up to 0.7 the value is still of use, without a guarantee. Modes that the guide does not visit are
        looked for as :class:`inference.Importance` does.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance Sampling", 2015, arXiv 1507.02646.

    Args:
        num_samples: S, samples per data point; below 30 nothing is smoothed.
        chunk: See :func:`inference.iter_log_weights`.
        search: See :class:`inference.Importance`.
    """

    num_samples: int = 10_000
    chunk: int | None = None
    search: bool = True
    name: ClassVar[str] = "smoothed"

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples")

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If there is no guide, the data are not finite or have the wrong shape, or model and guide are
                not a valid pair.
        """
        summary, narrow = draw_weights(problem, self.name, self.num_samples, self.chunk)
        plain = from_narrow_guide(evidence_from_weights(summary, problem.level), narrow)
        found = replace_estimate(plain, *smoothed_mean(summary), method=self.name)
        return two_sided_where_visited(found, problem, density_of_guide) if self.search else found

    def refined(self) -> SmoothedImportance:
        """With four times the samples."""
        return replace(self, num_samples=4 * self.num_samples)


def smoothed_mean(summary: WeightSummary) -> Estimate:
    """Log of the mean of the smoothed weights, (N,) in nats, with the delta method's error as if they were raw."""
    num = summary.num_samples
    smooth = smooth_tail(summary.top, num, summary.tolerance)
    first, second = (_exchange(summary.log_sums[j - 1], j * summary.top, j * smooth) for j in (1, 2))
    excess = torch.expm1(math.log(num) + second - 2 * first).clamp(min=0)
    error = (excess / (num - 1)).sqrt() if num > 1 else excess + math.inf
    return Estimate(first - math.log(num), error.nan_to_num(nan=math.inf, posinf=math.inf))


def _exchange(log_total: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Log of a sum in which some terms are replaced by others, all as logarithms."""
    share = (old.logsumexp(0) - log_total).exp().clamp(max=1).nan_to_num(1.0)
    return torch.logaddexp(log_total + torch.log1p(-share), new.logsumexp(0))
