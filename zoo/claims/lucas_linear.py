"""Claims of "Don't Blame the ELBO!" on probabilistic PCA and the linear VAE: closed forms and exact gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from guides import Linear, MeanField
from inference import ELBO, AnalyticELBO, fit
from inference.information import rate_distortion, water_filling
from zoo.claims.claim import Measured, Settings, at_least, at_most, claim, close
from zoo.data import Scaled, digits, linear_gaussian, mnist
from zoo.linear import (
    PPCA,
    LinearVAE,
    collapse_threshold,
    inertia,
    mean_distortion,
    mean_log_evidence,
    mean_rate,
    negative_hessian,
    profiled_elbo,
    spectrum,
    stationary_points,
)

LUCAS = "Lucas et al. 2019"
# A spectrum whose stationary points are all known, and the dimension of its models.
EIGENVALUES, LATENT_DIM = (5.0, 3.0, 2.0, 1.2, 0.6, 0.3), 3
_NUM_DRAWS = 20  # of 1000 images


def example_spectrum() -> tuple[Tensor, Tensor]:
    """The eigenvalues (6,), and eigenvectors (6, 6) turned at random."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    return torch.tensor(EIGENVALUES, dtype=torch.float64), axes


def scaled_digits() -> Tensor:
    """All 1797 digits with pixels from 0 to 1, float64."""
    return digits(transform=Scaled(16.0), test_size=0).train


@claim(
    LUCAS,
    "At a fixed sigma^2, W with a collapsed column is a local maximum of the pPCA likelihood as soon as sigma^2 "
    "exceeds the eigenvalues left out",
    universal=True,
)
def collapsed_column(settings: Settings) -> Sequence[Measured]:
    lam, axes = example_spectrum()
    found = []
    for kept in range(LATENT_DIM):
        own = float(lam[kept])
        high = 1.5 * own if kept == 0 else 0.5 * (own + float(lam[kept - 1]))
        threshold = collapse_threshold(lam, axes, tuple(range(kept)), LATENT_DIM, low=0.5 * own, high=high)
        found.append(close(f"threshold of sigma^2 with {kept} columns alive", threshold, own, 1e-6))
    return found


@claim(LUCAS, "The ELBO of the linear VAE has no local maxima that the pPCA likelihood has not", universal=True)
def no_further_maxima(settings: Settings) -> Sequence[Measured]:
    lam, axes = example_spectrum()
    covariance = (axes * lam) @ axes.mT
    differing = sum(
        ways_up(mean_log_evidence, point.W, point.var, covariance)
        != ways_up(profiled_elbo, point.W, point.var, covariance)
        for var in (0.25, 0.9, 1.5, 2.5, 4.0, 6.0)
        for point in stationary_points(lam, axes, LATENT_DIM, var)
    )
    W, var = diagonal_free_saddle(axes)
    best = max(point.elbo for point in stationary_points(lam, axes, LATENT_DIM, 0.7))
    shortfalls = [best - climb(covariance, 0.7, seed) for seed in range(40 if settings.paper_scale else 10)]
    return [
        close("points where the numbers of ways up differ", differing, 0, 0.5),
        at_least("ways up from the saddle whose W'W is not diagonal", ways_up(profiled_elbo, W, var, covariance), 1),
        at_most("largest shortfall of a climb from a random start, nats", max(shortfalls), 1e-6),
    ]


def ways_up(objective: Callable[..., Tensor], W: Tensor, var: float, covariance: Tensor) -> int:
    """Directions of ascent in W, counted by autograd."""
    log_var = covariance.new_tensor(math.log(var))
    return int(inertia(negative_hessian(lambda w: objective(w, log_var, covariance), W))[0])


def diagonal_free_saddle(axes: Tensor) -> tuple[Tensor, float]:
    """A stationary point of the ELBO of K = 2 at this sigma^2, W = [a u1 + b u2, a u1 - b u2], by Newton's method."""
    lam, var = torch.tensor(EIGENVALUES, dtype=torch.float64), 0.7
    covariance = (axes * lam) @ axes.mT
    log_var = covariance.new_tensor(math.log(var))

    def value(ab: Tensor) -> Tensor:
        first, second = ab[0] * axes[:, 0], ab[1] * axes[:, 1]
        return profiled_elbo(torch.stack([first + second, first - second], 1), log_var, covariance)

    ab = torch.tensor([1.3668, 1.1697], dtype=torch.float64)
    for _ in range(5):
        hessian = torch.func.jacrev(torch.func.grad(value))(ab)
        ab = ab - torch.linalg.solve(hessian, torch.func.grad(value)(ab))
    first, second = ab[0] * axes[:, 0], ab[1] * axes[:, 1]
    return torch.stack([first + second, first - second], 1), var


def climb(covariance: Tensor, var: float, seed: int) -> float:
    """The ELBO where LBFGS ends from a random W."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(covariance), LATENT_DIM, generator=generator, dtype=torch.float64)
    log_var = covariance.new_tensor(math.log(var))
    return -minimise(lambda W: -profiled_elbo(W, log_var, covariance), start)[0]


def minimise(loss: Callable[..., Tensor], *starts: Tensor, iterations: int = 2000) -> tuple[float, list[Tensor]]:
    """Least loss by LBFGS, and the parameters."""
    parameters = [start.clone().requires_grad_() for start in starts]
    options: dict[str, Any] = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-10, "tolerance_change": 1e-15}
    optimizer = LBFGS(parameters, max_iter=iterations, history_size=50, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*parameters)
        value.backward()
        return value

    optimizer.step(closure)
    found = [p.detach() for p in parameters]
    return float(loss(*found)), found


@claim(LUCAS, "Maximising the ELBO finds the principal directions themselves, not only their span", universal=True)
def principal_directions(settings: Settings) -> Sequence[Measured]:
    lam, axes = example_spectrum()
    model, _ = train_linear_pair(points_with(lam, axes), LATENT_DIM)
    W = model.linear_gaussian.W.detach()
    cosines = (nn.functional.normalize(W, dim=0).mT @ axes[:, :LATENT_DIM]).abs()
    products = W.mT @ W
    off = (products - torch.diag(products.diagonal())).abs().max()
    return [
        at_least("least |cos| of a column and a principal direction", float(cosines.amax(1).min()), 0.999),
        at_least("least |cos| of a direction and a column", float(cosines.amax(0).min()), 0.999),
        at_most("largest off-diagonal of W'W", float(off), 1e-2),
    ]


def points_with(lam: Tensor, axes: Tensor) -> Tensor:
    """2 D points with this covariance (divisor N) and mean zero."""
    half = (len(lam) * lam).sqrt()[:, None] * axes.mT
    return torch.cat([half, -half])


def train_linear_pair(x: Tensor, latent_dim: int, *, sigma: float = 1.0) -> tuple[LinearVAE, Linear]:
    """The linear VAE with its linear guide, by LBFGS on the ELBO in closed form."""
    model = LinearVAE(x.shape[1], latent_dim, sigma=sigma).double()
    guide = Linear(x.shape[1], latent_dim).double()
    lbfgs = partial(LBFGS, max_iter=500, history_size=50, line_search_fn="strong_wolfe")
    fit(model, guide, x, steps=3, objective=AnalyticELBO(), optimizer=lbfgs, progress=False)
    return model, guide


@claim(LUCAS, "Figure 1: a zero column of W wakes up along those components alone whose eigenvalue exceeds sigma^2")
def zero_column(settings: Settings) -> Sequence[Measured]:
    eigen = spectrum(scaled_digits())
    lam, axes = eigen.eigenvalues, eigen.eigenvectors
    covariance, own = (axes * lam) @ axes.mT, lam[[0, 2]].tolist()
    noises = {"below both": 0.5 * own[1], "between": math.sqrt(own[0] * own[1]), "above both": 1.5 * own[0]}
    zero = torch.zeros(len(lam), 1, dtype=torch.float64)
    found = []
    for (name, var), expected in zip(noises.items(), (2, 1, 0), strict=True):
        log_var = covariance.new_tensor(math.log(var))
        objective = partial(profiled_elbo, log_var=log_var, covariance=covariance)
        rising = [curvature(objective, zero, axes[:, [i]]) > 0 for i in (0, 2)]
        found.append(close(f"directions up with sigma^2 {name}", sum(rising), expected, 0.5))
    return found


def curvature(function: Callable[[Tensor], Tensor], W: Tensor, direction: Tensor) -> float:
    """The second derivative along a direction."""
    slope = torch.func.grad(lambda t: function(W + t * direction))
    return float(torch.func.grad(slope)(W.new_tensor(0.0)))


@claim(
    LUCAS,
    "Likelihood and ELBO against K: with sigma^2 kept at its optimum for K = 50, latents beyond those whose eigenvalue "
    "exceeds it add nothing; with sigma^2 learnt they do, and the ELBO is the likelihood",
)
def against_latent_dim(settings: Settings) -> Sequence[Measured]:
    x = scaled_digits()
    var = float(PPCA.from_data(x, 50).sigma.detach().square())
    above = int((spectrum(x).eigenvalues > var).sum())
    fixed = {k: mean_of(PPCA.from_data(x, k, sigma=math.sqrt(var)), x) for k in (above, 60)}
    learnt = {k: mean_of(PPCA.from_data(x, k), x) for k in (50, above, 60)}
    gaps = [abs(mean_of(LinearVAE.optimum(x, k), x) - elbo_of(LinearVAE.optimum(x, k), x)) for k in (5, 20, 50)]
    return [
        close(f"log p won by K = 60 over {above}, sigma^2 fixed at {var:.2e}, nats", fixed[60] - fixed[above], 0, 1e-8),
        at_least("the same, sigma^2 learnt, nats", learnt[60] - learnt[50], 1.0),
        at_most("largest gap of log p and best ELBO at K = 5, 20, 50, nats", max(gaps), 1e-8),
    ]


def mean_of(model: Any, x: Tensor) -> float:
    """Mean log p(x) in closed form."""
    return float(model.log_evidence(x).mean().detach())


def elbo_of(model: LinearVAE, x: Tensor) -> float:
    """Mean ELBO with the best linear guide."""
    own, eigen = model.linear_gaussian, spectrum(x)
    covariance = (eigen.eigenvectors * eigen.eigenvalues) @ eigen.eigenvectors.mT
    return float(profiled_elbo(own.W.detach(), own.sigma.detach().square().log(), covariance))


@claim(
    LUCAS,
    "The authors' notebook: the largest pPCA likelihood of 1000 MNIST images, K = 200, pixels from 0 to 1",
    paper_number="941.65, or 942.05 with the covariance divided by N; its 1000 images come in another order than ours",
    needs_mnist=True,
)
def notebook(settings: Settings) -> Sequence[Measured]:
    x = mnist(settings.mnist, transform=Scaled(255.0)).train.double()
    generator = torch.Generator().manual_seed(settings.seed)
    draws = [x[torch.randperm(len(x), generator=generator)[:1000]] for _ in range(_NUM_DRAWS)]
    values = torch.tensor([mean_of(PPCA.from_data(part, 200), part) for part in draws])
    mean, spread = float(values.mean()), float(values.std())
    away = (942.046 - mean) / spread
    name = f"the notebook's value less the mean {mean:.1f} of {_NUM_DRAWS} draws, in their deviations {spread:.1f}"
    return [close(name, away, 0, 3.0)]


@claim(LUCAS, "No encoder, however flexible, lifts a linear decoder above the maximum of pPCA", universal=True)
def any_encoder(settings: Settings) -> Sequence[Measured]:
    x, latent_dim = scaled_digits(), 10
    best = mean_of(PPCA.from_data(x, latent_dim), x)
    found = []
    for name, hidden in {"linear": None, "one hidden layer": (64,), "two hidden layers": (64, 64)}.items():
        model = LinearVAE(64, latent_dim, sigma=0.3).double()
        guide = Linear(64, latent_dim) if hidden is None else MeanField(64, latent_dim, hidden=hidden)
        value = train_by_adam(model, guide.double(), x, AnalyticELBO(), 6000 if settings.paper_scale else 500)
        found.append(at_most(f"ELBO less the maximum, {name}, nats", value - best, 0.0))
    return found


def train_by_adam(model: LinearVAE, guide: Any, x: Tensor, objective: Any, steps: int) -> float:
    """Train, and return the ELBO in closed form."""
    options: dict[str, Any] = {
        "optimizer": partial(Adam, lr=0.02),
        "scheduler": partial(CosineAnnealingLR, T_max=steps),
    }
    fit(model, guide, x, steps=steps, objective=objective, seed=0, progress=False, **options)
    return -rate_distortion(model, guide, x).total.value


@claim(LUCAS, "Trained on one sample per data point, the linear VAE comes to the optimum of the ELBO in closed form")
def stochastic_training(settings: Settings) -> Sequence[Measured]:
    x, latent_dim, steps = (
        linear_gaussian(400, data_dim=8, latent_dim=3).train,
        3,
        8000 if settings.paper_scale else 1500,
    )
    best = mean_of(PPCA.from_data(x, latent_dim), x)
    found = []
    for name, objective in {"closed form": AnalyticELBO(), "one sample": ELBO()}.items():
        torch.manual_seed(settings.seed)
        model, guide = LinearVAE(8, latent_dim).double(), Linear(8, latent_dim).double()
        value = train_by_adam(model, guide, x, objective, steps)
        found.append(Measured(name=f"ELBO less its maximum, {name}, nats", value=value - best, lower=-0.1, upper=0.0))
    return found


@claim(
    LUCAS, "At a fixed sigma^2 the weight beta of the KL term acts as beta sigma^2 in place of sigma^2", universal=True
)
def noise_as_beta(settings: Settings) -> Sequence[Measured]:
    lam, axes = example_spectrum()
    covariance, var, latent_dim = (axes * lam) @ axes.mT, 0.4, 4
    found = []
    for beta in (0.5, 2.0, 5.0):
        rate, distortion = best_code(covariance, var, latent_dim, beta)
        known = water_filling(lam, var, latent_dim, beta=beta)
        alike = water_filling(lam, beta * var, latent_dim)
        found += [
            close(f"R at beta = {beta:g}, nats", rate, alike.rate, 1e-3),
            close(f"D at beta = {beta:g}, nats", distortion, known.distortion, 1e-3),
        ]
    return found


def best_code(covariance: Tensor, var: float, latent_dim: int, beta: float) -> tuple[float, float]:
    """Rate and distortion at the minimum of D + beta R over all linear codes, by LBFGS."""
    generator = torch.Generator().manual_seed(1)
    log_var = covariance.new_tensor(math.log(var))
    W = 0.3 * torch.randn(len(covariance), latent_dim, generator=generator, dtype=torch.float64)
    starts = W, W.mT.contiguous(), torch.full((latent_dim,), -1.0, dtype=torch.float64)

    def loss(W: Tensor, V: Tensor, log_d: Tensor) -> Tensor:
        return mean_distortion(W, log_var, V, log_d, covariance) + beta * mean_rate(V, log_d, covariance)

    _, (W, V, log_d) = minimise(loss, *starts, iterations=3000)
    return float(mean_rate(V, log_d, covariance)), float(mean_distortion(W, log_var, V, log_d, covariance))
