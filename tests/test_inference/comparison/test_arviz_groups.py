"""Draws in ArviZ's groups, on whichever of its lines is installed, against closed forms."""

import math
from dataclasses import replace

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal

from guides import Exact
from inference import evidence, fit, to_arviz
from zoo import PPCA, linear_gaussian

SIGMA, TAU = 0.7, 2.0
GENERATOR = torch.Generator().manual_seed(3)
INPUTS = 2 * torch.rand(80, 3, generator=GENERATOR, dtype=torch.float64) - 1
OUTPUTS = INPUTS @ torch.tensor([1.0, -0.5, 0.3]).double() + SIGMA * torch.randn(80, generator=GENERATOR).double()
X = linear_gaussian(30, 5, 2).train


def regression(inputs, outputs):
    """Bayesian linear regression: global weights, known noise."""
    weights = pyro.sample("weights", dist.Normal(inputs.new_zeros(3), TAU).to_event(1))
    with pyro.plate("data", len(inputs)):
        pyro.sample("y", dist.Normal((inputs * weights).sum(-1), SIGMA), obs=outputs)


def posterior(inputs, outputs):
    """Mean and covariance of the weights."""
    precision = inputs.T @ inputs / SIGMA**2 + np.eye(3) / TAU**2
    covariance = np.linalg.inv(precision)
    return covariance @ inputs.T @ outputs / SIGMA**2, covariance


def leave_one_out(inputs, outputs):
    """log p(y_n | y_-n) of every data point, by refitting without it."""
    values = []
    for n in range(len(inputs)):
        rest = np.arange(len(inputs)) != n
        mean, covariance = posterior(inputs[rest], outputs[rest])
        spread = math.sqrt(SIGMA**2 + inputs[n] @ covariance @ inputs[n])
        values.append(scipy.stats.norm.logpdf(outputs[n], inputs[n] @ mean, spread))
    return np.array(values)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    guide = AutoMultivariateNormal(regression, init_scale=0.1)
    options = {
        "objective": pyro.infer.Trace_ELBO(num_particles=64, vectorize_particles=True),
        "seed": 0,
        "progress": False,
    }
    schedule = {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.98)}
    fit(
        regression,
        guide,
        (INPUTS, OUTPUTS),
        steps=300,
        optimizer=lambda p: torch.optim.Adam(p, 0.1),
        **schedule,
        **options,
    )
    return guide


@pytest.fixture(scope="module")
def groups(trained):
    return to_arviz(regression, trained, INPUTS, OUTPUTS, num_samples=400, seed=0, progress=False)


def values(groups, group, name):
    return np.asarray(groups[group][name].values)


def elpd(groups):
    """The estimate of leave-one-out cross-validation per data point, which the two lines of ArviZ name differently."""
    loo = az.loo(groups, pointwise=True)
    return np.asarray(loo.elpd_i if hasattr(loo, "elpd_i") else loo.loo_i)


def test_loo_of_linear_regression_is_that_in_closed_form(trained):
    truth = leave_one_out(INPUTS.numpy(), OUTPUTS.numpy()).sum()
    options = {"num_samples": 400, "progress": False}
    found = [elpd(to_arviz(regression, trained, INPUTS, OUTPUTS, seed=seed, **options)).sum() for seed in range(5)]
    assert abs(np.mean(found) - truth) < 4 * np.std(found, ddof=1) / math.sqrt(len(found))


def test_groups_have_chain_draw_and_data(groups):
    assert values(groups, "posterior", "weights").shape == (1, 400, 3)
    assert values(groups, "prior", "weights").shape == (1, 400, 3)
    for group in ("log_likelihood", "posterior_predictive", "prior_predictive"):
        assert values(groups, group, "y").shape == (1, 400, 80)
    np.testing.assert_array_equal(values(groups, "observed_data", "y"), OUTPUTS)
    assert {"mean", "sd"} <= set(az.summary(groups, var_names=["weights"]).columns)


def test_the_densities_are_those_of_the_draws(groups, trained):
    weights = values(groups, "posterior", "weights")[0]
    per_datum = scipy.stats.norm.logpdf(OUTPUTS.numpy(), weights @ INPUTS.numpy().T, SIGMA)
    np.testing.assert_allclose(values(groups, "log_likelihood", "y")[0], per_datum, rtol=1e-9)
    prior = scipy.stats.norm.logpdf(weights, 0, TAU).sum(-1)
    np.testing.assert_allclose(values(groups, "sample_stats", "lp")[0], per_datum.sum(-1) + prior, rtol=1e-9)
    own = trained.get_posterior().log_prob(torch.from_numpy(weights).to(trained.loc.dtype)).detach()
    np.testing.assert_allclose(values(groups, "sample_stats", "log_q")[0], own, rtol=1e-3)
    k = values(groups, "sample_stats", "pareto_k")
    assert np.ptp(k) == 0
    assert k[0, 0] < 0.7


def test_draws_are_the_posteriors(groups):
    mean, covariance = posterior(INPUTS.numpy(), OUTPUTS.numpy())
    found = values(groups, "posterior", "weights")[0]
    assert (np.abs(found.mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / 400) + 0.02).all()


def test_latents_of_each_data_point_have_no_likelihood_to_leave_out():
    model = PPCA.from_data(X, 2)
    found = to_arviz(model, Exact(model), X, num_samples=50, seed=0)
    assert values(found, "posterior", "z").shape == (1, 50, 30, 2)
    assert values(found, "posterior_predictive", "x").shape == (1, 50, 30, 5)
    difference = values(found, "sample_stats", "lp") - values(found, "sample_stats", "log_q")
    np.testing.assert_allclose(difference[0], model.log_evidence(X).detach().expand(50, -1), rtol=1e-9)
    with pytest.raises((TypeError, ValueError, KeyError), match="likelihood"):
        az.loo(found)


def test_known_evidence_is_the_likelihood_of_data_points():
    model = PPCA.from_data(X, 2)
    truth = evidence(model, X)
    found = to_arviz(model, Exact(model), X, num_samples=50, known=truth, seed=0)
    np.testing.assert_allclose(values(found, "log_likelihood", "x")[0], truth.value.expand(50, -1), rtol=1e-8)
    np.testing.assert_allclose(elpd(found), truth.value, rtol=1e-8)  # without a warning of a heavy tail
    bound = replace(truth, upper=torch.full_like(truth.upper, math.inf))
    with pytest.raises(ValueError, match="expected evidence with upper ends, got 30 data points without one"):
        to_arviz(model, Exact(model), X, known=bound)
    with pytest.raises(ValueError, match="expected the evidence of 4 data points, got that of 30"):
        to_arviz(model, Exact(model), X[:4], known=truth)


def test_what_is_no_sum_over_data_points_is_refused(trained):
    scaled = poutine.scale(regression, 2.0)
    with pytest.raises(ValueError, match=r"without .* and without subsampling"):
        to_arviz(scaled, trained, INPUTS, OUTPUTS, num_samples=3, progress=False)
    with pytest.raises(ValueError, match="expected no evidence per data point for global latents"):
        to_arviz(regression, trained, INPUTS, OUTPUTS, known=evidence(PPCA.from_data(X, 2), X))

    def both(x):
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="inside the plate 'data' or all outside"):
        to_arviz(both, both, X, num_samples=3)


def test_draws_follow_the_seed_alone(trained):
    state = torch.get_rng_state()
    pair = regression, trained, INPUTS, OUTPUTS
    first, again = (to_arviz(*pair, num_samples=3, seed=1, progress=False) for _ in range(2))
    np.testing.assert_array_equal(values(first, "posterior", "weights"), values(again, "posterior", "weights"))
    assert torch.equal(state, torch.get_rng_state())
