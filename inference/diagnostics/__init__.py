"""Diagnostics of a trained pair: posterior collapse, posterior error, curvature, gradient noise."""

from inference.diagnostics.accuracy import PosteriorError, posterior_error
from inference.diagnostics.collapse import (
    active_units,
    collapse_curve,
    collapsed,
    latent_kl,
    posterior_means,
    predicted_alive,
)
from inference.diagnostics.curvature import (
    constant_var,
    constant_var_penalty,
    expected_hessian,
    likelihood_curvature,
    negative_hessian,
)
from inference.diagnostics.gradient_signal import GradientNoise, gradient_noise
from inference.diagnostics.pair_check import PairCheck, check_pair

__all__ = [
    "GradientNoise",
    "PairCheck",
    "PosteriorError",
    "active_units",
    "check_pair",
    "collapse_curve",
    "collapsed",
    "constant_var",
    "constant_var_penalty",
    "expected_hessian",
    "gradient_noise",
    "latent_kl",
    "likelihood_curvature",
    "negative_hessian",
    "posterior_error",
    "posterior_means",
    "predicted_alive",
]
