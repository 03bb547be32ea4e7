"""Ranks: the processes of one computation, as ``torchrun`` starts them, of which each does a part.

A script says that it has ranks by ``torch.distributed.init_process_group()``. From then on training and measurement
share their rows among them, and each rank gets the whole result. Without a process group there is one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

T = TypeVar("T")

_alone: ContextVar[bool] = ContextVar("alone", default=False)
_sharing: ContextVar[bool] = ContextVar("sharing", default=False)


class RankLost(RuntimeError):
    """Another rank of the computation has ended, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a computation, and which of them this process is.

    Attributes:
        rank: This one's number, from zero.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def share(self, number: int) -> slice:
        """This rank's part of so many rows: shares differ by one row at most."""
        return slice(number * self.rank // self.size, number * (self.rank + 1) // self.size)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            there = tensor.to(_device(tensor))
            with _sentence():
                distributed.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)
        return tensor

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Write the first rank's values into the tensors of all ranks."""
        for tensor in tensors if self.size > 1 else ():
            there = tensor.detach().to(_device(tensor)).contiguous()
            with _sentence():
                distributed.broadcast(there, 0)
            tensor.copy_(there)

    def agreed(self, seed: int | None) -> int | None:
        """A seed for all ranks: the given one, or one that the first rank draws; None stays None on one rank."""
        if self.size == 1 or seed is not None:
            return seed
        return self.of_first(lambda: int(torch.randint(2**31, ())))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _sentence():
            distributed.all_gather_object(found, value)
        return found

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all ranks; an error there is an error on all.

        Raises:
            Exception: What the first rank raises.
        """
        own = _outcome(make) if self.first else None
        sent = self.gather(own)[0]
        found = sent if own is None else own
        assert found is not None
        return found.value()

    def check_same(self, value: Any, what: str) -> None:
        """Check that a value is the same on all ranks.

        Raises:
            ValueError: On all ranks, if it is not.
        """
        found = self.gather(value)
        if any(other != found[0] for other in found):
            raise ValueError(f"expected the same {what} on all {self.size} ranks, got {found}")

    def in_turn(self, number: int, compute: Callable[[int], T], start: int = 0) -> Iterator[T]:
        """Results of numbered pieces of work in their order, shared among the ranks: each gets all of them.

        Args:
            number: How many pieces there are.
            compute: Does one.
            start: The first that is to be done.

        Raises:
            Exception: What a piece raises, on all ranks.
        """
        for place in range(start, number, self.size):
            mine = place + self.rank
            outcome = _outcome(lambda at=mine: compute(at)) if mine < number else None  # type: ignore[misc]
            found = self.gather(outcome)
            found[self.rank] = outcome
            yield from (part.value() for part in found if part is not None)


@dataclass
class _Outcome:
    """A result, or the error in its place."""

    result: Any = None
    error: Exception | None = None

    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result

    def __getstate__(self) -> dict[str, Any]:
        """What other ranks get: an error as one of Python's own, for its class may hold what cannot be sent."""
        return vars(self) | {"error": None if self.error is None else _plain(self.error)}


def _plain(error: Exception) -> Exception:
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    try:
        return kind(str(error))
    except TypeError:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _outcome(make: Callable[[], Any]) -> _Outcome:
    if ranks().size == 1:
        return _Outcome(make())
    try:
        return _Outcome(make())
    except RankLost:
        raise
    except Exception as error:  # every rank is to hear of it
        return _Outcome(error=error)


def _device(tensor: Tensor) -> torch.device:
    """Where a tensor can be sent from."""
    if distributed.get_backend() == "nccl" and not tensor.is_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


@contextmanager
def _sentence() -> Iterator[None]:
    """Say in one sentence that another rank is gone."""
    try:
        yield
    except (RuntimeError, distributed.DistBackendError) as error:
        raise RankLost(
            "expected all ranks to go on, but another one has ended or does not answer: start them all again with the "
            f"same arguments; what has a checkpoint goes on from there ({str(error).splitlines()[0][:80]})"
        ) from error


def ranks() -> Ranks:
    """The ranks of the default process group; one where there is none, and inside :func:`alone`."""
    if _alone.get() or not (distributed.is_available() and distributed.is_initialized()):
        return Ranks()
    return Ranks(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Compute without the other ranks while the block runs."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def sharing() -> Iterator[None]:
    """While the block runs, this rank has its share of a batch of rows: :func:`batch_mean` is that of all shares."""
    token = _sharing.set(True)
    try:
        yield
    finally:
        _sharing.reset(token)


def batch_mean(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean over the rows of a batch, and what else is in ``dim``, with gradient: over all ranks' rows where shared.

    Args:
        x: Any tensor; the rows are in one of the dimensions.
        dim: Over what; None takes all.
    """
    group = ranks() if _sharing.get() else Ranks()
    if group.size == 1:
        return x.mean() if dim is None else x.mean(dim)
    total = x.sum() if dim is None else x.sum(dim)
    count = torch.tensor(float(x.numel() // max(1, total.numel())), dtype=torch.float64)
    return _Sum.apply(total) / group.add(count.to(x.device)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the ranks; so is its gradient, as each rank's loss is a part of the whole one."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return ranks().add(x.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return ranks().add(gradient.clone())
