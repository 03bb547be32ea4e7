"""Estimates with a standard error, intervals with a level, and the two functions that both need."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """Monte Carlo estimate per data point, with its standard error.

    Attributes:
        value: The estimate, (N,).
        standard_error: Its standard error, (N,), in the same units; infinite for one sample.
    """

    value: Tensor
    standard_error: Tensor


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
        ValueError: If it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected level between 0 and 1, got {level}")


def normal_quantile(level: float) -> float:
    """Half-width in standard errors of a two-sided normal interval."""
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Log of the mean over the first dimension: (S, ...) to (...)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
