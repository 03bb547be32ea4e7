"""Calibration: ranks, joint coverage and classifiers against exact posteriors; each with a guide that must fail."""

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
from pyro import poutine
from pyro.infer import MCMC, NUTS
from registry import data_for
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch.distributions import MultivariateNormal, kl_divergence

from guides import Exact, FullRank, MeanField, Resampled, TiedMeanField
from inference import (
    Simulation,
    c2st,
    c2st_joint,
    c2st_per_datum,
    coverage,
    log_weights,
    pareto_k,
    posterior_error,
    predictive,
    sbc,
    simulate,
    tarp,
)
from inference.calibration.simulation_based_calibration import SBC, ecdf_band
from inference.diagnostics.accuracy import gaussian_wasserstein
from inference.distributions.gaussian import FullNormal
from inference.numerics.multiple_testing import holm
from inference.plots.calibration import (
    coverage_figure,
    ecdf_difference,
    posterior_error_figure,
    rank_histogram,
    tarp_curve,
)
from inference.plots.comparison import pareto_k_figure, save_figure
from zoo import LinearVAE

NUM, SEED = 4000, 20
ACCEPT, DETECT = 0.01, 1e-6


@functools.cache
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LinearVAE(5, 2, sigma=0.5).double()


def widened(factor, shift=0.0):
    """The exact guide with its standard deviations multiplied and its mean moved."""

    def guide(x):
        distribution = model().posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", FullNormal(distribution.loc + shift, factor * distribution._unbroadcasted_scale_tril))

    return guide


@functools.cache
def simulation(factor=1.0, shift=0.0):
    guide = Exact(model()) if (factor, shift) == (1.0, 0.0) else widened(factor, shift)
    x = torch.zeros(1000, 5).double()
    return simulate(model(), guide, x, num_simulations=NUM, seed=SEED, progress=False)


# --- a pair in a user's hand: two latent sites, counts ------------------------------------------------------------


def counts_model(x):
    """A total and how it is shared: Poisson counts whose posterior is a Gamma and a Beta."""
    with pyro.plate("people", len(x), dim=-1):
        total = pyro.sample("total", dist.Gamma(torch.tensor(4.0), 0.5))
        share = pyro.sample("share", dist.Beta(torch.tensor(2.0), 3.0))
        rates = torch.stack([total * share, total * (1 - share)], -1)
        pyro.sample("counts", dist.Poisson(rates).to_event(1), obs=x)


def counts_guide(x, excess=0.0):
    with pyro.plate("people", len(x), dim=-1):
        pyro.sample("total", dist.Gamma(4.0 + x.sum(-1), 1.5))
        pyro.sample("share", dist.Beta(2.0 + x[:, 0] + excess, 3.0 + x[:, 1] + excess))


def counts(guide):
    return simulate(
        counts_model,
        guide,
        torch.zeros(500, 2),
        num_simulations=NUM,
        plate="people",
        quantities={"squared": lambda sites: sites["total"] ** 2 + sites["share"] ** 2},
        seed=SEED,
        progress=False,
    )


def test_a_users_pair_with_two_latent_sites_and_counts():
    exact = counts(counts_guide)
    assert exact.names == ("total", "share")
    assert list(exact.quantities) == ["log_likelihood", "squared"]
    assert sbc(exact).p_value > ACCEPT
    assert tarp(exact).p_value > ACCEPT
    bad = counts(lambda x: counts_guide(x, excess=8.0))
    result = sbc(bad)
    assert float(result.ks_adjusted[1]) < DETECT
    assert float(result.ks_adjusted[0]) > ACCEPT  # the total's guide is still exact
    assert tarp(bad).p_value < DETECT


def test_a_simulation_is_the_models_and_its_likelihood_scipys():
    exact = counts(counts_guide)
    assert scipy.stats.kstest(exact.truth[:, 0], scipy.stats.gamma(4, scale=2).cdf).pvalue > ACCEPT
    assert scipy.stats.kstest(exact.truth[:, 1], scipy.stats.beta(2, 3).cdf).pvalue > ACCEPT

    truth, draws = exact.quantities["log_likelihood"]
    for latents, got in ((exact.truth, truth), (exact.draws, draws)):
        total, share = np.moveaxis(latents.double().numpy(), -1, 0)
        rates = np.stack([total * share, total * (1 - share)], -1)
        expected = scipy.stats.poisson.logpmf(exact.data.numpy(), rates).sum(-1)
        assert np.allclose(got, expected, rtol=1e-5, atol=1e-4)


def nested_model(x, covariate, *, offset):
    """An inner plate right of the data's, a covariate that stays, and two observed sites, one of them by keyword."""
    with pyro.plate("data", len(x), dim=-2):
        a = pyro.sample("a", dist.Normal(torch.zeros(1).double(), 1.0))
        pyro.sample("y", dist.Normal(a, 0.5), obs=offset)
        with pyro.plate("inner", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(covariate, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def nested_guide(x, covariate, *, offset):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("a", dist.Normal(offset * 0.8, math.sqrt(0.2)))
        with pyro.plate("inner", 3, dim=-1):
            pyro.sample("b", dist.Normal((covariate + x) / 2, math.sqrt(0.5)))


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_nested_plates_covariates_and_several_observations(chunk):
    covariate = torch.linspace(-9, 9, 50).double().unsqueeze(-1)
    got = simulate(
        nested_model,
        nested_guide,
        torch.zeros(50, 3).double(),
        covariate,
        offset=torch.zeros(50, 1).double(),
        num_simulations=380,
        num_samples=19,
        chunk=chunk,
        quantities={"a": lambda sites: sites["a"]},
        seed=SEED,
        progress=False,
    )
    assert got.names == ("a", "b[0]", "b[1]", "b[2]")
    assert got.draws.shape == (19, 380, 4)
    assert got.data.shape == (380, 4)
    assert sbc(got).p_value > ACCEPT
    assert torch.equal(got.quantities["a"][0], got.truth[:, 0])
    assert torch.equal(got.quantities["a"][1], got.draws[..., 0])
    rest = got.truth[:, 1:] - covariate.repeat(8, 1)[:380]
    assert scipy.stats.kstest(rest.flatten(), "norm").pvalue > ACCEPT
    noise = (got.data[:, 0] - got.truth[:, 0]) / 0.5
    assert scipy.stats.kstest(noise, "norm").pvalue > ACCEPT


# --- ranks ---------------------------------------------------------------------------------------------------------


def test_ranks_are_uniform_for_the_exact_guide_alone():
    exact, wide, shifted = (sbc(simulation(*key)) for key in ((), (1.3,), (1.0, 0.1)))
    assert exact.names == ("z[0]", "z[1]", "log_likelihood")
    assert bool((exact.ks > ACCEPT).all())
    assert bool((exact.chi2 > ACCEPT).all())
    assert exact.p_value > ACCEPT
    for bad in (wide, shifted):
        assert bool((bad.ks[:2] < DETECT).all())
        assert bad.p_value < DETECT


def test_ranks_and_p_values_are_numpys_and_scipys():
    result, source = sbc(simulation(1.3)), simulation(1.3)
    for i in range(2):
        expected = (source.draws[..., i].numpy() < source.truth[:, i].numpy()).sum(0)
        assert (result.ranks[:, i].numpy() == expected).all()
        # One hundred possible ranks make twenty bins of five.
        counts = np.bincount(expected // 5, minlength=20)
        assert result.chi2[i].item() == pytest.approx(scipy.stats.chisquare(counts).pvalue, rel=1e-9)
    assert ((result.uniform * 100).long() == result.ranks).all()


def test_ties_are_broken_at_random():
    zero = torch.zeros(NUM, 1)
    result = sbc(Simulation(names=("z",), truth=zero, draws=zero.expand(19, NUM, 1), data=zero))
    assert result.chi2.item() > ACCEPT
    assert result.ranks.unique().tolist() == list(range(20))


def test_p_values_of_the_exact_guide_are_uniform():
    p_values = []
    for seed in range(60):
        x = torch.zeros(100, 5).double()
        draws = simulate(
            model(), Exact(model()), x, num_simulations=100, num_samples=19, seed=1000 + seed, progress=False
        )
        result, joint = sbc(draws, num_bins=10, seed=seed), tarp(draws, seed=seed)
        p_values.append([result.ks[0].item(), joint.p_value, joint.area_p_value])
    for column in zip(*p_values):
        assert scipy.stats.kstest(column, "uniform").pvalue > ACCEPT


def test_holm_by_hand():
    p = torch.tensor([0.01, 0.04, 0.03, 0.9], dtype=torch.float64)
    assert holm(p).tolist() == pytest.approx([0.04, 0.09, 0.09, 0.9])


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_band_holds_whole_curves_with_its_probability(level):
    num, repeats, points = 300, 2000, np.arange(1, 50) / 50
    lower, upper = ecdf_band(num, points, level=level)
    u = np.sort(np.random.default_rng(7).random((repeats, num)), 1)
    curves = np.stack([np.searchsorted(row, points, side="right") for row in u]) / num
    inside = ((lower <= curves) & (curves <= upper)).all(1).mean()
    # The band comes from as many simulated curves as it is tested by.
    assert abs(inside - level) < 4 * math.sqrt(2 * level * (1 - level) / repeats) + 0.005
    skewed = np.stack([np.searchsorted(row**1.5, points, side="right") for row in u]) / num
    assert ((lower <= skewed) & (skewed <= upper)).all(1).mean() < 0.01


# --- coverage ------------------------------------------------------------------------------------------------------


def test_coverage_of_exact_and_wide_guides_is_the_known_one():
    levels = (0.5, 0.8, 0.9, 0.95)
    exact, wide = (coverage(sbc(simulation(f)), levels, level=0.9999) for f in (1.0, 1.3))
    assert bool(exact.consistent.all())
    assert not bool(wide.consistent[:, :2].any())
    half = scipy.stats.norm.ppf((1 + np.array(levels)) / 2)
    expected = torch.from_numpy(2 * scipy.stats.norm.cdf(1.3 * half) - 1)[:, None]
    # Interval ends from 99 draws are noisy: their own spread bends the expected coverage by less than a percent.
    error = (expected * (1 - expected) / NUM).sqrt()
    assert ((wide.value[:, :2] - expected).abs() < 4 * error + 0.01).all()


def test_limits_of_an_exact_guide_are_seldom_called_inconsistent():
    """Fifteen limits at once at 95 %: of 300 exact guides one in twenty at most, where unadjusted it is half."""
    generator, wrong = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        uniform = torch.rand(400, 3, generator=generator, dtype=torch.float64)
        ranks = torch.zeros(400, 3, dtype=torch.int64)
        one = torch.ones(3)
        exact = SBC(
            names=("a", "b", "c"),
            ranks=ranks,
            uniform=uniform,
            num_samples=99,
            ks=one,
            chi2=one,
            symmetry=one,
            ks_adjusted=one,
            chi2_adjusted=one,
        )
        wrong += not bool(coverage(exact).consistent.all())
    assert wrong <= scipy.stats.binom.ppf(0.999, 300, 0.05)


def test_the_limits_are_clopper_and_pearsons():
    result = coverage(sbc(simulation(1.3)), (0.5, 0.99), level=0.9)
    for i in range(2):
        for j in range(3):
            test = scipy.stats.binomtest(round(result.value[i, j].item() * NUM), NUM)
            interval = test.proportion_ci(0.9, method="exact")
            assert result.lower[i, j].item() == pytest.approx(interval.low, rel=1e-9)
            assert result.upper[i, j].item() == pytest.approx(interval.high, rel=1e-9)


def test_coverage_where_all_intervals_hold_or_none_does():
    truth, spread = torch.zeros(200, 1), torch.linspace(-9, 9, 98).reshape(98, 1, 1).expand(98, 200, 1)
    middle = coverage(sbc(Simulation(names=("z",), truth=truth, draws=spread, data=truth)), (0.5,))
    outside = coverage(sbc(Simulation(names=("z",), truth=truth + 99, draws=spread, data=truth)), (0.5,))
    assert (middle.value.item(), middle.upper.item()) == (1.0, 1.0)
    assert (outside.value.item(), outside.lower.item()) == (0.0, 0.0)
    assert outside.upper.item() == pytest.approx(1 - 0.025 ** (1 / 200), rel=1e-9)


# --- TARP ----------------------------------------------------------------------------------------------------------


def test_tarp_is_an_independent_implementations():
    source, random = simulation(1.3), np.random.default_rng(3)
    truth, draws = source.truth.numpy(), source.draws.numpy()
    references = random.normal(size=truth.shape)
    scale = draws.reshape(-1, 2).std(0, ddof=1)
    fractions = np.empty(NUM)
    for n in range(NUM):
        nearer = np.linalg.norm((draws[:, n] - references[n]) / scale, axis=1)
        fractions[n] = np.mean(nearer < np.linalg.norm((truth[n] - references[n]) / scale))
    result = tarp(source, references=torch.from_numpy(references))
    assert (result.ranks.numpy() == np.round(99 * fractions)).all()
    # Lemos et al. count f < alpha; between two possible fractions, j - 1 and j of 99, their curve is constant.
    for j in range(1, 101):
        assert result.coverage[j].item() == pytest.approx(np.mean(fractions < (j - 0.5) / 99), abs=1e-12)
    assert (result.coverage[0].item(), result.coverage[-1].item()) == (0.0, 1.0)


def test_tarp_accepts_the_exact_guide_and_tells_which_way_others_err():
    exact, wide, narrow = (tarp(simulation(f)) for f in (1.0, 1.3, 1 / 1.3))
    assert min(exact.p_value, exact.area_p_value) > ACCEPT
    assert bool(((exact.coverage >= exact.lower) & (exact.coverage <= exact.upper)).all())
    for bad in (wide, narrow):
        assert max(bad.p_value, bad.area_p_value) < DETECT
        assert not bool(((bad.coverage >= bad.lower) & (bad.coverage <= bad.upper)).all())
    assert narrow.area < 0 < wide.area


def test_the_area_is_the_curves():
    result = tarp(simulation(1.3))
    levels, excess = result.levels.numpy(), (result.coverage - result.levels).numpy()
    upper = levels >= 0.5
    assert result.area == pytest.approx(scipy.integrate.trapezoid(excess[upper], levels[upper]), abs=2e-4)
    assert result.deviation == np.abs(excess).max()


# --- what one test cannot see, another does ------------------------------------------------------------------------


def sum_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 0.3).to_event(1), obs=x)


def sum_posterior(x):
    """Mean x / 2.09 in each coordinate, variance 1 - 1 / 2.09, covariance -1 / 2.09."""
    covariance = torch.eye(2).double() - 1 / 2.09
    return dist.MultivariateNormal((x / 2.09).expand(len(x), 2), covariance)


def sum_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", sum_posterior(x))


def marginal_guide(x):
    """Both marginals are the posterior's, and there is no correlation."""
    distribution = sum_posterior(x)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(distribution.mean, distribution.variance.sqrt()).to_event(1))


def prior_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))


@functools.cache
def sums(guide):
    x = torch.zeros(1000, 1).double()
    return simulate(sum_model, guide, x, num_simulations=NUM, seed=SEED, progress=False)


def test_joint_quantities_detect_wrong_correlations_of_a_guide():
    result = sbc(sums(marginal_guide))
    assert bool((result.ks[:2] > ACCEPT).all())
    assert float(result.ks_adjusted[2]) < DETECT
    assert result.worst == "log_likelihood"
    assert tarp(sums(marginal_guide)).p_value < DETECT
    assert tarp(sums(sum_guide)).p_value > ACCEPT
    assert sbc(sums(sum_guide)).p_value > ACCEPT


def test_the_prior_as_guide_is_detected_by_data_dependent_quantities():
    source = sums(prior_guide)
    assert bool((sbc(source).ks[:2] > ACCEPT).all())
    assert tarp(source).p_value > ACCEPT
    assert float(sbc(source).ks_adjusted[2]) < DETECT
    assert tarp(source, references=source.data.expand(NUM, 2)).p_value < DETECT
    exact = sums(sum_guide)
    assert tarp(exact, references=exact.data.expand(NUM, 2)).p_value > ACCEPT


# --- classifiers ---------------------------------------------------------------------------------------------------


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


# --- errors against a reference ------------------------------------------------------------------------------------


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


# --- refusals ------------------------------------------------------------------------------------------------------


def observed_only(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def global_model(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(slope, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_guide(x):
    pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


def scalar_model(x, *, observe=True, scale=1.0, copied=False):
    with pyro.plate("data", len(x)), poutine.scale(scale=scale):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x + 0.0 if copied else x)


def scalar_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def twice_model(x):
    scalar_model(x)
    with pyro.plate("data", len(x)):
        pyro.sample("again", dist.Normal(0.0, 1.0), obs=x)


def masked(program):
    return poutine.mask(program, mask=torch.tensor([True, True, False]))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (observed_only, scalar_guide, "a latent site, got only observed sites .*'x'"),
        (global_model, global_guide, "inside one vectorised plate 'data'.* site 'slope'"),
        (
            functools.partial(scalar_model, observe=False),
            scalar_guide,
            "observes data, got one of latent sites alone.*'z'",
        ),
        (functools.partial(scalar_model, copied=True), scalar_guide, "at site 'x' that is none"),
        (functools.partial(scalar_model, scale=0.5), scalar_guide, "model site 'z' under no scale.*got 0.5"),
        (twice_model, scalar_guide, "data of its own, got .'again'"),
        (masked(scalar_model), masked(scalar_guide), "latent model site 'z' under no mask"),
    ],
)
def test_pairs_that_cannot_be_simulated_are_refused_by_name(model, guide, message):
    with pytest.raises(ValueError, match=message):
        simulate(model, guide, torch.zeros(3), num_simulations=3, num_samples=2, progress=False)


def of(truth, draws, data=None, quantities=None):
    data = torch.zeros(len(truth), 1) if data is None else data
    return Simulation(names=("z",), truth=truth, draws=draws, data=data, quantities=quantities or {})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: simulate(scalar_model, scalar_guide, torch.zeros(3), num_samples=0), ValueError, "num_samples"),
        (lambda: simulate(scalar_model, scalar_guide, torch.zeros(3), num_simulations=1.5), TypeError, "num_simu"),
        (
            lambda: simulate(scalar_model, scalar_guide, torch.zeros(3), quantities={"log_likelihood": len}),
            ValueError,
            "quantities of other names",
        ),
        (
            lambda: simulate(
                scalar_model, scalar_guide, torch.zeros(3), quantities={"q": lambda s: s["z"].sum()}, progress=False
            ),
            ValueError,
            r"quantity 'q' of shape \(..., 3\)",
        ),
        (lambda: of(torch.zeros(4), torch.zeros(2, 4, 1)), ValueError, r"truth of shape \(N, 1\)"),
        (lambda: of(torch.zeros(4, 1), torch.zeros(2, 3, 1)), ValueError, r"draws of shape \(S, N, 1\)"),
        (lambda: of(torch.zeros(4, 1), torch.full((2, 4, 1), math.nan)), ValueError, "draws to be finite"),
        (lambda: of(torch.zeros(4, 1), torch.zeros(2, 4, 1), torch.zeros(3, 1)), ValueError, r"data of shape \(4, D"),
        (
            lambda: of(torch.zeros(4, 1), torch.zeros(2, 4, 1), None, {"q": (torch.zeros(4), torch.zeros(4))}),
            ValueError,
            r"'q' of shapes \(4,\) and \(2, 4\)",
        ),
        (lambda: sbc(of(torch.zeros(99, 1), torch.zeros(2, 99, 1))), ValueError, "five data points in each of 20 bins"),
        (lambda: coverage(sbc(simulation()), (0.5, 1.0)), ValueError, "level between 0 and 1"),
        (lambda: coverage(sbc(simulation()), ()), ValueError, "at least one level"),
        (lambda: tarp(simulation(), references=torch.zeros(3, 2)), ValueError, r"references of shape \(4000, 2\)"),
        (lambda: tarp(of(torch.zeros(1, 1), torch.zeros(2, 1, 1))), ValueError, "at least two data points"),
        (lambda: c2st(torch.zeros(50, 1), torch.zeros(40, 1)), ValueError, "two sets of samples of one shape"),
        (lambda: c2st(torch.zeros(5, 1), torch.zeros(5, 1)), ValueError, "n of at least 10"),
        (lambda: c2st_per_datum(torch.zeros(9, 2), torch.zeros(9, 2)), ValueError, r"shape \(S, N, K\)"),
        (
            lambda: posterior_error(scalar_model, scalar_guide, torch.zeros(3)),
            TypeError,
            "posterior.x., or a reference",
        ),
        (
            lambda: posterior_error(scalar_model, scalar_guide, torch.zeros(3), reference={"y": torch.zeros(9, 3)}),
            ValueError,
            "for the latent sites .'z'., got .'y'.",
        ),
        (
            lambda: posterior_error(scalar_model, scalar_guide, torch.zeros(3), reference={"z": torch.zeros(9, 2)}),
            ValueError,
            r"samples of 'z' of shape \(S, \*\(3,\)\)",
        ),
        (
            lambda: posterior_error(
                scalar_model,
                scalar_guide,
                torch.zeros(3),
                reference={"z": torch.zeros(9, 3)},
                log_evidence=torch.zeros(2),
            ),
            ValueError,
            r"log_evidence of shape \(3,\)",
        ),
        (lambda: tarp_curve({}), ValueError, "at least one result"),
        (lambda: posterior_error_figure({}), ValueError, "at least one result"),
        (lambda: pareto_k_figure(torch.zeros(3, 2), {"q": torch.zeros(2)}), ValueError, r"of shape \(3,\)"),
    ],
)
def test_unfit_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_seeds_repeat_and_leave_the_random_state():
    def draw():
        x = torch.zeros(10, 5).double()
        return simulate(model(), Exact(model()), x, num_simulations=25, num_samples=3, seed=4, progress=False)

    state = torch.get_rng_state()
    a, b = draw(), draw()
    assert torch.equal(a.draws, b.draws)
    assert torch.equal(sbc(a, num_bins=2, seed=4).uniform, sbc(b, num_bins=2, seed=4).uniform)
    assert torch.equal(tarp(a, seed=4).ranks, tarp(b, seed=4).ranks)
    assert torch.equal(state, torch.get_rng_state())
    assert len({tuple(row) for row in a.data.tolist()}) == 25  # each round makes data of its own


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures_show_the_numbers(tmp_path):
    results = {f"{f:g} sigma": sbc(simulation(f)) for f in (1.0, 1.3)}
    joint = {f"{f:g} sigma": tarp(simulation(f)) for f in (1.0, 1.3)}
    x, guide = data_for(model(), 200), TiedMeanField(model())
    k = pareto_k(log_weights(model(), guide, x, num_samples=200)).value
    errors = {"tied": posterior_error(model(), guide, x)}
    wide = results["1.3 sigma"]
    figures = {
        "histogram": rank_histogram(wide),
        "ecdf": ecdf_difference(wide),
        "tarp": tarp_curve(joint),
        "coverage": coverage_figure(coverage(wide)),
        "khat": pareto_k_figure(x, {"tied": k}),
        "errors": posterior_error_figure(errors),
    }
    heights = [patch.get_height() for patch in figures["histogram"].axes[1].patches[1:]]
    assert heights == np.histogram(wide.uniform[:, 1], 20, (0, 1))[0].tolist()
    curve = figures["ecdf"].axes[0].lines[1]
    share = [(wide.uniform[:, 0] <= point).double().mean().item() - point for point in curve.get_xdata()]
    assert np.allclose(curve.get_ydata(), share, atol=1e-12)
    for line, result in zip(figures["tarp"].axes[0].lines[1:], joint.values()):
        assert line.get_ydata().tolist() == result.coverage.tolist()
    points = figures["khat"].axes[0].collections[0]
    assert np.allclose(points.get_array(), k.clamp(-1, 1.5))
    for name, figure in figures.items():
        save_figure(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_guide_with_samples_only_has_moments_and_no_divergences():
    model = LinearVAE(5, 2, sigma=0.5).double().requires_grad_(False)
    x = model(n=10).detach()
    guide = Resampled(model, Exact(model), num_proposals=5)
    got = posterior_error(model, guide, x, num_samples=4000, seed=0)
    assert got.kl is None
    assert got.reverse_kl is None
    assert (got.mean_error.abs() < 4 / 4000**0.5).all()
    assert (got.wasserstein < 0.1).all()
