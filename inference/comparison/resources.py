"""Cost of a computation: wall time and the peak memory of its tensors."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Cost(NamedTuple):
    """Cost of one call.

    Attributes:
        seconds: Wall time, of a call by itself.
        memory: Peak bytes of the tensors made during a call.
    """

    seconds: float
    memory: int


def cost(function: Callable[[], Any]) -> Cost:
    """Call a function three times: to warm up, to time, and to watch its tensors.

    Args:
        function: What to measure; its result is dropped.

    Example:
        >>> cost(lambda: torch.zeros(1000) + 1).memory
        8000
    """
    function()
    _synchronise()
    start = time.perf_counter()
    function()
    _synchronise()
    seconds = time.perf_counter() - start
    with _Watch() as watch:
        function()
    return Cost(seconds, watch.peak)


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _Watch(TorchDispatchMode):
    """Follows the storage of every tensor that an operation returns until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage(), given)
        return result

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._live or key in given:
            return
        self._live.add(key)
        self._held += storage.nbytes()
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._held -= size
