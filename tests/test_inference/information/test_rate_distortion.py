"""Rate and distortion: against exact sums over finite sets, closed forms of linear models, SciPy and the paper."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import scipy.spatial
import scipy.stats
import torch
from registry import data_for
from torch.optim import LBFGS

from guides import Exact, Linear, MeanField, mlp
from inference import BetaELBO, Estimate, fit, mutual_information
from inference.information.bounds import information_bounds, tightest
from inference.information.curve import (
    AUTO_DECODING,
    AUTO_ENCODING,
    SEMANTIC,
    SYNTACTIC,
    curve_point,
    lower_hull,
    phase,
    rate_distortion_curve,
)
from inference.information.rates import RateDistortion, empirical_entropy, rate_distortion
from inference.information.reverse_water_filling import water_filling, water_filling_at_rate
from inference.objectives.analytic import AnalyticBetaELBO, AnalyticTargetRate
from inference.plots.rates import rate_distortion_figure
from zoo import VAE, AutoregressiveVAE, LinearVAE, Scaled, WrappedDecoder, digits
from zoo.benchmarks.categorical_channel import channel_terms, optimal_decoder, optimal_marginal
from zoo.linear.estimation import spectrum

PASS, DETECT = 4.0, 4.9


class Finite:
    """A channel over finitely many symbols as a Pyro pair: every term is known by an exact sum."""

    def __init__(self, counts=(7, 1, 4, 2, 10), codes=4, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def distribution(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)

        self.log_e, self.log_d, self.log_m = (
            distribution(len(counts), codes),
            distribution(codes, len(counts)),
            distribution(codes),
        )
        self.x = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.log_p = (torch.tensor(counts, dtype=torch.float64) / sum(counts)).log()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=self.log_m))
            pyro.sample("x", dist.Categorical(logits=self.log_d[z]), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(logits=self.log_e[x]))

    def terms(self):
        return channel_terms(self.log_p, self.log_e, self.log_d, self.log_m)


def gaussian_pair(noise=0.7):
    """A linear VAE with parameters at random, whose closed forms are also open to Monte Carlo when wrapped."""
    model, guide = LinearVAE(5, 3, sigma=noise).double(), Linear(5, 3).double()
    for p in [model.W, model.mu, *guide.parameters()]:
        p.data.normal_()
    sigma = model.sigma.item()  # of float32 rounding
    hidden = WrappedDecoder(torch.nn.Linear(3, 5).double(), lambda m: dist.Normal(m, sigma).to_event(1), 5, 3)
    hidden.network.load_state_dict({"weight": model.W.data, "bias": model.mu.data})
    return model, guide, hidden


# --- rate, distortion and entropy of a pair ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 64])
def test_terms_of_a_finite_channel_are_its_exact_sums(chunk):
    channel = Finite()
    found = rate_distortion(channel.model, channel.guide, channel.x, num_samples=800, chunk=chunk, seed=0)
    entropy, distortion, rate, _ = (float(t) for t in channel.terms())
    assert found.rate.value == pytest.approx(rate, abs=1e-12)  # categorical distributions have a KL in closed form
    assert found.rate.standard_error == 0
    assert abs(found.distortion.value - distortion) < PASS * found.distortion.standard_error
    assert abs(found.total.value - rate - distortion) < PASS * found.total.standard_error
    assert empirical_entropy(channel.x[:, None].double()) == pytest.approx(entropy, abs=1e-12)
    lower, upper = found.sandwich(entropy)
    assert (lower, upper) == (entropy - found.distortion.value, found.rate.value)
    # The same criterion tells the distortion from that under the next seed's decoder.
    wrong = float(Finite(seed=1).terms().distortion)
    assert abs(found.distortion.value - wrong) > DETECT * found.distortion.standard_error


def test_terms_of_a_linear_pair_are_exact_or_agree_with_monte_carlo():
    model, guide, hidden = gaussian_pair()
    x = data_for(model)
    exact = rate_distortion(model, guide, x)
    sampled = rate_distortion(hidden, guide, x, num_samples=500, chunk=100, seed=0)
    distribution = guide.posterior(x)
    rate = 0.5 * (distribution.variance + distribution.mean.square() - 1 - distribution.variance.log()).sum(-1)
    residual = (x - model.mu - distribution.mean @ model.W.mT).square().sum(
        -1
    ) + distribution.variance @ model.W.square().sum(0)
    var = model.sigma.item() ** 2
    distortion = 0.5 * residual / var + 2.5 * math.log(2 * math.pi * var)
    for found in (exact, sampled):
        assert (found.rates.value - rate).abs().max() < 1e-10
        assert found.rate.standard_error == 0
    assert exact.distortions.value.numpy() == pytest.approx(distortion.detach().numpy(), rel=1e-10)
    assert exact.total.standard_error == 0
    error = (sampled.distortions.value - distortion) / sampled.distortions.standard_error
    assert error.abs().max() < 5  # of 20
    assert not exact.rates.value.requires_grad


def test_a_rate_without_a_closed_form_is_drawn():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            components = dist.Normal(torch.tensor([-1.0, 2.0]).to(x), 1.0)
            weights = dist.Categorical(torch.tensor([0.3, 0.7]).to(x))
            z = pyro.sample("z", dist.MixtureSameFamily(weights, components))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, 0.6))

    x = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    found = rate_distortion(model, guide, x, num_samples=4000, chunk=500, seed=0)
    z = np.linspace(-10, 14, 20001)
    mixture = 0.3 * scipy.stats.norm.pdf(z, -1) + 0.7 * scipy.stats.norm.pdf(z, 2)
    for i in range(3):
        q = scipy.stats.norm.pdf(z, 0.5 * x[i].item(), 0.6)
        integrand = np.where(q > 0, q * np.log(np.maximum(q, 1e-300) / mixture), 0)
        rate = scipy.integrate.simpson(integrand, x=z)
        error = found.rates.standard_error[i].item()
        assert 0 < error < 0.05
        assert abs(found.rates.value[i].item() - rate) < PASS * error


def test_the_evidence_of_an_exact_guide_is_all_of_the_total():
    model = LinearVAE(5, 2, sigma=0.5).double()
    x = data_for(model)
    found = rate_distortion(model, Exact(model), x)
    assert (found.totals.value + model.log_evidence(x)).abs().max() < 1e-9


def test_seeds_repeat_and_bad_arguments_are_refused():
    channel = Finite()
    before = torch.get_rng_state()
    one, two = (rate_distortion(channel.model, channel.guide, channel.x, seed=3).distortions.value for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="num_samples to be at least 2, got 1"):
        rate_distortion(channel.model, channel.guide, channel.x, num_samples=1)
    scaled = pyro.poutine.scale(channel.model, 2.0)
    with pytest.raises(ValueError, match=r"expected site .* to carry no scale"):
        rate_distortion(scaled, channel.guide, channel.x)
    with pytest.raises(ValueError, match="at least one row"):
        empirical_entropy(torch.zeros(0, 3))


@pytest.mark.parametrize("rows", [[[0.0], [1.0], [1.0], [2.0]], [[1.0, 0.0]] * 5])
def test_empirical_entropy_is_scipys(rows):
    x = torch.tensor(rows)
    counts = np.unique(x.numpy(), axis=0, return_counts=True)[1]
    assert empirical_entropy(x) == pytest.approx(scipy.stats.entropy(counts), abs=1e-12)


# --- information ---------------------------------------------------------------------------------------------------


def test_the_information_of_a_finite_channel_is_its_exact_sum():
    channel = Finite(counts=(70, 10, 40, 20, 100))
    channel.log_d = optimal_decoder(channel.log_p, channel.log_e)
    channel.log_m = optimal_marginal(channel.log_p, channel.log_e)
    entropy, _, rate, exact = (float(t) for t in channel.terms())
    bounds = information_bounds(channel.model, channel.guide, channel.x, num_samples=20, seed=0)
    terms = rate_distortion(channel.model, channel.guide, channel.x, num_samples=200, seed=0)
    found, error = bounds.empirical.value, bounds.empirical.standard_error
    assert abs(found - exact) < PASS * error
    assert bounds.mean_kl == pytest.approx(rate, abs=1e-12)
    lower, upper = terms.sandwich(entropy)
    assert abs(lower - exact) < PASS * terms.distortion.standard_error
    assert upper == pytest.approx(exact, abs=1e-12)
    # Twins: a rate that is a fifth too small is below the information, an entropy so much too large above it.
    assert found > 0.8 * upper + DETECT * error
    assert lower + 0.2 * exact > found + DETECT * error


def test_for_gaussian_guides_it_is_the_mutual_information():
    model, guide, _ = gaussian_pair()
    x = data_for(model, 300)
    guide.V.data.mul_(0.3)
    reference = mutual_information(model, guide, x, num_samples=8, seed=0)
    found = information_bounds(model, guide, x, num_samples=8, chunk=77, seed=1)
    error = math.hypot(found.empirical.standard_error, reference.empirical.standard_error)
    assert abs(found.empirical.value - reference.empirical.value) < PASS * error
    assert found.bias_bound == pytest.approx(reference.bias_bound, rel=0.1)
    assert found.mean_kl == pytest.approx(reference.mean_kl, abs=1e-10)


def test_information_refuses_plates_inside_the_data():
    def program(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("inner", 2, dim=-2):
            pyro.sample("z", dist.Normal(x, 1.0))

    def model(x):
        program(0 * x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="expected a pair with the data plate alone, got plates 2 dimensions deep"):
        information_bounds(model, program, torch.randn(4))


@functools.cache
def binary_pairs():
    """Bernoulli VAEs on 40 different rows of bits, each taken up to three times, at several betas."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.rand(40, 12, generator=generator) < 0.4).double()
    x = rows.repeat_interleave(torch.arange(40) % 3 + 1, 0)
    pairs = {}
    with torch.random.fork_rng(devices=[]):
        for beta in (0.05, 0.3, 1.0, 3.0):
            torch.manual_seed(0)
            model = WrappedDecoder(
                mlp(2, 12, (32,)).double(), lambda logits: dist.Bernoulli(logits=logits).to_event(1), 12, 2
            )
            guide = MeanField(12, 2, hidden=(32,)).double()
            adam = functools.partial(torch.optim.Adam, lr=1e-2)
            fit(model, guide, x, steps=250, objective=BetaELBO(beta), optimizer=adam, seed=0, progress=False)
            pairs[beta] = model, guide
    return x, pairs


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0, 3.0])
def test_on_data_of_known_entropy_every_point_keeps_the_inequalities(beta):
    x, pairs = binary_pairs()
    found = rate_distortion(*pairs[beta], x, num_samples=200, chunk=50, seed=0)
    bounds = information_bounds(*pairs[beta], x, num_samples=20, seed=0)
    entropy = empirical_entropy(x)
    assert entropy == pytest.approx(scipy.stats.entropy(np.unique(x.numpy(), axis=0, return_counts=True)[1]))
    error = found.total.standard_error + bounds.empirical.standard_error
    assert found.distortion.value > 0
    assert found.total.value >= entropy - PASS * error
    lower, upper = found.sandwich(entropy)
    assert lower - PASS * error <= bounds.empirical.value <= upper + PASS * error
    tighter = tightest(bounds, found, entropy)
    assert lower <= tighter[0] <= tighter[1] <= upper


def test_an_ignored_code_reaches_the_entropy():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(torch.tensor(0.5).to(x)).expand([3]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2).to(x), 1.0).to_event(1))

    x = torch.tensor([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=torch.float64)
    found = rate_distortion(model, guide, x)
    assert found.total.value == pytest.approx(empirical_entropy(x), abs=1e-12)
    assert found.rate.value == 0
    assert phase(found.rate.value, found.distortion.value, empirical_entropy(x)) == AUTO_DECODING


# --- the closed form of the linear Gaussian case -------------------------------------------------------------------


@functools.cache
def digits_spectrum():
    return spectrum(digits(transform=Scaled(16.0), test_size=0).train).eigenvalues


@pytest.mark.parametrize(
    ("beta", "rate", "distortion"),
    [(0.5, 12.325, -22.266), (1, 8.859, -19.766), (2, 5.393, -14.766), (5, 1.650, -3.195), (20, 0.0, 9.881)],
)
def test_a5_water_filling_on_digits(beta, rate, distortion):
    point = water_filling(digits_spectrum(), 0.05, 10, beta=beta)
    assert point.rate == pytest.approx(rate, abs=1e-3)
    assert point.distortion == pytest.approx(distortion, abs=1e-3)


def test_water_filling_is_truncated_at_the_number_of_latents():
    rates = [water_filling(digits_spectrum(), 0.05, 64, beta=beta).rate for beta in (0.5, 1, 2)]
    assert rates == pytest.approx([18.50, 10.65, 5.48], abs=5e-3)


def test_water_filling_is_the_minimum_over_component_variances():
    """Component by component, SciPy minimises D + beta R over the gain and the noise of a scalar linear code."""
    lam, var, beta, K = torch.tensor([3.0, 1.0, 0.4, 0.2], dtype=torch.float64), 0.3, 1.7, 3

    def cost(theta, s):
        w, v, log_d = theta
        rate = 0.5 * (math.exp(log_d) - log_d + v * v * s - 1)
        return 0.5 * (w * w * math.exp(log_d) + (1 - w * v) ** 2 * s) / var + beta * rate

    best = sum(scipy.optimize.minimize(cost, [1, 0.5, -1], (s,), tol=1e-12).fun for s in lam[:K].tolist())
    best += 0.5 * float(lam[K:].sum()) / var + 2 * math.log(2 * math.pi * var)
    point = water_filling(lam, var, K, beta=beta)
    assert point.distortion + beta * point.rate == pytest.approx(best, abs=1e-8)


@pytest.mark.parametrize("latent_dim", [1, 3, 10, 64])
@pytest.mark.parametrize("beta", [0.01, 0.5, 2.0, 10.0])
def test_the_point_at_a_rate_is_the_one_with_that_rate(latent_dim, beta):
    point = water_filling(digits_spectrum(), 0.05, latent_dim, beta=beta)
    found = water_filling_at_rate(digits_spectrum().flip(0), 0.05, latent_dim, rate=point.rate)
    assert found == pytest.approx(point, rel=1e-9)


def test_beta_is_minus_the_slope_of_the_curve():
    for rate in (0.5, 4.0, 9.0):
        low, mid, high = (water_filling_at_rate(digits_spectrum(), 0.05, 10, rate=rate + h) for h in (-1e-4, 0, 1e-4))
        assert (low.distortion - high.distortion) / 2e-4 == pytest.approx(mid.beta, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 2), 1.0, 1), "expected eigenvalues"),
        ((torch.tensor([1.0, -1.0]), 1.0, 1), "expected eigenvalues"),
        ((torch.ones(3), 0.0, 1), "positive finite sigma"),
        ((torch.ones(3), 1.0, 4), "latent_dim up to D = 3, got 4"),
    ],
)
def test_water_filling_refuses_what_has_no_curve(arguments, message):
    with pytest.raises(ValueError, match=message):
        water_filling(*arguments)
    with pytest.raises(ValueError, match=message):
        water_filling_at_rate(*arguments, rate=1.0)
    for bad in (0.0, math.nan):
        with pytest.raises(ValueError, match="positive finite"):
            water_filling(torch.ones(3), 1.0, 1, beta=bad)
        with pytest.raises(ValueError, match="positive finite"):
            water_filling_at_rate(torch.ones(3), 1.0, 1, rate=bad)
    with pytest.raises(TypeError, match="eigenvalues as a tensor"):
        water_filling([1.0], 1.0, 1)
    with pytest.raises(ValueError, match="all zero"):
        water_filling_at_rate(torch.zeros(3), 1.0, 2, rate=1.0)


def linear_pair(x, latent_dim=10, var=0.05):
    model = LinearVAE(x.shape[1], latent_dim, sigma=math.sqrt(var), learn_sigma=False).double()
    with torch.no_grad():
        model.mu.copy_(x.mean(0))
    return model, Linear(x.shape[1], latent_dim).double().standardise_by(x)


def test_the_analytic_objectives_are_their_terms():
    model, guide, _ = gaussian_pair()
    x = data_for(model)
    terms = rate_distortion(model, guide, x)
    beta = AnalyticBetaELBO(0.3).per_datum(model, guide, x)
    assert (beta + terms.distortions.value + 0.3 * terms.rates.value).abs().max() < 1e-10
    target = AnalyticTargetRate(2.0, weight=5.0).per_datum(model, guide, x)
    penalty = 5 * abs(2 - terms.rate.value)
    assert (target + terms.distortions.value + penalty).abs().max() < 1e-10
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="expected beta to be a finite number"):
            AnalyticBetaELBO(bad)
        with pytest.raises(ValueError, match="expected target to be a finite number"):
            AnalyticTargetRate(bad)
        with pytest.raises(ValueError, match="expected weight to be a finite number"):
            AnalyticTargetRate(1.0, weight=bad)


def test_a_linear_vae_trains_to_the_closed_form():
    torch.manual_seed(0)
    x = digits(transform=Scaled(16.0), test_size=0).train
    model, guide = linear_pair(x)
    lbfgs = functools.partial(LBFGS, max_iter=150, history_size=50, line_search_fn="strong_wolfe")
    fit(model, guide, x, steps=1, objective=AnalyticBetaELBO(2.0), optimizer=lbfgs, progress=False)
    found, truth = rate_distortion(model, guide, x), water_filling(digits_spectrum(), 0.05, 10, beta=2.0)
    assert found.rate.value == pytest.approx(truth.rate, abs=0.02)
    assert found.distortion.value == pytest.approx(truth.distortion, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "weight", "rate", "tolerance"),
    [(4.0, 5.0, 4.0, 0.02), (12.0, 1.0, 12.0, 0.02), (4.0, 1.0, 8.87, 0.05)],
)
def test_a6_the_target_rate_is_met_where_the_weight_exceeds_the_slope(target, weight, rate, tolerance):
    torch.manual_seed(0)
    # The terms depend on mean and covariance alone: these 2 D points have those of the 1797 digits.
    _, lam, axes = spectrum(digits(transform=Scaled(16.0), test_size=0).train)
    x = torch.cat([axes.mT, -axes.mT]) * (64 * lam).sqrt().repeat(2)[:, None]
    assert (spectrum(x).eigenvalues - lam).abs().max() < 1e-12
    model, guide = linear_pair(x)
    steps = 4000
    fit(
        model,
        guide,
        x,
        steps=steps,
        objective=AnalyticTargetRate(target, weight=weight),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.001 ** (1 / steps)),
        progress=False,
    )
    found = rate_distortion(model, guide, x)
    assert found.rate.value == pytest.approx(rate, abs=tolerance)
    if weight == 5.0:
        assert found.distortion.value == pytest.approx(-11.552, abs=0.05)


# --- curves --------------------------------------------------------------------------------------------------------


def measurement(rates, distortions):
    rates, distortions = (torch.as_tensor(t, dtype=torch.float64) for t in (rates, distortions))
    zero = torch.zeros_like(rates)
    terms = (Estimate(t, zero) for t in (rates, distortions, rates + distortions))
    return RateDistortion(**dict(zip(("rates", "distortions", "totals"), terms, strict=True)), level=0.95)


def test_the_band_of_one_run_is_the_standard_error_over_data():
    random = np.random.default_rng(0)
    rates, distortions = random.normal(3, 1, 400), random.normal(-5, 2, 400)
    num = 2000
    point = curve_point(1.0, [measurement(rates, distortions)], num_bootstrap=num)
    for found, values in ((point.rate, rates), (point.distortion, distortions), (point.total, rates + distortions)):
        error = values.std() / math.sqrt(len(values))
        assert found.value == pytest.approx(values.mean(), abs=1e-12)
        # The bootstrap's own error: 1 / sqrt(2 B) of a standard deviation, about 3.3 s / sqrt(B) of a 2.5% point.
        assert found.standard_error == pytest.approx(error, rel=PASS / math.sqrt(2 * num))
        for end, sign in ((found.lower, -1), (found.upper, 1)):
            assert end == pytest.approx(values.mean() + sign * 1.96 * error, abs=PASS * 3.3 * error / math.sqrt(num))


def test_the_band_of_several_runs_holds_the_spread_between_them():
    offsets = np.linspace(-1, 1, 6)
    runs = [measurement(np.full(50, 4 + o), np.full(50, 7 - o)) for o in offsets]
    num = 2000
    point = curve_point(1.0, runs, num_bootstrap=num)
    assert point.rate.value == pytest.approx(4, abs=1e-12)
    assert point.rate.standard_error == pytest.approx(offsets.std() / math.sqrt(6), rel=PASS / math.sqrt(2 * num))
    assert point.total.standard_error < 1e-12  # what the runs trade, their sum does not show
    assert curve_point(1.0, runs[:1]).rate.standard_error < 1e-12


def test_curve_points_need_runs_on_one_data_set():
    for runs in ([], [measurement([1.0], [2.0]), measurement([1.0, 2.0], [2.0, 1.0])]):
        with pytest.raises(ValueError, match="expected runs on the same data"):
            curve_point(1.0, runs)


def test_a_curve_trains_every_parameter_and_seed():
    x = Finite().x
    calls = []

    def train(parameter, seed):
        calls.append((parameter, seed))
        channel = Finite(seed=seed)
        channel.log_e = channel.log_e / parameter
        return channel.model, channel.guide

    points = rate_distortion_curve(train, [0.5, 2.0], x, seeds=(0, 1), num_samples=4, progress=False)
    assert calls == [(0.5, 0), (0.5, 1), (2.0, 0), (2.0, 1)]
    assert [p.parameter for p in points] == [0.5, 2.0]
    assert [len(p.runs) for p in points] == [2, 2]
    for point in points:
        assert point.rate.value == pytest.approx(np.mean([r.rate.value for r in point.runs]), abs=1e-12)


def test_a_curve_has_one_bar_or_none(monkeypatch, capsys):
    in_chunks = functools.partial(rate_distortion, chunk=5)  # which has a bar by itself
    monkeypatch.setattr("inference.information.curve.rate_distortion", in_chunks)
    pair = Finite().model, Finite().guide
    for progress in (True, False):
        rate_distortion_curve(lambda *_: pair, [1.0], Finite().x, progress=progress)
        shown = capsys.readouterr().err
        assert ("rate-distortion curve: 100%" in shown) == progress
        assert "rate, distortion" not in shown


@pytest.mark.parametrize("seed", range(10))
def test_the_hull_is_the_lower_left_part_of_scipys(seed):
    points = np.random.default_rng(seed).normal(size=(30, 2))
    hull = lower_hull(*points.T.tolist())
    expected = {i for i in range(30) if any_beta_prefers(points, i)}
    assert set(hull) == expected
    assert hull == sorted(hull, key=lambda i: points[i, 0])
    assert set(hull) <= set(scipy.spatial.ConvexHull(points).vertices.tolist())


def any_beta_prefers(points, i):
    """Whether some beta > 0 makes point i the minimum of D + beta R, by the bounds that the others put on beta."""
    low, high = 0.0, math.inf
    for rate, distortion in np.delete(points, i, 0) - points[i]:
        if rate > 0:
            low = max(low, -distortion / rate)
        else:
            high = min(high, distortion / -rate)
    return low < high


@pytest.mark.parametrize("bad", [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0])])
def test_a_hull_needs_finite_points(bad):
    with pytest.raises(ValueError, match="expected finite points"):
        lower_hull(*bad)


@pytest.mark.parametrize(
    ("rate", "distortion", "name"),
    [
        (0.0004, 80.6, AUTO_DECODING),
        (0.2, 80.4, AUTO_DECODING),
        (1.3, 79.7, SEMANTIC),
        (6.2, 74.1, SEMANTIC),
        (10.5, 71.6, SEMANTIC),
        (24.0, 59.3, SYNTACTIC),
        (27.1, 60.0, SYNTACTIC),
        (120.3, 8.1, SYNTACTIC),
        (156.0, 4.8, AUTO_ENCODING),
    ],
)
def test_phases_of_the_papers_models(rate, distortion, name):
    assert phase(rate, distortion, 80.2) == name


def test_continuous_data_have_no_phases():
    with pytest.raises(ValueError, match="positive entropy of discrete data"):
        phase(1.0, -3.0, -2.0)


def test_the_figure_holds_the_points_the_hull_and_the_diagonal():
    random = np.random.default_rng(0)
    means = [(0.1, 5.0), (2.0, 3.5), (2.5, 3.4), (4.0, 2.0)]
    points = [
        curve_point(i, [measurement(random.normal(r, 1, 50), random.normal(d, 1, 50))], num_bootstrap=50)
        for i, (r, d) in enumerate(means)
    ]
    figure = rate_distortion_figure({"family": points}, entropy=4.0, truth=([0, 3], [4, 1]))
    (ax,) = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    assert lines["$D = H - R$"].tolist() == [[0, 4], [4, 0]]
    assert lines["closed form"].tolist() == [[0, 4], [3, 1]]
    (bars,) = ax.containers
    centres = np.array([[p.rate.value, p.distortion.value] for p in points])
    assert bars.lines[0].get_xydata() == pytest.approx(centres)
    ends = bars.lines[2][0].get_segments()  # the bars along the rate
    for end, point in zip(ends, points, strict=True):
        assert end[:, 0] == pytest.approx([point.rate.lower, point.rate.upper])
    hull = ax.lines[-1].get_xydata()
    assert hull == pytest.approx(centres[lower_hull(*centres.T.tolist())])
    with pytest.raises(ValueError, match="at least one point"):
        rate_distortion_figure({"none": []})


# --- powerful and simple decoders on binarised digits --------------------------------------------------------------

BETAS = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 10.0)
SEEDS = (0, 1, 2)


@functools.cache
def deep_run(family, beta, seed):
    """Rate and distortion on the training data, over 30 draws per data point."""
    x = (digits(dtype=torch.float32).train >= 8).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(64, 8, hidden=(256, 256))
        guide = MeanField(64, 8, hidden=(256, 256))
        steps = 200 * math.ceil(len(x) / 100)
        fit(
            model,
            guide,
            x,
            steps=steps,
            objective=BetaELBO(beta),
            optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
            scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, 2 * (1 - s / steps))),
            batch_size=100,
            seed=seed,
            progress=False,
        )
    return rate_distortion(model, guide, x, num_samples=30, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a8_a_powerful_decoder_ignores_its_code_and_beta_restores_it(seed):
    simple, powerful = deep_run(VAE, 2.0, seed), deep_run(AutoregressiveVAE, 2.0, seed)
    assert powerful.rate.value < 0.1
    assert simple.rate.value > 2.5
    assert powerful.total.value < simple.total.value - 1.5
    assert deep_run(AutoregressiveVAE, 0.3, seed).rate.value > 12
    assert deep_run(VAE, 10.0, seed).distortion.value == pytest.approx(25.13, abs=0.1)  # independent pixels


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a9_one_elbo_goes_with_different_rates(seed):
    one, two = deep_run(AutoregressiveVAE, 1.0, seed), deep_run(AutoregressiveVAE, 2.0, seed)
    assert abs(one.total.value - two.total.value) < 0.5
    assert one.rate.value - two.rate.value > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("family", "best"), [(VAE, 16.0), (AutoregressiveVAE, 15.6)])
def test_a7_curve_is_monotone_above_entropy_and_lowest_at_beta_one(family, best, seed):
    runs = {beta: deep_run(family, beta, seed) for beta in BETAS}
    rates, distortions, totals = (
        np.array([getattr(run, term).value for run in runs.values()]) for term in ("rate", "distortion", "total")
    )
    assert np.diff(rates).max() < 0.3
    assert np.diff(distortions).min() > -0.3
    assert totals.min() >= 7.23
    assert runs[1.0].total.value == pytest.approx(best, abs=0.4)
    assert runs[1.0].total.value < totals.min() + 0.3
