r"""Posterior mass that a proposal hardly visits, and that its own weights therefore cannot show.

A guide that covers one of two modes gives weights without a fault, and half of p(x). So modes are looked for besides,
and the share of the posterior in the region where the proposal q has too few draws is estimated from a mixture about
them:

.. math:: P(u \in R \mid x), \quad R = \{u : \frac{p(x, u)}{q(u)} > \frac{S}{10} \, \hat p(x)\},

of which q has at most ten draws of S on average, were R all of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from inference.distributions.student_t import Students
from inference.marginal_likelihood.base.intervals import MOST_EXCESS, without_upper_end
from inference.marginal_likelihood.base.method import Problem
from inference.marginal_likelihood.base.result import Evidence, replace_rows, take_rows
from inference.marginal_likelihood.importance.mode_starts import first_mixture
from inference.posterior.log_joint import LogJoint
from inference.weights.summary import summarise

# Draws for each mode, as many as for so many modes at most, and the degrees of freedom of the mixture about them.
_DRAWS, _MOST, _DEGREES = 1000, 4, 6.0

# Draws that a region has on average, if all of the posterior is there, to count as visited.
_VISITS = 10.0

# Part of the standard error that mass which is not visited may be.
_NEGLIGIBLE = 0.25

# Standard errors by which another estimate must exceed the proposal's, where that has no density.
_SURELY = 3.0

# Latent dimensions beyond which modes are not looked for: their curvature costs too much.
_MOST_DIMS = 50

# Log-density of the proposal at u (S, N, d), (S, N) in nats; minus infinity or NaN where it has none.
Density = Callable[[Tensor], Tensor]


def two_sided_where_visited(
    found: Evidence, problem: Problem, density: Callable[[Problem], Density | None], rows: Tensor | None = None
) -> Evidence:
    """Evidence whose two-sided intervals stay only where the proposal visits the modes that a further look finds.

    Elsewhere Markov's lower bound stands alone. Notes say from how many starts modes were looked for, or why not.

    Args:
        found: From unbiased weights of the proposal.
        problem: With the guide.
        density: From a problem to the proposal's log-density; to None where it has none in the model's coordinates.
        rows: The data points of the problem that ``found`` is of, (M,) integers; None for all.
    """
    two_sided = found.upper.isfinite().nonzero()[:, 0]
    if len(two_sided) == 0:
        return found
    everything = torch.arange(len(found.value), device=two_sided.device)
    try:
        if rows is None and len(two_sided) == len(everything):
            few = problem
        else:
            few = problem.rows(two_sided if rows is None else rows[two_sided])
    except ValueError:  # no argument is known to hold rows
        if rows is not None:
            raise
        few, two_sided = problem, everything
    return replace_rows(found, two_sided, _checked(take_rows(found, two_sided), few, density))


def _checked(found: Evidence, problem: Problem, density: Callable[[Problem], Density | None]) -> Evidence:
    if not _has_coordinates(problem):
        return _of_values_drawn(found, problem)
    try:
        log_joint = problem.log_joint
        if log_joint.dim > _MOST_DIMS:
            raise ValueError(f"there are more than {_MOST_DIMS} latent coordinates")
        before, log_proposal = log_joint.evaluations, density(problem)
        starts, mixture = first_mixture(problem, _DEGREES)
    except (ValueError, NotImplementedError) as error:
        note = f"modes that the draws do not visit were not looked for: {str(error).splitlines()[0]}"
        return _noted(found, [note] * len(found.value), evaluations=0.0)
    with torch.no_grad():
        share = _share_unvisited(log_joint, mixture, log_proposal, found)
    missed = found.upper.isfinite() & (~starts.settled | ~(share <= _NEGLIGIBLE * found.standard_error))
    missing = [f"; the draws hardly visit {part:.2g} of the posterior" if part > 0 else "" for part in share.tolist()]
    notes = [note + (text if bad else "") for note, text, bad in zip(starts.notes, missing, missed.tolist())]
    evaluations = (log_joint.evaluations - before) / log_joint.num_data
    return _noted(without_upper_end(found, missed), notes, evaluations)


def _has_coordinates(problem: Problem) -> bool:
    try:
        return problem.density.dim > 0
    except ValueError:  # a latent that is neither continuous nor summed out
        return False


def _of_values_drawn(found: Evidence, problem: Problem) -> Evidence:
    """Evidence of discrete latents: of values that no draw took, the weights of the others say nothing."""
    drawn = problem.probe().latents
    if not drawn:
        return found
    note = f"values of {', '.join(map(repr, drawn))} that no draw took were not looked for: a lower bound alone"
    everywhere = torch.ones_like(found.value, dtype=torch.bool)
    return _noted(without_upper_end(found, everywhere), [note] * len(found.value), evaluations=0.0)


def _noted(found: Evidence, notes: Sequence[str], evaluations: float) -> Evidence:
    """Evidence with a further note for each data point, and the evaluations that it took."""
    before = found.notes or ("",) * len(notes)
    whole = (f"{old}; {new}".lstrip("; ") for old, new in zip(before, notes, strict=True))
    return replace(found, notes=tuple(whole), evaluations=evaluations)


def _share_unvisited(log_joint: LogJoint, mixture: Students, density: Density | None, found: Evidence) -> Tensor:
    """The share of the posterior in the region that the proposal hardly visits, (N,)."""
    threshold = found.value + math.log(found.num_samples / _VISITS)
    missed, total = [], []
    for _ in range(min(_MOST, len(mixture.components))):
        u, log_mixture = mixture.draw(_DRAWS)
        with pyro.validation_enabled(False):
            joint = log_joint(u).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
            if density is not None:
                proposal = density(u).nan_to_num(nan=-math.inf, neginf=-math.inf)
                missed.append(torch.where(joint - threshold > proposal, joint - log_mixture, -math.inf))
        total.append(joint - log_mixture)
    if density is None:
        return _share_beyond(torch.cat(total), found)
    return (torch.cat(missed).logsumexp(0) - torch.cat(total).logsumexp(0)).exp().nan_to_num(nan=1.0)


def _share_beyond(log_weights: Tensor, found: Evidence) -> Tensor:
    """The share of p(x) by which an estimate of log weights (S, N) surely exceeds another, (N,)."""
    estimate, error = summarise([log_weights], len(log_weights)).iwae
    beyond = -torch.expm1(found.value - estimate)
    sure = beyond > _SURELY * torch.hypot(error, found.standard_error)
    return torch.where(sure | (estimate - found.value > MOST_EXCESS), beyond, 0.0)
