"""Likelihoods and the VAE of them: probabilities against SciPy, draws, the scale-invariant noise, and bad input."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from guides import MeanField
from inference import ELBO, AnalyticKLELBO, fit, load_pair, log_weights, reconstruct, save_pair
from zoo import (
    VAE,
    BagginsReconstruction,
    BernoulliLikelihood,
    CategoricalLikelihood,
    DeepGaussianVAE,
    GaussianLikelihood,
    MixtureOfGaussians,
    OptimalNoise,
    PooledBagginsReconstruction,
    Uniform,
)

D, K, C = 3, 2, 4
# A likelihood, data of it, and SciPy's log-probability of x (N,) by the parameters h (N, P) of one dimension.
LIKELIHOODS = {
    "Bernoulli": (
        BernoulliLikelihood,
        lambda *shape: torch.randint(2, shape).double(),
        lambda x, h: scipy.stats.bernoulli.logpmf(x, scipy.special.expit(h[:, 0])),
    ),
    "Categorical": (
        lambda: CategoricalLikelihood(C),
        lambda *shape: torch.randint(C, shape).double(),
        lambda x, h: np.log(scipy.special.softmax(h, -1)[np.arange(len(x)), x.astype(int)]),
    ),
    "Gaussian": (
        GaussianLikelihood,
        lambda *shape: torch.randn(shape, dtype=torch.float64),
        lambda x, h: scipy.stats.norm.logpdf(x, h[:, 0], np.exp(h[:, 1])),
    ),
}


@pytest.fixture(params=LIKELIHOODS)
def case(request):
    make, data, log_prob = LIKELIHOODS[request.param]
    return make(), data, log_prob


def parameters_for(likelihood, *batch):
    return torch.randn(*batch, D, likelihood.num_parameters, dtype=torch.float64)


def test_the_log_probability_is_that_of_scipy(case):
    likelihood, data, reference = case
    h, x = parameters_for(likelihood, 7), data(7, D)
    expected = sum(reference(x[:, d].numpy(), h[:, d].numpy()) for d in range(D))
    torch.testing.assert_close(likelihood(h).log_prob(x), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["Bernoulli", "Categorical"])
def test_probabilities_sum_to_one_and_draws_have_them(name):
    likelihood = LIKELIHOODS[name][0]()
    h = parameters_for(likelihood)
    every = torch.tensor(list(itertools.product(range(2 if name == "Bernoulli" else C), repeat=D))).double()
    probabilities = likelihood(h).log_prob(every).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    num = 20_000
    draws = likelihood(h.expand(num, -1, -1)).sample()
    counts = (draws[:, None] == every).all(-1).double().mean(0)
    assert float(((counts - probabilities) / (probabilities * (1 - probabilities) / num).sqrt()).abs().max()) < 4
    # Planted defect: probabilities of other parameters are found out.
    other = likelihood(h + 0.2 * torch.randn_like(h)).log_prob(every).exp()
    assert float(((counts - other) / (other * (1 - other) / num).sqrt()).abs().max()) > 4


def test_mean_and_variance_are_those_of_the_draws(case):
    likelihood, _, _ = case
    distribution, num = likelihood(parameters_for(likelihood)), 20_000
    draws = distribution.expand((num,)).sample()
    assert float(((draws.mean(0) - distribution.mean) / (draws.std(0) / math.sqrt(num))).abs().max()) < 4
    squares = (draws - distribution.mean).square()
    assert float(((squares.mean(0) - distribution.variance) / (squares.std(0) / math.sqrt(num))).abs().max()) < 4


def test_draws_are_floating_and_come_under_vmap_and_traced(case):
    likelihood, _, _ = case
    h = parameters_for(likelihood, 5)
    assert likelihood(h).sample((2,)).shape == (2, 5, D)
    assert likelihood(h.float()).sample().dtype == torch.float32
    draws = vmap(lambda _: likelihood(h).sample((20,)), randomness="different")(torch.zeros(3))
    assert not torch.equal(draws[0], draws[1])
    graph = make_fx(lambda h: likelihood(h).sample())(h)
    torch.manual_seed(1)
    expected = likelihood(h).sample()
    torch.manual_seed(1)
    assert torch.equal(graph(h), expected)


# --- the model -------------------------------------------------------------------------------------


def test_a_model_scores_data_by_prior_and_likelihood(case):
    likelihood, data, reference = case
    model = VAE(D, K, likelihood=likelihood, hidden=(8,)).double()
    guide = MeanField(D, K, hidden=(8,)).double()
    x = data(6, D)
    torch.manual_seed(1)
    got = log_weights(model, guide, x, num_samples=1)[0]
    torch.manual_seed(1)
    q = guide.posterior(x)
    z = q.sample()
    h = model.network(z).reshape(6, D, -1).detach().numpy()
    expected = sum(reference(x[:, d].numpy(), h[:, d]) for d in range(D)) + scipy.stats.norm.logpdf(z).sum(-1)
    torch.testing.assert_close(got, torch.from_numpy(expected) - q.log_prob(z).detach())


def test_a_model_trains_every_parameter_with_the_objectives(case):
    likelihood, data, _ = case
    model = VAE(D, K, likelihood=likelihood, hidden=(8,), prior=MixtureOfGaussians(K, 3)).double()
    guide = MeanField(D, K, hidden=(8,)).double()
    before = [p.detach().clone() for half in (model, guide) for p in half.parameters()]
    fit(model, guide, data(20, D), steps=3, objective=ELBO(), progress=False)
    after = [p for half in (model, guide) for p in half.parameters()]
    assert all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
    assert model(n=4).shape == (4, D)
    model.check_data(model(n=4).detach())
    assert reconstruct(model, guide, data(4, D)).shape == (4, D)


def test_training_finds_the_frequencies_of_independent_pixels():
    probability = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = (torch.rand(500, D, dtype=torch.float64) < probability).double()
    model, guide = VAE(D, 1, hidden=()).double(), MeanField(D, 1, hidden=()).double()
    fit(
        model,
        guide,
        x,
        steps=400,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
        objective=AnalyticKLELBO(),
        progress=False,
    )
    got = AnalyticKLELBO(20).per_datum(model, guide, x).mean()
    frequencies = x.mean(0)
    best = (frequencies.xlogy(frequencies) + (1 - frequencies).xlogy(1 - frequencies)).sum()
    assert float((best - got).detach().abs()) < 0.02  # a few parameters' worth of 1 / (2 N) nats, and a latent unused


def test_the_default_model_alone_is_rebuilt_from_its_file(tmp_path):
    guide, z = MeanField(D, K), torch.randn(4, K)
    model = VAE(D, K, hidden=(8,))
    save_pair(tmp_path / "pair.safetensors", model, guide)
    twin, _ = load_pair(tmp_path / "pair.safetensors")
    torch.testing.assert_close(twin.decode(z), model.decode(z), rtol=0, atol=0)
    for other in (
        VAE(D, K, likelihood=GaussianLikelihood()),
        VAE(D, K, network=nn.Linear(K, D)),
        VAE(D, K, prior=Uniform(K)),
    ):
        with pytest.raises(NotImplementedError, match="cannot be rebuilt"):
            other.config()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CategoricalLikelihood(1), ValueError, "expected num_categories to be at least 2, got 1"),
        (lambda: VAE(D, K, network=nn.Linear(K, 5))(n=2), ValueError, r"output of shape \(2, 3\), got \(2, 5\)"),
        (lambda: VAE(D, K).check_data(torch.full((2, D), 0.5)), ValueError, "support of BernoulliLikelihood.*row 0"),
        (
            lambda: VAE(D, K, likelihood=CategoricalLikelihood(2)).check_data(torch.tensor([[0.0, 1, 1], [0, 0, 2]])),
            ValueError,
            "support of CategoricalLikelihood.*row 1",
        ),
        (lambda: BagginsReconstruction(D, -1.0), ValueError, "number of bits of at least zero, got -1.0"),
        (lambda: PooledBagginsReconstruction(math.inf), ValueError, "number of bits of at least zero, got inf"),
        (lambda: BagginsReconstruction(2).freeze(torch.tensor([1.0, 0.0])), ValueError, "positive finite sigma"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_data_outside_the_support_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="support of BernoulliLikelihood"):
        fit(VAE(D, K), MeanField(D, K), torch.randn(9, D), steps=1, progress=False)


# --- noise of the batch that knows no units --------------------------------------------------------

NOISES = {"per-dimension": lambda: BagginsReconstruction(D, 3.0), "pooled": lambda: PooledBagginsReconstruction(3.0)}


def skewed_data(num=60):
    return 1 + torch.randn(num, D, dtype=torch.float64) @ torch.randn(D, D, dtype=torch.float64)


def gaussian_pair(x, noise):
    torch.manual_seed(3)
    model = DeepGaussianVAE(D, K, hidden=(8,), noise=noise).double().standardise_by(x)
    return model, MeanField(D, K, hidden=(8,)).double().standardise_by(x)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_variance_is_residuals_and_a_share_of_the_data(pooled):
    x, mean = skewed_data(), torch.randn(60, D, dtype=torch.float64)
    noise = NOISES["pooled" if pooled else "per-dimension"]().double()
    r = (x - mean).numpy()
    v = np.mean(r**2, 0) + 2.0**-6 * np.var(x.numpy(), 0)
    v = np.full(D, v.mean()) if pooled else v
    expected = -0.5 * (np.log(2 * np.pi * v) + r**2 / v).sum(-1)
    distribution = noise(mean, torch.ones(()).double())
    torch.testing.assert_close(distribution.log_prob(x), torch.from_numpy(expected))
    # The same residuals once more are the same batch.
    torch.testing.assert_close(distribution.expand((4, 60)).log_prob(x), torch.from_numpy(expected).expand(4, 60))


@pytest.mark.parametrize("name", NOISES)
def test_a_dimension_tells_at_most_its_bits(name):
    x = skewed_data()
    v = x.var(0, correction=0)
    perfect = NOISES[name]().double()(x, torch.ones(()).double()).log_prob(x).mean()
    v = v.mean().expand(D) if name == "pooled" else v
    ignorant = torch.distributions.Normal(x.mean(0), v.sqrt()).log_prob(x).sum(-1).mean()
    # A Gaussian without the latent loses half a nat a dimension to its residuals, which a perfect mean does not.
    torch.testing.assert_close(perfect - ignorant, torch.tensor(D * (3.0 * math.log(2) + 0.5)).double())


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("c", [1e-3, 1e3])
def test_the_elbo_of_data_in_other_units_differs_by_the_volume(name, c):
    values, x = [], skewed_data()
    for factor in (1.0, c):
        model, guide = gaussian_pair(factor * x, NOISES[name]())
        fit(model, guide, factor * x, steps=100, objective=AnalyticKLELBO(), seed=5, progress=False)
        torch.manual_seed(6)
        in_training = AnalyticKLELBO(10).per_datum(model, guide, factor * x).mean()
        torch.manual_seed(6)
        model.freeze(guide, factor * x, num_samples=10)
        values.append((in_training, log_weights(model, guide, factor * x, num_samples=100).mean()))
    for one, scaled in zip(*values, strict=True):
        assert abs(float((scaled + D * math.log(c) - one).detach())) < 1e-3


def test_noise_with_units_of_its_own_fails_the_check_of_units():
    x, values = skewed_data(), []
    for factor in (1.0, 1e3):
        distribution = VAE(D, K, likelihood=GaussianLikelihood(), hidden=(8,)).double()
        torch.manual_seed(3)
        nn.init.zeros_(distribution.network[-1].weight)
        nn.init.zeros_(distribution.network[-1].bias)
        values.append(distribution.likelihood(torch.zeros(60, K, dtype=torch.float64)).log_prob(factor * x).mean())
    assert abs(float((values[1] + D * math.log(1e3) - values[0]).detach())) > 1e3


@pytest.mark.parametrize("name", NOISES)
def test_frozen_noise_is_that_of_the_training_data(name):
    x = skewed_data()
    model, guide = gaussian_pair(x, NOISES[name]())
    with pytest.raises(ValueError, match=r"Baggins.*not frozen"):
        log_weights(model, guide, x, num_samples=2)
    with pytest.raises(RuntimeError, match="expected frozen noise to sample from"):
        model(n=3)
    torch.manual_seed(1)
    model.freeze(guide, x)
    torch.manual_seed(1)
    r = x - model.decode(guide.posterior(x).sample())
    v = r.square().mean(0) + 2.0**-6 * x.var(0, correction=0)
    v = v.mean(-1, keepdim=True) if name == "pooled" else v
    torch.testing.assert_close(model.sigma, v.sqrt().detach())
    assert log_weights(model, guide, x[:1], num_samples=2).shape == (2, 1)


def test_optimal_noise_is_the_pooled_one_of_many_bits():
    x, mean, one = skewed_data(), torch.randn(60, D, dtype=torch.float64), torch.ones(()).double()
    got = PooledBagginsReconstruction(40.0).double()(mean, one).log_prob(x)
    torch.testing.assert_close(got, OptimalNoise().double()(mean, one).log_prob(x))
