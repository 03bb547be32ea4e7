"""Pareto-smoothed importance sampling by ArviZ: the one place that knows its two lines, 0.x and 1.x."""

from __future__ import annotations

import importlib.util
import math
import warnings

import numpy as np
import torch
from torch import Tensor


def _psislw(log_weights: np.ndarray, r_eff: float) -> tuple[np.ndarray, np.ndarray]:
    if importlib.util.find_spec("arviz_stats") is not None:
        from arviz_stats.base import array_stats

        return array_stats.psislw(log_weights, r_eff=r_eff, axis=-1)
    import arviz

    return arviz.psislw(log_weights, reff=r_eff)


def tail_length(num_samples: int) -> int:
    """Number of largest weights, M, to which the Pareto law is fitted: min(S / 5, 3 sqrt S), rounded up."""
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def num_kept(num_samples: int) -> int:
    """How many of the largest weights determine k-hat exactly: five tails, or all of them."""
    return min(num_samples, 5 * tail_length(num_samples))


def fit_pareto_k(top: Tensor, num_samples: int) -> Tensor:
    r"""Shape of the generalised Pareto law in the tail of importance weights, one per datum.

    Args:
        top: The :func:`num_kept` largest log weights, (T, N) in nats, in any order.
        num_samples: S, how many there were in all.

    Returns:
        k-hat, (N,). Minus infinity where the weights are equal: they have no tail. Infinity below 25 samples, of
        which no tail can be fitted, and for one.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance Sampling", 2015, arXiv 1507.02646.
    """
    weights = top.detach().double().cpu().numpy().T
    k = np.full(len(weights), -np.inf)
    # ArviZ normalises by the largest weight; spread at the level of rounding is no tail.
    largest, smallest = weights.max(1), weights.min(1)
    with np.errstate(invalid="ignore"):
        varied = ~(largest - smallest <= 1e-10 * np.maximum(1.0, np.abs(largest)))
    if num_samples == 1:
        k[:] = np.inf
    elif num_samples < 25:
        k[varied] = np.inf
    elif varied.any():
        # r_eff makes ArviZ cut the tail of the kept weights where it would cut that of all S.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, k[varied] = _psislw(weights[varied], top.shape[0] / num_samples)
    return torch.from_numpy(k).to(top.device)
