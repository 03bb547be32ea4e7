"""Where a refit starts: members of the guide's family like the Gaussians that the posterior's modes suggest.

At each mode those are Laplace's approximation and the best Gaussian with independent coordinates. A family that
contains such a Gaussian thus starts at it, and is found no worse than the simpler family. A mixture starts with
components at the modes, or with the best such Gaussian in two parts: see ``mixture_starts``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from inference.comparison.guide_density import guide_log_prob
from inference.comparison.local_problem import LocalProblem
from inference.comparison.mixture_starts import Components, axes_of, best_of, mixtures, with_components
from inference.distributions.batched_gaussian import Gaussian
from inference.distributions.gaussian import LOG_2PI
from inference.numerics.lbfgs import minimise
from inference.numerics.whitened_noise import WhitenedNoise
from inference.posterior.log_joint import LogJoint
from inference.posterior.modes import Mode, find_modes, prior_scale, search_modes

# Draws of prior and guide each from which modes are searched, and modes from which a refit starts, at most.
_DRAWS, _MODES = 8, 3

# Latent coordinates up to which a grid is searched for modes, too.
_MAX_GRID_DIM = 2

# Steps of the search for a member of the family like a Gaussian: few by likelihood, of which a mixture has no highest.
_NEAR_STEPS, _SAME_STEPS = 10, 100

# Norm of a gradient at which a start is near enough, what ten steps must gain, in squares of nats, and the least draws
# at which the densities are compared; twice the parameters are.
_NEAR, _NEARER, _FEWEST = 1e-3, 1e-3, 32


class Starts(NamedTuple):
    """Free parameters to start from.

    Attributes:
        point: (M, P).
        rows: The data points that they are for, (M,), each as often as there are starts for it.
    """

    point: Tensor
    rows: Tensor


def starts_at_modes(problem: LocalProblem, max_steps: int) -> Starts | None:
    """Free parameters of the guide that is most like each Gaussian at a mode; None where there is no density.

    Args:
        problem: The refit.
        max_steps: Steps of the search for the best Gaussian with independent coordinates, at most.
    """
    call = problem.call
    try:
        log_joint = LogJoint.of(call)
        rows, laplace = _at_modes(log_joint, problem)
        diagonal, elbo = _best_diagonal(log_joint, rows, laplace, problem.num_samples, max_steps)
        if problem.mixed is not None and len(rows.unique()) == len(problem.start):
            found, number = best_of(rows, diagonal, elbo), problem.mixed.num_components
            return _of_mixtures(problem, mixtures(log_joint, found, axes_of(found, laplace), number))
        both = Gaussian(*(torch.cat(pair) for pair in zip(laplace, diagonal, strict=True)))
        return _imitated(problem, log_joint, rows.repeat(2), both)
    except (ValueError, NotImplementedError):  # latents without unconstrained coordinates, or a guide without a density
        return None


@torch.no_grad()
def _at_modes(log_joint: LogJoint, problem: LocalProblem) -> tuple[Tensor, Gaussian]:
    """Laplace's approximation at each of the highest modes, (M,), and the data points that they are of, (M,)."""
    guide = problem.call.guide
    assert guide is not None
    with pyro.validation_enabled(False):
        location, scale = prior_scale(log_joint)
        draws = [log_joint.sample_prior(_DRAWS).to(location), log_joint.draw_starts(guide, _DRAWS).to(location)]
        if log_joint.dim <= _MAX_GRID_DIM:
            modes = search_modes(log_joint, draws, location, scale)
        else:
            modes = find_modes(log_joint, torch.cat(draws), location, scale)
    place, rows = modes.log_joint[:_MODES].isfinite().nonzero().unbind(-1)
    location, value, hessian = (table[place, rows] for table in (modes.location, modes.log_joint, modes.hessian))
    return rows, Mode(location, value, hessian, scale[rows]).gaussian


@torch.no_grad()
def _best_diagonal(
    log_joint: LogJoint, rows: Tensor, start: Gaussian, num_samples: int, max_steps: int
) -> tuple[Gaussian, Tensor]:
    """The Gaussian with independent coordinates of the highest ELBO, found from the one next to a start, (M,).

    Beside it that ELBO, up to a constant, (M,).
    """
    eye = torch.eye(log_joint.dim).to(start.factor)
    inverse = torch.linalg.solve_triangular(start.factor, eye.expand_as(start.factor), upper=False)
    unit = inverse.square().sum(-2).rsqrt()
    noise = _whitened(num_samples, start.loc)

    def gaussian(point: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = point.chunk(2, -1)
        return start.loc[index] + unit[index] * shift, unit[index] * log_scale.exp()

    def evaluate(point: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), pyro.validation_enabled(False):
            point = point.detach().requires_grad_()
            loc, sigma = gaussian(point, index)
            value = -log_joint.rows(rows[index])(loc + sigma * noise[:, index]).mean(0) - sigma.log().sum(-1)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach().nan_to_num(nan=math.inf), gradient

    zero = torch.zeros_like(torch.cat([start.loc, start.loc], -1))
    found = minimise(evaluate, zero, max_steps=max_steps, tolerance=_NEAR)
    loc, sigma = gaussian(found.point, torch.arange(len(zero), device=zero.device))
    return Gaussian(loc, torch.diag_embed(sigma)), -found.value


@torch.no_grad()
def _of_mixtures(problem: LocalProblem, parts: Sequence[tuple[Tensor, Components]]) -> Starts:
    """Free parameters of mixtures of some data points each."""
    rows = torch.cat([chosen for chosen, _ in parts])
    target = Components(*(torch.cat(tables) for tables in zip(*(mixture for _, mixture in parts), strict=True)))
    return Starts(with_components(problem, rows, target), rows)


@torch.no_grad()
def _imitated(problem: LocalProblem, log_joint: LogJoint, rows: Tensor, target: Gaussian) -> Starts:
    """Free parameters of the member of the family that is most like a Gaussian: the very same where there is one.

    First some steps towards the highest likelihood of the Gaussian's draws, which lead from afar; then to the least
    squares of the difference of the log-densities, which are zero where the family contains it.
    """
    num_samples = min(problem.num_samples, max(_FEWEST, 2 * problem.start.shape[1]))
    noise = _whitened(num_samples, target.loc)
    u = target.colour(noise)
    log_det = target.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    values = log_joint.rows(rows).constrain(u)
    jacobian = log_joint.rows(rows).unconstrain(values, num_samples)[1]
    expected = -0.5 * (noise.square() + LOG_2PI).sum(-1) - log_det - jacobian

    sites = problem.call.probe().model_sites
    dims = {name: problem.layout.dim - len(sites[name].fn.event_shape) for name in values}

    def log_prob(part: LocalProblem, chosen: Tensor) -> Tensor:
        layout = replace(problem.layout, num_data=len(chosen))
        at = {name: value.index_select(dims[name], chosen) for name, value in values.items()}
        return guide_log_prob(part.call, layout, at, num_samples)

    def likelihood(part: LocalProblem, chosen: Tensor) -> Tensor:
        return -log_prob(part, chosen).mean(0)

    def squares(part: LocalProblem, chosen: Tensor) -> Tensor:
        return (log_prob(part, chosen) - expected[:, chosen]).square().mean(0)

    near = minimise(problem.objective(likelihood, rows), problem.start[rows], max_steps=_NEAR_STEPS)
    same = minimise(
        problem.objective(squares, rows), near.point, max_steps=_SAME_STEPS, tolerance=_NEAR, least_gain=_NEARER
    )
    return Starts(same.point, rows)


def _whitened(num_samples: int, like: Tensor) -> Tensor:
    """Standard noise (S, N, d) whose mean is zero and whose covariance is the identity where the samples suffice."""
    with WhitenedNoise():
        return torch.randn((num_samples, *like.shape), dtype=like.dtype, device=like.device)
