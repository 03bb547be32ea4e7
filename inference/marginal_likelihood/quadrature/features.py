r"""Isolated holes and hills of a posterior density, too small for the nodes of a rule to meet.

A hole of a hundredth of the prior's width in a wide posterior lies between the nodes, and all rules agree about the
rest. On an even grid over the posterior a smooth density f is nearly a polynomial of its neighbours: with eighth
differences along each axis, what a point departs from that by is

.. math:: \delta = |\Delta^8 f| / \binom{8}{4}

The wings of a hole that is Gaussian show so at six of its standard deviations.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from inference.core.memory import at_once
from inference.marginal_likelihood.quadrature.slices import POINTS, Density
from inference.numerics.newton import points_at_once
from inference.posterior.modes import log_joint_at

# Points per dimension of the grid in one, two and three dimensions, at most, and of those that find its extent. A loose
# tolerance needs no more than meet what matters to it: so many over the root of it.
_GRID, _COARSE, _MATTERING = (2048, 120, 120), (33, 17, 13), 4.0

# From this tolerance on such a grid would see no more than the nodes do, in three dimensions.
LOOSE = 1e-3

# Nats below the best point at which the grid ends, and standard deviations of modes that it holds in any case: of those
# whose Laplace mass is less than the greatest by so many nats at most.
_DEPTH, _DEVIATIONS, _MATTERS = 10.0, 4.5, 16.0
_FARTHEST, _ZOOMS = 8.0, 4

# Neighbours on each side that predict a point.
_AROUND = 4

# A feature departs by more than this part of the tolerance, relative to the highest density, and so many times more
# than all points from the first to the second distance do. Ridges and edges have their like there, and meet the nodes.
# A Gaussian mode departs by 1.5 times the eighth power of the points' distance in its standard deviations: ten times
# that is smooth.
_LEAST, _BEYOND, _FRAME, _SMOOTH = 0.01, 100.0, (8, 12), 15.0

# Features of a data point at most, and the size that cells about one begin with, in the distance of grid points.
_MOST, _SIZE = 8, 1 / 3

# What departs so close to a mode that is so narrow, both in the size of features, is the mode: it has its cells.
_AT_MODE, _NARROW = 1.5, 4.0


@torch.no_grad()
def with_features(density: Density, tolerance: float) -> Density:
    """The density with its isolated features, as far as a grid over the posterior shows them.

    Args:
        density: That of all data.
        tolerance: Relative error of the evidence that is aimed at.
    """
    num_data, dim = density.origin.shape
    if dim == len(_GRID) and tolerance >= LOOSE:
        return density
    needed = math.ceil(_MATTERING * tolerance ** (-1 / dim)) + 2 * _AROUND
    num = min(max(needed, 4 * _AROUND), _GRID[dim - 1])
    data = torch.arange(num_data, device=density.origin.device)
    found = [_search(density, datum, num, tolerance) for datum in data.split(at_once(2**20, num**dim))]
    places, sizes = zip(*found, strict=True)
    return replace(density, features=torch.cat(places, dim=1), feature_size=torch.cat(sizes))


def _search(density: Density, datum: Tensor, num: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Places of the features of chosen data (n,), (J, n, d) with NaN where there are fewer, and their size (n, d)."""
    spread, mass = density.spreads[:, datum], _masses(density, datum)
    low, high = _extent(density, datum, spread, mass)
    step = (high - low) / (num - 1 - 2 * _AROUND)
    value = _on_grid(density, datum, low - _AROUND * step, high + _AROUND * step, num)
    departure = _departures((value - _highest(value)).exp())
    of_greatest = spread[mass.argmax(0), torch.arange(len(datum), device=datum.device)]
    smooth = _SMOOTH * (step / of_greatest).amax(-1) ** (2 * _AROUND)
    least = torch.maximum(
        _BEYOND * _beside(departure), smooth.clamp(min=_LEAST * tolerance).view(-1, *(1,) * low.shape[-1])
    )
    isolated = (departure > least) & (departure >= _within(departure, _AROUND))
    height, index = torch.where(isolated, departure, 0.0).flatten(1).topk(_MOST)
    side = departure.shape[1]
    at = torch.stack([index.T // side**axis % side for axis in reversed(range(low.shape[-1]))], dim=-1)
    place, size = low + step * at, _SIZE * step
    new = (height.T > 0) & ~_at_modes(density, datum, place, size)
    return torch.where(new.unsqueeze(-1), place, torch.nan), size


def _at_modes(density: Density, datum: Tensor, place: Tensor, size: Tensor) -> Tensor:
    """Which places (J, n, d) of chosen data (n,) are those of known modes that are as small as features, (J, n)."""
    modes, spread = density.modes[:, datum], density.spreads[:, datum]
    small = density.found[:, datum] & (spread < _NARROW * size).all(-1)
    close = ((place.unsqueeze(1) - modes).abs() < _AT_MODE * size).all(-1)
    return (close & small).any(1)


def _extent(density: Density, datum: Tensor, spread: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of boxes that hold the posteriors of chosen data (n,), each (n, d); of their modes are the others."""
    dim, modes, reach = density.origin.shape[-1], density.modes[:, datum], _DEVIATIONS * spread
    matters = (mass > mass.amax(0) - _MATTERS).unsqueeze(-1)
    least = torch.where(matters, modes - reach, torch.inf).amin(0)
    most = torch.where(matters, modes + reach, -torch.inf).amax(0)
    low, high = least.clamp(max=-_FARTHEST), most.clamp(min=_FARTHEST)
    for _ in range(_ZOOMS):
        value = _on_grid(density, datum, low, high, _COARSE[dim - 1])
        inside = value > _highest(value) - _DEPTH
        step = (high - low) / (_COARSE[dim - 1] - 1)
        first, last = _ends(inside)
        low, high = torch.minimum(least, low + step * (first - 0.5)), torch.maximum(most, low + step * (last + 0.5))
    return low, high


def _masses(density: Density, datum: Tensor) -> Tensor:
    """Laplace's logarithms of the masses of the modes of chosen data (n,), up to a constant, (J, n)."""
    return (density.height - 0.5 * torch.linalg.slogdet(density.precision).logabsdet)[:, datum]


def _ends(inside: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index along each axis of a grid (n, ...) at which a point is inside, each (n, d)."""
    ends = []
    for axis in range(1, inside.dim()):
        line = inside.movedim(axis, 1).reshape(*inside.shape[:2], -1).any(-1).byte()
        ends.append((line.argmax(-1), line.shape[-1] - 1 - line.flip(-1).argmax(-1)))
    first, last = zip(*ends, strict=True)
    return torch.stack(first, dim=-1), torch.stack(last, dim=-1)


def _highest(value: Tensor) -> Tensor:
    """The highest of the values of each data point, (n, ...), in as many dimensions."""
    return value.flatten(1).amax(1).view(-1, *(1,) * (value.dim() - 1))


def _on_grid(density: Density, datum: Tensor, low: Tensor, high: Tensor, num: int) -> Tensor:
    """Log density of chosen data (n,) on even grids between two corners, (n, num, ...)."""
    dim = low.shape[-1]
    line = torch.linspace(0, 1, num, dtype=low.dtype, device=low.device)
    unit = torch.cartesian_prod(*[line] * dim).view(-1, 1, dim)
    log_joint, frame = density.log_joint.rows(datum), density.frame[datum]
    origin = density.origin[datum] + (frame @ low.unsqueeze(-1)).squeeze(-1)
    along = (frame * (high - low).unsqueeze(-2)).unbind(-1)  # vectors (n, d)
    parts, every = [], torch.arange(len(datum), device=datum.device)
    for part in unit.split(points_at_once(log_joint.width * len(datum), POINTS)):
        u = origin + sum(t * axis for t, axis in zip(part.split(1, dim=-1), along, strict=True))
        if density.log_joint.broadcasts:
            parts.append(log_joint(u))
        else:  # several data points run at once where several samples do not
            parts.append(log_joint_at(log_joint, every.repeat(len(u)), u.flatten(0, 1)).view(len(u), -1))
    value = (torch.cat(parts) - density.shift[datum]).T
    return value.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).reshape(-1, *(num,) * dim)


def _departures(f: Tensor) -> Tensor:
    """By how much values on a grid (n, num, ...) differ from what their neighbours along an axis predict, at most."""
    axes, inside = range(1, f.dim()), f.shape[1] - 2 * _AROUND
    most = f.new_zeros(len(f), *(inside,) * len(axes))
    for axis in axes:
        part = f
        for other in axes:
            part = part.diff(n=2 * _AROUND, dim=other) if other == axis else part.narrow(other, _AROUND, inside)
        most = torch.maximum(most, part.abs() / math.comb(2 * _AROUND, _AROUND))
    return most


def _within(f: Tensor, reach: int) -> Tensor:
    """The highest value on a grid (n, num, ...) within a distance along every axis."""
    for axis in range(1, f.dim()):
        f = _padded(f, axis, reach).unfold(axis, 2 * reach + 1, 1).amax(-1)
    return f


def _beside(f: Tensor) -> Tensor:
    """The highest value on a grid (n, num, ...) in the frame around each point."""
    inner, outer = _FRAME
    most = torch.zeros_like(f)
    for axis in range(1, f.dim()):
        sides = _padded(f, axis, outer)
        for other in range(1, f.dim()):
            width = outer - inner + 1 if other == axis else 2 * outer + 1
            sides = sides if other == axis else _padded(sides, other, outer)
            sides = sides.unfold(other, width, 1).amax(-1)
        for first in (0, inner + outer):
            most = torch.maximum(most, sides.narrow(axis, first, f.shape[axis]))
    return most


def _padded(f: Tensor, axis: int, by: int) -> Tensor:
    """Values on a grid with zeros at both ends of an axis."""
    zeros = f.new_zeros(1).expand(*f.shape[:axis], by, *f.shape[axis + 1 :])
    return torch.cat([zeros, f, zeros], dim=axis)
