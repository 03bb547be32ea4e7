"""Pairs in float64, whatever they were trained in: at little noise a float32 density drowns in rounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference.core.run import Program


class Call(NamedTuple):
    """A pair and what it is called with.

    Attributes:
        model: Pyro model.
        guide: Pyro guide, or None.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
    """

    model: Program
    guide: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def in_double(call: Call) -> Call:
    """The call with modules and data in float64, as copies; itself where a half is no module, or all is so already.

    The pair is copied as one, so that a guide which holds its model holds the copy.
    """
    programs = [p for p in (call.model, call.guide) if p is not None]
    if not all(isinstance(p, nn.Module) for p in programs) or all(map(_is_double, programs)):
        return call
    model, guide = copy.deepcopy((call.model, call.guide))
    for module in (model, guide):
        if isinstance(module, nn.Module):
            module.double()
    kwargs = {name: _convert(value) for name, value in call.kwargs.items()}
    return Call(model, guide, tuple(map(_convert, call.args)), kwargs)


def _convert(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_double(module: Any) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())
