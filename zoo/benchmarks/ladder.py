r"""Problems of increasing difficulty whose evidence is known in closed form, to test estimators on.

.. math:: z \sim N(0, I_K), \quad x = f(z) + \sigma \epsilon

with f linear, a fold, a banana or a ring, at several noise levels. The guide of one fold covers only half of the
posterior. In the last problem no method that starts from guide, prior or gradients finds the greater part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from guides.base import Guide
from guides.mixture import MixtureNormal
from inference.core.checks import check_count
from inference.core.seeding import seeded
from inference.distributions.gaussian import LOG_2PI, DiagNormal, FullNormal
from zoo.base import LatentVariableModel
from zoo.linear.models import LinearVAE
from zoo.models.deep_gaussian_vae import DeepGaussianVAE
from zoo.models.noise import FixedNoise

SIGMAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
LATENT_DIMS = (1, 4, 16, 64)
_CURVATURE = 0.7  # of the banana
_STEP = 30.0  # prior standard deviations beyond which the last problem's second class lies
_STEP_SIGMA = 0.02

# SciPy's Bessel functions end at 2^31; from here on their scaled form is y^(-1/2) to rounding.
_LARGEST = 1e9


@dataclass(frozen=True)
class KnownAnswer:
    """Test problem with known evidence and exact posterior draws, all in float64.

    Attributes:
        family: Kind of the problem.
        sigma: Standard deviation of the noise.
        model: Pyro model.
        guide: Pyro guide, of the quality that training yields, except for families with a deliberately poor one.
        x: Data, (N, D).
        z: An exact draw of each data point's posterior, (N, K).
        log_evidence: log p(x_n), (N,) in nats.
    """

    family: str
    sigma: float
    model: LatentVariableModel = field(repr=False)
    guide: Guide = field(repr=False)
    x: Tensor = field(repr=False)
    z: Tensor = field(repr=False)
    log_evidence: Tensor = field(repr=False)


def known_answers(
    latent_dims: Sequence[int] = LATENT_DIMS,
    sigmas: Sequence[float] = SIGMAS,
    *,
    num_data: int = 20,
    seed: int = 0,
) -> list[KnownAnswer]:
    """Problems of known evidence: linear ones for each K and sigma, nonlinear ones for each sigma, and an unseen class.

    Args:
        latent_dims: K of the linear problems.
        sigmas: Standard deviations of the noise.
        num_data: N, data points of each problem.
        seed: Seed; leaves the global random state as it was.

    Raises:
        TypeError: If a number of data points or dimensions is not an integer.
        ValueError: If one is below one, or a sigma is not positive and finite.

    Example:
        >>> from inference import evidence
        >>> problem = known_answers([4], [0.1], num_data=3)[0]
        >>> found = evidence(problem.model, problem.x, guide=problem.guide, method="importance", seed=0)
        >>> bool(((found.value - problem.log_evidence).abs() < 0.1).all())
        True
    """
    check_count(num_data, "num_data")
    for sigma in sigmas:
        if not 0 < sigma < math.inf:
            raise ValueError(f"expected positive finite sigmas, got {sigma}")
    with seeded(seed), torch.no_grad():
        ladder = [linear(latent_dim, sigma, num_data) for latent_dim in latent_dims for sigma in sigmas]
        for curved in (fold, half_seen_fold, bimodal, banana, ring):
            ladder += [curved(sigma, num_data) for sigma in sigmas]
        return [*ladder, unseen(num_data)]


def linear(latent_dim: int, sigma: float, num_data: int) -> KnownAnswer:
    """A random linear decoder with D = 2 K, and a guide off by a tenth of a standard deviation, 5 % in its axes."""
    model = LinearVAE(2 * latent_dim, latent_dim).double().requires_grad_(False)
    model.log_sigma.fill_(math.log(sigma))
    model.W.copy_(torch.randn_like(model.W) / math.sqrt(2 * latent_dim))
    model.mu.copy_(torch.randn_like(model.mu))
    shift = 0.1 * torch.randn(latent_dim, dtype=torch.float64)
    mixing = torch.eye(latent_dim, dtype=torch.float64)
    mixing += 0.05 / math.sqrt(latent_dim) * torch.randn_like(mixing)

    def distribution(x: Tensor) -> Distribution:
        exact = model.posterior(x)
        assert isinstance(exact, FullNormal)
        factor = exact._unbroadcasted_scale_tril
        covariance = factor @ mixing @ mixing.mT @ factor.mT
        return FullNormal(exact.loc + factor @ shift, torch.linalg.cholesky(covariance))

    return _simulated(f"linear K={latent_dim}", sigma, model, distribution, model.log_evidence, num_data)


def fold(sigma: float, num_data: int) -> KnownAnswer:
    """x = z^2 + noise, with a guide that has both roots."""
    return _fold("fold", lambda x: _roots(x, sigma), sigma, num_data)


def half_seen_fold(sigma: float, num_data: int) -> KnownAnswer:
    """x = z^2 + noise, with a guide of the positive root only: half of the posterior, log 2 nats, is missing."""

    def distribution(x: Tensor) -> Distribution:
        both = _roots(x, sigma)
        return DiagNormal(both.locs[..., 0, :], both.sigmas[..., 0, :])

    return _fold("half-seen fold", distribution, sigma, num_data)


def bimodal(sigma: float, num_data: int) -> KnownAnswer:
    """x = (z_1^2, z_2) + noise, with a guide that has both modes."""

    def distribution(x: Tensor) -> Distribution:
        both = _roots(x[..., :1], sigma)
        mean, width = x[..., 1:] / (1 + sigma**2), sigma / math.hypot(1, sigma)
        locs = torch.stack([both.locs[..., 0], mean.expand_as(both.locs[..., 0])], -1)
        sigmas = torch.stack([both.sigmas[..., 0], torch.full_like(both.sigmas[..., 0], width)], -1)
        return MixtureNormal(both.log_weights, locs, sigmas)

    def truth(x: Tensor) -> Tensor:
        return _fold_evidence(x[:, :1], 1.0, sigma) + _normal(x[:, 1], 0.0, math.hypot(1, sigma))

    model = _model(lambda z: torch.cat([z[..., :1].square(), z[..., 1:]], -1), 2, 2, sigma)
    return _simulated("bimodal", sigma, model, distribution, truth, num_data)


def banana(sigma: float, num_data: int) -> KnownAnswer:
    """x = z_1 + .7 z_2^2 + noise: the posterior is a bent ridge, on which the guide, a Gaussian, is centred."""

    def distribution(x: Tensor) -> Distribution:
        return DiagNormal(torch.cat([0.5 * x, torch.zeros_like(x)], -1), torch.ones_like(x))

    model = _model(lambda z: z[..., :1] + _CURVATURE * z[..., 1:].square(), 1, 2, sigma)
    width = math.hypot(1, sigma)  # of x, once z_1 is integrated out
    return _simulated("banana", sigma, model, distribution, lambda x: _fold_evidence(x, _CURVATURE, width), num_data)


def ring(sigma: float, num_data: int) -> KnownAnswer:
    """x = |z|^2 + noise in two dimensions: the posterior is a thin ring, the guide a Gaussian of its radius."""

    def distribution(x: Tensor) -> Distribution:
        return DiagNormal(torch.zeros_like(x).expand(*x.shape[:-1], 2), (0.5 * x.clamp(min=sigma)).sqrt())

    def truth(x: Tensor) -> Tensor:
        x = x[:, 0]  # |z|^2 is exponential of mean two
        return -math.log(2) - x / 2 + sigma**2 / 8 + torch.special.log_ndtr((x - sigma**2 / 2) / sigma)

    model = _model(lambda z: z.square().sum(-1, keepdim=True), 1, 2, sigma)
    return _simulated("ring", sigma, model, distribution, truth, num_data)


def unseen(num_data: int) -> KnownAnswer:
    """x = 1 for z > 30, else 0, + noise: a class that no sampler visits explains half of the data, or nearly all."""
    sigma, zero = _STEP_SIGMA, torch.zeros((), dtype=torch.float64)
    log_prior = torch.special.log_ndtr(zero - _STEP), torch.special.log_ndtr(zero + _STEP)
    log_odds = torch.linspace(0, 3, num_data, dtype=torch.float64)  # of the class beyond the step, given x
    x = (0.5 + sigma**2 * (log_odds + log_prior[1] - log_prior[0])).unsqueeze(-1)
    below, beyond = log_prior[1] + _normal(x[:, 0], 0.0, sigma), log_prior[0] + _normal(x[:, 0], 1.0, sigma)
    tail = torch.from_numpy(scipy.stats.truncnorm.ppf(torch.rand_like(x[:, 0]).numpy(), _STEP, math.inf))
    z = torch.where(torch.rand_like(log_odds) < log_odds.sigmoid(), tail, torch.randn_like(log_odds))
    model = _model(lambda z: (z > _STEP).to(z) + 0 * z, 1, 1, sigma)  # 0 z: a derivative that is known
    guide = FunctionGuide(lambda x: DiagNormal(torch.zeros_like(x), torch.ones_like(x)))
    return KnownAnswer("unseen mode", sigma, model, guide, x, z.unsqueeze(-1), torch.logaddexp(below, beyond))


class FunctionGuide(Guide):
    """A guide that is a given function from data (N, D) to the distribution of z."""

    def __init__(self, distribution: Callable[[Tensor], Distribution]) -> None:
        super().__init__()
        self._distribution = distribution

    def posterior(self, x: Tensor) -> Distribution:
        """Distribution of z given x (N, D): batch (N,), event (K,)."""
        return self._distribution(x)


class _Map(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def _model(function: Callable[[Tensor], Tensor], data_dim: int, latent_dim: int, sigma: float) -> DeepGaussianVAE:
    model = DeepGaussianVAE(data_dim, latent_dim, network=_Map(function), noise=FixedNoise(sigma)).double()
    model.noise.log_sigma.fill_(math.log(sigma))  # which was rounded to float32
    return model


def _fold(family: str, distribution: Callable[[Tensor], Distribution], sigma: float, num_data: int) -> KnownAnswer:
    model = _model(lambda z: z.square(), 1, 1, sigma)
    return _simulated(family, sigma, model, distribution, lambda x: _fold_evidence(x, 1.0, sigma), num_data)


def _simulated(
    family: str,
    sigma: float,
    model: LinearVAE | DeepGaussianVAE,
    distribution: Callable[[Tensor], Distribution],
    log_evidence: Callable[[Tensor], Tensor],
    num_data: int,
) -> KnownAnswer:
    """Data sampled from the model: the latents that they come from are exact draws of the posterior."""
    z = torch.randn(num_data, model.latent_dim, dtype=torch.float64)
    x = model.likelihood(z).sample()
    return KnownAnswer(family, sigma, model, FunctionGuide(distribution), x, z, log_evidence(x))


def _normal(x: Tensor, mean: float, sigma: float) -> Tensor:
    return -0.5 * ((x - mean) / sigma).square() - math.log(sigma) - 0.5 * LOG_2PI


def _roots(x: Tensor, sigma: float) -> MixtureNormal:
    """Half above each root of x = z^2, by the curvature there, 30 % wider."""
    root = x.clamp(min=sigma).sqrt()
    width = 1.3 / (1 + (2 * root / sigma).square()).sqrt()
    return MixtureNormal(
        torch.zeros_like(x).expand(*x.shape[:-1], 2), torch.stack([root, -root], -2), torch.stack([width, width], -2)
    )


def _fold_evidence(x: Tensor, curvature: float, sigma: float) -> Tensor:
    r"""log of the integral of N(t; 0, 1) N(x; c t^2, sigma^2) over t, by modified Bessel functions.

    .. math:: \int e^{-a t^4 - b t^2} dt = \tfrac\pi2 \sqrt{\tfrac{|b|}{2a}} e^y [I_{-1/4}(y) + I_{1/4}(y)]
        \text{ for } b < 0, \quad \tfrac12 \sqrt{\tfrac ba} e^y K_{1/4}(y) \text{ for } b > 0,
        \quad y = \tfrac{b^2}{8 a}
    """
    x = x[:, 0]
    a, b = curvature**2 / (2 * sigma**2), (0.5 - curvature * x / sigma**2).numpy()
    b = np.where(np.abs(b) < 1e-12, 1e-12, b)
    y, half = b**2 / (8 * a), 0.5 * np.log(np.abs(b) / a)
    special, most = scipy.special, np.minimum(b**2 / (8 * a), _LARGEST)
    bessel = special.ive(-0.25, most) + special.ive(0.25, most)
    above = math.log(math.pi / 2) + half - 0.5 * math.log(2) + np.log(bessel) - 0.5 * np.log(y / most)
    below = math.log(0.5) + half + np.log(special.kve(0.25, most))
    # Where b < 0, the exponents 2 y - x^2 / (2 sigma^2), which are large, are taken together.
    exponent = torch.where(
        torch.from_numpy(b) < 0, sigma**2 / (8 * curvature**2) - x / (2 * curvature), -0.5 * (x / sigma).square()
    )
    return torch.from_numpy(np.where(b < 0, above, below)) + exponent - LOG_2PI - math.log(sigma)
