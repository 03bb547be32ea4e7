r"""Newton's method for the local maxima of a function, from many starts at once.

Where the Hessian is indefinite, the absolute values of its eigenvalues make the step an ascent away from saddles.
Every start has its own Hessian and trust radius, and stops by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inference.core.memory import at_once

# Log density of chosen rows at one point each: (M,) integers, (M, k) -> (M,), every row by itself.
RowFunction = Callable[[Tensor, Tensor], Tensor]

# Points evaluated side by side, fewer where each takes more numbers than this.
_CHUNK, _NARROW = 2**15, 8

# The least curvature that counts as different from zero, in squared units of the function's own scale.
LEAST_CURVATURE = 1e-4


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


def points_at_once(width: int, count: int = _CHUNK) -> int:
    """Points evaluated side by side where each takes so many numbers, of so many of a narrow function."""
    return at_once(count * _NARROW, max(width, _NARROW))


def maximise(
    function: RowFunction, points: Tensor, *, width: int = 1, tolerance: float = 1e-12, max_iterations: int = 200
) -> tuple[Tensor, Expansion, Tensor]:
    """Local maxima of a function from one start per row.

    Args:
        function: Of unit scale or smaller: a radius of 1 is trusted at first.
        points: Starts, (M, k).
        width: Numbers that the function makes of a point: a bound on memory.
        tolerance: A row has converged where the gain that Newton's step predicts, in nats, is less.
        max_iterations: Steps at most.

    Returns:
        Points (M, k), the function around them, and whether they have converged (M,).
    """
    points = points.detach().clone()
    rows = torch.arange(len(points), device=points.device)
    at = expand(function, rows, points, width=width)
    radius = torch.ones_like(at.value)
    converged = torch.zeros_like(rows, dtype=torch.bool)
    active = at.value.isfinite().nonzero()[:, 0]
    for _ in range(max_iterations):
        step, gain = _newton_step(Expansion(*(part[active] for part in at)), radius[active])
        done = gain < tolerance
        converged[active[done]] = True
        moving = ~done & (radius[active] > 1e-14)
        active, step, gain = active[moving], step[moving], gain[moving]
        if len(active) == 0:
            break
        there = expand(function, active, points[active] + step, width=width)
        ratio = (there.value - at.value[active]) / gain
        better = (ratio > 1e-3) & there.value.isfinite()
        length = step.norm(dim=-1)
        shrunk = torch.where(better & (ratio > 0.25), radius[active], 0.25 * length)
        radius[active] = torch.where(better & (ratio > 0.75), torch.maximum(shrunk, 2 * length), shrunk)
        points[active[better]] += step[better]
        for old, new in zip(at, there, strict=True):
            old[active[better]] = new[better]
    return points, at, converged


def _newton_step(at: Expansion, radius: Tensor) -> tuple[Tensor, Tensor]:
    """An ascent step within the radius and the gain that the quadratic model predicts."""
    curvature, axes = torch.linalg.eigh(-at.hessian)
    slope = (axes.mT @ at.gradient.unsqueeze(-1)).squeeze(-1)
    step = slope / curvature.abs().clamp(min=LEAST_CURVATURE)
    step = step * (radius / step.norm(dim=-1).clamp(min=1e-300)).clamp(max=1).unsqueeze(-1)
    gain = (slope * step - 0.5 * curvature.abs() * step.square()).sum(-1)
    return (axes @ step.unsqueeze(-1)).squeeze(-1), gain


def decrement(at: Expansion) -> Tensor:
    """What a whole Newton step would gain by its own model, (M,): nothing at a smooth maximum, much at a kink."""
    return _newton_step(at, torch.full_like(at.value, torch.inf))[1]


def expand(function: RowFunction, rows: Tensor, points: Tensor, *, width: int = 1) -> Expansion:
    """A function's value, gradient and Hessian at points (M, k), detached; minus infinity or zero where undefined."""
    if len(points) > (chunk := points_at_once(width)):
        parts = [expand(function, r, p) for r, p in zip(rows.split(chunk), points.split(chunk), strict=True)]
        return Expansion(*(torch.cat(column) for column in zip(*parts, strict=True)))
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        value = function(rows, points)
        gradient = _gradient(value, points)
        hessian = torch.stack([_gradient(gradient[:, i], points) for i in range(points.shape[-1])], dim=-1)
    value = torch.where(value.isfinite(), value, -torch.inf).detach()
    usable = value.isfinite() & gradient.isfinite().all(-1)
    gradient = torch.where(usable[:, None], gradient, 0.0).detach()
    # Second derivatives may overflow where value and gradient do not; zero is then the safe guess.
    usable &= hessian.isfinite().all(-1).all(-1)
    hessian = torch.where(usable[:, None, None], hessian, 0.0).detach()
    return Expansion(value, gradient, (hessian + hessian.mT) / 2)


def _gradient(values: Tensor, points: Tensor) -> Tensor:
    """Derivatives of each row's value by its own point, zero where it does not depend on it."""
    if not values.requires_grad:
        return torch.zeros_like(points)
    (gradient,) = torch.autograd.grad(values.sum(), points, create_graph=True, materialize_grads=True)
    return gradient
