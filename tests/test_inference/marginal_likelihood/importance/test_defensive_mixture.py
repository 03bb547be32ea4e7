"""Importance sampling from a mixture of guide and prior: an honest error, and what the prior's share is for."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from linear_problems import GUIDES, Perturbed, keeps_its_word, problem, record, shifted, trained
from pyro_problems import (
    COUNTS,
    SQUARES,
    one_mode_guide,
    poisson_evidence,
    poisson_guide,
    poisson_model,
    square_evidence,
    square_model,
)

from inference import Defensive, LogJoint, evidence
from inference.marginal_likelihood.base.method import Problem
from inference.marginal_likelihood.base.result import ASYMPTOTIC, PROBABILISTIC
from inference.marginal_likelihood.importance.defensive_mixture import guide_density
from inference.pair.call import Call
from inference.weights.summary import merge, stratified, summarise


def defensive(model, x, guide, method=Defensive(), seed=0):  # noqa: B008
    return evidence(model, x, method=method, guide=guide, seed=seed, progress=False)


@pytest.mark.parametrize("change", [trained, shifted])
def test_a_hundred_problems_are_covered(change):
    assert keeps_its_word(record(Defensive(2000), change, num_models=6, num_data=17))


def test_intervals_of_half_the_size_do_not_cover():
    assert not keeps_its_word(record(Defensive(2000), trained, num_models=6, num_data=17, shrink=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("change", GUIDES.values(), ids=GUIDES)
def test_a_thousand_problems_are_covered(change):
    result = record("defensive", change, num_models=60, num_data=17)
    print(change.__name__, result.line)
    assert result.num >= 1000
    assert keeps_its_word(result)


def test_weights_are_those_of_the_mixture():
    """By hand: the same draws, with densities by SciPy."""
    model, x, _ = problem(1, 1)
    guide = Perturbed(model, GUIDES["half_width"])
    got = defensive(model, x, guide, Defensive(100, guide_share=0.7))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        log_joint = LogJoint(model, x)
        u = torch.cat([log_joint.sample_guide(guide, 70)[0], log_joint.sample_prior(30)])[:, 0].numpy()
    distribution = guide.posterior(x)
    factor = distribution._unbroadcasted_scale_tril.expand(1, 2, 2)[0].numpy()
    q = scipy.stats.multivariate_normal(distribution.loc[0].numpy(), factor @ factor.T).pdf(u)
    prior = scipy.stats.norm.pdf(u).prod(-1)
    mean = u @ model.W.numpy().T + model.mu.numpy()
    likelihood = scipy.stats.norm.pdf(x[0].numpy(), mean, float(model.sigma)).prod(-1)
    weights = prior * likelihood / (0.7 * q + 0.3 * prior)
    assert float(got.value) == pytest.approx(math.log(weights.mean()), rel=1e-9)
    variance = (70 * weights[:70].var(ddof=1) + 30 * weights[70:].var(ddof=1)) / 100**2
    assert float(got.standard_error) == pytest.approx(math.sqrt(variance) / weights.mean(), rel=1e-6)


def test_the_error_is_the_spread_of_repetitions():
    model, x, _ = problem(1, 1)
    guide = Perturbed(model, trained)
    many = [defensive(model, x, guide, Defensive(1000, search=False), seed) for seed in range(100)]
    spread = np.var([float(e.value) for e in many], ddof=1)
    lower, upper = scipy.stats.chi2.ppf([5e-5, 1 - 5e-5], 99) / 99
    assert lower < spread / np.mean([float(e.standard_error) ** 2 for e in many]) < upper


def test_the_spread_between_strata_is_no_error():
    parts = [torch.randn(60, 3).double(), 2 + torch.randn(40, 3).double()]
    strata = [summarise([part], len(part)) for part in parts]
    value, error = stratified(*strata)
    weights = [part.exp().numpy() for part in parts]
    mean = np.concatenate(weights).mean(0)
    variance = sum(len(w) * w.var(0, ddof=1) for w in weights) / 100**2
    np.testing.assert_allclose(value.numpy(), np.log(mean), rtol=1e-12)
    np.testing.assert_allclose(error.numpy(), np.sqrt(variance) / mean, rtol=1e-9)
    assert bool((error < merge(*strata).iwae.standard_error).all())


def test_a_stratum_of_one_draw_has_no_error():
    model, x, _ = problem(1, 2)
    got = defensive(model, x, Perturbed(model, trained), Defensive(2))
    assert bool((got.standard_error == math.inf).all())
    assert bool(torch.isfinite(got.lower).all())


def test_the_prior_finds_the_guides_unseen_mode_and_k_hat_shows_it():
    truth = square_evidence(SQUARES)
    got = defensive(square_model, SQUARES, one_mode_guide)
    assert got.guarantee == (PROBABILISTIC,) * 3
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


def test_a_guide_of_another_site_order_keeps_the_models_coordinates():
    problem_ = Problem(Call(poisson_model, poisson_guide, (COUNTS,)))
    u = torch.randn(6, 3, 2).double()
    log_base, slope = u[..., 0].numpy(), u[..., 1].numpy()
    loc = np.log(COUNTS.numpy().mean(-1) + 0.5)
    expected = scipy.stats.norm.logpdf(log_base, loc, 0.6) + scipy.stats.norm.logpdf(slope, 0, 0.7)
    np.testing.assert_allclose(guide_density(problem_)(u).numpy(), expected, rtol=1e-10)


def test_a_users_model_of_two_latents_is_quadratures():
    got = defensive(poisson_model, COUNTS, poisson_guide)
    assert got.guarantee == (ASYMPTOTIC,) * 3
    assert (np.abs(got.value.numpy() - poisson_evidence(COUNTS)) < 4 * got.standard_error.numpy()).all()


def test_a_guide_on_another_support_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x[:, 0], 1.0))

    with pytest.raises(ValueError, match="whose latents have the model's supports"):
        defensive(model, SQUARES, guide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "num_samples to be at least 2, got 1"),
        ({"guide_share": 0.0}, "expected guide_share between 0 and 1, got 0.0"),
        ({"guide_share": 1}, "expected guide_share between 0 and 1, got 1"),
    ],
)
def test_settings_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Defensive(**options)


def test_a_guide_is_needed():
    model, x, _ = problem(1, 2)
    with pytest.raises(ValueError, match="expected a guide for method='defensive', got none"):
        defensive(model, x, None)
