"""Figure of evidence, ELBO and gap along training. It touches no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.comparison.gap_decomposition import Gap
from inference.core.figures import BAND, COLOURS, check_named, figure_of, legend_above, one_panel


def training_gap_figure(gaps: Mapping[int, Gap], *, ax: Axes | None = None) -> Figure:
    """The data set's mean log-evidence and ELBO over the steps of training, and the parts of the gap between them.

    The band is the interval of the mean log-evidence; its lower end has an arrow where nothing bounds it from above.
    Amortisation lies above the ELBO, and approximation above that, as far as the refits found the family's best; noise
    that would have a part end outside of ELBO and log p is not drawn.

    Args:
        gaps: The gap of the same data by step, as of the pairs that :class:`inference.Snapshots` keeps.
        ax: Where to draw; a new figure if None.

    Raises:
        ValueError: If there is no gap.
    """
    check_named(gaps, Gap)
    if not gaps:
        raise ValueError("expected the gap at one step at least, got none")
    steps = sorted(gaps)
    along = [gaps[step] for step in steps]
    ax = one_panel(ax, (5.6, 3.6))
    elbo = np.array([float(gap.elbo.mean()) for gap in along])
    _draw_evidence(ax, steps, along)
    ax.plot(steps, elbo, ".-", color=COLOURS[0], label="ELBO")
    _draw_parts(ax, steps, along, elbo)
    ax.set_xlabel("step")
    ax.set_ylabel("nats per data point")
    legend_above(ax)
    return figure_of(ax)


def _draw_evidence(ax: Axes, steps: list[int], along: list[Gap]) -> None:
    means = [gap.evidence.mean for gap in along]
    upper = [mean.value if math.isinf(mean.upper) else mean.upper for mean in means]
    ax.fill_between(steps, [mean.lower for mean in means], upper, color=BAND, label=r"interval of $\log p(x)$")
    ax.plot(steps, [mean.value for mean in means], "k.-", linewidth=1, label=r"$\log p(x)$")
    open_ends = [(step, mean.value) for step, mean in zip(steps, means, strict=True) if math.isinf(mean.upper)]
    if open_ends:
        ax.plot(*zip(*open_ends, strict=True), "k^", markersize=6, label="no upper end")


def _draw_parts(ax: Axes, steps: list[int], along: list[Gap], elbo: np.ndarray) -> None:
    """The parts where each step has them; never below the ELBO or above log p, as noise would have it."""
    if any(gap.amortisation is None for gap in along):
        return
    truth = np.maximum([float(gap.evidence.value.mean()) for gap in along], elbo)
    won = [float(gap.amortisation.mean()) for gap in along if gap.amortisation is not None]
    best = np.clip(elbo + won, elbo, truth)
    ax.fill_between(steps, best, truth, color=COLOURS[1], alpha=0.5, linewidth=0, label="approximation gap")
    ax.fill_between(steps, elbo, best, color=COLOURS[2], alpha=0.5, linewidth=0, label=f"{along[0].second} gap")
