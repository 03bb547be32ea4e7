r"""Where the density of slices peaks along their first free coordinate."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from inference.marginal_likelihood.quadrature.slices import (
    LOWEST,
    POINTS,
    WIDEST,
    Slices,
    features_near,
    nearest_modes,
)
from inference.marginal_likelihood.quadrature.tracing import ABOUT, Lines, Maxima, followed, in_groups
from inference.numerics.newton import expand, maximise, points_at_once
from inference.posterior.modes import distances, grid_line, neighbourhood, scan

# Predicted gain of Newton's step, in nats, at which the search for a peak stops: an offset of .1 standard deviations.
_ROUGH = 5e-3
_NARROWEST = 1e-12

# How far about an isolated feature peaks are looked for, and where its surroundings begin, in its size.
_ABOUT, _FLANK = 8, 18.0

# Peaks closer than this, in standard deviations of the narrower one, share their cells.
_APART = 1.0

# Scales of a peak at a jump or at the end of a grid, which are distances of the next grid point, at least and at most.
_KNOWN = (1e-6, 1.0)

# Of two such peaks one is no peak if it is wider by more than this factor: the end of a grid, whose width is not known.
_WIDER = 10.0

# Points of the second look at a line, in those of the first, and by how much each further look is denser: one that
# finds a new peak, within so many nats of the highest, is followed by another. Lines through a further integral have
# fewer looks.
_DENSER, _LOOKS, _LOOKS_INSIDE, _MATTERS = 4, 5, 3, 30.0

# Of lines through a further integral every so manieth is looked at again at first, as neighbours are alike.
_SAMPLED = 8

# By what part of the distance of its points a further look is shifted, and how far from a peak its place may be known,
# in its standard deviations.
_ASIDE, _ROUGHLY = 0.382, 0.5


class Peaks(NamedTuple):
    """Local maxima and isolated features along the first free coordinate of slices, sorted by slice and position.

    Attributes:
        row: The slice, (P,).
        position: (P,).
        scale: Standard deviation of the peak along this coordinate, or size of the feature, (P,).
        unsettled: Slices in which the last look still found new peaks, (U,).
    """

    row: Tensor
    position: Tensor
    scale: Tensor
    unsettled: Tensor


class Finder:
    """Finds the peaks of slices, the better the more slices of the same data it has seen."""

    def __init__(self) -> None:
        self._lines: Lines | None = None

    def find(self, slices: Slices) -> Peaks:
        """The peaks of all slices that matter, along the first free coordinate, and features that they pass."""
        if slices.num_free > 1:
            return _with_features(slices, *_maxima(slices))
        group, place = _side_by_side(slices)
        keep = slices.fixed.shape[-1] == 1
        peaks, unsettled = _line_peaks(slices, group, place, self._lines if keep else None)
        if keep:
            self._lines = Lines.of(group, place, peaks).joined(self._lines)
        return _with_features(slices, peaks.row, peaks.position, peaks.scale, unsettled)

    def lacks_peaks(self, datum: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Intervals (C,) with a line that lacks a peak that the next line has."""
        if self._lines is None:
            return torch.zeros_like(datum, dtype=torch.bool)
        order, first, last = self._lines.within(datum, low, high)
        lacking = self._lines.lacking()[order].long().cumsum(0)
        lacking = torch.cat([lacking.new_zeros(1), lacking])
        return lacking[last] > lacking[first]

    def forget(self, datum: Tensor, low: Tensor, high: Tensor) -> None:
        """Forget the lines in intervals (C,), which are looked at anew."""
        if self._lines is not None:
            order, first, last = self._lines.within(datum, low, high)
            steps = order.new_zeros(len(order) + 1)
            steps.index_add_(0, first, torch.ones_like(first)).index_add_(0, last, -torch.ones_like(last))
            self._lines = self._lines.chosen(order[steps.cumsum(0)[:-1] == 0])


def _side_by_side(slices: Slices) -> tuple[Tensor, Tensor]:
    """Which lines differ by their last fixed coordinate alone, and that coordinate, (R,) each."""
    if slices.fixed.shape[-1] == 0:  # one for each data point
        return slices.datum, slices.fixed.new_zeros(len(slices.datum))
    if slices.fixed.shape[-1] == 1:
        return slices.datum, slices.fixed[:, 0]
    others = torch.cat([slices.datum.unsqueeze(-1).to(slices.fixed), slices.fixed[:, :-1]], dim=-1)
    return torch.unique(others, dim=0, return_inverse=True)[1], slices.fixed[:, -1]


def _with_features(slices: Slices, *found: Tensor) -> Peaks:
    """Peaks, and isolated features that the slices pass, as further ones."""
    *peaks, unsettled = found
    row, place, size = features_near(slices)
    beside = _FLANK * size
    # Cells from the flanks inwards and outwards: those that begin in a hole do not grow.
    places, scales = (place - beside, place, place + beside), (beside / 3, size, beside / 3)
    features = row.repeat(3), torch.cat(places), torch.cat(scales)
    every, position, scale = (torch.cat(pair) for pair in zip(peaks, features, strict=True))
    return _merged(every, position, scale, unsettled)


def _maxima(slices: Slices) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slice, place and standard deviation of maxima, (P,), and slices in which there may be more."""
    if slices.fixed.shape[-1] == 0:
        density = slices.density
        found, row = density.found[:, slices.datum].nonzero().unbind(-1)
        datum = slices.datum[row]
        return row, density.modes[found, datum, 0], density.spreads[found, datum, 0], row[:0]
    row, position, scale = _plane_peaks(slices)
    return row, position, scale, row[:0]


def _merged(row: Tensor, position: Tensor, scale: Tensor, unsettled: Tensor) -> Peaks:
    """Peaks sorted by slice and position, each once."""
    scale = scale.clamp(_NARROWEST, WIDEST)
    order = _unique(row, position, scale)
    return Peaks(row[order], position[order], scale[order], unsettled)


def _unique(row: Tensor, position: Tensor, scale: Tensor) -> Tensor:
    """Indices of peaks by slice and position, without those that are the one before them again.

    Of a crowd every second goes until the rest stand apart: one peak for all would cover only its own place. First goes
    what is far wider than its neighbour: in its place, the narrow one would be lost.
    """
    order = in_groups(row, position)
    while True:
        r, at, sigma = row[order], position[order], scale[order]
        again, wider = torch.zeros_like(r, dtype=torch.bool), torch.zeros_like(r, dtype=torch.bool)
        again[1:] = (r.diff() == 0) & (at.diff() < _APART * torch.minimum(sigma[1:], sigma[:-1]))
        if not bool(again.any()):
            return order
        wider[1:] = again[1:] & (sigma[1:] > _WIDER * sigma[:-1])
        wider[:-1] |= again[1:] & (sigma[:-1] > _WIDER * sigma[1:])
        if bool(wider.any()):
            order = order[~wider]
            continue
        index = torch.arange(len(r), device=r.device)
        first = torch.where(again, 0, index).cummax(0).values
        order = order[(index - first) % 2 == 0]


def _plane_peaks(slices: Slices) -> tuple[Tensor, Tensor, Tensor]:
    """Modes of slices with several free coordinates, from a grid and from where the known modes lead."""
    num_rows, num_free = len(slices.datum), slices.num_free
    # The modes of the whole density are known from a fine grid.
    row, points = scan(slices.log, num_rows, num_free, slices.grid // 2 + 1, width=slices.width, like=slices.fixed)
    known, _ = nearest_modes(slices)
    every = torch.arange(num_rows, device=row.device).repeat(len(known))
    row, points = torch.cat([row, every]), torch.cat([points, known.reshape(-1, num_free)])
    row, points, hessian = _maximised(slices, row, points)
    first = _unique(row, points[:, 0], _sigma(hessian))
    beside = neighbourhood(points[first], hessian[first])
    others = _maximised(slices, row[first].repeat(len(beside)), beside.reshape(-1, num_free))
    row, points, hessian = (torch.cat(pair) for pair in zip((row, points, hessian), others, strict=True))
    return row, points[:, 0], _sigma(hessian)


def _maximised(slices: Slices, row: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Modes that matter, from starts (M, k) in chosen slices: slice, place, Hessian."""
    points, at, _ = maximise(
        lambda rows, free: slices.log(row[rows], free),
        points,
        width=slices.width,
        tolerance=_ROUGH,
        max_iterations=60,
    )
    high = at.value > LOWEST
    return row[high], points[high], at.hessian[high]


def _sigma(hessian: Tensor) -> Tensor:
    """Standard deviation of the first coordinate at modes with Hessians (M, k, k)."""
    curvature, axes = torch.linalg.eigh(-hessian)
    return (axes[:, 0].square() / curvature.clamp(min=1 / WIDEST**2)).sum(-1).sqrt()


def _line_peaks(slices: Slices, group: Tensor, place: Tensor, before: Lines | None) -> tuple[Maxima, Tensor]:
    """Maxima on lines, looked for on ever denser grids until one shows nothing new, and lines where it still does.

    Between the looks, those of neighbouring lines are followed, see :mod:`.tracing`.
    """

    def follow(peaks: Maxima) -> Maxima:
        return followed(group, place, peaks, before, partial(_look_between, slices))

    peaks = _first_look(slices)
    peaks = follow(peaks.joined(_look_about_features(slices, peaks)))
    lines = torch.arange(len(slices.datum), device=slices.datum.device)
    sampled = lines % _SAMPLED == 0 if slices.fixed.shape[-1] else lines >= 0
    unsettled, num = lines[sampled], slices.grid
    for k in range(_LOOKS if slices.fixed.shape[-1] == 0 else _LOOKS_INSIDE):
        num = _DENSER * num
        looks = [
            _further_look(slices, rows, peaks, num)
            for rows in unsettled.split(max(1, points_at_once(slices.width, POINTS) // num))
        ]
        new = looks[0].joined(*looks[1:])
        peaks = peaks.joined(new)
        unsettled = _matter(peaks, len(slices.datum), new).unique()
        if k == 0 and len(unsettled) > 0:
            # Where a sampled line has more peaks, the others of its data point may.
            unsettled = torch.cat([unsettled, lines[torch.isin(slices.datum, slices.datum[unsettled]) & ~sampled]])
        if len(unsettled) == 0:
            break
    peaks = follow(peaks)
    return peaks.chosen(peaks.height > LOWEST), unsettled


def _look_between(slices: Slices, rows: Tensor, grid: Tensor) -> Maxima:
    """Maxima that matter on chosen lines (G,) between sorted points (G, T), known or not."""
    at, low, high, _, _ = _brackets(slices, rows, grid)
    found = Maxima(rows[at], *_refined(slices, rows[at], low, high))
    return found.chosen(found.height > LOWEST)


def _matter(peaks: Maxima, num_rows: int, new: Maxima) -> Tensor:
    """Lines of new peaks that are not negligible beside the highest of their line."""
    highest = torch.full_like(peaks.height[:1], LOWEST).expand(num_rows)
    highest = highest.scatter_reduce(0, peaks.row, peaks.height, "amax")
    return new.row[new.height > highest[new.row] - _MATTERS]


def _look_about_features(slices: Slices, known: Maxima) -> Maxima:
    """Maxima about isolated features that are not known."""
    rows, place, size = features_near(slices)
    about = torch.linspace(-_ABOUT, _ABOUT, 4 * _ABOUT + 1, dtype=place.dtype, device=place.device)
    return _look(slices, rows, known, place.unsqueeze(-1) + size.unsqueeze(-1) * about)


def _further_look(slices: Slices, rows: Tensor, known: Maxima, num: int) -> Maxima:
    """Maxima on chosen lines (G,) that an even grid shows and that are not known."""
    line = grid_line(num, like=slices.fixed)
    return _look(slices, rows, known, (line[:-1] + _ASIDE * line.diff()).expand(len(rows), -1))


def _look(slices: Slices, rows: Tensor, known: Maxima, grid: Tensor) -> Maxima:
    """Maxima on chosen lines (G,) between sorted points (G, T) that are not known."""
    at, low, high, _, _ = _brackets(slices, rows, grid)
    row = rows[at]
    new = ~_hold(known, len(slices.datum), row, low, high)
    row, low, high = row[new], low[new], high[new]
    return Maxima(row, *_refined(slices, row, low, high))


def _hold(known: Maxima, num_rows: int, row: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Which intervals on lines (B,) hold a known peak, or one that may be there, as far as it is known."""
    known = known.chosen(in_groups(known.row, known.position))
    count = torch.bincount(known.row, minlength=num_rows)
    start = count.cumsum(0) - count
    place = torch.arange(len(known.row), device=row.device) - start[known.row]
    table = known.position.new_full((num_rows, int(count.max()) + 1), torch.inf)
    table[known.row, place] = known.position
    after = torch.searchsorted(table[row], low.unsqueeze(-1)).squeeze(-1)
    held = torch.zeros_like(row, dtype=torch.bool)
    for beside in (after - 1, after):
        exists = (beside >= 0) & (beside < count[row])
        index = (start[row] + beside).clamp(0, max(0, len(known.row) - 1))[exists]
        at, scale = known.position[index], _ROUGHLY * known.scale[index]
        held[exists] |= (at + scale >= low[exists]) & (at - scale <= high[exists])
    return held


def _first_look(slices: Slices) -> Maxima:
    """Maxima on lines: between neighbouring grid points from which the density rises towards each other."""
    grid = _grid(slices)
    row = torch.arange(len(grid), device=grid.device)
    start, low, high, top, where = _brackets(slices, row, grid)
    found = Maxima(start, *_refined(slices, start, low, high))
    # A bracket may hold a wide peak and a needle on it, and lead to the first: then its top leads to the second.
    lost = _above(top, found)
    known = (grid[lost] - where[lost].unsqueeze(-1)).abs()
    known = torch.where(known > 0, known, torch.inf).amin(-1).clamp(*_KNOWN)
    about = where[lost].unsqueeze(-1) + known.unsqueeze(-1) * known.new_tensor(ABOUT)
    needle, low, high, _, _ = _brackets(slices, row[lost], about)
    found = found.joined(Maxima(row[lost][needle], *_refined(slices, row[lost][needle], low, high)))
    # A line whose highest grid point none holds still, at the end of the grid or at a jump, peaks near that point.
    still = _above(top, found)
    ends = Maxima(row[still], where[still], known[still[lost]], top[still])
    # Next to each peak there may be another, across a fold, closer than the grid resolves.
    far = distances(found.scale).T
    position = found.position.unsqueeze(-1)
    peak, low, high, _, _ = _brackets(slices, found.row, torch.cat([position - far.flip(-1), position + far], dim=-1))
    apart = (low > found.position[peak]) | (high < found.position[peak])
    peak, low, high = found.row[peak[apart]], low[apart], high[apart]
    return found.joined(ends, Maxima(peak, *_refined(slices, peak, low, high)))


def _above(top: Tensor, found: Maxima) -> Tensor:
    """Lines with a point, of height ``top`` (R,), that is higher than all their peaks."""
    return torch.full_like(top, -torch.inf).scatter_reduce(0, found.row, found.height, "amax") < top - 0.1


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
    # Lines through two integrals are many and much alike: of each eighth a denser look follows.
    num = slices.grid if slices.fixed.shape[-1] < 2 else slices.grid // 2 + 1
    everywhere = grid_line(num, like=slices.fixed).expand(len(slices.datum), -1)
    known, precision = nearest_modes(slices)
    around = everywhere.new_tensor([-3.0, -1.0, 0.0, 1.0, 3.0]) / precision[..., 0].sqrt()
    near = (known + around).movedim(1, 0).reshape(len(everywhere), -1)
    return torch.cat([everywhere, near], dim=-1).sort(-1).values


def _slopes(slices: Slices, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Log density along lines and its derivative, (M,) each."""
    parts, chunk = [], points_at_once(slices.width, POINTS)
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
    """Maxima between two points each, by Newton's method safeguarded by bisection: position, scale, height.

    Where no second derivative is known, as of ``torch.logaddexp`` far from its kink, differences of slopes serve.
    """
    position, low, high = (low + high) / 2, low.clone(), high.clone()
    scale, height = torch.ones_like(low), torch.full_like(low, -torch.inf)
    rise, fall = torch.full_like(low, torch.nan), torch.full_like(low, torch.nan)
    active = torch.arange(len(row), device=row.device)
    for count in range(80):
        if len(active) == 0:
            break
        t = position[active]
        at = expand(slices.log, row[active], t.unsqueeze(-1), width=slices.width)
        slope, bend = at.gradient[:, 0], at.hessian[:, 0, 0]
        rise[active] = torch.where(slope >= 0, slope, rise[active])
        fall[active] = torch.where(slope < 0, slope, fall[active])
        height[active] = at.value
        if bool((bend == 0).any()):
            ends = torch.where(slope >= 0, t, low[active]), torch.where(slope < 0, t, high[active])
            secant = (fall[active] - rise[active]) / (ends[1] - ends[0])
            bend = torch.where((bend == 0) & secant.isfinite(), secant, bend)
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
