"""Encoder networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn


def mlp(
    in_dim: int, out_dim: int, hidden: Sequence[int] = (128, 128), activation: Callable[[], nn.Module] = nn.SiLU
) -> nn.Sequential:
    """A fully connected network: linear layers with an activation between each two.

    Args:
        in_dim: Width of the input.
        out_dim: Width of the output.
        hidden: Widths of the hidden layers; none makes a linear map.
        activation: Makes one activation layer.
    """
    widths = [in_dim, *hidden, out_dim]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b)] if i == 0 else [activation(), nn.Linear(a, b)]
    return nn.Sequential(*layers)
