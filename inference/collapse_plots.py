"""Figures of posterior collapse. Each function returns a matplotlib figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from inference.diagnostics import collapse_curve, collapsed

# The epsilon that tables of collapse use.
_TABLE_EPSILON = 0.01
_SIZE = (5.6, 3.6)


def collapse_curve_figure(runs: Mapping[str, Tensor], *, delta: float = 0.01, epsilons: Tensor | None = None) -> Figure:
    """Share of collapsed latents against epsilon, one curve a run.

    Args:
        runs: Divergences (N, K) by name of the run, from :func:`inference.diagnostics.latent_kl`.
        delta: Share of the data that may exceed epsilon.
        epsilons: (E,) positive nats; None takes 300 from 1e-3 to the largest divergence.

    Raises:
        TypeError: See :func:`inference.diagnostics.collapse_curve`.
        ValueError: If there is no run; see :func:`inference.diagnostics.collapse_curve`.
    """
    _check_runs(runs)
    if epsilons is None:
        largest = max(float(kl.max()) for kl in runs.values())
        epsilons = torch.logspace(-3, np.log10(max(2 * largest, 1.0)), 300, dtype=torch.float64)
    figure = Figure(figsize=_SIZE, layout="constrained")
    ax = figure.subplots()
    for i, (name, kl) in enumerate(runs.items()):
        share = 100 * collapse_curve(kl, epsilons, delta)
        # Curves of collapsed runs lie on each other: the first is drawn widest, so that all are seen.
        width = 1.5 + 3.5 * (1 - (i + 1) / len(runs))
        ax.step(epsilons.numpy(), share.numpy(), where="post", linewidth=width, label=name)
    ax.axvline(_TABLE_EPSILON, color="black", linewidth=0.8, linestyle=":", label=f"epsilon = {_TABLE_EPSILON:g}")
    ax.set_xscale("log")
    ax.set_ylim(-4, 104)
    ax.set_xlabel("epsilon (nats)")
    ax.set_ylabel("collapsed latents (%)")
    ax.set_title(f"Latents within epsilon of the prior for {100 * (1 - delta):g}% of the data", fontsize=11)
    ax.legend(fontsize=8, frameon=False)
    return figure


def latent_kl_figure(runs: Mapping[str, Tensor], *, prediction: Tensor | None = None) -> Figure:
    """Mean divergence per latent, the largest first, one line a run; hollow marks are collapsed latents.

    Args:
        runs: Divergences (N, K) by name of the run, from :func:`inference.diagnostics.latent_kl`.
        prediction: Divergences (K,) to compare with, from :func:`inference.diagnostics.predicted_kl`.

    Raises:
        TypeError: See :func:`inference.diagnostics.collapsed`.
        ValueError: If there is no run; see :func:`inference.diagnostics.collapsed`.
    """
    _check_runs(runs)
    figure = Figure(figsize=_SIZE, layout="constrained")
    ax = figure.subplots()
    if prediction is not None:
        ranks = np.arange(1, len(prediction) + 1)
        ax.bar(ranks, prediction.detach().numpy(), color="lightgrey", width=0.8, label="predicted by the spectrum")
    for i, (name, kl) in enumerate(runs.items()):
        mean, order = kl.detach().double().mean(0).sort(descending=True)
        dead, ranks = collapsed(kl)[order].numpy(), np.arange(1, len(mean) + 1)
        (line,) = ax.plot(ranks, mean.numpy(), linewidth=1, color=f"C{i}", label=name)
        for chosen, face in ((~dead, line.get_color()), (dead, "white")):
            ax.plot(ranks[chosen], mean.numpy()[chosen], "o", markersize=4, color=f"C{i}", markerfacecolor=face)
    ax.margins(y=0.04)
    ax.use_sticky_edges = False  # else bars hold the axis at zero and cut the marks there
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("latent, sorted")
    ax.set_ylabel("mean KL to the prior (nats)")
    ax.set_title("What each latent costs (hollow: collapsed)", fontsize=11)
    ax.legend(fontsize=8, frameon=False)
    return figure


def _check_runs(runs: Mapping[str, Tensor]) -> None:
    if not runs:
        raise ValueError("expected at least one run, got none")
