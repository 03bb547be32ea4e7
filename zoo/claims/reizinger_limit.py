"""Claims of "Embrace the gap" on a known decoder, f fixed: the best guide of each data point as the noise vanishes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from guides import GaussNewtonDiagonal, GaussNewtonFull, local_gauss_newton
from inference import evidence, refit
from inference.identifiability import ima_contrast, mcc, self_consistency
from zoo.claims.claim import Measured, Settings, at_least, at_most, claim, close
from zoo.mixings import Composition, Mixing, SmoothLeakyReLU, orthogonal, triangular_mlp
from zoo.models import IMAVAE

REIZINGER = "Reizinger et al. 2022"
EXPONENTS = (2, 3, 4, 5)  # of gamma^2
_ROWS, _LARGE_ROWS = 12, 100


class Limit(NamedTuple):
    """Means over data points at one precision, in nats, and the encoder's moments.

    Attributes:
        gap: log p_gamma - ELBO*, of the best guide with independent coordinates.
        full_gap: The same with a full covariance.
        noiseless: log p of the noiseless density less ELBO*.
        error: Standard error of these.
        residual: ||f(mu(x)) - x||^2 / D.
        var: Variance of the guide, mean.
        ratio: Median of the variances over those that the Jacobian predicts.
    """

    gap: float
    full_gap: float
    noiseless: float
    error: float
    residual: float
    var: float
    ratio: float


def mixing_named(name: str) -> Mixing:
    """The decoders by name: one of the paper's architecture, and one of the IMA class."""
    if name == "triangular":
        return triangular_mlp(2, seed=4)
    return Composition([SmoothLeakyReLU(2, 0.2), orthogonal(2, seed=1)])


@cache
def limit(name: str, exponent: float, rows: int) -> tuple[Limit, float]:
    """A decoder at gamma^2 = 10^exponent on data x = f(z), and its C_IMA there."""
    mixing = mixing_named(name)
    z = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, model = mixing(z), IMAVAE(2, 2, gamma2=10.0**exponent, network=mixing).double()
    best, full = (
        refit(model, local_gauss_newton(model, x, family=family, seed=0), x, restarts=0, seed=0, progress=False)
        for family in (GaussNewtonDiagonal, GaussNewtonFull)
    )
    known = evidence(model, x, method="quadrature", progress=False)
    noiseless = model.prior().log_prob(z) - mixing.log_abs_det(z)
    moments = self_consistency(model, best.guide, x, inverse=mixing.inverse, progress=False)  # type: ignore[arg-type]
    error = float((best.standard_error.square().sum()).sqrt()) / rows
    found = Limit(
        gap=float((known.value - best.elbo).mean()),
        full_gap=float((known.value - full.elbo).mean()),
        noiseless=float((noiseless - best.elbo).mean()),
        error=error,
        residual=float(moments.reconstruction.square().mean()) / 2,
        var=float(moments.var.mean()),
        ratio=float(moments.ratio.median()),
    )
    return found, float(ima_contrast(mixing, z))


def limits(name: str, settings: Settings) -> tuple[dict[int, Limit], float]:
    rows = _LARGE_ROWS if settings.paper_scale else _ROWS
    found = {exponent: limit(name, exponent, rows) for exponent in EXPONENTS}
    return {exponent: one for exponent, (one, _) in found.items()}, found[EXPONENTS[0]][1]


@claim(
    REIZINGER,
    "Self-consistency: as the noise vanishes, the best encoder inverts the decoder and its variances are "
    "(1 + gamma^2 ||J_k||^2)^-1",
)
def self_consistent(settings: Settings) -> Sequence[Measured]:
    found, _ = limits("triangular", settings)
    return [
        close("variances over the formula at gamma^2 = 10^4, median", found[4].ratio, 1, 0.01),
        at_most(
            "squared error of f(mu(x)) at gamma^2 = 10^5 over that at 10^3", found[5].residual / found[3].residual, 0.01
        ),
    ]


@claim(REIZINGER, "As the noise vanishes, the gap of the best guide with independent coordinates tends to C_IMA")
def gap_to_contrast(settings: Settings) -> Sequence[Measured]:
    found, contrast = limits("triangular", settings)
    off = {exponent: abs(one.gap - contrast) for exponent, one in found.items()}
    return [
        close(f"gap less C_IMA = {contrast:.4f} at gamma^2 = 10^5, nats", found[5].gap - contrast, 0, 0.01 * contrast),
        at_least("|gap - C_IMA| at gamma^2 = 10^3 over that at 10^4", off[3] / off[4], 5.0),
    ]


@claim(
    REIZINGER,
    "Figure 3: against the noiseless log p, too, the gap of ELBO* tends to C_IMA, from above",
    paper_number="falls from 12.3 to 7.16; C_IMA 7.07 (another mixing)",
)
def noiseless_gap(settings: Settings) -> Sequence[Measured]:
    found, contrast = limits("triangular", settings)
    return [
        close("noiseless gap less C_IMA at gamma^2 = 10^5, nats", found[5].noiseless - contrast, 0, 0.01 * contrast),
        at_least("noiseless gap at gamma^2 = 10^2 less at 10^5, nats", found[2].noiseless - found[5].noiseless, 0.0),
    ]


@claim(REIZINGER, "Figure 3, control: for a mixing of the IMA class, with orthogonal columns, the gap vanishes")
def control(settings: Settings) -> Sequence[Measured]:
    found, contrast = limits("turned", settings)
    return [
        at_most("C_IMA of the mixing, nats", contrast, 1e-10),
        close("gap at gamma^2 = 10^5, nats", found[5].gap, 0, 1e-3),
        at_least("gap at gamma^2 = 10^2 over that at 10^4", found[2].gap / found[4].gap, 10.0),
    ]


@claim(
    REIZINGER,
    "The ELBO prefers decoders with orthogonal columns among those of one likelihood (linear case, every rotation)",
    universal=True,
)
def prefers_orthogonal(settings: Settings) -> Sequence[Measured]:
    matrix, gamma2 = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)), 100.0
    angles = torch.linspace(0, math.pi / 4, 10).tolist()
    gaps = [linear_gap(matrix @ rotation(angle), gamma2) for angle in angles]
    rises = [b - a for a, b in pairwise(gaps)]
    return [
        close("gap with orthogonal columns, nats", gaps[0], 0, 1e-12),
        at_least("least rise of the gap from one of ten angles up to 45 degrees to the next, nats", min(rises), 0.0),
    ]


def rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def linear_gap(W: Tensor, gamma2: float) -> float:
    """Half of sum log M_kk - log det M, M = I + gamma^2 W'W."""
    M = torch.eye(W.shape[1], dtype=W.dtype) + gamma2 * W.mT @ W
    return 0.5 * float(M.diagonal().log().sum() - torch.logdet(M))


@claim(
    REIZINGER,
    "The measure of Figure 4: its MCC where nothing is found (gamma^2 = 10 and 100) is that of chance over batches of "
    "64",
    paper_number="MCC .152 and .151",
)
def chance_level(settings: Settings) -> Sequence[Measured]:
    generator = torch.Generator().manual_seed(settings.seed)
    num = 4000 if settings.paper_scale else 400
    draws = torch.rand(num, 2, 64, 3, generator=generator, dtype=torch.float64)
    values = torch.tensor([mcc(codes, truth).value for codes, truth in draws])
    error = float(values.std()) / math.sqrt(num)
    large = torch.rand(2, 12_000, 3, generator=generator, dtype=torch.float64)
    return [
        close("MCC of independent codes, batches of 64", float(values.mean()), 0.1515, 0.01, error=error),
        at_most("the same over 12 000 data points", float(mcc(*large).value), 0.05),
    ]
