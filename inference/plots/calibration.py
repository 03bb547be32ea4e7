"""Figures of calibration. Each function returns a matplotlib figure and touches no global state."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import scipy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from inference.calibration.random_points import TARP
from inference.calibration.simulation_based_calibration import SBC, Coverage, ecdf_band
from inference.core.figures import (
    BAND,
    COLOURS,
    check_named,
    check_result,
    colour,
    figure_of,
    grid_of,
    legend_above,
    one_panel,
    panels,
)
from inference.diagnostics.accuracy import PosteriorError

_PANEL = 3.0


def _panels(figure: Figure | None, result: SBC, title: str, draw: Callable[[Axes, int], None]) -> Figure:
    """One panel per coordinate or quantity, with its smaller adjusted p-value."""
    rows, columns = grid_of(len(result.names))
    figure, axes = panels(figure, rows, columns, (_PANEL * columns, 0.85 * _PANEL * rows + 0.4))
    for i, ax in enumerate(axes):
        if i >= len(result.names):
            ax.set_axis_off()
            continue
        draw(ax, i)
        p_value = float(min(result.ks_adjusted[i], result.chi2_adjusted[i]))
        ax.set_title(rf"{result.names[i]}, $p$ = {p_value:.2g}", fontsize=10)
        ax.set_xlabel(r"rank of the truth $/\,(S + 1)$")
    figure.suptitle(title, fontsize=11)
    return figure


def rank_histogram(result: SBC, *, num_bins: int = 20, level: float = 0.95, figure: Figure | None = None) -> Figure:
    """Histogram of the truth's rank, one panel per coordinate; the band holds each bar by itself.

    Args:
        result: From :func:`inference.sbc`.
        num_bins: Bins.
        level: Probability that a bar of the posterior lies in the band.
        figure: A figure or subfigure to draw into; a new one if None.
    """
    check_result(result, SBC)
    uniform = result.uniform.cpu().numpy()
    band = scipy.stats.binom.interval(level, len(uniform), 1 / num_bins)

    def draw(ax: Axes, i: int) -> None:
        ax.axhspan(*band, color=BAND, linewidth=0)
        ax.axhline(len(uniform) / num_bins, color="black", linewidth=0.8)
        ax.hist(uniform[:, i], bins=num_bins, range=(0.0, 1.0), color=COLOURS[0], alpha=0.8)
        ax.set_xlim(0, 1)
        ax.set_ylabel("simulated data")

    return _panels(figure, result, f"Ranks of the truth among the draws (grey: {100 * level:g} % a bar)", draw)


def ecdf_difference(result: SBC, *, level: float = 0.95, figure: Figure | None = None) -> Figure:
    """Distribution function of the ranks less the uniform one, one panel per coordinate; the band holds whole curves.

    Args:
        result: From :func:`inference.sbc`.
        level: Probability that the whole curve of the posterior lies in the band.
        figure: A figure or subfigure to draw into; a new one if None.
    """
    check_result(result, SBC)
    uniform = np.sort(result.uniform.cpu().numpy(), 0)
    points = np.arange(1, 100) / 100
    ends = np.concatenate([[0.0], points, [1.0]])
    lower, upper = (np.pad(b - points, 1) for b in ecdf_band(len(uniform), points, level=level))

    def draw(ax: Axes, i: int) -> None:
        ax.fill_between(ends, lower, upper, color=BAND, linewidth=0)
        ax.axhline(0.0, color="black", linewidth=0.8)
        curve = np.searchsorted(uniform[:, i], ends, side="right") / len(uniform) - ends
        ax.plot(ends, curve, color=COLOURS[0])
        ax.set_xlim(0, 1)
        ax.set_ylabel("ECDF less uniform")

    return _panels(figure, result, f"Ranks of the truth, ECDF difference (grey: {100 * level:g} % simultaneous)", draw)


def tarp_curve(results: Mapping[str, TARP], *, figure: Figure | None = None) -> Figure:
    """Expected coverage against credibility level, and less the level, one curve per guide, with the first one's band.

    Args:
        results: From :func:`inference.tarp`, by name.
        figure: A figure or subfigure to draw into; a new one if None.

    Raises:
        ValueError: If there is none.
    """
    _check(results, TARP)
    first = next(iter(results.values()))
    figure, axes = panels(figure, 1, 2, (7.6, 3.8))
    band = [t.cpu().numpy() for t in (first.levels, first.lower, first.upper)]
    for ax, label, share in zip(axes, ("expected coverage", "coverage less level"), (0.0, 1.0)):
        base = share * band[0]
        ax.fill_between(
            band[0],
            band[1] - base,
            band[2] - base,
            color=BAND,
            linewidth=0,
            label=f"{100 * first.band_level:g} % simultaneous",
        )
        ax.plot([0, 1], [0, 1 - share], color="black", linewidth=0.8)
        for i, (name, result) in enumerate(results.items()):
            levels, curve = result.levels.cpu().numpy(), result.coverage.cpu().numpy()
            ax.plot(levels, curve - share * levels, color=colour(i), label=f"{name}, $p$ = {result.p_value:.2g}")
        ax.set_xlim(0, 1)
        ax.set_xlabel("credibility level")
        ax.set_ylabel(label)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("Coverage of joint regions (TARP)", fontsize=11)
    return figure


def coverage_figure(result: Coverage, *, ax: Axes | None = None) -> Figure:
    """Coverage of central intervals less their nominal level, with binomial limits, one row of points per coordinate.

    Args:
        result: From :func:`inference.coverage`.
        ax: Where to draw; a new figure if None.
    """
    check_result(result, Coverage)
    ax = one_panel(ax, (5.6, 3.6))
    places = np.arange(len(result.levels))
    levels = result.levels.cpu().numpy()
    for i, name in enumerate(result.names):
        value, lower, upper = (t[:, i].cpu().numpy() for t in (result.value, result.lower, result.upper))
        shift = 0.6 * ((i + 0.5) / len(result.names) - 0.5)
        errors = 100 * np.stack([value - lower, upper - value])
        ax.errorbar(places + shift, 100 * (value - levels), errors, fmt="o", markersize=4, color=colour(i), label=name)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set_xticks(places, [f"{100 * level:g} %" for level in levels])
    ax.set_xlabel(f"nominal level of the central interval (whiskers: {100 * result.level:g} % binomial)")
    ax.set_ylabel("coverage less nominal (%)")
    legend_above(ax)
    return figure_of(ax)


def posterior_error_figure(results: Mapping[str, PosteriorError], *, figure: Figure | None = None) -> Figure:
    """Per data point: Wasserstein distance, mean error and log-variance ratio, one histogram per guide.

    Args:
        results: From :func:`inference.posterior_error`, by name.
        figure: A figure or subfigure to draw into; a new one if None.

    Raises:
        ValueError: If there is none.
    """
    _check(results, PosteriorError)
    figure, axes = panels(figure, 1, 3, (3 * _PANEL, _PANEL))
    quantities: dict[str, Callable[[PosteriorError], Tensor]] = {
        "2-Wasserstein distance": lambda r: r.wasserstein,
        "mean error (posterior s.d.)": lambda r: r.mean_error,
        "log (guide / posterior variance)": lambda r: r.log_variance_ratio,
    }
    for ax, (label, read) in zip(axes, quantities.items()):
        values = [read(r).cpu().numpy().ravel() for r in results.values()]
        ends = np.append(np.concatenate(values), 0.0)
        margin = max(0.01 * np.ptp(ends), 1e-3)
        bins = np.linspace(ends.min() - margin, ends.max() + margin, 41)
        for i, (name, value) in enumerate(zip(results, values)):
            shares = np.full(len(value), 100 / len(value))
            ax.hist(value, bins=list(bins), weights=shares, alpha=0.6, color=colour(i), label=name)
        ax.axvline(0.0, color="black", linewidth=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlabel(label)
    axes[0].set_ylabel("share of the data (%)")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("Error of the guide's Gaussian part, per data point", fontsize=11)
    return figure


def _check(results: Mapping[str, object], kind: type) -> None:
    check_named(results, kind)
    if not results:
        raise ValueError("expected at least one result, got none")
