"""The evidence by annealed importance sampling with Hamiltonian transitions, as a method of ``evidence``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.annealer import Annealer
from inference.core.batch_dependence import refuse_batch_laws
from inference.core.checks import check_count
from inference.core.run import Program
from inference.distributions.batched_gaussian import Gaussian
from inference.estimates import Evidence
from inference.importance_evidence import from_weights
from inference.log_joint import LogJoint
from inference.methods import Method, Problem
from inference.weights.summary import summarise

# Draws of the guide, or the prior, that the Gaussian is fitted to, at least; and rows of them drawn side by side.
_DRAWS, _DRAWN_ROWS = 1000, 2**13


@dataclass(frozen=True)
class Annealed(Method):
    r"""Annealed importance sampling from a Gaussian to the posterior, by Hamiltonian Monte Carlo.

    The Gaussian has the mean and covariance of the guide's draws, or the prior's where there is no guide, in
    unconstrained coordinates, and is widened. Temperatures and steps are each datum's own.

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
        num_chains: S, chains per datum.
        num_leapfrog: Leapfrog steps, each of one gradient, at each temperature.
        widening: Factor on the standard deviations of the Gaussian.

    Raises:
        TypeError: If a count is no integer.
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
            ValueError: If model, guide or data are unfit.
            FloatingPointError: If the joint density is NaN or infinite where a chain begins.
        """
        annealer = self.prepare(problem)
        summary = summarise(annealer.log_weights(self.num_chains), self.num_chains)
        return replace(from_weights(summary, problem.level, method=self.name), evaluations=annealer.evaluations)

    @torch.no_grad()
    def prepare(self, problem: Problem) -> Annealer:
        """The frozen path of each datum, from the start that the guide gives and pilot chains.

        Raises:
            ValueError: If model, guide or data are unfit.
        """
        log_joint = problem.log_joint
        programs = [problem.model] if problem.guide is None else [problem.model, problem.guide]
        with refuse_batch_laws(*programs):
            start = gaussian_of_draws(log_joint, problem.guide, self.widening)
        annealer = Annealer(log_joint, start, self.num_leapfrog, problem.progress)
        annealer.tune(self.num_temperatures)
        return annealer

    def refined(self) -> Annealed:
        """With four times the temperatures."""
        return replace(self, num_temperatures=4 * self.num_temperatures)


def gaussian_of_draws(log_joint: LogJoint, guide: Program | None, widening: float) -> Gaussian:
    """The Gaussian with the moments of the guide's draws, or the prior's where there is no guide, widened.

    Args:
        log_joint: Of the model; its coordinates are the Gaussian's.
        guide: Pyro guide.
        widening: Factor on the standard deviations.
    """
    total = max(_DRAWS, 20 * log_joint.dim)
    count = min(total, max(1, _DRAWN_ROWS // log_joint.num_data))
    counts = [count] * -(-total // count)
    draws = (log_joint.sample_prior(c) if guide is None else log_joint.draw_guide(guide, c) for c in counts)
    loc, covariance = _moments(draws)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    rounding = 100 * torch.finfo(loc.dtype).eps * variances.mean(-1, keepdim=True)
    factor = torch.linalg.cholesky(covariance + torch.diag_embed(rounding.expand_as(variances)))
    return Gaussian(loc, widening * factor)


def _moments(draws: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Means (N, d) and covariances (N, d, d) of draws that come in blocks (S', N, d)."""
    num, shift, first, second = 0, None, None, None
    for u in draws:
        shift = u.mean(0) if shift is None else shift
        residual = u - shift
        product = torch.einsum("sni,snj->nij", residual, residual)
        first = residual.sum(0) if first is None else first + residual.sum(0)
        second = product if second is None else second + product
        num += len(u)
    assert shift is not None
    assert first is not None
    assert second is not None
    mean = first / num
    return shift + mean, second / num - mean.unsqueeze(-1) * mean.unsqueeze(-2)
