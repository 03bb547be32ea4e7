"""Batched limited-memory BFGS (L-BFGS): many small unconstrained minimisations side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_HISTORY = 10
_ARMIJO = 1e-4
_MAX_HALVINGS = 30

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
    evaluate: Evaluate, start: Tensor, *, max_steps: int = 200, tolerance: float = 1e-6, least_gain: float = 0.0
) -> Minimum:
    """Minimise N functions of P variables each by limited-memory BFGS (L-BFGS) with backtracking, all at once.

    References:
        Liu, Nocedal, "On the limited memory BFGS method for large scale optimization", 1989.

    Args:
        evaluate: Values and gradients of chosen problems.
        start: (N, P).
        max_steps: Steps at most.
        tolerance: Gradient norm at which a problem has converged.
        least_gain: What ten steps must gain together, or a problem ends.

    Returns:
        For each problem the lowest point found; never above its start.
    """
    state = _State.begin(evaluate, start)
    active = (state.value.isfinite() & (state.gradient.norm(dim=-1) > tolerance)).nonzero()[:, 0]
    steps, converged = torch.zeros_like(state.value, dtype=torch.long), state.value.isfinite()
    before = state.value.clone()
    for step in range(max_steps):
        if len(active) == 0:
            break
        steps[active] += 1
        moved, renewed = state.step(evaluate, active)
        # One that cannot move even without its history is as low as rounding allows.
        active = active[(state.gradient[active].norm(dim=-1) > tolerance) & (moved | ~renewed)]
        if step % _HISTORY == _HISTORY - 1:
            active = active[before[active] - state.value[active] > least_gain]
            before = state.value.clone()
    converged[active] = False
    return Minimum(state.point, state.value, state.gradient.norm(dim=-1), steps, converged)


@dataclass
class _State:
    """Points, values, gradients, and the last differences of points and gradients, the newest last."""

    point: Tensor
    value: Tensor
    gradient: Tensor
    points: Tensor
    gradients: Tensor
    curvature: Tensor  # their inner products, (H, N); zero where there is no pair

    @classmethod
    def begin(cls, evaluate: Evaluate, start: Tensor) -> _State:
        value, gradient = evaluate(start, torch.arange(len(start), device=start.device))
        empty = start.new_zeros(_HISTORY, *start.shape)
        return cls(start.clone(), value.clone(), gradient.clone(), empty, empty.clone(), empty[..., 0].clone())

    def step(self, evaluate: Evaluate, active: Tensor) -> tuple[Tensor, Tensor]:
        """Move the active problems; returns which moved, and which went without a history."""
        gradient = self.gradient[active]
        direction = self._direction(active, gradient)
        slope = (direction * gradient).sum(-1)
        renewed = (self.curvature[:, active] == 0).all(0) | ~(slope < 0)
        norm = gradient.norm(dim=-1, keepdim=True)
        direction = torch.where(renewed.unsqueeze(-1), -gradient / norm.clamp(min=1.0), direction)
        point, value, new_gradient, moved = self._search(evaluate, active, direction)
        self._remember(active, point - self.point[active], new_gradient - gradient, moved)
        self.point[active], self.value[active], self.gradient[active] = point, value, new_gradient
        return moved, renewed

    def _direction(self, active: Tensor, gradient: Tensor) -> Tensor:
        """The two-loop recursion."""
        s, y, sy = self.points[:, active], self.gradients[:, active], self.curvature[:, active]
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

    def _search(self, evaluate: Evaluate, active: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Halve each problem's step until its value has fallen enough."""
        point, value, gradient = self.point[active], self.value[active], self.gradient[active]
        slope, old = (direction * gradient).sum(-1), value.clone()
        length, moved = torch.ones_like(value), torch.zeros_like(value, dtype=torch.bool)
        for _ in range(_MAX_HALVINGS):
            rest = (~moved).nonzero()[:, 0]
            if len(rest) == 0:
                break
            trial = self.point[active[rest]] + length[rest].unsqueeze(-1) * direction[rest]
            new_value, new_gradient = evaluate(trial, active[rest])
            falls = new_value <= old[rest] + _ARMIJO * length[rest] * slope[rest]
            falls &= (new_value < old[rest]) & new_gradient.isfinite().all(-1)
            found = rest[falls]
            point[found], value[found], gradient[found] = trial[falls], new_value[falls], new_gradient[falls]
            moved[found] = True
            length[rest[~falls]] /= 2
        return point, value, gradient, moved

    def _remember(self, active: Tensor, s: Tensor, y: Tensor, moved: Tensor) -> None:
        """Shift in the newest differences; forget all of a problem that did not move, to begin down its gradient."""
        sy = (s * y).sum(-1)
        sy = torch.where(moved & (sy > 1e-12 * s.norm(dim=-1) * y.norm(dim=-1)), sy, torch.zeros_like(sy))
        for name, newest in (("points", s), ("gradients", y), ("curvature", sy)):
            kept = getattr(self, name)
            kept[:, active] = torch.cat([kept[1:, active], newest.unsqueeze(0)])
        self.curvature[:, active[~moved]] = 0.0
