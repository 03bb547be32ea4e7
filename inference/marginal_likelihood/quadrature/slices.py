r"""Slices through a posterior density.

A slice fixes the first coordinates of a data point's latent and leaves the others free. Coordinates are those of the
prior's unit, turned so that the first is the direction in which the best mode is widest and the last the narrowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from inference.posterior.log_joint import LogJoint
from inference.posterior.modes import Modes, log_joint_at

# Peaks lower than this against the least of the important modes carry nothing, in nats.
LOWEST = -50.0

# Modes whose Laplace mass is less than the greatest by more than this are unimportant, in nats.
_UNIMPORTANT = 30.0

# The prior's unit: no peak is taken to be wider.
WIDEST = 1.0

# Modes that the search on a slice starts from.
_NEAREST = 3

# Points evaluated together.
POINTS = 2**16

# How far from an isolated feature a slice is led to it, in the feature's size.
_REACH = 24.0


@dataclass(frozen=True)
class Density:
    """Log joint density of each data point in turned coordinates v, with u = origin + frame v, up to a constant.

    Attributes:
        log_joint: That of the model.
        origin: (N, d).
        frame: (N, d, d).
        shift: What is subtracted, (N,) in nats.
        modes: Places of the modes, (J, N, d).
        precision: Minus the Hessians there, positive, (J, N, d, d).
        height: Log density there, (J, N) in nats; minus infinity where there is none.
        features: Places of isolated holes and hills, (I, N, d); NaN where a data point has fewer.
        feature_size: Their size along each coordinate, (N, d).
    """

    log_joint: LogJoint
    origin: Tensor
    frame: Tensor
    shift: Tensor
    modes: Tensor
    precision: Tensor
    height: Tensor
    features: Tensor
    feature_size: Tensor

    @classmethod
    def around(cls, log_joint: LogJoint, modes: Modes, location: Tensor, scale: Tensor) -> Density:
        """The density in the coordinates of its best mode, without features.

        Args:
            log_joint: That of the model.
            modes: Its modes.
            location: Origin of the prior's unit, (N, d).
            scale: The prior's unit, (N, d).
        """
        whitened = -modes.hessian * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        curvature, axes = torch.linalg.eigh(whitened)
        curvature = curvature.clamp(min=1 / WIDEST**2)
        mass = modes.log_joint - 0.5 * curvature.log().sum(-1)
        best = mass.argmax(0)
        data = torch.arange(len(best), device=best.device)
        turn = axes[best, data]
        important = mass > mass.max(0).values - _UNIMPORTANT
        shift = torch.where(important, modes.log_joint, torch.inf).min(0).values
        precision = turn.mT @ (axes * curvature.unsqueeze(-2) @ axes.mT) @ turn
        places = (turn.mT @ ((modes.location - location) / scale).unsqueeze(-1)).squeeze(-1)
        frame = scale.unsqueeze(-1) * turn
        height = modes.log_joint - shift
        return cls(log_joint, location, frame, shift, places, precision, height, places[:0], torch.ones_like(scale))

    @property
    def found(self) -> Tensor:
        """Which modes there are and matter, (J, N)."""
        return self.height > LOWEST

    @cached_property
    def spreads(self) -> Tensor:
        """Standard deviations of the coordinates under the quadratic models of the modes, (J, N, d)."""
        return torch.linalg.inv(self.precision).diagonal(dim1=-2, dim2=-1).sqrt()

    def marginal(self, num: int) -> Tensor:
        """Precisions of the first coordinates under the quadratic models of the modes, (J, N, num, num)."""
        across = self.precision[..., :num, num:]
        return self.precision[..., :num, :num] - across @ torch.linalg.solve(self.precision[..., num:, num:], across.mT)

    def log(self, datum: Tensor, v: Tensor) -> Tensor:
        """Log density of data points (M,) at v (M, d), (M,)."""
        u = self.origin[datum] + (self.frame[datum] @ v.unsqueeze(-1)).squeeze(-1)
        return log_joint_at(self.log_joint, datum, u) - self.shift[datum]


@dataclass(frozen=True)
class Slices:
    """Slices through the densities of data points.

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
    def width(self) -> int:
        """Numbers that the log density makes of a point."""
        return self.density.log_joint.width

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


def nearest_modes(slices: Slices) -> tuple[Tensor, Tensor]:
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
    most = int(density.found[:, slices.datum].sum(0).max()) if len(slices.datum) else 1  # the others carry nothing
    near = loss.topk(min(_NEAREST, max(1, most)), dim=0).indices
    modes, precision = density.modes[near, slices.datum], density.precision[near, slices.datum]
    offset = (slices.fixed - modes[..., :num_fixed]).unsqueeze(-1)
    free = precision[..., num_fixed:, num_fixed:]
    drift = torch.linalg.solve(free, precision[..., num_fixed:, :num_fixed] @ offset)
    return modes[..., num_fixed:] - drift.squeeze(-1), free


def features_near(slices: Slices) -> tuple[Tensor, Tensor, Tensor]:
    """Isolated features that slices pass: slice, place along the first free coordinate, and size there, (F,) each."""
    density, num = slices.density, slices.fixed.shape[-1]
    place, size = density.features[:, slices.datum], density.feature_size[slices.datum]
    near = ((place[..., :num] - slices.fixed).abs() < _REACH * size[:, :num]).all(-1) & place[..., num].isfinite()
    found, row = near.nonzero().unbind(-1)
    return row, place[found, row, num], size[row, num]
