"""Simulated data with their true latents and a guide's draws: the input of every calibration test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.core.checks import check_count, check_finite
from inference.core.display import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class Simulation(Result):
    """Simulated data, their true latents, and a guide's draws given the data; may also be made by hand.

    Attributes:
        names: One name per latent coordinate, P of them.
        truth: Latents that the data were made from, (N, P).
        draws: The guide's, (S, N, P).
        data: Observations, each data point's in one row, (N, D).
        quantities: Further test quantities by name, each of the truth, (N,), and of the draws, (S, N).

    Raises:
        ValueError: If shapes do not fit or a number is not finite.
    """

    names: tuple[str, ...]
    truth: Tensor
    draws: Tensor
    data: Tensor
    quantities: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_data, dim = len(self.truth), len(self.names)
        if self.truth.shape != (num_data, dim) or self.draws.dim() != 3 or self.draws.shape[1:] != (num_data, dim):
            raise ValueError(
                f"expected truth of shape (N, {dim}) and draws of shape (S, N, {dim}) for the names {self.names}, got "
                f"{tuple(self.truth.shape)} and {tuple(self.draws.shape)}"
            )
        check_count(num_data, "the number of simulated data points")
        check_count(self.num_samples, "the number of draws")
        if self.data.dim() != 2 or len(self.data) != num_data:
            raise ValueError(f"expected data of shape ({num_data}, D), got {tuple(self.data.shape)}")
        check_finite(self.truth, "truth")
        check_finite(self.draws, "draws")
        for name, (truth, draws) in self.quantities.items():
            if truth.shape != (num_data,) or draws.shape != self.draws.shape[:2]:
                raise ValueError(
                    f"expected {name!r} of shapes ({num_data},) and {tuple(self.draws.shape[:2])}, got "
                    f"{tuple(truth.shape)} and {tuple(draws.shape)}"
                )
            if bool(truth.isnan().any() | draws.isnan().any()):
                raise ValueError(f"expected {name!r} to be a number everywhere, got NaN")

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.draws)


def join(parts: Sequence[Simulation], num: int) -> Simulation:
    """The first ``num`` data points of several rounds."""
    quantities = {
        name: (
            torch.cat([p.quantities[name][0] for p in parts])[:num],
            torch.cat([p.quantities[name][1] for p in parts], 1)[:, :num],
        )
        for name in parts[0].quantities
    }
    return Simulation(
        names=parts[0].names,
        truth=torch.cat([p.truth for p in parts])[:num],
        draws=torch.cat([p.draws for p in parts], 1)[:, :num],
        data=torch.cat([p.data for p in parts])[:num],
        quantities=quantities,
    )
