r"""Integrals over slices, one coordinate at a time, each by adaptive subdivision with a Gauss-Kronrod pair.

.. math:: \int e^{L(v)} dv = \int dv_1 \int dv_2 \ldots e^{L(v_1, v_2, \ldots)}

The integrals of all slices run side by side. Cells grow outwards from the peaks of a slice until what they would add
is negligible, and are then halved where the two rules of the pair disagree, or two neighbours about their common edge:
a feature between that and the next node is seen by neither rule.

References:
    Piessens, de Doncker-Kapenga, Ueberhuber, Kahaner, "QUADPACK", 1983: the pair and its error estimate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.memory import at_once
from inference.marginal_likelihood.quadrature.gauss_kronrod import at_edges, rule
from inference.marginal_likelihood.quadrature.peaks import Finder, Peaks
from inference.marginal_likelihood.quadrature.slices import POINTS, Slices
from inference.marginal_likelihood.quadrature.tracing import in_groups
from inference.numerics.newton import points_at_once

# The first edges of the cells around a peak, in its standard deviations, by the least tolerance that they serve: a
# Gaussian needs no more on each side. Further ones are each four times as far away as the one before.
_FIRST_EDGES = ((1e-3, (4.5,)), (2e-5, (5.0,)), (0.0, (3.0, 6.4)))
_FURTHER_EDGES = 14

# Half of that by which a power of the distance has to fall faster than its inverse, to have an integral that is known.
_LEAST_DECAY = 0.02

# Slices worked on together.
_CHUNK = 2048

# Halvings of a cell at most.
_ROUNDS = 60

# A slice that holds less than this part of the best slice of its data point need be no better than that one's
# tolerance.
_MINOR = 1e-3

# Each inner integral is better than the one around it by this factor.
_FINER = 0.7


class Integral(NamedTuple):
    """Integrals and bounds on their errors, as estimated, (R,) each."""

    value: Tensor
    error: Tensor


class Cells(NamedTuple):
    """Cells of slices, each (C,).

    Attributes:
        row: The slice.
        low: Left edge.
        high: Right edge.
        value: Integral over the cell.
        error: Its error by the two rules.
        noise: Its error by those of the inner integrals.
        left: Integrand at the leftmost node.
        right: Integrand at the rightmost node.
        start: Integrand at the left edge, by the polynomial through all nodes.
        end: Integrand at the right edge, likewise.
    """

    row: Tensor
    low: Tensor
    high: Tensor
    value: Tensor
    error: Tensor
    noise: Tensor
    left: Tensor
    right: Tensor
    start: Tensor
    end: Tensor


class NestedIntegrator:
    """Nested integration of slices, which counts innermost cells and stops for data points that need too many.

    Args:
        num_data: N.
        tolerance: Relative error of the outermost integral that is aimed at.
        max_cells: Most innermost cells per data point.
        bar: Progress bar, in cells.
        like: Tensor of the dtype and device to work in.

    Attributes:
        unsettled: Data points with a line on which the last look for peaks still found new ones, (N,).
    """

    def __init__(self, num_data: int, tolerance: float, max_cells: int, bar: tqdm, *, like: Tensor) -> None:
        self.tolerance, self.max_cells, self._bar = tolerance, max_cells, bar
        self.cells = torch.zeros(num_data, dtype=torch.long, device=like.device)
        self.unsettled = torch.zeros(num_data, dtype=torch.bool, device=like.device)
        self._finder = Finder()
        self._nodes, self._kronrod, self._gauss = rule(like, tolerance)
        self._beside = float(1 - self._nodes[-1]) / 2  # from the edge of a cell to its nearest node, in its width
        self._edges = at_edges(self._nodes)

    @property
    def exhausted(self) -> Tensor:
        """Which data points have used up their cells, (N,)."""
        return self.cells >= self.max_cells

    @torch.no_grad()
    def integrate(self, slices: Slices) -> Integral:
        """The integral of exp(log density) over the free coordinates of each slice."""
        if len(slices.datum) > (chunk := at_once(_CHUNK)):
            starts = range(0, len(slices.datum), chunk)
            parts = [self.integrate(slices[slice(i, i + chunk)]) for i in starts]
            return Integral(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if slices.fixed.shape[-1] == 0:
            self._finder = Finder()
        tolerance = self.tolerance * _FINER ** slices.fixed.shape[-1]
        peaks = self._finder.find(slices)
        self.unsettled[slices.datum[peaks.unsettled]] = True
        edges, active, distance = _cover(peaks, len(slices.datum), tolerance)
        cells, tail = self._grow(slices, edges, active, distance, tolerance)
        cells = self._halve(slices, cells, tolerance)
        return Integral(_sums(cells, cells.value, tail), _sums(cells, cells.error + cells.noise, tail) + tail)

    def _grow(
        self, slices: Slices, edges: Tensor, active: Tensor, distance: Tensor, tolerance: float
    ) -> tuple[Cells, Tensor]:
        """Cells from the peaks outwards, and what is left out beyond them, (R,)."""
        shape = active.shape
        width = edges.diff(dim=-1)
        valid = width.isfinite()
        apart = (distance + (1 - self._beside) * width).log() - (distance + self._beside * width).log()
        state = edges.new_zeros(7, *shape)
        done = torch.zeros_like(active)
        while True:
            todo = active & ~done & valid & ~self.exhausted[slices.datum].unsqueeze(-1)
            row, column = todo.nonzero().unbind(-1)
            if len(row) == 0:
                break
            cells = self._evaluate(slices, row, edges[row, column], edges[row, column + 1])
            state[:, row, column] = torch.stack(cells[3:])
            done |= todo
            beyond = self._beyond(state, done, width, apart)
            needed = beyond > 0.2 * tolerance * self._scale(slices, state[0].sum(-1)).unsqueeze(-1)
            active[:, :-1] |= needed[0, :, 1:]
            active[:, 1:] |= needed[1, :, :-1]
        row, column = done.nonzero().unbind(-1)
        kept = Cells(row, edges[row, column], edges[row, column + 1], *state[:, row, column])
        beyond = self._beyond(state, done, width, apart)
        after, before = torch.zeros_like(done), torch.zeros_like(done)
        after[:, :-1], before[:, 1:] = done[:, 1:], done[:, :-1]
        return kept, (beyond[0] * ~before + beyond[1] * ~after).sum(-1)

    @staticmethod
    def _beyond(state: Tensor, done: Tensor, width: Tensor, apart: Tensor) -> Tensor:
        """What is beyond each finished cell, on its left and on its right, (2, R, C).

        As far out again as the run of cells reaches, as much as at its end; where the density falls more slowly than
        with the cube of the distance, twice the mass that its power has beyond, as the run may be on one side alone.

        Args:
            state: See :class:`Cells`, from the value on, (7, R, C).
            done: Which cells are finished, (R, C).
            width: Of the cells, (R, C).
            apart: How far the outer nodes of a cell are apart, in the log of their distance from a peak, (2, R, C).
        """
        power = torch.stack([state[4] / state[3], state[3] / state[4]]).log() / apart
        return state[3:5] * _run_lengths(done, width) / (0.5 * (power - 1)).nan_to_num(nan=1.0).clamp(_LEAST_DECAY, 1)

    def _halve(self, slices: Slices, cells: Cells, tolerance: float) -> Cells:
        """The cells, halved where their errors are too large."""
        zeros = cells.value.new_zeros(len(slices.datum))
        for _ in range(_ROUNDS):
            allowed = tolerance * self._scale(slices, _sums(cells, cells.value, zeros))
            error = cells.error + self._beyond_nodes(slices, cells)
            wide = _sums(cells, error, zeros) > allowed
            share = allowed / torch.bincount(cells.row, minlength=len(zeros)).clamp(min=1)
            bad = wide[cells.row] & (error > share[cells.row]) & (error > 2 * cells.noise)
            bad &= cells.high - cells.low > 1e-14 * torch.maximum(cells.low.abs(), cells.high.abs())
            bad &= ~self.exhausted[slices.datum[cells.row]]
            if not bool(bad.any()):
                break
            row, low, high = cells.row[bad], cells.low[bad], cells.high[bad]
            if _are_of_lines(slices):
                self._finder.forget(slices.datum[row], low, high)
            middle = (low + high) / 2
            halves = self._evaluate(slices, row.repeat(2), torch.cat([low, middle]), torch.cat([middle, high]))
            cells = Cells(*(torch.cat([old[~bad], new]) for old, new in zip(cells, halves, strict=True)))
        return cells._replace(error=cells.error + self._beyond_nodes(slices, cells))

    def _beyond_nodes(self, slices: Slices, cells: Cells) -> Tensor:
        """What cells may hold that no node has met, (C,), by how they disagree with their neighbours at their edges.

        That is between an edge and its node, or in all of a cell whose lines lack a peak that a neighbour has.
        """
        part = torch.full_like(cells.value, self._beside)
        if _are_of_lines(slices):
            part[self._finder.lacks_peaks(slices.datum[cells.row], cells.low, cells.high)] = 1.0
        return part * _jumps(cells)

    def _scale(self, slices: Slices, value: Tensor) -> Tensor:
        """The scale of the slices' errors: their values, but no less than a part of the best of the data point."""
        best = value.new_zeros(len(self.cells)).scatter_reduce(0, slices.datum, value, "amax")
        return torch.maximum(value, _MINOR * best[slices.datum])

    def _evaluate(self, slices: Slices, row: Tensor, low: Tensor, high: Tensor) -> Cells:
        """Both rules on cells."""
        half = (high - low) / 2
        nodes = ((low + high) / 2).unsqueeze(-1) + half.unsqueeze(-1) * self._nodes
        inner = self._integrand(slices.fix(row.repeat_interleave(nodes.shape[-1]), nodes.reshape(-1)))
        f, noise = inner.value.view_as(nodes), inner.error.view_as(nodes)
        value = half * (f @ self._kronrod)
        gap = (value - half * (f @ self._gauss)).abs()
        spread = half * ((f - (value / (2 * half)).unsqueeze(-1)).abs() @ self._kronrod)
        error = torch.where(spread > 0, spread * (200 * gap / spread).pow(1.5).clamp(max=1), gap)
        error = torch.minimum(error, 2 * gap)  # where the rules differ by much, the better is nearer than twice that
        error = torch.maximum(error, 1e-15 * value)
        start, end = (f @ self._edges).unbind(-1)
        return Cells(row, low, high, value, error, half * (noise @ self._kronrod), f[:, 0], f[:, -1], start, end)

    def _integrand(self, slices: Slices) -> Integral:
        """The density where all coordinates are fixed, else the integral over those that are not."""
        if slices.num_free > 0:
            return self.integrate(slices)
        count = len(self._nodes)
        self.cells.index_add_(0, slices.datum[::count], torch.ones_like(slices.datum[::count]))
        self._bar.update(len(slices.datum) // count)
        side = points_at_once(slices.width, POINTS)
        parts = zip(slices.datum.split(side), slices.fixed.split(side), strict=True)
        value = torch.cat([slices.density.log(datum, v) for datum, v in parts]).exp()
        return Integral(value.nan_to_num(nan=0.0), torch.zeros_like(value))


def _are_of_lines(slices: Slices) -> bool:
    """Whether what a node of a cell fixes is a line, among those that are kept."""
    return slices.num_free == 2 and slices.fixed.shape[-1] == 0


def _sums(cells: Cells, values: Tensor, like: Tensor) -> Tensor:
    """Sums over the cells of each slice, (R,)."""
    return torch.zeros_like(like).index_add(0, cells.row, values)


def _jumps(cells: Cells) -> Tensor:
    """By how much each cell disagrees with its neighbours at its edges, times its width, (C,)."""
    order = in_groups(cells.row, cells.low)
    left, right = order[:-1], order[1:]
    meet = (cells.row[left] == cells.row[right]) & (cells.high[left] == cells.low[right])
    jump = torch.where(meet, (cells.end[left] - cells.start[right]).abs(), 0.0)
    total = torch.zeros_like(cells.value)
    total[left] += jump
    total[right] += jump
    return (cells.high - cells.low) * total


def _run_lengths(done: Tensor, width: Tensor) -> Tensor:
    """Length of the run of finished cells that each finished cell is in, (R, C): the scale of a tail beyond it."""
    run = (~done).cumsum(-1)
    length = width.new_zeros(len(width), width.shape[-1] + 1).scatter_add(1, run, torch.where(done, width, 0.0))
    return length.gather(1, run) * done


def _cover(peaks: Peaks, num_rows: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cells around the peaks of each slice: edges, which cells touch a peak, and their distances from peaks.

    Edges are (R, C + 1), padded by infinity; distances (2, R, C), from the next peak on the right and on the left.
    """
    count = torch.bincount(peaks.row, minlength=num_rows)
    most = max(1, int(count.max())) if num_rows else 1
    column = torch.arange(len(peaks.row), device=count.device) - (count.cumsum(0) - count)[peaks.row]
    first = next(edges for least, edges in _FIRST_EDGES if tolerance >= least)
    outer = (*first, *(first[-1] * 4.0**i for i in range(1, _FURTHER_EDGES + 1)))
    offsets = peaks.position.new_tensor([*(-e for e in reversed(outer)), 0.0, *outer])
    edges = peaks.position.new_full((num_rows, most, len(offsets)), torch.inf)
    edges[peaks.row, column] = peaks.position.unsqueeze(-1) + peaks.scale.unsqueeze(-1) * offsets
    edges = edges.view(num_rows, -1).sort(-1).values
    at = peaks.position.new_full((num_rows, most), torch.inf)
    at[peaks.row, column] = peaks.position
    right = torch.searchsorted(edges, at).clamp(max=edges.shape[-1] - 2)
    active = torch.zeros_like(edges[:, 1:], dtype=torch.bool)
    active.scatter_(1, right, True)
    active.scatter_(1, (right - 1).clamp(min=0), True)
    at = torch.cat(
        [at.new_full((num_rows, 1), -torch.inf), at.sort(-1).values, at.new_full((num_rows, 1), torch.inf)], -1
    )
    low, high = edges[:, :-1].contiguous(), edges[:, 1:].contiguous()
    after = at.gather(1, torch.searchsorted(at, high)) - high
    before = low - at.gather(1, torch.searchsorted(at, low, right=True) - 1)
    return edges, active, torch.stack([after, before])
