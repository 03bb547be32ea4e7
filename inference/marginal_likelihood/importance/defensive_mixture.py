r"""Defensive importance sampling of the evidence, from a mixture of guide and prior.

.. math:: \log \hat p(x_n) = \log \frac1S \sum_s \frac{p(x_n, u_s)}{\alpha q(u_s \mid x_n) + (1 - \alpha) p(u_s)}

A share alpha of the draws is the guide's, the rest the prior's, and each is weighted as a draw of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count, check_log_weights
from inference.core.memory import at_once
from inference.marginal_likelihood.base.intervals import evidence_from_weights, replace_estimate
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.importance.unvisited import two_sided_where_visited
from inference.posterior.log_joint import LogJoint
from inference.weights.summary import merge, stratified, summarise

# Coordinates drawn side by side.
_ELEMENTS = 2**19

# Relative error of a log-density that is rounding, in float32.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Defensive(Method):
    r"""Defensive importance sampling from a mixture of guide and prior, by the balance heuristic.

    Weights are at most p(x | z) / (1 - alpha), so that a guide that is too narrow cannot give them an infinite
    variance. Where the posterior is far narrower than the prior, the prior's draws are wasted, and no number of draws
    that is feasible shows the bound.

    Warning:
        The mean weight is unbiased for p(x), and its log a lower bound in expectation; the interval is two-sided and
        asymptotic where k-hat shows a variance, Markov's elsewhere. The prior finds a mode that the guide misses if
        its draws hit it, which in many dimensions they do not; so modes are looked for besides, as
        :class:`inference.Importance` does.

    References:
        Veach, Guibas, "Optimally combining sampling techniques for Monte Carlo rendering", 1995. Owen, Zhou, "Safe and
        effective importance sampling", 2000.

    Args:
        num_samples: S, draws per data point of both together, at least two.
        guide_share: alpha, between 0 and 1: which share of the draws is the guide's.
        search: See :class:`inference.Importance`.
    """

    num_samples: int = 10_000
    guide_share: float = 0.8
    search: bool = True
    name: ClassVar[str] = "defensive"

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples", 2)
        if not 0 < self.guide_share < 1:
            raise ValueError(f"expected guide_share between 0 and 1, got {self.guide_share}")

    @torch.no_grad()
    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If there is no guide, the data are not finite or have the wrong shape, model and guide are
                not a valid pair, or the guide's coordinates are not the model's.
            FloatingPointError: If a weight is NaN or plus infinity.
        """
        guide = problem.require_guide(self.name)
        guides = min(self.num_samples - 1, max(1, round(self.guide_share * self.num_samples)))
        priors = self.num_samples - guides
        with refuse_batch_dependence(problem.call.model, guide):
            mixture = _Mixture(problem, guides, priors)
            strata = summarise(mixture.of_guide(), guides), summarise(mixture.of_prior(), mixture.priors)
        plain = evidence_from_weights(merge(*strata), problem.level)
        found = replace_estimate(plain, *stratified(*strata), method=self.name)
        if not self.search:
            return found
        return two_sided_where_visited(found, problem, lambda part: _Mixture(part, guides, priors).log_prob)

    def refined(self) -> Defensive:
        """With four times the samples."""
        return replace(self, num_samples=4 * self.num_samples)


class _Mixture:
    """Log weights of draws of guide and prior, each as a draw of both in their numbers."""

    def __init__(self, problem: Problem, guides: int, priors: int) -> None:
        self.guides, self.priors = guides, priors
        self._log_joint, self._guide = problem.log_joint, problem.require_guide(Defensive.name)
        self._density = guide_density(problem)
        self._shares = math.log(guides / (guides + priors)), math.log(priors / (guides + priors))

    def of_guide(self) -> Iterator[Tensor]:
        for size in self._sizes(self.guides):
            u, log_guide = self._log_joint.sample_guide(self._guide, size)
            check_same(log_guide, self._density(u))
            yield self._balanced(u, log_guide)

    def of_prior(self) -> Iterator[Tensor]:
        for size in self._sizes(self.priors):
            u = self._log_joint.sample_prior(size)
            # Outside the guide's support its coordinates are NaN, and its density is zero.
            yield self._balanced(u, self._density(u).nan_to_num(nan=-math.inf))

    def log_prob(self, u: Tensor) -> Tensor:
        """The mixture's log-density at u (S, N, d), (S, N) in nats."""
        return self._mixture(self._log_joint.terms(u).prior, self._density(u).nan_to_num(nan=-math.inf))

    def _sizes(self, total: int) -> list[int]:
        side = at_once(_ELEMENTS, self._log_joint.num_data * self._log_joint.width)
        return [min(side, total - first) for first in range(0, total, side)]

    def _balanced(self, u: Tensor, log_guide: Tensor) -> Tensor:
        prior, likelihood = self._log_joint.terms(u)
        log_weights = prior + likelihood - self._mixture(prior, log_guide)
        check_log_weights(log_weights)
        return log_weights

    def _mixture(self, log_prior: Tensor, log_guide: Tensor) -> Tensor:
        return torch.logaddexp(self._shares[0] + log_guide, self._shares[1] + log_prior)


def guide_density(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The guide's log-density of the model's unconstrained coordinates u (S, N, d): a function to (S, N) in nats.

    Raises:
        ValueError: If the guide's latents have other sites or sizes than the model's.
    """
    guide = problem.require_guide(Defensive.name)
    own = LogJoint.of(replace(problem.call, model=guide))
    ours = problem.log_joint.coordinates
    sizes, expected = ({name: s.stop - s.start for name, s in c.items()} for c in (own.coordinates, ours))
    if sizes != expected:
        raise ValueError(f"expected a guide with the model's unconstrained sites {expected}, got {sizes}")
    order = [i for name in own.coordinates for i in range(ours[name].start, ours[name].stop)]
    return lambda u: own.terms(u[..., order]).prior  # what a guide observes is no part of its density


def check_same(drawn: Tensor, evaluated: Tensor) -> None:
    """Refuse a guide whose density at given coordinates is another than it was at those same as a draw.

    Raises:
        ValueError: If so: its supports differ from the model's, or it is random beyond its sites.
    """
    off = ((drawn - evaluated).abs() / (1 + drawn.abs())).nan_to_num(nan=math.inf).median()
    if not bool(off < _ROUNDING):
        raise ValueError(
            "expected a guide whose latents have the model's supports and no randomness but its sites', got one whose "
            f"log-density at its own draws is off by {float(off):.2g} of itself"
        )
