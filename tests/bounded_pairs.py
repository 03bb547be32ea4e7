"""Pairs and closed forms of the bounds, which several tests share."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from pyro.distributions.torch_distribution import TorchDistribution

from guides import Exact, FullRank, Linear, MeanField, TiedMeanField
from guides.base import Guide
from inference import AnalyticELBO, fit, log_weights
from zoo import LinearVAE

DATA_DIM, LATENT_DIM, NUM_DATA = 5, 2, 40
FOUR_ERRORS = float(2 * scipy.stats.norm.sf(4))
CERTAIN = 1e-6


# --- the criterion ---------------------------------------------------------------------------------------


def p_value(difference, error, *, sign=0):
    """p of a normal estimate under the claim that its mean is 0, at least 0 (sign 1) or at most 0 (sign -1)."""
    z = float(difference) / float(error)
    return float(2 * scipy.stats.norm.sf(abs(z)) if sign == 0 else scipy.stats.norm.sf(-sign * z))


def assert_consistent(difference, error, *, sign=0):
    """The claim of :func:`p_value` stands within four standard errors."""
    assert 0 < float(error) < math.inf
    p = p_value(difference, error, sign=sign)
    assert p > FOUR_ERRORS, f"difference {float(difference):.3g} with standard error {float(error):.3g}: p = {p:.1g}"


def assert_refuted(difference, error, *, sign=0):
    """The same claim falls, beyond doubt."""
    with pytest.raises(AssertionError, match="p = "):
        assert_consistent(difference, error, sign=sign)
    assert p_value(difference, error, sign=sign) < CERTAIN


def data_mean(estimate):
    """Mean over the data of a estimate per data point, and its standard error for given data."""
    value, error = estimate
    return float(value.mean()), float(error.square().sum().sqrt()) / len(value)


def minus(a, b):
    """Difference of two independent (value, error)."""
    return a[0] - b[0], math.hypot(a[1], b[1])


# --- pairs -----------------------------------------------------------------------------------------------


def make_model(seed=0, data_dim=DATA_DIM, latent_dim=LATENT_DIM, sigma=0.5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LinearVAE(data_dim, latent_dim, sigma=sigma).double()
        model.mu.data.normal_()
    return model.requires_grad_(False)


def closed_form_linear(model):
    """The optimal linear guide, V = M^-1 W' and D = sigma^2 / diag M, written with NumPy."""
    w, mu, var = model.W.detach().numpy(), model.mu.detach().numpy(), float(model.sigma.detach()) ** 2
    m = w.T @ w + var * np.eye(w.shape[1])
    v = np.linalg.solve(m, w.T)
    guide = Linear(*w.shape).double()
    guide.V.data, guide.bias.data = torch.from_numpy(v), torch.from_numpy(-v @ mu)
    guide.log_sigma.data = torch.from_numpy(0.5 * np.log(var / np.diag(m)))
    return guide


def trained(guide, model, x):
    fit(
        model,
        guide,
        x,
        steps=300,
        objective=AnalyticELBO(),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        seed=0,
        progress=False,
    )
    return guide


def network(family):
    return family(DATA_DIM, LATENT_DIM, hidden=(16,)).double()


MAKE_GUIDE = {
    "Exact": lambda model, _: Exact(model),
    "TiedMeanField": lambda model, _: TiedMeanField(model),
    "Linear, optimal": lambda model, _: closed_form_linear(model),
    "Linear, untrained": lambda *_: Linear(DATA_DIM, LATENT_DIM).double(),
    "Linear, trained": lambda model, x: trained(Linear(DATA_DIM, LATENT_DIM).double(), model, x),
    "MeanField, untrained": lambda *_: network(MeanField),
    "MeanField, trained": lambda model, x: trained(network(MeanField), model, x),
    "FullRank, untrained": lambda *_: network(FullRank),
    "FullRank, trained": lambda model, x: trained(network(FullRank), model, x),
}
INEXACT = [name for name in MAKE_GUIDE if name != "Exact"]


def weights_of(pair, x, num_samples=2000):
    return log_weights(*pair, x, num_samples=num_samples)


# --- defects ---------------------------------------------------------------------------------------------


class Broken(TorchDistribution):
    """A distribution whose log-density is not that of its draws, or whose draws have no gradient."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, distribution, defect=None):
        self.distribution, self.defect = distribution, defect
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=False)

    @property
    def support(self):
        return self.distribution.support

    def expand(self, batch_shape, _instance=None):
        return Broken(self.distribution.expand(batch_shape), self.defect)

    def rsample(self, sample_shape=()):
        draws = self.distribution.rsample(sample_shape)
        return draws.detach() if self.defect is None else draws

    def log_prob(self, value):
        return self.distribution.log_prob(value) if self.defect is None else self.defect(self.distribution, value)


def log_det(distribution):
    """Log-determinant of the covariance's factor, whatever the Gaussian."""
    return distribution.log_prob(distribution.mean).neg() - 0.5 * distribution.event_shape[0] * math.log(2 * math.pi)


DEFECTS = {
    "sign": lambda distribution, z: -distribution.log_prob(z),
    "factor 2": lambda distribution, z: 2 * distribution.log_prob(z),
    "no log-determinant": lambda distribution, z: distribution.log_prob(z) + log_det(distribution),
    "no half": lambda distribution, z: 2 * distribution.log_prob(z) - distribution.log_prob(distribution.mean),
    "shifted": lambda distribution, z: distribution.log_prob(z + 0.3),
}


class BrokenGuide(Guide):
    def __init__(self, guide, defect):
        super().__init__()
        self.guide, self.defect = guide, defect

    def posterior(self, x):
        return Broken(self.guide.posterior(x), self.defect)


class BrokenModel(LinearVAE):
    """A linear VAE with a defect in its likelihood, or in its prior."""

    def __init__(self, model, *, likelihood=None, prior=None):
        super().__init__(model.data_dim, model.latent_dim)
        self.double().load_state_dict(model.state_dict())
        self.requires_grad_(False)
        self.defects = {"likelihood": likelihood, "prior": prior}

    def _broken(self, name, distribution):
        return distribution if self.defects[name] is None else Broken(distribution, self.defects[name])

    def prior(self):
        return self._broken("prior", super().prior())

    def likelihood(self, z):
        return self._broken("likelihood", super().likelihood(z))


# --- closed forms, written with NumPy --------------------------------------------------------------------


def arrays(model):
    distribution = model.linear_gaussian
    return distribution.W.detach().numpy(), distribution.mu.detach().numpy(), float(distribution.sigma.detach()) ** 2


def guide_moments(guide, x):
    """Means (N, K) and covariances (N, K, K) of a Gaussian guide."""
    distribution = guide.posterior(x)
    full = hasattr(distribution, "covariance_matrix")
    covariances = distribution.covariance_matrix if full else torch.diag_embed(distribution.variance)
    return distribution.mean.detach().numpy(), covariances.detach().numpy()


def numpy_kl(guide, x):
    """KL(q(z | x_n) || N(0, I)) from means and covariances."""
    means, covariances = guide_moments(guide, x)
    traces = np.trace(covariances, axis1=-2, axis2=-1)
    return 0.5 * (traces - np.linalg.slogdet(covariances)[1] + (means**2).sum(-1) - means.shape[1])


def numpy_elbo(model, guide, x):
    """E_q log p(x | z) - KL, for a Gaussian guide, from means and covariances."""
    w, mu, var = arrays(model)
    means, covariances = guide_moments(guide, x)
    errors = ((x.numpy() - mu - means @ w.T) ** 2).sum(1) + np.trace(w.T @ w @ covariances, axis1=-2, axis2=-1)
    return -0.5 * errors / var - 0.5 * len(mu) * math.log(2 * math.pi * var) - numpy_kl(guide, x)


def numpy_linear_elbo(w, v, d, var, y, *, trace_d=True):
    """Section 1.2's formula for q = N(V (x - mu), diag d), y = x - mu; per data point. ``trace_d`` plants a defect."""
    k, n = len(d), y.shape[1]
    recoded = y @ v.T @ w.T
    kl = 0.5 * (d.sum() - np.log(d).sum() + ((y @ v.T) ** 2).sum(1) - k)
    spread = np.trace(w @ np.diag(d) @ w.T) if trace_d else 0.0
    error = -spread - (recoded**2).sum(1) + 2 * (recoded * y).sum(1) - (y**2).sum(1)
    return error / (2 * var) - 0.5 * n * math.log(2 * math.pi * var) - kl


# --- the sandwich ----------------------------------------------------------------------------------------


def gap_to(upper, lower):
    """Difference of data means and its error; ``upper`` is (value, error) or exact numbers."""
    upper = (float(np.mean(upper)), 0.0) if isinstance(upper, np.ndarray) else data_mean(upper)
    return minus(upper, data_mean(lower))


# --- Monte Carlo against the closed form -----------------------------------------------------------------


def repeated(objective, pair, x, repeats=200):
    """Data mean of an objective over independent runs: (value, error)."""
    values = torch.stack([objective.per_datum(*pair, x).detach().mean() for _ in range(repeats)])
    return float(values.mean()), float(values.std() / math.sqrt(repeats))
