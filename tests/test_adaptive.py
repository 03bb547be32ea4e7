"""Adaptive importance sampling: intervals that cover, on a thousand problems, and where it is blind."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch
from linear_problems import GUIDES, keeps_its_word, mean_field, problem, record, shifted
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

from inference import Adaptive, evidence
from inference.estimates import ASYMPTOTIC
from inference.hmc import Gaussian
from inference.student import Student, mixture_log_prob, moment_fit, temperatures


def adaptive(model, x, guide=None, method=Adaptive(), seed=0, **options):  # noqa: B008
    return evidence(model, x, method=method, guide=guide, seed=seed, progress=False, **options)


# --- intervals keep their word ---------------------------------------------------------------------


@pytest.mark.parametrize("change", [mean_field, shifted, None], ids=["mean field", "shifted", "no guide"])
def test_a_hundred_problems_are_covered(change):
    result = record(Adaptive(4000), change, num_models=6, num_data=17)
    assert keeps_its_word(result)
    assert result.two_sided >= 0.9 * result.num
    assert result.width <= 0.1


def test_intervals_of_half_the_size_do_not_cover():
    result = record(Adaptive(4000), mean_field, num_models=6, num_data=17, shrink=0.5)
    assert not keeps_its_word(result)


@pytest.mark.slow
@pytest.mark.parametrize("change", GUIDES.values(), ids=GUIDES)
def test_a_thousand_problems_are_covered_and_their_intervals_narrow(change):
    result = record("adaptive", change, num_models=60, num_data=17)
    print(change.__name__, result.line)
    assert result.num >= 1000
    assert keeps_its_word(result)
    assert result.two_sided >= 0.9 * result.num
    assert result.width <= 0.1


def test_a_users_model_of_two_latents_is_quadratures_with_and_without_a_guide():
    truth = poisson_evidence(COUNTS)
    for guide in (poisson_guide, None):
        got = adaptive(poisson_model, COUNTS, guide)
        assert got.guarantee == (ASYMPTOTIC,) * 3
        assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()
        assert float((got.upper - got.lower).max()) < 0.1


def test_one_datum_is_the_first_of_one():
    model, x, truth = problem(1, 1)
    got = adaptive(model, x)
    assert got.value.shape == (1,)
    assert abs(float(got.value) - truth[0]) < 4 * float(got.standard_error)


def test_a_model_in_float32_is_estimated_in_float64():
    model, x, _ = problem(4, 5)
    single = model.float()
    got = adaptive(single, x.float())
    truth = evidence(single, x.float(), method="exact").value
    assert got.value.dtype == torch.float64
    assert bool(((got.value - truth).abs() < 4 * got.standard_error).all())


def test_a_model_that_cannot_broadcast_gives_the_same():
    model, x, truth = problem(1, 2)
    got = adaptive(model, x, method=Adaptive(200, num_draws=100, num_rounds=2), broadcast=False)
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


def test_groups_of_data_are_put_together_in_order(monkeypatch):
    monkeypatch.setattr("inference.adaptive._ELEMENTS", 5000)  # a datum a group
    model, x, truth = problem(1, 4)
    got = adaptive(model, x, method=Adaptive(2000))
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


# --- where it is blind -----------------------------------------------------------------------------


def test_a_mode_that_the_guide_does_not_see_is_missed_and_nothing_tells():
    truth = square_evidence(SQUARES)
    got = adaptive(square_model, SQUARES, one_mode_guide)
    assert got.guarantee == (ASYMPTOTIC,) * 3
    assert (got.upper.numpy() < truth - 0.6).all()
    assert (np.abs(got.value.numpy() + math.log(2) - truth) < 4 * got.standard_error.numpy()).all()


def test_the_priors_draws_see_both_modes():
    truth = square_evidence(SQUARES)
    got = adaptive(square_model, SQUARES)
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


# --- parts -----------------------------------------------------------------------------------------


def random_law(dim=3, num_data=2, degrees=5.0):
    factor = torch.randn(num_data, dim, dim).double().tril() + 2 * torch.eye(dim).double()
    return Student(Gaussian(torch.randn(num_data, dim).double(), factor), degrees)


def test_the_student_law_is_scipys_and_its_draws_follow_it():
    law = random_law()
    u, log_density = law.draw(4000)
    for n in range(2):
        loc, factor = (part[n].numpy() for part in law.gaussian)
        reference = scipy.stats.multivariate_t(loc, factor @ factor.T, df=5)
        np.testing.assert_allclose(log_density[:, n].numpy(), reference.logpdf(u[:, n].numpy()), rtol=1e-10)
        np.testing.assert_allclose(law.log_prob(u)[:, n].numpy(), reference.logpdf(u[:, n].numpy()), rtol=1e-10)
        distance = (np.linalg.solve(factor, (u[:, n].numpy() - loc).T) ** 2).sum(0)
        assert scipy.stats.kstest(distance / 3, scipy.stats.f(3, 5).cdf).pvalue > 1e-4
        # The twin: a Gaussian's distances.
        assert scipy.stats.kstest(distance, scipy.stats.chi2(3).cdf).pvalue < 1e-4


def test_a_mixture_is_in_equal_parts():
    laws, u = [random_law(), random_law()], torch.randn(7, 2, 3).double()
    expected = np.log(sum(law.log_prob(u).exp().numpy() for law in laws) / 2)
    np.testing.assert_allclose(mixture_log_prob(laws, u).numpy(), expected, rtol=1e-10)


def test_moments_are_weighted_and_drawn_towards_the_law_before():
    law, u, log_weights = random_law(), torch.randn(50, 2, 3).double(), torch.randn(50, 2).double()
    got = moment_fit(u, log_weights, law)
    for n in range(2):
        w = np.exp(log_weights[:, n].numpy())
        size = w.sum() ** 2 / (w**2).sum()
        covariance = np.cov(u[:, n].numpy().T, aweights=w, ddof=0)
        before = law.gaussian.factor[n].numpy()
        expected = (size * covariance + 4 * before @ before.T) / (size + 4)
        factor = got.gaussian.factor[n].numpy()
        np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-10)
        np.testing.assert_allclose(got.gaussian.loc[n].numpy(), np.average(u[:, n].numpy(), 0, w), rtol=1e-10)


def test_weights_that_are_all_zero_leave_the_law():
    law = random_law()
    log_weights = torch.zeros(50, 2).double()
    log_weights[:, 1] = -math.inf
    got = moment_fit(torch.randn(50, 2, 3).double(), log_weights, law)
    assert torch.equal(got.gaussian.factor[1], law.gaussian.factor[1])
    assert torch.equal(got.gaussian.loc[1], law.gaussian.loc[1])
    assert not torch.equal(got.gaussian.loc[0], law.gaussian.loc[0])


def test_powers_leave_the_size_that_is_asked_for():
    log_weights = torch.stack([10 * torch.randn(500), 0.1 * torch.randn(500)], 1).double()
    power, size = temperatures(log_weights, 50)

    def kish(p, n):
        w = np.exp(p * (log_weights[:, n] - log_weights[:, n].max()).numpy())
        return w.sum() ** 2 / (w**2).sum()

    expected = scipy.optimize.brentq(lambda p: kish(p, 0) - 50, 1e-6, 1)
    assert float(power[0]) == pytest.approx(expected, abs=1e-6)
    assert float(power[1]) == 1
    np.testing.assert_allclose(size.numpy(), [50, kish(1, 1)], rtol=1e-4)


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples to be at least 1, got 0"),
        ({"num_draws": 0}, "num_draws to be at least 1, got 0"),
        ({"num_rounds": 0}, "num_rounds to be at least 1, got 0"),
        ({"degrees": 0.0}, "expected positive finite degrees of freedom, got 0.0"),
    ],
)
def test_settings_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(**options)


def test_a_density_that_breaks_down_is_named():
    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            factor = torch.where(z > 6.0, math.nan, 0.25 * z)
            pyro.factor("x", factor + 0 * x[:, 0])

    with pytest.raises(FloatingPointError, match="log weight is NaN"):
        adaptive(broken, torch.zeros(3, 1).double())
