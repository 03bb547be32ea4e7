"""Batched limited-memory BFGS (L-BFGS): many small unconstrained minimisations side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_HISTORY = 30
_GAIN_STEPS, _MANY_STEPS = 10, 30
_ARMIJO = 1e-4
_MAX_TRIALS = 30

# By which a step that is too long is shortened, at least and at most.
_LEAST, _MOST = 0.5, 0.1

# From points (M, P), and which of the N problems they belong to (M,), to values (M,) and gradients (M, P).
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Minimum:
    """Where the minimisations ended.

    Attributes:
        point: (N, P).
        value: (N,).
        gradient_norm: Euclidean norm of the gradient there, (N,).
        steps: Steps that each took, (N,).
        converged: Whether it ended before the last step, (N,).
    """

    point: Tensor
    value: Tensor
    gradient_norm: Tensor
    steps: Tensor
    converged: Tensor


@torch.no_grad()
def minimise(
    evaluate: Evaluate,
    start: Tensor,
    *,
    max_steps: int = 200,
    tolerance: float = 1e-6,
    least_gain: float = 0.0,
    in_the_end: float = 0.0,
) -> Minimum:
    """Minimise N functions of P variables each by limited-memory BFGS (L-BFGS) with backtracking, all at once.

    Each problem goes its own way: one evaluation of all makes a step of some and shortens the trial step of others.

    References:
        Liu, Nocedal, "On the limited memory BFGS method for large scale optimization", 1989.

    Args:
        evaluate: Values and gradients of chosen problems.
        start: (N, P).
        max_steps: Steps at most.
        tolerance: Gradient norm at which a problem has converged.
        least_gain: What ten steps must gain together, or a problem ends.
        in_the_end: Gradient norm that is small enough after thirty steps, for functions with kinks, of which it falls
            by chance alone.

    Returns:
        For each problem the lowest point found; never above its start.
    """
    state = _State.begin(evaluate, start)
    active = (state.value.isfinite() & (state.gradient.norm(dim=-1) > tolerance)).nonzero()[:, 0]
    converged, before = state.value.isfinite(), state.value.clone()
    state.aim(active)
    while max_steps and len(active):
        moved, stuck = state.attempt(evaluate, active)
        tenth = moved[state.steps[moved] % _GAIN_STEPS == 0]
        state.ended[tenth] = before[tenth] - state.value[tenth] <= least_gain
        before[tenth] = state.value[tenth]
        enough = torch.where(state.steps[moved] >= _MANY_STEPS, max(tolerance, in_the_end), tolerance)
        state.ended[moved] |= state.gradient[moved].norm(dim=-1) <= enough
        # One that cannot move even without its history is as low as rounding allows.
        state.ended[stuck] = ~state.forget(stuck)
        late = moved[(state.steps[moved] >= max_steps) & ~state.ended[moved]]
        converged[late], state.ended[late] = False, True
        again = torch.cat([moved, stuck])
        state.aim(again[~state.ended[again]])
        active = active[~state.ended[active]]
    return Minimum(state.point, state.value, state.gradient.norm(dim=-1), state.steps, converged)


@dataclass
class _State:
    """Points, values, gradients, trial steps, and the last differences of points and gradients, the newest last."""

    point: Tensor
    value: Tensor
    gradient: Tensor
    direction: Tensor
    slope: Tensor  # along the direction, (N,)
    length: Tensor  # of the next trial in directions, (N,)
    trials: Tensor  # made along the direction, (N,)
    renewed: Tensor  # whether the direction goes without a history, (N,)
    steps: Tensor
    ended: Tensor
    points: Tensor
    gradients: Tensor
    curvature: Tensor  # their inner products, (H, N); zero where there is no pair

    @classmethod
    def begin(cls, evaluate: Evaluate, start: Tensor) -> _State:
        value, gradient = evaluate(start, torch.arange(len(start), device=start.device))
        kept = start.new_zeros(_HISTORY, *start.shape)
        none, number = torch.zeros_like(value, dtype=torch.bool), torch.zeros_like(value, dtype=torch.long)
        return cls(
            point=start.clone(),
            value=value.clone(),
            gradient=gradient.clone(),
            direction=torch.zeros_like(start),
            slope=torch.zeros_like(value),
            length=torch.ones_like(value),
            trials=number,
            renewed=none,
            steps=number.clone(),
            ended=none.clone(),
            points=kept,
            gradients=kept.clone(),
            curvature=kept[..., 0].clone(),
        )

    def aim(self, index: Tensor) -> None:
        """Choose the directions of some problems, in which the first trial is one long."""
        gradient = self.gradient[index]
        direction = self._direction(index, gradient)
        renewed = (self.curvature[:, index] == 0).all(0) | ~((direction * gradient).sum(-1) < 0)
        norm = gradient.norm(dim=-1, keepdim=True)
        direction = torch.where(renewed.unsqueeze(-1), -gradient / norm.clamp(min=1.0), direction)
        self.direction[index], self.slope[index] = direction, (direction * gradient).sum(-1)
        self.renewed[index], self.length[index], self.trials[index] = renewed, 1.0, 0

    def _direction(self, index: Tensor, gradient: Tensor) -> Tensor:
        """The two-loop recursion."""
        s, y, sy = self.points[:, index], self.gradients[:, index], self.curvature[:, index]
        rho = torch.where(sy > 0, 1 / sy.where(sy > 0, torch.ones_like(sy)), 0.0)
        q, alpha = gradient.clone(), torch.zeros_like(sy)
        for i in reversed(range(_HISTORY)):
            alpha[i] = rho[i] * (s[i] * q).sum(-1)
            q = q - alpha[i].unsqueeze(-1) * y[i]
        scale = torch.ones_like(sy[0])
        for i in range(_HISTORY):
            scale = torch.where(sy[i] > 0, sy[i] / y[i].square().sum(-1).clamp(min=1e-300), scale)
        q = q * scale.unsqueeze(-1)
        for i in range(_HISTORY):
            q = q + (alpha[i] - rho[i] * (y[i] * q).sum(-1)).unsqueeze(-1) * s[i]
        return -q

    def attempt(self, evaluate: Evaluate, active: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate every problem's trial; returns which moved to it, and which have no further trial."""
        length = self.length[active]
        trial = self.point[active] + length.unsqueeze(-1) * self.direction[active]
        value, gradient = evaluate(trial, active)
        old, slope = self.value[active], self.slope[active]
        falls = (value <= old + _ARMIJO * length * slope) & (value < old) & gradient.isfinite().all(-1)
        moved, others = active[falls], active[~falls]
        self._remember(moved, trial[falls] - self.point[moved], gradient[falls] - self.gradient[moved])
        self.point[moved], self.value[moved], self.gradient[moved] = trial[falls], value[falls], gradient[falls]
        self.steps[moved] += 1
        # The lowest point of the parabola through the value and slope at the start and the value at the trial.
        lowest = -slope * length / (2 * ((value - old) / length - slope))
        shorter = torch.where(lowest.isfinite(), lowest, _MOST * length).clamp(_MOST * length, _LEAST * length)
        self.length[others] = shorter[~falls]
        self.trials[others] += 1
        return moved, others[self.trials[others] >= _MAX_TRIALS]

    def forget(self, index: Tensor) -> Tensor:
        """Forget the history of some problems, to begin down their gradients; returns which had one."""
        self.curvature[:, index] = 0.0
        return ~self.renewed[index]

    def _remember(self, index: Tensor, s: Tensor, y: Tensor) -> None:
        """Shift in the newest differences."""
        sy = (s * y).sum(-1)
        sy = torch.where(sy > 1e-12 * s.norm(dim=-1) * y.norm(dim=-1), sy, torch.zeros_like(sy))
        for name, newest in (("points", s), ("gradients", y), ("curvature", sy)):
            kept = getattr(self, name)
            kept[:, index] = torch.cat([kept[1:, index], newest.unsqueeze(0)])
