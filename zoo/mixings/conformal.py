r"""Mixings with orthogonal Jacobian columns: conformal maps (Moebius, complex analytic) and polar coordinates.

.. math:: J^\top J = \lambda(s) I \text{ (conformal)}, \quad J^\top J = \Lambda(s) \text{ diagonal (orthogonal)}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.mixings.base import Mixing, as_numbers


class Moebius(Mixing):
    r"""A Moebius transformation of any dimension: an inversion at a point, turned, enlarged and shifted.

    .. math:: f(s) = b + \alpha A \frac{s - a}{\|s - a\|^2}, \qquad
        J = \frac{\alpha}{\|s - a\|^2} A \Bigl(I - 2 \frac{(s - a)(s - a)^\top}{\|s - a\|^2}\Bigr)

    Warning:
        The sources must keep away from the pole a.

    References:
        Reizinger et al., "Embrace the gap: VAEs perform independent mechanism analysis", 2022, arXiv 2206.02416.

    Args:
        pole: a, (K,).
        rotation: A, (K, K), orthogonal.
        shift: b, (K,); zero by default.
        alpha: Enlargement, not zero.

    Raises:
        ValueError: If shapes do not fit, A is not orthogonal or alpha is zero.
    """

    pole: Tensor
    rotation: Tensor
    shift: Tensor

    def __init__(
        self,
        pole: Tensor | Sequence[float],
        rotation: Tensor | Sequence[Sequence[float]],
        shift: Tensor | Sequence[float] | None = None,
        *,
        alpha: float = 1.0,
    ) -> None:
        pole = as_numbers(pole)
        super().__init__(len(pole), len(pole))
        self._keep(pole=pole, rotation=rotation, shift=torch.zeros_like(pole) if shift is None else shift)
        self.alpha = alpha
        _check_rotation(self.rotation, self.latent_dim)
        if self.pole.dim() != 1 or self.shift.shape != self.pole.shape:
            got = f"{tuple(self.pole.shape)} and {tuple(self.shift.shape)}"
            raise ValueError(f"expected pole and shift of one shape (K,), got {got}")
        if alpha == 0 or not math.isfinite(alpha):
            raise ValueError(f"expected alpha finite and not zero, got {alpha}")

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"pole": self.pole, "rotation": self.rotation, "shift": self.shift, "alpha": self.alpha}

    def _forward(self, s: Tensor) -> Tensor:
        return self.shift + self.alpha * _inverted(s - self.pole) @ self.rotation.T

    def _inverse(self, x: Tensor) -> Tensor:
        return self.pole + _inverted((x - self.shift) @ self.rotation / self.alpha)

    def _jacobian(self, s: Tensor) -> Tensor:
        offset = s - self.pole
        square = offset.square().sum(-1)[..., None, None]
        eye = torch.eye(self.latent_dim, dtype=s.dtype, device=s.device)
        reflection = eye - 2 * offset.unsqueeze(-1) * offset.unsqueeze(-2) / square
        return self.alpha * self.rotation @ reflection / square


class ComplexExp(Mixing):
    r"""The exponential of a complex number (s_1, s_2), injective on any strip of height 2 pi.

    .. math:: f(s) = e^{s_1} (\cos s_2, \sin s_2), \quad |s_2| < \pi
    """

    def __init__(self) -> None:
        super().__init__(2, 2)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}

    def _forward(self, s: Tensor) -> Tensor:
        return s[..., :1].exp() * _direction(s[..., 1])

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.stack([x.norm(dim=-1).log(), _angle(x)], -1)

    def _jacobian(self, s: Tensor) -> Tensor:
        return _multiplication(s[..., :1].exp() * _direction(s[..., 1]))


class ComplexPower(Mixing):
    r"""A power of a complex number s_1 + i s_2, injective for arguments between -pi/p and pi/p.

    .. math:: f(s) = (s_1 + i s_2)^p; \quad p = 2: \; (s_1^2 - s_2^2, 2 s_1 s_2), \; s_1 > 0

    Args:
        power: p, at least one.

    Raises:
        ValueError: If p is less than one.
    """

    def __init__(self, power: float = 2.0) -> None:
        super().__init__(2, 2)
        if not 1 <= power < math.inf:
            raise ValueError(f"expected a power of at least one, got {power}")
        self.power = power

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"power": self.power}

    def _forward(self, s: Tensor) -> Tensor:
        return _complex_power(s, self.power)

    def _inverse(self, x: Tensor) -> Tensor:
        return _complex_power(x, 1 / self.power)

    def _jacobian(self, s: Tensor) -> Tensor:
        return _multiplication(self.power * _complex_power(s, self.power - 1))


class Polar(Mixing):
    r"""Polar coordinates (radius, angle) to the plane: orthogonal columns of lengths 1 and s_1, hence not conformal.

    .. math:: f(s) = s_1 (\cos s_2, \sin s_2), \quad s_1 > 0, \; |s_2| < \pi
    """

    def __init__(self) -> None:
        super().__init__(2, 2)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}

    def _forward(self, s: Tensor) -> Tensor:
        return s[..., :1] * _direction(s[..., 1])

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.stack([x.norm(dim=-1), _angle(x)], -1)

    def _jacobian(self, s: Tensor) -> Tensor:
        radius, angle = s.unbind(-1)
        along = _direction(angle)
        return torch.stack([along, radius.unsqueeze(-1) * _turned(along)], -1)


def _check_rotation(rotation: Tensor, dim: int) -> None:
    eye = torch.eye(dim, dtype=rotation.dtype, device=rotation.device)
    tolerance = 100 * dim * torch.finfo(rotation.dtype).eps
    if rotation.shape != eye.shape or float((rotation.mT @ rotation - eye).abs().max()) > tolerance:
        raise ValueError(f"expected an orthogonal matrix {tuple(eye.shape)}, got {rotation.tolist()}")


def _inverted(points: Tensor) -> Tensor:
    return points / points.square().sum(-1, keepdim=True)


def _direction(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


def _angle(x: Tensor) -> Tensor:
    return torch.atan2(x[..., 1], x[..., 0])


def _turned(x: Tensor) -> Tensor:
    """By a right angle: multiplication by i."""
    return torch.stack([-x[..., 1], x[..., 0]], -1)


def _multiplication(x: Tensor) -> Tensor:
    """The matrix by which a complex number (..., 2) multiplies: (..., 2, 2)."""
    return torch.stack([x, _turned(x)], -1)


def _complex_power(x: Tensor, power: float) -> Tensor:
    return x.norm(dim=-1, keepdim=True) ** power * _direction(power * _angle(x))
