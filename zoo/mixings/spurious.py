r"""Spurious solutions: maps from other independent sources to the same distribution of the data.

.. math:: s \sim p, \; x = f(s) \quad \text{and} \quad s' \sim p', \; x = f'(s'), \quad s, s' \text{ independent within}

That they exist is why nonlinear independent component analysis needs a further principle; their IMA contrast is
generally positive where that of f is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.numerics.jacobian import decoder_jacobian, directional_derivative
from zoo.mixings.base import Composition, Inverted, LinearMixing, Mixing, describe, from_description

_BOUND = 9.0  # the standard normal distribution beyond has mass 2e-19
_NODES = 400
_STEPS = 60


def rotated_gaussian(rotation: Tensor, from_normal: Mixing | None = None) -> Mixing:
    r"""Measure-preserving automorphism: sources are mapped to Gaussians, rotated, and mapped back.

    .. math:: a = h \circ R \circ h^{-1}, \qquad s \sim p \implies a(s) \sim p

    with h from standard normal coordinates to p. The spurious solution of a mixing f is Composition([a, f]).

    References:
        Hyvärinen, Pajunen, "Nonlinear independent component analysis: existence and uniqueness results", 1999,
        doi:10.1016/S0893-6080(98)00140-3. Gresele et al., "Independent mechanism analysis, a new concept?", 2021,
        arXiv 2106.05200.

    Args:
        rotation: R, (K, K), orthogonal.
        from_normal: h, :class:`zoo.NormalToUniform` or :class:`zoo.NormalToLaplace`; None for standard normal sources.

    Raises:
        ValueError: If R is not orthogonal.
    """
    eye = torch.eye(len(rotation), dtype=torch.float64)
    if not torch.allclose(rotation.double() @ rotation.double().T, eye, rtol=0, atol=1e-10):
        raise ValueError(f"expected an orthogonal matrix (K, K), got {rotation.tolist()}")
    turn = LinearMixing(rotation)
    return turn if from_normal is None else Composition([Inverted(from_normal), turn, from_normal])


def gaussian_darmois(mixing: LinearMixing) -> LinearMixing:
    r"""Darmois construction of a linear mixing of standard normal sources: the Cholesky factor of its covariance.

    .. math:: f'(s') = L s' + b, \quad L L^\top = A A^\top

    The coordinates of L^-1 (x - b) are, up to the normal distribution function, those of Darmois: each the
    conditional distribution function of x_i given those before it.

    References:
        Gresele et al., 2021, arXiv 2106.05200.

    Args:
        mixing: A and b, with K = D.

    Raises:
        ValueError: If not K = D.
    """
    if mixing.latent_dim != mixing.data_dim:
        raise ValueError(f"expected a mixing with K = D, got K = {mixing.latent_dim}, D = {mixing.data_dim}")
    return LinearMixing(torch.linalg.cholesky(mixing.matrix @ mixing.matrix.T), mixing.shift)


class Darmois(Mixing):
    r"""Darmois construction, beginning with x_2, for an increasing lower triangular mixing of two standard normals.

    .. math:: \Phi(s'_1) = P(X_2 \le x_2), \qquad \Phi(s'_2) = P(X_1 \le x_1 \mid X_2 = x_2)

    Begun with x_1 it would give the true sources. The distribution functions are integrals over s_1 by Gauss-Legendre
    quadrature; the map from s' to x inverts them by Newton's method.

    .. math:: P(X_2 \le x_2) = \int \varphi(t) \Phi(s_2(x_2; t)) dt, \quad
        p(x_1, x_2) dx_1 = \varphi(t) \varphi(s_2(x_2; t)) |\partial s_2 / \partial x_2| dt, \; t = s_1(x_1)

    Warning:
        Precise to about 1e-10 for a mixing as smooth as leaky ReLUs of slope .2 make it.

    References:
        Hyvärinen, Pajunen, 1999, doi:10.1016/S0893-6080(98)00140-3. Gresele et al., 2021, arXiv 2106.05200.

    Args:
        triangular: The mixing, such as :func:`zoo.triangular_mlp`, or its description; K = D = 2.

    Raises:
        ValueError: If it is not lower triangular and increasing at the origin, or not of dimension two.
    """

    nodes: Tensor
    weights: Tensor

    def __init__(self, triangular: Mixing | dict[str, Any]) -> None:
        super().__init__(2, 2)
        built = triangular if isinstance(triangular, Mixing) else from_description(triangular)
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(_NODES))
        self.register_buffer("nodes", nodes, persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        if built.data_dim != 2 or built.latent_dim != 2:
            raise ValueError(f"expected a mixing with K = D = 2, got K = {built.latent_dim}, D = {built.data_dim}")
        at_zero = built.jacobian(nodes.new_zeros(2))
        if at_zero[0, 1] != 0 or at_zero[0, 0] <= 0 or at_zero[1, 1] <= 0:
            raise ValueError(f"expected a lower triangular increasing mixing, got the Jacobian {at_zero.tolist()}")
        self.triangular = built

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"triangular": describe(self.triangular)}

    def _inverse(self, x: Tensor) -> Tensor:
        first = self.triangular.inverse(torch.stack([x[..., 0], torch.zeros_like(x[..., 0])], -1))[..., 0]
        return torch.stack([self._marginal(x[..., 1]), self._conditional(first, x[..., 1])], -1)

    def _forward(self, s: Tensor) -> Tensor:
        corners = self.nodes.new_tensor([-1.0, 1.0]) * (_BOUND + 1)
        low, high = (self._second(*ends) for ends in ((corners[:1], "amin"), (corners[1:], "amax")))
        x2 = _root(self._marginal, s[..., 0], low, high)
        first = _root(lambda t: self._conditional(t, x2), s[..., 1], corners[0], corners[1])
        x1 = self.triangular(torch.stack([first, torch.zeros_like(first)], -1))[..., 0]
        return torch.stack([x1, x2], -1)

    def _jacobian(self, s: Tensor) -> Tensor:
        return torch.linalg.inv(decoder_jacobian(self.inverse, self._forward(s)))

    def _second(self, second: Tensor, extreme: str) -> Tensor:
        """The least or greatest x_2 for a value of s_2, over the nodes of s_1."""
        t = _BOUND * self.nodes
        return getattr(self.triangular(torch.stack([t, second.expand_as(t)], -1))[..., 1], extreme)()

    def _given(self, t: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """s_2 and its derivative by x_2 where s_1 = t and the second coordinate of the data is x_2, both (..., T)."""
        x1 = self.triangular(torch.stack([t, torch.zeros_like(t)], -1))[..., 0]
        s = self.triangular.inverse(torch.stack([x1, x2.unsqueeze(-1).expand_as(x1)], -1))
        return s[..., 1], self.triangular.jacobian(torch.stack([t, s[..., 1]], -1))[..., 1, 1].reciprocal()

    def _marginal(self, x2: Tensor) -> Tensor:
        t = (_BOUND * self.nodes).expand(*x2.shape, _NODES)
        second, _ = self._given(t, x2)
        mass = self.weights * _density(t)
        return _to_normal(*((mass * torch.special.ndtr(sign * second)).sum(-1) for sign in (1, -1)))

    def _conditional(self, first: Tensor, x2: Tensor) -> Tensor:
        below = self._mass(-_BOUND * torch.ones_like(first), first, x2)
        return _to_normal(below, self._mass(first, _BOUND * torch.ones_like(first), x2))

    def _mass(self, low: Tensor, high: Tensor, x2: Tensor) -> Tensor:
        """Density of x_2 together with low < s_1 < high."""
        half = 0.5 * (high - low).unsqueeze(-1)
        t = low.unsqueeze(-1) + half * (1 + self.nodes)
        second, slope = self._given(t, x2)
        return (self.weights * half * _density(t) * _density(second) * slope).sum(-1)


def _root(increasing: Callable[[Tensor], Tensor], target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Newton's method that halves the bracket where a step would leave it."""
    low, high = low.expand_as(target), high.expand_as(target)
    point = 0.5 * (low + high)
    for _ in range(_STEPS):
        value, slope = directional_derivative(increasing, point, torch.ones_like(point))
        below = value < target
        low, high = torch.where(below, point, low), torch.where(below, high, point)
        newton = point - (value - target) / slope
        before, point = point, torch.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
        if bool(((point - before).abs() <= 1e-13 * (1 + point.abs())).all()):
            break
    return point


def _to_normal(below: Tensor, above: Tensor) -> Tensor:
    """The normal quantile of below / (below + above), from the smaller of the two."""
    quantile = torch.special.ndtri(torch.minimum(below, above) / (below + above))
    return torch.where(below < above, quantile, -quantile)


def _density(s: Tensor) -> Tensor:
    return (-0.5 * s.square()).exp() / math.sqrt(2 * math.pi)
