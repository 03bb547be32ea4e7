"""Errors of a posterior against a reference: classifiers, Wasserstein distances, moments."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
from calibrated_pairs import (
    ACCEPT,
    DETECT,
    counts_guide,
    counts_model,
    marginal_guide,
    model,
    prior_guide,
    sum_guide,
    sums,
    widened,
)
from pyro import poutine
from pyro.infer import MCMC, NUTS
from registry import data_for
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch.distributions import MultivariateNormal, kl_divergence

from guides import Exact, FullRank, MeanField, TiedMeanField
from inference import (
    c2st,
    c2st_joint,
    c2st_per_datum,
    posterior_error,
    predictive,
)
from inference.diagnostics.accuracy import gaussian_wasserstein

# --- classifiers -----------------------------------------------------------------------------------------


def test_c2st_is_the_bayes_rate_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2000, 2, generator=generator) for _ in range(2))
    same, apart = c2st(a, b), c2st(a, b + torch.tensor([1.0, 0.0]))
    best = scipy.stats.norm.cdf(0.5)
    assert abs(same.accuracy - 0.5) < 4 * same.standard_error
    assert same.p_value > ACCEPT
    # A network on 3200 samples comes close to the best accuracy there is, and cannot beat it.
    assert apart.accuracy < best + 4 * apart.standard_error
    assert apart.accuracy > best - 0.02 - 4 * apart.standard_error
    assert apart.p_value < DETECT
    error = math.sqrt((1 + 5 / 4) * apart.accuracy * (1 - apart.accuracy) / 4000)
    assert apart.standard_error.item() == pytest.approx(error, rel=1e-12)


def test_c2st_rejects_the_null_no_more_often_than_stated():
    p_values = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(200, 3, generator=generator) for _ in range(2))
        p_values.append(float(c2st(a, b, classifier=LogisticRegression(), seed=seed).p_value))
    # The 99.9 % binomial limits of the numbers below .05 and .01; independent folds would reject at nearly .1.
    assert sum(p < 0.05 for p in p_values) <= scipy.stats.binom.ppf(0.999, 200, 0.05)
    assert sum(p < 0.01 for p in p_values) <= scipy.stats.binom.ppf(0.999, 200, 0.01)
    c = torch.randn(200, 3, generator=torch.Generator().manual_seed(200)) + 0.6
    assert c2st(a, c, classifier=LogisticRegression(), seed=0).p_value < 1e-4


@pytest.mark.slow
def test_c2st_of_joint_samples():
    exact, marginal = (c2st_joint(sums(guide)) for guide in (sum_guide, marginal_guide))
    assert abs(exact.accuracy - 0.5) < 4 * exact.standard_error
    assert marginal.accuracy > 0.5 + 10 * marginal.standard_error
    assert c2st_joint(sums(prior_guide)).p_value < DETECT


def test_c2st_per_datum_against_the_exact_posterior():
    x, classifier = data_for(model(), 6), QuadraticDiscriminantAnalysis()
    reference = predictive(model(), Exact(model()), x, num_samples=1000, seed=1)["z"]
    exact = predictive(model(), Exact(model()), x, num_samples=1000, seed=2)["z"]
    wide = predictive(model(), widened(2.0), x, num_samples=1000, seed=2)["z"]
    options = {"classifier": classifier, "progress": False}
    right, wrong = c2st_per_datum(exact, reference, **options), c2st_per_datum(wide, reference, **options)
    assert right.accuracy.shape == (6,)
    assert ((right.accuracy - 0.5).abs() < 4 * right.standard_error).all()
    # Where the densities cross, r^2 = 2 K log 2 / (1 - 1/4): chi-squared distributions of two degrees give the best
    # accuracy.
    crossing = 4 * math.log(2) / 0.75
    best = 0.5 * (scipy.stats.chi2.cdf(crossing, 2) + scipy.stats.chi2.sf(crossing / 4, 2))
    assert ((wrong.accuracy - best).abs() < 4 * wrong.standard_error + 0.005).all()
    assert (wrong.p_value < DETECT).all()


@pytest.mark.slow
def test_c2st_and_errors_against_nuts():
    x = data_for(model(), 2)
    kernel = NUTS(model(), jit_compile=False)
    mcmc = MCMC(kernel, num_samples=2000, warmup_steps=300, disable_progbar=True)
    mcmc.run(x)
    chain = mcmc.get_samples()["z"][::4]
    exact, wide = (predictive(model(), g, x, num_samples=500, seed=2)["z"] for g in (Exact(model()), widened(2.0)))
    right, wrong = (c2st_per_datum(draws, chain, progress=False) for draws in (exact, wide))
    assert ((right.accuracy - 0.5).abs() < 4 * right.standard_error).all()
    assert (wrong.p_value < 1e-4).all()
    error = posterior_error(model(), Exact(model()), x, reference={"z": chain}, seed=0)
    assert error.mean_error.abs().max() < 4 / math.sqrt(500)
    assert error.log_variance_ratio.abs().max() < 4 * math.sqrt(2 / 500)


# --- errors against a reference --------------------------------------------------------------------------


def random_gaussians(num=5, dim=3):
    means, factors = torch.randn(num, dim).double(), torch.randn(num, dim, dim).double()
    return means, factors @ factors.mT + 0.1 * torch.eye(dim).double()


def test_wasserstein_is_scipys():
    (m, a), (n, b) = random_gaussians(), random_gaussians()
    got = gaussian_wasserstein(m, a, n, b)
    for i in range(len(m)):
        root = scipy.linalg.sqrtm(b[i].numpy())
        cross = scipy.linalg.sqrtm(root @ a[i].numpy() @ root).real
        squared = (m[i] - n[i]).square().sum().item() + np.trace(a[i].numpy() + b[i].numpy() - 2 * cross)
        assert got[i].item() == pytest.approx(math.sqrt(squared), rel=1e-9)


def test_wasserstein_of_commuting_singular_and_equal_gaussians():
    mean, s, t = torch.zeros(1, 2).double(), torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.5, 1e-9]]).double()
    got = gaussian_wasserstein(mean, torch.diag_embed(s**2), mean + 1, torch.diag_embed(t**2))
    assert got.item() == pytest.approx(math.sqrt(2 + 1.5**2), rel=1e-9)
    _, covariance = random_gaussians()
    assert gaussian_wasserstein(mean[:, :1], covariance, mean[:, :1], covariance).max() < 1e-13


@pytest.mark.parametrize("family", [MeanField, FullRank])
def test_gaussian_guides_are_measured_in_closed_form(family):
    x, guide = data_for(model()), family(5, 2, hidden=(8,)).double()
    got, (q, p) = posterior_error(model(), guide, x), (guide.posterior(x), model().posterior(x))
    full = MultivariateNormal(q.mean, q.covariance_matrix if family is FullRank else torch.diag_embed(q.variance))
    assert got.closed_form
    assert got.names == ("z[0]", "z[1]")
    for estimate, pair in ((got.kl, (full, p)), (got.reverse_kl, (p, full))):
        assert (estimate.value - kl_divergence(*pair)).abs().max() < 1e-10
        assert estimate.standard_error.abs().max() == 0
    assert (got.mean_error - (q.mean - p.mean) / p.variance.sqrt()).abs().max() < 1e-12
    assert (got.log_variance_ratio - (q.variance / p.variance).log()).abs().max() < 1e-12
    covariance = full.covariance_matrix.detach()
    expected = gaussian_wasserstein(q.mean, covariance, p.mean, p.covariance_matrix)
    assert (got.wasserstein - expected).abs().max() < 1e-12


def test_the_exact_guide_has_no_error():
    got = posterior_error(model(), Exact(model()), data_for(model()))
    for error in (got.kl.value, got.reverse_kl.value, got.wasserstein, got.mean_error, got.log_variance_ratio):
        assert error.abs().max() < 1e-12


def test_monte_carlo_meets_the_closed_form():
    x, guide = data_for(model(), 8), TiedMeanField(model())
    exact = posterior_error(model(), guide, x)
    samples = predictive(model(), Exact(model()), x, num_samples=20_000, seed=5)["z"]
    evidence = model().log_evidence(x).detach()
    options = {"reference": {"z": samples}, "num_samples": 20_000, "seed": 6}
    got = posterior_error(model(), guide, x, log_evidence=evidence, **options)
    assert not got.closed_form
    for a, b in ((got.kl, exact.kl), (got.reverse_kl, exact.reverse_kl)):
        assert ((a.value - b.value).abs() < 4 * a.standard_error).all()
        # The twin: off by a hundredth of a nat.
        assert ((a.value + 0.01 - b.value).abs() > 4 * a.standard_error).any()
    assert ((got.mean_error - exact.mean_error).abs() < 4 / math.sqrt(20_000)).all()
    assert ((got.log_variance_ratio - exact.log_variance_ratio).abs() < 4 * math.sqrt(2 / 20_000)).all()
    assert posterior_error(model(), guide, x, **options).kl is None


class Heavy:
    """A model whose exact posterior is no Gaussian: a Gamma prior of Poisson counts."""

    def __call__(self, x):
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(torch.full((1,), 2.0).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def posterior(self, x):
        return dist.Gamma(2.0 + x, 2.0).to_event(1)


def heavy_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("rate", dist.Gamma(1.0 + x, 1.5).to_event(1))


def test_a_posterior_that_is_no_gaussian_is_measured_by_its_density():
    x = torch.tensor([[1.0], [3.0], [8.0]]).double()
    got = posterior_error(Heavy(), heavy_guide, x, num_samples=20_000, seed=0)
    q, p = torch.distributions.Gamma(1.0 + x, 1.5), torch.distributions.Gamma(2.0 + x, 2.0)
    assert not got.closed_form
    for estimate, pair in ((got.kl, (q, p)), (got.reverse_kl, (p, q))):
        assert ((estimate.value - kl_divergence(*pair)[:, 0]).abs() < 4 * estimate.standard_error).all()
        assert (estimate.standard_error < 0.1 * estimate.value).all()
    distance = ((q.mean - p.mean).square() + (q.stddev - p.stddev).square()).sqrt()[:, 0]
    assert ((got.wasserstein - distance).abs() < 4 * (q.stddev + p.stddev)[:, 0] / math.sqrt(20_000)).all()


def test_a_pair_with_several_sites_and_a_reference():
    x = torch.tensor([[1.0, 2.0], [7.0, 3.0]])

    def model(x):
        return _as_data(counts_model)(x)

    def guide(x):
        return _as_data(functools.partial(counts_guide, excess=2.0))(x)

    total, share = dist.Gamma(4.0 + x.sum(-1), 1.5), dist.Beta(2.0 + x[:, 0], 3.0 + x[:, 1])
    reference = {"total": total.sample((20_000,)), "share": share.sample((20_000,))}
    rates = torch.stack([reference["total"] * reference["share"], reference["total"] * (1 - reference["share"])], -1)
    z = (reference["total"][0], reference["share"][0])
    joint = dist.Gamma(4.0, 0.5).log_prob(z[0]) + dist.Beta(2.0, 3.0).log_prob(z[1])
    joint = joint + dist.Poisson(rates[0]).log_prob(x).sum(-1)
    evidence = joint - total.log_prob(z[0]) - share.log_prob(z[1])
    got = posterior_error(model, guide, x, reference=reference, log_evidence=evidence, num_samples=20_000, seed=0)
    wrong = torch.distributions.Beta(4.0 + x[:, 0], 5.0 + x[:, 1])
    right = torch.distributions.Beta(2.0 + x[:, 0], 3.0 + x[:, 1])
    assert got.names == ("total", "share")
    for estimate, pair in ((got.kl, (wrong, right)), (got.reverse_kl, (right, wrong))):
        assert ((estimate.value - kl_divergence(*pair)).abs() < 4 * estimate.standard_error + 1e-5).all()


def _as_data(program):
    """The counts' pair with its plate named as by custom."""

    def run(x):
        with _Renamed():
            return program(x)

    return run


class _Renamed(poutine.messenger.Messenger):
    def _process_message(self, msg):
        frames = msg.get("cond_indep_stack", ())
        msg["cond_indep_stack"] = tuple(f._replace(name="data") if f.name == "people" else f for f in frames)
