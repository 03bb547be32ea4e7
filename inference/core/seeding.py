"""Seeds that leave the caller's random state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch

from inference.core.checks import check_count
from inference.core.threads import one_at_a_time

_LARGEST = 2**63 - 1

_depth: ContextVar[int] = ContextVar("depth", default=0)


@contextmanager
def random_state(seed: int | None) -> Iterator[None]:
    """Run a block from a seed, or from the present state, and restore the state that torch had before.

    Args:
        seed: Seed of every torch generator; None starts from the present state.

    Raises:
        TypeError: If the seed is not an integer.
        ValueError: If it is negative, or has more than 63 bits.
    """
    if seed is not None:
        check_count(seed, "seed", 0)
        if seed > _LARGEST:
            raise ValueError(f"expected seed below 2**63, got {seed}")
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    token = _depth.set(_depth.get() + 1)
    try:
        with one_at_a_time(), torch.random.fork_rng(devices=devices):
            if seed is not None:
                torch.manual_seed(int(seed))
            yield
    finally:
        _depth.reset(token)


def depth() -> int:
    """How many random states the present one stands in: draws of an inner one leave the outer ones as they were."""
    return _depth.get()


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a block from a seed and restore the state afterwards; with None, simply run it.

    Args:
        seed: Seed of every torch generator; None draws from the caller's state and advances it.
    """
    if seed is None:
        with one_at_a_time():
            yield
    else:
        with random_state(seed):
            yield


def block_seed(seed: int | None, index: int) -> int | None:
    """A stream of its own for each block: neighbouring seeds must not share the noise of neighbouring blocks."""
    return None if seed is None else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


class RandomStream:
    """A random state of its own for work that stops and goes on, such as a generator between two of its values.

    Args:
        seed: Seed of every torch generator; None draws from the caller's state and advances it.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._states: list[torch.Tensor] | None = None

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Run a block from where the last one ended, and restore the state that torch had before."""
        if self._seed is None:
            with one_at_a_time():
                yield
            return
        with random_state(self._seed):
            if self._states is not None:
                set_random_states(self._states)
            yield
            self._states = random_states()


def random_states() -> list[torch.Tensor]:
    """The state of torch's generator on the CPU, and on every GPU in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def set_random_states(states: list[torch.Tensor]) -> None:
    """Go back to what :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
