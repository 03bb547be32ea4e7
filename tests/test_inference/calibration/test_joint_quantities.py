"""Joint quantities find what ranks of single coordinates cannot."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_pairs import (
    ACCEPT,
    DETECT,
    NUM,
    marginal_guide,
    prior_guide,
    sum_guide,
    sums,
)

from inference import (
    sbc,
    simulate,
    tarp,
)

# --- what one test cannot see, another does --------------------------------------------------------------


def test_joint_quantities_detect_wrong_correlations_of_a_guide():
    result = sbc(sums(marginal_guide))
    assert bool((result.ks[:2] > ACCEPT).all())
    assert float(result.ks_adjusted[2]) < DETECT
    assert result.worst == "log_likelihood"
    assert tarp(sums(marginal_guide)).p_value < DETECT
    assert tarp(sums(sum_guide)).p_value > ACCEPT
    assert sbc(sums(sum_guide)).p_value > ACCEPT


NOISE_VAR = 7 / 3  # for which the posterior's correlation is -0.3


def weakly_correlated_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), NOISE_VAR**0.5).to_event(1), obs=x)


def guide_of_correlation(share):
    """The posterior, with a share of its covariance of the two coordinates."""
    var = 2 + NOISE_VAR
    covariance = (1 - 1 / var) * torch.eye(2).double() - share / var * (1 - torch.eye(2).double())

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal((x / var).expand(len(x), 2), covariance))

    return guide


def test_a_missing_correlation_of_a_third_is_seen_in_1000_data():
    covariance = torch.eye(2).double() - 1 / (2 + NOISE_VAR)
    assert float(covariance[0, 1] / covariance[0, 0]) == pytest.approx(-0.3)
    x, options = torch.zeros(1000, 1).double(), {"num_simulations": 1000, "progress": False}
    for seed in range(4):
        planted = sbc(simulate(weakly_correlated_model, guide_of_correlation(0.0), x, seed=seed, **options), seed=seed)
        right = sbc(simulate(weakly_correlated_model, guide_of_correlation(1.0), x, seed=seed, **options), seed=seed)
        assert planted.worst == "log_likelihood"
        assert float(planted.ks_adjusted[2]) < 0.01
        assert bool((planted.ks_adjusted[:2] > 0.01).all())
        assert float(right.ks_adjusted.min()) > 0.01


def test_the_prior_as_guide_is_detected_by_data_dependent_quantities():
    source = sums(prior_guide)
    assert bool((sbc(source).ks[:2] > ACCEPT).all())
    assert tarp(source).p_value > ACCEPT
    assert float(sbc(source).ks_adjusted[2]) < DETECT
    assert tarp(source, references=source.data.expand(NUM, 2)).p_value < DETECT
    exact = sums(sum_guide)
    assert tarp(exact, references=exact.data.expand(NUM, 2)).p_value > ACCEPT
