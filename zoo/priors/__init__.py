"""Priors of the latents."""

from inference.objectives.bilbo import FloatingPrior
from zoo.priors.factorised import Beta, Laplace, LearntBeta, LearntDiagonal, Prior, StandardNormal, Uniform
from zoo.priors.flow import AutoregressiveFlow
from zoo.priors.mixture import MixtureOfGaussians, VampPrior

__all__ = [
    "AutoregressiveFlow",
    "Beta",
    "FloatingPrior",
    "Laplace",
    "LearntBeta",
    "LearntDiagonal",
    "MixtureOfGaussians",
    "Prior",
    "StandardNormal",
    "Uniform",
    "VampPrior",
]
