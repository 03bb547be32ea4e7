"""How much is computed side by side: one limit for the whole library, which a user with a small device lowers.

Every place that works in blocks states its block at the default limit; :func:`at_once` scales it. What the blocks give
is :func:`joined`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

T = TypeVar("T")

_DEFAULT = 64.0  # megabytes: the block of importance weights on a GPU, 2**23 numbers in float64

_limit: ContextVar[float] = ContextVar("memory_limit", default=_DEFAULT)

# Freed blocks of megabytes go back to the system, which hands them out again page by page: a third of the time of
# importance weights. glibc keeps up to twice as much as the largest block that it has once got by itself and given
# back; 32 MB is the largest that counts. This one is never written to, so that it costs nothing.
torch.empty(2**25 - 2**14, dtype=torch.uint8, device="cpu")


def at_once(count: int, each: int = 1) -> int:
    """How many items are computed side by side under the present limit, at least one.

    Args:
        count: Elements or rows of one block at the default limit.
        each: Elements of an item.
    """
    return max(1, int(count * _limit.get() / _DEFAULT) // each)


def joined(parts: Iterable[T], number: int | None, dim: int = 0) -> T:
    """Results of blocks of rows as that of all rows, in tensors that are made once.

    Parts that are kept as they are lie between the large tensors that each block makes and frees, so that the process
    cannot use that memory again: it would grow by some megabytes a block.

    Args:
        parts: Tensors, or trees of them, with the rows in one dimension; None among them stays None.
        number: Rows of all blocks; None where there is one block.
        dim: The dimension of the rows.

    Raises:
        ValueError: If the blocks have not so many rows.
    """
    whole, form, start = list[Tensor | None](), None, 0
    for part in parts:
        leaves, form = tree_flatten(part)
        size = next(leaf.shape[dim] for leaf in leaves if leaf is not None)
        if number is None or number == size:
            return part
        whole = whole or [_made_for(leaf, number, dim) for leaf in leaves]
        for column, leaf in zip(whole, leaves, strict=True):
            if column is not None:
                column.narrow(dim, start, size).copy_(leaf)
        start += size
    if form is None or start != number:
        raise ValueError(f"expected blocks of {number} rows, got {start}")
    found: T = tree_unflatten(whole, form)
    return found


def _made_for(leaf: Tensor | None, number: int, dim: int) -> Tensor | None:
    if leaf is None:
        return None
    shape = list(leaf.shape)
    shape[dim] = number
    return leaf.new_empty(shape)


def memory_limit(megabytes: float) -> AbstractContextManager[None]:
    """Limit the memory of what is computed side by side, in all functions of the three packages.

    The limit holds from now on in the present thread; as a context manager it holds for the block and then the one
    before is restored. It is the size of the largest block, of importance weights on a GPU; all others change in
    proportion. An explicit ``chunk`` or ``block`` of a function goes before it.

    Warning:
        No hard bound: a network's layers come on top. Smaller blocks draw the same random numbers in another order, so
        that results of one seed agree within their Monte Carlo error only.

    Args:
        megabytes: The limit; 64 by default.

    Raises:
        ValueError: If it is not positive and finite.

    Example:
        >>> import torch
        >>> from guides import MeanField
        >>> from inference import log_weights
        >>> from zoo import LinearVAE
        >>> with memory_limit(1):
        ...     log_weights(LinearVAE(5, 2), MeanField(5, 2), torch.zeros(3, 5), num_samples=4).shape
        torch.Size([4, 3])
    """
    from inference.core.checks import check_positive  # which reads data in blocks, by this module

    check_positive(megabytes, "number of megabytes")
    return _Restore(_limit.set(float(megabytes)))


class _Restore(AbstractContextManager[None]):
    """Restores the limit from before at the end of the block."""

    def __init__(self, token: Token[float]) -> None:
        self._token = token

    def __exit__(self, *exc: Any) -> None:
        _limit.reset(self._token)
