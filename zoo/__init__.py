"""Generative models whose evidence is known, and the data to fit them to."""

from zoo.base import LatentVariableModel
from zoo.benchmarks.decoder_optimum import OptimalDecoder
from zoo.benchmarks.ladder import KnownAnswer, known_answers
from zoo.benchmarks.toy_channel import (
    ToyChannel,
    beta_loss,
    class_information,
    target_rate_loss,
    toy_data,
    train_channel,
)
from zoo.data.catalogue import dataset_names, named_dataset
from zoo.data.datasets import Dataset, digits, digits_logit, fashion_mnist, linear_gaussian, load, mnist
from zoo.data.ground_truth import MixedDataset, load_mixed, mixed, save_mixed
from zoo.data.preprocessing import Logit, Raw, Scaled
from zoo.data.sprite_images import draw_sources, render_sprites, sprite_pair, sprites
from zoo.linear.gaussian_algebra import LinearGaussian
from zoo.linear.models import PPCA, LinearGaussianModel, LinearVAE, LowRankNormal, Marginal
from zoo.mixings.base import Composition, Inverted, LinearMixing, Mixing
from zoo.mixings.conformal import ComplexExp, ComplexPower, Moebius, Polar
from zoo.mixings.elementwise import AffineCoupling, NormalToLaplace, NormalToUniform, SmoothLeakyReLU
from zoo.mixings.random_maps import (
    affine_coupling_flow,
    column_orthogonal,
    moebius,
    orthogonal,
    orthogonal_mlp,
    shear,
    triangular_mlp,
    unit_determinant,
)
from zoo.mixings.spurious import Darmois, gaussian_darmois, rotated_gaussian
from zoo.models.autoregressive_vae import AutoregressiveLaw, AutoregressiveVAE
from zoo.models.baggins import BagginsReconstruction, PooledBagginsReconstruction
from zoo.models.deep_gaussian_vae import DeepGaussianVAE
from zoo.models.ima_vae import IMAVAE
from zoo.models.likelihoods import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Likelihood
from zoo.models.networks import ConvDecoder
from zoo.models.noise import FixedNoise, LearntNoise, LearntNoisePerDim, OptimalNoise
from zoo.models.vae import VAE
from zoo.models.wrapped import WrappedDecoder
from zoo.priors.factorised import Beta, Laplace, LearntBeta, LearntDiagonal, Prior, StandardNormal, Uniform
from zoo.priors.floating import FloatingPrior
from zoo.priors.flow import AutoregressiveFlow
from zoo.priors.mixture import MixtureOfGaussians, VampPrior

__all__ = [
    "IMAVAE",
    "PPCA",
    "VAE",
    "AffineCoupling",
    "AutoregressiveFlow",
    "AutoregressiveLaw",
    "AutoregressiveVAE",
    "BagginsReconstruction",
    "BernoulliLikelihood",
    "Beta",
    "CategoricalLikelihood",
    "ComplexExp",
    "ComplexPower",
    "Composition",
    "ConvDecoder",
    "Darmois",
    "Dataset",
    "DeepGaussianVAE",
    "FixedNoise",
    "FloatingPrior",
    "GaussianLikelihood",
    "Inverted",
    "KnownAnswer",
    "Laplace",
    "LatentVariableModel",
    "LearntBeta",
    "LearntDiagonal",
    "LearntNoise",
    "LearntNoisePerDim",
    "Likelihood",
    "LinearGaussian",
    "LinearGaussianModel",
    "LinearMixing",
    "LinearVAE",
    "Logit",
    "LowRankNormal",
    "Marginal",
    "MixedDataset",
    "Mixing",
    "MixtureOfGaussians",
    "Moebius",
    "NormalToLaplace",
    "NormalToUniform",
    "OptimalDecoder",
    "OptimalNoise",
    "Polar",
    "PooledBagginsReconstruction",
    "Prior",
    "Raw",
    "Scaled",
    "SmoothLeakyReLU",
    "StandardNormal",
    "ToyChannel",
    "Uniform",
    "VampPrior",
    "WrappedDecoder",
    "affine_coupling_flow",
    "beta_loss",
    "class_information",
    "column_orthogonal",
    "dataset_names",
    "digits",
    "digits_logit",
    "draw_sources",
    "fashion_mnist",
    "gaussian_darmois",
    "known_answers",
    "linear_gaussian",
    "load",
    "load_mixed",
    "mixed",
    "mnist",
    "moebius",
    "named_dataset",
    "orthogonal",
    "orthogonal_mlp",
    "render_sprites",
    "rotated_gaussian",
    "save_mixed",
    "shear",
    "sprite_pair",
    "sprites",
    "target_rate_loss",
    "toy_data",
    "train_channel",
    "triangular_mlp",
    "unit_determinant",
]
