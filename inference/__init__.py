"""Training, evidence and diagnostics for any Pyro model/guide pair: each subpackage lists its names in ``__all__``."""
# ruff: noqa: F403

from typing import TYPE_CHECKING

from inference import (
    calibration,
    comparison,
    core,
    identifiability,
    marginal_likelihood,
    numerics,
    objectives,
    pair,
    posterior,
    training,
    weights,
)
from inference.calibration import *
from inference.comparison import *
from inference.core import *
from inference.core.deprecation import renamed
from inference.core.release import __distribution__ as __distribution__
from inference.core.release import __version__ as __version__
from inference.diagnostics import (
    GradientNoise,
    PairCheck,
    PosteriorError,
    active_units,
    check_pair,
    collapse_curve,
    collapsed,
    gradient_noise,
    latent_kl,
    posterior_error,
    posterior_means,
)
from inference.identifiability import *
from inference.information import (
    CurvePoint,
    ELBOEntropies,
    MutualInformation,
    RateDistortion,
    elbo_entropies,
    empirical_entropy,
    information_bounds,
    mutual_information,
    rate_distortion,
    rate_distortion_curve,
    water_filling,
)
from inference.marginal_likelihood import *
from inference.numerics import *
from inference.objectives import *
from inference.pair import *
from inference.posterior import *
from inference.training import *
from inference.weights import *

if not TYPE_CHECKING:  # a type checker knows the new names alone
    __getattr__ = renamed(__name__, {})

__all__ = [
    *calibration.__all__,
    *comparison.__all__,
    *core.__all__,
    *identifiability.__all__,
    *marginal_likelihood.__all__,
    *numerics.__all__,
    *objectives.__all__,
    *pair.__all__,
    *posterior.__all__,
    *training.__all__,
    *weights.__all__,
    "CurvePoint",
    "ELBOEntropies",
    "GradientNoise",
    "MutualInformation",
    "PairCheck",
    "PosteriorError",
    "RateDistortion",
    "active_units",
    "check_pair",
    "collapse_curve",
    "collapsed",
    "elbo_entropies",
    "empirical_entropy",
    "gradient_noise",
    "information_bounds",
    "latent_kl",
    "mutual_information",
    "posterior_error",
    "posterior_means",
    "rate_distortion",
    "rate_distortion_curve",
    "water_filling",
]
