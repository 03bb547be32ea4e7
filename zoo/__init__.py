"""Generative models whose evidence is known, and the data to fit them to."""

from zoo.linear_gaussian import LinearGaussian  # isort: skip
from zoo.base import LatentVariableModel
from zoo.datasets import Dataset, digits, digits_logit, fashion_mnist, linear_gaussian, load, mnist
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
