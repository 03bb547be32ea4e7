"""Models and guides by the names that the command line gives them, and how it trains them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

import guides
from inference import ELBO, AnalyticKLELBO, AnnealedPrecision, GeometricAnnealing, fit
from inference.core.protocols import SupportsPosterior
from inference.core.seeding import random_state
from inference.training import History
from zoo.linear import PPCA, FactorAnalysis, LinearVAE
from zoo.models import IMAVAE, VAE, DeepGaussianVAE

_LINEAR_RATE, _DEEP_RATE = 2e-2, 2e-3
# The near-deterministic model comes to its precision over this share of the steps, and the rate falls to this one.
_RISING, _LAST_RATE = 0.6, 0.01


def _networks(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda x, args: make(x.shape[1], args.latent_dim, hidden=args.hidden)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "ppca": lambda x, args: PPCA.from_data(x, args.latent_dim).requires_grad_(False),
    "factor_analysis": lambda x, args: FactorAnalysis(x.shape[1], args.latent_dim),
    "linear_vae": lambda x, args: LinearVAE(x.shape[1], args.latent_dim),
    "deep_gaussian_vae": _networks(DeepGaussianVAE),
    "ima_vae": lambda x, args: IMAVAE(x.shape[1], args.latent_dim, gamma2=args.gamma2, hidden=args.hidden),
    "bernoulli_vae": _networks(VAE),
}


def _encoder(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda model, args: make(model.data_dim, model.latent_dim, hidden=args.hidden)


GUIDES: dict[str, Callable[..., nn.Module]] = {
    "mean_field": _encoder(guides.MeanField),
    "full_rank": _encoder(guides.FullRank),
    "low_rank": _encoder(guides.LowRank),
    "mixture": _encoder(guides.Mixture),
    "student_t": _encoder(guides.StudentT),
    "constant_variance": _encoder(guides.ConstantVariance),
    "flow": _encoder(guides.Flow),
    "linear": lambda model, _: guides.Linear(model.data_dim, model.latent_dim),
    "tied": lambda model, _: guides.TiedMeanField(_with_posterior(model)),
    "exact": lambda model, _: guides.Exact(_with_posterior(model)),
}


def _with_posterior(model: nn.Module) -> Any:
    if not isinstance(model, SupportsPosterior):
        raise ValueError(f"expected a linear model for this guide, got {type(model).__name__}")
    return model


def build(model_name: str, guide_name: str, x: Tensor, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """An untrained pair for data (N, D), in float64, from a fixed initialisation."""
    with random_state(args.seed):
        model = MODELS[model_name](x, args).to(x)
        guide = GUIDES[guide_name](model, args).to(x)
    for half in (model, guide):
        standardise_by = getattr(half, "standardise_by", None)
        if standardise_by is not None and any(p.requires_grad for p in half.parameters()):
            standardise_by(x)
    return model, guide


def train(pair: tuple[nn.Module, nn.Module], x: Tensor, args: argparse.Namespace, checkpoint: Path) -> History | None:
    """Train a pair by Adam, with the KL divergence in closed form where it has one; None where all is frozen."""
    model, guide = pair
    if not any(p.requires_grad for half in pair for p in half.parameters()):
        return None
    if checkpoint.exists() and not args.resume:
        raise ValueError(f"{checkpoint} is left of an interrupted call: say --resume, or remove it")
    rate = _DEEP_RATE if any(p.ndim > 1 for p in _network(model)) else _LINEAR_RATE
    history = fit(
        model,
        guide,
        x,
        steps=args.steps,
        objective=_objective(model, guide, x, args.steps),
        optimizer=partial(Adam, lr=args.learning_rate or rate),
        scheduler=partial(LambdaLR, lr_lambda=lambda step: _LAST_RATE ** (step / args.steps)),
        batch_size=min(args.batch_size, len(x)),
        seed=args.seed,
        device=args.device,
        checkpoint=checkpoint,
    )
    checkpoint.unlink(missing_ok=True)
    for half in pair:
        half.cpu()
    return history


def _network(model: nn.Module) -> list[Tensor]:
    network = getattr(model, "network", None)
    return [] if network is None else list(network.parameters())


def _objective(model: nn.Module, guide: nn.Module, x: Tensor, steps: int) -> Any:
    objective = AnalyticKLELBO() if _has_closed_kl(model, guide, x[:1]) else ELBO()
    if not isinstance(model, IMAVAE):
        return objective
    rising = GeometricAnnealing(math.ceil(_RISING * steps), 1.0, float(model.gamma2))
    return AnnealedPrecision(objective, rising)


def _has_closed_kl(model: nn.Module, guide: nn.Module, x: Tensor) -> bool:
    with torch.random.fork_rng(devices=[]):
        try:
            AnalyticKLELBO().per_datum(model, guide, x)
        except NotImplementedError:
            return False
    return True
