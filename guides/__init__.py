"""Posterior families; any of them serves any model with a latent site ``"z"``."""

from typing import TYPE_CHECKING

import guides._guard  # noqa: F401  (before all that needs inference)
from guides.base import EncoderGuide, Guide, Local
from guides.constant_variance import ConstantVariance
from guides.exact import Exact, TiedMeanField
from guides.flow import Flow
from guides.gauss_newton import GaussNewtonDiagonal, GaussNewtonFull
from guides.gaussian import FullRank, MeanField
from guides.hmc_refined import HMCRefined
from guides.linear import Linear
from guides.local import local_gauss_newton, local_gaussian
from guides.low_rank import LowRank
from guides.mixture import Mixture
from guides.networks import ConvEncoder, mlp
from guides.resampled import Resampled
from guides.sampled import SampledGuide
from guides.semi_amortised import SemiAmortised
from guides.student_t import StudentT
from guides.wrapped import WrappedEncoder
from inference.core.deprecation import renamed
from inference.core.release import __version__ as __version__

if not TYPE_CHECKING:  # a type checker knows the new names alone
    __getattr__ = renamed(__name__, {"nearest_local": "local_gauss_newton"})

__all__ = [
    "ConstantVariance",
    "ConvEncoder",
    "EncoderGuide",
    "Exact",
    "Flow",
    "FullRank",
    "GaussNewtonDiagonal",
    "GaussNewtonFull",
    "Guide",
    "HMCRefined",
    "Linear",
    "Local",
    "LowRank",
    "MeanField",
    "Mixture",
    "Resampled",
    "SampledGuide",
    "SemiAmortised",
    "StudentT",
    "TiedMeanField",
    "WrappedEncoder",
    "local_gauss_newton",
    "local_gaussian",
    "mlp",
]
