"""Annealed importance sampling (AIS) of the evidence, with Hamiltonian transitions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count, check_positive
from inference.distributions.batched_gaussian import Gaussian
from inference.marginal_likelihood.annealing.chains import Annealer
from inference.marginal_likelihood.base.intervals import agree, evidence_from_weights, reaching, without_upper_end
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.importance.unvisited import two_sided_where_visited
from inference.posterior.moments import gaussian_of_draws
from inference.weights.summary import summarise

# A two-sided interval needs the agreement of chains whose number of temperatures is divided by this.
_SHORTER = 4

_NO_VARIANCE = "the weights show no variance"


@dataclass(frozen=True)
class Annealed(Method):
    r"""Annealed importance sampling (AIS) from a Gaussian to the posterior, by Hamiltonian Monte Carlo (HMC).

    The Gaussian has the mean and covariance of the guide's draws, or the prior's where there is no guide, in
    unconstrained coordinates, and is widened. Temperatures and steps are each data point's own.

    Warning:
        The mean weight is unbiased for p(x), and its log a lower bound in expectation; the interval is Markov's. With a
        hundred chains or more, whose k-hat shows a variance, it is two-sided and asymptotic where chains of a quarter
        of the length agree with them: k-hat alone does not see that chains stop short. It reaches the shorter chains'
        value, for a hundred weights chosen for their light tails show less than their variance. Chains that never visit
        a mode of the posterior, whatever their length, leave the value below log p(x) by the mode's share; so where the
        interval would be two-sided, modes are looked for besides, as :class:`inference.Importance` does. In float32 the
        energies' rounding is a bias: give the model and data in float64.

    References:
        Neal, "Annealed importance sampling", 1998, arXiv physics/9803008. Wu, Burda, Salakhutdinov, Grosse, "On the
        Quantitative Analysis of Decoder-Based Generative Models", 2017, arXiv 1611.04273.

    Args:
        num_temperatures: T.
        num_chains: S, chains per data point.
        num_leapfrog: Leapfrog steps, each of one gradient, at each temperature.
        widening: Factor on the standard deviations of the Gaussian.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If a count is below one, or the widening not positive and finite.

    Example:
        >>> from inference import evidence
        >>> from zoo import PPCA
        >>> method = Annealed(num_temperatures=20, num_chains=4)
        >>> evidence(PPCA(5, 2).double(), torch.zeros(4, 5).double(), method=method, progress=False).guarantee[0]
        'probabilistic'
    """

    num_temperatures: int = 1000
    num_chains: int = 16
    num_leapfrog: int = 3
    widening: float = 1.2
    name: ClassVar[str] = "annealed"

    def __post_init__(self) -> None:
        for name in ("num_temperatures", "num_chains", "num_leapfrog"):
            check_count(getattr(self, name), name)
        check_positive(self.widening, "widening")

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If the data are not finite or have the wrong shape, or model and guide are not a valid pair.
            FloatingPointError: If the joint density is NaN or infinite where a chain begins.
        """
        return self.estimate_rows(problem, torch.arange(problem.log_joint.num_data, device=problem.log_joint.device))

    @torch.no_grad()
    def estimate_rows(self, problem: Problem, index: Tensor) -> Evidence:
        """The evidence of chosen data points, (M,).

        Args:
            problem: The problem of all data points.
            index: The chosen ones, (M,) integers.

        Raises:
            ValueError: If the data are not finite or have the wrong shape, or model and guide are not a valid pair.
            FloatingPointError: If the joint density is NaN or infinite where a chain begins.
        """
        annealer = self.prepare(problem, index)
        found = self._found(annealer, problem.level)
        notes = (_NO_VARIANCE,) * len(found.value)
        if bool((two_sided := found.upper.isfinite()).any()):
            annealer.tune(max(1, self.num_temperatures // _SHORTER))
            shorter = self._found(annealer, problem.level)
            same = agree(found, shorter)
            notes = tuple(_note(*row) for row in zip(two_sided.tolist(), same.tolist(), found.value, shorter.value))
            found = reaching(without_upper_end(found, ~same), shorter.value)
        found = replace(found, notes=notes, evaluations=annealer.evaluations)
        return two_sided_where_visited(found, problem, lambda _: None, index)

    def _found(self, annealer: Annealer, level: float) -> Evidence:
        summary = summarise(annealer.log_weights(self.num_chains), self.num_chains)
        return evidence_from_weights(summary, level, method=self.name)

    @torch.no_grad()
    def prepare(self, problem: Problem, index: Tensor | None = None) -> Annealer:
        """The frozen path of each data point, from the start that the guide gives and pilot chains.

        Args:
            problem: The problem of all data points.
            index: The chosen ones, (M,) integers; None for all.

        Raises:
            ValueError: If the data are not finite or have the wrong shape, or model and guide are not a valid pair.
        """
        log_joint = problem.log_joint
        programs = problem.call.programs
        with refuse_batch_dependence(*programs):
            start = gaussian_of_draws(log_joint, problem.call.guide, self.widening)
        if index is not None:
            log_joint, start = log_joint.rows(index), Gaussian(*(part[index] for part in start))
        annealer = Annealer(log_joint, start, self.num_leapfrog, problem.progress)
        annealer.tune(self.num_temperatures)
        return annealer

    def refined(self) -> Annealed:
        """With four times the temperatures."""
        return replace(self, num_temperatures=4 * self.num_temperatures)


def _note(two_sided: bool, same: bool, longer: Tensor, shorter: Tensor) -> str:
    """What two lengths of chains said of a data point."""
    if not two_sided:
        return _NO_VARIANCE
    verdict = "agree" if same else "give no two intervals that agree"
    return f"chains of full and of a quarter of the length {verdict}: {float(longer):.3f} and {float(shorter):.3f} nats"
