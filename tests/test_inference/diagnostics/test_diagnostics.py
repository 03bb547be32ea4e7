"""Diagnostics of the latent: collapse against the linear VAE's closed forms, information against Gaussian ones."""

import functools
import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from registry import data_for
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.optim import LBFGS

from guides import Exact, FullRank, Linear, MeanField, TiedMeanField, WrappedEncoder
from inference import AnalyticELBO, fit
from inference.diagnostics.collapse import (
    active_units,
    collapse_curve,
    collapsed,
    latent_kl,
    posterior_means,
    predicted_alive,
    predicted_kl,
)
from inference.distributions.gaussian import gaussian_marginals
from inference.information.encoder_information import CEILING_MARGIN, mutual_information
from inference.plots.collapse import (
    alive_figure,
    collapse_curve_figure,
    landscape_figure,
    latent_kl_figure,
    threshold_figure,
)
from inference.plots.comparison import save_figure
from zoo import IMAVAE, Beta, LinearVAE, Scaled, digits, digits_logit
from zoo.linear.estimation import spectrum

# A defect must be told with a p-value below 1e-6: a two-sided normal deviate of 4.9.
PASS, DETECT = 4.0, 4.9


def eye(k):
    return torch.eye(k, dtype=torch.float64)


def function_pair(posterior, prior=None, latent_dim=2, **plate):
    """A model and guide made of functions, with any distributions of the site "code"."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1, **plate):
            distribution = dist.Normal(torch.zeros(latent_dim).to(x), 1.0).to_event(1) if prior is None else prior(x)
            z = pyro.sample("code", distribution)
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[: len(z), :1])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1, **plate):
            pyro.sample("code", posterior(x))

    return model, guide


# --- divergence per latent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [4096, 7, 1])
@pytest.mark.parametrize("num", [20, 1])
def test_latent_kl_of_the_linear_vae_is_the_closed_form(num, batch_size):
    model, guide = LinearVAE(5, 3).double(), Linear(5, 3).double()
    for p in [*model.parameters(), *guide.parameters()]:
        p.data.normal_()
    x = data_for(model, num)
    guide.bias.data = -guide.V.data @ model.mu.data
    d, mean = guide.log_sigma.exp().square(), (x - model.mu) @ guide.V.mT
    expected = 0.5 * (d + mean.square() - 1 - d.log())
    got = latent_kl(model, guide, x, block=batch_size)
    assert got.shape == (num, 3)
    assert not got.requires_grad
    assert (got - expected).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [MeanField, FullRank])
def test_latent_kl_is_torchs_divergence_of_the_marginals(family, dtype):
    model, guide = LinearVAE(5, 3).to(dtype), family(5, 3, hidden=(8,)).to(dtype)
    x = data_for(model)
    distribution = guide.posterior(x)
    expected = kl_divergence(
        Normal(distribution.mean, distribution.variance.sqrt()), Normal(torch.zeros(3), torch.ones(3))
    )
    got = latent_kl(model, guide, x)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < (1e-10 if dtype == torch.float64 else 1e-5)


def test_latent_kl_reads_the_prior_at_a_site_of_any_name():
    mean, sigma = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    factor = torch.tensor([[0.7, 0.0], [0.4, 1.3]]).double()
    pair = function_pair(
        lambda x: dist.MultivariateNormal(x, scale_tril=factor), lambda _: dist.Normal(mean, sigma).to_event(1)
    )
    x = torch.randn(6, 2).double()
    expected = kl_divergence(Normal(x, (factor @ factor.mT).diagonal().sqrt()), Normal(mean, sigma))
    assert (latent_kl(*pair, x) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latent_kl_on_a_bounded_support_is_scipys_integral(dtype, full):
    model = IMAVAE(3, 2, prior=Beta(2, 2.0, 3.5), hidden=(8,)).to(dtype)
    family = FullRank if full else MeanField
    guide = family(3, 2, hidden=(8,), support=model.prior().support).to(dtype)
    x = torch.randn(5, 3, dtype=dtype)
    got = latent_kl(model, guide, x, block=2)
    assert (got.shape, got.dtype) == ((5, 2), torch.float64)
    with torch.no_grad():
        base = guide.posterior(x).base_dist
    for n, k in ((0, 0), (3, 1)):
        mean, sigma = float(base.mean[n, k]), float(base.variance[n, k]) ** 0.5

        def integrand(u, mean=mean, sigma=sigma):
            z = scipy.special.expit(u)
            slope = z * (1 - z)
            ratio = scipy.stats.norm.logpdf(u, mean, sigma) - scipy.stats.beta.logpdf(z, 2, 3.5) - math.log(slope)
            return scipy.stats.norm.pdf(u, mean, sigma) * ratio

        expected = scipy.integrate.quad(integrand, mean - 10 * sigma, mean + 10 * sigma, epsabs=1e-12)[0]
        assert float(got[n, k]) == pytest.approx(expected, abs=1e-9 if dtype == torch.float64 else 1e-5)


def test_latent_kl_serves_priors_that_are_not_gaussian():
    x = torch.randn(6, 2).double()
    pair = function_pair(
        lambda x: dist.Normal(x, 0.5).to_event(1), lambda x: dist.Laplace(0 * x, 2.0 + 0 * x).to_event(1)
    )
    distribution, prior = Normal(x, torch.tensor(0.5).double()), torch.distributions.Laplace(0.0 * x, 2.0)
    z = distribution.sample((50_000,))
    ratio = distribution.log_prob(z) - prior.log_prob(z)
    assert ((latent_kl(*pair, x) - ratio.mean(0)).abs() < PASS * ratio.std(0) / 50_000**0.5).all()
    with pytest.raises(ValueError, match=r"give the guide support=model.prior\(\).support"):
        latent_kl(IMAVAE(3, 2, prior=Beta(2, 2.0, 3.5)), MeanField(3, 2), torch.zeros(4, 3))


def test_marginal_kl_falls_short_of_joint_kl_by_the_correlations():
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)  # unit variances, correlation 0.6
    pair = function_pair(lambda x: dist.MultivariateNormal(0 * x, scale_tril=factor))
    x = torch.zeros(9, 2).double()
    assert latent_kl(*pair, x).abs().max() < 1e-12
    assert mutual_information(*pair, x, seed=0).mean_kl == pytest.approx(-0.5 * math.log(1 - 0.36), abs=1e-12)


def test_mean_kl_is_torchs_divergence_of_the_joint_distributions():
    mean, sigma = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    factor = torch.tensor([[0.7, 0.0], [0.4, 1.3]]).double()
    pair = function_pair(
        lambda x: dist.MultivariateNormal(x, scale_tril=factor), lambda _: dist.Normal(mean, sigma).to_event(1)
    )
    x = torch.randn(6, 2).double()
    prior = MultivariateNormal(mean, scale_tril=sigma.diag())
    expected = kl_divergence(MultivariateNormal(x, scale_tril=factor), prior).mean().item()
    assert mutual_information(*pair, x, seed=0).mean_kl == pytest.approx(expected, rel=1e-12)


def test_exactly_the_registered_gaussian_pairs_are_read(pair):
    model, guide = pair
    x = data_for(model)
    distribution = guide.posterior(x)
    if gaussian_marginals(distribution) is None:
        for door in (latent_kl, posterior_means):
            with pytest.raises(TypeError, match=f"got {type(distribution).__name__}"):
                door(model, guide, x)
        return
    expected = kl_divergence(Normal(distribution.mean, distribution.variance.sqrt()), Normal(0.0, 1.0))
    assert torch.allclose(latent_kl(model, guide, x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(posterior_means(model, guide, x), distribution.mean.detach())


def test_reading_a_pair_leaves_the_random_state_alone():
    model, guide = LinearVAE(5, 2).double(), Linear(5, 2).double()
    before = torch.get_rng_state()
    latent_kl(model, guide, data_for(model))
    mutual_information(model, guide, data_for(model), seed=3)
    assert torch.equal(before, torch.get_rng_state())


# --- collapse ------------------------------------------------------------------------------------------------------


def test_collapse_is_at_least_the_share_strictly_below_epsilon():
    kl = torch.full((100, 4), 0.005)
    kl[:1, 1], kl[:2, 2], kl[:, 3] = 0.5, 0.5, 0.01
    assert collapsed(kl).tolist() == [True, True, False, False]
    assert collapsed(kl, epsilon=0.6).tolist() == [True] * 4
    assert collapsed(kl, delta=0.02).tolist() == [True, True, True, False]
    assert collapsed(kl, delta=1.0).tolist() == [True] * 4
    assert collapsed(kl, epsilon=0.0, delta=0.0).tolist() == [False] * 4
    assert collapsed(kl[:1, :1]).tolist() == [True]


@pytest.mark.parametrize("percent", [1, 7, 29, 57])
def test_exceptions_are_counted_in_whole_data_whatever_the_rounding(percent):
    for hundreds in (1, 3, 17):
        kl = torch.zeros(100 * hundreds, 2)
        kl[: percent * hundreds] = 1.0
        kl[percent * hundreds, 1] = 1.0
        assert collapsed(kl, delta=percent / 100).tolist() == [True, False]


def test_the_curve_is_the_share_of_collapsed_at_every_epsilon():
    kl = torch.randn(300, 7).square() * torch.logspace(-4, 1, 7)
    epsilons = torch.tensor([0.0, 1e-3, 0.01, 0.1, 1.0, 100.0])
    expected = [(kl < e).double().mean(0).ge(0.99).double().mean().item() for e in epsilons]
    assert collapse_curve(kl, epsilons).tolist() == expected
    assert expected[0] == 0.0
    assert expected[-1] == 1.0


def test_the_curve_steps_strictly_above_the_divergence():
    kl = torch.full((5, 2), 0.25)
    assert collapse_curve(kl, torch.tensor([0.2, 0.25, 0.3])).tolist() == [0.0, 0.0, 1.0]


def test_active_units_are_those_whose_means_vary():
    means = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.19], [0.0, 1.0, 0.0], [0.0, 1.0, 0.41]])
    variance = np.var([0, 0.19, 0, 0.41])
    assert active_units(means).tolist() == [False, False, True]
    assert active_units(means, variance + 1e-6).tolist() == [False, False, False]
    assert active_units(means, variance - 1e-6).tolist() == [False, False, True]
    assert active_units(means[:1]).tolist() == [False] * 3


# --- the linear VAE at its optimum ---------------------------------------------------------------------------------

DIGITS, LOGITS = (
    functools.cache(lambda: digits(test_size=0, transform=Scaled(16.0)).train),
    functools.cache(lambda: digits_logit(test_size=0).train),
)


@torch.no_grad()
def optimum(x, latent_dim, sigma2):
    """The linear VAE's global optimum at fixed noise, in closed form, and the eigenvalues of the data."""
    values, axes = spectrum(x).eigenvalues, spectrum(x).eigenvectors
    model = LinearVAE(x.shape[1], latent_dim, sigma=sigma2**0.5, learn_sigma=False).double()
    guide = Linear(x.shape[1], latent_dim).double()
    model.mu.copy_(x.mean(0))
    model.log_sigma.fill_(0.5 * math.log(sigma2))
    model.W.copy_(axes[:, :latent_dim] * (values[:latent_dim] - sigma2).clamp(min=0).sqrt())
    precision = model.W.mT @ model.W + sigma2 * eye(latent_dim)
    guide.V.copy_(torch.linalg.solve(precision, model.W.mT))
    guide.bias.copy_(-guide.V @ model.mu)
    guide.log_sigma.copy_(0.5 * (sigma2 / precision.diagonal()).log())
    return model, guide, values


@torch.no_grad()
def mean_elbo(model, guide, x):
    return AnalyticELBO().per_datum(model, guide, x).mean().item()


# Lucas et al.'s experiment on the digits, 20 latents: data, sigma^2, live latents, mean ELBO and divergence.
OPTIMA = [
    pytest.param(DIGITS, 1.0, 0, -61.159, 0.0, id="digits-1"),
    pytest.param(DIGITS, 0.5, 3, -41.274, 0.341, id="digits-0.5"),
    pytest.param(DIGITS, 0.25, 5, -22.872, None, id="digits-0.25"),
    pytest.param(DIGITS, 0.1, 12, -1.662, None, id="digits-0.1"),
    pytest.param(LOGITS, 20.0, 3, -161.016, 0.649, id="logits-20"),
]


@pytest.mark.parametrize(("data", "sigma2", "alive", "elbo", "kl"), OPTIMA)
def test_collapse_at_the_optimum_of_the_linear_vae(data, sigma2, alive, elbo, kl):
    x = data()
    model, guide, eigenvalues = optimum(x, 20, sigma2)
    assert mean_elbo(model, guide, x) == pytest.approx(elbo, abs=0.01)
    found = latent_kl(model, guide, x)
    assert int((~collapsed(found)).sum()) == alive == predicted_alive(eigenvalues, sigma2, 20)
    assert int(active_units(posterior_means(model, guide, x)).sum()) == alive
    prediction = predicted_kl(eigenvalues, sigma2, 20)
    assert (found.mean(0) - prediction).abs().max() < 1e-10
    if kl is not None:
        assert found.sum(1).mean().item() == pytest.approx(kl, abs=0.005)


@pytest.mark.parametrize(("data", "sigma2", "alive", "elbo", "kl"), OPTIMA)
def test_the_collapse_curve_at_the_optimum_is_the_closed_form(data, sigma2, alive, elbo, kl):  # noqa: ARG001
    x = data()
    model, guide, eigenvalues = optimum(x, 20, sigma2)
    # There z_k's distribution has variance sigma^2 / lambda_k and mean sqrt(lambda_k - sigma^2) / lambda_k along axis
    # k.
    lam = eigenvalues[:20].clamp(min=sigma2)
    along = (x - x.mean(0)) @ spectrum(x).eigenvectors[:, :20]
    d, mean = sigma2 / lam, along * (lam - sigma2).sqrt() / lam
    closed = 0.5 * (d - 1 - d.log() + mean.square()).numpy()
    epsilons = torch.linspace(0.001, 2.0, 50, dtype=torch.float64)
    expected = [np.mean(np.mean(closed < e, axis=0) >= 0.99) for e in epsilons.tolist()]
    assert collapse_curve(latent_kl(model, guide, x), epsilons).tolist() == expected


def test_training_collapses_the_predicted_latents():
    x, sigma2 = DIGITS(), 0.5
    model, guide, eigenvalues = optimum(x, 20, sigma2)
    for p in [model.W, model.mu, guide.V, guide.bias, guide.log_sigma]:
        p.data = 0.1 * torch.randn_like(p)

    def lbfgs(parameters):
        return LBFGS(
            parameters,
            max_iter=100,
            history_size=50,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-13,
            tolerance_change=1e-16,
        )

    assert mean_elbo(model, guide, x) < -41.274 - 1
    fit(model, guide, x, steps=5, objective=AnalyticELBO(), optimizer=lbfgs, progress=False)
    assert mean_elbo(model, guide, x) == pytest.approx(-41.274, abs=0.01)
    found = latent_kl(model, guide, x)
    assert collapsed(found).double().mean() == 0.85
    assert found.sum(1).mean().item() == pytest.approx(0.341, abs=0.005)
    assert int((~collapsed(found)).sum()) == predicted_alive(eigenvalues, sigma2, 20)
    assert (found.mean(0).sort(descending=True)[0] - predicted_kl(eigenvalues, sigma2, 20)).abs().max() < 1e-3


def test_the_prediction_sorts_pads_and_excludes_the_threshold():
    values = torch.tensor([0.5, 8.0, 2.0, 1.0])
    assert predicted_kl(values, 1.0, 6).tolist() == pytest.approx([0.5 * math.log(8), 0.5 * math.log(2), 0, 0, 0, 0])
    assert predicted_kl(values, 1.0, 1).tolist() == pytest.approx([0.5 * math.log(8)])
    assert [predicted_alive(values, s, 6) for s in (10.0, 1.0, 0.6, 0.1)] == [0, 2, 3, 4]
    assert predicted_alive(values, 0.1, 2) == 2


# --- mutual information: linear-Gaussian encoders, whose information has a closed form -----------------------------


class Problem:
    """x ~ N(0, S), q(z | x) = N(V x, C): information 1/2 log det(I + C^-1 V S V') set to a number of nats."""

    def __init__(self, nats, latent_dim, *, full, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        data_dim = latent_dim + 1
        self.root, covariance = randn(data_dim, data_dim), randn(latent_dim, latent_dim)
        covariance = covariance @ covariance.mT + 0.5 * eye(latent_dim)
        self.C = covariance if full else covariance.diagonal().diag()
        self.direction, self.latent_dim, self.full = randn(latent_dim, data_dim), latent_dim, full
        low, high = 0.0, 1e3
        for _ in range(100):
            self.V = (low + high) / 2 * self.direction
            low, high = (low, (low + high) / 2) if self.information() > nats else ((low + high) / 2, high)

    @property
    def aggregate(self):
        half = self.V @ self.root
        return half @ half.mT + self.C

    def information(self):
        return 0.5 * (torch.logdet(self.aggregate) - torch.logdet(self.C)).item()

    def aggregate_kl(self):
        prior = MultivariateNormal(torch.zeros(self.latent_dim).double(), eye(self.latent_dim))
        return kl_divergence(MultivariateNormal(prior.loc, self.aggregate), prior).item()

    def pair(self):
        model = LinearVAE(self.V.shape[1], self.latent_dim).double()
        if self.full:
            distribution = lambda mean: dist.MultivariateNormal(mean, self.C)  # noqa: E731
            network = nn.Linear(*self.V.mT.shape).double()
            network.weight.data, network.bias.data = self.V, 0 * network.bias.data
            return model, WrappedEncoder(network, distribution)
        guide = Linear(self.V.shape[1], self.latent_dim).double()
        guide.V.data, guide.log_sigma.data = self.V, 0.5 * self.C.diagonal().log()
        return model, guide

    def draw(self, num, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num, len(self.root), generator=generator, dtype=torch.float64) @ self.root.mT

    def control(self, x):
        """KL(q(z | x_n) || N(0, Cov z)) less its mean over x, which is the information."""
        mean, aggregate = x @ self.V.mT, self.aggregate
        squares = (mean * torch.linalg.solve(aggregate, mean.mT).mT).sum(-1)
        return 0.5 * (squares + torch.linalg.solve(aggregate, self.C).trace() - self.latent_dim)

    def measure(self, num, seed=0, **options):
        """Estimate and standard error, the data's own spread taken out by the control variate."""
        x = self.draw(num, seed)
        result = mutual_information(*self.pair(), x, seed=seed + 1, **options)
        residual = result.per_datum - self.control(x)
        error = math.hypot(residual.std().item() / math.sqrt(num), result.bias_bound)
        return residual.mean().item(), error, result


PROBLEMS = [(0.1, 1, False), (0.5, 2, True), (1.0, 3, False), (1.5, 2, True), (1.5, 4, False)]


@pytest.mark.parametrize(("nats", "latent_dim", "full"), PROBLEMS)
def test_information_is_within_a_thousandth_of_the_closed_form(nats, latent_dim, full):
    problem = Problem(nats, latent_dim, full=full)
    assert problem.information() == pytest.approx(nats, abs=1e-9)
    value, error, result = problem.measure(12_000)
    print(f"{value - nats:.1e} +- {error:.1e}, bias bound {result.bias_bound:.1e}")
    assert error <= 1e-3
    assert abs(value - nats) <= PASS * error
    assert abs(result.information.value - nats) <= PASS * result.information.standard_error
    assert result.information.lower < result.information.value < result.information.upper
    # Twin with a defect: by the same standard error, an encoder whose variance is off by 2 per cent is told apart.
    problem.C = 1.02 * problem.C
    assert abs(value - problem.information()) > DETECT * error


def replicates(problem, num, repeats, read, **options):
    pair = problem.pair()
    return np.array(
        [read(mutual_information(*pair, problem.draw(num, i), seed=10**6 + i, **options)) for i in range(repeats)]
    )


def deviate(values, expected):
    return (values.mean() - expected) / (values.std(ddof=1) / math.sqrt(len(values)))


def check_brute_force(problem, num, repeats):
    nats = problem.information()
    value, own = replicates(problem, num, repeats, lambda r: (r.information.value, r.empirical.value)).T
    error = value.std(ddof=1) / math.sqrt(repeats)
    print(f"{value.mean() - nats:.1e} +- {error:.1e}, with its own component {own.mean() - nats:.1e}")
    assert error <= 1e-3
    assert abs(deviate(value, nats)) <= PASS
    assert abs(deviate(value, 1.02 * nats)) > DETECT  # two hundredths of it, missing, would show


def test_information_without_controls_averages_to_the_closed_form():
    check_brute_force(Problem(0.5, 2, full=True), 1000, 320)


@pytest.mark.slow
def test_information_of_one_and_a_half_nats_without_any_control():
    check_brute_force(Problem(1.5, 2, full=False), 10_000, 50)


def test_the_finite_sample_bias_is_chi2_over_2n_on_either_side():
    problem, num = Problem(0.5, 2, full=False), 100
    low, mid, high = replicates(
        problem,
        num,
        600,
        lambda r: (
            r.per_datum.mean().item() - r.bias_bound,
            r.per_datum.mean().item(),
            r.per_datum.mean().item() + r.bias_bound,
        ),
    ).T
    control = np.array([problem.control(problem.draw(num, i)).mean().item() for i in range(600)])
    low, mid, high = low - control, mid - control, high - control
    bias, nats = math.expm1(2 * 0.5) / (2 * num), problem.information()
    print(f"bias {low.mean() - nats:.2e}, {mid.mean() - nats:.2e}, {high.mean() - nats:.2e}; predicted {bias:.2e}")
    assert low.mean() - nats == pytest.approx(-bias, rel=0.2)
    assert high.mean() - nats == pytest.approx(bias, rel=0.2)
    assert abs(mid.mean() - nats) < 0.2 * bias
    # The bracket is one, and its ends, taken for the information itself, are told from it.
    assert deviate(low, nats) < -DETECT
    assert deviate(high, nats) > DETECT


def test_standard_errors_are_those_over_data_sets():
    problem, repeats = Problem(0.5, 2, full=True), 400
    read = lambda r: (*r.information[::3], r.empirical.standard_error, *r.information[1:3])  # noqa: E731
    value, error, noise, lower, upper = replicates(problem, 200, repeats, read).T
    squares = ((value - problem.information()) / error) ** 2
    print(f"mean squared deviate {squares.mean():.3f}")
    assert 1e-3 < scipy.stats.chi2(repeats).cdf(squares.sum()) < 1 - 1e-3
    covered = ((lower < problem.information()) & (problem.information() < upper)).sum()
    assert scipy.stats.binom(repeats, 0.95).cdf(covered) > 1e-3
    # The noise of the draws alone, taken for the error, is told to be too small.
    wrong = ((value - problem.information()) / noise) ** 2
    assert scipy.stats.chi2(repeats).sf(wrong.sum()) < 1e-6


def test_the_empirical_value_is_exact_but_for_the_noise_of_the_draws():
    problem = Problem(0.8, 2, full=True)
    x, pair, repeats = problem.draw(50, 0), problem.pair(), 300
    truth = empirical_by_quadrature(problem, x)
    found = [mutual_information(*pair, x, num_samples=4, seed=10**6 + i).empirical for i in range(repeats)]
    deviates = np.array([(f.value - truth) / f.standard_error for f in found])
    print(f"mean deviate {deviates.mean():.3f}, mean square {np.mean(deviates**2):.3f}")
    assert abs(deviates.mean()) * math.sqrt(repeats) < PASS
    assert 1e-3 < scipy.stats.chi2(repeats).cdf((deviates**2).sum()) < 1 - 1e-3
    # The population's information, taken for it, is told apart.
    wrong = np.array([(f.value - problem.information()) / f.standard_error for f in found])
    assert abs(wrong.mean()) * math.sqrt(repeats) > DETECT


def empirical_by_quadrature(problem, x, nodes=60):
    """The information of the mixture of N Gaussians by Gauss-Hermite quadrature, SciPy's densities."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = np.stack(np.meshgrid(points, points), -1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / weights.sum() ** 2
    covariance, means = problem.C.numpy(), (x @ problem.V.mT).numpy()
    z = means[:, None] + grid @ np.linalg.cholesky(covariance).T
    density = sum(scipy.stats.multivariate_normal(m, covariance).pdf(z) for m in means) / len(x)
    own = scipy.stats.multivariate_normal(np.zeros(2), covariance).logpdf(z - means[:, None])
    return float(((own - np.log(density)) @ weight).mean())


def test_the_aggregates_divergence_is_the_closed_form():
    problem = Problem(0.5, 2, full=True)
    expected = problem.aggregate_kl()
    deviates = replicates(
        problem, 300, 200, lambda r: (r.aggregate_kl.value - expected) / r.aggregate_kl.standard_error
    )
    assert expected > 0.1
    assert abs(deviates.mean()) * math.sqrt(200) < PASS
    assert abs(np.mean(deviates**2) - 1) < 0.4
    wrong = replicates(problem, 300, 200, lambda r: (r.mean_kl - expected) / r.aggregate_kl.standard_error)
    assert abs(wrong.mean()) * math.sqrt(200) > DETECT


def test_the_exact_posterior_of_own_data_has_no_aggregate_kl():
    model = LinearVAE(4, 2, sigma=0.7).double().requires_grad_(False)
    x = model(n=4000)
    result = mutual_information(model, Exact(model), x, seed=0)
    distribution = model.linear_gaussian
    nats = 0.5 * torch.logdet(eye(2) + distribution.W.mT @ distribution.W / distribution.sigma**2).item()
    assert abs(result.information.value - nats) < PASS * result.information.standard_error
    assert abs(result.aggregate_kl.value) < PASS * result.aggregate_kl.standard_error
    assert result.aggregate_kl.lower == 0.0
    assert result.mean_kl == pytest.approx(result.information.value + result.aggregate_kl.value, abs=1e-12)


def test_full_and_diagonal_guides_agree_at_any_location():
    problem = Problem(1.0, 3, full=False)
    x = problem.draw(500, 0)
    base = mutual_information(*problem.pair(), x, seed=0)
    problem.full = True
    other = mutual_information(*problem.pair(), x, seed=0)
    assert torch.allclose(base.per_datum, other.per_datum, atol=1e-10)
    _, guide = pair = problem.pair()
    guide.network.bias.data += 1e6
    shifted = mutual_information(*pair, x, seed=0)
    assert torch.allclose(base.per_datum, shifted.per_datum, atol=1e-6)


@pytest.mark.parametrize("family", [MeanField, FullRank])
def test_posteriors_that_differ_between_rows_are_each_weighted(family):
    model, guide = LinearVAE(3, 2).double(), family(3, 2, hidden=(8,)).double()
    x = 3 * torch.randn(40, 3).double()
    with torch.no_grad():
        distribution = guide.posterior(x)
        z = distribution.sample((20_000,))  # (S, N, K)
        pairs = torch.stack(
            [distribution.log_prob(z[:, n : n + 1]) for n in range(40)], 1
        )  # (S, N of z, N of distribution)
        ratios = pairs.diagonal(dim1=1, dim2=2) - pairs.logsumexp(-1) + math.log(40)
        by_datum = ratios.mean(1)
    result = mutual_information(model, guide, x, seed=0, num_samples=2000).empirical
    error = math.hypot(by_datum.std().item() / math.sqrt(20_000), result.standard_error)
    assert abs(result.value - by_datum.mean().item()) < PASS * error
    assert error < 4e-3


def test_the_controls_only_reduce_the_noise():
    problem = Problem(0.5, 2, full=False)
    result = mutual_information(*problem.pair(), problem.draw(2000, 0), seed=0)
    # Of one draw log q(z | x) - log q(z) has variance sum rho_k^2 - rho_k^4 / 2 within data.
    half = torch.linalg.solve(problem.aggregate, problem.aggregate - problem.C)
    rho2 = torch.linalg.eigvals(half).real
    plain = math.sqrt((rho2 - rho2.square() / 2).sum().item() / (2 * 2000))
    print(f"{result.empirical.standard_error:.1e} against {plain:.1e} without")
    assert result.empirical.standard_error < plain / 5


def test_draws_in_blocks_and_batches_are_the_same_draws(monkeypatch):
    problem = Problem(1.0, 2, full=True)
    x = problem.draw(300, 0)
    whole = mutual_information(*problem.pair(), x, seed=0).per_datum
    monkeypatch.setattr(sys.modules["inference.information.encoder_information"], "_BLOCK_CPU", 1000)
    parts = mutual_information(*problem.pair(), x, seed=0, block=7).per_datum
    assert torch.allclose(whole, parts, atol=1e-10)
    assert not torch.allclose(whole, mutual_information(*problem.pair(), x, seed=1).per_datum, atol=1e-3)


def test_float32_pairs_are_measured_in_float64():
    problem = Problem(1.0, 2, full=False)
    x = problem.draw(300, 0)
    double = mutual_information(*problem.pair(), x, seed=0)
    single = mutual_information(*(half.float() for half in problem.pair()), x.float(), seed=0)
    assert single.per_datum.dtype == torch.float64
    assert single.information.value == pytest.approx(double.information.value, abs=1e-4)


# --- the ceiling ---------------------------------------------------------------------------------------------------


def separated(sigma):
    """Data 1, 2, ..., each with a code of its own."""
    return function_pair(lambda x: dist.Normal(x, sigma * torch.ones_like(x)).to_event(1), latent_dim=1)


def test_codes_that_separate_all_rows_reach_the_ceiling():
    x = torch.arange(200.0).double().unsqueeze(1)
    result = mutual_information(*separated(1e-3), x, seed=0)
    assert result.ceiling == math.log(200)
    assert result.empirical.value == pytest.approx(math.log(200), abs=1e-9)
    assert math.isnan(result.information.value)
    assert math.isnan(result.aggregate_kl.value)
    assert result.information.lower == pytest.approx(math.log(200), abs=1e-9)
    assert result.information.upper > 1000  # of the neighbour's distribution at a distance of a thousand sigma
    kl = latent_kl(*separated(1e-3), x)
    width = scipy.stats.norm.ppf(0.975) * kl.std().item() / math.sqrt(200)
    assert result.aggregate_kl.upper == pytest.approx(kl.mean().item() - math.log(200) + width, rel=1e-9)
    assert result.statement.startswith("I_q(x; z) is at least 5.29")
    assert "log N - 2" in result.statement


def test_the_value_is_refused_from_two_nats_below_the_ceiling_on():
    x = torch.arange(200.0).double().unsqueeze(1)
    seen = []
    for sigma in (0.1, 1.0, 1.5, 2.0, 3.0, 10.0):
        result = mutual_information(*separated(sigma), x, seed=0)
        refused = math.isnan(result.information.value)
        assert refused == (result.empirical.value > math.log(200) - CEILING_MARGIN)
        assert math.isnan(result.aggregate_kl.value) == refused
        assert ("at least" in result.statement) == refused
        seen.append(refused)
    assert seen[0]
    assert not seen[-1]


def test_the_lower_bound_holds_for_information_above_the_ceiling():
    problem = Problem(6.0, 2, full=False)
    result = mutual_information(*problem.pair(), problem.draw(200, 0), seed=0)
    assert problem.information() > result.ceiling
    assert math.isnan(result.information.value)
    assert 3.0 < result.information.lower < result.empirical.upper <= result.ceiling
    assert result.information.upper > problem.information()
    assert result.aggregate_kl.lower <= problem.aggregate_kl() <= result.aggregate_kl.upper


def test_one_datum_tells_nothing():
    model, guide = LinearVAE(5, 2).double(), FullRank(5, 2, hidden=(8,)).double()
    result = mutual_information(model, guide, data_for(model, 1), seed=0)
    assert result.empirical == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(result.information.value)
    assert result.information[1:] == (0.0, math.inf, math.inf)
    assert result.aggregate_kl[1:] == (0.0, math.inf, math.inf)
    assert latent_kl(model, guide, data_for(model, 1)).shape == (1, 2)


def test_a_wholly_collapsed_guide_has_no_information():
    model, guide = LinearVAE(5, 2).double(), Linear(5, 2).double()
    guide.V.data.zero_()
    result = mutual_information(model, guide, data_for(model, 50), seed=0)
    assert result.information == pytest.approx((0.0,) * 4, abs=1e-12)
    assert result.aggregate_kl == pytest.approx((0.0,) * 4, abs=1e-12)
    assert result.statement == "I_q(x; z) = 0.0000 +- 0.0000 nats (ceiling log N = 3.9120)"


# --- what every door refuses ---------------------------------------------------------------------------------------

DISTRIBUTIONS = [
    (lambda x: dist.Laplace(x, 1.0).to_event(1), None, "Gaussian guide at site 'code', got Independent of Laplace"),
    (lambda x: dist.LogNormal(x, 1.0).to_event(1), None, "got Independent of LogNormal"),
    (
        lambda x: dist.Normal(x, 1.0).to_event(1),
        lambda x: dist.MultivariateNormal(0 * x, eye(2)),
        "independent Gaussian coordinates at site 'code', got MultivariateNormal",
    ),
    (
        lambda x: dist.Normal(x, 1.0).to_event(1),
        lambda x: dist.Cauchy(0 * x, 1.0).to_event(1),
        "independent Gaussian coordinates at site 'code', got Independent of Cauchy",
    ),
]
DOORS = [latent_kl, posterior_means, functools.partial(mutual_information, seed=0)]


@pytest.mark.parametrize("door", DOORS[1:])
@pytest.mark.parametrize(("posterior", "prior", "message"), DISTRIBUTIONS)
def test_other_distributions_are_refused_by_name(door, posterior, prior, message):
    with pytest.raises(TypeError, match=message):
        door(*function_pair(posterior, prior), torch.zeros(4, 2).double())


@pytest.mark.parametrize(("posterior", "prior"), [distribution[:2] for distribution in DISTRIBUTIONS[:3]])
def test_latent_kl_is_refused_where_coordinates_are_not_marginals(posterior, prior):
    with pytest.raises(
        TypeError, match=r"Gaussian against a distribution with independent coordinates, got (Indep|Multiv)"
    ):
        latent_kl(*function_pair(posterior, prior), torch.zeros(4, 2).double())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (function_pair(lambda x: dist.Normal(x, 1.0).to_event(1).mask(False)), "mask|Gaussian"),
        (
            function_pair(
                lambda x: dist.Normal(x[:2], 1.0).to_event(1),
                lambda x: dist.Normal(0 * x[:2], 1.0).to_event(1),
                subsample_size=2,
            ),
            "scale or subsampling",
        ),
        (
            function_pair(lambda x: dist.Normal(x[:, 0], 1.0), lambda x: dist.Normal(0 * x[:, 0], 1.0)),
            r"event \(K,\), got \(4,\) and \(\): is .to_event",
        ),
    ],
    ids=["mask", "subsampling", "scalar"],
)
def test_masked_scaled_and_scalar_sites_are_refused(door, pair, message):
    with pytest.raises((ValueError, TypeError), match=message):
        door(*pair, torch.zeros(4, 2).double())


@pytest.mark.parametrize("door", DOORS)
def test_pairs_of_several_latents_are_refused(door):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            return sum(pyro.sample(name, dist.Normal(0 * x, 1.0).to_event(1)) for name in ("a", "b"))

    def model(x):
        mean = guide(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"one latent site, got \['a', 'b'\]"):
        door(model, guide, torch.zeros(4, 2))


@pytest.mark.parametrize("door", DOORS)
def test_batch_normalisation_in_train_mode_is_refused(door):
    guide = MeanField(3, 2, encoder=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="batch normalisation"):
        door(LinearVAE(3, 2), guide, torch.randn(4, 3))
    guide.eval()
    door(LinearVAE(3, 2), guide, torch.randn(4, 3))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([[0.0]], {}, TypeError, "expected x to be a torch.Tensor of shape .N, D., got list"),
        (torch.zeros(4, 3).double(), {}, TypeError, "expected x of dtype torch.float32"),
        (torch.zeros(4, 3).long(), {}, TypeError, "floating"),
        (torch.zeros(4, 2), {}, ValueError, r"expected x of shape \(N, 3\), got \(4, 2\)"),
        (torch.zeros(0, 3), {}, ValueError, "at least one data point"),
        (torch.full((4, 3), math.nan), {}, ValueError, "to be finite"),
        (torch.zeros(4, 3), {"block": 0}, ValueError, "block to be at least 1, got 0"),
        (torch.zeros(4, 3), {"block": 2.0}, TypeError, "block to be an integer"),
    ],
)
def test_unfit_data_are_refused(door, x, options, error, message):
    with pytest.raises(error, match=message):
        door(LinearVAE(3, 2), Linear(3, 2), x, **options)


def test_unfit_arguments_of_the_information_are_refused():
    pair, x = (LinearVAE(3, 2), Linear(3, 2)), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="num_samples to be at least 2, got 1"):
        mutual_information(*pair, x, num_samples=1)
    with pytest.raises(ValueError, match=r"level between 0 and 1, got 1\.0"):
        mutual_information(*pair, x, level=1.0)
    floating = function_pair(lambda x: dist.Normal(x, 1.0).to_event(1), lambda x: dist.Normal(x, 1.0).to_event(1))
    with pytest.raises(ValueError, match="one prior for all data"):
        mutual_information(*floating, torch.randn(4, 2))
    assert latent_kl(*floating, torch.randn(4, 2)).abs().max() == 0.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: collapsed([[0.0]]), TypeError, "expected kl to be a floating tensor of shape .N, K., got list"),
        (lambda: collapsed(torch.zeros(2, 2).long()), TypeError, "got torch.int64"),
        (lambda: collapsed(torch.zeros(2)), ValueError, r"expected kl of shape \(N, K\), got \(2,\)"),
        (lambda: collapsed(torch.zeros(0, 2)), ValueError, r"got \(0, 2\)"),
        (lambda: collapsed(torch.full((2, 2), math.inf)), ValueError, "expected kl to be finite"),
        (lambda: collapsed(torch.zeros(2, 2), epsilon=-1.0), ValueError, "epsilon of at least 0, got -1.0"),
        (lambda: collapsed(torch.zeros(2, 2), epsilon=math.nan), ValueError, "epsilons to be finite"),
        (lambda: collapsed(torch.zeros(2, 2), delta=1.5), ValueError, "delta between 0 and 1, got 1.5"),
        (lambda: collapse_curve(torch.zeros(2, 2), 0.1), TypeError, "expected epsilons to be a floating tensor"),
        (lambda: collapse_curve(torch.zeros(2, 2), torch.zeros(1, 1)), ValueError, r"shape \(E,\), got \(1, 1\)"),
        (lambda: active_units(torch.zeros(2)), ValueError, r"expected means of shape \(N, K\), got \(2,\)"),
        (lambda: active_units(torch.zeros(2, 2), -0.1), ValueError, "threshold of at least 0, got -0.1"),
        (lambda: predicted_kl(torch.zeros(2, 2), 1.0, 2), ValueError, r"expected eigenvalues of shape \(D,\)"),
        (lambda: predicted_kl(torch.ones(2), 0.0, 2), ValueError, "positive finite sigma2, got 0.0"),
        (lambda: predicted_alive(torch.ones(2), 1.0, 0), ValueError, "latent_dim to be at least 1, got 0"),
        (lambda: collapse_curve_figure({}), ValueError, "at least one run, got none"),
        (lambda: latent_kl_figure({}), ValueError, "at least one run, got none"),
        (lambda: alive_figure({}), ValueError, "at least one run, got none"),
        (lambda: alive_figure({"deep": torch.ones(3)}), ValueError, r"shape \(M, 2\) for 'deep', got \(3,\)"),
        (lambda: threshold_figure({}), ValueError, "at least one run, got none"),
        (lambda: landscape_figure(torch.ones(3), {}, plane_labels=("a", "b")), ValueError, "at least one run"),
    ],
)
def test_unfit_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures_show_the_numbers(tmp_path):
    x = DIGITS()
    runs, values = {}, spectrum(x).eigenvalues
    for sigma2 in (1.0, 0.5, 0.1):
        model, guide, _ = optimum(x, 20, sigma2)
        runs[f"sigma^2 = {sigma2:g}"] = latent_kl(model, guide, x)
    curve, bars = collapse_curve_figure(runs), latent_kl_figure(runs, prediction=predicted_kl(values, 0.1, 20))
    for (name, kl), line in zip(runs.items(), curve.axes[0].lines):
        assert line.get_label() == name
        assert (
            line.get_ydata().tolist()
            == (100 * collapse_curve(kl, torch.tensor(line.get_xdata(), dtype=torch.float64))).tolist()
        )
    heights = [patch.get_height() for patch in bars.axes[0].patches]
    assert heights == predicted_kl(values, 0.1, 20).tolist()
    lines = {line.get_label(): line.get_ydata() for line in bars.axes[0].lines}
    assert np.allclose(lines["sigma^2 = 0.1"], heights, atol=1e-9)
    for figure in (curve, bars):
        save_figure(figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_figure_of_live_latents_counts_the_runs_at_each_place():
    deep, linear = torch.tensor([[2, 0], [6, 2], [2, 0]]), torch.tensor([[2, 2], [6, 6], [6, 6]])
    ax = alive_figure({"deep": deep, "linear": linear}).axes[0]
    shown = [c for c in ax.collections if len(c.get_offsets())]
    assert [c.get_offsets().tolist() for c in shown] == [[[2, 0], [6, 2]], [[2, 2], [6, 6]]]
    assert [(c.get_sizes() / min(c.get_sizes())).tolist() for c in shown] == [[2, 1], [1, 2]]
    assert np.array_equal(ax.lines[0].get_xdata(), ax.lines[0].get_ydata())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["as predicted", "deep", "linear"]


def test_landscape_figures_show_lines_and_their_sign_changes():
    grid = torch.linspace(-1, 1, 5)
    lines = {"leading": {"evidence": grid, "ELBO": -grid}, "trailing": {"evidence": 2 * grid, "ELBO": grid**2}}
    figure = landscape_figure(grid, {"low": (lines, torch.outer(grid, grid))}, plane_labels=("one", "two"))
    shown = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert shown == {
        f"{objective}, {direction}": value.tolist()
        for direction, values in lines.items()
        for objective, value in values.items()
    }
    assert (figure.axes[1].get_xlabel(), figure.axes[1].get_ylabel()) == ("step to one", "step to two")
    ax = threshold_figure({"all": (grid, grid**3, 0.5, 0.25)}).axes[0]
    zero, curve, eigenvalue, found = (line.get_xydata().tolist() for line in ax.lines)
    assert [y for _, y in zero] == [0, 0]
    assert curve == [list(pair) for pair in zip(grid.tolist(), (grid**3).tolist())]
    assert [x for x, _ in eigenvalue] == [0.5, 0.5]
    assert found == [[0.25, 0.0]]


def test_a_tied_guide_of_an_untrained_model_needs_no_prediction():
    model = LinearVAE(5, 2).double()
    figure = latent_kl_figure({"tied": latent_kl(model, TiedMeanField(model), data_for(model))})
    assert len(figure.axes[0].patches) == 0
