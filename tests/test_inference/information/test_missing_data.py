"""Information and divergences of pairs whose data are missing in part, and of all data as one data point."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import check_pair, information_bounds, latent_kl, mutual_information, posterior_means

QUIET = {"seed": 0, "progress": False}
X = torch.randn(40, 3, generator=torch.manual_seed(0), dtype=torch.float64)
X[0, 1] = X[2, 0] = X[2, 2] = float("nan")


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).mask(~x.isnan()).to_event(1), obs=x.nan_to_num())


def _posterior(x):
    variance = 1 / (1 + 4 * (~x.isnan()).sum(-1, keepdim=True).double())
    return 4 * x.nan_to_num().sum(-1, keepdim=True) * variance, variance


def guide(x):
    mean, variance = _posterior(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(mean, variance.sqrt()).to_event(1))


def test_divergences_of_missing_data_are_those_of_the_posterior():
    mean, variance = _posterior(X)
    expected = 0.5 * (variance + mean.square() - 1 - variance.log())
    torch.testing.assert_close(latent_kl(model, guide, X, missing=True), expected)
    torch.testing.assert_close(posterior_means(model, guide, X, missing=True), mean)
    with pytest.raises(ValueError, match="missing=True"):
        latent_kl(model, guide, X)


def test_both_bounds_of_the_information_agree_on_missing_data():
    first = mutual_information(model, guide, X, missing=True, num_samples=20, **QUIET).empirical
    second = information_bounds(model, guide, X, missing=True, num_samples=50, **QUIET).empirical
    assert abs(first.value - second.value) < 4 * (first.standard_error + second.standard_error)


def regression(x):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("points", len(x)):
        pyro.sample("x", dist.Normal(w.unsqueeze(-2), 1.0).to_event(1), obs=x)


def as_vector(x):
    pyro.sample("w", dist.Normal(x.sum(0) / (len(x) + 1), (len(x) + 1) ** -0.5).to_event(1))


def test_divergences_of_globals_are_those_of_one_data_point():
    x = X.nan_to_num()
    mean, variance = x.sum(0) / 41, torch.tensor(1 / 41, dtype=torch.float64)
    expected = 0.5 * (variance + mean.square() - 1 - variance.log())
    torch.testing.assert_close(latent_kl(regression, as_vector, x, whole=True), expected.unsqueeze(0))
    torch.testing.assert_close(posterior_means(regression, as_vector, x, whole=True), mean.unsqueeze(0))


@pytest.mark.parametrize("door", [mutual_information, information_bounds])
def test_one_data_point_has_no_information(door):
    with pytest.raises(ValueError, match="at most log 1 = 0"):
        door(regression, as_vector, X.nan_to_num(), whole=True)


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
def test_a_pair_of_globals_and_one_of_missing_data_are_checked():
    assert set(check_pair(regression, as_vector, X.nan_to_num(), whole=True).problems) == {"training"}
    assert set(check_pair(model, guide, X, missing=True).problems) == {"training"}
    assert "data" in check_pair(model, guide, X).problems
