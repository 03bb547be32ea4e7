"""Multivariate Student-t distributions, one per data point, as proposals with tails heavier than a Gaussian's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from inference.distributions.batched_gaussian import Gaussian

# Share of a mixture, relative to its largest, below which a component is dropped.
_LEAST_SHARE = 0.01


class Student(NamedTuple):
    r"""One Student-t distribution per data point.

    .. math:: u = m + \sqrt{\nu / c} \, L \epsilon, \quad \epsilon \sim N(0, I), \quad c \sim \chi^2_\nu

    Attributes:
        gaussian: Location m and factor L, as a Gaussian.
        degrees: Degrees of freedom, nu.
    """

    gaussian: Gaussian
    degrees: float

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws u (S, N, d), and their log-density (S, N) in nats."""
        v = self.noise(num_samples)
        return self.gaussian.colour(v), self.log_prob_whitened(v)

    def noise(self, num_samples: int) -> Tensor:
        """Draws v (S, N, d), of the distribution with m = 0 and L = I."""
        loc = self.gaussian.loc
        noise = torch.randn(num_samples, *loc.shape, dtype=loc.dtype, device=loc.device)
        half = torch.full(noise.shape[:2], self.degrees / 2, dtype=loc.dtype, device=loc.device)
        chi_squared = 2 * torch.distributions.Gamma(half, torch.ones_like(half), validate_args=False).sample()
        return noise * (self.degrees / chi_squared).sqrt().unsqueeze(-1)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density at u (S, N, d), (S, N) in nats."""
        return self.log_prob_whitened(self.gaussian.whiten(u))

    @property
    def log_det(self) -> Tensor:
        """log det L, (N,)."""
        return self.gaussian.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob_whitened(self, v: Tensor) -> Tensor:
        """Log-density of u = m + L v, as a density of u, at v (S, N, d): (S, N) in nats."""
        dim, nu = v.shape[-1], self.degrees
        constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - dim / 2 * math.log(nu * math.pi)
        return constant - self.log_det - (nu + dim) / 2 * torch.log1p(v.square().sum(-1) / nu)


class Students(NamedTuple):
    """A mixture of Student-t distributions of equal degrees, one mixture per data point.

    Attributes:
        components: J Student-t distributions.
        log_shares: Logs of their shares, (J, N); minus infinity where a data point has fewer.
    """

    components: tuple[Student, ...]
    log_shares: Tensor

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws u (S, N, d), and their log-density (S, N) in nats."""
        v = self.components[0].noise(num_samples)
        below = self.log_shares.softmax(0).cumsum(0)[:-1]
        chosen = (torch.rand_like(v[..., 0]) > below.unsqueeze(1)).sum(0).unsqueeze(-1)
        u = self.components[0].gaussian.colour(v)
        for j, component in enumerate(self.components[1:], 1):
            u = torch.where(chosen == j, component.gaussian.colour(v), u)
        return u, self.log_prob(u)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density at u (S, N, d), (S, N) in nats."""
        return self.terms(u).logsumexp(0)

    def terms(self, u: Tensor) -> Tensor:
        """Log-densities of the components plus the logs of their shares, at u (S, N, d): (J, S, N) in nats."""
        return torch.stack([component.log_prob(u) for component in self.components]) + self.log_shares.unsqueeze(1)

    def rows(self, index: Tensor) -> Students:
        """The mixtures of chosen data points, (M,) integers."""
        components = (
            Student(Gaussian(*(part[index] for part in component.gaussian)), component.degrees)
            for component in self.components
        )
        return Students(tuple(components), self.log_shares[:, index])

    @property
    def within(self) -> Gaussian:
        """The mean of the mixture, with the mean covariance of its components: their scale, not their distance."""
        shares = self.log_shares.softmax(0).unsqueeze(-1)
        loc = torch.stack([component.gaussian.loc for component in self.components])
        factor = torch.stack([component.gaussian.factor for component in self.components])
        covariance = (shares.unsqueeze(-1) * (factor @ factor.mT)).sum(0)
        fitted, info = torch.linalg.cholesky_ex(covariance)
        return Gaussian((shares * loc).sum(0), torch.where((info == 0).reshape(-1, 1, 1), fitted, factor[0]))


def concatenate(parts: Sequence[Students]) -> Students:
    """The mixtures of several groups of data points as those of one group, in order."""
    num_components = max(len(part.components) for part in parts)
    columns = [part.components + part.components[:1] * (num_components - len(part.components)) for part in parts]
    components = (
        Student(Gaussian(*map(torch.cat, zip(*[component.gaussian for component in row]))), row[0].degrees)
        for row in zip(*columns)
    )
    shares = [pad(part.log_shares, (0, 0, 0, num_components - len(part.components)), value=-math.inf) for part in parts]
    return Students(tuple(components), torch.cat(shares, 1))


def mixed(first: Students, second: Students, share: float) -> Students:
    """A mixture of two mixtures of the same data, of which the second has a share."""
    shares = [math.log1p(-share) + first.log_shares, math.log(share) + second.log_shares]
    return Students(first.components + second.components, torch.cat(shares))


def refit(u: Tensor, log_weights: Tensor, before: Students) -> Students:
    """One step of expectation-maximisation (EM) of a Student-t mixture on weighted draws.

    Components of the least share are dropped.

    Args:
        u: (S, N, d).
        log_weights: (S, N).
        before: The mixture to start from.
    """
    each = log_weights + before.terms(u).log_softmax(0)
    components = [moment_fit(u, own, component) for own, component in zip(each, before.components)]
    shares = each.logsumexp(1).log_softmax(0)
    shares = torch.where(shares.isnan().any(0), before.log_shares, shares)
    shares = torch.where(shares < shares.amax(0) + math.log(_LEAST_SHARE), -math.inf, shares).log_softmax(0)
    kept = [j for j, alive in enumerate((shares > -math.inf).any(1).tolist()) if alive]
    return Students(tuple(components[j] for j in kept), shares[kept])


def moment_fit(u: Tensor, log_weights: Tensor, before: Student) -> Student:
    """The Student-t distribution with the weighted mean and covariance of draws, shrunk towards the one before.

    The covariance counts as many draws as the effective sample size, and the one before as many more as it has
    numbers; where all weights are zero, or their covariance has no factor, the distribution is the one before.

    Args:
        u: (S, N, d).
        log_weights: (S, N).
        before: The distribution that is shrunk towards.
    """
    dim, factor = u.shape[-1], before.gaussian.factor
    weights = torch.softmax(log_weights, 0).nan_to_num(0.0)
    mean = torch.einsum("sn,sni->ni", weights, u)
    residual = u - mean
    covariance = torch.einsum("sn,sni,snj->nij", weights, residual, residual)
    size = (1 / weights.square().sum(0).clamp(min=1e-300)).reshape(-1, 1, 1)
    numbers = dim * (dim + 1) / 2
    covariance = (size * covariance + numbers * factor @ factor.mT) / (size + numbers)
    fitted, info = torch.linalg.cholesky_ex(covariance)
    sound = (info == 0) & (weights.sum(0) > 0.5) & fitted.isfinite().all(-1).all(-1)
    loc = torch.where(sound.unsqueeze(-1), mean, before.gaussian.loc)
    return Student(Gaussian(loc, torch.where(sound.reshape(-1, 1, 1), fitted, factor)), before.degrees)


def temperatures(log_weights: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Powers in (0, 1] of weights (S, N) by which their effective sample size is kept at a number, by bisection.

    Args:
        log_weights: (S, N) in nats.
        least: Effective sample size to reach; the power is one where the weights have it already.

    Returns:
        The powers and the effective sample sizes that they leave, each (N,).
    """

    def size(power: Tensor) -> Tensor:
        weights = torch.softmax(power * log_weights, 0)
        return 1 / weights.square().sum(0)

    high = log_weights.new_ones(log_weights.shape[1])
    low = torch.zeros_like(high)
    power = high
    for _ in range(24):
        enough = ~(size(power) < least)
        low, high = torch.where(enough, power, low), torch.where(enough, high, power)
        if bool((low == 1).all()):
            break
        power = torch.where(low == 1, low, (low + high) / 2)
    low = low.clamp(min=2**-24)
    return low, size(low)
