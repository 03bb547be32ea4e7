"""Training, evidence and diagnostics for any Pyro model/guide pair."""

from inference.compare import compare, differences, load_comparison, save_comparison
from inference.diagnostics import active_units, collapse_curve, collapsed, latent_kl, posterior_means
from inference.estimates import Evidence, Interval
from inference.evidence import evidence
from inference.importance import (
    Estimate,
    WeightSummary,
    effective_sample_size,
    elbo,
    iter_log_weights,
    iwae,
    log_weights,
    pareto_k,
    summarise,
)
from inference.importance_evidence import Importance
from inference.log_joint import LogJoint
from inference.module import Module
from inference.mutual_information import MutualInformation, mutual_information
from inference.objectives import ELBO, AnalyticELBO, AnalyticKLELBO, BetaELBO, FreeBitsELBO, Objective
from inference.predictive import predictive, reconstruct, sample
from inference.schedules import CyclicalAnnealing, LinearAnnealing
from inference.storage import load_pair, save_pair
from inference.svi import fit
from inference.tables import table
from inference.trainer import History

__all__ = [
    "ELBO",
    "AnalyticELBO",
    "AnalyticKLELBO",
    "BetaELBO",
    "CyclicalAnnealing",
    "Estimate",
    "Evidence",
    "FreeBitsELBO",
    "History",
    "Importance",
    "Interval",
    "LinearAnnealing",
    "LogJoint",
    "Module",
    "MutualInformation",
    "Objective",
    "WeightSummary",
    "active_units",
    "collapse_curve",
    "collapsed",
    "compare",
    "differences",
    "effective_sample_size",
    "elbo",
    "evidence",
    "fit",
    "iter_log_weights",
    "iwae",
    "latent_kl",
    "load_comparison",
    "load_pair",
    "log_weights",
    "mutual_information",
    "pareto_k",
    "posterior_means",
    "predictive",
    "reconstruct",
    "sample",
    "save_comparison",
    "save_pair",
    "summarise",
    "table",
]
