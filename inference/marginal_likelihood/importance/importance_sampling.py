r"""Importance sampling of the evidence, from a guide.

.. math:: \log \hat p(x_n) = \log \frac1S \sum_s \frac{p(x_n, z_s)}{q(z_s \mid x_n)}
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.marginal_likelihood.base.intervals import evidence_from_weights, from_narrow_guide
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.importance.proposal import guide_with_density
from inference.marginal_likelihood.importance.unvisited import Density, two_sided_where_visited
from inference.weights.importance_weights import log_weights_of
from inference.weights.summary import WeightSummary, summarise


@dataclass(frozen=True)
class Importance(Method):
    r"""Importance sampling (IS) from a guide: the log of the mean weight, which underestimates log p(x) on average.

    Where two-sided intervals would follow, modes of the posterior are looked for besides, from the prior's draws too,
    and the interval stays two-sided only where the guide visits what is found: see ``notes``. That costs some thousand
    evaluations per data point and, beyond a few dimensions, curvatures. Beyond 50 latent coordinates it is left out,
    and ``notes`` say so. Where a latent has no unconstrained coordinates, as a discrete one that the guide draws,
    nothing can be looked for, and the interval is a lower bound alone.

    Warning:
        Where k-hat and its error leave no doubt that the weights have a variance, the interval is two-sided and
        asymptotic. Elsewhere, and where the guide has no density on part of a latent's support, it is a lower bound by
        Markov's inequality alone. A mode of the posterior that neither the guide nor the look for modes meets is not in
        the value, and the interval does not show it.

        The level holds over all data points together. Where the true k is near 0.5 and few data points pass, those are
        selected by the same fluctuation that moves the value: at k = 0.48 and S = 1000, 2% pass, and half of their
        intervals miss the truth. Distrust the two-sided intervals of a guide of which most are one-sided.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv 1509.00519.

    Args:
        num_samples: S, samples per data point.
        chunk: See :func:`inference.iter_log_weights`.
        search: Whether modes are looked for. Without, an interval holds only if the guide misses none.
    """

    num_samples: int = 10_000
    chunk: int | None = None
    search: bool = True
    name: ClassVar[str] = "importance"

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples")

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If there is no guide, the data are not finite or have the wrong shape, or model and guide are
                not a valid pair.
        """
        summary, narrow = draw_weights(problem, self.name, self.num_samples, self.chunk)
        found = from_narrow_guide(evidence_from_weights(summary, problem.level), narrow)
        return two_sided_where_visited(found, problem, density_of_guide) if self.search else found

    def refined(self) -> Importance:
        """With four times the samples."""
        return replace(self, num_samples=4 * self.num_samples)


def density_of_guide(problem: Problem) -> Density | None:
    """The guide's log-density in the model's coordinates, or None where it has none."""
    return guide_with_density(problem)[1]


def draw_weights(problem: Problem, method: str, num_samples: int, chunk: int | None) -> tuple[WeightSummary, list[str]]:
    """Draw importance weights from the problem's guide, in constant memory.

    Args:
        problem: See :class:`inference.marginal_likelihood.base.method.Problem`.
        method: Name of the method, for the error where there is no guide.
        num_samples: S, samples per data point.
        chunk: See :func:`inference.iter_log_weights`.

    Returns:
        The weights, and the latents on part of whose support the guide has no density.

    Raises:
        ValueError: If there is no guide, the data are not finite or have the wrong shape, model and guide are not a
            valid pair, or the pair subsamples its data.
    """
    problem.require_guide(method)
    chunks = log_weights_of(
        problem.call, num_samples, chunk=chunk if problem.call.broadcast else 1, progress=problem.progress
    )
    with refuse_batch_dependence(*problem.call.programs):
        first = problem.call.probe()
    first.layout.refuse_subsampling()
    return summarise(chunks, num_samples), first.narrow
