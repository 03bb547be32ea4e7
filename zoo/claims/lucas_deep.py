"""Claims of "Don't Blame the ELBO!" on deep Gaussian VAEs, on logit-transformed digits in place of MNIST.

Networks are 64-256-128-20, mirrored, with ReLUs and one sigma^2. A latent is collapsed if its KL term is below epsilon
nats for 99 % of the data, with one epsilon for all models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from guides import MeanField, mlp
from inference import AnalyticKLELBO, BetaELBO, fit
from inference.diagnostics import collapsed, latent_kl, predicted_alive
from inference.information import rate_distortion
from zoo.claims.claim import Measured, Settings, at_least, at_most, claim, undecided
from zoo.claims.lucas_linear import LUCAS, elbo_of, points_with, train_linear_pair
from zoo.data import digits_logit
from zoo.linear import spectrum
from zoo.models import DeepGaussianVAE, FixedNoise, LearntNoise

LATENT_DIM, BATCH = 20, 128
EPSILON = 0.05  # nats; noisy training leaves more than the paper's .01 in latents that are dead
NOISES = (30.0, 10.0, 3.0, 1.0)


class Trained(NamedTuple):
    """ELBO in nats per training row, final sigma^2, and the KL term of each latent, (N, K)."""

    elbo: float
    var: float
    kl: Tensor

    def share(self, epsilon: float = EPSILON) -> float:
        """Percentage of collapsed latents."""
        return 100 * float(collapsed(self.kl, epsilon=epsilon).double().mean())


@cache
def logit_digits() -> Tensor:
    """All digits after dequantisation and logit, centred, (1797, 64)."""
    x = digits_logit(test_size=0, dtype=torch.float32).train
    return x - x.mean(0)


def deep_pair(var: float, *, learn: bool, seed: int) -> tuple[DeepGaussianVAE, MeanField]:
    """An untrained pair whose sigma^2 starts here, or stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        noise = (LearntNoise if learn else FixedNoise)(math.sqrt(var))
        network = mlp(LATENT_DIM, 64, (128, 256), nn.ReLU)
        model = DeepGaussianVAE(64, LATENT_DIM, network=network, noise=noise)
        return model, MeanField(64, LATENT_DIM, encoder=mlp(64, 2 * LATENT_DIM, (256, 128), nn.ReLU))


def train(pair: tuple[DeepGaussianVAE, MeanField], steps: int, *, seed: int, objective: Any = None) -> Trained:
    """Adam at 1e-3, falling to zero over the second half."""
    model, guide = pair
    decay = partial(LambdaLR, lr_lambda=lambda step: min(1.0, 2 * (1 - step / steps)))
    options: dict[str, Any] = {
        "optimizer": partial(Adam, lr=1e-3),
        "scheduler": decay,
        "batch_size": BATCH,
        "progress": False,
    }
    objective = AnalyticKLELBO() if objective is None else objective
    fit(model, guide, logit_digits(), steps=steps, objective=objective, seed=seed, **options)
    elbo = -rate_distortion(model, guide, logit_digits(), num_samples=10, seed=0, progress=False).total.value
    return Trained(elbo, float(model.sigma.detach().square()), latent_kl(model, guide, logit_digits()).detach())


@cache
def deep_run(mode: str, var: float, seed: int, steps: int) -> Trained:
    """A run whose sigma^2 is fixed or learnt."""
    return train(deep_pair(var, learn=mode == "learnt", seed=seed), steps, seed=seed)


def runs(mode: str, settings: Settings) -> dict[float, list[Trained]]:
    """The runs of each sigma^2, over seeds."""
    seeds, steps = (5, 4500) if settings.paper_scale else (2, 700)
    return {var: [deep_run(mode, var, settings.seed + s, steps) for s in range(seeds)] for var in NOISES}


def difference(name: str, first: Sequence[float], second: Sequence[float], lower: float) -> Measured:
    """The mean of paired differences over seeds, with its standard error, that must be at least so large."""
    values = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    return at_least(name, float(values.mean()), lower, error=float(values.std()) / math.sqrt(len(values)))


@claim(
    LUCAS,
    "The number of eigenvalues above sigma^2, which is that of live latents of the linear VAE, predicts that of a deep "
    "one",
)
def predicts_deep(settings: Settings) -> Sequence[Measured]:
    from scipy.stats import spearmanr  # half a second to load, which no other command needs

    lam = spectrum(logit_digits().double()).eigenvalues
    found = [one for mode in ("fixed", "learnt") for group in runs(mode, settings).values() for one in group]
    predicted = [predicted_alive(lam, one.var, LATENT_DIM) for one in found]
    alive = [LATENT_DIM * (1 - one.share() / 100) for one in found]
    rho = float(spearmanr(predicted, alive).statistic)
    error = (1 - rho**2) / math.sqrt(len(found) - 1)
    name = f"rank correlation of predicted and live latents, {len(found)} runs"
    return [at_least(name, rho, 0.5, error=error)]


@claim(
    LUCAS,
    "In deep VAEs, unlike linear ones, the start of a learnt sigma^2 decides the end: from 30 the ELBO is lower and "
    "more latents are collapsed than from 1",
)
def start_decides(settings: Settings) -> Sequence[Measured]:
    found = runs("learnt", settings)
    high, low = found[30.0], found[1.0]
    x = logit_digits().double()
    linear = [linear_end(x, var) for var in (30.0, 1.0)]
    return [
        difference("deep: ELBO from 1 less that from 30, nats", [r.elbo for r in low], [r.elbo for r in high], 1.0),
        difference("deep: collapsed from 30 less from 1, %", [r.share() for r in high], [r.share() for r in low], 1.0),
        at_most("linear: the two ELBOs differ by, nats", abs(linear[0] - linear[1]), 0.05),
    ]


def linear_end(x: Tensor, var: float) -> float:
    """The ELBO of the linear VAE from a start of sigma^2."""
    eigen = spectrum(x)  # all that the ELBO of a linear VAE knows of the data
    points = points_with(eigen.eigenvalues.clamp(min=0), eigen.eigenvectors)
    model, _ = train_linear_pair(points, LATENT_DIM, sigma=math.sqrt(var))
    return elbo_of(model, points)


@claim(
    LUCAS,
    "Curves of collapse against epsilon: at every epsilon, a larger fixed sigma^2 leaves more latents collapsed",
)
def against_epsilon(settings: Settings) -> Sequence[Measured]:
    found = runs("fixed", settings)
    shares = {var: [[one.share(e) for e in (0.01, 0.05, 0.1, 0.5)] for one in group] for var, group in found.items()}
    steps = []
    for larger, smaller in ((30.0, 10.0), (10.0, 3.0), (3.0, 1.0)):
        rise = torch.tensor(shares[larger]).mean(0) - torch.tensor(shares[smaller]).mean(0)
        steps.append(
            at_least(f"collapsed at {larger:g} less at {smaller:g}, least over epsilon, %", float(rise.min()), 0)
        )
    return steps


@claim(
    LUCAS,
    "Table 1, fixed sigma^2: at the largest every latent is collapsed and the ELBO is far below that of a smaller one, "
    "and setting sigma^2 alone to its optimum afterwards wins a part of that (on digits: directions, not numbers)",
)
def table_fixed(settings: Settings) -> Sequence[Measured]:
    found = runs("fixed", settings)
    tuned = {var: [tuned_elbo(one) for one in group] for var, group in found.items()}
    large = found[30.0]
    return [
        difference("ELBO at 1 less at 30, nats", [r.elbo for r in found[1.0]], [r.elbo for r in large], 1.0),
        difference("won at 30 by sigma^2 alone, nats", tuned[30.0], [r.elbo for r in large], 1.0),
        at_least("collapsed at 30, %", sum(r.share() for r in large) / len(large), 99.0),
    ]


def tuned_elbo(one: Trained) -> float:
    """The ELBO after sigma^2 alone is set to its optimum: the squared residual follows from ELBO and KL term."""
    rate, dim = float(one.kl.sum(1).mean()), 64
    best = one.var * (2 * (-one.elbo - rate) / dim - math.log(2 * math.pi * one.var))
    return -rate - 0.5 * dim * (math.log(2 * math.pi * best) + 1)


@claim(
    LUCAS,
    "Table 1, learnt sigma^2: the smaller the start, the better the ELBO and the fewer latents collapsed (on digits: "
    "directions, not numbers)",
)
def table_learnt(settings: Settings) -> Sequence[Measured]:
    found = runs("learnt", settings)
    pairs = ((30.0, 10.0), (10.0, 3.0), (3.0, 1.0))
    shares = [r.share() for r in found[30.0]], [r.share() for r in found[1.0]]
    return [
        difference(
            f"ELBO from {b:g} less from {a:g}, nats", [r.elbo for r in found[b]], [r.elbo for r in found[a]], 0.0
        )
        for a, b in pairs
    ] + [difference("collapsed from 30 less from 1, %", *shares, 0.0)]


@claim(
    LUCAS,
    "KL annealing: once regular ELBO training resumes, the posterior collapses again (at a large fixed sigma^2)",
)
def annealing(settings: Settings) -> Sequence[Measured]:
    steps = 3000 if settings.paper_scale else 700
    pair = deep_pair(30.0, learn=False, seed=settings.seed)
    early = train(pair, steps, seed=settings.seed, objective=BetaELBO(0.1))
    late = train(pair, steps, seed=settings.seed + 1)
    return [
        at_most("collapsed after training at beta = 0.1, %", early.share(), 50.0),
        at_least("collapsed after training at beta = 1, %", late.share(), 90.0),
    ]


batch_norm = undecided(
    LUCAS,
    "batch_norm",
    "Batch normalisation of the encoder",
    "what the paper claims of it could not be recovered; examples/training_choices.py measures it",
)
celeba = undecided(
    LUCAS,
    "celeba",
    "A convolutional VAE on CelebA, 64 x 64",
    "the zoo has no loader of CelebA, whose licence forbids to bundle it, and two cores do not train it in an hour",
)
