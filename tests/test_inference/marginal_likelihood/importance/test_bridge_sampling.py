"""Bridge sampling: the estimate of given draws, and intervals that cover."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from linear_problems import GUIDES, keeps_its_word, problem, record, shifted
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

from inference import Bridge, evidence
from inference.marginal_likelihood.base.result import ASYMPTOTIC
from inference.marginal_likelihood.importance.bridge_sampling import bridge_estimate


def bridge(model, x, guide=None, method=Bridge(), seed=0):  # noqa: B008
    return evidence(model, x, method=method, guide=guide, seed=seed, progress=False)


SMALL = Bridge(4000, num_chains=30, num_steps=20)


@pytest.mark.slow
def test_a_hundred_problems_are_covered():
    result = record(SMALL, shifted, num_models=6, num_data=17)
    assert keeps_its_word(result)
    assert result.two_sided >= 0.9 * result.num
    assert result.width <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("change", GUIDES.values(), ids=GUIDES)
def test_a_thousand_problems_are_covered_and_their_intervals_narrow(change):
    result = record(SMALL, change, num_models=60, num_data=17)
    print(change.__name__, result.line)
    assert result.num >= 1000
    assert keeps_its_word(result)
    assert result.two_sided >= 0.9 * result.num
    assert result.width <= 0.1


def gaussian_ratios(num_posterior, num_proposal, num_data, *, chains=50, log_constant=-3.0):
    """log p(x, u) - log t(u) at exact independent draws, of a Gaussian posterior and a shifted wider proposal."""
    posterior = torch.randn(num_posterior // chains, chains, num_data).double()
    proposal = 0.7 + 1.5 * torch.randn(num_proposal, num_data).double()

    def ratio(u):
        log_p, log_t = (scipy.stats.norm.logpdf(u.numpy(), *distribution) for distribution in ((0, 1), (0.7, 1.5)))
        return torch.from_numpy(log_constant + log_p - log_t)

    return ratio(posterior), ratio(proposal)


def test_the_estimate_is_that_of_meng_and_wongs_iteration():
    posterior, proposal = gaussian_ratios(1000, 3000, 2)
    got = bridge_estimate(posterior, proposal)
    for n in range(2):
        l1, l2 = np.exp(posterior[..., n].numpy().ravel()), np.exp(proposal[:, n].numpy())
        constant, s1, s2 = 1.0, 0.25, 0.75
        for _ in range(200):
            constant = (l2 / (s1 * l2 + s2 * constant)).mean() / (1 / (s1 * l1 + s2 * constant)).mean()
        assert float(got.value[n]) == pytest.approx(math.log(constant), rel=1e-9)


def test_the_error_covers_with_independent_draws():
    value, error = bridge_estimate(*gaussian_ratios(1000, 1000, 2000))
    inside = int(((value + 3).abs() <= 1.96 * error).sum())
    assert inside >= scipy.stats.binom.ppf(0.001, 2000, 0.95)
    # The twin: half of it.
    assert int(((value + 3).abs() <= 0.98 * error).sum()) < scipy.stats.binom.ppf(0.001, 2000, 0.95)


@pytest.mark.parametrize(("num_posterior", "num_proposal"), [(100, 2000), (2000, 100)])
def test_the_error_is_the_spread_of_repetitions_of_unequal_sides(num_posterior, num_proposal):
    """The spread of 100 repetitions has itself an error of 1 / sqrt(200)."""
    torch.manual_seed(0)
    value, error = bridge_estimate(*gaussian_ratios(num_posterior, num_proposal, 100))
    assert abs(float(value.std() / error.square().mean().sqrt()) - 1) < 4 / math.sqrt(200)


def test_the_error_counts_chains_that_stand_still_as_one_draw_each():
    posterior, proposal = gaussian_ratios(100, 1000, 1000, chains=100)
    value, error = bridge_estimate(posterior.expand(10, -1, -1), proposal)
    assert int(((value + 3).abs() <= 1.96 * error).sum()) >= scipy.stats.binom.ppf(0.001, 1000, 0.95)
    # The twin: their draws as if they were independent, each in a chain of its own.
    value, error = bridge_estimate(posterior.expand(10, -1, -1).reshape(1, 1000, -1), proposal)
    assert int(((value + 3).abs() <= 1.96 * error).sum()) < scipy.stats.binom.ppf(0.001, 1000, 0.95)


def test_equal_ratios_give_the_constant_and_zero_weights_count():
    value, error = bridge_estimate(torch.full((3, 4, 1), -7.0).double(), torch.full((5, 1), -7.0).double())
    assert float(value) == pytest.approx(-7, abs=1e-12)
    assert float(error) == 0
    proposal = torch.tensor([[-7.0], [-math.inf]]).double()
    # Half of the proposal's draws are outside: p(x) is half of e^-7, and each end of the equation is a sigmoid.
    root = scipy.optimize.brentq(
        lambda c: scipy.special.expit(-7 - c + math.log(6)) - 12 * scipy.special.expit(c + 7 - math.log(6)), -30, 30
    )
    assert float(bridge_estimate(torch.full((3, 4, 1), -7.0).double(), proposal).value) == pytest.approx(root)
    assert root == pytest.approx(-7 - math.log(2))


def test_a_users_model_of_two_latents_agrees_with_quadrature():
    truth = poisson_evidence(COUNTS)
    for guide in (poisson_guide, None):
        got = bridge(poisson_model, COUNTS, guide)
        assert got.guarantee == (ASYMPTOTIC,) * 3
        assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


def test_a_mode_unseen_by_the_guide_is_found():
    truth = square_evidence(SQUARES)
    got = bridge(square_model, SQUARES, one_mode_guide)
    assert got.guarantee == (ASYMPTOTIC,) * 3
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()
    assert all("modes found from" in note for note in got.notes)


def test_one_datum_and_float32():
    model, x, _ = problem(2, 1)
    single = model.float()
    got = bridge(single, x.float())
    assert got.value.dtype == torch.float64
    truth = evidence(single, x.float(), method="exact").value
    assert bool(((got.value - truth).abs() < 4 * got.standard_error).all())


def test_one_chain_has_no_spread_and_is_refused():
    with pytest.raises(ValueError, match="num_chains to be at least 2, got 1"):
        Bridge(num_chains=1)
