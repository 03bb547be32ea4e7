r"""Slices through a posterior density, and where on them its peaks stand.

A slice fixes the first coordinates of a datum's latent and leaves the others free. Coordinates are those of the
prior's unit, turned so that the first is the direction in which the best mode is widest and the last the narrowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.log_joint import LogJoint
from inference.modes import Modes, climb, distances, expand, grid_line, neighbourhood, scan

# Peaks lower than this against the least of the important modes carry nothing, in nats.
_LOWEST = -50.0
# Modes whose Laplace mass is less than the greatest by more than this are unimportant, in nats.
_UNIMPORTANT = 30.0
# Newton's promise, in nats, at which a peak of a slice is known well enough: an offset of .1 standard deviations.
_ROUGH = 5e-3
_NARROWEST, _WIDEST = 1e-12, 1.0
# Modes that a slice is told of.
_NEAREST = 3


class Peaks(NamedTuple):
    """Local maxima along the first free coordinate of slices, sorted by slice and position.

    Attributes:
        row: The slice, (P,).
        position: (P,).
        scale: Standard deviation of the peak along this coordinate, (P,).
    """

    row: Tensor
    position: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Density:
    """Log joint density of each datum in turned coordinates v, with u = origin + frame v, up to a constant.

    Attributes:
        log_joint: That of the model.
        origin: (N, d).
        frame: (N, d, d).
        shift: What is subtracted, (N,) in nats.
        modes: Places of the modes, (J, N, d).
        precision: Minus the Hessians there, positive, (J, N, d, d).
        height: Log density there, (J, N) in nats; minus infinity where there is none.
    """

    log_joint: LogJoint
    origin: Tensor
    frame: Tensor
    shift: Tensor
    modes: Tensor
    precision: Tensor
    height: Tensor

    @classmethod
    def around(cls, log_joint: LogJoint, modes: Modes, location: Tensor, scale: Tensor) -> Density:
        """The density in the coordinates of its best mode.

        Args:
            log_joint: That of the model.
            modes: Its modes.
            location: Origin of the prior's unit, (N, d).
            scale: The prior's unit, (N, d).
        """
        whitened = -modes.hessian * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        curvature, axes = torch.linalg.eigh(whitened)
        curvature = curvature.clamp(min=1 / _WIDEST**2)
        mass = modes.log_joint - 0.5 * curvature.log().sum(-1)
        best = mass.argmax(0)
        data = torch.arange(len(best), device=best.device)
        turn = axes[best, data]
        important = mass > mass.max(0).values - _UNIMPORTANT
        shift = torch.where(important, modes.log_joint, torch.inf).min(0).values
        precision = turn.mT @ (axes * curvature.unsqueeze(-2) @ axes.mT) @ turn
        places = (turn.mT @ ((modes.location - location) / scale).unsqueeze(-1)).squeeze(-1)
        frame = scale.unsqueeze(-1) * turn
        return cls(log_joint, location, frame, shift, places, precision, modes.log_joint - shift)

    @property
    def found(self) -> Tensor:
        """Which modes there are and matter, (J, N)."""
        return self.height > _LOWEST

    def marginal(self, num: int) -> Tensor:
        """Precisions of the first coordinates under the quadratic models of the modes, (J, N, num, num)."""
        across = self.precision[..., :num, num:]
        return self.precision[..., :num, :num] - across @ torch.linalg.solve(self.precision[..., num:, num:], across.mT)

    def log(self, datum: Tensor, v: Tensor) -> Tensor:
        """Log density of data (M,) at v (M, d), (M,)."""
        u = self.origin[datum] + (self.frame[datum] @ v.unsqueeze(-1)).squeeze(-1)
        return self.log_joint.rows(datum)(u) - self.shift[datum]


@dataclass(frozen=True)
class Slices:
    """Slices through the densities of data.

    Attributes:
        density: That of all data.
        datum: Whose density a slice is of, (R,).
        fixed: Its fixed coordinates, (R, l).
        grid: Points per dimension of the grid on which the peaks of a slice are sought.
    """

    density: Density
    datum: Tensor
    fixed: Tensor
    grid: int

    @property
    def num_free(self) -> int:
        """Coordinates that are free."""
        return self.density.modes.shape[-1] - self.fixed.shape[-1]

    def __getitem__(self, rows: Tensor | slice) -> Slices:
        return Slices(self.density, self.datum[rows], self.fixed[rows], self.grid)

    def fix(self, rows: Tensor, position: Tensor) -> Slices:
        """Chosen slices with one more coordinate fixed, at a position (M,)."""
        fixed = torch.cat([self.fixed[rows], position.unsqueeze(-1)], dim=-1)
        return Slices(self.density, self.datum[rows], fixed, self.grid)

    def log(self, rows: Tensor, free: Tensor) -> Tensor:
        """Log density of chosen slices at free coordinates (M, k), (M,)."""
        return self.density.log(self.datum[rows], torch.cat([self.fixed[rows], free], dim=-1))

    def peaks(self) -> Peaks:
        """Where along the first free coordinate the density of the others stands."""
        if self.num_free == 1:
            return _merged(*_line_peaks(self))
        if self.fixed.shape[-1] == 0:
            found, row = self.density.found[:, self.datum].nonzero().unbind(-1)
            datum = self.datum[row]
            scale = _marginal_scale(self.density.precision[found, datum])
            return _merged(row, self.density.modes[found, datum, 0], scale)
        return _merged(*_plane_peaks(self))


def _nearest(slices: Slices) -> tuple[Tensor, Tensor]:
    """Where in each slice the quadratic models of the modes nearest to it peak, (j, R, k), and their precisions.

    Models are those of the log density about the modes, (j, R, k, k); near is what they give the most in the slice.
    """
    density, num_fixed = slices.density, slices.fixed.shape[-1]
    if num_fixed == 0:
        return density.modes[:, slices.datum], density.precision[:, slices.datum]
    loss = density.height[:, slices.datum]
    offset = slices.fixed - density.modes[:, slices.datum, :num_fixed]
    marginal = density.marginal(num_fixed)[:, slices.datum]
    loss = loss - 0.5 * (offset.unsqueeze(-2) @ marginal @ offset.unsqueeze(-1)).squeeze(-1).squeeze(-1)
    near = loss.topk(min(_NEAREST, len(loss)), dim=0).indices
    modes, precision = density.modes[near, slices.datum], density.precision[near, slices.datum]
    offset = (slices.fixed - modes[..., :num_fixed]).unsqueeze(-1)
    free = precision[..., num_fixed:, num_fixed:]
    drift = torch.linalg.solve(free, precision[..., num_fixed:, :num_fixed] @ offset)
    return modes[..., num_fixed:] - drift.squeeze(-1), free


def _marginal_scale(precision: Tensor) -> Tensor:
    """Standard deviation of the first coordinate of Gaussians of precision (..., k, k)."""
    return torch.linalg.inv(precision)[..., 0, 0].sqrt()


def _merged(row: Tensor, position: Tensor, scale: Tensor) -> Peaks:
    """Peaks sorted by slice and position, each once."""
    scale = scale.clamp(_NARROWEST, _WIDEST)
    order = _unique(row, position, scale)
    return Peaks(row[order], position[order], scale[order])


def _unique(row: Tensor, position: Tensor, scale: Tensor) -> Tensor:
    """Indices of peaks by slice and position, without those that are the one before them again."""
    order = position.argsort()
    order = order[row[order].argsort(stable=True)]
    row, position, scale = row[order], position[order], scale[order]
    again = torch.zeros_like(row, dtype=torch.bool)
    again[1:] = (row.diff() == 0) & (position.diff() < 0.3 * torch.minimum(scale[1:], scale[:-1]))
    return order[~again]


def _plane_peaks(slices: Slices) -> tuple[Tensor, Tensor, Tensor]:
    """Modes of slices with several free coordinates, from a grid and from where the known modes lead."""
    num_rows, num_free = len(slices.datum), slices.num_free
    row, points = scan(slices.log, num_rows, num_free, slices.grid, like=slices.fixed)
    known, _ = _nearest(slices)
    every = torch.arange(num_rows, device=row.device).repeat(len(known))
    row, points = torch.cat([row, every]), torch.cat([points, known.reshape(-1, num_free)])
    row, points, hessian = _climbed(slices, row, points)
    first = _unique(row, points[:, 0], _sigma(hessian))
    beside = neighbourhood(points[first], hessian[first])
    others = _climbed(slices, row[first].repeat(len(beside)), beside.reshape(-1, num_free))
    row, points, hessian = (torch.cat(pair) for pair in zip((row, points, hessian), others, strict=True))
    return row, points[:, 0], _sigma(hessian)


def _climbed(slices: Slices, row: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Modes that matter, from starts (M, k) in chosen slices: slice, place, Hessian."""
    points, at, _ = climb(lambda rows, free: slices.log(row[rows], free), points, tolerance=_ROUGH, max_iterations=60)
    high = at.value > _LOWEST
    return row[high], points[high], at.hessian[high]


def _sigma(hessian: Tensor) -> Tensor:
    """Standard deviation of the first coordinate at modes with Hessians (M, k, k)."""
    curvature, axes = torch.linalg.eigh(-hessian)
    return (axes[:, 0].square() / curvature.clamp(min=1 / _WIDEST**2)).sum(-1).sqrt()


def _line_peaks(slices: Slices) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima on lines: between neighbouring grid points from which the density rises towards each other."""
    grid = _grid(slices)
    row = torch.arange(len(grid), device=grid.device)
    start, low, high, top, where = _brackets(slices, row, grid)
    position, scale, height = _refined(slices, start, low, high)
    # A line whose highest grid point no bracket holds, at the end of the grid or at a jump, peaks at that point.
    reached = torch.full_like(top, -torch.inf).scatter_reduce(0, start, height, "amax")
    lost = reached < top - 0.1
    found = [(start, position, scale, height), (row[lost], where[lost], torch.ones_like(where[lost]), top[lost])]
    # Beside each peak there may be another, across a fold, nearer than the grid can tell.
    far = distances(scale).T
    beside = torch.cat([position.unsqueeze(-1) - far.flip(-1), position.unsqueeze(-1) + far], dim=-1)
    peak, low, high, _, _ = _brackets(slices, start, beside)
    apart = (low > position[peak]) | (high < position[peak])
    peak, low, high = start[peak[apart]], low[apart], high[apart]
    found.append((peak, *_refined(slices, peak, low, high)))
    row, position, scale, height = (torch.cat(column) for column in zip(*found, strict=True))
    high = height > _LOWEST
    return row[high], position[high], scale[high]


def _brackets(slices: Slices, row: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
    """Where the density rises from both ends into an interval of sorted points (G, T) on chosen lines (G,).

    Returns:
        Row of the grid and the two ends of each interval, (B,); the highest value on each row and its place, (G,).
    """
    value, slope = _slopes(slices, row.unsqueeze(-1).expand_as(grid).reshape(-1), grid.reshape(-1))
    value, slope = value.view_as(grid), slope.view_as(grid)
    at, left = ((slope[:, :-1] >= 0) & (slope[:, 1:] < 0)).nonzero().unbind(-1)
    top, best = value.max(-1)
    return at, grid[at, left], grid[at, left + 1], top, grid.gather(-1, best.unsqueeze(-1)).squeeze(-1)


def _grid(slices: Slices) -> Tensor:
    """Where lines are looked at: on a grid, and about where the known modes lead."""
    everywhere = grid_line(slices.grid, like=slices.fixed).expand(len(slices.datum), -1)
    known, precision = _nearest(slices)
    around = everywhere.new_tensor([-3.0, -1.0, 0.0, 1.0, 3.0]) / precision[..., 0].sqrt()
    near = (known + around).movedim(1, 0).reshape(len(everywhere), -1)
    return torch.cat([everywhere, near], dim=-1).sort(-1).values


def _slopes(slices: Slices, row: Tensor, position: Tensor, chunk: int = 1 << 16) -> tuple[Tensor, Tensor]:
    """Log density along lines and its derivative, (M,) each."""
    parts = []
    for rows, t in zip(row.split(chunk), position.split(chunk), strict=True):
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            value = slices.log(rows, t.unsqueeze(-1))
            (slope,) = torch.autograd.grad(value.sum(), t)
        sound = value.isfinite() & slope.isfinite()
        parts.append((torch.where(sound, value.detach(), -torch.inf), torch.where(sound, slope, 0.0)))
    values, slopes = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(slopes)


def _refined(slices: Slices, row: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima between two points each, by Newton's method safeguarded by bisection: position, scale, height."""
    position, low, high = (low + high) / 2, low.clone(), high.clone()
    scale, height = torch.ones_like(low), torch.full_like(low, -torch.inf)
    active = torch.arange(len(row), device=row.device)
    for count in range(80):
        if len(active) == 0:
            break
        t = position[active]
        at = expand(slices.log, row[active], t.unsqueeze(-1))
        slope, bend = at.gradient[:, 0], at.hessian[:, 0, 0]
        height[active] = at.value
        scale[active] = torch.where(bend < 0, (-bend).clamp(min=1e-30).rsqrt(), 1.0)
        low[active] = torch.where(slope >= 0, t, low[active])
        high[active] = torch.where(slope < 0, t, high[active])
        newton = t - slope / bend
        inside = (bend < 0) & (newton > low[active]) & (newton < high[active]) & (count % 4 < 3)
        position[active] = torch.where(inside, newton, (low[active] + high[active]) / 2)
        done = (bend < 0) & (slope.square() < 2 * _ROUGH * bend.abs())
        done |= high[active] - low[active] < 4e-16 * t.abs() + _NARROWEST
        position[active[done]] = t[done]
        active = active[~done]
    return position, scale, height
