r"""Independent mechanism analysis (IMA): contrasts of the columns of a decoder's Jacobian.

.. math:: J = \partial f / \partial z \in R^{D \times K}, \qquad G = J^\top J

They are computed in float64 and in blocks of points, of bounded memory; see :mod:`inference.numerics.jacobian`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from inference.core.deprecation import renamed_keywords
from inference.numerics.jacobian import Decode, check_tall, column_norms, decoder_jacobian, flat_points, iter_jacobians


def column_contrast(jacobian: Tensor) -> Tensor:
    r"""Independent mechanism analysis (IMA) contrast of given Jacobians, in nats: zero iff columns are orthogonal.

    .. math:: c = \sum_k \log \|J_{:k}\| - \tfrac12 \log\det G = \tfrac12 [\log\det\operatorname{diag} G - \log\det G]

    It is KL(N(0, G) || N(0, diag G)): not negative, and the same under orthogonal maps from the left and permutation
    and scaling of columns; not under scaling of single outputs.

    Warning:
        Precise to about 1e-16 times the condition number of the columns scaled to unit length. Columns that are
        dependent within rounding give infinity; a column of zeros has no direction and gives NaN.

    References:
        Gresele, von Kügelgen, Stimper, Schölkopf, Besserve, "Independent mechanism analysis, a new concept?", 2021,
        arXiv 2106.05200.

    Args:
        jacobian: (..., D, K) with D >= K.

    Returns:
        (...), float64, differentiable.

    Raises:
        ValueError: If D < K.

    Example:
        >>> column_contrast(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))  # half the logarithm of two
        tensor(0.3466, dtype=torch.float64)
    """
    check_tall(jacobian)
    jacobian = jacobian.double()
    return _log_correlation(jacobian / column_norms(jacobian).unsqueeze(-2))


def conformal_contrast(jacobian: Tensor) -> Tensor:
    r"""Conformal contrast of Jacobians, in nats: zero iff J'J is a multiple of the identity, as for a conformal map.

    .. math:: \tfrac12 [K \log(\operatorname{tr} G / K) - \log\det G] = \min_\lambda KL(N(0, G) \| N(0, \lambda I))

    It is the IMA contrast plus what unequal lengths of the columns add, one half of K log mean G_kk - sum log G_kk.

    References:
        Mauchly, "Significance test for sphericity of a normal n-variate distribution", 1940 (the statistic).
        Buchholz, Besserve, Schölkopf, "Function classes for identifiable nonlinear independent component analysis",
        2022, arXiv 2208.06406 (conformal maps are identifiable).

    Args:
        jacobian: (..., D, K) with D >= K.

    Returns:
        (...), float64, differentiable.

    Raises:
        ValueError: If D < K.

    Example:
        >>> conformal_contrast(3 * torch.eye(2))
        tensor(0., dtype=torch.float64)
    """
    squares = column_norms(jacobian.double()).square()
    unequal = squares.shape[-1] * squares.mean(-1).log() - squares.log().sum(-1)
    return column_contrast(jacobian) + 0.5 * unequal


@renamed_keywords(chunk="block")
def local_ima_contrast(decode: Decode, z: Tensor, *, block: int | None = None) -> Tensor:
    r"""IMA contrast of a decoder at each point, in nats; see :func:`column_contrast`.

    A module, or a method of one, is differentiated in a float64 copy; any other callable in the dtype of ``z``.

    Args:
        decode: See :func:`decoder_jacobian`.
        z: Points, (..., K).
        block: See :func:`decoder_jacobian`.

    Returns:
        (...), float64. Memory beyond that does not grow with the number of points.

    Raises:
        TypeError: See :func:`decoder_jacobian`.
        ValueError: See :func:`decoder_jacobian`, and if D < K.

    Example:
        >>> shear = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> local_ima_contrast(lambda z: z @ shear.T, torch.zeros(2, 2))
        tensor([0.8047, 0.8047], dtype=torch.float64)
    """
    return _locally(column_contrast, decode, z, block)


@renamed_keywords(chunk="block")
def ima_contrast(decode: Decode, z: Tensor, *, block: int | None = None) -> Tensor:
    r"""Independent mechanism analysis (IMA) contrast: the mean over points of the local contrasts, in nats.

    .. math:: C = E_{p(z)}[c(f, z)]

    Warning:
        Not the contrast of the mean Jacobian, which is smaller.

    Args:
        decode: See :func:`local_ima_contrast`.
        z: Points drawn from p(z), (..., K).
        block: See :func:`decoder_jacobian`.

    Returns:
        (), float64.

    Raises:
        TypeError: See :func:`decoder_jacobian`.
        ValueError: See :func:`local_ima_contrast`.
    """
    return local_ima_contrast(decode, z, block=block).mean()


@renamed_keywords(chunk="block")
def local_ima_contrast_of_inverse(unmix: Decode, x: Tensor, *, block: int | None = None) -> Tensor:
    r"""IMA contrast at each point from the inverse of the decoder, in nats.

    .. math:: c = \tfrac12 [\log\det\operatorname{diag} H^{-1} + \log\det H], \quad H = J_g J_g^\top, \; g = f^{-1}

    Warning:
        For K < D the inverse does not determine the decoder. The value is the decoder's where g maps to the nearest
        point of its range, and x is in the range: there J_g is the pseudo-inverse of J_f.

    Args:
        unmix: g, from (M, D) to (M, K).
        x: Points, (..., D).
        block: See :func:`decoder_jacobian`.

    Returns:
        (...), float64.

    Raises:
        TypeError: See :func:`decoder_jacobian`.
        ValueError: See :func:`decoder_jacobian`, and if K > D.

    Example:
        >>> shear = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> local_ima_contrast_of_inverse(lambda x: x @ shear.inverse().T, torch.zeros(1, 2))
        tensor([0.8047], dtype=torch.float64)
    """
    return _locally(_row_contrast, unmix, x, block)


@renamed_keywords(chunk="block")
def ima_contrast_of_inverse(unmix: Decode, x: Tensor, *, block: int | None = None) -> Tensor:
    """Global IMA contrast from the inverse of the decoder: mean of :func:`local_ima_contrast_of_inverse`, float64."""
    return local_ima_contrast_of_inverse(unmix, x, block=block).mean()


def ima_penalty(decode: Decode, z: Tensor) -> Tensor:
    r"""IMA penalty: the mean IMA contrast as a term of a loss, in nats, differentiable in decoder and z.

    .. math:: L = -\operatorname{ELBO} + \lambda \, \operatorname{mean}_n c(f, z_n)

    Args:
        decode: See :func:`decoder_jacobian`.
        z: Points of the batch, (..., K), for example posterior samples; a part of the batch makes it cheaper.

    Returns:
        (), in the decoder's dtype.

    References:
        Gresele et al., 2021, arXiv 2106.05200, which regularises the likelihood of a flow by it.

    Raises:
        TypeError: See :func:`decoder_jacobian`.
        ValueError: See :func:`local_ima_contrast`.

    Example:
        >>> decoder = torch.nn.Linear(2, 5)
        >>> ima_penalty(decoder, torch.zeros(3, 2)).backward()
        >>> decoder.weight.grad.shape
        torch.Size([5, 2])
    """
    jacobian = decoder_jacobian(decode, z)
    return column_contrast(jacobian).mean().to(jacobian.dtype)


def _locally(contrast: Callable[[Tensor], Tensor], decode: Decode, z: Tensor, block: int | None) -> Tensor:
    decode, points = _in_float64(decode, flat_points(z))
    values = torch.empty(len(points), dtype=torch.float64, device=points.device)  # now: pieces would split up the heap
    done = 0
    with torch.no_grad():
        for jacobians in iter_jacobians(decode, points, block):
            values[done : done + len(jacobians)] = contrast(jacobians)
            done += len(jacobians)
    return values.reshape(z.shape[:-1])


def _row_contrast(jacobian: Tensor) -> Tensor:
    """The contrast of the pseudo-inverse of (B, K, D)."""
    rows = jacobian.double().mT
    check_tall(rows)
    unit = rows / column_norms(rows).unsqueeze(-2)
    factor, dependent = _triangle(unit)
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)
    value = inverse.norm(dim=-1).log().sum(-1) + factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return torch.where(dependent, math.inf, value)


def _log_correlation(unit: Tensor) -> Tensor:
    """Minus half the log-determinant of the Gram matrix of unit columns."""
    factor, dependent = _triangle(unit)
    value = -factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return torch.where(unit.isnan().any(-1).any(-1), math.nan, torch.where(dependent, math.inf, value))


def _triangle(unit: Tensor) -> tuple[Tensor, Tensor]:
    """R of unit columns Q R, upper triangular, and whether the columns are dependent within rounding.

    By an orthogonal factorisation: the Gram matrix would have the square of their condition number.
    """
    factor = torch.linalg.qr(unit).R
    smallest = factor.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    return factor, smallest <= unit.shape[-2] * torch.finfo(unit.dtype).eps


def _in_float64(decode: Any, points: Tensor) -> tuple[Decode, Tensor]:
    """Decoder and points in float64 where the decoder is a module or a method of one, else as they are."""
    module = decode.__self__ if isinstance(decode, MethodType) else decode
    if not isinstance(module, nn.Module):
        return decode, points
    if any(t.is_floating_point() and t.dtype != torch.float64 for t in [*module.parameters(), *module.buffers()]):
        module = copy.deepcopy(module).double()
    return (MethodType(decode.__func__, module) if isinstance(decode, MethodType) else module), points.double()
