"""Posterior families; any of them serves any model with a latent site ``"z"``."""

from guides.base import EncoderGuide, Guide
from guides.exact import Exact, TiedMeanField
from guides.gaussian import FullRank, MeanField
from guides.linear import Linear
from guides.networks import ConvEncoder, mlp
from guides.wrapped import WrappedEncoder

__all__ = [
    "ConvEncoder",
    "EncoderGuide",
    "Exact",
    "FullRank",
    "Guide",
    "Linear",
    "MeanField",
    "TiedMeanField",
    "WrappedEncoder",
    "mlp",
]
