"""Figures of results."""

from inference.plots.calibration import (
    coverage_figure,
    ecdf_difference,
    posterior_error_figure,
    rank_histogram,
    tarp_curve,
)
from inference.plots.collapse import (
    alive_figure,
    collapse_curve_figure,
    landscape_figure,
    latent_kl_figure,
    threshold_figure,
)
from inference.plots.comparison import elbo_against_evidence, gap_histogram, pareto_k_figure, pareto_k_map, save_figure
from inference.plots.gaps import gap_parts_figure
from inference.plots.rates import rate_distortion_figure

__all__ = [
    "alive_figure",
    "collapse_curve_figure",
    "coverage_figure",
    "ecdf_difference",
    "elbo_against_evidence",
    "gap_histogram",
    "gap_parts_figure",
    "landscape_figure",
    "latent_kl_figure",
    "pareto_k_figure",
    "pareto_k_map",
    "posterior_error_figure",
    "rank_histogram",
    "rate_distortion_figure",
    "save_figure",
    "tarp_curve",
    "threshold_figure",
]
