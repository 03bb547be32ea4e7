"""Estimates with a standard error, intervals with a level, and the two functions that both need."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inference.core.checks import check_number
from inference.core.display import as_html, data_frame


class Estimate(NamedTuple):
    """Monte Carlo estimate per data point, with its standard error.

    Attributes:
        value: The estimate, (N,).
        standard_error: Its standard error, (N,), in the same units; infinite for one sample.
    """

    value: Tensor
    standard_error: Tensor

    def __repr__(self) -> str:
        """One line: the mean over the data with its standard error."""
        error = float(self.standard_error.square().sum().sqrt()) / max(1, self.value.numel())
        return f"<Estimate of {self.value.numel()} numbers: mean {float(self.value.mean()):.4f} ±{error:.4f}>"

    def _repr_html_(self) -> str:
        return as_html(repr(self), data_frame(self))


class Interval(NamedTuple):
    """Estimate of one number, with its interval and standard error.

    Attributes:
        value: The estimate.
        lower: Lower end of its interval.
        upper: Upper end.
        standard_error: Standard error.
    """

    value: float
    lower: float
    upper: float
    standard_error: float


def check_level(level: float) -> None:
    """Check a confidence level.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not between 0 and 1.
    """
    check_number(level, "level")
    if not 0 < level < 1:
        raise ValueError(f"expected level between 0 and 1, got {level}")


def normal_quantile(level: float) -> float:
    """Half-width in standard errors of a two-sided normal interval."""
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Log of the mean over the first dimension: (S, ...) to (...)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
