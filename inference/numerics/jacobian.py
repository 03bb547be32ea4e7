r"""The Jacobian of a decoder at many points, and the geometry of its columns.

.. math:: J = \partial f / \partial z \in R^{D \times K}
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count, check_finite
from inference.core.deprecation import renamed_keywords
from inference.core.memory import at_once

Decode = Callable[[Tensor], Tensor]
_BLOCK = 2**19  # elements of the Jacobians of one block: small enough for the processor's cache


@renamed_keywords(chunk="block")
def decoder_jacobian(decode: Decode, z: Tensor, *, block: int | None = None) -> Tensor:
    r"""Jacobian of a decoder at each point.

    .. math:: J_{ndk} = \partial f_d(z_n) / \partial z_{nk}

    Forward mode where K <= D, reverse mode otherwise: min(K, D) passes over all points side by side. Differentiable
    with respect to the decoder's parameters and z.

    Warning:
        The decoder must treat points independently; batch normalisation and dropout in train mode are refused.

    Args:
        decode: Decoder from (M, K) to (M, D), a module or any callable; an unmixing (M, D) to (M, K) as well.
        z: Points, (..., K).
        block: Points in one block; None chooses.

    Returns:
        (..., D, K), in the decoder's dtype.

    Raises:
        TypeError: If ``z`` is not a floating tensor.
        ValueError: If ``z`` is not finite, or the decoder does not return (M, D) or is batch-dependent.

    Example:
        >>> decoder_jacobian(torch.nn.Linear(2, 5), torch.zeros(7, 2)).shape
        torch.Size([7, 5, 2])
    """
    points = flat_points(z)
    blocks = list(iter_jacobians(decode, points, block))
    return torch.cat(blocks).reshape(*z.shape[:-1], *blocks[0].shape[1:])


def column_norms(jacobian: Tensor) -> Tensor:
    """Lengths of the columns of (..., D, K): (..., K)."""
    return jacobian.norm(dim=-2)


def column_angles(jacobian: Tensor) -> Tensor:
    """Angles between the columns of (..., D, K) in radians, from 0 to pi: (..., K, K) with zeros on the diagonal.

    By Kahan's formula, exact to rounding at small angles and near pi, where the arc cosine keeps half of the digits.
    """
    unit = jacobian / column_norms(jacobian).unsqueeze(-2)
    columns = unit.split(1, dim=-1)
    halves = [torch.atan2((unit - one).norm(dim=-2), (unit + one).norm(dim=-2)) for one in columns]
    return 2 * torch.stack(halves, -2)


def log_volume(jacobian: Tensor) -> Tensor:
    r"""Logarithm of the volume of the image of a unit cube under a Jacobian, in nats; log |det J| where it is square.

    .. math:: \tfrac12 \log\det J^\top J

    Args:
        jacobian: (..., D, K) with D >= K.

    Returns:
        (...).

    Raises:
        ValueError: If D < K.
    """
    check_tall(jacobian)
    if jacobian.shape[-2] == jacobian.shape[-1]:
        return torch.linalg.slogdet(jacobian).logabsdet
    return torch.linalg.qr(jacobian).R.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def directional_derivative(f: Decode, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Value of a function and its derivative along a direction of the shape of ``z``, by forward mode."""
    load_forward_mode()
    result = jvp(f, (z,), (direction,))
    return result[0], result[1]


@cache
def load_forward_mode() -> None:
    """Let torch load its forward-mode rules, which it does once per process and with a DeprecationWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def iter_jacobians(decode: Decode, points: Tensor, block: int | None) -> Iterator[Tensor]:
    """Jacobians of blocks of points (N, K), (B, D, K) each; see :func:`decoder_jacobian`."""
    with refuse_batch_dependence(decode):
        with torch.no_grad():
            output = decode(points[:1])
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"expected the decoder to map (1, {points.shape[1]}) to (1, D), got {got}")
        dims = (output.shape[1], points.shape[1])
        if block is None:
            block = at_once(_BLOCK, math.prod(dims))
        check_count(block, "block")
        jacobian = _by_columns if dims[1] <= dims[0] else _by_rows
        for rows in points.split(block):
            yield jacobian(decode, rows.clone())  # of a view, forward mode would enlarge the whole by K directions


def _by_columns(decode: Decode, z: Tensor) -> Tensor:
    """Forward mode: one direction for all points at a time."""
    directions = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return vmap(lambda e: directional_derivative(decode, z, e.expand_as(z))[1], out_dims=-1)(directions)


def _by_rows(decode: Decode, z: Tensor) -> Tensor:
    """Reverse mode: one output of all points at a time."""
    result = vjp(decode, z)
    output, pull = result[0], result[1]
    directions = torch.eye(output.shape[1], dtype=output.dtype, device=z.device)
    return vmap(lambda e: pull(e.expand_as(output))[0], out_dims=1)(directions)


def check_tall(jacobian: Tensor) -> None:
    """Raise ValueError unless a Jacobian has at least as many rows as columns."""
    if jacobian.dim() < 2 or jacobian.shape[-2] < jacobian.shape[-1]:
        raise ValueError(f"expected Jacobians of shape (..., D, K) with D >= K, got {tuple(jacobian.shape)}")


def flat_points(z: Tensor) -> Tensor:
    """Check points (..., K) and flatten them to (N, K)."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"expected points as a floating tensor (..., K), got {getattr(z, 'dtype', type(z).__name__)}")
    if z.dim() == 0 or 0 in z.shape:
        raise ValueError(f"expected at least one point of shape (..., K), got {tuple(z.shape)}")
    if not bool(torch.stack(z.detach().aminmax()).isfinite().all()):  # which takes no memory of the size of z
        check_finite(z.detach(), "the points")
    return z.reshape(-1, z.shape[-1])
