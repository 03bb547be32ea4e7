"""Figures of posterior collapse. Each function returns a matplotlib figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from inference.core.figures import COLOURS, check_named, colour, figure_of, legend_above, one_panel, panels
from inference.diagnostics.collapse import collapse_curve, collapsed

# The epsilon that tables of collapse use.
_TABLE_EPSILON = 0.01
_SIZE = (5.6, 3.6)


def collapse_curve_figure(
    runs: Mapping[str, Tensor],
    *,
    delta: float = 0.01,
    epsilons: Tensor | None = None,
    marked: float = _TABLE_EPSILON,
    ax: Axes | None = None,
) -> Figure:
    """Share of collapsed latents against epsilon, one curve per run.

    Args:
        runs: Divergences (N, K) by name of the run, from :func:`inference.latent_kl`.
        delta: Share of the data that may exceed epsilon.
        epsilons: (E,) positive nats; None takes 300 from 1e-3 to the largest divergence.
        marked: The epsilon of the table that the figure goes with.
        ax: Where to draw; a new figure if None.

    Raises:
        TypeError: See :func:`inference.collapse_curve`.
        ValueError: If there is no run; see :func:`inference.collapse_curve`.
    """
    _check_runs(runs)
    if epsilons is None:
        largest = max(float(kl.max()) for kl in runs.values())
        epsilons = torch.logspace(-3, np.log10(max(2 * largest, 1.0)), 300, dtype=torch.float64)
    ax = one_panel(ax, _SIZE)
    for i, (name, kl) in enumerate(runs.items()):
        share = 100 * collapse_curve(kl, epsilons, delta)
        # Curves of collapsed runs lie on each other: the first is drawn widest, so that all are seen.
        width = 1.5 + 3.5 * (1 - (i + 1) / len(runs))
        ax.step(epsilons.numpy(), share.numpy(), where="post", linewidth=width, color=colour(i), label=name)
    ax.axvline(marked, color="black", linewidth=0.8, linestyle=":", label=rf"$\varepsilon$ = {marked:g}")
    ax.set_xscale("log")
    ax.set_ylim(-4, 104)
    kept = f"{100 * (1 - delta):g} %"
    ax.set_xlabel(rf"$\varepsilon$ (nats); collapsed: within $\varepsilon$ of the prior for {kept} of the data")
    ax.set_ylabel("collapsed latents (%)")
    legend_above(ax)
    return figure_of(ax)


def latent_kl_figure(runs: Mapping[str, Tensor], *, prediction: Tensor | None = None, ax: Axes | None = None) -> Figure:
    """Mean divergence per latent, the largest first, one line per run; hollow marks are collapsed latents.

    Args:
        runs: Divergences (N, K) by name of the run, from :func:`inference.latent_kl`.
        prediction: Divergences (K,) to compare with, from :func:`inference.diagnostics.collapse.predicted_kl`.
        ax: Where to draw; a new figure if None.

    Raises:
        TypeError: See :func:`inference.collapsed`.
        ValueError: If there is no run; see :func:`inference.collapsed`.
    """
    _check_runs(runs)
    ax = one_panel(ax, _SIZE)
    if prediction is not None:
        ranks = np.arange(1, len(prediction) + 1)
        ax.bar(ranks, prediction.detach().numpy(), color="lightgrey", width=0.8, label="predicted by the spectrum")
    for i, (name, kl) in enumerate(runs.items()):
        mean, order = kl.detach().double().mean(0).sort(descending=True)
        dead, ranks = collapsed(kl)[order].numpy(), np.arange(1, len(mean) + 1)
        (line,) = ax.plot(ranks, mean.numpy(), linewidth=1, color=colour(i), label=name)
        for chosen, face in ((~dead, line.get_color()), (dead, "white")):
            ax.plot(ranks[chosen], mean.numpy()[chosen], "o", markersize=4, color=colour(i), markerfacecolor=face)
    ax.margins(y=0.04)
    ax.use_sticky_edges = False  # else bars hold the axis at zero and cut the marks there
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("latent, sorted (hollow: collapsed)")
    ax.set_ylabel(r"mean $\mathrm{KL}(q \| p)$ of the latent (nats)")
    legend_above(ax)
    return figure_of(ax)


def alive_figure(runs: Mapping[str, Tensor], *, ax: Axes | None = None) -> Figure:
    """Measured number of live latents against the predicted one, one colour per kind of model.

    The area of a mark is the number of runs there; on the diagonal the prediction is right.

    Args:
        runs: Predicted and measured numbers, (M, 2), by name of the kind of model; the prediction is
            for example that of :func:`inference.diagnostics.collapse.predicted_alive`.
        ax: Where to draw; a new figure if None.

    Raises:
        ValueError: If there is no run, or one is not (M, 2).
    """
    _check_runs(runs)
    for name, points in runs.items():
        if points.dim() != 2 or points.shape[1] != 2 or len(points) == 0:
            raise ValueError(f"expected points of shape (M, 2) for {name!r}, got {tuple(points.shape)}")
    ax = one_panel(ax, (4.6, 4.4))
    ends = [-0.5, max(float(points.max()) for points in runs.values()) + 0.5]
    ax.plot(ends, ends, color="grey", linewidth=0.8, linestyle=":", label="as predicted")
    for i, (name, points) in enumerate(runs.items()):
        places, counts = np.unique(points.detach().cpu().numpy(), axis=0, return_counts=True)
        ax.scatter(places[:, 0], places[:, 1], 30 * counts, color=colour(i), alpha=0.6, linewidth=0)
        ax.scatter([], [], 30, color=colour(i), alpha=0.6, linewidth=0, label=name)
    ax.set_aspect("equal")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(r"eigenvalues above $\sigma^2$, at most $K$")
    ax.set_ylabel("latents not collapsed (area: number of runs)")
    legend_above(ax)
    return figure_of(ax)


def landscape_figure(
    grid: Tensor,
    points: Mapping[str, tuple[Mapping[str, Mapping[str, Tensor]], Tensor]],
    *,
    plane_labels: tuple[str, str],
    figure: Figure | None = None,
) -> Figure:
    """Objectives around a point along several directions, and one of them over a plane; one column per panel.

    Args:
        grid: Steps away from the point, (G,).
        points: By title of a panel, the lines and the plane (G, G). Lines are values (G,) by direction and then by
            objective: the first objective is drawn broad and pale, further ones dashed. All are relative to the
            point's own value.
        plane_labels: Names of the plane's two directions, first index first.
        figure: A figure or subfigure to draw into; a new one if None.

    Raises:
        ValueError: If there is no panel.
    """
    _check_runs(points)
    figure, axes = panels(figure, 2, len(points), (3.5 * len(points), 7.6))
    heights = torch.stack([plane for _, plane in points.values()])
    levels = np.linspace(float(heights.min()), float(heights.max()), 24)
    for (title, (lines, plane)), top, bottom in zip(points.items(), axes[: len(points)], axes[len(points) :]):
        for i, (direction, values) in enumerate(lines.items()):
            for j, (objective, value) in enumerate(values.items()):
                style = {"linestyle": "--"} if j else {"linewidth": 3, "alpha": 0.35}
                top.plot(grid, value, color=colour(i), label=f"{objective}, {direction}", **style)
        colours = bottom.contourf(grid, grid, plane.mT, levels=levels, cmap="viridis")
        bottom.plot(0, 0, "+", color=COLOURS[3], markersize=10)
        top.set(title=title, xlabel="step", ylabel="above the starting point (nats)")
        bottom.set(xlabel=f"step to {plane_labels[0]}", ylabel=f"step to {plane_labels[1]}")
    bar = figure.colorbar(colours, ax=list(axes), location="bottom", label="above the cross (nats)", shrink=0.5)
    bar.locator = MaxNLocator(5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def threshold_figure(curves: Mapping[str, tuple[Tensor, Tensor, float, float]], *, ax: Axes | None = None) -> Figure:
    """Smallest curvature of collapsed latents against the variance of the noise: below zero they wake up.

    Args:
        curves: By name: variances (G,), curvatures (G,), the eigenvalue where theory has the sign change (dotted), and
            where it was found (circle).
        ax: Where to draw; a new figure if None.

    Raises:
        ValueError: If there is no curve.
    """
    _check_runs(curves)
    ax = one_panel(ax, (7, 4.4))
    ax.axhline(0, color="black", linewidth=0.8)
    for i, (name, (grid, curve, eigenvalue, found)) in enumerate(curves.items()):
        ax.plot(grid, curve, ".-", markersize=4, color=colour(i), label=name)
        ax.axvline(eigenvalue, color=colour(i), linewidth=0.8, linestyle=":")
        ax.plot(found, 0, "o", color=colour(i), markerfacecolor="none", markersize=9)
    ax.set(
        xlabel=r"$\sigma^2$ (dotted: eigenvalue; circle: where it was found)",
        ylabel=r"$\sigma^2 \times$ smallest curvature",
    )
    legend_above(ax)
    return figure_of(ax)


def _check_runs(runs: Mapping[str, Any]) -> None:
    check_named(runs)
    if not runs:
        raise ValueError("expected at least one run, got none")
