"""Annealed importance sampling and bounds from both sides, against models whose evidence is known."""

import itertools
import math
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch.distributions import MultivariateNormal

import inference.posterior.hmc
import zoo
from guides import Exact, HMCRefined, MeanField
from inference import (
    AnalyticKLELBO,
    Annealed,
    LogJoint,
    bdmc,
    converged_bracket,
    evidence,
    fit,
    posterior_draws,
    simulated_draws,
)
from inference.distributions.batched_gaussian import Gaussian
from inference.marginal_likelihood.annealing.bidirectional import _Moments
from inference.marginal_likelihood.annealing.chains import Annealer, _spread, schedule_of
from inference.marginal_likelihood.base.result import ASYMPTOTIC, PROBABILISTIC
from inference.posterior.hmc import Chains, Transitions, traced, transition, whitened
from inference.posterior.moments import gaussian_of_draws
from zoo import LinearVAE

SIGMAS = [1.0, 1e-1, 1e-2, 1e-3]


def linear_model(sigma=0.5, data_dim=6, latent_dim=3, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LinearVAE(data_dim, latent_dim, sigma=sigma).double().requires_grad_(False)


def data_of(model, num, seed=1):
    return simulated_draws(model, num, seed=seed).x


def scipy_evidence(model, x):
    w, sigma = model.linear_gaussian.W.numpy(), float(model.linear_gaussian.sigma)
    return scipy.stats.multivariate_normal(
        model.linear_gaussian.mu.numpy(), w @ w.T + sigma**2 * np.eye(len(w))
    ).logpdf(x.numpy())


def within(values, expected, errors=4.0):
    """Whether the means over the first dimension are the expected ones, by their standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    return bool(((values.mean(0) - expected).abs() <= errors * error).all())


def always(before, after):
    return torch.ones_like(before - after)


# --- the kernel ------------------------------------------------------------------------------------

PRECISION = torch.tensor([[2.0, 0.8, 0.0], [0.8, 1.5, -0.5], [0.0, -0.5, 4.0]], dtype=torch.float64)
CENTRE = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)


def gaussian_target(v):
    residual = v - CENTRE
    gradient = -residual @ PRECISION
    return 0.5 * (residual * gradient).sum(-1), gradient


def tempered(beta):
    """The distribution that the kernel leaves invariant at an inverse temperature."""
    precision = beta * PRECISION + (1 - beta) * torch.eye(3, dtype=torch.float64)
    return MultivariateNormal(torch.linalg.solve(precision, beta * PRECISION @ CENTRE), precision_matrix=precision)


def run_kernel(beta, num_steps, step=0.9):
    torch.manual_seed(0)
    v = tempered(beta).sample((20_000, 1))
    chains = Chains(v, *gaussian_target(v))
    acceptance = []
    for _ in range(num_steps):
        scale = step(chains.v) if callable(step) else torch.full((1,), step, dtype=torch.float64)
        chains, accepted = transition(gaussian_target, chains, torch.tensor([beta]).double(), scale, 3)
        acceptance.append(float(accepted.mean()))
    return v[:, 0], chains, acceptance


def is_invariant(beta, **options):
    _, chains, _ = run_kernel(beta, 15, **options)
    distribution = tempered(beta)
    white = torch.linalg.solve_triangular(
        distribution.scale_tril, (chains.v[:, 0] - distribution.mean).mT, upper=False
    ).mT
    products = white.unsqueeze(-1) * white.unsqueeze(-2)
    return within(white, 0.0) and within(products.flatten(1), torch.eye(3).double().flatten())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_kernel_leaves_its_gaussian_invariant(beta):
    assert is_invariant(beta)
    _, chains, acceptance = run_kernel(beta, 3)
    assert 0.3 < np.mean(acceptance) < 0.97  # there is something to reject
    value, gradient = gaussian_target(chains.v)
    torch.testing.assert_close(chains.value, value)
    torch.testing.assert_close(chains.gradient, gradient)


def test_a_kernel_that_always_accepts_is_found_out(monkeypatch):
    monkeypatch.setattr(inference.posterior.hmc, "acceptance_probability", always)
    assert not is_invariant(1.0)


def test_a_kernel_whose_step_follows_the_chains_is_found_out():
    assert not is_invariant(1.0, step=lambda v: 1.2 / (1 + (v - CENTRE).square().sum(-1)))


def is_reversible(change):
    """Whether E f(v) g(v') is E g(v) f(v') in equilibrium, for a few f and g."""
    before, chains, _ = run_kernel(1.0, 1)
    after = change(before, chains.v[:, 0])
    pairs = [(lambda v: v[:, 0], lambda v: v[:, 1]), (lambda v: v[:, 0], lambda v: v[:, 2].square())]
    products = [f(before) * g(after) - g(before) * f(after) for f, g in pairs]
    return within(torch.stack(products, -1), 0.0)


def test_the_kernel_is_its_own_reverse():
    assert is_reversible(lambda _, after: after)
    # The twin leaves the distribution invariant, but turns the coordinates round.
    distribution = tempered(1.0)
    turn = distribution.scale_tril @ torch.eye(3).double().roll(1, 0) @ torch.linalg.inv(distribution.scale_tril)
    assert not is_reversible(lambda _, after: distribution.mean + (after - distribution.mean) @ turn.mT)


def test_a_trajectory_that_breaks_down_is_rejected():
    def target(v):
        return torch.full_like(v[..., 0], math.nan), torch.full_like(v, math.nan)

    v = torch.randn(4, 2, 3)
    start = Chains(v, torch.zeros(4, 2), torch.zeros(4, 2, 3))
    moved, acceptance = transition(target, start, torch.ones(2), torch.ones(2), 2)
    assert torch.equal(moved.v, v)
    assert not acceptance.any()


# --- the target ------------------------------------------------------------------------------------


def test_the_whitened_target_is_the_gaussian_joint_with_its_gradient():
    model = linear_model()
    x = data_of(model, 4)
    posterior = model.posterior(x)
    start = Gaussian(torch.randn(4, 3).double(), torch.randn(4, 3, 3).double().tril() + 3 * torch.eye(3).double())
    target = whitened(LogJoint(model, x), start, 5)
    assert target.__qualname__.startswith("_guarded")  # a replay
    v = torch.randn(5, 4, 3).double()
    value, gradient = target(v)
    u = start.loc + (start.factor @ v.unsqueeze(-1)).squeeze(-1)
    expected = posterior.log_prob(u) + torch.from_numpy(scipy_evidence(model, x)) + start.factor.logdet()
    torch.testing.assert_close(value, expected)
    score = -(posterior.precision_matrix @ (u - posterior.loc).unsqueeze(-1))
    torch.testing.assert_close(gradient, (start.factor.mT @ score).squeeze(-1))
    torch.testing.assert_close(start.whiten(start.colour(v)), v)


def test_what_depends_on_the_values_goes_its_own_way():
    calls = []

    def branches(v):
        calls.append(1)
        return (v.sum(-1), v) if bool(v.mean() < 5) else (v.prod(-1), v)

    def scaled(v):
        return v.sum(-1) * float(v.mean()), v

    v = torch.ones(2, 3, 4)
    replayed, before = traced(branches, [v], [-0.5 * v]), len(calls)
    torch.testing.assert_close(replayed(2 * v), ((2 * v).sum(-1), 2 * v))
    assert len(calls) == before  # without Python
    torch.testing.assert_close(replayed(9 * v), ((9 * v).prod(-1), 9 * v))
    assert len(calls) == before + 1
    assert traced(scaled, [v], [-0.5 * v]) is scaled  # a number is read from a tensor


def test_noise_is_drawn_as_the_function_draws_it():
    def noisy(v):
        scale = 2.0 if bool(v.mean() < 5) else 3.0
        torch.rand(2)  # which nothing uses
        return (v + scale * torch.randn_like(v),)

    v = torch.ones(2, 3)
    torch.manual_seed(0)
    replayed = traced(noisy, [v], [2 * v])
    for at in (v, 3 * v, 9 * v, 3 * v):
        state = torch.get_rng_state()
        (got,) = replayed(at)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert torch.equal(got, noisy(at)[0])
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("limit", [None, 2.5])
def test_replayed_transitions_are_those_of_python(limit):
    """With a branch that depends on the values, and without."""
    calls = []

    def target(v):
        calls.append(1)
        sign = -1.0 if limit is not None and bool(v.max() > limit) else -0.5
        return sign * v.square().sum(-1), 2 * sign * v

    torch.manual_seed(0)
    v = torch.randn(5, 4, 3)
    first = Chains(v, *target(v))
    move, step = Transitions(target, 2), torch.full((4,), 0.3)
    found = []
    for take in (move, lambda *inputs: transition(target, *inputs, 2)):
        torch.manual_seed(1)
        chains, number = first, len(calls)
        for i in range(1, 121):
            chains, acceptance = take(chains, torch.full((4,), i / 120), step)
            found.append([*chains, acceptance])
        found.append(len(calls) - number)
    by_replay, by_python = found[:120], found[121:241]
    assert all(map(torch.equal, itertools.chain(*by_replay), itertools.chain(*by_python)))
    assert found[120] < found[241]  # fewer calls of Python


def test_the_start_has_the_moments_of_the_guides_draws_widened():
    model = linear_model()
    x = data_of(model, 30)
    posterior = model.posterior(x)
    torch.manual_seed(0)
    start = gaussian_of_draws(LogJoint(model, x), Exact(model), 1.2)
    num = 1000  # at least; each mean has the posterior's covariance over this, each variance 2 / num, relatively
    white = torch.linalg.solve_triangular(posterior.scale_tril, (start.loc - posterior.loc).unsqueeze(-1), upper=False)
    assert float(white.abs().max()) < 4.5 / math.sqrt(num)
    inverse = torch.linalg.inv(1.2 * posterior.scale_tril) @ start.factor
    assert float((inverse @ inverse.mT - torch.eye(3)).abs().max()) < 4.5 * math.sqrt(2 / num)


def test_a_guide_that_has_samples_only_will_do():
    model = linear_model()
    x = data_of(model, 5)
    guide = HMCRefined(model, MeanField(6, 3, hidden=(8,)).double())
    got = evidence(model, x, method=Annealed(50), guide=guide, seed=0, progress=False)
    assert bool((np.abs(got.value.numpy() - scipy_evidence(model, x)) <= 4 * got.standard_error.numpy()).all())
    assert float(got.standard_error.max()) < 0.5


def test_the_start_without_a_guide_is_the_priors():
    model = linear_model()
    start = gaussian_of_draws(LogJoint(model, data_of(model, 30)), None, 1.0)
    assert float(start.loc.abs().max()) < 4.5 / math.sqrt(1000)
    assert float((start.factor @ start.factor.mT - torch.eye(3)).abs().max()) < 4.5 * math.sqrt(2 / 1000)


def test_the_spread_is_the_standard_deviation_of_what_is_finite():
    log_ratio = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double()
    log_ratio[2, 1], log_ratio[3:5, 2] = -math.inf, math.inf
    expected = [np.std(column[np.isfinite(column)], ddof=1) for column in log_ratio.mT.numpy()]
    np.testing.assert_allclose(_spread(log_ratio).numpy(), expected, rtol=1e-12)


def test_temperatures_are_spaced_by_the_spread():
    torch.manual_seed(0)
    betas = torch.cat([torch.zeros(1, 3), torch.rand(20, 3).double().cumsum(0)])
    betas = betas / betas[-1]
    spreads = torch.cat([torch.zeros(1, 3), torch.rand(20, 3)]).double()
    steps = torch.rand(21, 3).double() + 0.1
    got = schedule_of(betas, steps, spreads, 50)
    for n in range(3):
        length = spreads[:, n].cumsum(0)
        length = (0.8 * length / length[-1] + 0.2 * betas[:, n]).numpy()
        at = np.linspace(0, 1, 51)
        np.testing.assert_allclose(got.betas[:, n].numpy(), np.interp(at, length, betas[:, n].numpy()), atol=1e-12)
        log_steps = np.interp(at, length, steps[:, n].log().numpy())
        np.testing.assert_allclose(got.steps[:, n].log().numpy(), log_steps, atol=1e-12)


# --- unbiasedness ----------------------------------------------------------------------------------


class FollowsItsChains(Annealer):
    """The defect: within the run, the step of each chain is fitted to where it is."""

    def transition(self, chains, beta, step):
        return super().transition(chains, beta, 3 * step / (1 + chains.v.square().sum(-1)))


class AlwaysAccepts(Annealer):
    """The defect: no proposal is rejected."""

    def transition(self, chains, beta, step):
        with mock.patch.object(inference.posterior.hmc, "acceptance_probability", always):
            return super().transition(chains, beta, step)


def ratios(make=Annealer, *, num_chains=10_000, from_posterior=True):
    """Weights over the evidence, forwards (S, N), and backwards inverse weights times it.

    The Gaussian is a little off, so that both kinds of weights have a variance, and steps are so long that much is
    rejected.
    """
    model = linear_model(sigma=0.3, data_dim=4, latent_dim=2)
    x = data_of(model, 5)
    truth = torch.from_numpy(scipy_evidence(model, x))
    posterior = model.posterior(x)
    start = Gaussian(posterior.loc + 0.8 * posterior.scale_tril.sum(-1), 1.2 * posterior.scale_tril)
    torch.manual_seed(0)
    with torch.no_grad():
        tuned = Annealer(LogJoint(model, x), start, 2)
        tuned.tune(5)
        annealer = make(tuned.log_joint, start, 2)
        annealer.schedule = tuned.schedule._replace(steps=1.3 * tuned.schedule.steps)
        _, log_w = annealer.forward(num_chains)
        exact = start.whiten(posterior.sample((num_chains,)))
        log_inverse = annealer.backward(exact if from_posterior else annealer.draw(num_chains))
    return (log_w - truth).exp(), (log_inverse + truth).exp()


def test_the_mean_weight_is_unbiased_both_ways():
    forward, backward = ratios()
    for weights in (forward, backward):
        assert within(weights, 1.0)
        assert 0.1 < float(weights.std(0).max()) < 2  # else the test could not fail


def test_wrong_acceptance_is_biased():
    forward, backward = ratios(AlwaysAccepts)
    assert not within(forward, 1.0)
    # Its weights have no variance; cut off at a hundred their means would be one at most.
    cut = backward.clamp(max=100.0)
    assert bool((cut.mean(0) - 1 > 4 * cut.std(0) / math.sqrt(len(cut))).all())


def test_adapting_within_the_run_is_biased():
    forward, backward = ratios(FollowsItsChains)
    assert not within(forward, 1.0)
    assert not within(backward, 1.0)


def test_walking_back_from_anything_but_the_posterior_is_biased():
    _, backward = ratios(from_posterior=False)
    assert not within(backward, 1.0)


# --- evidence --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SIGMAS)
def bracket(request):
    model = linear_model(sigma=request.param, data_dim=8, latent_dim=3)
    found = bdmc(model, 100, method=Annealed(100), seed=0, progress=False)
    return found.evidence, scipy_evidence(model, found.draws.x)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_markovs_lower_bound_holds_as_often_as_it_says(bracket, level):
    got, truth = bracket
    above = int((got.raw_lower.numpy() - math.log(1 / (1 - level)) > truth).sum())
    assert above <= scipy.stats.binom.ppf(0.999, len(truth), 1 - level)


def test_the_bracket_contains_the_truth(bracket):
    got, truth = bracket
    assert got.guarantee == (PROBABILISTIC,) * len(truth)
    price = math.log(2 / 0.05)
    np.testing.assert_allclose(got.lower, got.raw_lower - price)
    np.testing.assert_allclose(got.upper, got.raw_upper + price)
    inside = int(((got.lower.numpy() <= truth) & (truth <= got.upper.numpy())).sum())
    assert inside >= scipy.stats.binom.ppf(0.001, len(truth), 0.95)
    mean = got.mean
    assert mean.lower <= truth.mean() <= mean.upper
    assert mean.upper - mean.lower == pytest.approx(float((got.raw_upper - got.raw_lower).mean()) + 2 * price / 100)
    # In expectation the raw ends lie on their sides.
    for end, sign in ((got.raw_lower, 1), (got.raw_upper, -1)):
        above = sign * (end.numpy() - truth)
        assert above.mean() <= 4 * above.std() / 10


def test_a_sum_in_place_of_the_mean_breaks_markovs_bound():
    model = linear_model(data_dim=8, latent_dim=3)
    x = data_of(model, 100)
    got = evidence(model, x, method=Annealed(50, num_chains=100), guide=Exact(model), seed=0, progress=False)
    truth = scipy_evidence(model, x)
    above = (got.raw_lower.numpy() + math.log(100) - math.log(1 / 0.05) > truth).sum()
    assert scipy.stats.binom.sf(above - 1, 100, 0.05) < 1e-6


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "agree"), (-0.3, "give no two")])
def test_two_sides_need_two_lengths_that_agree(shift, verdict, monkeypatch):
    model = linear_model()
    x = data_of(model, 3)
    noise = torch.linspace(-0.2, 0.2, 400).double().unsqueeze(1).expand(400, 3)  # bounded: a variance for certain
    answers = iter([noise, noise + shift])
    monkeypatch.setattr(Annealer, "log_weights", lambda *_: iter([next(answers)]))
    got = evidence(model, x, method=Annealed(40, num_chains=400), guide=Exact(model), seed=0, progress=False)
    assert got.upper.isfinite().tolist() == [shift == 0] * 3
    assert got.guarantee == (PROBABILISTIC if shift else ASYMPTOTIC,) * 3
    assert all(note.startswith(f"chains of full and of a quarter of the length {verdict}") for note in got.notes)


SCHOOLS = torch.tensor([[28.0, 8, -3, 7, -1, 1, 18, 12]]).double()
SCHOOL_ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]).double()


def eight_schools(x):
    """Effects of schools, mu and tau in centred coordinates: a funnel, at whose neck chains stop short."""
    with pyro.plate("data", len(x)):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(x.new_tensor(5.0)))
        effects = dist.Normal(mu.unsqueeze(-1).expand(*mu.shape, 8), tau.unsqueeze(-1))
        pyro.sample("x", dist.Normal(pyro.sample("effects", effects.to_event(1)), SCHOOL_ERRORS).to_event(1), obs=x)


def eight_schools_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("mu", dist.Normal(x.new_tensor(4.0), 3.0))
        pyro.sample("tau", dist.LogNormal(x.new_tensor(1.0), 1.0))
        pyro.sample("effects", dist.Normal(x.new_full((len(x), 8), 5.0), 5.0).to_event(1))


def eight_schools_evidence():
    """By the rectangle rule in mu and log tau; the effects have a closed form."""
    log_tau, mu = torch.linspace(-18, 12, 6001).double(), torch.linspace(-40, 40, 801).double().unsqueeze(1)
    tau = log_tau.exp()
    joint = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    for effect, error in zip(SCHOOLS[0], SCHOOL_ERRORS, strict=True):
        joint = joint + dist.Normal(mu, (tau.square() + error.square()).sqrt()).log_prob(effect)
    return float(joint.flatten().logsumexp(0)) + math.log(0.005 * 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_chains_that_stop_short_get_no_upper_end_below_the_truth(seed):
    method = Annealed(1000, num_chains=2000)
    got = evidence(eight_schools, SCHOOLS, method=method, guide=eight_schools_guide, seed=seed, progress=False)
    assert float(got.value) < eight_schools_evidence() - 4 * float(got.standard_error)
    assert float(got.lower) < eight_schools_evidence() < float(got.upper)


def test_the_method_by_name_is_one_sided_and_keeps_the_random_state():
    model = linear_model()
    x = data_of(model, 5)
    state, validation = torch.get_rng_state(), torch.distributions.Distribution._validate_args
    method = Annealed(30)
    a, b = (evidence(model, x, method=method, guide=Exact(model), seed=3, progress=False) for _ in range(2))
    assert torch.equal(a.value, b.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.distributions.Distribution._validate_args == validation
    assert (a.method, a.guarantee, a.num_samples) == ("annealed", (PROBABILISTIC,) * 5, 16)
    torch.testing.assert_close(a.lower, a.value - math.log(20))
    assert bool((a.upper == math.inf).all())
    assert method.refined() == Annealed(120)
    assert (a.value.dtype, a.value.requires_grad) == (torch.float64, False)


def test_a_model_in_float32_in_blocks_gets_its_evidence_in_float64():
    model = linear_model()
    x = data_of(model, 5)
    truth = scipy_evidence(model, x)
    got = evidence(model.float(), x.float(), method=Annealed(50), block=3, seed=0, progress=False)
    assert got.value.dtype == torch.float64
    assert bool((np.abs(got.value.numpy() - truth) <= 4 * got.standard_error.numpy()).all())
    assert float(got.standard_error.max()) < 0.5


def test_evaluations_count_every_gradient(monkeypatch):
    calls = []

    def counted(function, examples, _):
        if len(examples) > 1:  # a transition, of this target
            return function
        return lambda v: (calls.append(len(v)), function(v))[1]

    monkeypatch.setattr(inference.posterior.hmc, "traced", counted)
    model = linear_model()
    got = evidence(model, data_of(model, 2), method=Annealed(10), seed=0, progress=False)
    assert got.evaluations == sum(calls)


def counts(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(3.0, 0.5, validate_args=True))
        pyro.sample("x", dist.Poisson(rate, validate_args=True), obs=x)


def counts_one_by_one(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), x.new_tensor(0.5)))
        assert rate.dim() == 1
        pyro.sample("x", dist.Poisson(rate), obs=x)


@pytest.mark.parametrize(("model", "broadcast"), [(counts, True), (counts_one_by_one, False)])
def test_a_users_model_on_the_half_line_without_a_guide(model, broadcast):
    x = torch.tensor([0.0, 1.0, 5.0, 30.0], dtype=torch.float64)
    got = evidence(model, x, method=Annealed(50, num_chains=8), broadcast=broadcast, seed=0, progress=False)
    truth = scipy.stats.nbinom(3.0, 0.5 / 1.5).logpmf(x.numpy())
    assert bool((np.abs(got.value.numpy() - truth) <= 4 * got.standard_error.numpy()).all())
    assert float(got.standard_error.max()) < 0.5


def test_a_users_model_is_bracketed_on_data_like_its_own():
    like = torch.zeros(50, dtype=torch.float64)
    draws = simulated_draws(counts, like, seed=0)
    assert list(draws.latents) == ["rate"]
    found = bdmc(counts, draws, method=Annealed(100), seed=0, progress=False).evidence
    truth = scipy.stats.nbinom(3.0, 0.5 / 1.5).logpmf(draws.x.numpy())
    assert found.mean.lower <= truth.mean() <= found.mean.upper
    width = found.raw_upper - found.raw_lower
    assert float(width.mean()) <= 0.05 + 4 * float(width.std()) / math.sqrt(50)


def test_a_density_that_breaks_down_is_an_error():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("nothing", dist.Unit(z * math.nan, validate_args=False), obs=x.new_empty(0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(FloatingPointError, match="log weight of data point 0 is NaN"):
        evidence(model, torch.zeros(2), method=Annealed(5), progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Annealed(0), "num_temperatures to be at least 1, got 0"),
        (lambda: Annealed(10, num_chains=0), "num_chains to be at least 1, got 0"),
        (lambda: Annealed(10, widening=0.0), "positive finite widening, got 0"),
        (lambda: bdmc(linear_model(), 3, level=1.0), "level between 0 and 1, got 1"),
        (lambda: bdmc(linear_model(), 0), "number of data points to simulate to be at least 1, got 0"),
        (lambda: converged_bracket(linear_model(), torch.zeros(2, 6).double(), num_steps=3), "at least 4, got 3"),
    ],
)
def test_unfit_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- other bounds ----------------------------------------------------------------------------------


def test_draws_of_a_model_are_of_its_joint():
    model = linear_model()
    draws = simulated_draws(model, 20_000, seed=0)
    z = draws.latents["z"]
    assert within(z, 0.0)
    residual = (draws.x - model.decode(z)) / model.sigma
    assert within(residual, 0.0)
    assert within(residual.square(), 1.0)
    products = residual.unsqueeze(-1) * z.unsqueeze(-2)
    assert within(products.flatten(1), 0.0)


def test_only_a_model_with_a_posterior_has_exact_draws_of_given_data():
    model = zoo.DeepGaussianVAE(5, 2)
    with pytest.raises(TypeError, match=r"expected a model with posterior\(x\), got DeepGaussianVAE"):
        posterior_draws(model, torch.zeros(3, 5))


def test_the_bracket_takes_posterior_draws_of_real_data():
    model = linear_model()
    x = 3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bdmc(
        model, posterior_draws(model, x, seed=0), guide=Exact(model), method=Annealed(50), seed=0, progress=False
    )
    truth = scipy_evidence(model, x)
    assert found.evidence.mean.lower <= truth.mean() <= found.evidence.mean.upper


# --- real data -------------------------------------------------------------------------------------


def test_chains_that_converge_bracket_the_evidence_of_real_data():
    model = linear_model()
    x = 2 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = converged_bracket(model, x, method=Annealed(100), num_steps=200, seed=0, progress=False)
    truth = torch.from_numpy(scipy_evidence(model, x))
    for above in (got.raw_lower - truth, truth - got.upper_if_converged):
        assert float(above.mean()) <= 4 * float(above.std()) / math.sqrt(20)
        assert float(above.mean()) > -0.3
    assert got.assumption == "chains have converged to the posterior"
    assert float(got.r_hat.max()) < 1.2


def test_r_hat_is_that_of_gelman_and_rubin():
    values = np.random.default_rng(0).normal(size=(100, 8, 3, 2))
    values[:, :4, 1] += 5.0  # the chains of data point 1 are in two places
    moments = _Moments()
    for step in torch.from_numpy(values):
        moments.add(step)
    within_chains, between = values.var(0, ddof=1).mean(0), 100 * values.mean(0).var(0, ddof=1)
    expected = np.sqrt((99 / 100 * within_chains + between / 100) / within_chains).max(-1)
    np.testing.assert_allclose(moments.r_hat.numpy(), expected, rtol=1e-10)
    assert (expected > 2).tolist() == [False, True, False]


# --- a trained deep model --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("latent_dim", [8, 16])
def test_the_bracket_of_a_trained_deep_vae_is_narrow(latent_dim):
    x = zoo.digits().train.double()
    torch.manual_seed(0)
    model = zoo.DeepGaussianVAE(64, latent_dim).to(x).standardise_by(x)
    guide = MeanField(64, latent_dim).to(x).standardise_by(x)
    fit(model, guide, x, steps=1500, objective=AnalyticKLELBO(), batch_size=256, seed=0, progress=False)
    got = bdmc(model, 64, guide=guide, seed=0, progress=False).evidence
    width = got.raw_upper - got.raw_lower
    assert float(width.mean()) <= 0.05
    assert float(width.abs().quantile(0.95)) <= 0.5
    assert got.mean.upper - got.mean.lower == pytest.approx(float(width.mean()) + 2 * math.log(40) / 64)
