"""Priors: densities against SciPy and quadrature, draws against densities, what is learnt, and pairs with a prior."""

import copy
import itertools
import math
import sys

import pytest
import scipy.stats
import torch
from torch import nn
from torch.distributions import Distribution, biject_to, kl_divergence
from torch.func import jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from guides import FullRank, MeanField
from inference import ELBO, AnalyticKLELBO, fit, load_pair, log_weights, save_pair
from inference.distributions.gaussian import DiagNormal
from zoo import (
    AutoregressiveFlow,
    Beta,
    DeepGaussianVAE,
    FloatingPrior,
    Laplace,
    LearntBeta,
    LearntDiagonal,
    MixtureOfGaussians,
    StandardNormal,
    Uniform,
    VampPrior,
)

D, K = 5, 2


def randomised(prior, std=0.5):
    """The prior in float64 with its parameters moved, so that no coordinate is like another."""
    prior = prior.double()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=std)
    return prior


def vamp(num_data=20, num_components=3):
    guide = MeanField(D, K, hidden=(8,)).double()
    return VampPrior(K, num_components, guide, torch.randn(num_data, D, dtype=torch.float64))


PRIORS = {
    "StandardNormal": lambda: StandardNormal(K).double(),
    "Uniform": lambda: Uniform(K, -0.5, 2.0).double(),
    "Laplace": lambda: Laplace(K).double(),
    "Beta": lambda: Beta(K, 2.5, 1.5).double(),
    "LearntBeta": lambda: LearntBeta(K, 3.0, 2.0).double(),
    "LearntDiagonal": lambda: randomised(LearntDiagonal(K)),
    "MixtureOfGaussians": lambda: randomised(MixtureOfGaussians(K, 3)),
    "VampPrior": vamp,
    "AutoregressiveFlow": lambda: randomised(AutoregressiveFlow(K, num_transforms=2, hidden=(8,)), std=0.3),
}
LEARNT = ["LearntBeta", "LearntDiagonal", "MixtureOfGaussians", "VampPrior", "AutoregressiveFlow"]


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]()


def grid(distribution, step=0.05, reach=20.0):
    """Points z (S, K) and weights (S,) of the trapezoidal rule, in unconstrained space where the support has edges."""
    line = torch.arange(-reach, reach, step, dtype=torch.float64)
    u = torch.cartesian_prod(*[line] * K)
    to_support = biject_to(distribution.support)
    z = to_support(u)
    return z, (to_support.log_abs_det_jacobian(u, z) + K * math.log(step)).exp()


def references(prior):
    """SciPy's distributions of the coordinates, or nothing."""
    normal, uniform, beta = scipy.stats.norm, scipy.stats.uniform, scipy.stats.beta
    if isinstance(prior, LearntBeta):
        return [beta(math.exp(a), math.exp(b)) for a, b in zip(prior.log_a.tolist(), prior.log_b.tolist())]
    if isinstance(prior, LearntDiagonal):
        return [normal(m, math.exp(s)) for m, s in zip(prior.loc.tolist(), prior.log_sigma.tolist())]
    distributions = {
        StandardNormal: normal(),
        Uniform: uniform(-0.5, 2.5),
        Laplace: scipy.stats.laplace(),
        Beta: beta(2.5, 1.5),
    }
    return [distributions[type(prior)]] * K


@pytest.mark.parametrize("name", ["StandardNormal", "Uniform", "Laplace", "Beta", "LearntBeta", "LearntDiagonal"])
def test_the_density_is_that_of_scipy(name):
    prior = PRIORS[name]()
    for parameter in prior.parameters():
        nn.init.normal_(parameter)
    z = biject_to(prior().support)(torch.randn(4, 3, K, dtype=torch.float64))
    distributions = references(prior)
    expected = sum(
        torch.from_numpy(distribution.logpdf(z[..., k].numpy())) for k, distribution in enumerate(distributions)
    )
    torch.testing.assert_close(prior().log_prob(z), expected)


def test_the_density_of_a_mixture_is_the_sum_of_its_parts():
    prior = PRIORS["MixtureOfGaussians"]()
    z = torch.randn(7, K, dtype=torch.float64)
    weights, loc, sigma = prior.logits.softmax(0).tolist(), prior.loc.detach(), prior.log_sigma.exp().detach()
    density = sum(
        w * scipy.stats.multivariate_normal(loc[c], sigma[c].square().diag()).pdf(z) for c, w in enumerate(weights)
    )
    torch.testing.assert_close(prior().log_prob(z).exp(), torch.from_numpy(density))


def test_a_vamp_prior_is_the_mean_posterior_of_its_pseudo_inputs():
    x = torch.randn(3, D, dtype=torch.float64)
    guide = FullRank(D, K, hidden=(8,)).double()
    prior, z = VampPrior(K, 3, guide, x), torch.randn(7, 1, K, dtype=torch.float64)
    expected = guide.posterior(x).log_prob(z).exp().mean(-1)
    torch.testing.assert_close(prior().log_prob(z.squeeze(1)).exp(), expected)
    assert {tuple(row) for row in prior.pseudo_inputs.tolist()} == {tuple(row) for row in x.tolist()}


def test_the_density_integrates_to_one(prior):
    distribution = prior()
    # The rule is exact to rounding for smooth distributions; kinks, of Laplace or of the flow's ReLU, cost O(step^2).
    kinks = isinstance(prior, Laplace | AutoregressiveFlow)
    for step in (0.05, 0.06):
        z, weights = grid(distribution, step)
        assert abs(float((distribution.log_prob(z).exp() * weights).sum().detach()) - 1) < (step**2 if kinks else 1e-6)


def test_the_density_of_a_flow_is_that_of_its_jacobian():
    distribution, z = PRIORS["AutoregressiveFlow"]()(), torch.randn(7, K, dtype=torch.float64)
    jacobian = vmap(jacrev(distribution.transform))(z)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(distribution.transform(z)).sum(-1)
    torch.testing.assert_close(distribution.log_prob(z), normal + jacobian.det().abs().log())


def moments(prior):
    """First and second moments of the coordinates and E[z_1 z_2] of the distribution by quadrature."""
    distribution = prior()
    z, weights = grid(distribution)
    weights = weights * distribution.log_prob(z).exp()
    return weights @ z, weights @ z.square(), weights @ z.prod(-1)


def test_draws_have_the_moments_of_the_density(prior):
    num = 20_000
    draws = prior().expand((num,)).sample().detach()
    mean, second, product = (m.detach() for m in moments(prior))
    for got, expected in [(draws, mean), (draws.square(), second), (draws.prod(-1), product)]:
        error = got.std(0) / math.sqrt(num)
        assert float(((got.mean(0) - expected) / error).abs().max()) < 4
    # Planted defect: the distribution shifted by a tenth of its standard deviation is found out.
    shifted = draws + 0.1 * draws.std(0)
    assert float(((shifted.mean(0) - mean) / (draws.std(0) / math.sqrt(num))).abs().max()) > 4


@pytest.mark.parametrize("name", ["MixtureOfGaussians", "VampPrior"])
def test_the_moments_of_a_mixture_are_those_of_its_density(name):
    prior = PRIORS[name]()
    mean, second, _ = moments(prior)
    distribution = prior().expand((3,))
    torch.testing.assert_close(distribution.mean, mean.expand(3, K))
    torch.testing.assert_close(distribution.variance, (second - mean.square()).expand(3, K))


def test_draws_of_many_components_come_in_equal_chunks(monkeypatch):
    monkeypatch.setattr("zoo.priors.mixture._MAX_ELEMENTS", 100)
    test_draws_have_the_moments_of_the_density(PRIORS["MixtureOfGaussians"]())


def test_a_distribution_is_of_one_latent_and_expands(prior):
    distribution = prior()
    assert (distribution.batch_shape, distribution.event_shape) == ((), (K,))
    assert not distribution._validate_args
    wide = distribution.expand((3, 4))
    z = wide.sample((2,))
    assert z.shape == (2, 3, 4, K)
    assert wide.batch_shape == (3, 4)
    torch.testing.assert_close(wide.log_prob(z), distribution.log_prob(z))
    assert bool(distribution.support.check(z).all())
    to_support = biject_to(distribution.support)
    torch.testing.assert_close(to_support(to_support.inv(z)), z)


def test_a_distribution_is_drawn_under_vmap_and_traced(prior):
    draws = vmap(lambda _: prior().sample((3,)), randomness="different")(torch.zeros(4))
    assert draws.shape == (4, 3, K)
    assert len({tuple(row) for row in draws.flatten(0, 1).tolist()}) == 12
    graph = make_fx(lambda shift: prior().sample((3,)) + shift)(draws.new_zeros(()))
    torch.manual_seed(1)
    expected = prior().sample((3,))
    torch.manual_seed(1)
    torch.testing.assert_close(graph(draws.new_zeros(())), expected)


def test_a_prior_follows_dtype_and_has_no_state_but_its_own(prior):
    if not isinstance(prior, VampPrior):  # its guide is moved with the pair
        single = copy.deepcopy(prior).float()
        assert single().sample().dtype == torch.float32
    assert prior().sample().dtype == torch.float64
    assert not [key for key in prior.state_dict() if "guide" in key or "encoder" in key]


@pytest.mark.parametrize("name", LEARNT)
def test_gradients_reach_everything_learnt(name):
    prior = PRIORS[name]()
    z = biject_to(prior().support)(torch.randn(6, K, dtype=torch.float64))
    prior().log_prob(z).sum().backward()
    modules = [prior, prior._guide[0]] if name == "VampPrior" else [prior]
    assert all(bool((p.grad != 0).any()) for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", LEARNT)
def test_maximum_likelihood_recovers_the_true_parameters(name):
    truth, prior = PRIORS[name](), PRIORS[name]()
    modules = [prior, prior._guide[0]] if name == "VampPrior" else [prior]
    parameters = [p for module in modules for p in module.parameters()]
    with torch.no_grad():
        train, test = truth().sample((2000,)), truth().sample((2000,))
        for p in parameters:
            p += 0.3 * torch.randn_like(p)
        before = truth().log_prob(test) - prior().log_prob(test)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (-prior().log_prob(train).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        gap = truth().log_prob(test) - prior().log_prob(test)
    # The fit's own error: half a nat per parameter and data point, were the model regular.
    num = sum(p.numel() for p in parameters)
    assert float(gap.mean()) < num / len(train) + 4 * float(gap.std()) / math.sqrt(len(test))
    assert float(before.mean()) > 4 * float(before.std()) / math.sqrt(len(test))


def test_a_learnt_gaussian_has_the_closed_form_of_kl():
    p = PRIORS["LearntDiagonal"]()()
    q = DiagNormal(torch.randn(4, K, dtype=torch.float64), torch.rand(4, K, dtype=torch.float64) + 0.5)
    reference = kl_divergence(torch.distributions.Normal(q.loc, q.sigma), torch.distributions.Normal(p.loc, p.sigma))
    torch.testing.assert_close(kl_divergence(q, p), reference.sum(-1))


# --- pairs -----------------------------------------------------------------------------------------


def pair_with(prior, guide=None):
    return DeepGaussianVAE(D, K, hidden=(8,), prior=prior).double(), guide or MeanField(D, K, hidden=(8,)).double()


def rows(num=30):
    return torch.randn(num, D, dtype=torch.float64) + torch.randn(num, 1, dtype=torch.float64)


def make_pair(name):
    prior = PRIORS[name]()
    support = prior().support
    guide = prior._guide[0] if name == "VampPrior" else MeanField(D, K, hidden=(8,), support=support).double()
    return pair_with(prior, guide)


@pytest.mark.parametrize("name", PRIORS)
def test_a_pair_trains_its_prior_and_has_the_written_log_weights(name):
    model, guide = make_pair(name)
    x, before = rows(), [p.detach().clone() for half in (model, guide) for p in half.parameters()]
    fit(model, guide, x, steps=3, objective=ELBO(), progress=False)
    after = [p for half in (model, guide) for p in half.parameters()]
    assert all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
    torch.manual_seed(1)
    got = log_weights(model, guide, x, num_samples=1)
    torch.manual_seed(1)
    z = guide.posterior(x).sample()
    expected = model.prior_module().log_prob(z) + model.likelihood(z).log_prob(x) - guide.posterior(x).log_prob(z)
    torch.testing.assert_close(got.squeeze(0), expected.detach())
    assert model(n=4).shape == (4, D)


@pytest.mark.parametrize("name", PRIORS)
def test_a_pair_goes_through_a_file_with_its_prior(name, tmp_path):
    model, guide = make_pair(name)
    save_pair(tmp_path / "pair.safetensors", model, guide)
    if name != "StandardNormal":
        with pytest.raises(ValueError, match="cannot be rebuilt"):
            load_pair(tmp_path / "pair.safetensors")
    twin = load_pair(tmp_path / "pair.safetensors", *make_pair(name))
    x, z = rows(), biject_to(model.prior().support)(torch.randn(4, K, dtype=torch.float64))
    torch.testing.assert_close(twin[0].prior().log_prob(z), model.prior().log_prob(z), rtol=0, atol=0)
    torch.manual_seed(1)
    expected = log_weights(model, guide, x, num_samples=3)
    torch.manual_seed(1)
    torch.testing.assert_close(log_weights(*twin, x, num_samples=3), expected, rtol=0, atol=0)


def test_a_copied_pair_with_a_vamp_prior_shares_nothing():
    model, guide = make_pair("VampPrior")
    twin_model, twin_guide = copy.deepcopy((model, guide))
    assert twin_model.prior_module._guide[0] is twin_guide
    assert not {id(p) for p in twin_guide.parameters()} & {id(p) for p in guide.parameters()}
    assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}


def test_a_prior_without_closed_form_of_kl_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="between DiagNormal and Mixture: use the objective ELBO"):
        AnalyticKLELBO().loss(*make_pair("MixtureOfGaussians"), rows())


# --- the floating prior ----------------------------------------------------------------------------


def floating_pair(guide=None):
    return pair_with(FloatingPrior(K).double(), guide)


def test_the_rate_is_that_of_bilbo_with_its_gradient():
    model, guide = floating_pair()
    x = rows()
    mean, sigma = guide.posterior(x).mean, torch.ones(1, dtype=torch.float64)
    rate = kl_divergence(DiagNormal(mean, sigma), model.prior()).mean()
    expected = 0.5 * (1 + mean.square().mean(0)).log().sum()
    assert abs(float((rate - expected).detach())) < 1e-10
    parameters = list(guide.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(rate, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)
    )


@pytest.mark.parametrize("family", [MeanField, FullRank])
def test_the_floating_prior_is_the_best_of_zero_mean_gaussians(family):
    model, guide = floating_pair(family(D, K, hidden=(8,)).double())
    x = rows()
    with torch.no_grad():
        q = guide.posterior(x)
    best = kl_divergence(q, model.prior()).mean()
    second = (q.mean.square() + q.variance).mean(0)
    zero = torch.zeros(K, dtype=torch.float64)
    torch.testing.assert_close(best, kl_divergence(q, DiagNormal(zero, second.sqrt())).mean())
    for factor in (0.9, 1.1):
        assert float(kl_divergence(q, DiagNormal(zero, factor * second.sqrt())).mean()) > float(best)


def test_scored_by_samples_the_floating_prior_fits_the_samples():
    z = torch.randn(6, 5, K, dtype=torch.float64)
    var = z.square().mean((0, 1))
    expected = torch.distributions.Normal(torch.zeros_like(var), var.sqrt()).log_prob(z).sum(-1)
    torch.testing.assert_close(FloatingPrior(K).double()().expand((6, 5)).log_prob(z), expected)


def test_a_floating_prior_is_refused_until_frozen_then_gaussian():
    model, guide = floating_pair()
    x, prior = rows(3000), model.prior_module
    fit(model, guide, x[:50], steps=3, objective=AnalyticKLELBO(), progress=False)
    with pytest.raises(ValueError, match=r"got FloatingPrior in DeepGaussianVAE, 'prior_module' not frozen"):
        log_weights(model, guide, x, num_samples=2)
    with pytest.raises(RuntimeError, match="expected a frozen prior to sample from"):
        model(n=3)
    prior.freeze(guide, x)
    q = guide.posterior(x)
    torch.testing.assert_close(prior.second_moment, (q.mean.square() + q.variance).mean(0).detach())
    assert type(prior()) is DiagNormal
    assert model(n=3).shape == (3, D)
    torch.manual_seed(1)
    together = log_weights(model, guide, x[:6], num_samples=1)
    torch.manual_seed(1)
    torch.testing.assert_close(log_weights(model, guide, x[:1], num_samples=1), together[:, :1])
    model.train()
    with pytest.raises(ValueError, match="in train mode"):
        log_weights(model, guide, x, num_samples=2)


# --- bad input -------------------------------------------------------------------------------------


class Wordless(nn.Module):
    def forward(self):
        return 1.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Uniform(K, 1.0, 0.0), ValueError, "expected finite bounds, low below high, got 1.0 and 0.0"),
        (lambda: Uniform(K, 0.0, math.inf), ValueError, "expected finite bounds"),
        (lambda: Beta(K, 0.0, 1.0), ValueError, "expected a to be positive and finite, got 0.0"),
        (lambda: LearntBeta(K, 1.0, math.nan), ValueError, "expected b to be positive and finite, got nan"),
        (lambda: StandardNormal(0), ValueError, "expected latent_dim to be at least 1, got 0"),
        (lambda: MixtureOfGaussians(K, 0), ValueError, "expected num_components to be at least 1, got 0"),
        (lambda: VampPrior(K, 3, nn.Linear(D, K), torch.zeros(9, D)), TypeError, "posterior.x., got Linear"),
        (lambda: vamp(2), ValueError, r"expected data_init of at least 3 rows, got \(2, 5\)"),
        (lambda: DeepGaussianVAE(D, K, prior=StandardNormal(3)), ValueError, r"event \(2,\), got \(\) and \(3,\)"),
        (lambda: DeepGaussianVAE(D, K, prior=StandardNormal(K)()), TypeError, "an nn.Module .*, got DiagNormal"),
        (lambda: DeepGaussianVAE(D, K, prior=Wordless()), TypeError, "to return a distribution, got float"),
        (
            lambda: FloatingPrior(K).double().freeze(nn.Linear(D, K).double(), rows()),
            ValueError,
            "site 'z', got Linear with",
        ),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_without_zuko_a_flow_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ImportError, match=r"pip install elbozoo\[flows\]"):
        AutoregressiveFlow(K)


def test_a_flow_leaves_validation_as_it_was(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    before = Distribution._validate_args
    AutoregressiveFlow(K)
    assert Distribution._validate_args == before


def test_a_flow_draws_the_inverse_of_its_density_transform():
    distribution = PRIORS["AutoregressiveFlow"]()()
    z = distribution.rsample((5,))
    u, _ = distribution.transform.call_and_ladj(z)
    torch.testing.assert_close(distribution.transform.inv(u), z)


def test_priors_with_different_parameters_differ():
    z = torch.full((K,), 0.3, dtype=torch.float64)
    values = {name: float(make()().log_prob(z).detach()) for name, make in PRIORS.items()}
    assert all(abs(a - b) > 1e-6 for a, b in itertools.combinations(values.values(), 2))
