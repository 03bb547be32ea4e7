r"""The evidence by adaptive importance sampling from a Student-t law per datum.

.. math:: \log \hat p(x_n) = \log \frac1S \sum_s \frac{p(x_n, u_s)}{t_\nu(u_s; m_n, C_n)}

m and C are those of the posterior, as far as rounds of weighted draws show; the draws of the last sum are fresh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.annealing import gaussian_of_draws
from inference.checks import check_count
from inference.estimates import Evidence, concatenate
from inference.hmc import Gaussian
from inference.importance import summarise
from inference.importance_evidence import from_weights
from inference.laplace import highest_mode
from inference.log_joint import LogJoint
from inference.methods import Method, Problem
from inference.pair import refuse_batch_laws
from inference.student import Student, mixture_log_prob, moment_fit, temperatures

# Numbers held at once: coordinates of all draws of the data adapted together.
_ELEMENTS = 2**21
# Starts of the mode search per datum.
_STARTS = 2
# Draws of a round: this many for each coordinate, at least.
_DRAWS_PER_DIM = 100
# Share of a round's draws that the tempered weights are worth at least, and with which adapting ends.
_LEAST, _ENOUGH = 0.1, 0.25


@dataclass(frozen=True)
class Adaptive(Method):
    r"""Adaptive importance sampling from a Student-t law with full covariance, one per datum.

    The first round draws in equal parts from two laws: one with the moments of the guide's draws (the prior's where
    there is no guide), one of the mode and curvature that Newton's method finds from there. Each further round draws
    from the law with the moments of the weighted draws before. Weights are raised to a power below one as long as few
    of them would dominate. Nothing is adapted to the last draws, from which alone estimate and interval come.

    Warning:
        The mean weight is unbiased for p(x), and its log a lower bound in expectation; the interval is two-sided and
        asymptotic where k-hat shows that the weights have a variance, Markov's elsewhere. A mode of the posterior that
        neither the first draws nor Newton's method visit is not in the value, and neither k-hat nor the interval
        says so: a guide that sees one of two equal modes gives log 2 too little, with a narrow interval.

    References:
        Cappé, Guillin, Marin, Robert, "Population Monte Carlo", 2004. Oh, Berger, "Adaptive importance sampling in
        Monte Carlo integration", 1992.

    Args:
        num_samples: S, fresh draws per datum.
        num_draws: Draws per datum and round of adaptation, at least.
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
            ValueError: If model, guide or data are unfit, or no data argument has a row for each datum.
            FloatingPointError: If the joint density is NaN or plus infinity at one of the last draws.
        """
        parts = []
        for log_joint, law in self.adapted(problem):
            summary = summarise(fresh_log_weights(log_joint, law, self.num_samples), self.num_samples)
            parts.append(from_weights(summary, problem.level, method=self.name))
        log_joint = problem.log_joint
        return replace(concatenate(parts), evaluations=log_joint.evaluations / log_joint.num_data)

    def refined(self) -> Adaptive:
        """With four times the samples."""
        return replace(self, num_samples=4 * self.num_samples)

    @torch.no_grad()
    def adapted(self, problem: Problem) -> Iterator[tuple[LogJoint, Student]]:
        """The adapted law of each datum, with the log joint density, of some data after another.

        Raises:
            ValueError: If model, guide or data are unfit, or no data argument has a row for each datum.
        """
        log_joint = problem.log_joint
        starts = self._starts(problem)
        rows = max(1, _ELEMENTS // (2 * self._draws(log_joint.dim) * log_joint.dim))
        groups = torch.arange(log_joint.num_data, device=log_joint.device).split(rows)
        for index in tqdm(groups, disable=not problem.progress, desc=self.name, unit="group"):
            part = log_joint.rows(index)
            yield part, self._adapt(part, [start.rows(index) for start in starts])

    def _draws(self, dim: int) -> int:
        return max(self.num_draws, _DRAWS_PER_DIM * dim)

    def _starts(self, problem: Problem) -> list[Student]:
        programs = [problem.model] if problem.guide is None else [problem.model, problem.guide]
        with refuse_batch_laws(*programs):
            wide = gaussian_of_draws(problem.log_joint, problem.guide, 1.0)
        mode = highest_mode(problem, _STARTS)
        narrow, found = mode.gaussian, mode.log_joint.isfinite()
        loc = torch.where(found.unsqueeze(-1), narrow.loc, wide.loc)
        factor = torch.where(found.reshape(-1, 1, 1), narrow.factor, wide.factor)
        return [Student(wide, self.degrees), Student(Gaussian(loc, factor), self.degrees)]

    def _adapt(self, log_joint: LogJoint, laws: Sequence[Student]) -> Student:
        num_draws = self._draws(log_joint.dim)
        for _ in range(self.num_rounds):
            u = torch.cat([law.draw(num_draws)[0] for law in laws])
            log_weights = _log_joint(log_joint, u).nan_to_num(nan=-math.inf) - mixture_log_prob(laws, u)
            power, size = temperatures(log_weights, _LEAST * num_draws)
            laws = [moment_fit(u, power * log_weights, laws[-1])]
            if bool(((power == 1) & (size > _ENOUGH * num_draws)).all()):
                break
        return laws[0]


def fresh_log_weights(log_joint: LogJoint, law: Student, num_samples: int) -> Iterator[Tensor]:
    """Log weights of new draws of a law, blocks of (S', N) in nats.

    Raises:
        FloatingPointError: If one is NaN or plus infinity.
    """
    side = max(1, _ELEMENTS // (log_joint.num_data * log_joint.dim))
    for first in range(0, num_samples, side):
        u, log_density = law.draw(min(side, num_samples - first))
        log_weights = _log_joint(log_joint, u) - log_density
        if not bool((log_weights < math.inf).all()):
            raise FloatingPointError("a log weight is NaN or +inf: the model's density breaks down far out")
        yield log_weights


def _log_joint(log_joint: LogJoint, u: Tensor) -> Tensor:
    with pyro.validation_enabled(False):
        return log_joint(u)
