"""Adjusting p-values of several tests."""

from __future__ import annotations

import torch
from torch import Tensor


def holm(p_values: Tensor) -> Tensor:
    """Holm-Bonferroni adjustment of p-values (Q,) for their number.

    References:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979, Scand. J. Statist. 6.
    """
    ordered, order = p_values.sort()
    factors = torch.arange(len(p_values), 0, -1, dtype=p_values.dtype, device=p_values.device)
    adjusted = (ordered * factors).cummax(0)[0].clamp(max=1)
    return torch.empty_like(adjusted).scatter(0, order, adjusted)
