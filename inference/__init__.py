"""Training, evidence and diagnostics for any Pyro model/guide pair."""

from inference.calibration.classifier_two_sample import C2ST, c2st, c2st_joint, c2st_per_datum
from inference.calibration.random_points import TARP, tarp
from inference.calibration.simulation import Simulation
from inference.calibration.simulation_based_calibration import SBC, Coverage, coverage, sbc
from inference.calibration.simulator import simulate
from inference.comparison.gap_decomposition import Gap, Refit, gap, refit
from inference.comparison.guide_comparison import compare
from inference.comparison.paired_differences import differences, load_comparison, save_comparison
from inference.comparison.tables import table
from inference.core.estimates import Estimate, Interval
from inference.core.module import Module
from inference.core.storage import load_pair, save_pair
from inference.diagnostics.accuracy import PosteriorError, posterior_error
from inference.diagnostics.collapse import active_units, collapse_curve, collapsed, latent_kl, posterior_means
from inference.diagnostics.gradient_signal import GradientNoise, gradient_noise
from inference.identifiability.consistency import SelfConsistency, self_consistency
from inference.identifiability.gap_prediction import predicted_gap
from inference.identifiability.ima_contrasts import (
    column_contrast,
    conformal_contrast,
    ima_contrast,
    ima_contrast_of_inverse,
    ima_penalty,
    local_ima_contrast,
    local_ima_contrast_of_inverse,
)
from inference.identifiability.mean_correlation import MCC, amari_distance, mcc, rank_mcc
from inference.information.bounds import information_bounds
from inference.information.curve import CurvePoint, rate_distortion_curve
from inference.information.encoder_information import MutualInformation, mutual_information
from inference.information.rates import RateDistortion, empirical_entropy, rate_distortion
from inference.information.reverse_water_filling import water_filling
from inference.marginal_likelihood.analytic.laplace import Laplace
from inference.marginal_likelihood.analytic.near_deterministic import Limit
from inference.marginal_likelihood.annealing.annealed_importance_sampling import Annealed
from inference.marginal_likelihood.annealing.bidirectional import Bracket, ConvergedBracket, bdmc, converged_bracket
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.estimate import evidence
from inference.marginal_likelihood.importance.adaptive_mixture import Adaptive
from inference.marginal_likelihood.importance.bridge_sampling import Bridge
from inference.marginal_likelihood.importance.defensive_mixture import Defensive
from inference.marginal_likelihood.importance.importance_sampling import Importance
from inference.marginal_likelihood.importance.pareto_smoothed import SmoothedImportance
from inference.marginal_likelihood.quadrature.adaptive_quadrature import Quadrature
from inference.marginal_likelihood.upper_bounds import cubo, eubo
from inference.numerics.jacobian import column_angles, column_norms, decoder_jacobian
from inference.objectives.analytic import AnalyticBetaELBO, AnalyticELBO, AnalyticTargetRate
from inference.objectives.annealed_precision import AnnealedPrecision
from inference.objectives.base import Objective
from inference.objectives.bilbo import BILBO, FittedPrior
from inference.objectives.evidence_lower_bound import ELBO, AnalyticKLELBO, BetaELBO, FreeBitsELBO
from inference.objectives.importance_weighted import IWELBO, DReG, StickingTheLanding
from inference.objectives.mixed_importance_weighted import CIWAE, MIWAE, PIWAE
from inference.objectives.renyi import CUBO, VRBound, renyi_bound
from inference.objectives.schedules import CyclicalAnnealing, GeometricAnnealing, LinearAnnealing
from inference.objectives.target_rate import SampledTargetRate, TargetRate
from inference.objectives.wake_sleep import WakeSleep, WakeWake
from inference.posterior.exact_draws import ExactDraws, posterior_draws, simulated_draws
from inference.posterior.log_joint import LogJoint
from inference.posterior.prediction import predictive, reconstruct, sample
from inference.training.fitting import fit
from inference.training.restarts import Restarts, fit_best
from inference.training.trainer import History
from inference.training.vectorised import fit_many
from inference.weights.importance_weights import iter_log_weights, log_weights
from inference.weights.summary import WeightSummary, effective_sample_size, elbo, iwae, pareto_k, summarise

__all__ = [
    "BILBO",
    "C2ST",
    "CIWAE",
    "CUBO",
    "ELBO",
    "IWELBO",
    "MCC",
    "MIWAE",
    "PIWAE",
    "SBC",
    "TARP",
    "Adaptive",
    "AnalyticBetaELBO",
    "AnalyticELBO",
    "AnalyticKLELBO",
    "AnalyticTargetRate",
    "Annealed",
    "AnnealedPrecision",
    "BetaELBO",
    "Bracket",
    "Bridge",
    "ConvergedBracket",
    "Coverage",
    "CurvePoint",
    "CyclicalAnnealing",
    "DReG",
    "Defensive",
    "Estimate",
    "Evidence",
    "ExactDraws",
    "FittedPrior",
    "FreeBitsELBO",
    "Gap",
    "GeometricAnnealing",
    "GradientNoise",
    "History",
    "Importance",
    "Interval",
    "Laplace",
    "Limit",
    "LinearAnnealing",
    "LogJoint",
    "Module",
    "MutualInformation",
    "Objective",
    "PosteriorError",
    "Quadrature",
    "RateDistortion",
    "Refit",
    "Restarts",
    "SampledTargetRate",
    "SelfConsistency",
    "Simulation",
    "SmoothedImportance",
    "StickingTheLanding",
    "TargetRate",
    "VRBound",
    "WakeSleep",
    "WakeWake",
    "WeightSummary",
    "active_units",
    "amari_distance",
    "bdmc",
    "c2st",
    "c2st_joint",
    "c2st_per_datum",
    "collapse_curve",
    "collapsed",
    "column_angles",
    "column_contrast",
    "column_norms",
    "compare",
    "conformal_contrast",
    "converged_bracket",
    "coverage",
    "cubo",
    "decoder_jacobian",
    "differences",
    "effective_sample_size",
    "elbo",
    "empirical_entropy",
    "eubo",
    "evidence",
    "fit",
    "fit_best",
    "fit_many",
    "gap",
    "gradient_noise",
    "ima_contrast",
    "ima_contrast_of_inverse",
    "ima_penalty",
    "information_bounds",
    "iter_log_weights",
    "iwae",
    "latent_kl",
    "load_comparison",
    "load_pair",
    "local_ima_contrast",
    "local_ima_contrast_of_inverse",
    "log_weights",
    "mcc",
    "mutual_information",
    "pareto_k",
    "posterior_draws",
    "posterior_error",
    "posterior_means",
    "predicted_gap",
    "predictive",
    "rank_mcc",
    "rate_distortion",
    "rate_distortion_curve",
    "reconstruct",
    "refit",
    "renyi_bound",
    "sample",
    "save_comparison",
    "save_pair",
    "sbc",
    "self_consistency",
    "simulate",
    "simulated_draws",
    "summarise",
    "table",
    "tarp",
    "water_filling",
]
