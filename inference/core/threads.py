"""One thread at a time: Pyro's handlers, its store and torch's generator are one for the whole process."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from typing import Any

from pyro.poutine import runtime

_lock = threading.RLock()


def one_at_a_time() -> AbstractContextManager[Any]:
    """Run a block while no other thread is in such a block; a second thread waits.

    Everything of this library that runs a pair, or sets the random state, does so inside. A thread that runs Pyro
    programs or draws random numbers by itself meanwhile disturbs both, as it would any Pyro program.
    """
    return _lock


def _begin_anew() -> None:
    """In a forked child no other thread lives that could give back the lock, or end the handlers that it began."""
    global _lock
    if not _lock.acquire(blocking=False):
        _lock = threading.RLock()
        del runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack[:]
        return
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
