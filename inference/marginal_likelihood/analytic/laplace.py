r"""Laplace approximation of the evidence at the mode of the joint density.

.. math:: \log p(x_n) \approx \log p(x_n, u^*) + \tfrac d2 \log 2 \pi - \tfrac12 \log \det H,
    \quad H = -\nabla^2 \log p(x_n, u^*)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pyro
import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import ASYMPTOTIC, Evidence
from inference.posterior.log_joint import LogJoint
from inference.posterior.modes import Mode, find_modes, prior_scale

# Draws of the guide whose mean is a start.
_DRAWS = 128


@dataclass(frozen=True)
class Laplace(Method):
    r"""Laplace approximation: the Gaussian integral under the highest mode that Newton's method finds.

    Exact where the posterior is Gaussian in unconstrained coordinates. Elsewhere it is a limit: the relative error of
    p(x) falls as 1 / D with the number D of observations that depend on each data point's latents. The guarantee
    ``"asymptotic"`` is in that sense alone. Nothing here measures the error, so the interval is the whole line and
    the standard error infinite.

    Warning:
        The mode depends on the coordinates, here the unconstrained ones. Skewed or heavy-tailed posteriors are off by
        tenths of a nat; of several modes the highest alone counts, so that two equal ones give log 2 too little. NaN
        where no start led to a maximum with positive curvature in all directions.

    References:
        Tierney, Kadane, "Accurate approximations for posterior moments and marginal densities", 1986.

    Args:
        num_starts: Starts of Newton's method per data point: the mean of the guide's draws, or the prior's median, and
            draws.

    Example:
        >>> from inference import evidence
        >>> from zoo import PPCA
        >>> model, x = PPCA(5, 2).double(), torch.zeros(4, 5).double()
        >>> result = evidence(model, x, method="laplace", seed=0, progress=False)
        >>> torch.allclose(result.value, model.log_evidence(x), atol=1e-9)
        True
    """

    num_starts: int = 4
    name: ClassVar[str] = "laplace"

    def __post_init__(self) -> None:
        check_count(self.num_starts, "num_starts")

    @torch.no_grad()
    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If the data are not finite or have the wrong shape, model and guide are not a valid pair, or no
                data argument has a row for each data point.
        """
        log_joint = problem.log_joint
        mode = highest_mode(problem, self.num_starts)
        value = mode.log_joint + 0.5 * log_joint.dim * math.log(2 * math.pi) - 0.5 * mode.log_det
        # Each expansion is a value, a gradient and a Hessian of d more.
        evaluations = log_joint.evaluations / log_joint.num_data * (log_joint.dim + 2)
        everywhere = torch.full_like(value, math.inf)
        kinds = (ASYMPTOTIC,) * len(value)
        return Evidence(
            value=value,
            lower=-everywhere,
            upper=everywhere,
            standard_error=everywhere,
            guarantee=kinds,
            level=problem.level,
            method=self.name,
            evaluations=evaluations,
        )


@torch.no_grad()
def highest_mode(problem: Problem, num_starts: int) -> Mode:
    """The highest mode of each data point's joint density that Newton's method reaches from the guide or the prior.

    Args:
        problem: Model, data and perhaps a guide.
        num_starts: Starts per data point.
    """
    log_joint = problem.log_joint
    programs = problem.call.programs
    with refuse_batch_dependence(*programs), pyro.validation_enabled(False):
        location, scale = prior_scale(log_joint)
        starts = _starts(problem, log_joint, num_starts, location)
        modes = find_modes(log_joint, starts, location, scale)
    return Mode(modes.location[0], modes.log_joint[0], modes.hessian[0], scale)


def _starts(problem: Problem, log_joint: LogJoint, num_starts: int, median: Tensor) -> Tensor:
    if problem.call.guide is None:
        draws, first = log_joint.sample_prior(num_starts), median
    else:
        draws = log_joint.sample_guide(problem.call.guide, max(num_starts, _DRAWS))[0]
        first = draws.mean(0)
    return torch.cat([first.unsqueeze(0), draws[: num_starts - 1]]).to(median)
