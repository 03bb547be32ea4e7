"""ELBO <= IWAE <= evidence, and every objective against closed forms, on linear-Gaussian pairs.

Each statistical claim has a twin, in which a defect is planted and the same criterion must fail at p < 1e-6.
"""

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from bounded_pairs import (
    DATA_DIM,
    DEFECTS,
    INEXACT,
    LATENT_DIM,
    MAKE_GUIDE,
    BrokenGuide,
    BrokenModel,
    arrays,
    assert_consistent,
    assert_refuted,
    closed_form_linear,
    gap_to,
    make_model,
    minus,
    numpy_elbo,
    numpy_linear_elbo,
    repeated,
    weights_of,
)
from pyro import poutine
from registry import data_for, for_models_with

from guides import Exact, Linear, TiedMeanField
from guides.base import Guide
from inference import ELBO, AnalyticELBO, AnalyticKLELBO, elbo, iter_log_weights, iwae, summarise
from zoo import LinearVAE, digits
from zoo.data.datasets import linear_gaussian
from zoo.linear.models import LinearGaussianModel

# --- pairs -----------------------------------------------------------------------------------------------
TRAINED = ["TiedMeanField", "Linear, trained", "MeanField, trained", "FullRank, trained"]


# --- closed forms, written with NumPy --------------------------------------------------------------------


def numpy_evidence(model, x):
    w, mu, var = arrays(model)
    return scipy.stats.multivariate_normal(mu, w @ w.T + var * np.eye(len(mu))).logpdf(x.numpy())


# --- closed forms agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE_GUIDE)
def test_analytic_elbo_is_the_formula(name, model, guides, x):
    got = AnalyticELBO().per_datum(model, guides[name], x)
    np.testing.assert_allclose(got.numpy(), numpy_elbo(model, guides[name], x), rtol=1e-12, atol=1e-10)


def test_analytic_elbo_is_the_formula_of_lucas_et_al(model, x):
    guide = Linear(DATA_DIM, LATENT_DIM).double().requires_grad_(False)
    guide.log_sigma.normal_()
    w, mu, var = arrays(model)
    v, d = guide.V.numpy(), np.exp(2 * guide.log_sigma.numpy())
    guide.bias.copy_(torch.from_numpy(-v @ mu))
    expected = numpy_linear_elbo(w, v, d, var, x.numpy() - mu)
    np.testing.assert_allclose(AnalyticELBO().per_datum(model, guide, x).numpy(), expected, rtol=1e-12, atol=1e-10)


@for_models_with(LinearGaussianModel)
def test_analytic_elbo_of_the_exact_posterior_is_the_evidence(make_model):
    model = make_model()
    x = data_for(model)
    got = AnalyticELBO().per_datum(model, Exact(model), x).detach()
    np.testing.assert_allclose(got.numpy(), numpy_evidence(model, x), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_gap_of_the_tied_mean_field_is_hadamards_inequality(seed):
    """At any W: log p - ELBO = 1/2 [sum_i log M_ii - log det M], the same for every data point."""
    model = make_model(seed, data_dim=6, latent_dim=4, sigma=0.3 + 0.3 * seed)
    x = data_for(model)
    w, _, var = arrays(model)
    m = w.T @ w + var * np.eye(4)
    gap = 0.5 * (np.log(np.diag(m)).sum() - np.linalg.slogdet(m)[1])
    for guide in (TiedMeanField(model), closed_form_linear(model).requires_grad_(False)):
        got = numpy_evidence(model, x) - AnalyticELBO().per_datum(model, guide, x).numpy()
        np.testing.assert_allclose(got, gap, rtol=0, atol=1e-10)
    assert gap > 0.01


def optimal_pair(x, latent_dim):
    model = LinearVAE.optimum(x, latent_dim)
    return model, closed_form_linear(model)


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("data", ["synthetic", "digits"])
def test_at_maximum_likelihood_the_elbo_is_tight_and_stationary(data, latent_dim):
    if data == "digits":
        x = digits(test_size=0).train / 16
    else:
        x = linear_gaussian(400, 8, 5, sigma=0.4).train
    model, guide = optimal_pair(x, latent_dim)
    bound = AnalyticELBO().per_datum(model, guide, x).mean()
    assert abs(float(bound.detach()) - numpy_evidence_mean(model, x)) < 1e-10
    bound.backward()
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert float(parameter.grad.abs().max()) < 1e-8, name


def numpy_evidence_mean(model, x):
    """Mean log-evidence from the data's covariance alone, by section 1.1."""
    w, mu, var = arrays(model)
    c = w @ w.T + var * np.eye(len(mu))
    y = x.numpy() - mu
    return -0.5 * (
        len(mu) * math.log(2 * math.pi) + np.linalg.slogdet(c)[1] + np.trace(np.linalg.solve(c, y.T @ y / len(y)))
    )


# --- the sandwich ----------------------------------------------------------------------------------------


def test_the_exact_posterior_leaves_no_gap(model, guides, x):
    matrix = weights_of((model, guides["Exact"]), x, num_samples=100)
    for bound in (elbo(matrix), iwae(matrix, 10), iwae(matrix)):
        np.testing.assert_allclose(bound.value.numpy(), numpy_evidence(model, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", INEXACT)
def test_elbo_is_below_the_evidence(name, model, guides, x):
    bound = elbo(weights_of((model, guides[name]), x))
    assert_consistent(*gap_to(numpy_evidence(model, x), bound), sign=1)


@pytest.mark.parametrize(("defect", "sigma"), [("factor 2", 0.5), ("no log-determinant", 2.0), ("no half", 0.5)])
def test_a_defect_in_log_q_lifts_the_elbo_above_the_evidence(defect, sigma, x):
    # Each at a noise at which it does not happen to lower the bound: by sharp posteriors, say, log q is positive.
    model = make_model(sigma=sigma)
    bound = elbo(weights_of((model, BrokenGuide(TiedMeanField(model), DEFECTS[defect])), x))
    assert_refuted(*gap_to(numpy_evidence(model, x), bound), sign=1)


def test_a_density_of_the_wrong_sign_is_refused(model, x):
    with pytest.raises(ValueError, match="got Broken in the guide, which does not fall off"):
        weights_of((model, BrokenGuide(TiedMeanField(model), DEFECTS["sign"])), x)


@pytest.mark.parametrize("num_particles", [2, 10, 100])
@pytest.mark.parametrize("name", INEXACT)
def test_iwae_is_between_elbo_and_evidence(name, num_particles, model, guides, x):
    pair = (model, guides[name])
    bound, below = iwae(weights_of(pair, x), num_particles), elbo(weights_of(pair, x))
    assert_consistent(*gap_to(numpy_evidence(model, x), bound), sign=1)
    assert_consistent(*gap_to(bound, below), sign=1)


def without_division(matrix, num_particles):
    """The log of the *sum* of weights: an IWAE that forgot 1/K."""
    value, error = iwae(matrix, num_particles)
    return value + math.log(num_particles), error


def divided_twice(matrix, num_particles):
    value, error = iwae(matrix, num_particles)
    return value - math.log(num_particles), error


@pytest.mark.parametrize("name", TRAINED)
def test_an_iwae_without_its_division_leaves_the_sandwich(name, model, guides, x):
    pair = (model, guides[name])
    matrix, below = weights_of(pair, x), elbo(weights_of(pair, x))
    assert_refuted(*gap_to(numpy_evidence(model, x), without_division(matrix, 10)), sign=1)
    assert_refuted(*gap_to(divided_twice(matrix, 10), below), sign=1)


@pytest.mark.parametrize("name", INEXACT)
def test_iwae_increases_with_the_number_of_particles(name, model, guides, x):
    pair = (model, guides[name])
    bounds = [iwae(weights_of(pair, x), k) for k in (1, 2, 5, 20, 100)]
    for lower, upper in pairwise(bounds):
        assert_consistent(*gap_to(upper, lower), sign=1)
    # And strictly so where the guide is poor: the claim that nothing is gained falls.
    if "untrained" in name:
        assert_refuted(*gap_to(bounds[-1], bounds[0]), sign=-1)


def test_an_iwae_divided_twice_decreases(model, guides, x):
    bounds = [divided_twice(weights_of((model, guides["MeanField, trained"]), x), k) for k in (1, 2)]
    assert_refuted(*gap_to(bounds[1], bounds[0]), sign=1)


def iwae_of_a_million(pair, x):
    return summarise(iter_log_weights(*pair, x, num_samples=10**6, chunk=10**5), 10**6).iwae


@pytest.mark.parametrize("name", ["MeanField, trained", "FullRank, trained", "TiedMeanField"])
def test_iwae_of_a_million_samples_is_the_evidence(name, model, guides, x):
    x = x[:3]
    bound = iwae_of_a_million((model, guides[name]), x)
    assert float(bound.standard_error.max()) < 0.01
    for datum in range(3):
        assert_consistent(bound.value[datum] - numpy_evidence(model, x)[datum], bound.standard_error[datum])


@pytest.mark.parametrize("defect", ["no log-determinant", "no half", "factor 2"])
def test_a_defect_in_the_likelihood_is_no_evidence(defect, model, guides, x):
    broken = BrokenModel(model, likelihood=DEFECTS[defect])
    bound = summarise(iter_log_weights(broken, guides["MeanField, trained"], x[:3], num_samples=10**4), 10**4).iwae
    assert_refuted(*gap_to(numpy_evidence(model, x[:3]), bound))


# --- what objectives refuse ------------------------------------------------------------------------------


def two_latents(order, latent=lambda loc: dist.Normal(loc, 1.0)):
    """A program with two latents in the given order, and an observation if it is the model."""

    def program(x, observe):
        with pyro.plate("data", len(x)):
            z = {name: pyro.sample(name, latent(torch.zeros(len(x)))) for name in order}
            if observe:
                pyro.sample("x", dist.Normal(z["a"] + z["b"], 1.0), obs=x)

    return lambda x: program(x, observe=False), lambda x: program(x, observe=True)


def test_analytic_kl_sums_over_latents_in_one_order():
    guide, _ = two_latents("ab", lambda loc: dist.Normal(loc + 0.5, 0.5))
    _, model = two_latents("ab")
    x = torch.zeros(3)
    got = repeated(AnalyticKLELBO(num_particles=50), (model, guide), x)
    kl = 2 * (0.5 * (0.25 + 0.25 - 1) - math.log(0.5))
    fit = -0.5 * math.log(2 * math.pi) - 0.5 * (1.0**2 + 2 * 0.25)
    assert_consistent(*minus(got, (fit - kl, 0.0)))
    assert_refuted(*minus(got, (fit - kl / 2, 0.0)))


def test_analytic_kl_refuses_another_order():
    guide, _ = two_latents("ba")
    _, model = two_latents("ab")
    with pytest.raises(
        ValueError, match=r"one order for a closed-form KL, got \['a', 'b'\] in the model and \['b', 'a'\]"
    ):
        AnalyticKLELBO().loss(model, guide, torch.zeros(3))


def test_analytic_kl_refuses_a_site_without_closed_form():
    guide, _ = two_latents("ab", lambda loc: dist.StudentT(3.0, loc, 1.0))
    _, model = two_latents("ab")
    with pytest.raises(NotImplementedError, match="no closed-form KL at site 'a' between StudentT and Normal"):
        AnalyticKLELBO().loss(model, guide, torch.zeros(3))


def test_analytic_kl_refuses_a_site_scaled_in_one_half_alone():
    guide, model = two_latents("ab")
    with pytest.raises(ValueError, match="site 'a' under the same mask and scale"):
        AnalyticKLELBO().loss(poutine.scale(model, scale=0.5), guide, torch.zeros(3))


class StudentGuide(Guide):
    def posterior(self, x):
        return dist.StudentT(3.0, x[:, :LATENT_DIM], 1.0).to_event(1)


def test_analytic_elbo_refuses_a_guide_that_is_not_gaussian(model, x):
    with pytest.raises(TypeError, match="expected a Gaussian posterior for the closed form, got Independent"):
        AnalyticELBO().loss(model, StudentGuide(), x)


def test_analytic_elbo_refuses_a_model_that_is_not_linear(x):
    guide, model = two_latents("ab")
    with pytest.raises(TypeError, match=r"expected a model with expected_log_likelihood\(x, posterior\) and prior"):
        AnalyticELBO().loss(model, guide, x[:, 0])


def test_analytic_elbo_refuses_two_latents(model, x):
    guide, _ = two_latents("ab")
    with pytest.raises(ValueError, match=r"expected a guide with one latent site, got \['a', 'b'\]"):
        AnalyticELBO().loss(model, guide, x)


@pytest.mark.parametrize("objective", [ELBO(), AnalyticKLELBO()])
def test_sampling_objectives_refuse_a_distribution_without_rsample(objective):
    class Grid(dist.Normal):
        has_rsample = False

    guide, _ = two_latents("ab", lambda loc: Grid(loc, 1.0))
    _, model = two_latents("ab")
    with pytest.raises(ValueError, match="expected a reparameterised distribution at guide site 'a', got Grid"):
        objective.loss(model, guide, torch.zeros(3))
