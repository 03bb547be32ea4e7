"""A freed guide's ELBO as a function of each data point's own parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pyro
import torch
from torch import Tensor, nn

from inference.comparison.mixture_elbo import mixed, mixture_elbo
from inference.core.memory import at_once
from inference.core.seeding import random_state
from inference.numerics.lbfgs import Evaluate
from inference.numerics.whitened_noise import WhitenedNoise
from inference.pair.call import Call
from inference.pair.draw import Layout
from inference.pair.rows import RowBlocks, row_blocks, with_known_rows

# See LocalProblem.objective.
Loss = Callable[["LocalProblem", Tensor], Tensor]

# Draws of a block of rows at the default limit, fewer where a data point has more numbers than this.
_DRAWS, _NARROW = 2**15, 128


class LocalProblem:
    """Minus the ELBO of each data point as a function of its own free parameters, or of all of those that they share.

    Args:
        call: The pair, with the freed guide.
        local: That guide.
        num_samples: S, samples per data point, of noise that is evenly spread and stays the same.
        shared: Whether all data share the guide's parameters: then there is one problem, R = 1, else R = N.

    Attributes:
        start: The guide's parameters as they came, (R, P).
        layout: Layout of the pair.
        mixed: What is known of a guide that is a mixture, None of others: S samples of each component are taken.

    Raises:
        ValueError: If a parameter has not one row for each data point, or the pair subsamples its data.
    """

    def __init__(self, call: Call, local: nn.Module, num_samples: int, *, shared: bool = False) -> None:
        self.shared = shared
        self.parameters = _free(local)
        self.call, self.num_samples = call, num_samples
        self.noise, self.seed = WhitenedNoise(even=True), int(torch.randint(2**31, ()))
        sizes = {p.shape[0] if p.dim() else 0 for p in self.parameters}
        if len(sizes) != 1 and not shared:
            raise ValueError(
                f"expected the freed guide's parameters to have one row for each data point, got shapes "
                f"{[tuple(p.shape) for p in self.parameters]}"
            )
        self.start = self._table([p.detach() for p in self.parameters]).double()
        with torch.no_grad():
            self.layout: Layout = call.run(num_samples).layout  # finds the depth of the plates, outside the noise
            self.layout.refuse_subsampling()
            if not shared and len(self.start) != self.layout.num_data:
                raise ValueError(
                    f"expected the freed guide's parameters to have one row for each of {self.layout.num_data} data "
                    f"points, got {len(self.start)}"
                )
            self.mixed = mixed(call)
            self._minus_elbo()  # draws the noise, so that each evaluation finds it drawn
            self._cuts = not shared and self._can_cut()

    def combined(self, values: Tensor) -> Tensor:
        """Values of all data points (..., N) as those of the problems, (..., R)."""
        return values.sum(-1, keepdim=True) if self.shared else values

    def _table(self, parameters: Sequence[Tensor]) -> Tensor:
        rows = [1 if self.shared else len(p) for p in parameters]
        return torch.cat([p.reshape(r, -1) for p, r in zip(parameters, rows, strict=True)], -1)

    def set(self, point: Tensor) -> None:
        """Write free parameters (R, P) into the guide."""
        _write(self.parameters, point)

    def objective(self, loss: Loss, rows: Tensor) -> Evaluate:
        """Losses as functions of free parameters, with their gradients.

        Args:
            loss: From the problem of some data points, whose parameters are set, and the losses' numbers (M',), to
                their values (M',).
            rows: The data point of each loss, (M,); several may be of one.
        """

        def evaluate(point: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            if self._cuts:
                return self._rows(rows[index])._evaluate(loss, point, index)
            return self._evaluate_whole(loss, point, index, rows)

        return evaluate

    @property
    def minus_elbo(self) -> Evaluate:
        """Minus the ELBO of chosen data points, on the same noise at each call, whoever draws it."""
        return self.objective(lambda part, _: part._minus_elbo(), torch.arange(len(self.start)).to(self.start.device))

    def _evaluate(self, loss: Loss, point: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        self.set(point)
        # Far-out trial points make values that Pyro's validation refuses; here they are worth plus infinity.
        with torch.enable_grad(), pyro.validation_enabled(False):
            value = self.combined(loss(self, index))
            gradients = torch.autograd.grad(value.sum(), self.parameters)
        gradient = self._table(gradients)
        value = torch.where(value.detach().isnan(), math.inf, value.detach())
        return value.double(), gradient.double()

    def _evaluate_whole(self, loss: Loss, point: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The losses where data points cannot be run by themselves: all are run, once for each repetition of one."""
        value, gradient, at = point.new_empty(len(point)), torch.empty_like(point), rows[index]
        for places in _repetitions(at):
            whole, chosen = self.start.clone(), index[places[:1]].repeat(len(self.start))
            whole[at[places]], chosen[at[places]] = point[places].to(whole), index[places]
            values, gradients = self._evaluate(loss, whole, chosen)
            value[places], gradient[places] = values[at[places]], gradients[at[places]]
        return value, gradient

    def _minus_elbo(self) -> Tensor:
        with random_state(self.seed), self.noise:
            if self.mixed is not None:
                return -mixture_elbo(self.call, self.mixed, self.num_samples)
            return -self.call.run(self.num_samples, enumerate_guide=True).trained_elbo.mean(0)

    def _rows(self, index: Tensor) -> LocalProblem:
        """The problem of chosen rows, which may repeat, on their noise."""
        part = copy.copy(self)
        part.call = self._source.rows(index, self.layout.num_data)
        assert isinstance(part.call.guide, nn.Module)
        part.parameters = _free(part.call.guide)
        part.noise = self.noise.rows(index, self.layout.dim - 1)
        return part

    def _can_cut(self) -> bool:
        """Whether rows by themselves have the ELBO that they have among all; also of noise that is not whitened."""
        index = torch.arange(len(self.start), device=self.start.device).flip(0)
        index = torch.cat([index, index[:1]])
        try:
            # Of a copy that keeps its parameters: rows begin where the guide stands.
            self._source = with_known_rows(self.call, self.call.probe()).rows(index[:-1].flip(0), self.layout.num_data)
            part = self._rows(index)._minus_elbo()
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        return torch.allclose(part, self._minus_elbo()[index], rtol=1e-6, atol=1e-6, equal_nan=True)


def write_rows(local: nn.Module, point: Tensor) -> None:
    """Write free parameters (N, P) into a freed guide."""
    _write(_free(local), point)


@torch.no_grad()
def _write(parameters: list[nn.Parameter], point: Tensor) -> None:
    pieces = point.split([p.numel() // len(point) for p in parameters], -1)
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.reshape(parameter.shape))


def _free(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _repetitions(index: Tensor) -> list[Tensor]:
    """Places of an index in groups of which none holds a number twice."""
    order = index.argsort(stable=True)
    count = torch.bincount(index)
    turn = torch.empty_like(index)
    turn[order] = torch.arange(len(index), device=index.device) - (count.cumsum(0) - count)[index[order]]
    return [(turn == i).nonzero()[:, 0] for i in range(int(turn.max()) + 1)]


def blocks_of_refits(call: Call, num_samples: int) -> RowBlocks:
    """The call in blocks of rows of which so many samples are drawn: memory grows with neither rows nor columns.

    Raises:
        ValueError: If model and guide are not a valid pair.
    """
    blocks = row_blocks(call, at_once(_DRAWS, num_samples))
    numel, mixture = blocks[0].probe().layout.numel, mixed(blocks[0])
    draws = num_samples if mixture is None else num_samples * mixture.num_components
    return row_blocks(blocks.call, at_once(_DRAWS * _NARROW, draws * max(numel, _NARROW)))
