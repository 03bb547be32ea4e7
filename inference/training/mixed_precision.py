"""Mixed precision of training: the layers of networks in bfloat16, all else in the pair's float32."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Precision = Literal["full", "bfloat16"]

# What layers of networks call. Matrix products of a density's own formulas are none of these.
_LAYERS = {torch.nn.functional.linear, torch.nn.functional.bilinear}
_LAYERS |= {getattr(torch, f"conv{dim}d") for dim in (1, 2, 3)}
_LAYERS |= {getattr(torch, f"conv_transpose{dim}d") for dim in (1, 2, 3)}


def check_precision(precision: Any) -> None:
    """Refuse what is no precision.

    Raises:
        ValueError: With those that there are.
    """
    if precision not in get_args(Precision):
        known = " or ".join(map(repr, get_args(Precision)))
        raise ValueError(f"expected precision as {known}, got {precision!r}")


def check_dtypes(precision: Precision, parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that a precision is none for.

    Raises:
        ValueError: With their dtypes.
    """
    others = {str(p.dtype) for p in parameters if p.is_floating_point()} - {"torch.float32"}
    if precision == "bfloat16" and others:
        raise ValueError(f"expected parameters in float32 for precision='bfloat16', got {', '.join(sorted(others))}")


def in_precision(precision: Precision) -> AbstractContextManager[Any]:
    """A context in which layers compute in a precision; their parameters and results stay float32."""
    return nullcontext() if precision == "full" else _LayersInBfloat16()


class _LayersInBfloat16(TorchFunctionMode):
    """Layers take bfloat16 and give float32: draws and densities, which cancel, never see the lower precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _LAYERS:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_lowered, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return result.float() if result.dtype == torch.bfloat16 else result


def _lowered(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
