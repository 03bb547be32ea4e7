"""Divergence per latent and collapse against closed forms, also those of the linear VAE at its optimum."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from gaussian_pairs import DIGITS, LOGITS, PASS, function_pair, optimum
from registry import data_for
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.optim import LBFGS

from guides import FullRank, Linear, MeanField
from inference import AnalyticELBO, fit
from inference.diagnostics.collapse import (
    active_units,
    collapse_curve,
    collapsed,
    latent_kl,
    posterior_means,
    predicted_alive,
    predicted_kl,
)
from inference.distributions.gaussian import gaussian_marginals
from inference.information.encoder_information import mutual_information
from zoo import IMAVAE, Beta, LinearVAE
from zoo.linear.estimation import spectrum

# --- divergence per latent -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [4096, 7, 1])
@pytest.mark.parametrize("num", [20, 1])
def test_latent_kl_of_the_linear_vae_is_the_closed_form(num, batch_size):
    model, guide = LinearVAE(5, 3).double(), Linear(5, 3).double()
    for p in [*model.parameters(), *guide.parameters()]:
        p.data.normal_()
    x = data_for(model, num)
    guide.bias.data = -guide.V.data @ model.mu.data
    d, mean = guide.log_sigma.exp().square(), (x - model.mu) @ guide.V.mT
    expected = 0.5 * (d + mean.square() - 1 - d.log())
    got = latent_kl(model, guide, x, block=batch_size)
    assert got.shape == (num, 3)
    assert not got.requires_grad
    assert (got - expected).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [MeanField, FullRank])
def test_latent_kl_is_torchs_divergence_of_the_marginals(family, dtype):
    model, guide = LinearVAE(5, 3).to(dtype), family(5, 3, hidden=(8,)).to(dtype)
    x = data_for(model)
    distribution = guide.posterior(x)
    expected = kl_divergence(
        Normal(distribution.mean, distribution.variance.sqrt()), Normal(torch.zeros(3), torch.ones(3))
    )
    got = latent_kl(model, guide, x)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < (1e-10 if dtype == torch.float64 else 1e-5)


def test_latent_kl_reads_the_prior_at_a_site_of_any_name():
    mean, sigma = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    factor = torch.tensor([[0.7, 0.0], [0.4, 1.3]]).double()
    pair = function_pair(
        lambda x: dist.MultivariateNormal(x, scale_tril=factor), lambda _: dist.Normal(mean, sigma).to_event(1)
    )
    x = torch.randn(6, 2).double()
    expected = kl_divergence(Normal(x, (factor @ factor.mT).diagonal().sqrt()), Normal(mean, sigma))
    assert (latent_kl(*pair, x) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latent_kl_on_a_bounded_support_is_scipys_integral(dtype, full):
    model = IMAVAE(3, 2, prior=Beta(2, 2.0, 3.5), hidden=(8,)).to(dtype)
    family = FullRank if full else MeanField
    guide = family(3, 2, hidden=(8,), support=model.prior().support).to(dtype)
    x = torch.randn(5, 3, dtype=dtype)
    got = latent_kl(model, guide, x, block=2)
    assert (got.shape, got.dtype) == ((5, 2), torch.float64)
    with torch.no_grad():
        base = guide.posterior(x).base_dist
    for n, k in ((0, 0), (3, 1)):
        mean, sigma = float(base.mean[n, k]), float(base.variance[n, k]) ** 0.5

        def integrand(u, mean=mean, sigma=sigma):
            z = scipy.special.expit(u)
            slope = z * (1 - z)
            ratio = scipy.stats.norm.logpdf(u, mean, sigma) - scipy.stats.beta.logpdf(z, 2, 3.5) - math.log(slope)
            return scipy.stats.norm.pdf(u, mean, sigma) * ratio

        expected = scipy.integrate.quad(integrand, mean - 10 * sigma, mean + 10 * sigma, epsabs=1e-12)[0]
        assert float(got[n, k]) == pytest.approx(expected, abs=1e-9 if dtype == torch.float64 else 1e-5)


def test_latent_kl_serves_priors_that_are_not_gaussian():
    x = torch.randn(6, 2).double()
    pair = function_pair(
        lambda x: dist.Normal(x, 0.5).to_event(1), lambda x: dist.Laplace(0 * x, 2.0 + 0 * x).to_event(1)
    )
    distribution, prior = Normal(x, torch.tensor(0.5).double()), torch.distributions.Laplace(0.0 * x, 2.0)
    z = distribution.sample((50_000,))
    ratio = distribution.log_prob(z) - prior.log_prob(z)
    assert ((latent_kl(*pair, x) - ratio.mean(0)).abs() < PASS * ratio.std(0) / 50_000**0.5).all()
    with pytest.raises(ValueError, match=r"give the guide support=model.prior\(\).support"):
        latent_kl(IMAVAE(3, 2, prior=Beta(2, 2.0, 3.5)), MeanField(3, 2), torch.zeros(4, 3))


def test_marginal_kl_falls_short_of_joint_kl_by_the_correlations():
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)  # unit variances, correlation 0.6
    pair = function_pair(lambda x: dist.MultivariateNormal(0 * x, scale_tril=factor))
    x = torch.zeros(9, 2).double()
    assert latent_kl(*pair, x).abs().max() < 1e-12
    assert mutual_information(*pair, x, seed=0).mean_kl == pytest.approx(-0.5 * math.log(1 - 0.36), abs=1e-12)


def test_mean_kl_is_torchs_divergence_of_the_joint_distributions():
    mean, sigma = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    factor = torch.tensor([[0.7, 0.0], [0.4, 1.3]]).double()
    pair = function_pair(
        lambda x: dist.MultivariateNormal(x, scale_tril=factor), lambda _: dist.Normal(mean, sigma).to_event(1)
    )
    x = torch.randn(6, 2).double()
    prior = MultivariateNormal(mean, scale_tril=sigma.diag())
    expected = kl_divergence(MultivariateNormal(x, scale_tril=factor), prior).mean().item()
    assert mutual_information(*pair, x, seed=0).mean_kl == pytest.approx(expected, rel=1e-12)


def test_exactly_the_registered_gaussian_pairs_are_read(pair):
    model, guide = pair
    x = data_for(model)
    distribution = guide.posterior(x)
    if gaussian_marginals(distribution) is None:
        for door in (latent_kl, posterior_means):
            with pytest.raises(TypeError, match=f"got {type(distribution).__name__}"):
                door(model, guide, x)
        return
    expected = kl_divergence(Normal(distribution.mean, distribution.variance.sqrt()), Normal(0.0, 1.0))
    assert torch.allclose(latent_kl(model, guide, x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(posterior_means(model, guide, x), distribution.mean.detach())


def test_reading_a_pair_leaves_the_random_state_alone():
    model, guide = LinearVAE(5, 2).double(), Linear(5, 2).double()
    before = torch.get_rng_state()
    latent_kl(model, guide, data_for(model))
    mutual_information(model, guide, data_for(model), seed=3)
    assert torch.equal(before, torch.get_rng_state())


# --- collapse --------------------------------------------------------------------------------------------


def test_collapse_is_at_least_the_share_strictly_below_epsilon():
    kl = torch.full((100, 4), 0.005)
    kl[:1, 1], kl[:2, 2], kl[:, 3] = 0.5, 0.5, 0.01
    assert collapsed(kl).tolist() == [True, True, False, False]
    assert collapsed(kl, epsilon=0.6).tolist() == [True] * 4
    assert collapsed(kl, delta=0.02).tolist() == [True, True, True, False]
    assert collapsed(kl, delta=1.0).tolist() == [True] * 4
    assert collapsed(kl, epsilon=0.0, delta=0.0).tolist() == [False] * 4
    assert collapsed(kl[:1, :1]).tolist() == [True]


@pytest.mark.parametrize("percent", [1, 7, 29, 57])
def test_exceptions_are_counted_in_whole_data_whatever_the_rounding(percent):
    for hundreds in (1, 3, 17):
        kl = torch.zeros(100 * hundreds, 2)
        kl[: percent * hundreds] = 1.0
        kl[percent * hundreds, 1] = 1.0
        assert collapsed(kl, delta=percent / 100).tolist() == [True, False]


def test_the_curve_is_the_share_of_collapsed_at_every_epsilon():
    kl = torch.randn(300, 7).square() * torch.logspace(-4, 1, 7)
    epsilons = torch.tensor([0.0, 1e-3, 0.01, 0.1, 1.0, 100.0])
    expected = [(kl < e).double().mean(0).ge(0.99).double().mean().item() for e in epsilons]
    assert collapse_curve(kl, epsilons).tolist() == expected
    assert expected[0] == 0.0
    assert expected[-1] == 1.0


def test_the_curve_steps_strictly_above_the_divergence():
    kl = torch.full((5, 2), 0.25)
    assert collapse_curve(kl, torch.tensor([0.2, 0.25, 0.3])).tolist() == [0.0, 0.0, 1.0]


def test_active_units_are_those_whose_means_vary():
    means = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.19], [0.0, 1.0, 0.0], [0.0, 1.0, 0.41]])
    variance = np.var([0, 0.19, 0, 0.41])
    assert active_units(means).tolist() == [False, False, True]
    assert active_units(means, variance + 1e-6).tolist() == [False, False, False]
    assert active_units(means, variance - 1e-6).tolist() == [False, False, True]
    assert active_units(means[:1]).tolist() == [False] * 3


# --- the linear VAE at its optimum -----------------------------------------------------------------------


@torch.no_grad()
def mean_elbo(model, guide, x):
    return AnalyticELBO().per_datum(model, guide, x).mean().item()


# Lucas et al.'s experiment on the digits, 20 latents: data, sigma^2, live latents, mean ELBO and divergence.
OPTIMA = [
    pytest.param(DIGITS, 1.0, 0, -61.159, 0.0, id="digits-1"),
    pytest.param(DIGITS, 0.5, 3, -41.274, 0.341, id="digits-0.5"),
    pytest.param(DIGITS, 0.25, 5, -22.872, None, id="digits-0.25"),
    pytest.param(DIGITS, 0.1, 12, -1.662, None, id="digits-0.1"),
    pytest.param(LOGITS, 20.0, 3, -161.016, 0.649, id="logits-20"),
]


@pytest.mark.parametrize(("data", "sigma2", "alive", "elbo", "kl"), OPTIMA)
def test_collapse_at_the_optimum_of_the_linear_vae(data, sigma2, alive, elbo, kl):
    x = data()
    model, guide, eigenvalues = optimum(x, 20, sigma2)
    assert mean_elbo(model, guide, x) == pytest.approx(elbo, abs=0.01)
    found = latent_kl(model, guide, x)
    assert int((~collapsed(found)).sum()) == alive == predicted_alive(eigenvalues, sigma2, 20)
    assert int(active_units(posterior_means(model, guide, x)).sum()) == alive
    prediction = predicted_kl(eigenvalues, sigma2, 20)
    assert (found.mean(0) - prediction).abs().max() < 1e-10
    if kl is not None:
        assert found.sum(1).mean().item() == pytest.approx(kl, abs=0.005)


@pytest.mark.parametrize(("data", "sigma2", "alive", "elbo", "kl"), OPTIMA)
def test_the_collapse_curve_at_the_optimum_is_the_closed_form(data, sigma2, alive, elbo, kl):  # noqa: ARG001
    x = data()
    model, guide, eigenvalues = optimum(x, 20, sigma2)
    # There z_k's distribution has variance sigma^2 / lambda_k and mean sqrt(lambda_k - sigma^2) / lambda_k along axis
    # k.
    lam = eigenvalues[:20].clamp(min=sigma2)
    along = (x - x.mean(0)) @ spectrum(x).eigenvectors[:, :20]
    d, mean = sigma2 / lam, along * (lam - sigma2).sqrt() / lam
    closed = 0.5 * (d - 1 - d.log() + mean.square()).numpy()
    epsilons = torch.linspace(0.001, 2.0, 50, dtype=torch.float64)
    expected = [np.mean(np.mean(closed < e, axis=0) >= 0.99) for e in epsilons.tolist()]
    assert collapse_curve(latent_kl(model, guide, x), epsilons).tolist() == expected


def test_training_collapses_the_predicted_latents():
    x, sigma2 = DIGITS(), 0.5
    model, guide, eigenvalues = optimum(x, 20, sigma2)
    for p in [model.W, model.mu, guide.V, guide.bias, guide.log_sigma]:
        p.data = 0.1 * torch.randn_like(p)

    def lbfgs(parameters):
        return LBFGS(
            parameters,
            max_iter=100,
            history_size=50,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-13,
            tolerance_change=1e-16,
        )

    assert mean_elbo(model, guide, x) < -41.274 - 1
    fit(model, guide, x, steps=5, objective=AnalyticELBO(), optimizer=lbfgs, progress=False)
    assert mean_elbo(model, guide, x) == pytest.approx(-41.274, abs=0.01)
    found = latent_kl(model, guide, x)
    assert collapsed(found).double().mean() == 0.85
    assert found.sum(1).mean().item() == pytest.approx(0.341, abs=0.005)
    assert int((~collapsed(found)).sum()) == predicted_alive(eigenvalues, sigma2, 20)
    assert (found.mean(0).sort(descending=True)[0] - predicted_kl(eigenvalues, sigma2, 20)).abs().max() < 1e-3


def test_the_prediction_sorts_pads_and_excludes_the_threshold():
    values = torch.tensor([0.5, 8.0, 2.0, 1.0])
    assert predicted_kl(values, 1.0, 6).tolist() == pytest.approx([0.5 * math.log(8), 0.5 * math.log(2), 0, 0, 0, 0])
    assert predicted_kl(values, 1.0, 1).tolist() == pytest.approx([0.5 * math.log(8)])
    assert [predicted_alive(values, s, 6) for s in (10.0, 1.0, 0.6, 0.1)] == [0, 2, 3, 4]
    assert predicted_alive(values, 0.1, 2) == 2
