"""Figure of what each latent of a decoder does. It touches no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from inference.core.checks import check_count
from inference.core.figures import panels

_CELL, _LINES = 0.62, (2.6, 2.0)


@torch.no_grad()
def traversal_figure(
    decode: Callable[[Tensor], Tensor],
    centre: Tensor,
    *,
    reach: float | Tensor = 2.5,
    number: int = 9,
    image: Sequence[int] | None = None,
    latents: Sequence[int] | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Traversals: what a decoder gives where one latent at a time moves and the others stay.

    Args:
        decode: From latents (N, K) to the data's means (N, D), as ``model.decode``.
        centre: Where the others stay, (K,): zero, or the code of a data point. Its dtype and device are the decoder's.
        reach: The moved latent goes from the centre less this to the centre plus this: standard deviations of a
            standard normal prior. Of each latent its own if (K,).
        number: Places at which each latent is decoded.
        image: Height and width of D numbers in grey, or 3, height and width of D in colours from 0 to 1; then a row of
            images a latent, else a panel of curves over the columns.
        latents: Which latents are moved, a row or panel each; all if None.
        figure: A figure or subfigure to draw into; a new one if None.

    Raises:
        TypeError: If ``number`` is not an integer.
        ValueError: If the centre is no vector, a latent is none of its own, the reach is not positive, there are fewer
            than two places, or the image has not as many pixels as the data have columns.
    """
    check_count(number, "number", 2)
    moved = list(range(centre.numel()) if latents is None else latents)
    reaches = torch.as_tensor(reach).to(centre)
    if (
        centre.dim() != 1
        or reaches.shape not in ((), centre.shape)
        or not bool((reaches > 0).all())
        or not moved
        or not all(0 <= k < len(centre) for k in moved)
    ):
        raise ValueError(
            "expected a centre of shape (K,), latents of 0 to K - 1 and a positive reach, one or K, got "
            f"{tuple(centre.shape)}, {moved} and {reach}"
        )
    offsets = torch.linspace(-1, 1, number).to(centre) * reaches.expand_as(centre)[moved].unsqueeze(-1)
    places = centre.repeat(len(moved), number, 1)
    for row, k in enumerate(moved):
        places[row, :, k] += offsets[row]
    means = decode(places.flatten(0, 1)).reshape(len(moved), number, -1).cpu()
    if image is None:
        return _draw_curves(means, moved, offsets.tolist(), figure)
    if (len(image) != 2 and (len(image) != 3 or image[0] != 3)) or math.prod(image) != means.shape[-1]:
        raise ValueError(f"expected an image's height and width of {means.shape[-1]} pixels, got {tuple(image)}")
    return _draw_images(means.unflatten(-1, tuple(image)), moved, offsets.tolist(), figure)


def _draw_images(
    images: Tensor, moved: Sequence[int], offsets: Sequence[Sequence[float]], figure: Figure | None
) -> Figure:
    """A row of images a latent, all on one scale of grey or in colours; offsets below each row where they differ."""
    rows, columns = images.shape[:2]
    size = (_CELL * columns + 0.5, _CELL * rows * images.shape[-2] / images.shape[-1] + 0.4)
    figure, axes = panels(figure, rows, columns, size)
    low, high = float(images.min()), float(images.max())
    for ax, picture in zip(axes, images.flatten(0, 1), strict=True):
        if picture.dim() == 3:
            ax.imshow(picture.movedim(0, -1).clamp(0, 1).numpy())
        else:
            ax.imshow(picture.numpy(), cmap="gray", vmin=low, vmax=high)
        ax.set(xticks=[], yticks=[])
    for row, k in enumerate(moved):
        axes[row * columns].set_ylabel(_name(k), rotation=0, ha="right", va="center")
    same = all(own == offsets[0] for own in offsets)
    for row in range(rows - 1 if same else 0, rows):
        for ax, offset in zip(axes[row * columns : (row + 1) * columns], offsets[row], strict=True):
            ax.set_xlabel(f"{offset:+.1f}" if same else f"{offset:+.2f}", fontsize=8)
    return figure


def _draw_curves(
    means: Tensor, moved: Sequence[int], offsets: Sequence[Sequence[float]], figure: Figure | None
) -> Figure:
    """A panel a latent: the means over the data's columns, from dark to light as it grows."""
    figure, axes = panels(figure, 1, len(moved), (_LINES[0] * len(moved), _LINES[1]), sharey=True)
    shades = colormaps["viridis"]
    for ax, curves, k, own in zip(axes, means, moved, offsets, strict=True):
        for curve, place in zip(curves, torch.linspace(0, 0.9, len(curves)).tolist(), strict=True):
            ax.plot(range(1, len(curve) + 1), curve.numpy(), color=shades(place), linewidth=1)
        ax.set_title(f"{_name(k)} by {own[0]:+.1f} to {own[-1]:+.1f}", fontsize=9)
        ax.set_xlabel("column of the data")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel(r"$E[x \mid z]$")
    return figure


def _name(k: int) -> str:
    return f"$z_{{{k + 1}}}$"
