"""mutual_information() against closed forms and brute force, up to its ceiling."""

import math
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from gaussian_pairs import DETECT, PASS, eye, function_pair
from registry import data_for
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from guides import Exact, FullRank, Linear, MeanField, WrappedEncoder
from inference.diagnostics.collapse import (
    latent_kl,
)
from inference.information.encoder_information import CEILING_MARGIN, mutual_information
from zoo import LinearVAE

# --- mutual information: linear-Gaussian encoders, whose information has a closed form -------------------


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


@pytest.mark.slow
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


@pytest.mark.parametrize("family", [MeanField, pytest.param(FullRank, marks=pytest.mark.slow)])
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


# --- the ceiling -----------------------------------------------------------------------------------------


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
