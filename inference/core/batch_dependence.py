"""Batch-dependent modules, whose output for a data point depends on the rest of the batch, and their refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from inference.core.protocols import supports_freeze


def _batch_dependence(module: nn.Module) -> str:
    """Why a module's output still depends on the batch, and what to call; empty where it does not."""
    if supports_freeze(module) and not module.frozen:
        return "not frozen: call .freeze() first"
    if module.training and (supports_freeze(module) or isinstance(module, _BatchNorm | _DropoutNd)):
        return "in train mode: call .eval() first"
    return ""


@contextmanager
def refuse_batch_dependence(*programs: object) -> Iterator[None]:
    """Refuse, while the block runs, batch-dependent modules, and dropout in train mode.

    Args:
        *programs: Where to look for the module's name.

    Raises:
        ValueError: When batch normalisation or dropout in train mode, or an unfrozen batch-dependent module, runs.
    """

    def refuse(module: nn.Module, _: Any) -> None:
        if state := _batch_dependence(module):
            owners = [
                f"{type(program).__name__}, {name!r}"
                for program in programs
                if isinstance(program, nn.Module)
                for name, part in program.named_modules()
                if part is module
            ]
            kind = "batch normalisation" if isinstance(module, _BatchNorm) else type(module).__name__
            raise ValueError(
                f"expected modules as they are after training, got {kind} in {owners[0] if owners else module} {state}"
            )

    # A hook on every module that runs, because a network may hide inside a function.
    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
