"""Factor analysis: evidence and posterior against dense Gaussians, its maximum against scikit-learn's."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.decomposition
import torch

from inference.distributions.gaussian import DiagNormal, FullNormal
from zoo import PPCA, FactorAnalysis, digits


def data(num=500, seed=0):
    """Six coordinates of two factors, with standard deviations of the noise from 0.2 to 1.5."""
    rng = np.random.default_rng(seed)
    loadings, sigma = rng.standard_normal((6, 2)), np.linspace(0.2, 1.5, 6)
    return rng.standard_normal((num, 2)) @ loadings.T + sigma * rng.standard_normal((num, 6)) + 3


def a_model(data_dim=5, latent_dim=2):
    model = FactorAnalysis(data_dim, latent_dim).double().requires_grad_(False)
    model.mu.normal_()
    model.log_sigma.normal_()
    return model


def dense(model):
    """The distribution of x by SciPy."""
    W, sigma = model.W.detach().numpy(), model.log_sigma.detach().exp().numpy()
    return scipy.stats.multivariate_normal(model.mu.detach().numpy(), W @ W.T + np.diag(sigma**2))


@pytest.mark.parametrize(("data_dim", "latent_dim"), [(5, 2), (1, 1), (2, 4)])
def test_the_evidence_is_that_of_a_dense_gaussian(data_dim, latent_dim):
    model, x = a_model(data_dim, latent_dim), torch.randn(20, data_dim).double()
    expected = torch.from_numpy(dense(model).logpdf(x.numpy()).reshape(20))
    torch.testing.assert_close(model.log_evidence(x), expected)


def test_the_posterior_is_the_conditional_of_the_joint_gaussian():
    model, x = a_model(), torch.randn(20, 5).double()
    W, sigma = model.W.numpy(), model.log_sigma.exp().numpy()
    gain = W.T @ np.linalg.inv(W @ W.T + np.diag(sigma**2))
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.mean, torch.from_numpy((x.numpy() - model.mu.numpy()) @ gain.T))
    covariance = torch.from_numpy(np.eye(2) - gain @ W).expand(20, 2, 2)
    torch.testing.assert_close(posterior.covariance_matrix, covariance)


def test_joint_less_posterior_is_the_evidence_at_any_latent():
    model, x, z = a_model(), torch.randn(20, 5).double(), torch.randn(20, 2).double()
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    torch.testing.assert_close(joint - model.posterior(x).log_prob(z), model.log_evidence(x))


def test_little_noise_costs_no_digits_of_the_evidence():
    model = a_model()
    model.log_sigma.add_(math.log(1e-6))
    z, noise = torch.randn(20, 2).double(), torch.randn(20, 5).double()
    x = model.decode(z) + model.sigma * noise
    # In units of the noise the loadings are 1e6: a dense covariance has lost 12 digits there, so compare by the joint.
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    torch.testing.assert_close(joint - model.posterior(x).log_prob(z), model.log_evidence(x), rtol=1e-7, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_the_expected_log_likelihood_is_the_mean_over_draws(full):
    model, x, loc = a_model(), torch.randn(20, 5).double(), torch.randn(20, 2).double()
    factor = torch.tensor([[0.5, 0.0], [0.3, 0.8]], dtype=torch.float64)
    q = FullNormal(loc, factor.expand(20, 2, 2)) if full else DiagNormal(loc, factor.diagonal().expand(20, 2))
    terms = model.likelihood(q.sample((20_000,))).log_prob(x)
    error = terms.std(0) / math.sqrt(len(terms))
    assert float(((model.expected_log_likelihood(x, q) - terms.mean(0)) / error).abs().max()) < 4.5


def test_equal_noise_is_probabilistic_pca():
    model, ppca, x = a_model(), PPCA(5, 2).double(), torch.randn(20, 5).double()
    with torch.no_grad():
        model.log_sigma.fill_(-0.3)
        ppca.W.copy_(model.W)
        ppca.mu.copy_(model.mu)
        ppca.log_sigma.fill_(-0.3)
    torch.testing.assert_close(model.log_evidence(x), ppca.log_evidence(x).detach())


def test_the_maximum_is_that_of_scikit_learn():
    x = data()
    reference = sklearn.decomposition.FactorAnalysis(2, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(x)
    model = FactorAnalysis.from_data(torch.from_numpy(x), 2).requires_grad_(False)
    expected = torch.from_numpy(reference.score_samples(x))
    # scikit-learn stops by the change of the likelihood, which is flat at its maximum.
    torch.testing.assert_close(model.log_evidence(torch.from_numpy(x)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.sigma.square(), torch.from_numpy(reference.noise_variance_), rtol=1e-5, atol=0)
    assert float(model.log_evidence(torch.from_numpy(x)).mean()) >= reference.score(x) - 1e-9


def test_the_likelihood_is_stationary_at_the_fixed_point():
    x = torch.from_numpy(data())
    model = FactorAnalysis.from_data(x, 2)
    model.log_evidence(x).mean().backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-7


def test_the_evidence_does_not_depend_on_units_but_by_their_jacobian():
    x, units = torch.from_numpy(data()), torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 1e5]).double()
    one, other = (FactorAnalysis.from_data(y, 2).log_evidence(y) for y in (x, x * units))
    torch.testing.assert_close(other, one - units.log().sum(), rtol=1e-7, atol=0)


def test_on_digits_it_explains_no_less_than_ppca():
    x = digits(test_size=0).train.double()
    x = x[:, x.var(0) > 0.5]
    own, other = (kind.from_data(x, 8).log_evidence(x).mean().detach() for kind in (FactorAnalysis, PPCA))
    assert float(own - other) > 1


def test_a_noise_that_would_vanish_is_kept():
    x = torch.from_numpy(data(20))
    x = torch.cat([x, x[:, :1]], -1)  # one coordinate twice
    model = FactorAnalysis.from_data(x, 2).requires_grad_(False)
    assert bool(model.log_evidence(x).isfinite().all())
    assert float(model.sigma.square().min() / x.var(0, correction=0).min()) < 1e-6


@pytest.mark.parametrize(
    ("x", "latent_dim", "error", "message"),
    [
        (torch.ones(5, 3), 1, ValueError, "vary in every coordinate"),
        (torch.randn(5, 3), 3, ValueError, "latent_dim below the data's 3 dimensions, got 3"),
        (torch.full((5, 3), math.nan), 1, ValueError, "finite"),
        (torch.ones(5, 3, dtype=torch.int64), 1, TypeError, "floating"),
    ],
)
def test_data_without_a_maximum_are_refused(x, latent_dim, error, message):
    with pytest.raises(error, match=message):
        FactorAnalysis.from_data(x, latent_dim)


def test_too_few_steps_are_an_error():
    with pytest.raises(RuntimeError, match="converge within 2 steps"):
        FactorAnalysis.from_data(torch.from_numpy(data()), 2, max_steps=2)


def test_a_sigma_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive finite sigma, got 0"):
        FactorAnalysis(3, 1, sigma=0.0)
