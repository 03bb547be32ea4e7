"""Figure of what each latent of a decoder does. It touches no global state."""

from __future__ import annotations

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
    reach: float = 2.5,
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
            standard normal prior.
        number: Places at which each latent is decoded.
        image: Height and width, D numbers; then a row of images a latent, else a panel of curves over the columns.
        latents: Which latents are moved, a row or panel each; all if None.
        figure: A figure or subfigure to draw into; a new one if None.

    Raises:
        TypeError: If ``number`` is not an integer.
        ValueError: If the centre is no vector, a latent is none of its own, the reach is not positive, there are fewer
            than two places, or the image has not as many pixels as the data have columns.
    """
    check_count(number, "number", 2)
    moved = list(range(centre.numel()) if latents is None else latents)
    if centre.dim() != 1 or not reach > 0 or not moved or not all(0 <= k < len(centre) for k in moved):
        raise ValueError(
            "expected a centre of shape (K,), latents of 0 to K - 1 and a positive reach, got "
            f"{tuple(centre.shape)}, {moved} and {reach}"
        )
    offsets = torch.linspace(-reach, reach, number).to(centre)
    places = centre.repeat(len(moved), number, 1)
    for row, k in enumerate(moved):
        places[row, :, k] += offsets
    means = decode(places.flatten(0, 1)).reshape(len(moved), number, -1).cpu()
    if image is None:
        return _draw_curves(means, moved, offsets.tolist(), figure)
    if len(image) != 2 or image[0] * image[1] != means.shape[-1]:
        raise ValueError(f"expected an image's height and width of {means.shape[-1]} pixels, got {tuple(image)}")
    return _draw_images(means.unflatten(-1, tuple(image)), moved, offsets.tolist(), figure)


def _draw_images(images: Tensor, moved: Sequence[int], offsets: Sequence[float], figure: Figure | None) -> Figure:
    """A row of images a latent, all on one scale of grey."""
    rows, columns = images.shape[:2]
    size = (_CELL * columns + 0.5, _CELL * rows * images.shape[2] / images.shape[3] + 0.4)
    figure, axes = panels(figure, rows, columns, size)
    low, high = float(images.min()), float(images.max())
    for ax, picture in zip(axes, images.flatten(0, 1), strict=True):
        ax.imshow(picture.numpy(), cmap="gray", vmin=low, vmax=high)
        ax.set(xticks=[], yticks=[])
    for row, k in enumerate(moved):
        axes[row * columns].set_ylabel(_name(k), rotation=0, ha="right", va="center")
    for ax, offset in zip(axes[-columns:], offsets, strict=True):
        ax.set_xlabel(f"{offset:+.1f}", fontsize=8)
    return figure


def _draw_curves(means: Tensor, moved: Sequence[int], offsets: Sequence[float], figure: Figure | None) -> Figure:
    """A panel a latent: the means over the data's columns, from dark to light as it grows."""
    figure, axes = panels(figure, 1, len(moved), (_LINES[0] * len(moved), _LINES[1]), sharey=True)
    shades = colormaps["viridis"]
    for ax, curves, k in zip(axes, means, moved, strict=True):
        for curve, place in zip(curves, torch.linspace(0, 0.9, len(curves)).tolist(), strict=True):
            ax.plot(range(1, len(curve) + 1), curve.numpy(), color=shades(place), linewidth=1)
        ax.set_title(f"{_name(k)} by {offsets[0]:+.1f} to {offsets[-1]:+.1f}", fontsize=9)
        ax.set_xlabel("column of the data")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel(r"$E[x \mid z]$")
    return figure


def _name(k: int) -> str:
    return f"$z_{{{k + 1}}}$"
