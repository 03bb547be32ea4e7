"""The deep Gaussian VAE: it is the linear model where its network is, for each of the four kinds of noise."""

import math

import pytest
import torch
from torch import nn

from guides import ConvEncoder, FullRank, Linear, MeanField
from inference import ELBO, AnalyticKLELBO, Importance, compare, elbo, evidence, fit, log_weights
from zoo import (
    PPCA,
    ConvDecoder,
    DeepGaussianVAE,
    FixedNoise,
    LearntNoise,
    LearntNoisePerDim,
    LinearVAE,
    OptimalNoise,
    digits,
    linear_gaussian,
)

QUIET = {"progress": False}
NOISES = {
    "fixed": lambda: FixedNoise(0.7),
    "learnt": lambda: LearntNoise(0.7),
    "learnt per dimension": lambda: LearntNoisePerDim(5, 0.7),
}


def linear_twin(noise, x=None):
    """A deep model with a linear network, and the linear model of the same distribution."""
    torch.manual_seed(0)
    deep = DeepGaussianVAE(5, 2, network=nn.Linear(2, 5), noise=noise).double()
    linear = LinearVAE(5, 2, sigma=0.7).double()
    with torch.no_grad():
        linear.W.copy_(deep.network.weight)
        linear.mu.copy_(deep.network.bias)
    if x is not None:
        deep.standardise_by(x)
        linear.standardise_by(x)
    return deep, linear


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("make_noise", NOISES.values(), ids=NOISES)
def test_with_a_linear_network_it_is_the_linear_model(make_noise, standardised):
    x = 3 + 2 * torch.randn(6, 5).double()
    deep, linear = linear_twin(make_noise(), x if standardised else None)
    z = torch.randn(4, 6, 2).double()
    torch.testing.assert_close(deep.decode(z), linear.decode(z))
    torch.testing.assert_close(deep.likelihood(z).log_prob(x), linear.likelihood(z).log_prob(x))
    assert evidence(deep, x, method="importance", guide=MeanField(5, 2).double(), seed=0).value.shape == (6,)


def test_importance_sampling_finds_the_evidence_of_the_linear_twin():
    x = torch.randn(6, 5).double()
    deep, linear = linear_twin(LearntNoise(0.7))
    guide = FullRank(5, 2).double()
    fit(deep.requires_grad_(False), guide, x, steps=500, objective=AnalyticKLELBO(16), seed=0, **QUIET)
    estimate = evidence(deep, x, method=Importance(20_000), guide=guide, seed=0)
    z = (estimate.value - linear.log_evidence(x)) / estimate.standard_error
    assert z.abs().max() < 4


@pytest.mark.parametrize("sigma", [1e-3, 1e-2, 1.0, math.sqrt(1e3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_likelihood_is_accurate_from_small_to_large_noise(sigma, dtype):
    model = DeepGaussianVAE(50, 3, noise=FixedNoise(sigma)).to(dtype)
    z = torch.randn(7, 3, dtype=dtype)
    x = (model.decode(z) + sigma * torch.randn(7, 50)).to(dtype).detach()
    got = model.likelihood(z).log_prob(x).double()
    residual = (x.double() - model.decode(z).double()) / sigma
    expected = (-0.5 * residual.square() - math.log(sigma) - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-3)


def test_float32_training_is_stable_from_small_and_from_large_noise():
    x = digits(dtype=torch.float32).train
    for variance in (1e-6, 1e3):
        model = DeepGaussianVAE(64, 4, noise=LearntNoise(math.sqrt(variance))).standardise_by(x)
        guide = MeanField(64, 4).standardise_by(x)
        optimizer = lambda p: torch.optim.Adam(p, lr=1e-3)  # noqa: E731
        history = fit(model, guide, x, steps=200, batch_size=256, optimizer=optimizer, seed=0, **QUIET)
        assert history.loss[-1] < history.loss[0]
        assert 1e-6 < model.noise.sigma.item() ** 2 < 1e3


# --- noise fitted to the batch -----------------------------------------------------------------------------------


def optimal_pair():
    x = linear_gaussian(200, 5, 2, sigma=0.4).train
    torch.manual_seed(0)
    model = DeepGaussianVAE(5, 2, network=nn.Linear(2, 5), noise=OptimalNoise()).double().standardise_by(x)
    return model, Linear(5, 2).double().standardise_by(x), x


def test_optimal_noise_scores_a_batch_as_the_best_sigma_would():
    mean, x = torch.randn(8, 5).double(), torch.randn(8, 5).double()
    distribution = OptimalNoise().double()(mean, torch.ones(()).double())
    variances = torch.linspace(0.5, 4, 2001).double()
    losses = [torch.distributions.Normal(mean, v.sqrt()).log_prob(x).sum() for v in variances]
    assert float(distribution.log_prob(x).sum()) >= float(max(losses))
    assert float(distribution.log_prob(x).sum()) == pytest.approx(float(max(losses)), abs=1e-4)


@pytest.mark.slow
def test_training_with_optimal_noise_reaches_the_linear_maximum():
    model, guide, x = optimal_pair()
    fit(
        model,
        guide,
        x,
        steps=3000,
        objective=AnalyticKLELBO(),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / 3000)),
        seed=0,
        **QUIET,
    )
    model.freeze(guide, x, num_samples=50)
    best = PPCA.from_data(x, 2)
    weights = log_weights(model, guide, x, num_samples=500)
    gap = best.log_evidence(x).mean().item() - elbo(weights).value.mean().item()
    assert -0.01 < gap < 0.05
    assert model.sigma.item() == pytest.approx(best.sigma.item(), rel=0.05)


def test_noise_of_the_batch_is_refused_by_name_until_it_is_frozen():
    model, guide, x = optimal_pair()
    for train in (True, False):
        model.train(train)
        for measure in (
            lambda: log_weights(model, guide, x, num_samples=3),
            lambda: evidence(model, x, method="importance", guide=guide),
            lambda: compare(model, {"guide": guide}, x, num_samples=3, progress=False),
        ):
            with pytest.raises(ValueError, match=r"got OptimalNoise in DeepGaussianVAE, 'noise' not frozen"):
                measure()
    with pytest.raises(RuntimeError, match="expected frozen noise to sample from"):
        model(n=3)
    model.freeze(guide, x)
    assert log_weights(model, guide, x, num_samples=3).shape == (3, 200)
    assert model(n=3).shape == (3, 5)
    with pytest.raises(ValueError, match=r"in train mode: call \.eval"):
        log_weights(model.train(), guide, x, num_samples=3)


def test_only_optimal_noise_can_be_frozen():
    with pytest.raises(TypeError, match="expected OptimalNoise to freeze, got LearntNoise"):
        DeepGaussianVAE(5, 2).freeze(MeanField(5, 2), torch.zeros(3, 5))


# --- networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (1, 28, 28), (3, 7, 5)])
def test_convolutional_networks_fit_images_of_any_size(shape):
    data_dim = math.prod(shape)
    x = torch.randn(6, data_dim)
    model = DeepGaussianVAE(data_dim, 3, network=ConvDecoder(3, shape, channels=(4, 8))).standardise_by(x)
    guide = MeanField(data_dim, 3, encoder=ConvEncoder(shape, 6, channels=(4, 8))).standardise_by(x)
    history = fit(model, guide, x, steps=30, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), seed=0, **QUIET)
    assert history.loss[-1] < history.loss[0]
    assert log_weights(model, guide, x, num_samples=4).shape == (4, 6)
    # One data point by itself gives what it gives in the batch: nothing leaks between data.
    z = torch.randn(6, 3)
    torch.testing.assert_close(model.decode(z)[2:3], model.decode(z[2:3]), rtol=1e-4, atol=1e-5)


def test_a_decoder_of_another_width_is_named():
    model = DeepGaussianVAE(5, 2, network=nn.Linear(2, 4))
    with pytest.raises(ValueError, match=r"expected the decoder's output of shape \(3, 5\), got \(3, 4\)"):
        model(n=3)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", [FixedNoise, LearntNoise, lambda s: LearntNoisePerDim(3, s), OptimalNoise().freeze])
def test_a_sigma_that_is_none_is_refused(kind, sigma):
    with pytest.raises(ValueError, match="expected a positive finite sigma, got"):
        kind(sigma)


def test_the_training_elbo_bounds_the_importance_weighted_evidence():
    x = digits(dtype=torch.float32).train[:100]
    model, guide = DeepGaussianVAE(64, 4).standardise_by(x), MeanField(64, 4).standardise_by(x)
    fit(model, guide, x, steps=300, objective=ELBO(), seed=0, **QUIET)
    weights = log_weights(model, guide, x, num_samples=500)
    bound = evidence(model, x, method=Importance(2000), guide=guide, seed=1)
    assert (elbo(weights).value.mean() - bound.mean.value) / elbo(weights).standard_error.mean() < 4
