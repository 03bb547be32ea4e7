"""Generative models whose evidence is known, and the data to fit them to."""

from zoo.autoregressive_vae import AutoregressiveLaw, AutoregressiveVAE
from zoo.baggins import BagginsReconstruction, PooledBagginsReconstruction
from zoo.base import LatentVariableModel
from zoo.datasets import Dataset, digits, digits_logit, fashion_mnist, linear_gaussian, load, mnist
from zoo.deep_gaussian_vae import DeepGaussianVAE
from zoo.floating_prior import FloatingPrior
from zoo.flow_prior import AutoregressiveFlow
from zoo.gaussian_algebra import LinearGaussian
from zoo.likelihoods import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Likelihood
from zoo.linear_models import PPCA, LinearGaussianModel, LinearVAE, LowRankNormal, Marginal
from zoo.mixture_priors import MixtureOfGaussians, VampPrior
from zoo.networks import ConvDecoder
from zoo.noise import FixedNoise, LearntNoise, LearntNoisePerDim, OptimalNoise
from zoo.preprocessing import Logit, Raw, Scaled
from zoo.priors import Beta, Laplace, LearntBeta, LearntDiagonal, Prior, StandardNormal, Uniform
from zoo.vae import VAE
from zoo.wrapped import WrappedDecoder

__all__ = [
    "PPCA",
    "VAE",
    "AutoregressiveFlow",
    "AutoregressiveLaw",
    "AutoregressiveVAE",
    "BagginsReconstruction",
    "BernoulliLikelihood",
    "Beta",
    "CategoricalLikelihood",
    "ConvDecoder",
    "Dataset",
    "DeepGaussianVAE",
    "FixedNoise",
    "FloatingPrior",
    "GaussianLikelihood",
    "Laplace",
    "LatentVariableModel",
    "LearntBeta",
    "LearntDiagonal",
    "LearntNoise",
    "LearntNoisePerDim",
    "Likelihood",
    "LinearGaussian",
    "LinearGaussianModel",
    "LinearVAE",
    "Logit",
    "LowRankNormal",
    "Marginal",
    "MixtureOfGaussians",
    "OptimalNoise",
    "PooledBagginsReconstruction",
    "Prior",
    "Raw",
    "Scaled",
    "StandardNormal",
    "Uniform",
    "VampPrior",
    "WrappedDecoder",
    "digits",
    "digits_logit",
    "fashion_mnist",
    "linear_gaussian",
    "load",
    "mnist",
]
