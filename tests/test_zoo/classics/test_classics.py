"""Classic models: references against SciPy and integrals of their own, and evidence against the references."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from inference import evidence
from zoo.classics import classic_models

BY_NAME = {classic.name: classic for classic in classic_models()}


def test_the_catalogue_is_complete_and_repeats_by_seed():
    assert len(BY_NAME) == 10
    other = {classic.name: classic for classic in classic_models(seed=1)}
    for name, classic in BY_NAME.items():
        assert all(argument.dtype == torch.float64 for argument in classic.args)
        same = other[name].log_evidence == pytest.approx(classic.log_evidence, rel=1e-12)
        # Eight schools are what they are; under a uniform prior all counts are equally probable.
        assert same == (name in ("eight schools", "Dirichlet multinomial"))


def test_eight_schools_have_the_evidence_of_an_adaptive_integral():
    y, errors = (part.numpy() for part in BY_NAME["eight schools"].args)

    def density(tau):
        covariance = np.diag(errors**2 + tau**2) + 100
        return scipy.stats.multivariate_normal.pdf(y, np.zeros(8), covariance) * scipy.stats.halfcauchy.pdf(
            tau, scale=25
        )

    total = sum(scipy.integrate.quad(density, *ends, epsabs=1e-25)[0] for ends in ((0, 5), (5, 50), (50, np.inf)))
    assert BY_NAME["eight schools"].log_evidence == pytest.approx(math.log(total), abs=1e-6)
    assert BY_NAME["eight schools"].log_evidence == pytest.approx(-32.4188, abs=5e-5)


def test_the_funnel_has_the_evidence_of_an_adaptive_integral():
    (y,) = BY_NAME["funnel"].args

    def density(v):
        return np.prod(scipy.stats.norm.pdf(y, 0, math.sqrt(1 + math.exp(v)))) * scipy.stats.norm.pdf(v, 0, 3)

    total, _ = scipy.integrate.quad(density, -30, 30, epsabs=1e-20, limit=200)
    assert BY_NAME["funnel"].log_evidence == pytest.approx(math.log(total), abs=1e-6)


def test_gaussian_models_have_scipy_s_density():
    x, y = BY_NAME["linear regression"].args
    covariance = x @ x.T + 0.25 * torch.eye(len(y))
    expected = scipy.stats.multivariate_normal.logpdf(y, np.zeros(len(y)), covariance)
    assert BY_NAME["linear regression"].log_evidence == pytest.approx(expected, abs=1e-9)
    t, y = BY_NAME["Gaussian process"].args
    covariance = (-0.5 * (t - t[:, None]) ** 2).exp() + (0.25 + 1e-6) * torch.eye(len(y)).double()
    expected = scipy.stats.multivariate_normal.logpdf(y, np.zeros(len(y)), covariance)
    assert BY_NAME["Gaussian process"].log_evidence == pytest.approx(expected, abs=1e-9)
    (y,) = BY_NAME["state space"].args
    steps = np.tril(0.9 ** np.abs(np.subtract.outer(np.arange(len(y)), np.arange(len(y)))))
    expected = scipy.stats.multivariate_normal.logpdf(y, np.zeros(len(y)), steps @ steps.T + 0.25 * np.eye(len(y)))
    assert BY_NAME["state space"].log_evidence == pytest.approx(expected, abs=1e-9)


def test_counts_have_scipy_s_dirichlet_multinomial():
    (y,) = BY_NAME["Dirichlet multinomial"].args
    expected = scipy.stats.dirichlet_multinomial.logpmf(y.int().numpy(), np.ones(len(y)), int(y.sum()))
    assert BY_NAME["Dirichlet multinomial"].log_evidence == pytest.approx(expected, abs=1e-9)


def test_logistic_regression_has_a_double_integral_s_evidence():
    x, y = (part.numpy() for part in BY_NAME["logistic regression"].args)

    def density(a, b):
        log_likelihood = scipy.special.log_expit((2 * y - 1) * (x @ np.array([a, b]))).sum()
        return math.exp(log_likelihood + scipy.stats.norm.logpdf([a, b], 0, 2).sum() + 15)

    total, _ = scipy.integrate.dblquad(density, -4, 6, -4, 4, epsabs=1e-6)
    assert BY_NAME["logistic regression"].log_evidence == pytest.approx(math.log(total) - 15, abs=1e-3)


def test_a_mixture_has_the_evidence_of_a_double_integral():
    y = BY_NAME["Gaussian mixture"].args[0].numpy()

    def density(first, second):
        parts = 0.3 * scipy.stats.norm.pdf(y - first) + 0.7 * scipy.stats.norm.pdf(y - second)
        return np.exp(np.log(parts).sum() + scipy.stats.norm.logpdf([first, second], 0, 3).sum() + 30)

    nodes, weights = np.polynomial.legendre.leggauss(80)
    total = sum(w * v * density(8 * a, 8 * b) for a, w in zip(nodes, weights) for b, v in zip(nodes, weights)) * 64
    assert BY_NAME["Gaussian mixture"].log_evidence == pytest.approx(math.log(total) - 30, abs=1e-6)


def test_a_hidden_markov_model_has_the_sum_over_all_paths():
    y = BY_NAME["hidden Markov"].args[0].numpy()
    paths = np.array(list(itertools.product((-1.0, 1.0), repeat=len(y))))
    emission = scipy.stats.norm.logpdf(y, paths, 1).sum(-1)
    kept = (paths[:, 1:] == paths[:, :-1]).sum(-1)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    stay = (nodes[:, None] + 1) / 2
    likelihood = 0.5 * np.exp(emission) * stay**kept * (1 - stay) ** (len(y) - 1 - kept)
    total = (weights / 2 * likelihood.sum(-1) * scipy.stats.beta.pdf(stay[:, 0], 2, 2)).sum()
    assert BY_NAME["hidden Markov"].log_evidence == pytest.approx(math.log(total), abs=1e-6)


def test_horseshoe_regression_has_the_mean_likelihood_of_its_scales():
    x, y = (part.numpy() for part in BY_NAME["horseshoe regression"].args)
    rng = np.random.default_rng(0)
    scales = np.abs(rng.standard_cauchy((200_000, 1)) * rng.standard_cauchy((200_000, x.shape[1])))
    projection, sd = x.T @ y, np.sqrt(scales**2 + 0.25)
    rest = y @ y - projection @ projection
    outside = -0.5 * rest / 0.25 - (len(y) - x.shape[1]) * (math.log(0.5) + 0.5 * math.log(2 * math.pi))
    likelihood = np.exp(scipy.stats.norm.logpdf(projection, 0, sd).sum(-1))
    error = likelihood.std() / math.sqrt(len(likelihood)) / likelihood.mean()
    expected = math.log(likelihood.mean()) + outside
    assert abs(BY_NAME["horseshoe regression"].log_evidence - expected) < 4 * error


QUICK = ("linear regression", "logistic regression", "Gaussian mixture", "Gaussian process", "state space")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in BY_NAME])
def test_every_reference_lies_in_the_interval_that_is_found(name):
    classic = BY_NAME[name]
    found = evidence(classic.model, *classic.args, whole=True, seed=0, progress=False)
    assert float(found.lower) - 1e-4 <= classic.log_evidence <= float(found.upper) + 1e-4
