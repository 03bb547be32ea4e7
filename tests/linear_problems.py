"""Random linear Gaussian problems with known evidence, and guides of every quality; what methods make of them."""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch

from guides import Linear
from guides.base import Guide
from inference import evidence
from inference.distributions.gaussian import DiagNormal, FullNormal
from inference.marginal_likelihood.base.result import ASYMPTOTIC, PROBABILISTIC
from zoo import LinearVAE

LATENT_DIMS = (1, 2, 4, 8, 16, 32)
# Rounding of the covariance, times its condition number of up to 1e7 at sigma = 1e-3, moves NumPy's evidence so far.
ROUNDING = 1e-7


class Perturbed(Guide):
    """A guide that is made from the exact posterior of a linear model, by a function of its mean and factor."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = (model,), change

    def posterior(self, x):
        distribution = self.model[0].posterior(x)
        return self.change(distribution.loc, distribution._unbroadcasted_scale_tril)


def rescaled(model, factor):
    """The exact posterior with its standard deviations times a factor; weights have k = 1 - factor^2."""
    return Perturbed(model, lambda loc, root: FullNormal(loc, factor * root))


def trained(loc, factor):
    """Off by a tenth of a standard deviation, and by a few per cent in scale, like an encoder that was trained well."""
    dim = loc.shape[-1]
    generator = torch.Generator().manual_seed(dim)
    noise = torch.randn(loc.shape, generator=generator, dtype=loc.dtype)
    mixing = torch.eye(dim, dtype=loc.dtype) + 0.05 / math.sqrt(dim) * torch.randn(
        dim, dim, generator=generator, dtype=loc.dtype
    )
    covariance = factor @ mixing @ mixing.mT @ factor.mT
    return FullNormal(loc + 0.1 * (factor @ noise.unsqueeze(-1)).squeeze(-1), torch.linalg.cholesky(covariance))


def mean_field(loc, factor):
    """The optimum of the ELBO over independent coordinates: the inverse diagonal of the precision."""
    precision = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
    return DiagNormal(loc, precision.rsqrt().expand(loc.shape))


def half_width(loc, factor):
    """Standard deviations of half the size."""
    return FullNormal(loc, 0.5 * factor)


def shifted(loc, factor):
    """Three standard deviations off."""
    return FullNormal(loc + 3 * factor.sum(-1) / math.sqrt(loc.shape[-1]), factor)


GUIDES = {guide.__name__: guide for guide in (trained, mean_field, half_width, shifted)}


def problem(seed, num_data):
    """A random model, its data, and their evidence by NumPy; sigma from 1 to 1e-3, K up to 32, D below and above K."""
    rng = np.random.default_rng(seed)
    latent_dim = LATENT_DIMS[seed % len(LATENT_DIMS)]
    data_dim = max(1, round(latent_dim * rng.uniform(0.5, 1.5)))
    sigma = 10 ** rng.uniform(-3, 0)
    model = LinearVAE(data_dim, latent_dim).double().requires_grad_(False)
    model.log_sigma.data = torch.tensor(math.log(sigma), dtype=torch.float64)
    model.W.data = torch.from_numpy(rng.standard_normal((data_dim, latent_dim)) / math.sqrt(data_dim))
    model.mu.data = torch.from_numpy(rng.standard_normal(data_dim))
    weights, mean = model.W.numpy(), model.mu.numpy()
    z, noise = rng.standard_normal((num_data, latent_dim)), rng.standard_normal((num_data, data_dim))
    x = z @ weights.T + mean + sigma * noise
    covariance = weights @ weights.T + sigma**2 * np.eye(data_dim)
    truth = scipy.stats.multivariate_normal(mean, covariance).logpdf(x).reshape(num_data)
    return model, torch.from_numpy(x), truth


def optimal_guide(model):
    """The exact posterior of a linear model of one latent as a linear guide."""
    guide = Linear(model.data_dim, 1).double()
    w, var = model.W.detach(), model.sigma.detach().square()
    m = (w.mT @ w + var).squeeze()
    guide.V.data, guide.bias.data = w.mT / m, -(w.mT / m) @ model.mu.detach()
    guide.log_sigma.data = 0.5 * (var / m).log().reshape(1)
    return guide


class Record(NamedTuple):
    """What a method said of many problems.

    Attributes:
        num: Problems.
        two_sided: Those whose interval claims both ends.
        inside: Those of them that hold the truth.
        one_sided: Those with Markov's lower bound.
        above: Those of them whose bound lies above the truth.
        width: Median width of all intervals, infinite ones included.
        error: Median distance of the value from the truth.
    """

    num: int
    two_sided: int
    inside: int
    one_sided: int
    above: int
    width: float
    error: float

    @property
    def line(self):
        share, cover = self.two_sided / self.num, self.inside / max(1, self.two_sided)
        wrong = self.above / max(1, self.one_sided)
        return (
            f"two-sided {share:6.1%}, of which hold the truth {cover:6.1%}; median width {self.width:.3f}; one-sided "
            f"{self.one_sided:5d}, above the truth {wrong:5.1%}; median error {self.error:.4f}"
        )


def record(method, change, *, num_models, num_data, first=0, shrink=1.0):
    """A method on models times data, with a guide that ``change`` makes (None for no guide).

    Args:
        method: The method, or its name.
        change: One of GUIDES.
        num_models: Models.
        num_data: Data of each.
        first: Seed of the first model.
        shrink: Factor on the intervals: a planted defect.
    """
    columns = []
    for seed in range(first, first + num_models):
        model, x, truth = problem(seed, num_data)
        guide = None if change is None else Perturbed(model, change)
        got = evidence(model, x, method=method, guide=guide, seed=seed, progress=False)
        ends = [(got.value + shrink * (end - got.value)).numpy() for end in (got.lower, got.upper)]
        columns.append((truth, got.value.numpy(), *ends, np.array(got.guarantee)))
    truth, value, lower, upper, kind = (np.concatenate(column) for column in zip(*columns, strict=True))
    assert set(kind) <= {ASYMPTOTIC, PROBABILISTIC}
    two, one = kind == ASYMPTOTIC, kind == PROBABILISTIC
    inside = (lower <= truth + ROUNDING) & (truth <= upper + ROUNDING)
    return Record(
        len(truth),
        int(two.sum()),
        int((inside & two).sum()),
        int(one.sum()),
        int(((lower > truth + ROUNDING) & one).sum()),
        float(np.median(upper - lower)),
        float(np.median(np.abs(value - truth))),
    )


def keeps_its_word(result, level=0.95):
    """Whether coverage is that of the level and Markov's bound fails no more often than it says, at 99.9%."""
    covered = result.inside >= scipy.stats.binom.ppf(0.001, result.two_sided, level) if result.two_sided else True
    return covered and (
        not result.one_sided or result.above <= scipy.stats.binom.ppf(0.999, result.one_sided, 1 - level)
    )
