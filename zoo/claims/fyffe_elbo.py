"""Claims of Fyffe 2019 on the ELBO at its stationary points, on constant variances and on the limit of little noise.

Only the paper's abstract is known to us: its numbers are not recoverable, and its claims are taken as they stand there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from guides import Local, MeanField, TiedMeanField, local_gauss_newton, local_gaussian
from inference import AnalyticKLELBO, LogJoint, evidence, fit, refit
from inference.diagnostics import constant_var, constant_var_penalty, expected_hessian
from inference.distributions.gaussian import DiagNormal
from inference.information import elbo_entropies, rate_distortion
from inference.numerics.jacobian import decoder_jacobian
from zoo.claims.claim import Measured, Settings, at_least, at_most, claim, close
from zoo.claims.lucas_linear import diagonal_free_saddle, example_spectrum, points_with, scaled_digits
from zoo.claims.reizinger_limit import limits
from zoo.linear import LinearVAE, mean_log_evidence, profiled_elbo, stationary_points_of_learned_noise
from zoo.mixings import triangular_mlp
from zoo.models import IMAVAE, DeepGaussianVAE, LearntNoise
from zoo.priors import LearntDiagonal

FYFFE = "Fyffe 2019"
_ROWS = 24


class Point(NamedTuple):
    """A stationary point of the linear VAE's ELBO: gradient's norm, ELBO, sum of entropies and log p, in nats."""

    slope: float
    elbo: float
    entropies: float
    log_p: float


def linear_points() -> list[Point]:
    """All with learnt noise and diagonal W'W, of a known spectrum and K = 3; the maximum has the largest log p."""
    lam, axes = example_spectrum()
    x, covariance = points_with(lam, axes), (axes * lam) @ axes.mT
    found = []
    for point in stationary_points_of_learned_noise(lam, axes, 3):
        W, log_var = (
            point.W.clone().requires_grad_(),
            torch.tensor(point.var, dtype=torch.float64).log().requires_grad_(),
        )
        value = profiled_elbo(W, log_var, covariance)
        slope = math.hypot(*(float(g.norm()) for g in torch.autograd.grad(value, (W, log_var))))
        model = linear_model(point.W, point.var)
        entropies = float(elbo_entropies(model, TiedMeanField(model), x).total)
        found.append(Point(slope, float(value.detach()), entropies, point.log_evidence))
    return found


def linear_model(W: Tensor, var: float) -> LinearVAE:
    model = LinearVAE(*W.shape).double()
    with torch.no_grad():
        model.W.copy_(W)
        model.log_sigma.fill_(0.5 * math.log(var))
    return model


class Deep(NamedTuple):
    """A deep Gaussian VAE trained with learnt noise: ELBO, sum of entropies and log p of its data, and their errors."""

    elbo: float
    entropies: float
    log_p: float
    error: float


@cache
def deep_point(steps: int, seed: int) -> Deep:
    """K = 2 on digits, with the prior's variances learnt, too; log p by quadrature."""
    x = scaled_digits()[:300]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"noise": LearntNoise(0.2), "prior": LearntDiagonal(2)}
        model = DeepGaussianVAE(64, 2, hidden=(32,), **options).double()
        guide = MeanField(64, 2, hidden=(64,)).double()
    train(model, guide, x, steps, rate=5e-3, seed=seed)
    for network in (model.network, guide):
        network.requires_grad_(False)
    train(model, guide, x, 300, rate=2e-2, seed=seed)  # the variances of noise and prior alone, to their optimum
    own = rate_distortion(model, guide, x, num_samples=200, seed=0, progress=False).total
    rows = evidence(model, x, method="quadrature", progress=False)
    return Deep(-own.value, float(elbo_entropies(model, guide, x).total), float(rows.value.mean()), own.standard_error)


def train(model: nn.Module, guide: nn.Module, x: Tensor, steps: int, *, rate: float, seed: int) -> None:
    """By Adam, the rate falling to zero as a cosine."""
    adam, cosine = partial(Adam, lr=rate), partial(CosineAnnealingLR, T_max=steps)
    objective = AnalyticKLELBO(4)
    fit(model, guide, x, steps=steps, objective=objective, optimizer=adam, scheduler=cosine, seed=seed, progress=False)


def deep_steps(settings: Settings) -> int:
    return 20_000 if settings.paper_scale else 1200


@claim(FYFFE, "The ELBO at its stationary points is the exact log evidence", universal=True)
def stationary_evidence(settings: Settings) -> Sequence[Measured]:
    lam, axes = example_spectrum()
    covariance, (W, var) = (axes * lam) @ axes.mT, diagonal_free_saddle(axes)
    log_var = torch.tensor(var, dtype=torch.float64).log()
    slope = torch.func.grad(lambda w: profiled_elbo(w, log_var, covariance))(W).norm()
    saddle = mean_log_evidence(W, log_var, covariance) - profiled_elbo(W, log_var, covariance)
    best = max(linear_points(), key=lambda point: point.log_p)
    deep = deep_point(deep_steps(settings), settings.seed)
    near, contrast = limits("triangular", settings)
    known = f"known deep decoder of contrast {contrast:.4f}, gamma^2 = 10^5, its best diagonal guides"
    return [
        close("linear VAE, its maximum: log p - ELBO, nats", best.log_p - best.elbo, 0, 1e-8),
        at_most("linear VAE, a saddle: norm of the gradient", float(slope), 1e-8),
        close("the same saddle: log p - ELBO, nats", float(saddle), 0, 1e-6),
        close(f"{known}: log p - ELBO, nats", near[5].gap, 0, 0.01, error=near[5].error),
        close("deep VAE on digits, trained: log p - ELBO, nats", deep.log_p - deep.elbo, 0, 0.01, error=deep.error),
    ]


@claim(
    FYFFE,
    "Instead: at stationary points with learnt noise the ELBO is a sum of three entropies (Damm et al. 2023)",
    universal=True,
)
def entropy_sum(settings: Settings) -> Sequence[Measured]:
    points = linear_points()
    deep = deep_point(deep_steps(settings), settings.seed)
    return [
        at_most(f"largest gradient of {len(points)} points of the linear VAE", max(p.slope for p in points), 1e-8),
        at_most("their largest |ELBO - entropies|, nats", max(abs(p.elbo - p.entropies) for p in points), 1e-8),
        close("deep VAE on digits: ELBO - entropies, nats", deep.elbo - deep.entropies, 0, 0.1, error=deep.error),
    ]


def diagonal_sources(mixing: nn.Module, gamma2: float) -> tuple[IMAVAE, Tensor]:
    """A near-deterministic VAE with a known decoder, and data of it."""
    model = IMAVAE(2, 2, gamma2=gamma2, network=mixing).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    z, noise = torch.randn(2, _ROWS, 2, generator=generator, dtype=torch.float64)
    return model, model.decode(z) + noise / math.sqrt(gamma2)


@claim(
    FYFFE,
    "Constant variances cost little, 1/2 sum_k (log E H_k - E log H_k), with H_k the curvature of the log joint",
)
def constant_variances(settings: Settings) -> Sequence[Measured]:
    found = []
    for seed in (0, 3, 4):
        model, x = diagonal_sources(triangular_mlp(2, seed=seed), 1000.0)
        predicted, measured = penalties(model, local_gauss_newton(model, x, seed=0), x)
        found.append(
            close(
                f"measured over predicted loss, decoder {seed}, loss {measured:.3f} nats", measured / predicted, 1, 0.05
            )
        )
    return found


def penalties(model: Any, start: Local, x: Tensor, curvature: Tensor | None = None) -> tuple[float, float]:
    """What constant variances cost by the formula, and measured by the best guides with and without them, in nats."""
    best = refit(model, start, x, restarts=0, seed=0, progress=False)
    posterior = best.guide.posterior(x)  # type: ignore[operator]
    if curvature is None:
        draws = posterior.sample(torch.Size((64,)))
        curvature = expected_hessian(LogJoint(model, x), draws).value.diagonal(dim1=-2, dim2=-1)
    mean, sigma = posterior.mean.detach(), constant_var(curvature).sqrt()
    family = partial(DiagNormal, sigma=sigma)
    tied = Local(x, mean, sigma.expand_as(mean), family=family, support=constraints.real_vector)
    worse = refit(model, tied, x, restarts=0, seed=0, progress=False)
    return float(constant_var_penalty(curvature)), float((best.elbo - worse.elbo).mean())


@claim(
    FYFFE,
    "The best posterior variances are a stochastic estimate of the log joint's second derivatives",
    universal=True,
)
def variances_are_curvature(settings: Settings) -> Sequence[Measured]:
    model, x = diagonal_sources(triangular_mlp(2, seed=4), 100.0)
    best = refit(model, local_gauss_newton(model, x, seed=0), x, restarts=0, seed=0, progress=False)
    posterior = best.guide.posterior(x)  # type: ignore[operator]
    hessian = expected_hessian(LogJoint(model, x), posterior.sample(torch.Size((2000,))))
    product_ = hessian.value.diagonal(dim1=-2, dim2=-1) * posterior.variance.detach()
    relative = hessian.standard_error.diagonal(dim1=-2, dim2=-1) * posterior.variance.detach()
    error = float(relative.square().sum().sqrt()) / relative.numel()
    return [close("mean of sigma_k^2 E_q[-d_k^2 log p(x, z)]", float(product_.mean()), 1, 0.01, error=error)]


class PoissonCounts(nn.Module):
    """Counts with log rates f(z) + b: the likelihood's Fisher metric in the log rates is the diagonal of the rates."""

    def __init__(self, mixing: nn.Module, offset: float) -> None:
        super().__init__()
        self.mixing, self.offset = mixing, offset

    def log_rate(self, z: Tensor) -> Tensor:
        """Of z (..., 2), (..., 2)."""
        return self.mixing(z) + self.offset

    def forward(self, x: Tensor | None = None, n: int | None = None) -> Tensor:
        """The generative story."""
        size = n if x is None else len(x)
        with pyro.plate("data", size, dim=-1):
            z = pyro.sample("z", DiagNormal(torch.zeros(2).double(), torch.ones(2).double()))
            return pyro.sample("x", dist.Poisson(self.log_rate(z).exp()).to_event(1), obs=x)


@claim(
    FYFFE,
    "The result holds for any likelihood that induces a Riemannian metric: H = 1 + J' F J with its Fisher metric F, "
    "for Bernoulli and Poisson likelihoods",
)
def fisher_metric(settings: Settings) -> Sequence[Measured]:
    mixing = triangular_mlp(2, seed=4)
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(_ROWS, 2, generator=generator, dtype=torch.float64).clamp(-1.5, 1.5)
    model = PoissonCounts(mixing, math.log(1000.0)).double()
    rates = model.log_rate(z).exp()
    x = rates.round()
    fisher = decoder_jacobian(mixing, z).square().mul(rates.unsqueeze(-1)).sum(-2) + 1
    start = local_gaussian(x, DiagNormal(z, fisher.rsqrt()))
    predicted, measured = penalties(model, start, x, fisher)
    return [
        close(f"Poisson: measured over predicted loss, loss {measured:.3f} nats", measured / predicted, 1, 0.1),
        close("Bernoulli: largest error of E[-Hessian] = J'FJ over all outcomes", bernoulli_error(mixing, z), 0, 1e-8),
    ]


def bernoulli_error(mixing: Callable[[Tensor], Tensor], z: Tensor) -> float:
    """Of the expected Hessian by autograd, summed over all outcomes, against the Fisher metric, p (1 - p) in logits."""

    def log_likelihood(point: Tensor, x: Tensor) -> Tensor:
        logits = mixing(point[None])[0]
        return (x * logits - nn.functional.softplus(logits)).sum()

    worst = 0.0
    for point in z[:4]:
        p = mixing(point[None])[0].sigmoid()
        expected = torch.zeros(2, 2, dtype=torch.float64)
        for outcome in product((0.0, 1.0), repeat=2):
            x = torch.tensor(outcome, dtype=torch.float64)
            hessian = torch.func.jacrev(torch.func.grad(log_likelihood))(point, x)
            expected -= torch.where(x > 0, p, 1 - p).prod() * hessian
        jacobian = decoder_jacobian(mixing, point[None])[0]
        worst = max(worst, float((expected - jacobian.mT @ torch.diag(p * (1 - p)) @ jacobian).abs().max()))
    return worst


@claim(
    FYFFE,
    "As the likelihood's variance vanishes, the ELBO tends to the log density by change of variables (full covariance)",
)
def change_of_variables(settings: Settings) -> Sequence[Measured]:
    found, _ = limits("triangular", settings)
    off = {exponent: abs(one.noiseless - one.gap + one.full_gap) for exponent, one in found.items()}
    return [
        at_most("|log p by change of variables - ELBO| at gamma^2 = 10^5, nats", off[5], 1e-3),
        at_least("the same at 10^2 over that at 10^4", off[2] / off[4], 10.0),
    ]
