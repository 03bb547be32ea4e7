"""Mini-batches of the arguments of a pair: which of them are rows of data, and how the batches of the steps come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import repeat
from typing import Any, Protocol

import pyro.infer
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from inference.core.checks import check_count, check_finite
from inference.core.seeding import RandomStream
from inference.core.sources import as_batch
from inference.objectives.base import Objective
from inference.pair.call import Call, num_rows, rows_of
from inference.pair.fingerprint import described, name_of
from inference.pair.rows import with_known_rows

Arguments = tuple[Any, ...]

AtOnce = Callable[[int], int]


@contextmanager
def laid_out(objective: pyro.infer.ELBO, plate: str | None, whole: bool) -> Iterator[None]:
    """Let an objective of ours know, while the block runs, how the data are laid out; stock ones sum everything."""
    if not isinstance(objective, Objective):
        yield
        return
    if plate is not None and objective.plate not in (None, plate):
        raise ValueError(f"expected one plate over the data, got {plate!r} and the objective's {objective.plate!r}")
    before = objective.plate, objective.whole
    objective.plate, objective.whole = plate or objective.plate, whole
    try:
        yield
    finally:
        objective.plate, objective.whole = before


@dataclass(frozen=True)
class Batches:
    """Which positional arguments of a pair are rows of data.

    Attributes:
        rows: Their positions.
        whole: Whether all data are one data point, of which there are no rows.
        device: Where batches go that are taken; None leaves them.
    """

    rows: frozenset[int | str]
    whole: bool = False
    device: str | torch.device | None = None

    @classmethod
    def of(cls, call: Call, *, partly: bool, device: str | torch.device | None = None) -> Batches:
        """The rows of a call, checked where only some are taken, see :func:`inference.pair.rows.with_known_rows`.

        Where that cannot be checked, as in batch-dependent training, all with as many rows as the first are.
        """
        if call.whole:
            return cls(frozenset(), whole=True)
        rows = None
        if partly and len(call.args) > 1:
            with torch.no_grad(), suppress(ValueError, RuntimeError):
                rows = with_known_rows(call).row_arguments
        return cls(frozenset(call.candidates()) if rows is None else rows, device=device)

    def count(self, batch: Arguments) -> int:
        """Data points of a batch."""
        return 1 if self.whole else num_rows([part for i, part in enumerate(batch) if i in self.rows])

    def take(self, batch: Arguments, index: Tensor | slice) -> Arguments:
        """The arguments of chosen data points; a slice of tensors copies nothing."""
        if self.whole:
            return batch
        number = self.count(batch)
        return moved(
            tuple(rows_of(part, index, number) if i in self.rows else part for i, part in enumerate(batch)), self.device
        )

    def split(self, batch: Arguments, size: int) -> Iterator[Arguments]:
        """The arguments in parts of so many data points."""
        number = self.count(batch)
        if not self.whole and all(isinstance(part, Tensor) for part in batch):  # at a fraction of the time
            parts = (
                part.split(size) if i in self.rows and len(part) == number else repeat(part)
                for i, part in enumerate(batch)
            )
            yield from (moved(part, self.device) for part in zip(*parts))
            return
        for start in range(0, number, size):
            yield self.take(batch, slice(start, min(start + size, number)))


def moved(batch: Arguments, device: str | torch.device | None) -> Arguments:
    """The arguments on a device."""
    if device is None:
        return batch
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


class Supply(Protocol):
    """Where the batches of the steps come from."""

    @property
    def layout(self) -> Batches:
        """Which of a batch's arguments are rows."""
        ...

    @property
    def first(self) -> Arguments:
        """A batch like those of the steps, to find out about the pair."""
        ...

    @property
    def full(self) -> bool:
        """Whether each batch is all the data."""
        ...

    @property
    def can_be_repeated(self) -> bool:
        """Whether the batches of an epoch can be had again."""
        ...

    def from_step(self, step: int, order_seed: int, at_once: AtOnce) -> Iterator[tuple[int, list[Arguments]]]:
        """The batches from a step on; an epoch's order depends on the seed and its number alone.

        Args:
            step: The first.
            order_seed: The seed.
            at_once: How many steps may follow a step at once: their batches, of one form, come together if there are
                as many, else one by one.
        """
        ...

    def described(self) -> Any:
        """What the batches of a run are recognised by, as JSON values."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Batches of data whose rows can be taken by their numbers, without replacement within an epoch.

    Attributes:
        data: All data, as the pair's positional arguments.
        batch_size: Data points of a batch.
        layout: Which arguments are rows.
    """

    data: Arguments
    batch_size: int
    layout: Batches

    @property
    def full(self) -> bool:
        """Whether each batch is all the data."""
        return self.batch_size == self.layout.count(self.data)

    @property
    def can_be_repeated(self) -> bool:
        """That they can."""
        return True

    @property
    def first(self) -> Arguments:
        """The first rows, as many as a batch has."""
        return self.data if self.full else self.layout.take(self.data, slice(0, self.batch_size))

    def from_step(self, step: int, order_seed: int, at_once: AtOnce) -> Iterator[tuple[int, list[Arguments]]]:
        """See :class:`Supply`."""
        if self.full:
            while True:
                number = at_once(step)
                yield step, [self.data] * number
                step += number
        num_data, size = self.layout.count(self.data), self.batch_size
        per_epoch = math.ceil(num_data / size)

        @lru_cache(maxsize=2)
        def order(epoch: int) -> Tensor:
            return torch.randperm(num_data, generator=torch.Generator().manual_seed(order_seed + epoch))

        while True:
            places = [divmod(step + i, per_epoch) for i in range(at_once(step))]
            parts = [order(epoch)[i * size : (i + 1) * size] for epoch, i in places]
            if any(len(part) < size for part in parts):  # of another form
                parts = parts[:1]
            some = self.layout.take(self.data, torch.cat(parts))
            yield step, list(self.layout.split(some, size))
            step += len(parts)

    def described(self) -> Any:
        """Digests of the data, and the size of a batch."""
        devices = sorted({leaf.device.type for leaf in tree_leaves(self.data) if isinstance(leaf, Tensor)})
        return {"data": described(list(self.data)), "batch_size": self.batch_size, "device": devices}


def as_loader(data: Any, batch_size: int | None) -> DataLoader[Any] | None:
    """Data that come in batches by themselves; None for those whose rows can be taken by their numbers.

    Raises:
        ValueError: If the size of a batch is given twice, or not at all.
    """
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError(f"expected no batch_size beside a DataLoader, which has its own, got {batch_size}")
        return data
    if not isinstance(data, IterableDataset):
        return None
    if batch_size is None:
        raise ValueError("expected a batch_size for an IterableDataset, got none: or give a DataLoader")
    check_count(batch_size, "batch_size")
    return DataLoader(data, batch_size=batch_size)


@dataclass
class Loaded:
    """Batches of a ``DataLoader``, each of its rounds an epoch, in the order of its own sampler.

    All that the loader draws comes from a seed of the epoch, so that its batches can be had again.

    Args:
        loader: The loader.
        order_seed: Seed of the first epoch.
        device: Where batches go.
        missing: Let NaN pass.

    Attributes:
        given: The last two batches that were given, by their steps.
        expected: What the last batch of an interrupted run was recognised by.
        layout: Which arguments are rows; set once the first batch has been looked at.

    Raises:
        ValueError: If the loader gives no batch.
    """

    loader: DataLoader[Any]
    order_seed: int
    device: str | torch.device | None = None
    missing: bool = False
    layout: Batches = field(init=False)
    given: dict[int, Arguments] = field(default_factory=dict, init=False)
    expected: Any = field(default=None, init=False)
    full: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        # The data of an IterableDataset may come once only: the round that is begun here is the first epoch's.
        self._begun: Iterator[Arguments] | None = self._epoch(self.order_seed)
        self.first = next(self._begun, ())
        if not self.first:
            raise ValueError("expected a loader of at least one batch, got none")

    @property
    def can_be_repeated(self) -> bool:
        """Whether the batches of an epoch can be had again."""
        return not isinstance(self.loader.dataset, IterableDataset)

    def _epoch(self, seed: int) -> Iterator[Arguments]:
        stream = RandomStream(seed)
        with stream.resumed():
            for holder in (self.loader, self.loader.sampler, self.loader.batch_sampler):
                if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                    generator.manual_seed(seed)
            batches = iter(self.loader)
        while True:
            with stream.resumed():
                batch = next(batches, None)
            if batch is None:
                return
            yield moved(as_batch(batch), self.device)

    def from_step(
        self,
        step: int,
        order_seed: int,
        at_once: AtOnce,  # noqa: ARG002 - what a loader gives is taken before it gives more
    ) -> Iterator[tuple[int, list[Arguments]]]:
        """See :class:`Supply`; one by one.

        Raises:
            ValueError: If a batch is not finite, an epoch is empty, or the loader does not give again the batch that
                was the last when the run was interrupted.
        """
        begun = 0
        if self.can_be_repeated:
            epoch, past = divmod(step, len(self.loader))
            yield from self._rest(step, order_seed + epoch, past)
            step, begun = step + len(self.loader) - past, epoch + 1
        for epoch in itertools.count(begun):
            count = 0
            for count, batch in enumerate(self._round(order_seed + epoch, first=step == 0), 1):
                yield step + count - 1, [self._checked(batch, step + count - 1)]
            if count == 0:
                raise ValueError(f"expected a loader of at least one batch, got none in epoch {epoch}")
            step += count

    def _rest(self, step: int, seed: int, past: int) -> Iterator[tuple[int, list[Arguments]]]:
        """The rest of an epoch of which some batches have been taken before."""
        for i, batch in enumerate(self._round(seed, first=step == 0)):
            if i >= past:
                yield step + i - past, [self._checked(batch, step + i - past)]
            elif i == past - 1:
                if self.expected not in (None, digests(batch)):
                    raise ValueError(
                        "expected the loader to give again the batches of the interrupted run, got others: are its "
                        "data the same, and does it draw from torch's generators alone?"
                    )
                self.expected = None

    def _round(self, seed: int, *, first: bool) -> Iterator[Arguments]:
        begun, self._begun = self._begun, None
        if first and begun is not None and seed == self.order_seed:
            return itertools.chain([self.first], begun)
        return self._epoch(seed)

    def _checked(self, batch: Arguments, step: int) -> Arguments:
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                check_finite(leaf, f"the loader's batch of step {step}", missing=self.missing)
        self.given = {step - 1: self.given.get(step - 1, ()), step: batch}
        return batch

    def digest_before(self, step: int) -> Any:
        """What the batch before a step is recognised by; None where it is not at hand."""
        batch = self.given.get(step - 1, ())
        return digests(batch) if batch else None

    def described(self) -> Any:
        """Classes and numbers of the loader, and the digest of its first batch."""
        parts = [name_of(part) for part in (self.loader.dataset, self.loader.sampler)]
        numbers = [len(self.loader), self.loader.batch_size, digests(self.first)]
        return {"data": [*parts, *numbers], "device": str(self.device)}


def digests(batch: Arguments) -> Any:
    """What a batch is recognised by."""
    return described(list(batch))
