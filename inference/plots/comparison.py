"""Figures of a comparison. Each function returns a matplotlib figure and touches no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from inference.comparison.paired_differences import splits_of
from inference.comparison.tables import error_of_mean, least_below_evidence
from inference.core.estimates import normal_quantile
from inference.core.figures import BAND, COLOURS, figure_of, grid_of, labelled, legend_above, one_panel, panels

# Pareto k: finite variance below the first, trustworthy below the second, finite mean below the third.
K_LEVELS = (0.5, 0.7, 1.0)
_CLASSES = (
    (r"$\hat k \leq 0.5$", "#E3E9EE"),
    (r"$0.5 < \hat k \leq 0.7$", COLOURS[5]),
    (r"$0.7 < \hat k \leq 1$", COLOURS[1]),
    (r"$\hat k > 1$", COLOURS[3]),
    ("unknown", "white"),
)
_PANEL, _ROW, _WIDTH = 3.4, 0.36, 7.2
# A logarithmic axis where the gaps differ by more than this factor; below so many nats it is linear.
_WIDE, _LINEAR = 20.0, 1e-3


def gap_figure(tree: xr.DataTree, split: str = "train", *, ax: Axes | None = None) -> Figure:
    """Mean gap of each guide as a dot with its 95 % interval, on a line that holds 90 % of the data.

    Where nothing bounds the mean evidence from above, a triangle stands at the lower bound that :func:`table` prints.

    Args:
        tree: What :func:`inference.compare` returned, of whose seeds the first is drawn.
        split: ``"train"`` or ``"held_out"``.
        ax: Where to draw; a new figure if None.
    """
    dataset = _split(tree, split).isel(seed=0)
    names = [str(name) for name in dataset["guide"].values]
    ax = one_panel(ax, (_WIDTH, _ROW * len(names) + 1.3))
    middle, lower, upper = _mean_gaps(dataset, normal_quantile(float(tree.attrs["level"])))
    for place, gap in enumerate(dataset["gap"].values):
        ax.plot(np.quantile(gap, [0.05, 0.95]), [place] * 2, color=BAND, linewidth=7, label="90 % of the data")
        if math.isinf(upper[place]):
            ax.plot(lower[place], place, ">", color=COLOURS[3], markersize=7, label="mean, at least")
            continue
        whisker = [[middle[place] - lower[place]], [upper[place] - middle[place]]]
        ax.errorbar(
            middle[place], place, xerr=whisker, fmt="o", color=COLOURS[0], capsize=3, label="mean with interval"
        )
    _scale(ax, middle)
    shown = np.where(np.isinf(upper), lower, middle).round(4) + 0.0
    for place, value in enumerate(shown):
        text = f"{'≥ ' if math.isinf(upper[place]) else ''}{value:.4f}"
        ax.text(1.01, place, text, transform=ax.get_yaxis_transform(), verticalalignment="center", fontsize=9)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel(rf"gap $\log p(x) - \mathrm{{ELBO}}$ (nats per data point, {split})")
    legend_above(ax)
    return figure_of(ax)


def _mean_gaps(dataset: xr.Dataset, width: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean gaps with both ends of their intervals; the lower one is that of a bound where there is no upper one."""
    elbo, error = dataset["elbo"].mean("datum"), width * error_of_mean(dataset, "elbo")
    middle = dataset["mean_evidence"] - elbo
    spread = (error**2 + (width * dataset["mean_evidence_se"]) ** 2) ** 0.5
    upper = xr.where(np.isinf(dataset["mean_evidence_upper"]), math.inf, middle + spread)
    lower = xr.where(np.isinf(upper), least_below_evidence(dataset, "elbo", width), middle - spread)
    return middle.values + 0.0, lower.values + 0.0, upper.values + 0.0


def _scale(ax: Axes, means: np.ndarray) -> None:
    positive = means[means > _LINEAR]
    if len(positive) and means.max() > _WIDE * max(means.min(), _LINEAR):
        ax.set_xscale("symlog", linthresh=_LINEAR)
        ax.set_xlim(left=min(means.min(), 0.0))
    ax.grid(axis="x", color=BAND, linewidth=0.5)
    ax.set_axisbelow(True)


def elbo_against_evidence(tree: xr.DataTree, split: str = "train", *, figure: Figure | None = None) -> Figure:
    """ELBO less log p(x) of each data point against log p(x), one panel per guide.

    A triangle points downwards where nothing bounds the evidence from above, so that the difference may be lower.

    Args:
        tree: What :func:`inference.compare` returned, of whose seeds the first is drawn.
        split: ``"train"`` or ``"held_out"``.
        figure: A figure or subfigure to draw into; a new one if None.
    """
    dataset = _split(tree, split).isel(seed=0)
    names = [str(name) for name in dataset["guide"].values]
    rows, columns = grid_of(len(names))
    figure, axes = panels(figure, rows, columns, (_PANEL * columns, 0.85 * _PANEL * rows + 0.6))
    for ax, name in zip(axes, names):
        _draw_differences(ax, dataset.sel(guide=name))
        ax.set_title(name, fontsize=10)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax in axes[: len(names)]:
        ax.set_xlabel(rf"$\log p(x)$ (nats, {split})")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    for ax in axes[: len(names) : columns]:
        ax.set_ylabel(r"$\mathrm{ELBO} - \log p(x)$ (nats)")
    entries = labelled(*axes)
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _draw_differences(ax: Axes, one: xr.Dataset) -> None:
    evidence, elbo = one["evidence"].values, one["elbo"].values
    is_open = np.isinf(one["evidence_upper"].values)
    known, below = ~is_open, "no upper end: lies lower"
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.plot(evidence[known], (elbo - evidence)[known], ".", markersize=3, color=COLOURS[0], label="data point")
    if is_open.any():
        ax.plot(evidence[is_open], (elbo - evidence)[is_open], "v", markersize=4, color=COLOURS[3], label=below)


def pareto_k_shares(
    found: xr.DataTree | Mapping[str, Tensor], split: str = "train", *, ax: Axes | None = None
) -> Figure:
    r"""Shares of the data by Pareto k-hat of their importance weights, one bar per guide; what is bad stands out.

    Args:
        found: What :func:`inference.compare` returned, or k-hat per data point by name of the guide, (N,), such as
            ``inference.pareto_k(log_weights(...)).value``.
        split: ``"train"`` or ``"held_out"`` of a comparison.
        ax: Where to draw; a new figure if None.

    Raises:
        ValueError: If there is no guide, or one has no k-hat.
    """
    shapes = _shapes(found, split)
    if not shapes or not all(k.ndim == 1 and k.size for k in shapes.values()):
        raise ValueError("expected k-hat of at least one guide, of shape (N,), got none")
    ax = one_panel(ax, (_WIDTH, _ROW * len(shapes) + 1.3))
    for place, k in enumerate(shapes.values()):
        kinds = np.where(np.isnan(k), len(K_LEVELS) + 1, np.searchsorted(K_LEVELS, k))
        counts = 100 * np.bincount(kinds, minlength=len(_CLASSES)) / k.size
        starts = np.concatenate([[0.0], counts.cumsum()[:-1]])
        for (label, colour), start, count in zip(_CLASSES, starts, counts):
            if count or label != "unknown":
                ax.barh(place, count, left=start, height=0.7, color=colour, edgecolor="grey", lw=0.4, label=label)
    ax.set_yticks(range(len(shapes)), list(shapes))
    ax.set_ylim(len(shapes) - 0.4, -0.6)
    ax.set_xlim(0, 100)
    ax.set_xlabel(r"share of the data (%), by $\hat k$ of their importance weights")
    legend_above(ax)
    return figure_of(ax)


def _shapes(found: xr.DataTree | Mapping[str, Tensor], split: str) -> dict[str, np.ndarray]:
    if isinstance(found, xr.DataTree):
        dataset = _split(found, split).isel(seed=0)
        return {str(name): dataset["pareto_k"].sel(guide=name).values for name in dataset["guide"].values}
    return {name: k.detach().cpu().numpy() for name, k in found.items()}


def _split(tree: xr.DataTree, split: str) -> xr.Dataset:
    splits = splits_of(tree)
    if split not in splits:
        raise ValueError(f"expected split to be one of {list(splits)}, got {split!r}")
    return splits[split]
