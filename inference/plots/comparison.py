"""Figures of a comparison. Each function returns a matplotlib figure and touches no global state."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from torch import Tensor

from inference.comparison.paired_differences import principal_map, splits_of
from inference.comparison.tables import least_below_evidence
from inference.core.estimates import normal_quantile
from inference.core.files import atomic_path
from inference.plots.calibration import _check

# Pareto k: finite variance below the first, trustworthy below the second, finite mean below the third.
K_LEVELS = (0.0, 0.5, 0.7, 1.0)
_PANEL = 3.4


def _panels(
    dataset: xr.Dataset, title: str, draw: Callable[[Axes, xr.Dataset], None], *, square: bool = False
) -> Figure:
    """One panel per guide; ``draw`` fills it from the guide's slice of the first seed."""
    names = [str(name) for name in dataset["guide"].values]
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = Figure(
        figsize=(_PANEL * columns, (_PANEL if square else 0.85 * _PANEL) * rows + 0.4), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, name in zip(axes, names):
        draw(ax, dataset.isel(seed=0).sel(guide=name))
        ax.set_title(name, fontsize=10)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=11)
    return figure


def gap_histogram(tree: xr.DataTree, split: str = "train") -> Figure:
    """Histogram over the data of the gap, evidence minus ELBO, one panel per guide; guides of one evidence share axes.

    Where nothing bounds the mean evidence from above, the mean gap is the lower bound that :func:`table` prints.

    Args:
        tree: What :func:`inference.compare` returned.
        split: ``"train"`` or ``"held_out"``.
    """

    dataset = _split(tree, split)
    first = dataset.isel(seed=0)
    least = least_below_evidence(first, "elbo", normal_quantile(float(tree.attrs["level"])))

    def bins_of(one: xr.Dataset) -> list[float]:
        same = np.isclose(first["mean_evidence"], one["mean_evidence"], rtol=1e-9)
        ends = np.append(first["gap"].values[same].ravel(), 0.0)
        margin = max(0.01 * np.ptp(ends), 1e-9)
        return list(np.linspace(ends.min() - margin, ends.max() + margin, 61))

    def draw(ax: Axes, one: xr.Dataset) -> None:
        gap, is_open = one["gap"].values, np.isinf(one["mean_evidence_upper"])
        mean = float(least.sel(guide=one["guide"])) if is_open else gap.mean() + 0.0
        ax.hist(gap, bins=bins_of(one), color="tab:blue", alpha=0.8)
        ax.axvline(mean, color="black", linewidth=1, label=f"mean {'≥ ' if is_open else ''}{mean:.4f}")
        ax.set_xlabel("gap, log p - ELBO (nats)")
        ax.set_ylabel("data")
        ax.legend(fontsize=8, frameon=False)

    return _panels(dataset, f"Gap between evidence and ELBO ({split})", draw)


def elbo_against_evidence(tree: xr.DataTree, split: str = "train") -> Figure:
    """ELBO against evidence of each data point, one panel per guide; the inset shows the distance to the diagonal.

    An arrow points to the right where nothing bounds the evidence from above.

    Args:
        tree: What :func:`inference.compare` returned.
        split: ``"train"`` or ``"held_out"``.
    """

    def draw(ax: Axes, one: xr.Dataset) -> None:
        evidence, elbo = one["evidence"].values, one["elbo"].values
        ends = [min(evidence.min(), elbo.min()), max(evidence.max(), elbo.max())]
        ax.plot(ends, ends, color="black", linewidth=0.8, label="ELBO = log p")
        ax.plot(evidence, elbo, ".", markersize=2.5, alpha=0.5, color="tab:blue")
        unbounded = np.isinf(one["evidence_upper"].values)
        if unbounded.any():
            label = "log p lies right of it"
            ax.scatter(evidence[unbounded], elbo[unbounded], s=12, marker=">", color="tab:red", label=label)
        inset = ax.inset_axes((0.5, 0.12, 0.46, 0.34))
        inset.axhline(0.0, color="black", linewidth=0.8)
        inset.plot(evidence, elbo - evidence, ".", markersize=1.5, alpha=0.5, color="tab:blue")
        inset.set_ylim(min((elbo - evidence).min(), -1e-3) * 1.1, max((elbo - evidence).max(), 1e-3) * 1.1)
        inset.tick_params(labelsize=6)
        inset.set_title("ELBO - log p", fontsize=7, pad=2)
        ax.set_xlabel("log p(x) (nats)")
        ax.set_ylabel("ELBO (nats)")
        ax.legend(fontsize=8, frameon=False)

    return _panels(_split(tree, split), f"ELBO and evidence per data point ({split})", draw, square=True)


def pareto_k_map(tree: xr.DataTree, split: str = "train") -> Figure:
    """The data in their first two principal axes, coloured by Pareto k-hat, which shows where the guide is unreliable.

    Args:
        tree: What :func:`inference.compare` returned.
        split: ``"train"`` or ``"held_out"``.
    """
    return _k_map(_split(tree, split), split)


def _k_map(dataset: xr.Dataset, split: str) -> Figure:
    place = dataset["map"].values
    drawn = []

    def draw(ax: Axes, one: xr.Dataset) -> None:
        k = np.clip(one["pareto_k"].values, -1.0, 1.5)
        norm = BoundaryNorm([-1.0, *K_LEVELS, 1.5], 256)
        drawn.append(ax.scatter(place[:, 0], place[:, 1], c=k, s=5, cmap="viridis", norm=norm))
        ax.set_xlabel("principal axis 1")
        ax.set_ylabel("principal axis 2")

    figure = _panels(dataset, f"Pareto k of the importance weights ({split})", draw, square=True)
    bar = figure.colorbar(drawn[-1], ax=figure.axes, shrink=0.8, ticks=K_LEVELS)
    bar.set_label("k-hat (below 0: lighter tails than any power)")
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, atomically; the suffix chooses the format.

    Args:
        figure: The figure.
        path: File to replace.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _split(tree: xr.DataTree, split: str) -> xr.Dataset:
    splits = splits_of(tree)
    if split not in splits:
        raise ValueError(f"expected split to be one of {list(splits)}, got {split!r}")
    return splits[split]


def pareto_k_figure(x: Tensor, pareto_k: Mapping[str, Tensor]) -> Figure:
    """The data in their first two principal axes, coloured by k-hat, one panel per guide.

    Args:
        x: Data, (N, D).
        pareto_k: k-hat per data point by name of the guide, (N,), such as
            ``inference.pareto_k(log_weights(...)).value``.

    Raises:
        ValueError: If there is none, or not one k-hat per data point.
    """
    _check(pareto_k)
    for name, k in pareto_k.items():
        if k.shape != (len(x),):
            raise ValueError(f"expected k-hat of {name!r} of shape ({len(x)},), got {tuple(k.shape)}")
    values = np.stack([k.cpu().numpy() for k in pareto_k.values()])[None]
    dataset = xr.Dataset(
        {
            "pareto_k": (("seed", "guide", "datum"), values),
            "map": (("datum", "axis"), principal_map(x).cpu().numpy()),
        },
        coords={"guide": list(pareto_k)},
    )
    return _k_map(dataset, "data")
