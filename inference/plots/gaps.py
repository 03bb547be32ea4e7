"""Figure of the gaps of several guides and their parts. It touches no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.comparison.gap_decomposition import Gap
from inference.core.figures import COLOURS, check_named, labelled, panels

_HEIGHT, _WIDTH = 0.34, 7.5


def gap_parts_figure(
    groups: Mapping[str, Mapping[str, Gap]],
    predicted: Mapping[str, Mapping[str, float]] | None = None,
    *,
    figure: Figure | None = None,
) -> Figure:
    """Mean gap of each guide as a bar of approximation and amortisation gap, one panel with an axis of its own a model.

    The whisker is the interval of the whole gap, with an arrow where nothing bounds it from above. The parts are those
    that the refit found: a better one moves the border between them to the left.

    Args:
        groups: Name of a model to name of a guide to its gap.
        predicted: Likewise the predicted approximation gap, in nats, drawn as a tick where there is one.
        figure: A figure or subfigure to draw into; a new one if None.

    Raises:
        ValueError: If there is no gap.
    """
    check_named(groups)
    for gaps in groups.values():
        check_named(gaps, Gap)
    if not groups or not all(groups.values()):
        raise ValueError("expected at least one gap of each model, got none")
    sizes = [len(gaps) for gaps in groups.values()]
    height = _HEIGHT * sum(sizes) + 0.75 * len(groups) + 0.6
    ratios = [size + 0.6 for size in sizes]
    figure, axes = panels(figure, len(groups), 1, (_WIDTH, height), height_ratios=ratios)
    for ax, (model, gaps) in zip(axes, groups.items(), strict=True):
        _draw_model(ax, gaps, {} if predicted is None else predicted.get(model, {}))
        ax.set_title(model, fontsize=10, loc="left")
    axes[-1].set_xlabel(r"gap $\log p(x) - \mathrm{ELBO}$, mean over the data (nats per data point)")
    handles = dict(reversed(labelled(*axes).items()))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_model(ax: Axes, gaps: Mapping[str, Gap], predicted: Mapping[str, float]) -> None:
    for place, (name, gap) in enumerate(gaps.items()):
        _draw_bar(ax, place, gap)
        if name in predicted:
            ends = [place - 0.36, place + 0.36]
            ax.plot([predicted[name]] * 2, ends, color="black", linewidth=2, label="predicted approximation")
    ax.set_yticks(range(len(gaps)), list(gaps), fontsize=9)
    ax.set_ylim(len(gaps) - 0.45, -0.55)
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_bar(ax: Axes, place: int, gap: Gap) -> None:
    """Parts side by side up to the gap, which cannot be negative, and the interval of the gap."""
    total, *parts = gap.mean.values()
    start = 0.0
    colours, names = COLOURS[:2], ("approximation", gap.second)
    for part, colour, name in zip(parts, colours, names, strict=False):
        ax.barh(place, max(part.value, 0.0), left=start, height=0.62, color=colour, label=f"{name} gap")
        start += max(part.value, 0.0)
    if not parts:
        ax.barh(place, max(total.value, 0.0), height=0.62, color="tab:grey", label="gap")
    value, open_end = max(total.value, 0.0), math.isinf(total.upper)
    above = 0.0 if open_end else max(total.upper - value, 0.0)
    ax.errorbar(
        value,
        place,
        xerr=[[max(value - total.lower, 0.0)], [above]],
        color="black",
        linewidth=1,
        capsize=3,
        label="interval of the gap",
    )
    if open_end:
        ax.plot(value, place, ">", color="black", markersize=6, label="no upper end")
