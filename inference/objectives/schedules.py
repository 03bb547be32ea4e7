"""Schedules over the training steps: weights of the Kullback-Leibler term, and precisions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.core.checks import check_count, check_positive

Schedule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearAnnealing:
    r"""Linear annealing from ``start`` to one over a number of steps, one thereafter.

    .. math:: \beta_t = \min(1, s + (1 - s) \, t / T)

    References:
        Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio, "Generating Sentences from a Continuous Space", 2016,
        arXiv 1511.06349.

    Args:
        steps: T.
        start: s, the weight of the first step.

    Example:
        >>> [LinearAnnealing(4)(torch.tensor(t)).item() for t in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")

    def __call__(self, step: Tensor) -> Tensor:
        """The weight at a step, a scalar tensor."""
        return self.start + (1 - self.start) * (step / self.steps).clamp(max=1.0)


@dataclass(frozen=True)
class CyclicalAnnealing:
    r"""Cyclical annealing: in each period linearly up to one over its first part, one over the rest.

    References:
        Fu, Li, Liu, Gao, Celikyilmaz, Carin, "Cyclical Annealing Schedule", 2019, arXiv 1903.10145.

    Args:
        period: Steps of one cycle.
        rise: The share of a cycle in which the weight rises.

    Raises:
        ValueError: If ``rise`` is not in (0, 1].

    Example:
        >>> [CyclicalAnnealing(4, rise=0.5)(torch.tensor(t)).item() for t in range(6)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    """

    period: int
    rise: float = 0.5

    def __post_init__(self) -> None:
        check_count(self.period, "period")
        if not 0 < self.rise <= 1:
            raise ValueError(f"expected rise in (0, 1], got {self.rise}")

    def __call__(self, step: Tensor) -> Tensor:
        """The weight at a step, a scalar tensor."""
        return (torch.remainder(step, self.period) / (self.rise * self.period)).clamp(max=1.0)


@dataclass(frozen=True)
class GeometricAnnealing:
    r"""Geometric annealing from ``start`` to ``end``, ``end`` thereafter: for a precision over orders of magnitude.

    .. math:: \gamma^2_t = s \, (e / s)^{\min(1, t / T)}

    Args:
        steps: T.
        start: s, positive.
        end: e, positive.

    Raises:
        ValueError: If ``start`` or ``end`` is not positive and finite.

    Example:
        >>> [round(GeometricAnnealing(2, 10.0, 1e5)(torch.tensor(t)).item()) for t in (0, 1, 2, 9)]
        [10, 1000, 100000, 100000]
    """

    steps: int
    start: float
    end: float

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        for name, value in (("start", self.start), ("end", self.end)):
            check_positive(value, name)

    def __call__(self, step: Tensor) -> Tensor:
        """The value at a step, a scalar tensor in float64."""
        share = (step.double() / self.steps).clamp(max=1.0)
        return self.start * (share * math.log(self.end / self.start)).exp()
