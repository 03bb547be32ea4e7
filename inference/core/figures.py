"""One style for all figures: colours that the colour-blind tell apart, and a figure that shows itself in a notebook."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from inference.core.files import atomic_path

# Okabe, Ito, "Color Universal Design", 2008.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
BAND = "lightgrey"

_DPI, _SCREEN = 130, 90
# Letters of a legend in an inch, nearly.
_LETTERS = 15
_COMMANDS = re.compile(r"\\[a-z]+|[${}]")


class _Shown(Figure):
    """A figure that a notebook shows without pyplot, which would keep every figure alive."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_SCREEN)
        return buffer.getvalue()


def colour(place: int) -> str:
    """The colour of the curve at a place."""
    return COLOURS[place % len(COLOURS)]


def check_result(result: Any, kind: type) -> None:
    """Refuse anything but a result of a kind.

    Raises:
        TypeError: With the kind that was expected.
    """
    if not isinstance(result, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(result).__name__}")


def check_named(results: Any, kind: type = object) -> None:
    """Refuse anything but results of a kind by name.

    Raises:
        TypeError: With what was expected.
    """
    if not isinstance(results, Mapping):
        one = "result" if kind is object else kind.__name__
        raise TypeError(f"expected a mapping, as in {{'mine': {one}}}, got {type(results).__name__}")
    for result in results.values():
        check_result(result, kind)


def one_panel(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes that were given, or those of a new figure of a size in inches.

    Raises:
        TypeError: If others were given.
    """
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(f"expected ax as axes of matplotlib, such as figure.subplots() gives, got {type(ax).__name__}")
    return _Shown(figsize=size, layout="constrained").subplots() if ax is None else ax


def panels(
    figure: Figure | None, rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure, the one that was given or a new one of a size in inches, and its axes in reading order.

    Raises:
        TypeError: If something else was given.
    """
    if figure is not None and not isinstance(figure, FigureBase):
        raise TypeError(f"expected figure as a figure or subfigure of matplotlib, got {type(figure).__name__}")
    figure = _Shown(figsize=size, layout="constrained") if figure is None else figure
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def figure_of(ax: Axes) -> Any:
    """The figure, or part of one, that axes stand in."""
    return ax.figure


def legend_above(ax: Axes, handles: Mapping[str, Artist] | None = None) -> None:
    """A legend of each label once, above the axes, where it covers nothing."""
    handles = labelled(ax) if handles is None else handles
    room = _LETTERS * ax.figure.bbox.width / ax.figure.dpi
    columns = int(room / (6 + max(len(_COMMANDS.sub("", label)) for label in handles)))
    ax.legend(
        list(handles.values()),
        list(handles),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.3,
        ncols=max(1, min(columns, len(handles))),
        columnspacing=1.2,
        fontsize=8,
        frameon=False,
    )


def labelled(*axes: Axes) -> dict[str, Artist]:
    """What is drawn in axes, each label once."""
    drawn = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes]
    return {str(label): handle for entries in drawn for handle, label in entries}


def grid_of(number: int, most: int = 4) -> tuple[int, int]:
    """Rows and columns of so many panels, the last row as full as can be."""
    rows = -(-number // most)
    return rows, -(-number // rows)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, atomically; the suffix chooses the format.

    Args:
        figure: The figure.
        path: File to replace.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
