"""Estimating the evidence log p(x): the methods and the entry point that chooses between them."""

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

__all__ = [
    "Adaptive",
    "Annealed",
    "Bracket",
    "Bridge",
    "ConvergedBracket",
    "Defensive",
    "Evidence",
    "Importance",
    "Laplace",
    "Limit",
    "Quadrature",
    "SmoothedImportance",
    "bdmc",
    "converged_bracket",
    "cubo",
    "eubo",
    "evidence",
]
