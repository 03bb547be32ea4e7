"""The choice of a method for the evidence of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from inference.core.checks import check_count
from inference.core.protocols import SupportsLogEvidence, SupportsPosterior
from inference.marginal_likelihood.analytic.exact import Exact
from inference.marginal_likelihood.annealing.annealed_importance_sampling import Annealed
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.importance.importance_sampling import Importance
from inference.marginal_likelihood.quadrature.adaptive_quadrature import Quadrature
from inference.posterior.log_joint import LogJoint

_CHECKED = 3

# The tolerated error of a closed form, relative to its size and in nats.
_ROUNDING = 1e-6
_MAX_QUADRATURE_DIM = 3


@dataclass(frozen=True)
class Automatic(Method):
    """Automatic choice of a method: a closed form, quadrature up to three latent dimensions, or annealing (AIS).

    A closed form is checked on three data points against its own posterior. Where there is a guide, annealing is
    reported together with the guide's importance-sampling estimate: both are lower bounds in expectation, the larger is
    the value unless annealing has a two-sided interval, and their ``spread`` is the least that is uncertain.

    Args:
        annealed: Settings of annealing.
        num_samples: Importance samples per data point, from the guide.
    """

    annealed: Annealed = Annealed()  # noqa: RUF009
    num_samples: int = 2000
    name: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples")

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,), by the method chosen.

        Raises:
            ValueError: If a closed form disagrees with the model's own density, the data are not finite or have the
                wrong shape, or model and guide are not a valid pair.
        """
        if (
            isinstance(problem.call.model, SupportsLogEvidence)
            and len(problem.call.args) == 1
            and not problem.call.kwargs
        ):
            result = Exact().estimate(problem)
            _check_closed_form(problem, result)
            return result
        if problem.log_joint.dim <= _MAX_QUADRATURE_DIM:
            return Quadrature().estimate(problem)
        result = self.annealed.estimate(problem)
        if problem.call.guide is None:
            return result
        return _larger_bound(result, Importance(self.num_samples).estimate(problem), problem.level)

    def refined(self) -> Automatic | None:
        """With four times the temperatures and samples."""
        return replace(self, annealed=self.annealed.refined(), num_samples=4 * self.num_samples)


def _larger_bound(first: Evidence, second: Evidence, level: float) -> Evidence:
    """Two lower bounds as one: the larger value, and the lower end of either at half the risk."""
    two_sided = first.upper.isfinite()
    larger = ~two_sided & (second.value > first.value)
    value = torch.where(larger, second.value, first.value)
    return replace(
        first,
        value=value,
        standard_error=torch.where(larger, second.standard_error, first.standard_error),
        lower=torch.where(two_sided, first.lower, value - math.log(2 / (1 - level))),
        raw_lower=torch.logaddexp(first.value, second.value) - math.log(2),
        pareto_k=second.pareto_k,
        effective_sample_size=second.effective_sample_size,
        spread=(first.value - second.value).abs(),
        evaluations=first.evaluations + second.evaluations,
    )


@torch.no_grad()
def _check_closed_form(problem: Problem, result: Evidence) -> None:
    """Compare the closed form of three data points with log p(x, z) - log p(z | x) at posterior draws."""
    model = problem.call.model
    if not isinstance(model, SupportsPosterior):
        return
    x = problem.call.args[0][:_CHECKED].to(torch.float64)
    try:
        log_joint = LogJoint(model, x, plate=problem.call.plate)
    except TypeError:  # a model in another dtype than the closed form's; functions are not converted
        return
    if len(log_joint.sites) > 1:
        return
    posterior = model.posterior(x)
    z = posterior.sample()
    u, log_det = log_joint.unconstrain({log_joint.sites[0]: z}, 1)
    found = (log_joint(u) - log_det)[0] - posterior.log_prob(z)
    off = (found - result.value[:_CHECKED]).abs()
    if not bool((off <= _ROUNDING * (1 + found.abs())).all()):
        n = int(off.argmax())
        raise ValueError(
            f"expected log_evidence of {type(model).__name__} to agree with log p(x, z) - log p(z | x), got "
            f"{float(result.value[n]):.6f} against {float(found[n]):.6f} at data point {n}"
        )
