"""Models with networks: deep Gaussian, IMA, Bernoulli, categorical and autoregressive VAEs, and wrapped decoders."""

from zoo.models.autoregressive_vae import AutoregressiveDistribution, AutoregressiveVAE
from zoo.models.baggins import BagginsReconstruction, PooledBagginsReconstruction
from zoo.models.deep_gaussian_vae import DeepGaussianVAE
from zoo.models.ima_vae import IMAVAE
from zoo.models.likelihoods import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Likelihood
from zoo.models.networks import ConvDecoder
from zoo.models.noise import FixedNoise, LearntNoise, LearntNoisePerDim, OptimalNoise
from zoo.models.vae import VAE
from zoo.models.wrapped import WrappedDecoder

__all__ = [
    "IMAVAE",
    "VAE",
    "AutoregressiveDistribution",
    "AutoregressiveVAE",
    "BagginsReconstruction",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "ConvDecoder",
    "DeepGaussianVAE",
    "FixedNoise",
    "GaussianLikelihood",
    "LearntNoise",
    "LearntNoisePerDim",
    "Likelihood",
    "OptimalNoise",
    "PooledBagginsReconstruction",
    "WrappedDecoder",
]
