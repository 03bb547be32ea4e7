r"""Adaptive importance sampling of the evidence, from a mixture of Student-t distributions and the guide.

.. math:: \log \hat p(x_n) = \log \frac1S \sum_s \frac{p(x_n, u_s)}
    {\alpha q(u_s \mid x_n) + (1 - \alpha) \sum_j \pi_{nj} t_\nu(u_s; m_{nj}, C_{nj})}

Shares, m and C are those of the posterior, as far as rounds of weighted draws show; the last sum's draws are fresh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.checks import check_count
from inference.core.memory import at_once
from inference.distributions.batched_gaussian import Gaussian
from inference.distributions.student_t import Students, concatenate, mixed, refit, temperatures
from inference.marginal_likelihood.base.intervals import evidence_from_weights, replace_estimate, without_upper_end
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence, replace_rows
from inference.marginal_likelihood.importance.mode_starts import ModeStarts, first_mixture
from inference.marginal_likelihood.importance.proposal import Proposal, guide_with_density, unvalidated_log_joint
from inference.posterior.log_joint import LogJoint
from inference.weights.summary import merge, stratified, summarise

# Numbers held at once: coordinates of all draws of the data adapted together.
_ELEMENTS = 2**21

# Share of the last draws that are those of the first round, so that no mode found is lost.
_STARTS_SHARE = 0.1

# Draws of a round: this many for each coordinate, at least.
_DRAWS_PER_DIM = 100

# Share of a round's draws that the tempered weights are worth at least, and with which adapting ends.
_LEAST, _ENOUGH = 0.1, 0.25

# Distributions for which a round draws apart, at most: more share the draws of so many.
_MOST = 3

# Where the last draws leave the weights' tail in doubt, rounds go on with so many times the draws.
_MORE = 2

# Effective sample size that a normal distribution needs, at least.
_FEWEST = 100


class Adapted(NamedTuple):
    """What was adapted to each data point.

    Attributes:
        proposal: The mixture to draw from.
        first: The mixture of the first round.
        within: Mean of the adapted distributions, with the mean of their covariances.
        starts: The modes that it began from.
    """

    proposal: Proposal
    first: Students
    within: Gaussian
    starts: ModeStarts


@dataclass(frozen=True)
class Adaptive(Method):
    r"""Adaptive importance sampling (population Monte Carlo) from a mixture of Student-t distributions and the guide.

    The first round draws in equal parts from distributions with the moments of the guide's draws (the prior's where
    there is no guide), and with the curvature at each mode found: from draws of guide and prior by Newton's method, up
    to three dimensions from a grid and across folds as well, and then from as many draws of the prior again, until a
    further look finds no mode that matters. Of the points at which it stalls at kinks, as of a decoder with ReLUs,
    those that see a higher one, without a dip of half a nat between, are no modes. Up to three dimensions, data that
    the modes do not explain are looked at again with 2^18 draws. Each round refits the mixture to its weighted draws by
    a step of expectation-maximisation (EM). Weights are raised to a power below one as long as few of them would
    dominate. Rounds end once their draws are worth a quarter of their number. Nothing is adapted to the last draws,
    from which alone estimate and interval come. A tenth of them are the first round's, so that no mode found is lost,
    and a fifth of all are the guide's, where its density is known; each is weighted as a draw of the whole mixture.
    Where k-hat alone forbids a two-sided interval, the mixture may have ended too narrow: it is adapted by as many
    rounds more, of twice the draws, and fresh last draws take the place of those before.

    Warning:
        The mean weight is unbiased for p(x), and its log a lower bound in expectation. The interval is two-sided and
        asymptotic where modes ceased to turn up, k-hat shows that the weights have a variance and the last draws are
        worth a quarter of their number, Markov's elsewhere. A mode that no start leads to, as a narrow bump on a flat
        ground in many dimensions, is not in the value, and neither k-hat nor the interval shows it: ``notes`` say from
        how many independent starts modes were looked for. Thin bent ridges (a banana or ring of a hundredth of its
        length) get few two-sided intervals, and of these some miss the ridge's far end.

        A guide without a density in the model's coordinates (further latents, other supports) gives starts alone.

    References:
        Cappé, Guillin, Marin, Robert, "Population Monte Carlo", 2004. Cappé, Douc, Guillin, Marin, Robert, "Adaptive
        importance sampling in general mixture classes", 2008, arXiv 0710.4242. Oh, Berger, "Adaptive importance
        sampling in Monte Carlo integration", 1992. Owen, Zhou, "Safe and effective importance sampling", 2000.

    Args:
        num_samples: S, fresh draws per data point.
        num_draws: Draws per data point and round of adaptation, at least.
        num_rounds: Rounds at most.
        degrees: Degrees of freedom, nu.

    Example:
        >>> from inference import evidence
        >>> from zoo import PPCA
        >>> model, x = PPCA(5, 2).double(), torch.zeros(4, 5).double()
        >>> result = evidence(model, x, method="adaptive", seed=0, progress=False)
        >>> bool(((result.value - model.log_evidence(x)).abs() < 0.1).all())
        True
    """

    num_samples: int = 10_000
    num_draws: int = 1000
    num_rounds: int = 12
    degrees: float = 6.0
    name: ClassVar[str] = "adaptive"

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_draws", "num_rounds"):
            check_count(getattr(self, name), name)
        if not 0 < self.degrees < math.inf:
            raise ValueError(f"expected positive finite degrees of freedom, got {self.degrees}")

    @torch.no_grad()
    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If the data are not finite or have the wrong shape, model and guide are not a valid pair, or no
                data argument has a row for each data point.
            FloatingPointError: If the joint density is NaN or plus infinity at one of the last draws.
        """
        adapted = self.adapted(problem)
        found = self._found(adapted, problem)
        index = self.tail_in_doubt(problem, found).nonzero()[:, 0]
        if len(index) == 0:
            return found
        try:
            part = replace(problem) if len(index) == len(found.value) else problem.rows(index)
        except ValueError:  # no argument is known to hold rows
            return found
        return replace_rows(found, index, self._found(self._adapted_further(adapted, part, index), part))

    def tail_in_doubt(self, problem: Problem, found: Evidence) -> Tensor:
        """Data points whose evidence by this method lacks an upper end for the sake of k-hat alone, (N,)."""
        starts, _ = problem.keep(self.name, lambda: first_mixture(problem, self.degrees))
        return ~found.upper.isfinite() & ~_unknown(found, starts)

    def refined(self) -> Adaptive:
        """With four times the samples."""
        return replace(self, num_samples=4 * self.num_samples)

    @torch.no_grad()
    def adapted(self, problem: Problem) -> Adapted:
        """The adapted mixture of each data point, with the guide in it where its density is known.

        Raises:
            ValueError: If the data are not finite or have the wrong shape, model and guide are not a valid pair, or no
                data argument has a row for each data point.
        """
        starts, first = problem.keep(self.name, lambda: first_mixture(problem, self.degrees))
        return self._adapted_from(problem, first, first, starts, self._draws(problem.log_joint.dim), _ENOUGH)

    def _adapted_further(self, before: Adapted, part: Problem, index: Tensor) -> Adapted:
        """The mixtures of chosen data points after all rounds once more, however much their draws are worth."""
        first, mixture = before.first.rows(index), before.proposal.mixture.rows(index)
        num_draws = _MORE * self._draws(part.log_joint.dim)
        return self._adapted_from(part, mixture, first, before.starts.rows(index), num_draws, math.inf)

    def _adapted_from(
        self, problem: Problem, mixture: Students, first: Students, starts: ModeStarts, num_draws: int, enough: float
    ) -> Adapted:
        """Mixtures adapted from others until their draws are worth enough of their number, the first ones mixed in."""
        log_joint = problem.log_joint
        rows = at_once(_ELEMENTS, len(mixture.components) * num_draws * log_joint.width)
        groups = torch.arange(log_joint.num_data, device=log_joint.device).split(rows)
        bar = tqdm(groups, disable=not problem.progress, desc=self.name, unit="group")
        mixture = concatenate([self._adapt(log_joint.rows(i), mixture.rows(i), num_draws, enough) for i in bar])
        proposal = Proposal(log_joint, mixed(mixture, first, _STARTS_SHARE), *guide_with_density(problem))
        return Adapted(proposal, first, mixture.within, starts)

    def _found(self, adapted: Adapted, problem: Problem) -> Evidence:
        """Estimate and interval by fresh draws of an adapted mixture."""
        strata = [summarise(blocks, size) for blocks, size in adapted.proposal.log_weights(self.num_samples)]
        plain = widened(evidence_from_weights(reduce(merge, strata), problem.level), adapted.starts)
        log_joint = adapted.proposal.log_joint
        result = replace_estimate(plain, *stratified(*strata), method=self.name)
        return replace(result, evaluations=log_joint.evaluations / log_joint.num_data)

    def _draws(self, dim: int) -> int:
        return max(self.num_draws, _DRAWS_PER_DIM * dim)

    def _adapt(self, log_joint: LogJoint, mixture: Students, num_draws: int, enough: float) -> Students:
        for _ in range(self.num_rounds):
            total = min(_MOST, len(mixture.components)) * num_draws
            u, log_density = mixture.draw(total)
            log_weights = unvalidated_log_joint(log_joint, u).nan_to_num(nan=-math.inf) - log_density
            power, size = temperatures(log_weights, _LEAST * total)
            mixture = refit(u, power * log_weights, mixture)
            if bool(((power == 1) & (size > enough * total)).all()):
                break
        return mixture


def widened(plain: Evidence, starts: ModeStarts) -> Evidence:
    """Keep two-sided intervals only where modes ceased to turn up, and the effective sample size is large enough.

    k-hat alone passes weights of few draws that hit a thin ridge; where they are few, Markov's bound stands alone.
    """
    return replace(without_upper_end(plain, _unknown(plain, starts)), notes=starts.notes)


def _unknown(found: Evidence, starts: ModeStarts) -> Tensor:
    """Whether modes go on turning up, or the last draws are worth too little for a normal distribution, (N,)."""
    assert found.effective_sample_size is not None
    return ~(found.effective_sample_size > max(_FEWEST, _ENOUGH * found.num_samples)) | ~starts.settled
