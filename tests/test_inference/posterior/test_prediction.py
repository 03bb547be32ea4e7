"""Draws from pairs: prior, posterior predictive and reconstruction, against closed-form moments."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from registry import data_for, for_models_with, simulate

from guides import Exact, MeanField, TiedMeanField
from inference import predictive, reconstruct, sample
from zoo import LinearVAE
from zoo.linear.models import LinearGaussianModel

NUM = 20_000
SLOPE, PRIOR_SD, NOISE_SD, GUIDE_SD = 2.0, 1.5, 0.5, 0.3


def moments(draws):
    """Mean and covariance over the first dimension, and the standard errors of both for Gaussian draws."""
    draws = draws.numpy()
    mean, centred = draws.mean(0), draws - draws.mean(0)
    covariance = np.einsum("s...i,s...j->...ij", centred, centred) / len(draws)
    variances = np.diagonal(covariance, axis1=-2, axis2=-1)
    spread = np.sqrt((variances[..., :, None] * variances[..., None, :] + covariance**2) / len(draws))
    return (mean, np.sqrt(variances / len(draws))), (covariance, spread)


def z_scores(estimate, truth):
    return np.abs((estimate[0] - truth) / estimate[1]).max()


def assert_moments(draws, mean, covariance):
    """Within five standard errors in every component."""
    got = moments(draws)
    assert z_scores(got[0], mean) < 5
    assert z_scores(got[1], covariance) < 5


def assert_not_moments(draws, mean, covariance):
    """The twin: one moment is off beyond doubt, also after Bonferroni's correction."""
    got = moments(draws)
    worst = max(z_scores(got[0], mean), z_scores(got[1], covariance))
    assert 2 * scipy.stats.norm.sf(worst) * (np.size(mean) + np.size(covariance)) < 1e-6


def arrays(model):
    distribution = model.linear_gaussian
    return distribution.W.detach().numpy(), distribution.mu.detach().numpy(), float(distribution.sigma.detach()) ** 2


# --- prior -----------------------------------------------------------------------------------------


def products(draws):
    """Components and their products by twos, (n, P): their means are the first two moments of any distribution."""
    return torch.cat([draws, torch.einsum("si,sj->sij", draws, draws).flatten(1)], -1).numpy()


def worst_z_score(draws, reference):
    """The largest difference of first or second moments of two sets of draws, in standard errors of both."""
    a, b = products(draws), products(reference)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    return np.abs((a.mean(0) - b.mean(0)) / error).max()


def test_sample_draws_what_an_ancestral_simulation_does(model):
    draws = sample(model, n=NUM, seed=0)
    assert list(draws) == ["z", "x"]
    assert draws["x"].dtype == torch.float64
    both, (z, x) = torch.cat([draws["z"], draws["x"]], -1), simulate(model, NUM)
    assert worst_z_score(both, torch.cat([z, x], -1)) < 5
    # The twin: data that belong to other latents, found out also after Bonferroni's correction.
    worst = worst_z_score(both, torch.cat([z, x.roll(1, 0)], -1))
    assert 2 * scipy.stats.norm.sf(worst) * products(both).shape[1] < 1e-6


@for_models_with(LinearGaussianModel)
def test_sample_draws_the_joint_distribution(model):
    w, mu, var = arrays(model)
    draws = sample(model, n=NUM, seed=0)
    assert list(draws) == ["z", "x"]
    assert draws["x"].dtype == torch.float64
    k, d = model.latent_dim, model.data_dim
    both = torch.cat([draws["z"], draws["x"]], -1)
    mean = np.concatenate([np.zeros(k), mu])
    covariance = np.block([[np.eye(k), w.T], [w, w @ w.T + var * np.eye(d)]])
    assert_moments(both, mean, covariance)
    assert_not_moments(both, mean, np.block([[np.eye(k), 0 * w.T], [0 * w, w @ w.T + var * np.eye(d)]]))


def test_observations_say_how_many_data_there_are_and_nothing_else():
    model = LinearVAE(5, 2)
    a, b = (sample(model, torch.full((7, 5), value), seed=1) for value in (0.0, 100.0))
    assert a["x"].shape == (7, 5)
    assert torch.equal(a["x"], b["x"])
    assert not a["x"].requires_grad


# --- a hand-written pair of functions --------------------------------------------------------------


def function_model(x=None, n=None):
    with pyro.plate("data", len(x) if n is None else n):
        z = pyro.sample("z", dist.Normal(0.0, PRIOR_SD))
        return pyro.sample("x", dist.Normal(SLOPE * z, NOISE_SD), obs=x)


def function_guide(x=None, n=None):  # noqa: ARG001
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / SLOPE, GUIDE_SD))


def test_sample_of_a_function():
    draws = sample(function_model, n=NUM, seed=0)
    both = torch.stack([draws["z"], draws["x"]], -1)
    var = PRIOR_SD**2
    covariance = np.array([[var, SLOPE * var], [SLOPE * var, SLOPE**2 * var + NOISE_SD**2]])
    assert_moments(both, np.zeros(2), covariance)
    assert_not_moments(both, np.zeros(2), np.diag(np.diag(covariance)))


def test_predictive_of_a_function_pair():
    x = torch.tensor([-3.0, 0.0, 5.0])
    draws = predictive(function_model, function_guide, x, num_samples=NUM, seed=0)
    assert draws["x"].shape == draws["z"].shape == (NUM, 3)
    both = torch.stack([draws["z"], draws["x"]], -1)
    mean = np.stack([x.numpy() / SLOPE, x.numpy()], -1)
    var = GUIDE_SD**2
    covariance = np.array([[var, SLOPE * var], [SLOPE * var, SLOPE**2 * var + NOISE_SD**2]])
    assert_moments(both, mean, covariance)
    # The observed x, which Pyro's own Predictive returns, has no variance; latents from the prior have too much.
    assert_not_moments(both, mean, covariance - np.diag([0, covariance[1, 1]]))
    prior = sample(function_model, n=NUM * 3, seed=0)
    assert_not_moments(torch.stack([prior["z"], prior["x"]], -1).reshape(NUM, 3, 2), mean, covariance)


def test_predictive_honours_another_plate_and_inner_plates():
    def model(x):
        with pyro.plate("rows", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("copies", x.shape[0], dim=-2):
                pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x):
        with pyro.plate("rows", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.mean(0), 0.01))

    x = torch.arange(4.0).expand(3, 4)
    draws = predictive(model, guide, x, num_samples=500, plate="rows", seed=0)
    assert draws["x"].shape == (500, 3, 4)
    assert draws["z"].squeeze().shape == (500, 4)
    error = math.sqrt((0.1**2 + 0.01**2) / 500)
    assert float((draws["x"].mean(0) - x).abs().max()) < 5 * error
    # One z serves all copies of a draw.
    assert float(draws["x"].mean(1).std(0).max()) < math.sqrt(0.1**2 / 3 + 0.01**2) * 1.2


def test_predictive_keeps_a_subsample_together():
    """Covariates that the model looks up by the plate's indices are those that the guide saw."""
    offset = 10.0 * torch.arange(100)

    def model(x):
        with pyro.plate("data", 100, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(offset[index], 0.01))
            pyro.sample("x", dist.Normal(z - offset[index], 0.01), obs=x[index])

    def guide(x):
        with pyro.plate("data", 100, subsample_size=5) as index:
            pyro.sample("z", dist.Normal(offset[index] + x[index], 0.01))

    for num_samples in (1, 3):
        draws = predictive(model, guide, torch.zeros(100), num_samples=num_samples, seed=0)
        assert draws["x"].shape == (num_samples, 5)
        assert float(draws["x"].abs().max()) < 0.1


def test_predictive_of_a_model_on_a_condition_still_predicts():
    x = torch.tensor([-3.0, 5.0])
    conditioned = poutine.condition(lambda x: function_model(n=len(x)), data={"x": x})
    draws = predictive(conditioned, function_guide, x, num_samples=NUM, seed=0)
    assert_moments(draws["x"][..., None], x.numpy()[:, None], np.array([[SLOPE**2 * GUIDE_SD**2 + NOISE_SD**2]]))


# --- posterior predictive of the zoo ---------------------------------------------------------------


@pytest.mark.parametrize("make", [Exact, TiedMeanField])
def test_predictive_has_the_moments_of_the_posterior(make):
    model = LinearVAE(4, 2, sigma=0.6).double()
    x, guide = data_for(model, 3), make(model)
    w, mu, var = arrays(model)
    precision = (w.T @ w + var * np.eye(2)) / var
    latent = np.linalg.inv(precision) if make is Exact else np.diag(1 / np.diag(precision))
    posterior_mean = (x.numpy() - mu) @ w @ np.linalg.inv(precision) / var
    draws = predictive(model, guide, x, num_samples=NUM, seed=0)
    assert_moments(draws["z"], posterior_mean, latent)
    assert_moments(draws["x"], posterior_mean @ w.T + mu, w @ latent @ w.T + var * np.eye(4))
    assert_not_moments(draws["x"], posterior_mean @ w.T + mu, w @ w.T + var * np.eye(4))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_predictive_has_one_shape_for_every_pair(pair, num_samples):
    model, guide = pair
    draws = predictive(model, guide, data_for(model, 6), num_samples=num_samples, seed=0)
    assert draws["z"].shape == (num_samples, 6, model.latent_dim)
    assert draws["x"].shape == (num_samples, 6, model.data_dim)
    assert not any(value.requires_grad for value in draws.values())


# --- reconstruction --------------------------------------------------------------------------------


def test_reconstruct_averages_the_decoder_over_the_guide():
    model = LinearVAE(4, 2, sigma=0.6).double()
    x = data_for(model, 3)
    w, mu, var = arrays(model)
    m = w.T @ w + var * np.eye(2)
    expected = (x.numpy() - mu) @ w @ np.linalg.inv(m) @ w.T + mu
    error = np.sqrt(np.diag(w @ np.linalg.inv(m) @ w.T) * var / NUM)
    got = reconstruct(model, Exact(model), x, num_samples=NUM, seed=0)
    assert got.shape == (3, 4)
    assert (np.abs(got.numpy() - expected) < 5 * error).all()
    assert (np.abs(got.numpy() - x.numpy()) > 5 * error).any()


def test_reconstruct_of_one_sample_is_one_decoded_draw():
    model = LinearVAE(4, 2).double()
    x, guide = data_for(model, 3), MeanField(4, 2).double()
    got = reconstruct(model, guide, x, seed=4)
    z = predictive(model, guide, x, seed=4)["z"].squeeze(0)
    assert torch.equal(got, model.decode(z).detach())


def test_a_function_may_bring_its_decoder():
    def model(x):
        return function_model(x)

    model.decode = lambda z: SLOPE * z
    x = torch.tensor([-3.0, 0.0, 5.0])
    got = reconstruct(model, function_guide, x, num_samples=NUM, seed=0)
    assert float((got - x).abs().max()) < 5 * SLOPE * GUIDE_SD / math.sqrt(NUM)


def test_reconstruct_wants_a_decoder():
    with pytest.raises(TypeError, match=r"expected a model with decode\(z\), got function"):
        reconstruct(function_model, function_guide, torch.zeros(3))


def test_reconstruct_wants_one_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + pyro.sample("b", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for name in "ab":
                pyro.sample(name, dist.Normal(0.0, 1.0))

    model.decode = lambda z: z
    with pytest.raises(ValueError, match=r"expected one latent to decode, got \['a', 'b'\]"):
        reconstruct(model, guide, torch.zeros(3))


# --- seeds and errors ------------------------------------------------------------------------------

DRAWS = {
    "sample": lambda seed: sample(function_model, n=4, seed=seed)["x"],
    "predictive": lambda seed: predictive(function_model, function_guide, torch.zeros(4), seed=seed)["x"],
    "reconstruct": lambda seed: reconstruct(LinearVAE(5, 2), MeanField(5, 2), torch.zeros(4, 5), seed=seed),
}


@pytest.mark.parametrize("name", ["sample", "predictive"])
def test_a_seed_repeats_and_leaves_the_random_state(name):
    before = torch.get_rng_state()
    a, b, c = (DRAWS[name](seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", DRAWS)
def test_without_a_seed_the_callers_state_is_used(name):
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        values.append(DRAWS[name](None))
    assert torch.equal(*values)
    assert not torch.equal(values[0], DRAWS[name](None))


def test_nothing_leaks_into_a_handler_outside():
    with poutine.trace() as outer:
        for draw in DRAWS.values():
            draw(0)
    assert list(outer.trace.nodes) == []


@pytest.mark.parametrize("num_samples", [0, -1])
def test_predictive_wants_a_positive_number_of_samples(num_samples):
    with pytest.raises(ValueError, match=f"expected num_samples to be at least 1, got {num_samples}"):
        predictive(function_model, function_guide, torch.zeros(3), num_samples=num_samples)


def test_data_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected x, the first argument, to be finite, got 1 NaN or infinite of 2"):
        predictive(function_model, function_guide, torch.tensor([0.0, math.nan]))


def test_a_guide_of_other_latents_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match=r"the model's latent sites \['z'\], got \['w'\]"):
        predictive(function_model, guide, torch.zeros(3))
