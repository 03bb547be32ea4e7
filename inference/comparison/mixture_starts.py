"""Where the refit of a mixture starts: with components at several modes, or with the best Gaussian in two parts.

Components that start alike move alike, and a component that starts where the posterior is not has no gradient back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inference.comparison.local_problem import LocalProblem
from inference.comparison.mixture_elbo import mixture_of
from inference.distributions.batched_gaussian import Gaussian
from inference.numerics.lbfgs import minimise
from inference.posterior.log_joint import LogJoint

# How far the two parts of a Gaussian stand from its mean, in its standard deviations; together they keep its variance.
_APART = 0.8

# Directions along which it is divided, at most.
_DIRECTIONS = 2

# Weight and scale of a component that is put where the posterior exceeds a Gaussian most.
_WEIGHT, _SCALE = 0.2, 0.6

# Two Gaussians whose means are nearer than this, in standard deviations, count as one.
_ALIKE = 0.3

# Steps to a member of the family with given components: its parameters are nearly those numbers.
_STEPS, _NEAR = 60, 1e-4


class Components(NamedTuple):
    """Mixtures of Gaussians with independent coordinates, as many as ``log_weights`` has rows.

    Attributes:
        log_weights: (M, C).
        locs: (M, C, K).
        sigmas: Standard deviations, (M, C, K).
    """

    log_weights: Tensor
    locs: Tensor
    sigmas: Tensor


class Diagonals(NamedTuple):
    """Gaussians with independent coordinates, J a data point, the one of the highest ELBO first.

    Attributes:
        locs: (J, N, K).
        sigmas: (J, N, K).
        elbo: Up to a constant, (J, N): minus infinity where a data point has fewer different ones.
        place: Which of the Gaussians given they are, (J, N).
    """

    locs: Tensor
    sigmas: Tensor
    elbo: Tensor
    place: Tensor


def best_of(rows: Tensor, gaussians: Gaussian, elbo: Tensor) -> Diagonals:
    """The different ones among diagonal Gaussians of some data points, (M,), of which each has one at least."""
    count = torch.bincount(rows)
    order = elbo.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count).repeat_interleave(count)
    table = order[(count.cumsum(0) - count).expand(int(count.max()), -1)].clone()
    table[place, rows[order]] = order
    known = torch.zeros_like(table, dtype=torch.bool)
    known[place, rows[order]] = True
    locs, sigmas = gaussians.loc[table], gaussians.factor.diagonal(dim1=-2, dim2=-1)[table]
    for i in range(1, len(table)):
        apart = ((locs[:i] - locs[i]) / sigmas[:i]).norm(dim=-1)
        known[i] &= ~((apart < _ALIKE) & known[:i]).any(0)
    found = torch.where(known, elbo[table], -math.inf)
    best = found.argsort(dim=0, descending=True, stable=True)
    at = best.unsqueeze(-1).expand_as(locs)
    return Diagonals(locs.gather(0, at), sigmas.gather(0, at), found.gather(0, best), table.gather(0, best))


def axes_of(found: Diagonals, laplace: Gaussian) -> Tensor:
    """The directions in which Laplace's approximation exceeds the best Gaussian most, in its units, (D, N, K)."""
    relative = laplace.factor[found.place[0]] / found.sigmas[0].unsqueeze(-1)
    return torch.linalg.svd(relative).U[..., :_DIRECTIONS].movedim(-1, 0)


@torch.no_grad()
def mixtures(log_joint: LogJoint, found: Diagonals, axes: Tensor, number: int) -> list[tuple[Tensor, Components]]:
    """Mixtures of so many components to start from, and the data points that each are of.

    Args:
        log_joint: Log joint density.
        found: Gaussians at the modes.
        axes: Directions along which the first of them is divided, in its standard deviations, (D, N, K).
        number: C.
    """
    everything = torch.arange(found.elbo.shape[1], device=found.elbo.device)
    first = _taken(found, (0,))
    starts = [(everything, _divided(first, axes.roll(-d, 0), number)) for d in range(len(axes))]
    starts.append((everything, _divided(_with_misfit(log_joint, first), axes, number)))
    groups = [tuple(range(c)) for c in range(2, min(number, len(found.elbo)) + 1)] + [(0, 2)]
    for group in groups:
        if group[-1] < len(found.elbo):
            rows = found.elbo[group[-1]].isfinite().nonzero()[:, 0]
            if len(rows):
                part = Components(*(table[rows] for table in _taken(found, group)))
                starts.append((rows, _divided(part, axes[:, rows], number)))
    return starts


def _taken(found: Diagonals, group: tuple[int, ...]) -> Components:
    """The mixture of some of the Gaussians: of those that do not overlap the best weights are as their exp(ELBO)."""
    places = list(group)
    return Components(
        found.elbo[places].log_softmax(0).clamp(min=-4.0).mT.log_softmax(-1),
        found.locs[places].movedim(0, 1),
        found.sigmas[places].movedim(0, 1),
    )


def _divided(mixture: Components, axes: Tensor, number: int) -> Components:
    """The mixture in so many components: its heaviest falls in two parts of the same variance, and so on."""
    everything = torch.arange(len(mixture.locs), device=mixture.locs.device)
    for i in range(number - mixture.locs.shape[1]):
        heaviest, axis = mixture.log_weights.argmax(-1), axes[i % len(axes)]
        log_weights, locs, sigmas = (table.clone() for table in mixture)
        loc, sigma = locs[everything, heaviest], sigmas[everything, heaviest]
        shift, smaller = _APART * axis * sigma, sigma * (1 - (_APART * axis).square()).sqrt()
        log_weights[everything, heaviest] -= math.log(2)
        locs[everything, heaviest], sigmas[everything, heaviest] = loc + shift, smaller
        mixture = Components(
            torch.cat([log_weights, log_weights[everything, heaviest].unsqueeze(-1)], -1),
            torch.cat([locs, (loc - shift).unsqueeze(1)], 1),
            torch.cat([sigmas, smaller.unsqueeze(1)], 1),
        )
    return mixture


def _with_misfit(log_joint: LogJoint, first: Components, num_samples: int = 128) -> Components:
    """A Gaussian, and a second component at that of its draws at which the posterior exceeds it most."""
    loc, sigma = first.locs[:, 0], first.sigmas[:, 0]
    noise = torch.randn((num_samples, *loc.shape), dtype=loc.dtype, device=loc.device)
    excess = log_joint(loc + sigma * noise) + 0.5 * noise.square().sum(-1)
    most = excess.nan_to_num(nan=-math.inf).argmax(0)
    there = loc + sigma * noise[most, torch.arange(len(loc), device=loc.device)]
    weights = loc.new_tensor([1 - _WEIGHT, _WEIGHT]).log().expand(len(loc), -1)
    return Components(weights, torch.stack([loc, there], 1), torch.stack([sigma, _SCALE * sigma], 1))


@torch.no_grad()
def with_components(problem: LocalProblem, rows: Tensor, target: Components) -> Tensor:
    """Free parameters of the members of the guide's family that have given components, (M, P)."""

    def squares(part: LocalProblem, chosen: Tensor) -> Tensor:
        assert part.mixed is not None
        own = mixture_of(part.call, part.mixed)
        log_weights, locs, sigmas = (table[chosen] for table in target)
        apart = ((own.locs - locs) / sigmas).square() + (own.sigmas.log() - sigmas.log()).square()
        return apart.sum((-1, -2)) + (own.log_weights - log_weights).square().sum(-1)

    return minimise(problem.objective(squares, rows), problem.start[rows], max_steps=_STEPS, tolerance=_NEAR).point
