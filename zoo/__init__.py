"""Generative models whose evidence is known, and the data to fit them to: each subpackage lists its names."""
# ruff: noqa: F403

from typing import TYPE_CHECKING

import guides._guard  # noqa: F401  (before all that needs inference)
from inference.core.deprecation import renamed
from inference.core.release import __version__ as __version__
from zoo import data, mixings, models, priors
from zoo.base import LatentVariableModel
from zoo.benchmarks import (
    KnownAnswer,
    OptimalDecoder,
    ToyChannel,
    beta_loss,
    class_information,
    known_answers,
    target_rate_loss,
    toy_data,
    train_channel,
)
from zoo.classics import Classic, classic_models
from zoo.data import *
from zoo.linear import PPCA, FactorAnalysis, LinearGaussian, LinearGaussianModel, LinearVAE, LowRankNormal, Marginal
from zoo.mixings import *
from zoo.models import *
from zoo.pretrained import Card, Pretrained, card, load, pairs
from zoo.priors import *

if not TYPE_CHECKING:  # a type checker knows the new names alone
    __getattr__ = renamed(__name__, {"AutoregressiveLaw": "AutoregressiveDistribution"})

__all__ = [
    *data.__all__,
    *mixings.__all__,
    *models.__all__,
    *priors.__all__,
    "PPCA",
    "Card",
    "Classic",
    "FactorAnalysis",
    "KnownAnswer",
    "LatentVariableModel",
    "LinearGaussian",
    "LinearGaussianModel",
    "LinearVAE",
    "LowRankNormal",
    "Marginal",
    "OptimalDecoder",
    "Pretrained",
    "ToyChannel",
    "beta_loss",
    "card",
    "class_information",
    "classic_models",
    "known_answers",
    "load",
    "pairs",
    "target_rate_loss",
    "toy_data",
    "train_channel",
]
