"""Claims of "Embrace the gap" on trained near-deterministic VAEs: are the true sources found?

Sources are uniform on a square or cube, mixings Moebius maps, whose Jacobians have orthogonal columns, or maps that
have not; all pairs of a row are trained at once, at a precision that rises over the first 60 % of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from guides import MeanField
from inference import ELBO, AnnealedPrecision, GeometricAnnealing, fit, fit_many
from inference.identifiability import ima_contrast, mcc, self_consistency
from zoo.claims.claim import Measured, Settings, at_least, at_most, claim, close, undecided
from zoo.claims.reizinger_limit import REIZINGER
from zoo.data import MixedDataset, mixed
from zoo.mixings import (
    Composition,
    LinearMixing,
    Mixing,
    affine_coupling_flow,
    moebius,
    orthogonal_mlp,
    unit_determinant,
)
from zoo.models import IMAVAE, DeepGaussianVAE, LearntNoise
from zoo.priors import Uniform

_ROWS, _BATCH = 6000, 64


class Sources(NamedTuple):
    """A row of numbers for each mixing: its C_IMA, the MCC of codes and sources, the C_IMA of the decoder learnt."""

    contrast: np.ndarray
    mcc: np.ndarray
    learnt: np.ndarray

    def correlation(self) -> Measured:
        """Of log C_IMA of the mixing and MCC, that must be negative."""
        r = float(np.corrcoef(np.log10(self.contrast), self.mcc)[0, 1])
        error = (1 - r**2) / math.sqrt(len(self.mcc) - 1)
        return at_most(f"correlation of log C_IMA and MCC, {len(self.mcc)} maps", r, 0.0, error=error)


def mixings(kind: str, num: int, dim: int) -> list[Mixing]:
    """Mixings by kind: Moebius maps as they are, or followed by a linear map that breaks the orthogonality."""
    first = [moebius(dim, minimum=0.7 if dim == 2 else 0.5, seed=seed) for seed in range(num)]
    if kind == "moebius":
        return list(first)
    if kind == "coupling":
        return [affine_coupling_flow(dim, seed=seed) for seed in range(num)]
    second = {"determinant": determinant, "columns": unit_columns, "angle": angle}[kind]
    return [Composition([one, second(seed, num, dim)]) for seed, one in enumerate(first)]


def determinant(seed: int, num: int, dim: int) -> LinearMixing:
    return unit_determinant(dim, seed=1000 + seed)


def unit_columns(seed: int, num: int, dim: int) -> LinearMixing:
    """Columns of length one with entries that were uniform on (0, 1)."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return LinearMixing(nn.functional.normalize(torch.rand(dim, dim, generator=generator, dtype=torch.float64), dim=0))


def angle(seed: int, num: int, dim: int) -> LinearMixing:
    """Two columns of length one at angles from 15 to 90 degrees."""
    theta = math.radians(15 + 75 * seed / max(1, num - 1))
    return LinearMixing([[1.0, math.cos(theta)], [0.0, math.sin(theta)]])


@cache
def trained(kind: str, num: int, dim: int, gamma2: float, steps: int, seed: int) -> Sources:
    """Train a pair for each mixing, and measure it on a fifth of the data that is held out."""
    uniform = torch.distributions.Uniform(-0.5, 0.5)
    options: dict[str, Any] = {"num": _ROWS, "test_size": _ROWS // 5, "standardise": True, "dtype": torch.float32}
    data = [mixed(m, sources=uniform, seed=s, **options) for s, m in enumerate(mixings(kind, num, dim))]
    pairs = train_many(partial(uniform_pair, dim), data, gamma2, steps, seed)
    columns = zip(*(measure(*pair, one) for pair, one in zip(pairs, data, strict=True)), strict=True)
    return Sources(*(np.array(column) for column in columns))


def uniform_pair(dim: int) -> tuple[nn.Module, nn.Module]:
    model = IMAVAE(dim, dim, prior=Uniform(dim, -0.5, 0.5))
    return model, MeanField(dim, dim, hidden=(64, 64), support=model.prior().support)  # type: ignore[arg-type]


def train_many(
    make: Callable[[], tuple[nn.Module, nn.Module]], data: Sequence[MixedDataset], gamma2: float, steps: int, seed: int
) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs trained at once by Adam at 2e-3, falling to zero as a cosine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = [make() for _ in data]
    objective = AnnealedPrecision(ELBO(), GeometricAnnealing(max(1, 3 * steps // 5), min(10.0, gamma2), gamma2))
    options: dict[str, Any] = {
        "optimizer": partial(Adam, lr=2e-3),
        "scheduler": partial(CosineAnnealingLR, T_max=steps),
    }
    train = [one.train for one in data]
    fit_many(pairs, train, steps=steps, objective=objective, batch_size=_BATCH, seed=seed, progress=False, **options)
    return pairs


@torch.no_grad()
def measure(model: nn.Module, guide: nn.Module, data: MixedDataset) -> tuple[float, float, float]:
    """C_IMA of the mixing, MCC, C_IMA of the decoder."""
    codes, truth = guide.posterior(data.test).mean, data.truth["z_test"]  # type: ignore[operator,index]
    found = mcc(codes, truth).value
    return float(ima_contrast(data.mixing, truth.double())), found, float(ima_contrast(model.decode, codes))  # type: ignore[arg-type]


def planar(kind: str, num: int, settings: Settings, *, gamma2: float = 1e4) -> Sources:
    """Mixings of the plane."""
    steps = 15_000 if settings.paper_scale else 4000
    return trained(kind, num, 2, gamma2, steps, settings.seed)


def number(settings: Settings) -> int:
    return 98 if settings.paper_scale else 24


@claim(
    REIZINGER, "Under a Moebius map, of the IMA class, the ELBO finds the true sources", paper_number="MCC .96, K = 3"
)
def moebius_sources(settings: Settings) -> Sequence[Measured]:
    found = planar("moebius", 4, settings)
    return [
        at_least("best MCC of four maps of the plane", float(found.mcc.max()), 0.98),
        at_least("their median", float(np.median(found.mcc)), 0.9),
    ]


@claim(
    REIZINGER,
    "Figure 4: the MCC rises from chance at gamma^2 = 10 to near one at 10^4 (here gamma^2 is in units of "
    "standardised data)",
    paper_number=".152 (chance of its measure) to .961",
)
def against_precision(settings: Settings) -> Sequence[Measured]:
    low, high = (planar("moebius", 4, settings, gamma2=gamma2) for gamma2 in (10.0, 1e4))
    rise = high.mcc - low.mcc
    error = float(rise.std(ddof=1)) / math.sqrt(len(rise))
    return [
        at_least("median MCC at 10^4, over all held-out data", float(np.median(high.mcc)), 0.9),
        at_least("rise of the MCC from 10 to 10^4, mean", float(rise.mean()), 0.1, error=error),
    ]


@claim(
    REIZINGER,
    "The further the mixing is from orthogonal columns, the less are the sources found (a linear map of determinant "
    "one after a Moebius map)",
    paper_number="correlation -.507, K = 3, 98 maps",
    slow=True,
)
def broken_orthogonality(settings: Settings) -> Sequence[Measured]:
    return [planar("determinant", number(settings), settings).correlation()]


@claim(
    REIZINGER,
    "Even then the ELBO learns decoders with nearly orthogonal columns, so other sources than the true ones",
    slow=True,
)
def orthogonal_decoders(settings: Settings) -> Sequence[Measured]:
    found = planar("determinant", number(settings), settings)
    share = found.learnt / found.contrast
    error = float(share.std(ddof=1)) / math.sqrt(len(share))
    lost = float(planar("moebius", 4, settings).mcc.max() - found.mcc.mean())
    return [
        at_most("median C_IMA of the decoders learnt, nats", float(np.median(found.learnt)), 0.05),
        at_most("C_IMA learnt over that of the mixing, mean", float(share.mean()), 0.5, error=error),
        at_least("MCC lost to the best Moebius map", lost, 0.08),
    ]


@claim(REIZINGER, "The same with linear maps of unit columns", slow=True)
def unit_column_maps(settings: Settings) -> Sequence[Measured]:
    return [planar("columns", number(settings), settings).correlation()]


@claim(REIZINGER, "The same in two dimensions, against the angle of two unit columns", slow=True)
def angles(settings: Settings) -> Sequence[Measured]:
    return [planar("angle", 12, settings).correlation()]


@claim(
    REIZINGER,
    "A flow of affine couplings, which is not of the IMA class: the sources are not found, or in part",
    paper_number="MCC .50 to .89, K = 4",
    slow=True,
)
def coupling_flow(settings: Settings) -> Sequence[Measured]:
    found = trained("coupling", 4, 4, 1e4, 15_000 if settings.paper_scale else 3000, settings.seed)
    mean, error = float(found.mcc.mean()), float(found.mcc.std(ddof=1)) / 2
    return [
        at_most("MCC, mean over four flows, K = 4", mean, 0.95, error=error),
        at_least("their C_IMA, least, nats", float(found.contrast.min()), 0.05),
    ]


@claim(
    REIZINGER,
    "Figure 2: the trained encoder's variances follow (1 + gamma^2 ||J_k||^2)^-1, and its error vanishes",
    paper_number="ratio 1.017, .999, 1.000 at gamma^2 = 10^2, 10^3, 10^4",
)
def trained_consistency(settings: Settings) -> Sequence[Measured]:
    found = {gamma2: consistency(gamma2, settings) for gamma2 in (1e2, 1e3, 1e4)}
    logs = np.log([variance for _, variance, _ in found.values()])
    fall = (logs[-1] - logs[0]) / math.log(100)
    return [
        *(close(f"variances over the formula at {g:.0e}, median", ratio, 1, 0.1) for g, (_, _, ratio) in found.items()),
        close("slope of log sigma^2 against log gamma^2", float(fall), -1, 0.1),
        at_most("squared error at 1e4 over that at 1e2", found[1e4][0] / found[1e2][0], 0.1),
    ]


def consistency(gamma2: float, settings: Settings) -> tuple[float, float, float]:
    """Squared error per dimension, mean variance, and the median of the variances over the formula."""
    normal = torch.distributions.Normal(0.0, 1.0)
    options: dict[str, Any] = {"num": _ROWS, "test_size": _ROWS // 5, "dtype": torch.float32}
    data = [mixed(orthogonal_mlp(3, seed=0), sources=normal, seed=0, **options)]
    steps = 20_000 if settings.paper_scale else 2500
    ((model, guide),) = train_many(normal_pair, data, gamma2, steps, settings.seed)
    found = self_consistency(model, guide, data[0].test, seed=0, progress=False)  # type: ignore[arg-type]
    return float(found.reconstruction.square().mean()) / 3, float(found.var.mean()), float(found.ratio.median())


def normal_pair() -> tuple[nn.Module, nn.Module]:
    return IMAVAE(3, 3), MeanField(3, 3, hidden=(64, 64))


@claim(
    REIZINGER,
    "Where gamma^2 is learnt on noiseless data, it ends far in the regime in which the limit holds",
    paper_number="2.3e5 +- .8e5 (60 000 data, longer training)",
)
def learnt_precision(settings: Settings) -> Sequence[Measured]:
    normal = torch.distributions.Normal(0.0, 1.0)
    data = mixed(orthogonal_mlp(3, seed=0), sources=normal, seed=0, num=_ROWS, test_size=0, dtype=torch.float32)
    steps = 60_000 if settings.paper_scale else 4000
    model, guide = DeepGaussianVAE(3, 3, hidden=(64, 64), noise=LearntNoise(1.0)), MeanField(3, 3, hidden=(64, 64))
    options: dict[str, Any] = {
        "optimizer": partial(Adam, lr=3e-3),
        "scheduler": partial(CosineAnnealingLR, T_max=steps),
    }
    fit(model, guide, data.train, steps=steps, batch_size=256, seed=settings.seed, progress=False, **options)
    return [at_least("gamma^2 learnt", float(model.sigma.detach().square().reciprocal()), 1e3)]


@claim(REIZINGER, "It holds in two, three and five dimensions (uniform sources, Moebius maps)", slow=True)
def dimensions(settings: Settings) -> Sequence[Measured]:
    steps = 15_000 if settings.paper_scale else 4000
    found = {dim: trained("moebius", 3, dim, 1e4, steps, settings.seed) for dim in (2, 3, 5)}
    return [at_least(f"best MCC of three maps, K = {dim}", float(one.mcc.max()), 0.95) for dim, one in found.items()]


sprite_images = undecided(
    REIZINGER,
    "sprite_images",
    "On 64 x 64 images of sprites x, y, scale and hue are found",
    "an hour of a core a seed; one gives .976 (examples/RESULTS.md), on images that are not the paper's",
    paper_number="MCC .974",
)
sprite_sweep = undecided(
    REIZINGER,
    "sprite_sweep",
    "Sprites: MCC against gamma^2 and epochs, and disturbances of the decoder",
    "as many runs of hours each",
)
