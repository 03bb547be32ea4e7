"""Sums of products in logarithms, a backend of ``opt_einsum`` that Pyro's contraction of factors goes through.

Pyro's own takes the exponential of each factor, scaled by its own maximum: factors that peak at different values then
multiply to zero where their product is 1e-400 of each.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from torch import Tensor

__all__ = ["ExactLogRing", "einsum", "tensordot", "transpose"]


class ExactLogRing(LogRing):
    """Pyro's ring of sums and products in logarithms, with sums of which no term is lost."""

    _backend = "inference.pair.log_einsum"


def transpose(a: Tensor, axes: Any) -> Tensor:
    """Axes of a tensor in another order."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Log of the sum over what the output lacks of the product of factors given in logarithms."""
    inputs, output = equation.split("->")
    names = inputs.split(",")
    summed = sorted(set("".join(names)) - set(output))
    order = [*output, *summed]
    total = sum(_aligned(operand, dims, order) for operand, dims in zip(operands, names, strict=True))
    assert isinstance(total, Tensor)
    return _log_sum(total.flatten(len(output))) if summed else total.clone()


def _aligned(operand: Tensor, dims: str, order: list[str]) -> Tensor:
    present = [dim for dim in order if dim in dims]
    operand = operand.permute([dims.index(dim) for dim in present])
    return operand[tuple(slice(None) if dim in dims else None for dim in order)]


def _log_sum(terms: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, with the gradient zero where every term is minus infinity."""
    least = torch.finfo(terms.dtype).min
    found = terms.clamp(min=least).logsumexp(-1)
    return torch.where(found > least / 2, found, -torch.inf)


tensordot = Tensordot(einsum)
