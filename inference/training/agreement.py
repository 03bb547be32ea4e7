"""Agreement of a captured step with the pair's own: to the bit, or within rounding where it is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inference.core.display import first_line
from inference.numerics.graphs import same_bits

Tensors = Sequence[Tensor | None]
Agree = Callable[[Tensors, Tensors], bool]

# How many times the rounding of all tensors together one of them may be off where it is compiled.
_CANCELLED = 100


class Stale(Exception):
    """A captured step that is not what the pair does now."""


class Rounded(Stale):
    """A captured step that differs by rounding alone."""


# Comparisons until a difference by rounding alone counts: kernels of several threads may not repeat their own bits.
_TRIES = 3


def compared(compare: Callable[[], None]) -> None:
    """Compare a graph with the pair itself, anew where they differ by rounding alone.

    A graph that rounds otherwise than the pair does so each time; kernels that do not repeat their own bits do not.

    Raises:
        Stale: If no comparison shows agreement.
    """
    for i in range(_TRIES):
        try:
            return compare()
        except Rounded:
            if i == _TRIES - 1:
                raise


def check_agreement(agree: Agree, parts: Sequence[tuple[str, Tensors, Tensors]]) -> None:
    """Compare what a graph gives with what the pair's own Python gave, part by part.

    Args:
        agree: :func:`all_same` or :func:`all_close`.
        parts: Name, what the graph gives, and the pair's own.

    Raises:
        Stale: Which part differs.
        Rounded: Which does by rounding alone.
    """
    for name, one, other in parts:
        if not agree(one, other):
            if all_close(one, other):
                raise Rounded(f"its {name} is another on the same noise, by rounding alone")
            raise Stale(f"its {name} is another on the same noise")


def all_same(some: Tensors, others: Tensors) -> bool:
    """Whether tensors have the same bits, NaN included."""
    return all(map(_same, some, others))


def all_close(some: Tensors, others: Tensors, *, loss: float = 0.0) -> bool:
    """Whether tensors agree to half of their digits in the mean square, but for rounding of what they were summed of.

    A small gradient may be the sum of large terms that cancel: they are taken to be as large as all the gradients
    together. Those of a noise variance near its optimum are as large as those of the loss, which may be larger still.
    What is not finite is so in both.

    Args:
        some: Tensors.
        others: As many.
        loss: Magnitude of the loss whose gradients they are.
    """
    whole = math.hypot(*(float(_finite(other).norm()) for other in others if _is_float(other)))

    def close(one: Tensor | None, other: Tensor | None) -> bool:
        if one is None or other is None or not other.is_floating_point():
            return _same(one, other)
        if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
            return False
        eps, other = torch.finfo(other.dtype).eps, _finite(other)
        allowed = eps**0.5 * float(other.norm()) + eps * max(_CANCELLED * whole, loss)
        return float((_finite(one) - other).norm()) <= allowed

    return all(map(close, some, others))


def reason_of(error: BaseException) -> str:
    """What speaks against a graph, shortly."""
    return first_line(error, named=not isinstance(error, Stale))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else same_bits(one, other)


def _is_float(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _finite(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.where(tensor.isfinite(), 0)
