"""The posterior of a model: its log joint, modes, chains, moments, exact draws and predictions."""

from inference.posterior.exact_draws import ExactDraws, posterior_draws, simulated_draws
from inference.posterior.log_joint import LogJoint
from inference.posterior.prediction import predictive, reconstruct, sample

__all__ = ["ExactDraws", "LogJoint", "posterior_draws", "predictive", "reconstruct", "sample", "simulated_draws"]
