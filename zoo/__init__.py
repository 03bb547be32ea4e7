"""Generative models whose evidence is known, and the data to fit them to."""

from zoo.base import LatentVariableModel
from zoo.datasets import Dataset, digits, digits_logit, fashion_mnist, linear_gaussian, load, mnist
from zoo.gaussian_algebra import LinearGaussian
from zoo.linear_models import PPCA, LinearGaussianModel, LinearVAE, LowRankNormal, Marginal
from zoo.preprocessing import Logit, Raw, Scaled
from zoo.wrapped import WrappedDecoder

__all__ = [
    "PPCA",
    "Dataset",
    "LatentVariableModel",
    "LinearGaussian",
    "LinearGaussianModel",
    "LinearVAE",
    "Logit",
    "LowRankNormal",
    "Marginal",
    "Raw",
    "Scaled",
    "WrappedDecoder",
    "digits",
    "digits_logit",
    "fashion_mnist",
    "linear_gaussian",
    "load",
    "mnist",
]
