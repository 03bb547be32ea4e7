r"""Modes of functions of many rows at once, and of the log joint density of any Pyro model.

Newton's method in a trust region: where the Hessian is indefinite, the absolute values of its eigenvalues make the
step an ascent away from saddles. Every row, a start of a datum, has its own Hessian and radius and stops by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from inference.checks import check_count
from inference.log_joint import LogJoint

# Log density of chosen rows at one point each: (M,) integers, (M, k) -> (M,), every row by itself.
RowFunction = Callable[[Tensor, Tensor], Tensor]

# Points evaluated side by side.
_CHUNK = 1 << 15
# Two points closer than this, in standard deviations of the better one, are one mode.
_SAME = 1e-2
# The least curvature per prior variance: the prior's own standard deviation is about 1, flatter than 1/100 is a ridge.
_LEAST_CURVATURE = 1e-4


class Expansion(NamedTuple):
    """A function to second order around points.

    Attributes:
        value: (M,).
        gradient: (M, k).
        hessian: (M, k, k).
    """

    value: Tensor
    gradient: Tensor
    hessian: Tensor


class Modes(NamedTuple):
    """Local maxima of the log joint density, up to J per datum, the highest first.

    Attributes:
        location: Unconstrained coordinates, (J, N, d); repeats the best where a datum has fewer.
        log_joint: Log joint density there, (J, N) in nats; minus infinity where a datum has fewer.
        hessian: Second derivatives of the log joint density there, (J, N, d, d).
        converged: Whether Newton's method came to rest, (J, N); on flat ridges it may not.
    """

    location: Tensor
    log_joint: Tensor
    hessian: Tensor
    converged: Tensor


def find_modes(
    log_joint: LogJoint, starts: Tensor, location: Tensor, scale: Tensor, *, max_iterations: int = 200
) -> Modes:
    """The modes of the log joint density that are reached from given starts.

    Warning:
        A mode that no start leads to is not found, and nothing tells: a narrow peak far from the others attracts
        only starts in its neighbourhood.

    Args:
        log_joint: Log joint density of a model.
        starts: Unconstrained coordinates, (S, N, d); NaN where a datum has fewer.
        location: Origin of the whitened coordinates, (N, d), see :func:`prior_scale`.
        scale: Their unit, (N, d).
        max_iterations: Newton steps at most.
    """
    check_count(max_iterations, "max_iterations")
    num_starts, num_data, _ = starts.shape
    sample, datum = (~starts.isnan().any(-1)).nonzero().unbind(-1)
    whitened = in_prior_units(log_joint, location, scale)
    points, at, rest = climb(
        lambda rows, points: whitened(datum[rows], points),
        ((starts - location) / scale)[sample, datum],
        max_iterations=max_iterations,
    )

    def table(values: Tensor, missing: float) -> Tensor:
        full = values.new_full((num_starts, num_data, *values.shape[1:]), missing)
        full[sample, datum] = values
        return full

    points, hessian = table(points, 0.0), table(at.hessian, 0.0)
    value = table(at.value, -torch.inf)
    keep = distinct(points, value, hessian)
    value = torch.where(keep, value, -torch.inf)
    order = value.argsort(0, descending=True)[: max(1, int(keep.sum(0).max()))]

    def pick(values: Tensor) -> Tensor:
        return values[order, torch.arange(num_data, device=order.device)]

    found = torch.where(pick(keep)[..., None], pick(points), pick(points)[:1])
    hessian = pick(hessian) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    return Modes(location + scale * found, pick(value), hessian, pick(table(rest, False)))


def in_prior_units(log_joint: LogJoint, location: Tensor, scale: Tensor) -> RowFunction:
    """The log joint density of chosen data (M,) at points (M, d) in units of the prior, see :func:`prior_scale`."""
    return lambda datum, points: log_joint.rows(datum)(location[datum] + scale[datum] * points)


@torch.no_grad()
def prior_scale(log_joint: LogJoint, num_samples: int = 128) -> tuple[Tensor, Tensor]:
    """Medians and robust standard deviations of the prior in unconstrained coordinates, each (N, d)."""
    draws = log_joint.sample_prior(num_samples).double()
    quartiles = draws.new_tensor([0.25, 0.5, 0.75])
    low, middle, high = torch.quantile(draws, quartiles, dim=0)
    return middle, ((high - low) / 1.349).clamp(min=1e-300)


def grid_line(num_points: int, *, like: Tensor) -> Tensor:
    """Points from -8 to 8 units of the prior, thrice as dense in the middle as on average, (num_points,)."""
    even = torch.linspace(-1, 1, num_points, dtype=like.dtype, device=like.device)
    return 3 * even + 5 * even**3


def scan(function: RowFunction, num_rows: int, dim: int, num_points: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """The points of a grid that none of their neighbours exceeds: starts near every mode that the grid can tell.

    Args:
        function: See :func:`climb`.
        num_rows: R.
        dim: k, from 1 to 3.
        num_points: Grid points per dimension.
        like: Tensor of the dtype and device to work in.

    Returns:
        Rows (M,) and points (M, k).
    """
    line = grid_line(num_points, like=like)
    cloud = torch.stack(torch.meshgrid(*[line] * dim, indexing="ij"), dim=-1).view(-1, dim)
    widest = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[dim - 1]
    rows, points = [], []
    for part in torch.arange(num_rows, device=like.device).split(max(1, _CHUNK * 4 // len(cloud))):
        value = function(part.repeat_interleave(len(cloud)), cloud.repeat(len(part), 1)).nan_to_num(nan=-torch.inf)
        value = value.view(len(part), 1, *(num_points,) * dim)
        peak = (value >= widest(value, 3, stride=1, padding=1)) & value.isfinite()
        row, index = peak.view(len(part), -1).nonzero().unbind(-1)
        rows.append(part[row])
        points.append(cloud[index])
    return torch.cat(rows), torch.cat(points)


def neighbourhood(points: Tensor, hessian: Tensor) -> Tensor:
    """Starts on both sides of modes along the axes of their Hessians, at growing distances up to half a prior unit.

    Across a fold of the likelihood a second mode stands beside the first, nearer than any fixed grid can tell.

    Args:
        points: In units of the prior, (..., k).
        hessian: (..., k, k).

    Returns:
        (m, ..., k).
    """
    curvature, axes = torch.linalg.eigh(-hessian)
    sigma = curvature.clamp(min=_LEAST_CURVATURE).rsqrt()
    offsets = (axes.mT * distances(sigma).unsqueeze(-1)).movedim(-2, 1)
    return torch.cat([points + offsets.flatten(0, 1), points - offsets.flatten(0, 1)])


def distances(sigma: Tensor) -> Tensor:
    """Distances (m, ...) from peaks of standard deviations sigma (...) to where their neighbours may stand."""
    factors = 5 * 1.7 ** torch.arange(24, dtype=sigma.dtype, device=sigma.device)
    farthest = 0.5
    grown = factors.view(-1, *(1,) * sigma.dim()) * sigma
    needed = int((grown < farthest).flatten(1).any(1).sum()) + 1
    return grown[:needed].clamp(max=farthest)


def climb(
    function: RowFunction, points: Tensor, *, tolerance: float = 1e-12, max_iterations: int = 200
) -> tuple[Tensor, Expansion, Tensor]:
    """Local maxima of a function from one start a row.

    Args:
        function: Of unit scale or smaller: a radius of 1 is trusted at first.
        points: Starts, (M, k).
        tolerance: Where the gain that Newton's step promises, in nats, is less, a row is at rest.
        max_iterations: Steps at most.

    Returns:
        Points (M, k), the function around them, and whether they are at rest (M,).
    """
    points = points.detach().clone()
    rows = torch.arange(len(points), device=points.device)
    at = expand(function, rows, points)
    radius = torch.ones_like(at.value)
    rest = torch.zeros_like(rows, dtype=torch.bool)
    active = at.value.isfinite().nonzero()[:, 0]
    for _ in range(max_iterations):
        step, gain = _newton_step(Expansion(*(part[active] for part in at)), radius[active])
        resting = gain < tolerance
        rest[active[resting]] = True
        moving = ~resting & (radius[active] > 1e-14)
        active, step, gain = active[moving], step[moving], gain[moving]
        if len(active) == 0:
            break
        there = expand(function, active, points[active] + step)
        ratio = (there.value - at.value[active]) / gain
        better = (ratio > 1e-3) & there.value.isfinite()
        length = step.norm(dim=-1)
        shrunk = torch.where(better & (ratio > 0.25), radius[active], 0.25 * length)
        radius[active] = torch.where(better & (ratio > 0.75), torch.maximum(shrunk, 2 * length), shrunk)
        points[active[better]] += step[better]
        for old, new in zip(at, there, strict=True):
            old[active[better]] = new[better]
    return points, at, rest


def _newton_step(at: Expansion, radius: Tensor) -> tuple[Tensor, Tensor]:
    """An ascent step within the radius and the gain that the quadratic model promises."""
    curvature, axes = torch.linalg.eigh(-at.hessian)
    slope = (axes.mT @ at.gradient.unsqueeze(-1)).squeeze(-1)
    step = slope / curvature.abs().clamp(min=_LEAST_CURVATURE)
    step = step * (radius / step.norm(dim=-1).clamp(min=1e-300)).clamp(max=1).unsqueeze(-1)
    gain = (slope * step - 0.5 * curvature.abs() * step.square()).sum(-1)
    return (axes @ step.unsqueeze(-1)).squeeze(-1), gain


def distinct(points: Tensor, value: Tensor, hessian: Tensor) -> Tensor:
    """Which of the points of each datum are maxima other than those above them, (S, N).

    Args:
        points: (S, N, k).
        value: (S, N).
        hessian: (S, N, k, k).
    """
    curvature, axes = torch.linalg.eigh(-hessian)
    saddle = curvature[..., 0] < -1e-6 * curvature[..., -1].abs() - _LEAST_CURVATURE
    saddle &= ~saddle.all(0)
    value = torch.where(saddle, -torch.inf, value)
    order = value.argsort(0, descending=True)
    keep = torch.zeros_like(saddle)
    data = torch.arange(value.shape[1], device=value.device)
    metric = axes.mT * curvature.clamp(min=_LEAST_CURVATURE).sqrt().unsqueeze(-1)
    for best in order:
        apart = (metric @ (points - points[best, data]).unsqueeze(-1)).squeeze(-1).norm(dim=-1)
        keep[best, data] = ~(keep & (apart < _SAME)).any(0) & value[best, data].isfinite()
    return keep


def expand(function: RowFunction, rows: Tensor, points: Tensor) -> Expansion:
    """A function's value, gradient and Hessian at points (M, k), detached; minus infinity where it is undefined."""
    if len(points) > _CHUNK:
        parts = [expand(function, r, p) for r, p in zip(rows.split(_CHUNK), points.split(_CHUNK), strict=True)]
        return Expansion(*(torch.cat(column) for column in zip(*parts, strict=True)))
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        value = function(rows, points)
        gradient = _gradient(value, points)
        hessian = torch.stack([_gradient(gradient[:, i], points) for i in range(points.shape[-1])], dim=-1)
    sound = value.isfinite() & gradient.isfinite().all(-1) & hessian.isfinite().all(-1).all(-1)
    value = torch.where(sound, value, -torch.inf).detach()
    gradient = torch.where(sound[:, None], gradient, 0.0).detach()
    hessian = torch.where(sound[:, None, None], hessian, 0.0).detach()
    return Expansion(value, gradient, (hessian + hessian.mT) / 2)


def _gradient(values: Tensor, points: Tensor) -> Tensor:
    """Derivatives of each row's value by its own point, zero where it does not depend on it."""
    if not values.requires_grad:
        return torch.zeros_like(points)
    (gradient,) = torch.autograd.grad(values.sum(), points, create_graph=True, materialize_grads=True)
    return gradient
