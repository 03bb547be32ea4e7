"""The rate-distortion plane as a figure. Each function returns a matplotlib figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.core.figures import BAND, check_named, colour, figure_of, one_panel
from inference.information.curve import CurvePoint, lower_hull


def rate_distortion_figure(
    curves: Mapping[str, Sequence[CurvePoint]],
    *,
    entropy: float | None = None,
    truth: tuple[Sequence[float], Sequence[float]] | None = None,
    title: str = "Rate and distortion",
    ax: Axes | None = None,
) -> Figure:
    """Curves in the plane with their intervals and hulls, the diagonal D = H - R, and a known frontier.

    Args:
        curves: Points by name of the family.
        entropy: H of discrete data: draws the diagonal and shades what no model can reach.
        truth: Rates and distortions of a frontier in closed form.
        title: Title of the figure.
        ax: Where to draw; a new figure if None.

    Raises:
        ValueError: If there is no point.
    """
    check_named(curves, Sequence)
    if not any(curves.values()):
        raise ValueError("expected at least one point, got none")
    ax = one_panel(ax, (5.8, 4.4))
    if truth is not None:
        ax.plot(*truth, color="black", linewidth=1, label="closed form")
    if entropy is not None:
        ax.plot([0, entropy], [entropy, 0], color="black", linewidth=0.8, linestyle="--", label="$D = H - R$")
        ax.fill_between([0, entropy], [entropy, 0], color=BAND, alpha=0.5, linewidth=0)
    for i, (name, points) in enumerate(curves.items()):
        _draw(ax, name, points, colour(i))
    ax.set_xlabel("rate $R$ (nats)")
    ax.set_ylabel("distortion $D$ (nats)")
    ax.set_title(title, fontsize=11)
    ax.legend(fontsize=8, frameon=False)
    return figure_of(ax)


def _draw(ax: Axes, name: str, points: Sequence[CurvePoint], shade: str) -> None:
    centres = np.array([[p.rate.value, p.distortion.value] for p in points])
    ends = np.array([[[t.lower, t.upper] for t in (p.rate, p.distortion)] for p in points])
    x_error, y_error = np.abs(ends - centres[:, :, None]).transpose(1, 2, 0)
    rates, distortions = centres.T
    ax.errorbar(rates, distortions, y_error, x_error, "o", markersize=4, color=shade, elinewidth=1, label=name)
    hull = centres[lower_hull(*centres.T.tolist())]
    ax.plot(*hull.T, color=shade, linewidth=1, alpha=0.6)
