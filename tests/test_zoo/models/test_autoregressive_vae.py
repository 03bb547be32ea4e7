"""The masked autoregressive decoder: what depends on what, normalisation, draws, and the pair."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

from guides import MeanField
from inference import ELBO, AnalyticKLELBO, fit, load_pair, log_weights, save_pair
from inference.core.protocols import SupportsDecoder
from zoo import VAE, AutoregressiveVAE, BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Uniform

D, K = 5, 2
LIKELIHOODS = {
    "Bernoulli": BernoulliLikelihood,
    "Categorical": lambda: CategoricalLikelihood(3),
    "Gaussian": GaussianLikelihood,
}


@pytest.fixture(params=LIKELIHOODS)
def model(request):
    return model_with(LIKELIHOODS[request.param]())


def model_with(likelihood, data_dim=D, hidden=(16, 16)):
    model = AutoregressiveVAE(data_dim, K, likelihood=likelihood, hidden=hidden).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("hidden", [(), (3,), (16, 16), (7, 16, 9)])
@pytest.mark.parametrize("data_dim", [1, 2, 5])
def test_a_dimension_depends_on_those_before_it_and_the_latent(hidden, data_dim):
    model = model_with(GaussianLikelihood(), data_dim, hidden)
    x, z = torch.randn(data_dim, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    on_x, on_z = jacrev(model.network, argnums=(0, 1))(x, z)
    before = torch.ones(data_dim, data_dim, dtype=torch.bool).tril(-1)
    assert on_x.shape == (data_dim, 2, data_dim)
    assert bool((on_x.movedim(1, -1)[~before] == 0).all())
    assert bool((on_z != 0).all())
    if not hidden or min(hidden) >= data_dim:
        assert bool((on_x.movedim(1, -1)[before] != 0).all())


@pytest.mark.parametrize("name", ["Bernoulli", "Categorical"])
def test_probabilities_of_all_data_sum_to_one(name):
    model = model_with(LIKELIHOODS[name]())
    every = torch.tensor(list(itertools.product(range(2 if name == "Bernoulli" else 3), repeat=D))).double()
    z = torch.randn(4, 1, K, dtype=torch.float64)
    total = model.likelihood(z).log_prob(every).exp().sum(-1).detach()
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    # Planted defect: a network whose dimensions see themselves does not sum to one.
    for layer in model.network.layers:
        layer.mask.fill_(1.0)
    defective = model.likelihood(z).log_prob(every).exp().sum(-1).detach()
    assert float((defective - 1).abs().max()) > 0.01


def test_the_gaussian_density_integrates_to_one():
    model = model_with(GaussianLikelihood(), data_dim=2)
    line = torch.arange(-30, 30, 0.05, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    with torch.no_grad():
        # Sigma times a small step: distributions of the grid's reach and resolution.
        model.network.layers[-1].weight.mul_(0.2)
        model.network.layers[-1].context.weight.mul_(0.2)
        total = model.likelihood(torch.zeros(K, dtype=torch.float64)).log_prob(x).exp().sum() * 0.05**2
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_the_log_probability_is_the_sum_of_conditionals():
    model = model_with(BernoulliLikelihood())
    x, z = torch.randint(2, (7, D)).double(), torch.randn(7, K, dtype=torch.float64)
    total = torch.zeros(7, dtype=torch.float64)
    for d in range(D):
        seen = torch.cat([x[:, :d], torch.full((7, D - d), 0.37, dtype=torch.float64)], -1)
        p = model.network(seen, z)[:, d, 0].sigmoid()
        total += torch.where(x[:, d] == 1, p, 1 - p).log()
    torch.testing.assert_close(model.likelihood(z).log_prob(x), total)


@pytest.mark.parametrize("name", ["Bernoulli", "Categorical"])
def test_draws_have_the_probabilities_of_the_distribution(name):
    model, num = model_with(LIKELIHOODS[name](), data_dim=3), 20_000
    for layer in model.network.layers:  # much said between dimensions, little by the latent
        nn.init.normal_(layer.weight, std=0.8)
    every = torch.tensor(list(itertools.product(range(2 if name == "Bernoulli" else 3), repeat=3))).double()
    distribution = model.likelihood(torch.randn(K, dtype=torch.float64))
    p = distribution.log_prob(every).exp().detach()
    draws = distribution.expand((num,)).sample()
    assert largest_deviation(draws, every, p) < 4
    # Planted defect: draws whose dimensions do not know of each other.
    shuffled = torch.stack([draws[torch.randperm(num), d] for d in range(3)], -1)
    assert largest_deviation(shuffled, every, p) > 4


def largest_deviation(draws, every, p):
    """Of frequencies from probabilities in standard errors, where ten draws or more are expected."""
    counts = (draws[:, None] == every).all(-1).double().mean(0)
    deviations = (counts - p) / (p * (1 - p) / len(draws)).sqrt()
    return float(deviations[p * len(draws) > 10].abs().max())


def test_gaussian_draws_whiten_to_standard_normals():
    model, num = model_with(GaussianLikelihood()), 20_000
    z = torch.randn(num, K, dtype=torch.float64)
    x = model.likelihood(z).sample()
    with torch.no_grad():
        mean, log_sigma = model.network(x, z).unbind(-1)
    noise = (x - mean) / log_sigma.exp()
    assert float(noise.mean(0).abs().max()) * math.sqrt(num) < 4
    spread = (noise.T.cov() - torch.eye(D, dtype=torch.float64)).abs()
    assert float(spread.max()) * math.sqrt(num / 2) < 4


def test_a_distribution_is_of_the_latents_batch_and_expands(model):
    z = torch.randn(3, 4, K, dtype=torch.float64)
    distribution = model.likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == ((3, 4), (D,))
    x = distribution.sample((2,))
    assert x.shape == (2, 3, 4, D)
    assert bool(distribution.support.check(x).all())
    one_by_one = torch.stack([model.likelihood(z_n).log_prob(x[0, 0, 0]) for z_n in z.flatten(0, 1)])
    torch.testing.assert_close(distribution.log_prob(x[0, 0, 0]), one_by_one.view(3, 4))
    wide = model.likelihood(z[0]).expand((6, 4))
    assert wide.sample().shape == (6, 4, D)
    torch.testing.assert_close(wide.log_prob(x[0, 0]), model.likelihood(z[0]).log_prob(x[0, 0]).expand(6, 4))


def test_draws_come_under_vmap(model):
    z = torch.randn(20, K, dtype=torch.float64)
    draws = vmap(lambda _: model.likelihood(z).sample(), randomness="different")(torch.zeros(3))
    assert draws.shape == (3, 20, D)
    assert not torch.equal(draws[0], draws[1])


def test_a_pair_trains_every_parameter_and_goes_through_a_file(model, tmp_path):
    guide, x = MeanField(D, K, hidden=(8,)).double(), model(n=20).detach()
    before = [p.detach().clone() for half in (model, guide) for p in half.parameters()]
    fit(model, guide, x, steps=3, objective=ELBO(), progress=False)
    after = [p for half in (model, guide) for p in half.parameters()]
    assert all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
    save_pair(tmp_path / "pair.safetensors", model, guide)
    rebuildable = isinstance(model.observation, BernoulliLikelihood)
    twin = load_pair(tmp_path / "pair.safetensors", None if rebuildable else model_with(type_of(model)))
    z = torch.randn(20, K, dtype=torch.float64)
    torch.testing.assert_close(twin[0].likelihood(z).log_prob(x), model.likelihood(z).log_prob(x), rtol=0, atol=0)
    assert not isinstance(model, SupportsDecoder)


def type_of(model):
    return next(make() for make in LIKELIHOODS.values() if type(make()) is type(model.observation))


def test_only_the_default_is_rebuilt_from_a_file_alone():
    for model in (AutoregressiveVAE(D, K, likelihood=GaussianLikelihood()), AutoregressiveVAE(D, K, prior=Uniform(K))):
        with pytest.raises(NotImplementedError, match="cannot be rebuilt"):
            model.config()


def test_data_outside_the_support_are_refused():
    with pytest.raises(ValueError, match="support of BernoulliLikelihood"):
        log_weights(AutoregressiveVAE(D, K), MeanField(D, K), torch.randn(9, D), num_samples=2)


def chain(num):
    """Binary chains whose neighbours agree nine times in ten: entropy log 2 + (D - 1) h(.9)."""
    flips = (torch.rand(num, D) < 0.1).long()
    flips[:, 0] = torch.randint(2, (num,))
    return (flips.cumsum(-1) % 2).double()


def test_a_powerful_decoder_ignores_the_latent_a_simple_one_cannot():
    x, h = chain(2000), -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    entropy, independent = math.log(2) + (D - 1) * h, D * math.log(2)
    bounds = {}
    for name, model in {
        "powerful": AutoregressiveVAE(D, K, hidden=(16,)).double(),
        "simple": VAE(D, K, hidden=(16,)).double(),
    }.items():
        guide = MeanField(D, K, hidden=(16,)).double()
        nn.init.zeros_(guide.encoder[-1].weight)
        guide.requires_grad_(False)  # q = N(0, 1) for every x: the latent tells nothing
        nn.init.zeros_(guide.encoder[-1].bias)
        fit(
            model,
            guide,
            x,
            steps=600,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
            objective=AnalyticKLELBO(),
            progress=False,
        )
        bounds[name] = -float(AnalyticKLELBO(20).per_datum(model, guide, x).mean().detach())
    assert bounds["powerful"] == pytest.approx(entropy, abs=0.05)
    assert bounds["simple"] == pytest.approx(independent, abs=0.05)
