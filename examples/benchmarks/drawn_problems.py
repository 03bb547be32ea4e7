"""Problems freshly drawn, each with its evidence by independent means: closed forms, or sums over 10^6 points.

Nothing here comes from the package: models are plain Pyro functions, and every row of a batch is a problem of its own,
with its own noise, frequency, place or weights. Guides are bound to their rows: of the posterior's moments ("good"),
about a single mode or beside it ("biased"), or of a third of the width ("narrow").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.special
import scipy.stats
import torch
from torch import Tensor

_REACH, _POINTS = 8.0, 1_000_000
GUIDES = ("none", "good", "biased", "narrow")


class BoundGuide:
    """A guide bound to its rows: independent sites, each a distribution of parameters (N, ...)."""

    def __init__(self, make: Callable[..., dict[str, dist.Distribution]], *params: Tensor) -> None:
        self.make, self.params = make, params

    def __call__(self, *_: Tensor) -> None:
        """Sample every site."""
        with pyro.plate("data", len(self.params[0])):
            for name, distribution in self.make(*self.params).items():
                pyro.sample(name, distribution)

    def rows(self, index: Tensor) -> BoundGuide:
        """The guide of chosen rows."""
        return BoundGuide(self.make, *(param[index] for param in self.params))


@dataclass(frozen=True)
class Drawn:
    """Problems, one a row: a model with its arguments, their log p(x) (N,), and guides by name."""

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    truth: Tensor
    guides: dict[str, BoundGuide]


def _sigmas(rng: np.random.Generator, num: int) -> Tensor:
    return torch.from_numpy(10 ** rng.uniform(-3, 0, num))


def _normals(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def _log_normal(x: Tensor, mean: Tensor | float, sigma: Tensor | float) -> Tensor:
    sigma = torch.as_tensor(sigma, dtype=x.dtype)
    return -0.5 * ((x - mean) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)


def _sum(log_f: Tensor, grid: Tensor) -> Tensor:
    """Log of the integral of exp(log_f) over a grid, by the trapezium rule."""
    return torch.from_numpy(np.asarray(np.log(np.trapezoid((log_f - log_f.max()).exp(), grid)))) + log_f.max()


# --- Gaussian latents with additive noise ------------------------------------------------------------


def additive(mean: Callable[[Tensor, Tensor], Tensor], dim: int) -> Callable[..., None]:
    """x = mean(z, theta) + sigma noise, z standard normal; sigma is the first column of theta."""

    def model(x: Tensor, theta: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mean(z, theta), theta[:, :1]).to_event(1), obs=x)

    return model


def _gaussian(loc: Tensor, factor: Tensor) -> dict[str, dist.Distribution]:
    return {"z": dist.MultivariateNormal(loc, scale_tril=factor, validate_args=False)}


def _gaussians(centre: Tensor, spread: Tensor, mode: Tensor, width: Tensor) -> dict[str, BoundGuide]:
    """Guides from posterior moments and from one mode, each (N, d)."""
    good, biased, narrow = (torch.diag_embed(s) for s in (1.2 * spread, 1.2 * width, 0.3 * spread))
    pairs = {"good": (centre, good), "biased": (mode, biased), "narrow": (centre, narrow)}
    return {name: BoundGuide(_gaussian, *pair) for name, pair in pairs.items()}


def _line_row(mean: Callable[[Tensor, Tensor], Tensor], x: Tensor, theta: Tensor) -> Tensor:
    """log p(x), posterior mean and standard deviation, best mode and its width, of one row of one latent."""
    grid = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    decoded = mean(grid.view(-1, 1, 1), theta)[:, 0, 0]
    log_f = _log_normal(grid, 0.0, 1.0) + _log_normal(x, decoded, theta[0, 0])
    weights, top = log_f.softmax(0), int(log_f.argmax())
    centre = (weights * grid).sum()
    spread = (weights * (grid - centre).square()).sum().sqrt()
    beside = decoded[max(0, top - 1) : top + 2]
    slope = (beside[-1] - beside[0]) / ((len(beside) - 1) * (grid[1] - grid[0]))
    width = (1 + (slope / theta[0, 0]).square()).rsqrt()
    return torch.stack([_sum(log_f, grid), centre, spread, grid[top], width])


def _lines(mean: Callable[[Tensor, Tensor], Tensor], x: Tensor, theta: Tensor) -> Tensor:
    return torch.stack([_line_row(mean, x[i], theta[i : i + 1]) for i in range(len(x))])


def _on_a_line(mean: Callable[[Tensor, Tensor], Tensor], theta: Tensor, rng: np.random.Generator) -> Drawn:
    num = len(theta)
    x = mean(_normals(rng, num, 1), theta) + theta[:, :1] * _normals(rng, num, 1)
    found = _lines(mean, x, theta)
    return Drawn(additive(mean, 1), (x, theta), found[:, 0], _gaussians(*(found[:, i : i + 1] for i in range(1, 5))))


def _folded(z: Tensor, theta: Tensor) -> Tensor:
    return theta[:, 1:2] * z + theta[:, 2:3] * z.square() + theta[:, 3:4] * z**3


def fold(rng: np.random.Generator, num: int) -> Drawn:
    """Parabolas and cubics with up to three sheets."""
    cubic, parabola = torch.tensor([[-3.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    shape = torch.where(torch.from_numpy(rng.random((num, 1)) < 0.5), cubic, parabola).double()
    shape = shape * torch.from_numpy(rng.uniform(0.5, 1.5, (num, 3)))
    return _on_a_line(_folded, torch.cat([_sigmas(rng, num).unsqueeze(-1), shape], -1), rng)


def folds(rng: np.random.Generator, num: int) -> Drawn:
    """Four independent folds at once: up to 16 modes and more."""
    dim = 4

    def mean(z: Tensor, theta: Tensor) -> Tensor:
        return z.square() + theta[:, 1:2] * z

    sigma = torch.from_numpy(10 ** rng.uniform(-1.5, 0, num)).unsqueeze(-1)
    theta = torch.cat([sigma, torch.from_numpy(rng.uniform(0.0, 0.5, (num, 1)))], -1)
    x = mean(_normals(rng, num, dim), theta) + sigma * _normals(rng, num, dim)
    found = torch.stack([_lines(mean, x[:, i : i + 1], theta) for i in range(dim)], -1)
    return Drawn(additive(mean, dim), (x, theta), found[:, 0].sum(-1), _gaussians(*(found[:, i] for i in range(1, 5))))


_KINKS = 6


def _kinked(z: Tensor, theta: Tensor) -> Tensor:
    """sum_j a_j max(0, s_j (z - b_j)) of each coordinate (..., N, d), by theta's columns after the first."""
    slopes, places, signs = theta[:, 1 : 1 + 3 * _KINKS].unsqueeze(-2).chunk(3, dim=-1)
    return (slopes * (signs * (z.unsqueeze(-1) - places)).relu()).sum(-1)


def kinks(dim: int, rng: np.random.Generator, num: int) -> Drawn:
    """Decoders of six ReLUs a latent, turned at random: kinks across all coordinates, and several modes at them."""
    sigma = torch.from_numpy(10 ** rng.uniform(-1, 0, num)).unsqueeze(-1)
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], (num, _KINKS)))
    slopes, places = torch.from_numpy(rng.standard_normal((2, num, _KINKS)))
    turn = torch.from_numpy(np.linalg.qr(rng.standard_normal((num, dim, dim)))[0])
    theta = torch.cat([sigma, slopes, places, signs, turn.flatten(1)], -1)

    def mean(z: Tensor, theta: Tensor) -> Tensor:
        turn = theta[:, 1 + 3 * _KINKS :].view(-1, dim, dim)
        return _kinked((turn @ z.unsqueeze(-1)).squeeze(-1), theta)

    x = mean(_normals(rng, num, dim), theta) + sigma * _normals(rng, num, dim)
    found = torch.stack([_lines(_kinked, x[:, i : i + 1], theta) for i in range(dim)], -1)
    place = (turn.mT @ found[:, [1, 3]].mT).mT  # posterior mean and best mode
    spread, width = (
        (turn.mT.square() @ v.square().unsqueeze(-1)).squeeze(-1).sqrt() for v in (found[:, 2], found[:, 4])
    )
    return Drawn(
        additive(mean, dim), (x, theta), found[:, 0].sum(-1), _gaussians(place[:, 0], spread, place[:, 1], width)
    )


def _wave(z: Tensor, theta: Tensor) -> Tensor:
    return (theta[:, 1:2] * z).sin() + 0.3 * z


def sine(rng: np.random.Generator, num: int) -> Drawn:
    """x = sin(a z) + .3 z + noise, a from 1 to 20: up to dozens of modes."""
    theta = torch.stack([_sigmas(rng, num), torch.from_numpy(rng.uniform(1, 20, num))], -1)
    return _on_a_line(_wave, theta, rng)


def _bump(dim: int, z: Tensor, theta: Tensor) -> Tensor:
    away = (z - theta[:, 2 : 2 + dim]) / theta[:, 1:2]
    return 3 * (-0.5 * away.square().sum(-1, keepdim=True)).exp()


def bump(dim: int, rng: np.random.Generator, num: int) -> Drawn:
    """A bump of width .01 to .5 of the prior's, and data from its flank or from the prior, in turn."""
    sigma, width = _sigmas(rng, num), torch.from_numpy(10 ** rng.uniform(-2, -0.3, num))
    centre = torch.from_numpy(rng.uniform(-2, 2, (num, dim)))
    theta = torch.cat([sigma.unsqueeze(-1), width.unsqueeze(-1), centre], -1)
    near = centre + width.unsqueeze(-1) * _normals(rng, num, dim) / math.sqrt(dim)
    z = torch.where((torch.arange(num) % 2 == 0).unsqueeze(-1), near, _normals(rng, num, dim))
    mean = partial(_bump, dim)
    x = mean(z, theta) + sigma.unsqueeze(-1) * _normals(rng, num, 1)
    truth = _lines(mean, x, theta)[:, 0] if dim == 1 else _radial(x[:, 0], theta, dim)
    wide = torch.ones_like(centre)
    return Drawn(
        additive(mean, dim), (x, theta), truth, _gaussians(0 * centre, wide, centre, width.unsqueeze(-1) * wide)
    )


def _radial(x: Tensor, theta: Tensor, dim: int) -> Tensor:
    """log p(x) of a bump by the distance from its centre, whose square is non-central chi-square."""
    found = []
    for value, (sigma, width, *place) in zip(x, theta.tolist(), strict=True):
        far, shift = 6 * width, float(np.square(place).sum())
        parts = []
        for low, high in ((0.0, far), (far, math.sqrt(shift) + 9)):
            r = np.linspace(low, high, 200_001)
            density = 2 * r * scipy.stats.ncx2.pdf(np.maximum(r**2, 1e-300), dim, shift)
            mean = torch.from_numpy(3 * np.exp(-0.5 * (r / width) ** 2))
            log_f = torch.from_numpy(np.log(np.maximum(density, 1e-300))) + _log_normal(value, mean, sigma)
            parts.append(_sum(log_f, torch.from_numpy(r)))
        found.append(torch.stack(parts).logsumexp(0))
    return torch.stack(found)


def product(rng: np.random.Generator, num: int) -> Drawn:
    """x = z_1 z_2 + noise: given z_1 the data are Gaussian."""
    sigma = _sigmas(rng, num)
    z, grid = _normals(rng, num, 2), torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    x = z.prod(-1) + sigma * _normals(rng, num)
    log_f = [_log_normal(grid, 0.0, 1.0) + _log_normal(v, 0.0, (grid**2 + s**2).sqrt()) for v, s in zip(x, sigma)]
    truth = torch.stack([_sum(f, grid) for f in log_f])
    root = x.abs().sqrt()
    mode = torch.stack([root, x.sign() * root], -1)
    wide = torch.ones_like(mode)
    guides = _gaussians(0 * mode, wide, mode, 0.3 * wide)
    model = additive(lambda z, _: z.prod(-1, keepdim=True), 2)
    return Drawn(model, (x.unsqueeze(-1), sigma.unsqueeze(-1)), truth, guides)


def ring(dim: int, rng: np.random.Generator, num: int) -> Drawn:
    """x = |z|^2 + noise: |z|^2 is chi-square."""
    sigma = _sigmas(rng, num)
    x = _normals(rng, num, dim).square().sum(-1) + sigma * _normals(rng, num)
    truth = []
    for value, s in zip(x.tolist(), sigma.tolist(), strict=True):
        grid = torch.linspace(max(0.0, value - 9 * s), max(value, 0.0) + 9 * s, 200_001, dtype=torch.float64)
        prior = torch.from_numpy(scipy.stats.chi2.logpdf(grid.clamp(min=1e-300).numpy(), dim))
        truth.append(_sum(prior + _log_normal(grid, value, s), grid))
    radius = (x.clamp(min=1e-2).unsqueeze(-1) / dim).sqrt().expand(-1, dim)
    guides = _gaussians(0 * radius, radius, radius, 0.3 * radius)
    model = additive(lambda z, _: z.square().sum(-1, keepdim=True), dim)
    return Drawn(model, (x.unsqueeze(-1), sigma.unsqueeze(-1)), torch.stack(truth), guides)


def _linear_model(x: Tensor, weights: Tensor, sigma: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(weights.shape[-1]), 1.0).to_event(1))
        mean = (weights @ z.unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=x)


def linear(dims: tuple[int, ...], rng: np.random.Generator, num: int) -> Drawn:
    """x = W z + noise with D = K, singular values of W from 1 down to 1e-4 at the extreme; one K for a batch."""
    dim = int(rng.choice(dims))
    sigma = _sigmas(rng, num).numpy()
    turns = [np.linalg.qr(rng.standard_normal((num, dim, dim)))[0] for _ in range(2)]
    least = 10 ** rng.uniform(-4, 0, num)
    values = 2 * least[:, None] ** (np.arange(dim) / max(1, dim - 1))
    weights = turns[0] * values[:, None] @ turns[1]
    z, noise = rng.standard_normal((2, num, dim))
    x = np.einsum("nij,nj->ni", weights, z) + sigma[:, None] * noise
    truth, loc, factor = [], [], []
    for v, w, left, s, sd in zip(x, weights, turns[0], values, sigma):
        total = s**2 + sd**2  # variances of x along its principal axes
        truth.append(-0.5 * ((left.T @ v) ** 2 / total + np.log(2 * np.pi * total)).sum())
        precision = np.eye(dim) + w.T @ w / sd**2
        factor.append(np.linalg.cholesky(np.linalg.inv(precision)))
        loc.append(np.linalg.solve(precision, w.T @ v) / sd**2)
    mean, root = torch.from_numpy(np.stack(loc)), torch.from_numpy(np.stack(factor))
    aside = (root @ torch.from_numpy(rng.standard_normal((num, dim, 1)))).squeeze(-1)
    guides = {
        "good": BoundGuide(_gaussian, mean + 0.1 * aside, 1.05 * root),
        "biased": BoundGuide(_gaussian, mean + 3 * root.sum(-1) / math.sqrt(dim), root),
        "narrow": BoundGuide(_gaussian, mean, 0.5 * root),
    }
    args = (torch.from_numpy(x), torch.from_numpy(weights), torch.from_numpy(sigma))
    return Drawn(_linear_model, args, torch.from_numpy(np.stack(truth)), guides)


# --- other latents -----------------------------------------------------------------------------------


def heavy(rng: np.random.Generator, num: int) -> Drawn:
    """Student-t latent of one to four degrees of freedom, Gaussian noise; some data far out."""
    degrees, sigma = torch.from_numpy(rng.uniform(1, 4, num)), _sigmas(rng, num)
    z = torch.from_numpy(rng.standard_t(degrees.numpy()))
    x = z + sigma * _normals(rng, num)
    truth = []
    for value, s, df in zip(x.tolist(), sigma.tolist(), degrees.tolist(), strict=True):
        grid = value + s * torch.linspace(-12, 12, 100_001, dtype=torch.float64)
        truth.append(_sum(torch.from_numpy(scipy.stats.t.logpdf(grid.numpy(), df)) + _log_normal(grid, value, s), grid))

    def model(x: Tensor, sigma: Tensor, degrees: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(degrees, 0.0, 1.0))
            pyro.sample("x", dist.Normal(z, sigma), obs=x)

    def make(loc: Tensor, scale: Tensor) -> dict[str, dist.Distribution]:
        return {"z": dist.Normal(loc, scale)}

    shapes = {"good": (x, 1.2 * sigma), "biased": (x + 3 * sigma, sigma), "narrow": (x, 0.3 * sigma)}
    guides = {name: BoundGuide(make, *pair) for name, pair in shapes.items()}
    return Drawn(model, (x, sigma, degrees), torch.stack(truth), guides)


def bounded(rng: np.random.Generator, num: int) -> Drawn:
    """A probability with a Beta prior, and binomial counts of up to 1000 trials."""
    a, b = torch.from_numpy(10 ** rng.uniform(-0.5, 1, (2, num)))
    trials = torch.from_numpy(rng.integers(1, 1000, num)).double()
    p = rng.beta(a.numpy(), b.numpy())
    x = torch.from_numpy(rng.binomial(trials.long().numpy(), p)).double()
    args = trials.numpy(), a.numpy(), b.numpy()
    truth = torch.from_numpy(scipy.stats.betabinom.logpmf(x.numpy(), *args))

    def model(x: Tensor, trials: Tensor, a: Tensor, b: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(a, b))
            pyro.sample("x", dist.Binomial(trials, p), obs=x)

    def make(a: Tensor, b: Tensor) -> dict[str, dist.Distribution]:
        return {"p": dist.Beta(a, b)}

    alpha, beta = a + x, b + trials - x
    return Drawn(model, (x, trials, a, b), truth, _conjugate(make, alpha, beta))


def _conjugate(
    make: Callable[..., dict[str, dist.Distribution]], first: Tensor, second: Tensor
) -> dict[str, BoundGuide]:
    """Guides about a posterior of two positive parameters: a little wider, moved, and much narrower."""
    return {
        "good": BoundGuide(make, 0.8 * first, 0.8 * second),
        "biased": BoundGuide(make, 1.5 * first + 1, second),
        "narrow": BoundGuide(make, 4 * first, 4 * second),
    }


def counts(rng: np.random.Generator, num: int) -> Drawn:
    """A rate with a Gamma prior, and three Poisson counts."""
    shape, rate = torch.from_numpy(10 ** rng.uniform(-0.3, 1, (2, num)))
    z = rng.gamma(shape.numpy(), 1 / rate.numpy())
    x = torch.from_numpy(rng.poisson(z[:, None], (num, 3))).double()
    after, total = shape + x.sum(-1), rate + 3
    truth = shape * rate.log() - shape.lgamma() + after.lgamma() - after * total.log() - (x + 1).lgamma().sum(-1)

    def model(x: Tensor, shape: Tensor, rate: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("rate", dist.Gamma(shape, rate))
            pyro.sample("x", dist.Poisson(z.unsqueeze(-1).expand(*z.shape, 3)).to_event(1), obs=x)

    def make(shape: Tensor, rate: Tensor) -> dict[str, dist.Distribution]:
        return {"rate": dist.Gamma(shape, rate)}

    return Drawn(model, (x, shape, rate), truth, _conjugate(make, after, total))


def periodic(rng: np.random.Generator, num: int) -> Drawn:
    """An angle with a von Mises prior, seen as a point of the plane with noise: products of von Mises densities."""
    sigma, strength = _sigmas(rng, num).clamp(min=1e-2), torch.from_numpy(10 ** rng.uniform(-1, 1, num))
    angle = torch.from_numpy(rng.vonmises(0.0, strength.numpy()))
    x = torch.stack([angle.cos(), angle.sin()], -1) + sigma.unsqueeze(-1) * _normals(rng, num, 2)
    pull = x / sigma.square().unsqueeze(-1) + torch.stack([strength, 0 * strength], -1)
    kappa = pull.norm(dim=-1)
    log_bessel = [torch.from_numpy(np.log(scipy.special.ive(0, k.numpy()))) + k for k in (kappa, strength)]
    constant = (x.square().sum(-1) + 1) / (2 * sigma.square()) + (2 * math.pi * sigma.square()).log()
    truth = log_bessel[0] - log_bessel[1] - constant

    def model(x: Tensor, sigma: Tensor, strength: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("angle", dist.VonMises(0 * strength, strength))
            point = torch.stack([z.cos(), z.sin()], -1)
            pyro.sample("x", dist.Normal(point, sigma.unsqueeze(-1)).to_event(1), obs=x)

    def make(loc: Tensor, kappa: Tensor) -> dict[str, dist.Distribution]:
        return {"angle": dist.VonMises(loc, kappa)}

    where = torch.atan2(pull[:, 1], pull[:, 0])
    shapes = {"good": (where, 0.8 * kappa), "biased": (where + 3 * kappa.rsqrt(), kappa), "narrow": (where, 10 * kappa)}
    guides = {name: BoundGuide(make, *pair) for name, pair in shapes.items()}
    return Drawn(model, (x, sigma, strength), truth, guides)


def simplex(categories: int, rng: np.random.Generator, num: int) -> Drawn:
    """Probabilities with a Dirichlet prior, and multinomial counts of up to 300 trials."""
    prior = torch.from_numpy(10 ** rng.uniform(-0.3, 0.7, (num, categories)))
    trials = rng.integers(1, 300, num)
    p = np.stack([rng.dirichlet(row) for row in prior.numpy()])
    x = torch.from_numpy(np.stack([rng.multinomial(n, row) for n, row in zip(trials, p, strict=True)])).double()
    after = prior + x
    truth = prior.sum(-1).lgamma() - after.sum(-1).lgamma() + (after.lgamma() - prior.lgamma()).sum(-1)

    def model(x: Tensor, prior: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(prior))
            pyro.factor("x", (x * p.log()).sum(-1))

    def make(after: Tensor) -> dict[str, dist.Distribution]:
        return {"p": dist.Dirichlet(after)}

    shapes = {"good": 0.8 * after, "biased": after + 0.3 * x.flip(-1), "narrow": 4 * after}
    return Drawn(model, (x, prior), truth, {name: BoundGuide(make, value) for name, value in shapes.items()})


def two_sites(rng: np.random.Generator, num: int) -> Drawn:
    """A mean and a variance with their conjugate prior, and five observations: a Student-t evidence."""
    a, b, k = torch.from_numpy(np.stack([10 ** rng.uniform(0, 1, num) for _ in range(3)]))
    variance = 1 / rng.gamma(a.numpy(), 1 / b.numpy())
    mean = np.sqrt(variance / k.numpy()) * rng.standard_normal(num)
    x = torch.from_numpy(mean[:, None] + np.sqrt(variance)[:, None] * rng.standard_normal((num, 5)))
    size, centre = 5, x.mean(-1)
    a_after, k_after = a + size / 2, k + size
    b_after = b + 0.5 * (x - centre.unsqueeze(-1)).square().sum(-1) + k * size * centre.square() / (2 * k_after)
    truth = a_after.lgamma() - a.lgamma() + a * b.log() - a_after * b_after.log()
    truth = truth + 0.5 * (k / k_after).log() - size / 2 * math.log(2 * math.pi)

    def model(x: Tensor, a: Tensor, b: Tensor, k: Tensor) -> None:
        with pyro.plate("data", len(x)):
            variance = pyro.sample("variance", dist.InverseGamma(a, b))
            mean = pyro.sample("mean", dist.Normal(0.0, (variance / k).sqrt()))
            likelihood = dist.Normal(mean.unsqueeze(-1), variance.sqrt().unsqueeze(-1)).expand((*mean.shape, size))
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def make(loc: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> dict[str, dist.Distribution]:
        return {"variance": dist.InverseGamma(a, b), "mean": dist.Normal(loc, scale)}

    loc, scale = size * centre / k_after, (b_after / a_after / k_after).sqrt()
    shapes = {
        "good": (loc, 1.2 * scale, 0.8 * a_after, 0.8 * b_after),
        "biased": (loc + 3 * scale, scale, a_after, 2 * b_after),
        "narrow": (loc, 0.3 * scale, 4 * a_after, 4 * b_after),
    }
    guides = {name: BoundGuide(make, *values) for name, values in shapes.items()}
    return Drawn(model, (x, a, b, k), truth, guides)


def categories(rng: np.random.Generator, num: int) -> Drawn:
    """Two normal latents and 20 draws of three categories by a softmax, summed over a grid of 801 x 801 points."""
    weights = 2 * _normals(rng, num, 3, 2)
    z = _normals(rng, num, 2)
    p = (weights @ z.unsqueeze(-1)).squeeze(-1).softmax(-1).numpy()
    x = torch.from_numpy(np.stack([rng.multinomial(20, row / row.sum()) for row in p])).double()
    line = torch.linspace(-_REACH, _REACH, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    prior = _log_normal(grid, 0.0, 1.0).sum(-1)
    log_f = [prior + (grid @ w.T).log_softmax(-1) @ n for w, n in zip(weights, x, strict=True)]
    truth = torch.stack([f.logsumexp(0) for f in log_f]) + 2 * (line[1] - line[0]).log()
    moments = [(f.softmax(0).unsqueeze(-1) * grid, f) for f in log_f]
    centre = torch.stack([m.sum(0) for m, _ in moments])
    square = torch.stack([(f.softmax(0).unsqueeze(-1) * grid.square()).sum(0) for _, f in moments])
    spread = (square - centre.square()).clamp(min=1e-6).sqrt()

    def model(x: Tensor, weights: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = (weights @ z.unsqueeze(-1)).squeeze(-1)
            pyro.factor("x", (x * logits.log_softmax(-1)).sum(-1))

    return Drawn(model, (x, weights), truth, _gaussians(centre, spread, centre + 2 * spread, spread))


# Name: latent dimensions (those of the unconstrained coordinates; None where they vary) and how to draw.
FAMILIES: dict[str, tuple[int | None, Callable[[np.random.Generator, int], Drawn]]] = {
    "linear K=1": (1, partial(linear, (1,))),
    "linear K=2": (2, partial(linear, (2,))),
    "linear K=4-50": (None, partial(linear, (4, 8, 16, 32, 50))),
    "fold": (1, fold),
    "folds K=4": (4, folds),
    "sine": (1, sine),
    "kinks K=1": (1, partial(kinks, 1)),
    "kinks K=4": (4, partial(kinks, 4)),
    "bump K=1": (1, partial(bump, 1)),
    "bump K=2": (2, partial(bump, 2)),
    "product": (2, product),
    "ring K=2": (2, partial(ring, 2)),
    "ring K=5": (5, partial(ring, 5)),
    "heavy tails": (1, heavy),
    "bounded": (1, bounded),
    "counts": (1, counts),
    "periodic": (1, periodic),
    "simplex K=2": (2, partial(simplex, 3)),
    "simplex K=5": (5, partial(simplex, 6)),
    "two sites": (2, two_sites),
    "categories": (2, categories),
}
