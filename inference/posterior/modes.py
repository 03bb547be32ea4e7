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
from inference.numerics.newton import CHUNK, LEAST_CURVATURE, RowFunction, maximise
from inference.posterior.log_joint import LogJoint

# Curvature per prior variance below which a maximum is a ridge, and the least that a Gaussian is given: it is no wider
# than some three prior sigmas.
_RIDGE, _LEAST_CURVATURE = 1e-3, 0.1


# Two points closer than this, in standard deviations of the better one, are one mode.
_SAME = 1e-2

# Where the neighbour of a mode across a fold is looked for, at the farthest, in units of the prior.
_FARTHEST = 2.0


class Modes(NamedTuple):
    """Local maxima of the log joint density, up to J per data point, the highest first.

    Attributes:
        location: Unconstrained coordinates, (J, N, d); repeats the best where a data point has fewer.
        log_joint: Log joint density there, (J, N) in nats; minus infinity where a data point has fewer.
        hessian: Second derivatives of the log joint density there, (J, N, d, d).
        converged: Whether Newton's method converged, (J, N); on flat ridges it may not.
    """

    location: Tensor
    log_joint: Tensor
    hessian: Tensor
    converged: Tensor


def search_modes(
    log_joint: LogJoint, draws: Sequence[Tensor], location: Tensor, scale: Tensor, *, grid: int = 33
) -> Modes:
    """The modes of the log joint density: from draws, from a grid where d is at most 3, and across folds from there.

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
        row, points = scan(function, len(location), log_joint.dim, grid, like=location)
        starts.append(_padded(row, location[row] + scale[row] * points, len(location)))
    modes = find_modes(log_joint, torch.cat(starts), location, scale)
    hessian = modes.hessian * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    beside = neighbourhood((modes.location - location) / scale, hessian)
    around = location + scale * torch.where(_converged(modes), beside, torch.nan).flatten(0, 1)
    others = find_modes(log_joint, around, location, scale)
    first = torch.where(modes.log_joint.isfinite().unsqueeze(-1), modes.location, torch.nan)
    second = torch.where(_converged(others), others.location, torch.nan)
    return find_modes(log_joint, torch.cat([first, second]), location, scale)


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
    return Modes(location + scale * found, pick(value), hessian, pick(table(converged, False)))


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


def scan(function: RowFunction, num_rows: int, dim: int, num_points: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """The points of a grid that no neighbour along an axis exceeds: starts near every mode that the grid resolves.

    Args:
        function: See :func:`maximise`.
        num_rows: R.
        dim: k, from 1 to 3.
        num_points: Grid points per dimension.
        like: Tensor of the dtype and device to work in.

    Returns:
        Rows (M,) and points (M, k).
    """
    line = grid_line(num_points, like=like)
    cloud = torch.stack(torch.meshgrid(*[line] * dim, indexing="ij"), dim=-1).view(-1, dim)
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[dim - 1]
    rows, points = [], []
    for part in torch.arange(num_rows, device=like.device).split(at_once(4 * CHUNK, len(cloud))):
        value = function(part.repeat_interleave(len(cloud)), cloud.repeat(len(part), 1)).nan_to_num(nan=-torch.inf)
        value = value.view(len(part), 1, *(num_points,) * dim)
        peak = value.isfinite()
        for across in torch.eye(dim, dtype=torch.int).tolist():
            beside = pool(value, [1 + 2 * a for a in across], stride=1, padding=across)
            peak &= value >= beside
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
    order = value.argsort(0, descending=True)
    keep = torch.zeros_like(saddle)
    data = torch.arange(value.shape[1], device=value.device)
    metric = axes.mT * curvature.clamp(min=LEAST_CURVATURE).sqrt().unsqueeze(-1)
    for best in order:
        apart = (metric @ (points - points[best, data]).unsqueeze(-1)).squeeze(-1).norm(dim=-1)
        keep[best, data] = ~(keep & (apart < _SAME)).any(0) & value[best, data].isfinite()
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
