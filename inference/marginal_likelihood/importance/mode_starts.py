"""Modes from which adaptive importance sampling begins, looked for until a further look finds none that matters."""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_dependence
from inference.distributions.batched_gaussian import Gaussian
from inference.distributions.student_t import Student, Students
from inference.marginal_likelihood.base.method import Problem
from inference.pair.run import Program
from inference.posterior.log_joint import LogJoint
from inference.posterior.misfit import search_unexplained
from inference.posterior.modes import (
    Mode,
    Modes,
    find_modes,
    in_prior_units,
    in_sight,
    mode_masses,
    prior_scale,
    search_modes,
)
from inference.posterior.moments import gaussian_of_draws

# Draws from which modes are searched at first, of the prior and of the guide each, and draws of the prior of the first
# further look, where a grid is searched, too, and where not; each further look takes twice as many as the one before,
# and there are so many at most.
_DRAWS, _WITHOUT_GRID, _LOOKS = (8, 8), (16, 64), 5

# Modes found by each start, on average, above which it is a ridge or a crowd, of which no look finds all.
_RIDGE = 0.95

# Points per dimension of the grid from which modes are searched as well, up to three dimensions.
_GRID = {1: 257, 2: 65, 3: 17}

# Growth of the sum of the modes' Laplace approximations by a further look, in nats, that matters.
_MATTERS = 0.005

# More modes than these are not kept, and so many of them, the highest, are compared with those of a further look.
_MOST, _COMPARED = 128, 32


class ModeStarts(NamedTuple):
    """The modes found of each data point, and how they were looked for.

    Attributes:
        modes: Up to J per data point, the highest first.
        scale: Standard deviations of the prior, (N, d).
        num_starts: Independent draws from which modes were looked for, (N,) integers.
        settled: Whether the last look found no further mode that matters, and all are kept, (N,).
    """

    modes: Modes
    scale: Tensor
    num_starts: Tensor
    settled: Tensor

    def rows(self, index: Tensor) -> ModeStarts:
        """Those of chosen data points, (M,) integers."""
        return ModeStarts(self.modes.rows(index), *(part[index] for part in self[1:]))

    @property
    def gaussians(self) -> list[Gaussian]:
        """The Gaussian of each mode's curvature, J of them."""
        return [mode.gaussian for mode in _each(self.modes, self.scale)]

    @property
    def notes(self) -> tuple[str, ...]:
        """How modes were looked for, a sentence for each data point."""
        grid = " and a grid" if self.scale.shape[-1] in _GRID else ""
        found = self.modes.log_joint.isfinite().sum(0)
        texts = []
        for modes, starts, settled in zip(found.tolist(), self.num_starts.tolist(), self.settled.tolist()):
            last = "the last look found none that matters" if settled else "there may be further ones that matter"
            texts.append(f"{modes} modes found from {starts} independent starts{grid}; {last}")
        return tuple(texts)


class FirstMixture(NamedTuple):
    """The modes found, and the mixture about them."""

    starts: ModeStarts
    mixture: Students

    def rows(self, index: Tensor) -> FirstMixture:
        """Those of chosen data points, (M,) integers."""
        return FirstMixture(self.starts.rows(index), self.mixture.rows(index))


def first_mixture(problem: Problem, degrees: float) -> FirstMixture:
    """The modes found, and Student-t distributions in equal parts: one for each, and one like the guide's draws.

    That has the moments of the prior's draws where there is no guide.

    Args:
        problem: Whose model has a log joint density in unconstrained coordinates.
        degrees: Degrees of freedom.
    """
    log_joint, guide = problem.log_joint, problem.call.guide
    with refuse_batch_dependence(*problem.call.programs), pyro.validation_enabled(False):
        wide = gaussian_of_draws(log_joint, guide, 1.0)
        starts = find_starts(log_joint, guide, wide.loc)
    components = [Student(wide, degrees)]
    there = starts.modes.log_joint.isfinite()
    for narrow, found in zip(starts.gaussians, there):
        loc = torch.where(found.unsqueeze(-1), narrow.loc, wide.loc)
        factor = torch.where(found.reshape(-1, 1, 1), narrow.factor, wide.factor)
        components.append(Student(Gaussian(loc, factor), degrees))
    there = torch.cat([torch.ones_like(there[:1]), there]).to(wide.loc)
    return FirstMixture(starts, Students(tuple(components), there.log().log_softmax(0)))


def find_starts(log_joint: LogJoint, guide: Program | None, centre: Tensor) -> ModeStarts:
    """Modes from a centre, from draws of guide and prior, and from a grid up to three dimensions.

    Then further draws of the prior are looked from, until the sum of the modes' Laplace approximations stays the same.

    Args:
        log_joint: Of the model.
        guide: Pyro guide, or None.
        centre: Unconstrained coordinates, (N, d).
    """
    location, scale = prior_scale(log_joint)
    grid = _GRID.get(log_joint.dim)
    size, _ = _DRAWS if grid else _WITHOUT_GRID
    draws = [centre.unsqueeze(0), log_joint.sample_prior(size)]
    draws += [] if guide is None else [log_joint.draw_starts(guide, size)]
    first = torch.cat(draws).to(location)
    if grid:
        modes = search_modes(log_joint, [first], location, scale, grid=grid)
        modes, hidden = search_unexplained(log_joint, modes, location, scale)
    else:
        modes, hidden = find_modes(log_joint, first, location, scale), torch.zeros_like(scale[:, 0], dtype=torch.bool)
    num_starts = torch.full_like(scale[:, 0], len(first) - 1, dtype=torch.long)
    found = _looked_again(log_joint, ModeStarts(modes, scale, num_starts, num_starts < 0), location)
    return found._replace(settled=found.settled & ~hidden)


def _looked_again(log_joint: LogJoint, found: ModeStarts, location: Tensor) -> ModeStarts:
    modes, scale, num_starts, settled = found
    (_, size), ridge = _DRAWS, torch.zeros_like(settled)
    if log_joint.dim not in _GRID:
        (_, size), ridge = _WITHOUT_GRID, modes.log_joint.isfinite().sum(0) > _RIDGE * num_starts
    for _ in range(_LOOKS):
        done = settled | ridge
        fresh = torch.where(done.unsqueeze(-1), torch.nan, log_joint.sample_prior(size).to(location))
        known = torch.where(modes.log_joint.isfinite().unsqueeze(-1), modes.location, torch.nan)
        more = find_modes(log_joint, torch.cat([known, fresh]), location, scale)
        num_starts = num_starts + size * ~done
        settled = settled | (~_grown(log_joint, modes, more, location, scale) & ~ridge)
        modes, size = more, 2 * size
        if bool((settled | ridge).all()):
            break
    few = modes.log_joint[_MOST:].isneginf().all(0)
    return ModeStarts(Modes(*(part[:_MOST] for part in modes)), scale, num_starts, settled & few)


def _grown(log_joint: LogJoint, modes: Modes, more: Modes, location: Tensor, scale: Tensor) -> Tensor:
    """Whether modes are found that matter, (N,): by the sum of Laplace approximations, at kinks by what is in sight.

    There curvatures differ from piece to piece, and a further start ends a little higher, or lower, on the same hill.
    """
    growth = _log_laplace_sum(more, scale) - _log_laplace_sum(modes, scale)
    grown = growth.nan_to_num(nan=0.0) > _MATTERS  # nan: ridges alone, before and after
    kinked = more.kinked.any(0)
    if not bool(kinked.any()):
        return grown
    masses = mode_masses(more, scale)
    new = kinked & more.converged & (masses > masses.logsumexp(0) + math.log(_MATTERS))
    function, points = in_prior_units(log_joint, location, scale), (more.location - location) / scale
    for place, height in zip(modes.location[:_COMPARED], modes.log_joint[:_COMPARED]):
        other = ((place - location) / scale).expand_as(points)
        heights = height.expand_as(more.log_joint)
        asked = new & heights.isfinite()
        new &= ~in_sight(function, points, more.log_joint, other, heights, asked, width=log_joint.width)
    return torch.where(kinked, new.any(0), grown)


def _log_laplace_sum(modes: Modes, scale: Tensor) -> Tensor:
    """Log of the sum of the Laplace approximations of all modes that are no ridges, up to a constant, (N,)."""
    terms = [mode.log_joint - 0.5 * mode.log_det for mode in _each(modes, scale)]
    return torch.where(modes.converged, torch.stack(terms), -torch.inf).nan_to_num(nan=-torch.inf).logsumexp(0)


def _each(modes: Modes, scale: Tensor) -> list[Mode]:
    return [Mode(*parts, scale) for parts in zip(modes.location, modes.log_joint, modes.hessian)]
