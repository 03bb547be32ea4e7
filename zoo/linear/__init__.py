"""Linear Gaussian models in closed form: probabilistic PCA (pPCA), the linear VAE and factor analysis."""

from zoo.linear.estimation import maximum_likelihood, spectrum
from zoo.linear.factor_analysis import FactorAnalysis
from zoo.linear.gaussian_algebra import LinearGaussian
from zoo.linear.models import PPCA, LinearGaussianModel, LinearVAE, LowRankNormal, Marginal
from zoo.linear.stationarity import (
    StationaryPoint,
    collapse_threshold,
    elbo_curvatures,
    evidence_curvatures,
    inertia,
    landscape,
    mean_distortion,
    mean_elbo,
    mean_log_evidence,
    mean_rate,
    negative_hessian,
    optimal_guide,
    profiled_elbo,
    smallest_curvature,
    stationary_point,
    stationary_points,
    stationary_points_of_learned_noise,
)

__all__ = [
    "PPCA",
    "FactorAnalysis",
    "LinearGaussian",
    "LinearGaussianModel",
    "LinearVAE",
    "LowRankNormal",
    "Marginal",
    "StationaryPoint",
    "collapse_threshold",
    "elbo_curvatures",
    "evidence_curvatures",
    "inertia",
    "landscape",
    "maximum_likelihood",
    "mean_distortion",
    "mean_elbo",
    "mean_log_evidence",
    "mean_rate",
    "negative_hessian",
    "optimal_guide",
    "profiled_elbo",
    "smallest_curvature",
    "spectrum",
    "stationary_point",
    "stationary_points",
    "stationary_points_of_learned_noise",
]
