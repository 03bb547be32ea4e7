r"""Independent check of an integral by importance sampling, from the prior and the modes found.

.. math:: p(x_n) = E_q \frac{p(x_n, u)}{q(u)}, \quad q = \tfrac12 p(u) + \tfrac12 \sum_j \alpha_j t(u; m_j, \Sigma_j)

References:
    Owen, Zhou, "Safe and effective importance sampling", 2000.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from inference.core.memory import at_once
from inference.distributions.batched_gaussian import Gaussian
from inference.distributions.student_t import Student, Students
from inference.marginal_likelihood.base.intervals import MOST_EXCESS, evidence_from_weights, replace_estimate
from inference.marginal_likelihood.base.result import NUMERICAL, PROBABILISTIC, Evidence
from inference.posterior.log_joint import LogJoint
from inference.posterior.modes import Mode, Modes, mode_masses
from inference.weights.summary import merge, stratified, summarise

# Modes that draws are made about, those of the greatest mass, and the degrees of freedom there.
_MODES, _DEGREES = 32, 4.0

# A sound estimate lies so many standard errors above or below the truth hardly ever; below only where the weights show
# a variance.
_MOST_ABOVE, _MOST_BELOW = 5.0, 7.0

# Places before and after coordinates are rounded: to one, or to any bound but zero, and to zero. How much the slope of
# the log-density may change between them, and the log-density against the best mode's below which that is no matter.
_NEAR, _FAR = (22.0, 29.0, 40.0, 44.0), (680.0, 700.0, 750.0, 760.0)
_BEND, _NEGLIGIBLE = 1e-3, -23.0


def importance_estimate(
    log_joint: LogJoint, modes: Modes, location: Tensor, scale: Tensor, num_samples: int, level: float
) -> Evidence:
    """Evidence by importance sampling, half of the draws from the prior and half about the modes.

    Args:
        log_joint: Log joint density of a model.
        modes: Its modes.
        location: Origin of the prior's unit, (N, d).
        scale: The prior's unit, (N, d).
        num_samples: Draws of each half.
        level: Confidence level.
    """
    mixture = _about(modes, location, scale)
    side = at_once(2**20, len(mixture.components) * log_joint.num_data * log_joint.width)
    counts = [min(side, num_samples - first) for first in range(0, num_samples, side)]
    halves = (
        (log_joint.sample_prior(count).to(location) for count in counts),
        (mixture.draw(count)[0] for count in counts),
    )
    strata = [summarise((_log_weights(log_joint, mixture, u) for u in half), num_samples) for half in halves]
    return replace_estimate(evidence_from_weights(merge(*strata), level), *stratified(*strata), method="importance")


def contradicts(check: Evidence, value: Tensor, error: Tensor) -> Tensor:
    """Where a value with an error of its own, each (N,) in nats, is not the one that an importance estimate is of."""
    off = check.value - value
    noise = check.standard_error + error
    above = (-torch.expm1(-off.clamp(min=0)) > _MOST_ABOVE * noise) | (off > MOST_EXCESS)
    below = (torch.expm1(-off.clamp(max=0)) > _MOST_BELOW * noise) & check.upper.isfinite()
    return above | below


@torch.no_grad()
def saturated(log_joint: LogJoint, modes: Modes) -> Tensor:
    """Data with mass where coordinates are rounded to an end of a bounded support, with effect on the density, (N,).

    There the coordinates go on while the values stand still: at one to 1e-16, at zero to the least number. A density
    that is exact in coordinates goes on as before, another bends.
    """
    found = torch.zeros(log_joint.num_data, dtype=torch.bool, device=log_joint.device)
    with pyro.validation_enabled(False):
        for axis in torch.eye(log_joint.dim, dtype=modes.location.dtype, device=found.device):
            for sign in (-1.0, 1.0):
                before = None
                for end in (_NEAR, _FAR):
                    line = [modes.location[0] * (1 - axis) + sign * t * axis for t in end]
                    values = torch.stack([log_joint(u) for u in line]) - modes.log_joint[0]
                    if _stand_still(log_joint, line[2], line[3]):
                        # Where the density overflows so far out, it matters by what it was on the way.
                        there = values[1] if before is None else torch.where(values[1] < math.inf, values[1], before)
                        found |= _bends(values, end) & (there > _NEGLIGIBLE)
                    before = values[3]
    return found


def _stand_still(log_joint: LogJoint, u: Tensor, v: Tensor) -> bool:
    """Whether two points (N, d) have the same values on the supports of the latents."""
    first, second = log_joint.constrain(u), log_joint.constrain(v)
    return all(torch.equal(first[name], second[name]) for name in first)


def _bends(values: Tensor, at: tuple[float, ...]) -> Tensor:
    """Whether log-densities (4, N) at four places bend between the middle two, (N,)."""
    before, after = (values[1] - values[0]) / (at[1] - at[0]), (values[3] - values[2]) / (at[3] - at[2])
    return ~((after - before).abs() <= _BEND * (1 + before.abs()))


def where_sound(sound: Tensor, found: Evidence, check: Evidence) -> Evidence:
    """The numerical evidence where it is sound, (N,); elsewhere what the importance estimate bounds, from below.

    There the value stays, unless it is not finite or less than that estimate.
    """
    log_mean = torch.where(check.value < math.inf, check.value, -math.inf)
    lower = log_mean - math.log(1 / (1 - found.level))
    better = torch.where(found.value.isfinite(), torch.maximum(found.value, log_mean), log_mean)
    error = torch.where(log_mean.isfinite(), check.standard_error, math.inf)
    return replace(
        found,
        value=torch.where(sound, found.value, better),
        lower=torch.where(sound, found.lower, lower),
        upper=torch.where(sound, found.upper, math.inf),
        standard_error=torch.where(sound, found.standard_error, error),
        guarantee=tuple(NUMERICAL if good else PROBABILISTIC for good in sound.tolist()),
        raw_lower=torch.where(sound, found.value, log_mean),
    )


def _log_weights(log_joint: LogJoint, mixture: Students, u: Tensor) -> Tensor:
    """Log weights of draws u (S, N, d), each as one of both halves; minus infinity where the density is undefined."""
    with pyro.validation_enabled(False):
        terms = log_joint.terms(u)
    prior = terms.prior.nan_to_num(nan=-math.inf)
    both = torch.logaddexp(prior, mixture.log_prob(u)) - math.log(2)
    return (prior + terms.likelihood - both).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _about(modes: Modes, location: Tensor, scale: Tensor) -> Students:
    """Student-t distributions about the modes of the greatest mass, and a wide one about the prior."""
    mass, order = mode_masses(modes, scale).topk(min(_MODES, len(modes.location)), dim=0)
    data = torch.arange(len(location), device=location.device)
    components = [
        Student(Mode(modes.location[j, data], mass[i], modes.hessian[j, data], scale).gaussian, _DEGREES)
        for i, j in enumerate(order)
    ]
    components.append(Student(Gaussian(location, torch.diag_embed(3 * scale)), _DEGREES))
    # Half the draws by mass, the others alike, for modes whose mass is not their Gaussian's.
    alike = torch.where(mass.isfinite(), 0.0, -math.inf).log_softmax(0)
    shares = torch.logaddexp(mass.log_softmax(0), alike) - math.log(2)
    shares = torch.where(mass.isfinite(), shares, -math.inf)
    wide = torch.full_like(shares[:1], math.log(0.1))
    return Students(tuple(components), torch.cat([shares + math.log(0.9), wide]).log_softmax(0))
