"""Claims of Fyffe 2019 on encoders without variances (BILBO), optimal decoders and bounded likelihoods (BAGGINS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from guides import ConstantVariance, MeanField
from inference import AnalyticKLELBO, fit
from inference.distributions.gaussian import DiagNormal
from inference.information import rate_distortion
from inference.objectives import FloatingPrior
from zoo.benchmarks import OptimalDecoder
from zoo.claims.claim import Measured, Settings, at_least, at_most, claim, close, undecided
from zoo.claims.fyffe_elbo import FYFFE
from zoo.claims.lucas_linear import scaled_digits
from zoo.data import Scaled, digits
from zoo.linear import PPCA
from zoo.models import VAE, DeepGaussianVAE, GaussianLikelihood, LearntNoise, PooledBagginsReconstruction


def codes() -> tuple[DiagNormal, Tensor]:
    """A Gaussian encoder of constant variance in two dimensions, and the digits that it encodes."""
    x = scaled_digits()[:200]
    _, _, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    mean = (x - x.mean(0)) @ axes[:2].mT
    return DiagNormal(mean, torch.full_like(mean, 0.3)), x


@claim(
    FYFFE, "The optimal decoder of an encoder is known in closed form: no decoder has a smaller error", universal=True
)
def optimal_decoder(settings: Settings) -> Sequence[Measured]:
    posterior, x = codes()
    best = OptimalDecoder(posterior, x)
    generator = torch.Generator().manual_seed(settings.seed)
    z = posterior.mean + 0.3 * torch.randn(400, 200, 2, generator=generator, dtype=torch.float64)
    found = []
    for (kind, change), size in product({"moved": moved_by, "scaled": scaled_by}.items(), (0.05, -0.05)):
        moved = partial(change, size, best)
        excess = ((x - moved(z)).square() - (x - best(z)).square()).sum(-1).mean(1)
        known = (moved(z) - best(z)).square().sum(-1).mean(1)
        difference = excess - known
        error = float(difference.std()) / math.sqrt(len(z))
        name = f"excess error of a decoder {kind} by {size:g} less the formula's {float(known.mean()):.4f}"
        found.append(close(name, float(difference.mean()), 0, 0.1 * float(known.mean()), error=error))
    return found


def moved_by(size: float, best: OptimalDecoder, z: Tensor) -> Tensor:
    return best(z) + size * torch.sin(3 * z[..., :1])


def scaled_by(size: float, best: OptimalDecoder, z: Tensor) -> Tensor:
    return (1 + size) * best(z)


@claim(FYFFE, "The optimal decoder is always smooth", universal=True)
def smooth_decoder(settings: Settings) -> Sequence[Measured]:
    posterior, x = codes()
    best = OptimalDecoder(posterior, x)
    z = torch.cartesian_prod(*[torch.linspace(-4, 4, 25, dtype=torch.float64)] * 2)
    known = best.jacobian(z)
    measured = torch.func.vmap(torch.func.jacrev(lambda point: best(point[None])[0]))(z)
    # By the inequality of Cauchy and Schwarz and that of Popoviciu, |Cov(x_d, mu_k)| / s^2 is at most this.
    ranges = [part.amax(0) - part.amin(0) for part in (x, posterior.mean)]
    bound = ranges[0][:, None] * ranges[1] / (4 * 0.3**2)
    return [
        at_most("largest error of its Jacobian in closed form", float((known - measured).abs().max()), 1e-9),
        at_most(
            "its largest entry over the bound of range(x) range(mu) / 4 s^2",
            float((known.abs() / bound.clamp(min=1e-12)).max()),
            1.0,
        ),
    ]


@claim(
    FYFFE, "BILBO is the ELBO with its rate as an expectation over the batch, 1/2 sum log(1 + m / v)", universal=True
)
def batch_bound(settings: Settings) -> Sequence[Measured]:
    generator = torch.Generator().manual_seed(settings.seed)
    spread = torch.tensor([2.0, 0.7, 0.1], dtype=torch.float64)
    means = spread * torch.randn(4000, 50, 3, generator=generator, dtype=torch.float64)
    rate = 0.5 * means.square().mean(1).log1p()  # of batches of 50, v = 1
    exact = 0.5 * spread.square().log1p()
    bias = spread.pow(4) / (2 * 50 * (spread.square() + 1).square())
    off = (rate - exact + bias).sum(1)
    x = means[0]
    prior, posterior = FloatingPrior(3).double().train()(), DiagNormal(x, torch.ones_like(x))
    divergence = torch.distributions.kl_divergence(posterior, prior).mean()
    error = float(off.std()) / math.sqrt(len(off))
    return [
        close("mean KL to the floating prior less the formula, nats", float(divergence - rate[0].sum()), 0, 1e-10),
        close(
            "rate of batches of 50 less that of all, plus m^2 / (2 B (m + v)^2), nats",
            float(off.mean()),
            0,
            5e-3,
            error=error,
        ),
    ]


@cache
def digits_pair_elbo(kind: str, steps: int, seed: int) -> tuple[float, float, int]:
    """Held-out and training ELBO of a VAE of digits whose encoder has variances, or is BILBO's; encoder parameters."""
    data = digits(transform=Scaled(16.0), dtype=torch.float32)
    floating = kind == "BILBO"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = FloatingPrior(8) if floating else None
        model = DeepGaussianVAE(64, 8, hidden=(64,), noise=LearntNoise(), prior=prior).standardise_by(data.train)
        make = partial(ConstantVariance, learn_sigma=False) if floating else MeanField
        guide = make(64, 8, hidden=(64,)).standardise_by(data.train)
    train_analytic(model, guide, data.train, steps, seed)
    if floating:
        model.prior_module.freeze(guide, data.train)  # type: ignore[operator]
    test, own = (-rate_distortion(model, guide, x, seed=0, progress=False).total.value for x in (data.test, data.train))
    return test, own, sum(p.numel() for p in guide.parameters())


def train_analytic(model: nn.Module, guide: nn.Module, x: Tensor, steps: int, seed: int) -> None:
    options: dict[str, Any] = {
        "optimizer": partial(Adam, lr=2e-3),
        "scheduler": partial(CosineAnnealingLR, T_max=steps),
    }
    fit(model, guide, x, steps=steps, objective=AnalyticKLELBO(), batch_size=256, seed=seed, progress=False, **options)


@claim(
    FYFFE,
    "An encoder without variances, with fewer outputs, improves the ELBO (BILBO against mean field, on digits, trained "
    "briefly and long)",
    slow=True,
)
def half_outputs(settings: Settings) -> Sequence[Measured]:
    seeds = range(10 if settings.paper_scale else 5)
    found: list[Measured] = []
    for steps in (3000, 20_000):
        half, usual = ([digits_pair_elbo(kind, steps, s) for s in seeds] for kind in ("BILBO", "mean field"))
        if not found:
            share = half[0][2] / usual[0][2]
            found.append(at_most("its encoder's parameters over the usual one's", share, 0.99))
        for part, name in enumerate(("held-out", "training")):
            won = torch.tensor([a[part] - b[part] for a, b in zip(half, usual, strict=True)], dtype=torch.float64)
            error = float(won.std()) / math.sqrt(len(seeds))
            text = f"{name} ELBO won after {steps} steps, {len(seeds)} seeds, nats"
            found.append(at_least(text, float(won.mean()), 0.0, error=error))
    return found


@claim(FYFFE, "Ordinary training, with learnt variances on raw data, breaks down at extreme units")
def instability(settings: Settings) -> Sequence[Measured]:
    x = scaled_digits()[:500]
    broken = {c: breaks_down(c * x, settings.seed) for c in (1e-3, 1.0, 1e3)}
    return [
        at_most("runs that end in NaN at c = 1", broken[1.0], 0),
        at_least("runs that end in NaN at c = 1e-3 and 1e3", broken[1e-3] + broken[1e3], 1),
    ]


def breaks_down(x: Tensor, seed: int) -> int:
    torch.manual_seed(seed)
    model = VAE(64, 8, likelihood=GaussianLikelihood()).to(x)
    try:
        train_analytic(model, MeanField(64, 8).to(x), x, 100, seed)
    except FloatingPointError:
        return 1
    return 0


def baggins_elbo(x: Tensor, bits: float, seed: int, steps: int = 100) -> float:
    """The ELBO of a VAE with the BAGGINS-style likelihood, trained and frozen."""
    torch.manual_seed(seed)
    model = DeepGaussianVAE(64, 8, hidden=(64,), noise=PooledBagginsReconstruction(bits)).to(x).standardise_by(x)
    guide = MeanField(64, 8, hidden=(64,)).to(x).standardise_by(x)
    train_analytic(model, guide, x, steps, seed)
    torch.manual_seed(seed)
    model.freeze(guide, x)
    return -rate_distortion(model, guide, x, seed=0, progress=False).total.value


@claim(FYFFE, "A likelihood that is scale-invariant: data times c lower the ELBO by D log c and change nothing else")
def scale_invariance(settings: Settings) -> Sequence[Measured]:
    x = scaled_digits()[:500]
    plain = baggins_elbo(x, 8.0, settings.seed)
    return [
        close(
            f"ELBO(c) + D log c - ELBO(1) at c = {c:g}, nats",
            baggins_elbo(c * x, 8.0, settings.seed) + 64 * math.log(c) - plain,
            0,
            1e-6,
        )
        for c in (1e-3, 1e3)
    ]


@claim(FYFFE, "A presumed information content bounds the likelihood, where a learnt variance has no bound")
def presumed_information(settings: Settings) -> Sequence[Measured]:
    x = scaled_digits()[:500]
    spread = float(x.var(0, correction=0).mean())
    found = []
    for bits in (1.0, 2.0, 4.0):
        bound = -32 * math.log(2 * math.pi * 2 ** (-2 * bits) * spread)
        found.append(
            at_most(f"ELBO less the bound at {bits:g} bits, nats", baggins_elbo(x, bits, settings.seed) - bound, 0)
        )
    few = x[:12]
    free = [float(PPCA.from_data(few, 11, sigma=s).log_evidence(few).mean().detach()) for s in (1e-3, 1e-6)]
    return [
        *found,
        at_least(
            "learnt variance, 12 data and K = 11: log p won from sigma = 1e-3 to 1e-6, nats", free[1] - free[0], 100
        ),
    ]


baggins = undecided(
    FYFFE,
    "baggins",
    "BAGGINS, the paper's likelihood",
    "its formula could not be recovered; zoo.PooledBagginsReconstruction has the properties that the abstract names",
)
tables = undecided(
    FYFFE, "tables", "Tables on MNIST-like data and CelebA", "neither numbers nor networks could be recovered"
)
