"""Input checks at the public entry points: each message names what was expected and what came."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from inference.core.sources import blocks_of


@runtime_checkable
class ChecksData(Protocol):
    """A model or guide that can check data without running."""

    def check_data(self, x: Any) -> None:
        """Raise TypeError or ValueError unless ``x`` are data that this program takes."""
        ...


def check_layout(
    x: Any, *, data_dim: int | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> None:
    """Check the properties of data that need no reading of values: type, dtype, shape and device.

    Args:
        x: Data, expected to be a floating tensor (N, D).
        data_dim: D where it is known.
        dtype: The dtype to be met, None for any floating one.
        device: The device to be met, None for any.

    Raises:
        TypeError: If ``x`` is not a tensor or not floating, or not of ``dtype``.
        ValueError: If shape or device differ.
    """
    shape = f"(N, {'D' if data_dim is None else data_dim})"
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x to be a torch.Tensor of shape {shape}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"expected x of a floating dtype, got {x.dtype}: convert it, say by x.double()")
    if x.dim() != 2 or (data_dim is not None and x.shape[1] != data_dim):
        raise ValueError(f"expected x of shape {shape}, got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"expected at least one data point, got x of shape {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        one = str(dtype).removeprefix("torch.")
        raise TypeError(
            f"expected x of dtype {dtype}, the parameters', got {x.dtype}: convert the data, as by x.to(torch.{one}), "
            "or both halves of the pair, as by model.double()"
        )
    if device is not None and x.device != device:
        raise ValueError(f"expected x on device {device}, where the parameters are, got {x.device}")


def check_finite(x: Tensor, name: str = "x", *, missing: bool = False) -> None:
    """Refuse NaN and infinity.

    Args:
        x: Any tensor.
        name: What to call it.
        missing: Let NaN pass.

    Raises:
        ValueError: With the number of such elements and the place of the first.
    """
    if id(x) in _seen.get() or _all_finite(x.detach(), missing):
        return
    finite = torch.isfinite(x) | (x.isnan() if missing else False)
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        first = tuple(bad[0].tolist())
        hint = ": where NaN is a missing value that the model masks, say missing=True" if bool(x.isnan().any()) else ""
        raise ValueError(
            f"expected {name} to be finite, got {len(bad)} NaN or infinite of {x.numel()} elements, "
            f"the first ({float(x[first])}) at {first}{hint}"
        )


# Tensors that are known to be finite while one call is checked, by identity.
_seen: ContextVar[frozenset[int]] = ContextVar("seen", default=frozenset())


def _all_finite(x: Tensor, missing: bool) -> bool:
    """Whether the sum of each block is finite, which tells at no memory; False where a sum overflows, too."""
    sums = torch.stack([(block.nansum() if missing else block.sum()) for block in blocks_of(x)])
    return bool(sums.isfinite().all())


def check_log_weights(log_weights: Tensor) -> None:
    """Refuse log weights (S, N) that are NaN or plus infinity; minus infinity is a weight of zero.

    Raises:
        FloatingPointError: With the number of the first such data point.
    """
    good = log_weights < math.inf
    if not bool(good.all()):
        bad = int((~good).any(0).nonzero()[0])
        raise FloatingPointError(f"log weight of data point {bad} is NaN or +inf: a density breaks down there")


def check_count(value: Any, name: str, minimum: int = 1) -> None:
    """Refuse anything but an integer of at least ``minimum``.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"expected {name} to be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"expected {name} to be at least {minimum}, got {value}")


def check_number(value: Any, name: str) -> None:
    """Refuse anything but a real number, or a tensor that holds one.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(value, Real | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"expected {name} to be a number, got {value!r}")


def check_positive(value: Any, name: str) -> None:
    """Refuse anything but a positive finite number.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive and finite.
    """
    check_number(value, name)
    if not 0 < value < math.inf:
        raise ValueError(f"expected a positive finite {name}, got {value}")


def check_programs(*programs: Any) -> None:
    """Refuse halves of a pair that are no Pyro programs.

    Raises:
        TypeError: If one is a class, or cannot be called.
    """
    for program in programs:
        if isinstance(program, type):
            raise TypeError(f"expected model and guide as instances, got the class {program.__name__}")
        if not callable(program):
            kind = type(program).__name__
            raise TypeError(f"expected model and guide each as a Pyro program, a module or a function, got {kind}")


def as_device(device: str | torch.device) -> torch.device:
    """A device that is there, from itself or by name; "auto" is CUDA where there is one.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is none of that name here.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"expected device to be a name or a torch.device, got {device!r}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(f"cuda:{i}" for i in range(gpus))]
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or no such device: the latter of builds for CPUs
        told = "" if gpus else "; torch sees no GPU"
        raise ValueError(f"expected device to be 'auto' or one of {there}, got {str(device)!r}{told}") from error
    return found


def check_arguments(
    programs: Iterable[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, missing: bool = False
) -> None:
    """Check the arguments of a pair before anything runs: by the programs' own checks, then for finiteness.

    Args:
        programs: The halves of the pair; those that satisfy :class:`ChecksData` see the first argument.
        args: Positional arguments of the pair.
        kwargs: Keyword arguments of the pair.
        missing: Let NaN pass; the programs' own checks may refuse it.

    Raises:
        TypeError: As :func:`check_layout` and :func:`check_programs`, if a tensor is sparse, or if a second one lands
            where a number of data points is expected.
        ValueError: As :func:`check_layout` and :func:`check_finite`.
    """
    check_programs(*programs)
    _check_dense(args, kwargs)
    x = args[0] if args else kwargs.get("x")
    known = isinstance(x, Tensor) and x.is_floating_point() and _all_finite(x.detach(), missing=False)
    token = _seen.set(_seen.get() | {id(x)}) if known else None
    try:
        for program in programs:
            if isinstance(program, ChecksData):
                _check_by(program, x)
                _check_num_data(program, args, kwargs)
        names = ["x, the first argument,", *(f"argument {i}" for i in range(1, len(args)))]
        for name, value in [*zip(names, args), *kwargs.items()]:
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    check_finite(leaf, name, missing=missing)
    finally:
        if token is not None:
            _seen.reset(token)


def _check_by(program: ChecksData, x: Any) -> None:
    """A program's own check of the data, whose errors say which half of the pair asks."""
    try:
        program.check_data(x)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(f"{type(program).__name__}: {error}") from error


def _check_dense(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for leaf in tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
            raise TypeError(f"expected dense tensors, got one of layout {leaf.layout}: convert it by x.to_dense()")


def _check_num_data(program: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a tensor as ``n``, the number of data points of a program that is called without data."""
    if sum(isinstance(value, Tensor) for value in (*args, *kwargs.values())) < 2:
        return
    try:
        n = inspect.signature(getattr(program, "forward", program)).bind_partial(*args, **kwargs).arguments.get("n")
    except TypeError:  # the call itself will say what does not fit
        return
    if isinstance(n, Tensor):
        raise TypeError(
            f"expected one tensor of data for {type(program).__name__}, got a second one of shape {tuple(n.shape)}, "
            "which it has no use for"
        )


class MatrixDataMixin:
    """Mixin of models and guides whose data are matrices, (N, D); a subclass gives ``_check_layout``."""

    def check_data(self, x: Any) -> None:
        """Check that ``x`` are data for this model or guide.

        Raises:
            TypeError: See :func:`check_layout`.
            ValueError: See :func:`check_layout` and :func:`check_finite`.
        """
        self._check_layout(x)
        check_finite(x)

    def _check_layout(self, x: Any) -> None:
        check_layout(x)
