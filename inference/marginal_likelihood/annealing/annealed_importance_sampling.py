"""Annealed importance sampling (AIS) of the evidence, with Hamiltonian transitions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.marginal_likelihood.annealing.chains import Annealer
from inference.marginal_likelihood.base.intervals import evidence_from_weights
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence
from inference.posterior.moments import gaussian_of_draws
from inference.weights.summary import summarise


@dataclass(frozen=True)
class Annealed(Method):
    r"""Annealed importance sampling (AIS) from a Gaussian to the posterior, by Hamiltonian Monte Carlo (HMC).

    The Gaussian has the mean and covariance of the guide's draws, or the prior's where there is no guide, in
    unconstrained coordinates, and is widened. Temperatures and steps are each data point's own.

    Warning:
        The mean weight is unbiased for p(x), and its log a lower bound in expectation; the interval is Markov's. With a
        hundred chains or more, whose k-hat shows a variance, it is two-sided and asymptotic. Chains that never visit a
        mode of the posterior leave the value below log p(x) by the mode's share. In float32 the energies' rounding is
        a bias: give the model and data in float64.

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
        if not 0 < self.widening < math.inf:
            raise ValueError(f"expected a positive finite widening, got {self.widening}")

    @torch.no_grad()
    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If the data are not finite or have the wrong shape, or model and guide are not a valid pair.
            FloatingPointError: If the joint density is NaN or infinite where a chain begins.
        """
        annealer = self.prepare(problem)
        summary = summarise(annealer.log_weights(self.num_chains), self.num_chains)
        return replace(
            evidence_from_weights(summary, problem.level, method=self.name), evaluations=annealer.evaluations
        )

    @torch.no_grad()
    def prepare(self, problem: Problem) -> Annealer:
        """The frozen path of each data point, from the start that the guide gives and pilot chains.

        Raises:
            ValueError: If the data are not finite or have the wrong shape, or model and guide are not a valid pair.
        """
        log_joint = problem.log_joint
        programs = problem.call.programs
        with refuse_batch_dependence(*programs):
            start = gaussian_of_draws(log_joint, problem.call.guide, self.widening)
        annealer = Annealer(log_joint, start, self.num_leapfrog, problem.progress)
        annealer.tune(self.num_temperatures)
        return annealer

    def refined(self) -> Annealed:
        """With four times the temperatures."""
        return replace(self, num_temperatures=4 * self.num_temperatures)
