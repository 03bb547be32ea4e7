"""Importance weights of a pair, and what follows from them: ELBO, IWAE, effective sample size (ESS), Pareto k-hat."""

from inference.weights.importance_weights import iter_log_weights, log_weights
from inference.weights.summary import WeightSummary, effective_sample_size, elbo, iwae, pareto_k, summarise

__all__ = [
    "WeightSummary",
    "effective_sample_size",
    "elbo",
    "iter_log_weights",
    "iwae",
    "log_weights",
    "pareto_k",
    "summarise",
]
