"""Training on several ranks: each computes the gradient of its share of a batch, and all take the same step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.utils._pytree import tree_leaves

from inference.core.ranks import Ranks, sharing
from inference.core.row_noise import DrawsSeen, RowNoise, axes_of_rows
from inference.core.seeding import random_state
from inference.training.batches import Arguments, Batches
from inference.training.losses import PairLoss

_FEW = 2


class SharedLoss:
    """The loss of a batch whose rows the ranks share, with the interface of :class:`PairLoss`.

    Each row's noise is what it is on one rank; losses and gradients are added up.

    Args:
        loss: The loss of a batch on one rank.
        layout: Which of a batch's arguments are rows.
        ranks: The ranks.
        first: A batch like those of the steps.
        modules: The pair's.

    Raises:
        ValueError: If the loss of a batch is not the sum over its rows, a batch is smaller than the number of ranks, or
            there are no rows.
    """

    def __init__(
        self, loss: PairLoss, layout: Batches, ranks: Ranks, first: Arguments, modules: list[nn.Module]
    ) -> None:
        self._loss, self._layout, self._ranks = loss, layout, ranks
        self._total: int | None = None
        loss.count = self._count
        if layout.whole:
            raise ValueError(f"expected rows of data to share among {ranks.size} ranks, got whole=True, one data point")
        few = max(ranks.size, _FEW)
        self._check_size(layout.count(first), few + 1)
        rows = layout.take(first, slice(0, few + 1))
        draws = self._draws(rows)
        self._axes, self._by_value = axes_of_rows(self._draws(layout.take(first, slice(0, few))), draws), None in draws
        self._check_shared(rows, modules)

    def find_parameters(self, batch: Arguments) -> None:
        """See :class:`PairLoss`."""
        self._loss.find_parameters(batch)

    def backward(self, batch: Arguments, parameters: list[Tensor]) -> Tensor:
        """The loss of the whole batch per data point, after its gradient has been added to the parameters'."""
        with self._shared(batch) as share:
            loss = self._loss.backward(share, parameters)
        parts = [p.grad for p in parameters if p.grad is not None]
        for dtype in sorted({part.dtype for part in parts}, key=str):
            same = [part for part in parts if part.dtype == dtype]
            total = self._ranks.add(torch.cat([part.reshape(-1) for part in same]))
            for part, added in zip(same, total.split([part.numel() for part in same]), strict=True):
                part.copy_(added.reshape(part.shape))
        return self._ranks.add(loss.clone())

    def value(self, batch: Arguments) -> float:
        """The loss of the whole batch in nats per data point, without gradient."""
        if self._layout.count(batch) < self._ranks.size:
            return self._loss.value(batch)
        with self._shared(batch) as share:
            value = torch.tensor(self._loss.value(share), dtype=torch.float64)
        return float(self._ranks.add(value))

    def _count(self, batch: Arguments) -> int:
        """Data points by which a sum over rows is divided: those of the whole batch, of which this is a share."""
        return self._layout.count(batch) if self._total is None else self._total

    @contextmanager
    def _shared(self, batch: Arguments) -> Iterator[Arguments]:
        number = self._layout.count(batch)
        self._check_size(number, self._ranks.size)
        share, self._total = self._ranks.share(number), number
        try:
            with sharing(), RowNoise(self._axes, share, number, self._ranks.rank):
                yield self._layout.take(batch, share)
        finally:
            self._total = None

    def _check_size(self, number: int, least: int) -> None:
        if number < least:
            raise ValueError(
                f"expected batches, the last of an epoch among them, of at least {least} rows for {self._ranks.size} "
                f"ranks, got one of {number}"
            )

    def _draws(self, rows: Arguments) -> list[tuple[int, ...] | None]:
        with torch.no_grad(), random_state(0), DrawsSeen() as seen:
            self._loss.value(rows)
        return seen.shapes

    @torch.no_grad()
    def _check_shared(self, rows: Arguments, modules: list[nn.Module]) -> None:
        """Check that the loss of some rows is the sum of the ranks' shares: nothing else may depend on the batch."""
        norms = [type(part).__name__ for module in modules for part in module.modules() if isinstance(part, _BatchNorm)]
        if norms and any(name != SyncBatchNorm.__name__ for name in norms):
            raise ValueError(f"expected modules that treat each row by itself on several ranks, got {norms[0]}")
        if self._by_value:  # then there is other noise on each rank
            return
        with random_state(0):
            whole = self._loss.value(rows)
        with random_state(0):
            shared = self.value(rows)
        leaves = [leaf for leaf in tree_leaves(rows) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        tolerance = 1e-6 if leaves and leaves[0].dtype == torch.float64 else 1e-3
        if not abs(whole - shared) <= tolerance * (1 + abs(whole)):
            raise ValueError(
                f"expected an objective and a pair whose loss of a batch is the sum over its rows, to share them among "
                f"{self._ranks.size} ranks, got {whole:.6g} for some rows at once and {shared:.6g} for their shares: "
                "does one take a mean over the batch? Train it on one rank, or take that mean by "
                "inference.core.ranks.batch_mean"
            )
