r"""The modes of the log joint density of any Pyro model, per data point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from inference.core.checks import check_count
from inference.core.memory import at_once
from inference.distributions.batched_gaussian import Gaussian
from inference.numerics.newton import LEAST_CURVATURE, RowFunction, decrement, maximise, points_at_once
from inference.posterior.log_joint import LogJoint

# Curvature per prior variance below which a maximum is a ridge, and the least that a Gaussian is given: it is no wider
# than some three prior sigmas.
_RIDGE, _LEAST_CURVATURE = 1e-3, 0.1


# Two points closer than this, in standard deviations of the better one, are one mode.
_SAME = 1e-2

# A point that Newton's method did not leave though its step would gain more than this, in nats, is at a kink, as of a
# decoder with ReLUs. Many such points belong to one maximum: one in sight of a higher one, along a line of so many
# points on which the density falls by less than half a nat, is no mode of its own. Only so many of the highest see.
_KINK, _SIGHT, _DIP, _HIGHEST = 1e-6, 16, 0.5, 32

# Where the neighbour of a mode across a fold is looked for, at the farthest, in units of the prior.
_FARTHEST = 2.0

# Further looks for modes at most, and the part of the modes' Laplace mass that a look has to add for another to follow.
_LOOKS, _NOTHING = 4, 1e-9

# Points per dimension of the second look's grid, in those of the first, for one, two and three dimensions; and by how
# much each further look is denser. Grids on a line cost little, and there modes may be many.
_DENSITY, _DENSER = (16.0, 1.0, 0.5), (4.0, 1.3, 1.15)

# Draws from the prior for each further look, in one, two, three and more dimensions, and how many of them, those of
# greatest likelihood, it starts from.
_PROBES, _LIKELIEST = (1024, 4096, 8192, 512), 8

# By what part of the distance of its points each look's grid is shifted against the one before.
_GOLDEN = 0.6180339887


class Modes(NamedTuple):
    """Local maxima of the log joint density, up to J per data point, the highest first.

    Attributes:
        location: Unconstrained coordinates, (J, N, d); repeats the best where a data point has fewer.
        log_joint: Log joint density there, (J, N) in nats; minus infinity where a data point has fewer.
        hessian: Second derivatives of the log joint density there, (J, N, d, d).
        converged: Whether Newton's method converged, (J, N); on flat ridges it may not.
        kinked: Whether the density has a kink there, (J, N), where Newton's method stalls.
    """

    location: Tensor
    log_joint: Tensor
    hessian: Tensor
    converged: Tensor
    kinked: Tensor

    def rows(self, index: Tensor) -> Modes:
        """The modes of chosen data points, (M,) integers."""
        return Modes(*(part[:, index] for part in self))


def search_modes(
    log_joint: LogJoint, draws: Sequence[Tensor], location: Tensor, scale: Tensor, *, grid: int = 33
) -> Modes:
    """The modes of the log joint density: from draws, from a grid where d is at most 3, and across folds from there.

    Further looks, from shifted grids and from the likeliest of new draws from the prior, go on until one finds nothing
    new: narrow peaks attract only starts in their neighbourhood.

    Args:
        log_joint: Log joint density of a model.
        draws: Starts, each (S, N, d): from the prior, from a guide.
        location: Origin of the grid, (N, d), see :func:`prior_scale`.
        scale: Its unit, (N, d).
        grid: Points per dimension, within 8 units.
    """
    starts = list(draws)
    if log_joint.dim <= 3:
        function = in_prior_units(log_joint, location, scale)
        row, points = scan(function, len(location), log_joint.dim, grid, width=log_joint.width, like=location)
        starts.append(_padded(row, location[row] + scale[row] * points, len(location)))
    modes = find_modes(log_joint, torch.cat(starts), location, scale)
    hessian = modes.hessian * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    beside = neighbourhood((modes.location - location) / scale, hessian)
    around = location + scale * torch.where(_converged(modes), beside, torch.nan).flatten(0, 1)
    others = find_modes(log_joint, around, location, scale)
    modes = together(log_joint, modes, others, location, scale)
    active = torch.arange(len(location), device=location.device)
    for look in range(1, _LOOKS + 1):
        before = laplace_mass(modes, scale)
        further = _further_starts(log_joint, active, location, scale, grid, look)
        modes = together(log_joint, modes, find_modes(log_joint, further, location, scale), location, scale)
        active = (~(laplace_mass(modes, scale) - before <= _NOTHING)).nonzero()[:, 0]
        if len(active) == 0:
            break
    return modes


def laplace_mass(modes: Modes, scale: Tensor) -> Tensor:
    """Log of the integral of the modes' Gaussians, in units of the prior and up to a constant, (N,) in nats."""
    return mode_masses(modes, scale).logsumexp(0)


def mode_masses(modes: Modes, scale: Tensor) -> Tensor:
    """Logs of the integrals of the modes' Gaussians, none wider than the prior's unit, up to a constant: (J, N)."""
    curvature = torch.linalg.eigvalsh(-modes.hessian * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    return modes.log_joint - 0.5 * curvature.clamp(min=1.0).log().sum(-1)


def together(log_joint: LogJoint, modes: Modes, others: Modes, location: Tensor, scale: Tensor) -> Modes:
    """Modes with those of others that converged, each once."""
    first = torch.where(modes.log_joint.isfinite().unsqueeze(-1), modes.location, torch.nan)
    second = torch.where(_converged(others), others.location, torch.nan)
    return find_modes(log_joint, torch.cat([first, second]), location, scale)


def _further_starts(
    log_joint: LogJoint, active: Tensor, location: Tensor, scale: Tensor, grid: int, look: int
) -> Tensor:
    """Starts of a further look at some data (M,), for all (S, N, d): NaN where there are fewer."""
    dim, function = log_joint.dim, in_prior_units(log_joint, location, scale)
    likely = location.new_full((_LIKELIEST, *location.shape), torch.nan)
    likely[:, active] = likeliest(log_joint.rows(active), _PROBES[min(dim, len(_PROBES)) - 1], location[active])
    if dim > 3:
        return likely
    num = max(5, round(grid * _DENSITY[dim - 1] * _DENSER[dim - 1] ** (look - 1)))
    shift = 6 / (num - 1) * ((look * _GOLDEN) % 1 - 0.5)
    row, points = scan(
        lambda rows, points: function(active[rows], points + shift),
        len(active),
        dim,
        num,
        width=log_joint.width,
        like=location,
    )
    row = active[row]
    return torch.cat([likely, _padded(row, location[row] + scale[row] * (points + shift), len(location))])


@torch.no_grad()
def likeliest(log_joint: LogJoint, total: int, location: Tensor, width: float = 1.0) -> Tensor:
    """The draws of greatest likelihood among many from the prior, or one that is wider about a place: (S, N, d)."""
    best, side = None, at_once(2**19, log_joint.num_data * log_joint.width)
    for first in range(0, total, side):
        draws = log_joint.sample_prior(min(side, total - first)).to(location)
        draws = location + width * (draws - location)
        likelihood = log_joint.terms(draws).likelihood.nan_to_num(nan=-torch.inf)
        found = draws, likelihood
        best = _highest(*(found if best is None else map(torch.cat, zip(best, found, strict=True))))
    assert best is not None
    return best[0]


def _highest(draws: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The draws (S, N, d) of highest value (S, N), with their values."""
    value, order = value.topk(min(_LIKELIEST, len(value)), dim=0)
    return draws.gather(0, order.unsqueeze(-1).expand(-1, -1, draws.shape[-1])), value


def find_modes(
    log_joint: LogJoint, starts: Tensor, location: Tensor, scale: Tensor, *, max_iterations: int = 200
) -> Modes:
    """The modes of the log joint density that are reached from given starts.

    Warning:
        A mode that no start leads to is not found, and no warning is given: a narrow peak far from the others attracts
        only starts in its neighbourhood.

    Args:
        log_joint: Log joint density of a model.
        starts: Unconstrained coordinates, (S, N, d); NaN where a data point has fewer.
        location: Origin of the whitened coordinates, (N, d), see :func:`prior_scale`.
        scale: Their unit, (N, d).
        max_iterations: Newton steps at most.
    """
    check_count(max_iterations, "max_iterations")
    num_starts, num_data, _ = starts.shape
    sample, datum = (~starts.isnan().any(-1)).nonzero().unbind(-1)
    whitened = in_prior_units(log_joint, location, scale)
    points, at, converged = maximise(
        lambda rows, points: whitened(datum[rows], points),
        ((starts - location) / scale)[sample, datum],
        width=log_joint.width,
        max_iterations=max_iterations,
    )

    def table(values: Tensor, missing: float) -> Tensor:
        full = values.new_full((num_starts, num_data, *values.shape[1:]), missing)
        full[sample, datum] = values
        return full

    kinked = table(converged & (decrement(at) > _KINK), False)
    points, hessian = table(points, 0.0), table(at.hessian, 0.0)
    value = table(at.value, -torch.inf)
    keep = distinct(points, value, hessian)
    kept = torch.where(keep, value, -torch.inf)
    keep &= ~_in_sight_of_higher(whitened, points, kept, kinked, width=log_joint.width)
    value = torch.where(keep, value, -torch.inf)
    order = value.argsort(0, descending=True)[: max(1, int(keep.sum(0).max()))]

    def pick(values: Tensor) -> Tensor:
        return values[order, torch.arange(num_data, device=order.device)]

    found = torch.where(pick(keep)[..., None], pick(points), pick(points)[:1])
    hessian = pick(hessian) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    flags = (pick(keep) & pick(flag) for flag in (table(converged, False), kinked))
    return Modes(location + scale * found, pick(value), hessian, *flags)


def _in_sight_of_higher(function: RowFunction, points: Tensor, value: Tensor, kinked: Tensor, *, width: int) -> Tensor:
    """Which points at kinks (S, N) are in sight of a higher one of their data point that is not so itself."""
    gone = torch.zeros_like(kinked)
    if not bool(kinked.any()):
        return gone
    data = torch.arange(value.shape[1], device=value.device)
    order = value.argsort(0, descending=True)
    for best in order[:_HIGHEST]:
        top = value[best, data]
        lower = kinked & ~gone & (value < top) & value.isfinite() & ~gone[best, data]
        other = points[best, data].expand_as(points)
        gone |= in_sight(function, points, value, other, top.expand_as(value), lower, width=width)
    return gone


def in_sight(
    function: RowFunction,
    points: Tensor,
    value: Tensor,
    others: Tensor,
    heights: Tensor,
    asked: Tensor,
    *,
    width: int = 1,
) -> Tensor:
    """Whether the density falls by less than half a nat below both on the line from a point to another, (S, N).

    Args:
        function: The log density of data points, see :func:`in_prior_units`.
        points: (S, N, k).
        value: The log density there, (S, N).
        others: (S, N, k).
        heights: The log density there, (S, N).
        asked: Which to look at, (S, N); the others are not in sight.
        width: See :func:`maximise`.
    """
    sample, datum = asked.nonzero().unbind(-1)
    if len(datum) == 0:
        return torch.zeros_like(asked)
    start, way = points[sample, datum], (others - points)[sample, datum]
    lowest = torch.minimum(value, heights)[sample, datum] - _DIP
    open_, side = torch.ones_like(lowest, dtype=torch.bool), points_at_once(width)
    for part in range(1, _SIGHT + 1):
        index = open_.nonzero()[:, 0]
        between = start[index] + part / (_SIGHT + 1) * way[index]
        for rows, places in zip(index.split(side), between.split(side), strict=True):
            open_[rows] = function(datum[rows], places) >= lowest[rows]
    found = torch.zeros_like(asked)
    found[sample, datum] = open_
    return found


def in_prior_units(log_joint: LogJoint, location: Tensor, scale: Tensor) -> RowFunction:
    """The log joint density of chosen data points (M,) at (M, d) in units of the prior, see :func:`prior_scale`."""
    return lambda datum, points: log_joint_at(log_joint, datum, location[datum] + scale[datum] * points)


def log_joint_at(log_joint: LogJoint, datum: Tensor, u: Tensor) -> Tensor:
    """The log joint density of chosen data points (M,) at u (M, d), (M,); empty for none, where no model can be run."""
    return log_joint.rows(datum)(u) if len(datum) else u.sum(-1)


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


def scan(
    function: RowFunction, num_rows: int, dim: int, num_points: int, *, width: int = 1, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The points of a grid that no neighbour along an axis exceeds: starts near every mode that the grid resolves.

    Of a plateau only the rim counts, or the middle point where all the grid is one.

    Args:
        function: See :func:`maximise`.
        num_rows: R.
        dim: k, from 1 to 3.
        num_points: Grid points per dimension.
        width: See :func:`maximise`.
        like: Tensor of the dtype and device to work in.

    Returns:
        Rows (M,) and points (M, k).
    """
    line = grid_line(num_points, like=like)
    cloud = torch.stack(torch.meshgrid(*[line] * dim, indexing="ij"), dim=-1).view(-1, dim)
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[dim - 1]
    centre = torch.tensor(len(cloud) // 2, device=like.device)
    rows, points = [], []
    side = max(1, points_at_once(width) // len(cloud))
    for part in torch.arange(num_rows, device=like.device).split(side):
        value = function(part.repeat_interleave(len(cloud)), cloud.repeat(len(part), 1)).nan_to_num(nan=-torch.inf)
        value = value.view(len(part), 1, *(num_points,) * dim)
        peak, slanted = value.isfinite(), torch.zeros_like(value, dtype=torch.bool)
        for across in torch.eye(dim, dtype=torch.int).tolist():
            window = {"kernel_size": [1 + 2 * a for a in across], "stride": 1, "padding": across}
            peak &= value >= pool(value, **window)
            slanted |= value > -pool(-value, **window)
        flat = ~slanted.flatten(1).any(1).view(-1, *(1,) * (dim + 1))
        middle = torch.zeros_like(slanted[0]).view(-1).index_fill(0, centre, True).view_as(slanted[0])
        peak &= torch.where(flat, middle, slanted)
        row, index = peak.view(len(part), -1).nonzero().unbind(-1)
        rows.append(part[row])
        points.append(cloud[index])
    return torch.cat(rows), torch.cat(points)


def neighbourhood(points: Tensor, hessian: Tensor) -> Tensor:
    """Starts on both sides of modes along the axes of their Hessians, at growing distances up to two prior units.

    Across a fold of the likelihood a second mode lies next to the first, closer than any fixed grid resolves.

    Args:
        points: In units of the prior, (..., k).
        hessian: (..., k, k).

    Returns:
        (m, ..., k).
    """
    curvature, axes = torch.linalg.eigh(-hessian)
    sigma = curvature.clamp(min=LEAST_CURVATURE).rsqrt()
    offsets = (axes.mT * distances(sigma).unsqueeze(-1)).movedim(-2, 1)
    return torch.cat([points + offsets.flatten(0, 1), points - offsets.flatten(0, 1)])


def distances(sigma: Tensor) -> Tensor:
    """Distances (m, ...) from peaks of standard deviations sigma (...) to where their neighbours may stand."""
    factors = 5 * 1.7 ** torch.arange(24, dtype=sigma.dtype, device=sigma.device)
    grown = factors.view(-1, *(1,) * sigma.dim()) * sigma
    needed = int((grown < _FARTHEST).flatten(1).any(1).sum()) + 1
    return grown[:needed].clamp(max=_FARTHEST)


def distinct(points: Tensor, value: Tensor, hessian: Tensor) -> Tensor:
    """Which of the points of each data point are maxima different from those of higher value, (S, N).

    Args:
        points: (S, N, k).
        value: (S, N).
        hessian: (S, N, k, k).
    """
    curvature, axes = torch.linalg.eigh(-hessian)
    saddle = curvature[..., 0] < -1e-6 * curvature[..., -1].abs() - LEAST_CURVATURE
    saddle &= ~saddle.all(0)
    value = torch.where(saddle, -torch.inf, value)
    keep, remaining = torch.zeros_like(saddle), value.isfinite()
    data = torch.arange(value.shape[1], device=value.device)
    metric = axes.mT * curvature.clamp(min=LEAST_CURVATURE).sqrt().unsqueeze(-1)
    while bool(remaining.any()):
        best, exists = torch.where(remaining, value, -torch.inf).argmax(0), remaining.any(0)
        keep[best, data] |= exists
        apart = (metric[best, data] @ (points - points[best, data]).unsqueeze(-1)).squeeze(-1).norm(dim=-1)
        remaining &= ~(apart < _SAME)
        remaining[best, data] = False
    return keep


def _converged(modes: Modes) -> Tensor:
    """Which modes exist and have converged, (J, N, 1)."""
    return (modes.converged & modes.log_joint.isfinite()).unsqueeze(-1)


def _padded(row: Tensor, points: Tensor, num_rows: int) -> Tensor:
    """Points of rows (M, d), sorted by row, as a table (S, num_rows, d) with NaN where a row has fewer."""
    count = torch.bincount(row, minlength=num_rows)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    table = points.new_full((int(count.max()), num_rows, points.shape[-1]), torch.nan)
    table[place, row] = points
    return table


class Mode(NamedTuple):
    """The highest mode found for each data point.

    Attributes:
        location: Unconstrained coordinates, (N, d).
        log_joint: Log joint density there, (N,) in nats.
        hessian: Its second derivatives there, (N, d, d).
        scale: Standard deviations of the prior, (N, d).
    """

    location: Tensor
    log_joint: Tensor
    hessian: Tensor
    scale: Tensor

    @property
    def log_det(self) -> Tensor:
        """log det of minus the Hessian, (N,); NaN where that is not positive definite."""
        curvature = torch.linalg.eigvalsh(self._whitened)
        log_det = curvature.log().sum(-1) - 2 * self.scale.log().sum(-1)
        return torch.where((curvature > _RIDGE).all(-1), log_det, math.nan)

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian of the mode's curvature; along a direction that curves upwards, by its absolute value."""
        unit = self.scale.unsqueeze(-1)
        curvature, axes = torch.linalg.eigh(self._whitened)
        spread = axes / curvature.abs().clamp(min=_LEAST_CURVATURE).sqrt().unsqueeze(-2)
        # The triangular factor of spread @ spread', without squaring its condition number.
        factor = torch.linalg.qr((unit * spread).mT)[1].mT
        sign = factor.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return Gaussian(self.location, factor * sign)

    @property
    def _whitened(self) -> Tensor:
        unit = self.scale.unsqueeze(-1)
        return -self.hessian * unit * unit.mT
