"""Pareto-smoothed importance sampling (PSIS) by ArviZ, for both of its versions, 0.x and 1.x."""

from __future__ import annotations

import importlib.util
import math
import warnings

import numpy as np
import torch
from torch import Tensor

# A weight smaller than the largest by this many nats is zero in floating point.
_UNDERFLOW = 700.0

# Fewer samples have a tail of five or less, to which ArviZ 1.x fits nothing.
FEWEST_FITTED = 30


# Share of a tail's spread that lies within groups of equal weights, from which on they are not equal but rounded.
_ROUNDED = 0.01


def _psislw(largest: np.ndarray, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's smoothed log weights, up to a constant, and k-hat from the :func:`num_kept` largest ones, (N, T)."""
    if importlib.util.find_spec("arviz_stats") is not None:
        from arviz_stats.base import array_stats

        # 1.x takes log-likelihoods, whose inverse the weights are, and cannot take the log of zero. A small r_eff makes
        # its tail a fifth of what it is given.
        smallest = largest.max(-1, keepdims=True) - _UNDERFLOW
        return array_stats.psislw(-np.maximum(largest, smallest), r_eff=1e-9, axis=-1)
    import arviz

    # This r_eff makes its tail as long as that of all samples.
    return arviz.psislw(largest, reff=largest.shape[-1] / num_samples)


def tail_length(num_samples: int) -> int:
    """Number of largest weights, M, to which the Pareto distribution is fitted: min(S / 5, 3 sqrt S), rounded up."""
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def num_kept(num_samples: int) -> int:
    """How many of the largest weights determine k-hat exactly: five tails, or all of them."""
    return min(num_samples, 5 * tail_length(num_samples))


def fit_pareto_k(top: Tensor, num_samples: int, tolerance: float = 1e-10) -> Tensor:
    r"""Shape of the generalised Pareto distribution in the tail of importance weights, one per data point.

    Args:
        top: The :func:`num_kept` largest log weights, (T, N) in nats, in any order.
        num_samples: S, how many there were in all.
        tolerance: Relative spread that is rounding, and no tail.

    Returns:
        k-hat, (N,). Infinity where nothing can be fitted: below 30 samples, where the tail consists of a few values
        that repeat, which tell nothing of what is rarer, and where the weights are zero.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance Sampling", 2015, arXiv 1507.02646.
    """
    weights = np.sort(top.detach().double().cpu().numpy().T)
    k = np.full(len(weights), np.inf)
    if num_samples >= FEWEST_FITTED:
        fitted = np.isfinite(weights[:, -1]) & ~_tied(weights[:, -tail_length(num_samples) :], tolerance)
        if fitted.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                k[fitted] = _psislw(weights[fitted], num_samples)[1]
    return torch.from_numpy(np.nan_to_num(k, nan=np.inf, posinf=np.inf, neginf=-np.inf)).to(top.device)


def _tied(tail: np.ndarray, tolerance: float) -> np.ndarray:
    """Whether ascending log weights (N, M) are few values that repeat, rather than many that are rounded."""
    with np.errstate(invalid="ignore"):  # weights of zero
        gaps, scale = np.diff(tail), np.maximum(1.0, np.abs(tail[:, -1:]))
        spread = tail[:, -1] - tail[:, 0]
        same = gaps <= 0.25 * tolerance * scale
        rounded = np.where(same, gaps, 0.0).sum(-1) >= _ROUNDED * spread
    few = same.sum(-1) > tail.shape[-1] / 2
    return (spread <= tolerance * scale[:, 0]) | (few & ~rounded)


def smooth_tail(top: Tensor, num_samples: int, tolerance: float = 1e-10) -> Tensor:
    """The largest importance weights, with those in the tail replaced by quantiles of the fitted Pareto distribution.

    Args:
        top: The :func:`num_kept` largest log weights, (T, N) in nats, in any order.
        num_samples: S, how many there were in all; below 30 nothing is smoothed.
        tolerance: Relative spread that is rounding, and no tail.

    Returns:
        (T, N) in nats, ascending; none above the largest raw weight.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance Sampling", 2015, arXiv 1507.02646.
    """
    weights = np.sort(top.detach().double().cpu().numpy().T)
    if num_samples >= FEWEST_FITTED:
        largest, anchor = weights[:, -1], -tail_length(num_samples) - 1
        with np.errstate(invalid="ignore"):
            varied = largest - weights[:, anchor] > tolerance * np.maximum(1.0, np.abs(largest))
        chosen = np.flatnonzero(varied & np.isfinite(weights[:, anchor]))
        if len(chosen):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                smooth = _psislw(weights[chosen], num_samples)[0]
            # The weight below the tail is not smoothed: it gives the constant that ArviZ divides by.
            weights[chosen] = np.sort(smooth + (weights[chosen, anchor] - smooth[:, anchor])[:, None])
    return torch.from_numpy(weights.T.copy()).to(top.device)
