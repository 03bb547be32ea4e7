"""Encoder networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from inference.core.checks import check_count


def mlp(
    in_dim: int,
    out_dim: int,
    hidden: Sequence[int] = (128, 128),
    activation: Callable[[], nn.Module] = nn.SiLU,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """A fully connected network: linear layers with an activation between each two.

    Args:
        in_dim: Width of the input.
        out_dim: Width of the output.
        hidden: Widths of the hidden layers; none makes a linear map.
        activation: Makes one activation layer.
        norm: Makes a normalisation layer of a width, before each activation; for example ``nn.BatchNorm1d``.

    Raises:
        TypeError: If the widths are not a sequence of integers.
        ValueError: If one is below one.
    """
    widths = [in_dim, *hidden_widths(hidden), out_dim]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        if i > 0:
            layers += ([] if norm is None else [norm(a)]) + [activation()]
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


def hidden_widths(hidden: Sequence[int]) -> list[int]:
    """Widths of hidden layers as a list.

    Raises:
        TypeError: If they are not a sequence of integers.
        ValueError: If one is below one.
    """
    if not isinstance(hidden, Iterable) or isinstance(hidden, str):
        raise TypeError(f"expected hidden as the widths of all hidden layers, such as (128, 128), got {hidden!r}")
    widths = list(hidden)
    for width in widths:
        check_count(width, "a hidden width")
    return widths


def halved(size: tuple[int, ...]) -> tuple[int, ...]:
    """The size of a feature map after a convolution of stride two with padding."""
    return tuple((side + 1) // 2 for side in size)


class ConvEncoder(nn.Module):
    """A convolutional encoder from flattened images (N, C H W) to parameters (N, P).

    Args:
        image_shape: (H, W) or (C, H, W).
        out_dim: P, what the guide's family needs: 2 K for :class:`guides.MeanField`.
        channels: Channels of the feature maps, each of half the size of the one before.

    Example:
        >>> import torch
        >>> ConvEncoder((8, 8), 6)(torch.zeros(5, 64)).shape
        torch.Size([5, 6])
    """

    def __init__(self, image_shape: Sequence[int], out_dim: int, channels: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        depth, *size = image_shape if len(image_shape) == 3 else (1, *image_shape)
        layers: list[nn.Module] = [nn.Unflatten(1, (depth, *size))]
        side = tuple(size)
        for a, b in pairwise([depth, *channels]):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU()]
            side = halved(side)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side[0] * side[1], out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Parameters (N, P) from flattened images (N, C H W)."""
        return self.layers(x)
