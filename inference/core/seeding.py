"""Seeds that leave the caller's random state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def random_state(seed: int | None) -> Iterator[None]:
    """Run a block from a seed, or from the present state, and restore the state that torch had before.

    Args:
        seed: Seed of every torch generator; None starts from the present state.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a block from a seed and restore the state afterwards; with None, simply run it.

    Args:
        seed: Seed of every torch generator; None draws from the caller's state and advances it.
    """
    if seed is None:
        yield
    else:
        with random_state(seed):
            yield
