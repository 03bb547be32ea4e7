r"""Ground-truth mixings: maps f from independent sources to data whose inverse and Jacobian are known exactly.

.. math:: x = f(s), \quad s = g(x), \quad J = \partial f / \partial s

Here are their base class and what builds maps from maps; further ones stand in :mod:`zoo.mixings.elementwise` and
:mod:`zoo.mixings.conformal`, and functions that draw them at random in :mod:`zoo.mixings.random_maps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from inference.core.checks import check_count
from inference.numerics.jacobian import log_volume

_CLASSES: dict[str, type[Mixing]] = {}


class Mixing(nn.Module):
    """Base of the maps from sources (..., K) to data (..., D), K <= D; numbers are buffers in float64.

    A subclass gives ``_forward``, ``_inverse`` and ``_jacobian``, and its constructor's arguments by ``config``.

    Args:
        latent_dim: K.
        data_dim: D.

    Raises:
        ValueError: If not 1 <= K <= D.
    """

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__()
        check_count(latent_dim, "latent_dim")
        check_count(data_dim, "data_dim", latent_dim)
        self.latent_dim, self.data_dim = latent_dim, data_dim

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    def forward(self, s: Tensor) -> Tensor:
        """Data f(s), (..., D), of sources (..., K)."""
        return self._forward(_checked(s, self.latent_dim, "sources"))

    def inverse(self, x: Tensor) -> Tensor:
        """Sources g(x), (..., K), of data (..., D); for K < D those of the nearest point where the class states it."""
        return self._inverse(_checked(x, self.data_dim, "data"))

    def jacobian(self, s: Tensor) -> Tensor:
        """Jacobian of f at sources (..., K): (..., D, K)."""
        return self._jacobian(_checked(s, self.latent_dim, "sources"))

    def log_abs_det(self, s: Tensor) -> Tensor:
        r"""Logarithm of the change of volume at sources (..., K), :math:`\tfrac12 \log\det J^\top J`: (...)."""
        return log_volume(self.jacobian(s))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: tensors, numbers and, by :func:`describe`, maps."""
        raise NotImplementedError

    def _forward(self, s: Tensor) -> Tensor:
        raise NotImplementedError

    def _inverse(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _jacobian(self, s: Tensor) -> Tensor:
        raise NotImplementedError

    def _keep(self, **values: Any) -> None:
        """Register numbers as buffers, see :func:`as_numbers`."""
        for name, value in values.items():
            tensor = as_numbers(value)
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"expected {name} to be finite, got {value}")
            self.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))


def as_numbers(values: Any) -> Tensor:
    """Numbers as a tensor, in float64 unless they are a tensor of a floating dtype."""
    if isinstance(values, Tensor) and values.is_floating_point():
        return values
    return torch.as_tensor(values, dtype=torch.float64)


def describe(mixing: Mixing) -> dict[str, Any]:
    """A map as nested dicts and lists of tensors and JSON values, exactly: what :func:`from_description` reads."""
    return {"class": type(mixing).__name__, "config": mixing.config()}


def from_description(description: dict[str, Any]) -> Mixing:
    """Build a map again.

    Args:
        description: From :func:`describe`.

    Raises:
        ValueError: If there is no such class.

    Example:
        >>> shear = LinearMixing([[1.0, 2.0], [0.0, 1.0]])
        >>> from_description(describe(shear)).matrix
        tensor([[1., 2.],
                [0., 1.]], dtype=torch.float64)
    """
    name = description["class"]
    if name not in _CLASSES:
        raise ValueError(f"expected one of the mixings {sorted(_CLASSES)}, got {name!r}: is its module imported?")
    return _CLASSES[name](**description["config"])


class LinearMixing(Mixing):
    r"""A linear map and a shift.

    .. math:: f(s) = A s + b

    For K < D the inverse is that of the nearest point of the range.

    Args:
        matrix: A, (D, K), of rank K.
        shift: b, (D,); zero by default.

    Raises:
        ValueError: If the shapes do not fit or A has not rank K.
    """

    matrix: Tensor
    shift: Tensor

    def __init__(self, matrix: Tensor | Sequence[Sequence[float]], shift: Tensor | Sequence[float] | None = None):
        matrix = as_numbers(matrix)
        if matrix.dim() != 2 or matrix.shape[0] < matrix.shape[1]:
            raise ValueError(f"expected a matrix (D, K) with D >= K, got {tuple(matrix.shape)}")
        super().__init__(matrix.shape[1], matrix.shape[0])
        self._keep(matrix=matrix, shift=torch.zeros_like(matrix[:, 0]) if shift is None else shift)
        if self.shift.shape != (self.data_dim,):
            raise ValueError(f"expected a shift ({self.data_dim},), got {tuple(self.shift.shape)}")
        if torch.linalg.matrix_rank(self.matrix) < self.latent_dim:
            raise ValueError(f"expected a matrix of rank {self.latent_dim}, got {self.matrix.tolist()}")

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"matrix": self.matrix, "shift": self.shift}

    def _forward(self, s: Tensor) -> Tensor:
        return s @ self.matrix.T + self.shift

    def _inverse(self, x: Tensor) -> Tensor:
        q, r = torch.linalg.qr(self.matrix)
        return torch.linalg.solve_triangular(r, ((x - self.shift) @ q).unsqueeze(-1), upper=True).squeeze(-1)

    def _jacobian(self, s: Tensor) -> Tensor:
        return self.matrix.expand(*s.shape[:-1], self.data_dim, self.latent_dim)


class Composition(Mixing):
    r"""Composition of maps, the first applied first.

    .. math:: f = f_L \circ \dots \circ f_1, \qquad J = J_L \cdots J_1

    Args:
        maps: Mixings, or descriptions of such.

    Raises:
        ValueError: If there is none, or one's D is not the next one's K.
    """

    def __init__(self, maps: Sequence[Mixing | dict[str, Any]]) -> None:
        built = [m if isinstance(m, Mixing) else from_description(m) for m in maps]
        if not built:
            raise ValueError("expected at least one map to compose, got none")
        for a, b in pairwise(built):
            if a.data_dim != b.latent_dim:
                raise ValueError(f"expected a map from dimension {a.data_dim} next, got one from {b.latent_dim}")
        super().__init__(built[0].latent_dim, built[-1].data_dim)
        self.maps = nn.ModuleList(built)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"maps": [describe(m) for m in self._parts]}

    @property
    def _parts(self) -> list[Mixing]:
        return [m for m in self.maps if isinstance(m, Mixing)]

    def _forward(self, s: Tensor) -> Tensor:
        for m in self._parts:
            s = m(s)
        return s

    def _inverse(self, x: Tensor) -> Tensor:
        for m in reversed(self._parts):
            x = m.inverse(x)
        return x

    def _jacobian(self, s: Tensor) -> Tensor:
        first, *others = self._parts
        total = first.jacobian(s)
        for m, before in zip(others, self._parts):
            s = before(s)
            total = m.jacobian(s) @ total
        return total


class Inverted(Mixing):
    r"""The inverse of a map with K = D.

    .. math:: f(s) = h^{-1}(s), \qquad J_f(s) = J_h(f(s))^{-1}

    Args:
        original: h, or its description.

    Raises:
        ValueError: If h has not K = D.
    """

    def __init__(self, original: Mixing | dict[str, Any]) -> None:
        built = original if isinstance(original, Mixing) else from_description(original)
        if built.latent_dim != built.data_dim:
            raise ValueError(f"expected a map with K = D, got K = {built.latent_dim}, D = {built.data_dim}")
        super().__init__(built.latent_dim, built.latent_dim)
        self.original = built

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"original": describe(self.original)}

    def _forward(self, s: Tensor) -> Tensor:
        return self.original.inverse(s)

    def _inverse(self, x: Tensor) -> Tensor:
        return self.original(x)

    def _jacobian(self, s: Tensor) -> Tensor:
        return torch.linalg.inv(self.original.jacobian(self.original.inverse(s)))


def _checked(points: Tensor, dim: int, name: str) -> Tensor:
    if points.dim() == 0 or points.shape[-1] != dim:
        raise ValueError(f"expected {name} of shape (..., {dim}), got {tuple(points.shape)}")
    return points
