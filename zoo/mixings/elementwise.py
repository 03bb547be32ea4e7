r"""Elementwise mixings and affine coupling: a smooth leaky ReLU, and the maps from one marginal to another by CDFs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inference.core.checks import check_positive
from zoo.mixings.base import Mixing

_NEWTON_STEPS = 10  # they descend to the root quadratically; nine reach rounding error for a slope of .001
_LOG_2 = math.log(2.0)


class SmoothLeakyReLU(Mixing):
    r"""A smooth and increasing activation in each coordinate.

    .. math:: f(s) = a s + (1 - a) \log(1 + e^s)

    Its inverse has no closed form: Newton's method, which on a convex function descends to the root from its right.

    References:
        Reizinger et al., "Embrace the gap: VAEs perform independent mechanism analysis", 2022, arXiv 2206.02416.

    Args:
        dim: K = D.
        slope: a, from .001 to below 1.

    Raises:
        ValueError: If the slope is out of range.
    """

    def __init__(self, dim: int, slope: float = 0.2) -> None:
        super().__init__(dim, dim)
        if not 0.001 <= slope < 1:
            raise ValueError(f"expected a slope from .001 to below 1, got {slope}")
        self.slope = slope

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"dim": self.latent_dim, "slope": self.slope}

    def _forward(self, s: Tensor) -> Tensor:
        # Not torch's softplus: that is linear from 20 on, off by 2e-9.
        return self.slope * s + (1 - self.slope) * torch.logaddexp(s, torch.zeros_like(s))

    def _slopes(self, s: Tensor) -> Tensor:
        return self.slope + (1 - self.slope) * s.sigmoid()

    def _inverse(self, x: Tensor) -> Tensor:
        s = torch.where(x > 0, x, x / self.slope)  # the piecewise linear function lies below
        for _ in range(_NEWTON_STEPS):
            s = s - (self._forward(s) - x) / self._slopes(s)
        return s

    def _jacobian(self, s: Tensor) -> Tensor:
        return torch.diag_embed(self._slopes(s))


class AffineCoupling(Mixing):
    r"""An affine coupling layer: the first M coordinates pass, and a small network of them scales and shifts the rest.

    .. math:: x_1 = s_1, \quad x_2 = s_2 \odot e^{\tanh a(s_1)} + t(s_1), \quad (a, t) = W_2 \tanh(W_1 s_1 + b_1) + b_2

    References:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, arXiv 1605.08803.

    Args:
        w1: W_1, (H, M).
        b1: b_1, (H,).
        w2: W_2, (2 (K - M), H).
        b2: b_2, (2 (K - M),).

    Raises:
        ValueError: If the shapes do not fit.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
        shapes = [tuple(torch.as_tensor(t).shape) for t in (w1, b1, w2, b2)]
        if [len(s) for s in shapes] != [2, 1, 2, 1] or shapes[2] != shapes[3] + shapes[1] or shapes[0][:1] != shapes[1]:
            raise ValueError(f"expected shapes (H, M), (H,), (2 (K - M), H) and (2 (K - M),), got {shapes}")
        dim = shapes[0][1] + shapes[3][0] // 2
        super().__init__(dim, dim)
        self._keep(w1=w1, b1=b1, w2=w2, b2=b2)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"w1": self.w1, "b1": self.b1, "w2": self.w2, "b2": self.b2}

    def _network(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of the scales and the shifts, (..., K - M), and the hidden units, (..., H)."""
        hidden = (first @ self.w1.T + self.b1).tanh()
        log_scale, shift = (hidden @ self.w2.T + self.b2).chunk(2, -1)
        return log_scale.tanh(), shift, hidden

    def _split(self, points: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.w1.shape[1]
        return points[..., :kept], points[..., kept:]

    def _forward(self, s: Tensor) -> Tensor:
        first, second = self._split(s)
        log_scale, shift, _ = self._network(first)
        return torch.cat([first, second * log_scale.exp() + shift], -1)

    def _inverse(self, x: Tensor) -> Tensor:
        first, second = self._split(x)
        log_scale, shift, _ = self._network(first)
        return torch.cat([first, (second - shift) * (-log_scale).exp()], -1)

    def _jacobian(self, s: Tensor) -> Tensor:
        first, second = self._split(s)
        log_scale, _, hidden = self._network(first)
        network = self.w2 @ ((1 - hidden.square()).unsqueeze(-1) * self.w1)
        by_scale, by_shift = network.chunk(2, -2)
        factor = second * log_scale.exp() * (1 - log_scale.square())
        below = torch.cat([factor.unsqueeze(-1) * by_scale + by_shift, torch.diag_embed(log_scale.exp())], -1)
        above = torch.eye(self.w1.shape[1], self.latent_dim, dtype=s.dtype, device=s.device)
        return torch.cat([above.expand(*s.shape[:-1], *above.shape), below], -2)


class NormalToUniform(Mixing):
    r"""Standard normal coordinates to uniform ones, by the distribution function of the first.

    .. math:: f(s) = l + (h - l) \Phi(s)

    Args:
        dim: K = D.
        low: l.
        high: h.

    Raises:
        ValueError: If l is not below h.
    """

    def __init__(self, dim: int, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(dim, dim)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"expected finite bounds, low below high, got {low} and {high}")
        self.low, self.high = low, high

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"dim": self.latent_dim, "low": self.low, "high": self.high}

    def _forward(self, s: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * torch.special.ndtr(s)

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.special.ndtri((x - self.low) / (self.high - self.low))

    def _jacobian(self, s: Tensor) -> Tensor:
        return torch.diag_embed((self.high - self.low) * _normal_density(s))


class NormalToLaplace(Mixing):
    r"""Standard normal coordinates to Laplace ones.

    .. math:: f(s) = -\operatorname{sign}(s)\, b \log(2 \Phi(-|s|))

    Args:
        dim: K = D.
        scale: b, the mean absolute value of the result.

    Raises:
        ValueError: If b is not positive and finite.
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__(dim, dim)
        check_positive(scale, "scale")
        self.scale = scale

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"dim": self.latent_dim, "scale": self.scale}

    def _forward(self, s: Tensor) -> Tensor:
        return -s.sign() * self.scale * (_LOG_2 + torch.special.log_ndtr(-s.abs()))

    def _inverse(self, x: Tensor) -> Tensor:
        return -x.sign() * torch.special.ndtri(0.5 * (-x.abs() / self.scale).exp())

    def _jacobian(self, s: Tensor) -> Tensor:
        tail = torch.special.log_ndtr(-s.abs())
        return torch.diag_embed(self.scale * _normal_density(s) * (-tail).exp())


def _normal_density(s: Tensor) -> Tensor:
    return (-0.5 * s.square()).exp() / math.sqrt(2 * math.pi)
