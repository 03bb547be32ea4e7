"""Figures of results."""

from inference.core.deprecation import renamed
from inference.core.figures import save_figure
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
from inference.plots.comparison import elbo_against_evidence, gap_figure, pareto_k_shares
from inference.plots.gaps import gap_parts_figure
from inference.plots.posteriors import posterior_figure
from inference.plots.rates import rate_distortion_figure
from inference.plots.training import training_gap_figure
from inference.plots.traversals import traversal_figure

__all__ = [
    "alive_figure",
    "collapse_curve_figure",
    "coverage_figure",
    "ecdf_difference",
    "elbo_against_evidence",
    "gap_figure",
    "gap_parts_figure",
    "landscape_figure",
    "latent_kl_figure",
    "pareto_k_shares",
    "posterior_error_figure",
    "posterior_figure",
    "rank_histogram",
    "rate_distortion_figure",
    "save_figure",
    "tarp_curve",
    "threshold_figure",
    "training_gap_figure",
    "traversal_figure",
]

__getattr__ = renamed(__name__, {"gap_histogram": "gap_figure", "pareto_k_map": "pareto_k_shares"})
