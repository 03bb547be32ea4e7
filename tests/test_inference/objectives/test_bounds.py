"""ELBO <= IWAE <= evidence, and every objective against closed forms, on linear-Gaussian pairs.

Each statistical claim has a twin, in which a defect is planted and the same criterion must fail at p < 1e-6.
"""

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from registry import data_for, for_models_with
from torch import nn

from guides import Exact, FullRank, Linear, MeanField, TiedMeanField
from guides.base import Guide
from inference import ELBO, AnalyticELBO, AnalyticKLELBO, elbo, fit, iter_log_weights, iwae, log_weights, summarise
from zoo import LinearVAE, digits
from zoo.data.datasets import linear_gaussian
from zoo.linear.models import LinearGaussianModel

DATA_DIM, LATENT_DIM, NUM_DATA = 5, 2, 40
FOUR_ERRORS = float(2 * scipy.stats.norm.sf(4))
CERTAIN = 1e-6


# --- the criterion ---------------------------------------------------------------------------------


def p_value(difference, error, *, sign=0):
    """p of a normal estimate under the claim that its mean is 0, at least 0 (sign 1) or at most 0 (sign -1)."""
    z = float(difference) / float(error)
    return float(2 * scipy.stats.norm.sf(abs(z)) if sign == 0 else scipy.stats.norm.sf(-sign * z))


def assert_consistent(difference, error, *, sign=0):
    """The claim of :func:`p_value` stands within four standard errors."""
    assert 0 < float(error) < math.inf
    p = p_value(difference, error, sign=sign)
    assert p > FOUR_ERRORS, f"difference {float(difference):.3g} with standard error {float(error):.3g}: p = {p:.1g}"


def assert_refuted(difference, error, *, sign=0):
    """The same claim falls, beyond doubt."""
    with pytest.raises(AssertionError, match="p = "):
        assert_consistent(difference, error, sign=sign)
    assert p_value(difference, error, sign=sign) < CERTAIN


def data_mean(estimate):
    """Mean over the data of a estimate per data point, and its standard error for given data."""
    value, error = estimate
    return float(value.mean()), float(error.square().sum().sqrt()) / len(value)


def minus(a, b):
    """Difference of two independent (value, error)."""
    return a[0] - b[0], math.hypot(a[1], b[1])


# --- pairs -----------------------------------------------------------------------------------------


def make_model(seed=0, data_dim=DATA_DIM, latent_dim=LATENT_DIM, sigma=0.5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LinearVAE(data_dim, latent_dim, sigma=sigma).double()
        model.mu.data.normal_()
    return model.requires_grad_(False)


def closed_form_linear(model):
    """The optimal linear guide, V = M^-1 W' and D = sigma^2 / diag M, written with NumPy."""
    w, mu, var = model.W.detach().numpy(), model.mu.detach().numpy(), float(model.sigma.detach()) ** 2
    m = w.T @ w + var * np.eye(w.shape[1])
    v = np.linalg.solve(m, w.T)
    guide = Linear(*w.shape).double()
    guide.V.data, guide.bias.data = torch.from_numpy(v), torch.from_numpy(-v @ mu)
    guide.log_sigma.data = torch.from_numpy(0.5 * np.log(var / np.diag(m)))
    return guide


def trained(guide, model, x):
    fit(
        model,
        guide,
        x,
        steps=300,
        objective=AnalyticELBO(),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        seed=0,
        progress=False,
    )
    return guide


def network(family):
    return family(DATA_DIM, LATENT_DIM, hidden=(16,)).double()


MAKE_GUIDE = {
    "Exact": lambda model, _: Exact(model),
    "TiedMeanField": lambda model, _: TiedMeanField(model),
    "Linear, optimal": lambda model, _: closed_form_linear(model),
    "Linear, untrained": lambda *_: Linear(DATA_DIM, LATENT_DIM).double(),
    "Linear, trained": lambda model, x: trained(Linear(DATA_DIM, LATENT_DIM).double(), model, x),
    "MeanField, untrained": lambda *_: network(MeanField),
    "MeanField, trained": lambda model, x: trained(network(MeanField), model, x),
    "FullRank, untrained": lambda *_: network(FullRank),
    "FullRank, trained": lambda model, x: trained(network(FullRank), model, x),
}
INEXACT = [name for name in MAKE_GUIDE if name != "Exact"]
TRAINED = ["TiedMeanField", "Linear, trained", "MeanField, trained", "FullRank, trained"]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def x(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model(n=NUM_DATA)


@pytest.fixture(scope="module")
def guides(model, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return {name: make(model, x).requires_grad_(False) for name, make in MAKE_GUIDE.items()}


def weights_of(pair, x, num_samples=2000):
    return log_weights(*pair, x, num_samples=num_samples)


# --- defects ---------------------------------------------------------------------------------------


class Broken(TorchDistribution):
    """A distribution whose log-density is not that of its draws, or whose draws have no gradient."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, distribution, defect=None):
        self.distribution, self.defect = distribution, defect
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=False)

    @property
    def support(self):
        return self.distribution.support

    def expand(self, batch_shape, _instance=None):
        return Broken(self.distribution.expand(batch_shape), self.defect)

    def rsample(self, sample_shape=()):
        draws = self.distribution.rsample(sample_shape)
        return draws.detach() if self.defect is None else draws

    def log_prob(self, value):
        return self.distribution.log_prob(value) if self.defect is None else self.defect(self.distribution, value)


def log_det(distribution):
    """Log-determinant of the covariance's factor, whatever the Gaussian."""
    return distribution.log_prob(distribution.mean).neg() - 0.5 * distribution.event_shape[0] * math.log(2 * math.pi)


DEFECTS = {
    "sign": lambda distribution, z: -distribution.log_prob(z),
    "factor 2": lambda distribution, z: 2 * distribution.log_prob(z),
    "no log-determinant": lambda distribution, z: distribution.log_prob(z) + log_det(distribution),
    "no half": lambda distribution, z: 2 * distribution.log_prob(z) - distribution.log_prob(distribution.mean),
    "shifted": lambda distribution, z: distribution.log_prob(z + 0.3),
}


class BrokenGuide(Guide):
    def __init__(self, guide, defect):
        super().__init__()
        self.guide, self.defect = guide, defect

    def posterior(self, x):
        return Broken(self.guide.posterior(x), self.defect)


class BrokenModel(LinearVAE):
    """A linear VAE with a defect in its likelihood, or in its prior."""

    def __init__(self, model, *, likelihood=None, prior=None):
        super().__init__(model.data_dim, model.latent_dim)
        self.double().load_state_dict(model.state_dict())
        self.requires_grad_(False)
        self.defects = {"likelihood": likelihood, "prior": prior}

    def _broken(self, name, distribution):
        return distribution if self.defects[name] is None else Broken(distribution, self.defects[name])

    def prior(self):
        return self._broken("prior", super().prior())

    def likelihood(self, z):
        return self._broken("likelihood", super().likelihood(z))


# --- closed forms, written with NumPy --------------------------------------------------------------


def arrays(model):
    distribution = model.linear_gaussian
    return distribution.W.detach().numpy(), distribution.mu.detach().numpy(), float(distribution.sigma.detach()) ** 2


def numpy_evidence(model, x):
    w, mu, var = arrays(model)
    return scipy.stats.multivariate_normal(mu, w @ w.T + var * np.eye(len(mu))).logpdf(x.numpy())


def guide_moments(guide, x):
    """Means (N, K) and covariances (N, K, K) of a Gaussian guide."""
    distribution = guide.posterior(x)
    full = hasattr(distribution, "covariance_matrix")
    covariances = distribution.covariance_matrix if full else torch.diag_embed(distribution.variance)
    return distribution.mean.detach().numpy(), covariances.detach().numpy()


def numpy_kl(guide, x):
    """KL(q(z | x_n) || N(0, I)) from means and covariances."""
    means, covariances = guide_moments(guide, x)
    traces = np.trace(covariances, axis1=-2, axis2=-1)
    return 0.5 * (traces - np.linalg.slogdet(covariances)[1] + (means**2).sum(-1) - means.shape[1])


def numpy_elbo(model, guide, x):
    """E_q log p(x | z) - KL, for a Gaussian guide, from means and covariances."""
    w, mu, var = arrays(model)
    means, covariances = guide_moments(guide, x)
    errors = ((x.numpy() - mu - means @ w.T) ** 2).sum(1) + np.trace(w.T @ w @ covariances, axis1=-2, axis2=-1)
    return -0.5 * errors / var - 0.5 * len(mu) * math.log(2 * math.pi * var) - numpy_kl(guide, x)


def numpy_linear_elbo(w, v, d, var, y, *, trace_d=True):
    """Section 1.2's formula for q = N(V (x - mu), diag d), y = x - mu; per data point. ``trace_d`` plants a defect."""
    k, n = len(d), y.shape[1]
    recoded = y @ v.T @ w.T
    kl = 0.5 * (d.sum() - np.log(d).sum() + ((y @ v.T) ** 2).sum(1) - k)
    spread = np.trace(w @ np.diag(d) @ w.T) if trace_d else 0.0
    error = -spread - (recoded**2).sum(1) + 2 * (recoded * y).sum(1) - (y**2).sum(1)
    return error / (2 * var) - 0.5 * n * math.log(2 * math.pi * var) - kl


# --- closed forms agree ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE_GUIDE)
def test_analytic_elbo_is_the_formula(name, model, guides, x):
    got = AnalyticELBO().per_datum(model, guides[name], x)
    np.testing.assert_allclose(got.numpy(), numpy_elbo(model, guides[name], x), rtol=1e-12, atol=1e-10)


def test_analytic_elbo_is_the_formula_of_lucas_et_al(model, x):
    guide = Linear(DATA_DIM, LATENT_DIM).double().requires_grad_(False)
    guide.log_sigma.normal_()
    w, mu, var = arrays(model)
    v, d = guide.V.numpy(), np.exp(2 * guide.log_sigma.numpy())
    guide.bias.copy_(torch.from_numpy(-v @ mu))
    expected = numpy_linear_elbo(w, v, d, var, x.numpy() - mu)
    np.testing.assert_allclose(AnalyticELBO().per_datum(model, guide, x).numpy(), expected, rtol=1e-12, atol=1e-10)


@for_models_with(LinearGaussianModel)
def test_analytic_elbo_of_the_exact_posterior_is_the_evidence(make_model):
    model = make_model()
    x = data_for(model)
    got = AnalyticELBO().per_datum(model, Exact(model), x).detach()
    np.testing.assert_allclose(got.numpy(), numpy_evidence(model, x), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_gap_of_the_tied_mean_field_is_hadamards_inequality(seed):
    """At any W: log p - ELBO = 1/2 [sum_i log M_ii - log det M], the same for every data point."""
    model = make_model(seed, data_dim=6, latent_dim=4, sigma=0.3 + 0.3 * seed)
    x = data_for(model)
    w, _, var = arrays(model)
    m = w.T @ w + var * np.eye(4)
    gap = 0.5 * (np.log(np.diag(m)).sum() - np.linalg.slogdet(m)[1])
    for guide in (TiedMeanField(model), closed_form_linear(model).requires_grad_(False)):
        got = numpy_evidence(model, x) - AnalyticELBO().per_datum(model, guide, x).numpy()
        np.testing.assert_allclose(got, gap, rtol=0, atol=1e-10)
    assert gap > 0.01


def optimal_pair(x, latent_dim):
    model = LinearVAE.optimum(x, latent_dim)
    return model, closed_form_linear(model)


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("data", ["synthetic", "digits"])
def test_at_maximum_likelihood_the_elbo_is_tight_and_stationary(data, latent_dim):
    if data == "digits":
        x = digits(test_size=0).train / 16
    else:
        x = linear_gaussian(400, 8, 5, sigma=0.4).train
    model, guide = optimal_pair(x, latent_dim)
    bound = AnalyticELBO().per_datum(model, guide, x).mean()
    assert abs(float(bound.detach()) - numpy_evidence_mean(model, x)) < 1e-10
    bound.backward()
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert float(parameter.grad.abs().max()) < 1e-8, name


def numpy_evidence_mean(model, x):
    """Mean log-evidence from the data's covariance alone, by section 1.1."""
    w, mu, var = arrays(model)
    c = w @ w.T + var * np.eye(len(mu))
    y = x.numpy() - mu
    return -0.5 * (
        len(mu) * math.log(2 * math.pi) + np.linalg.slogdet(c)[1] + np.trace(np.linalg.solve(c, y.T @ y / len(y)))
    )


# --- the sandwich ----------------------------------------------------------------------------------


def gap_to(upper, lower):
    """Difference of data means and its error; ``upper`` is (value, error) or exact numbers."""
    upper = (float(np.mean(upper)), 0.0) if isinstance(upper, np.ndarray) else data_mean(upper)
    return minus(upper, data_mean(lower))


def test_the_exact_posterior_leaves_no_gap(model, guides, x):
    matrix = weights_of((model, guides["Exact"]), x, num_samples=100)
    for bound in (elbo(matrix), iwae(matrix, 10), iwae(matrix)):
        np.testing.assert_allclose(bound.value.numpy(), numpy_evidence(model, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", INEXACT)
def test_elbo_is_below_the_evidence(name, model, guides, x):
    bound = elbo(weights_of((model, guides[name]), x))
    assert_consistent(*gap_to(numpy_evidence(model, x), bound), sign=1)


@pytest.mark.parametrize(("defect", "sigma"), [("factor 2", 0.5), ("no log-determinant", 2.0), ("no half", 0.5)])
def test_a_defect_in_log_q_lifts_the_elbo_above_the_evidence(defect, sigma, x):
    # Each at a noise at which it does not happen to lower the bound: by sharp posteriors, say, log q is positive.
    model = make_model(sigma=sigma)
    bound = elbo(weights_of((model, BrokenGuide(TiedMeanField(model), DEFECTS[defect])), x))
    assert_refuted(*gap_to(numpy_evidence(model, x), bound), sign=1)


def test_a_density_of_the_wrong_sign_is_refused(model, x):
    with pytest.raises(ValueError, match="got Broken in the guide, which does not fall off"):
        weights_of((model, BrokenGuide(TiedMeanField(model), DEFECTS["sign"])), x)


@pytest.mark.parametrize("num_particles", [2, 10, 100])
@pytest.mark.parametrize("name", INEXACT)
def test_iwae_is_between_elbo_and_evidence(name, num_particles, model, guides, x):
    pair = (model, guides[name])
    bound, below = iwae(weights_of(pair, x), num_particles), elbo(weights_of(pair, x))
    assert_consistent(*gap_to(numpy_evidence(model, x), bound), sign=1)
    assert_consistent(*gap_to(bound, below), sign=1)


def without_division(matrix, num_particles):
    """The log of the *sum* of weights: an IWAE that forgot 1/K."""
    value, error = iwae(matrix, num_particles)
    return value + math.log(num_particles), error


def divided_twice(matrix, num_particles):
    value, error = iwae(matrix, num_particles)
    return value - math.log(num_particles), error


@pytest.mark.parametrize("name", TRAINED)
def test_an_iwae_without_its_division_leaves_the_sandwich(name, model, guides, x):
    pair = (model, guides[name])
    matrix, below = weights_of(pair, x), elbo(weights_of(pair, x))
    assert_refuted(*gap_to(numpy_evidence(model, x), without_division(matrix, 10)), sign=1)
    assert_refuted(*gap_to(divided_twice(matrix, 10), below), sign=1)


@pytest.mark.parametrize("name", INEXACT)
def test_iwae_increases_with_the_number_of_particles(name, model, guides, x):
    pair = (model, guides[name])
    bounds = [iwae(weights_of(pair, x), k) for k in (1, 2, 5, 20, 100)]
    for lower, upper in pairwise(bounds):
        assert_consistent(*gap_to(upper, lower), sign=1)
    # And strictly so where the guide is poor: the claim that nothing is gained falls.
    if "untrained" in name:
        assert_refuted(*gap_to(bounds[-1], bounds[0]), sign=-1)


def test_an_iwae_divided_twice_decreases(model, guides, x):
    bounds = [divided_twice(weights_of((model, guides["MeanField, trained"]), x), k) for k in (1, 2)]
    assert_refuted(*gap_to(bounds[1], bounds[0]), sign=1)


def iwae_of_a_million(pair, x):
    return summarise(iter_log_weights(*pair, x, num_samples=10**6, chunk=10**5), 10**6).iwae


@pytest.mark.parametrize("name", ["MeanField, trained", "FullRank, trained", "TiedMeanField"])
def test_iwae_of_a_million_samples_is_the_evidence(name, model, guides, x):
    x = x[:3]
    bound = iwae_of_a_million((model, guides[name]), x)
    assert float(bound.standard_error.max()) < 0.01
    for datum in range(3):
        assert_consistent(bound.value[datum] - numpy_evidence(model, x)[datum], bound.standard_error[datum])


@pytest.mark.parametrize("defect", ["no log-determinant", "no half", "factor 2"])
def test_a_defect_in_the_likelihood_is_no_evidence(defect, model, guides, x):
    broken = BrokenModel(model, likelihood=DEFECTS[defect])
    bound = summarise(iter_log_weights(broken, guides["MeanField, trained"], x[:3], num_samples=10**4), 10**4).iwae
    assert_refuted(*gap_to(numpy_evidence(model, x[:3]), bound))


# --- Monte Carlo against the closed form -----------------------------------------------------------


@pytest.mark.parametrize("name", INEXACT)
def test_monte_carlo_elbo_is_the_analytic_one(name, model, guides, x):
    bound = elbo(weights_of((model, guides[name]), x))
    assert_consistent(*gap_to(numpy_elbo(model, guides[name], x), bound))


@pytest.mark.parametrize("defect", [defect for defect in DEFECTS if defect != "sign"])
@pytest.mark.parametrize("name", ["TiedMeanField", "MeanField, trained", "FullRank, trained"])
def test_a_defect_in_log_q_is_not_the_analytic_elbo(name, defect, model, guides, x):
    bound = elbo(weights_of((model, BrokenGuide(guides[name], DEFECTS[defect])), x))
    assert_refuted(*gap_to(numpy_elbo(model, guides[name], x), bound))


@pytest.mark.parametrize("half", ["prior", "likelihood"])
@pytest.mark.parametrize("defect", ["factor 2", "no half"])
def test_a_defect_in_log_p_is_not_the_analytic_elbo(half, defect, model, guides, x):
    guide = guides["TiedMeanField"]
    bound = elbo(weights_of((BrokenModel(model, **{half: DEFECTS[defect]}), guide), x))
    assert_refuted(*gap_to(numpy_elbo(model, guide, x), bound))


def from_seed(run):
    torch.manual_seed(5)
    return run().detach().numpy()


@pytest.mark.parametrize("num_particles", [1, 7])
@pytest.mark.parametrize("name", INEXACT)
def test_the_elbo_is_the_mean_of_its_log_weights(name, num_particles, model, guides, x):
    pair = (model, guides[name])
    got = from_seed(lambda: ELBO(num_particles=num_particles).per_datum(*pair, x))
    weights = from_seed(lambda: log_weights(*pair, x, num_samples=num_particles, chunk=num_particles))
    np.testing.assert_allclose(got, weights.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", INEXACT)
def test_the_analytic_kl_leaves_noise_in_the_reconstruction_alone(name, model, guides, x):
    guide = guides[name]
    got = from_seed(lambda: AnalyticKLELBO().per_datum(model, guide, x))
    z = from_seed(lambda: guide(x))
    w, mu, var = arrays(model)
    reconstruction = scipy.stats.norm.logpdf(x.numpy(), z @ w.T + mu, math.sqrt(var)).sum(1)
    np.testing.assert_allclose(got, reconstruction - numpy_kl(guide, x), rtol=1e-11, atol=1e-11)


def repeated(objective, pair, x, repeats=200):
    """Data mean of an objective over independent runs: (value, error)."""
    values = torch.stack([objective.per_datum(*pair, x).detach().mean() for _ in range(repeats)])
    return float(values.mean()), float(values.std() / math.sqrt(repeats))


@pytest.mark.parametrize("objective", [ELBO(num_particles=5), AnalyticKLELBO(), AnalyticKLELBO(num_particles=5)])
@pytest.mark.parametrize("name", INEXACT)
def test_objectives_average_to_the_analytic_elbo(name, objective, model, guides, x):
    pair = (model, guides[name])
    exact = (float(numpy_elbo(*pair, x).mean()), 0.0)
    assert_consistent(*minus(repeated(objective, pair, x), exact))


@pytest.mark.parametrize("objective", [ELBO(num_particles=5), AnalyticKLELBO()])
def test_an_objective_without_half_its_likelihood_is_refuted(objective, model, guides, x):
    guide = guides["TiedMeanField"]
    exact = (float(numpy_elbo(model, guide, x).mean()), 0.0)
    broken = BrokenModel(model, likelihood=DEFECTS["no half"])
    assert_refuted(*minus(repeated(objective, (broken, guide), x), exact))


def plain_pyro_pair(w, v, d, mu, sigma):
    """The linear VAE in Pyro's own distributions."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(d), torch.ones_like(d)).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T + mu, sigma).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - mu) @ v.T, d.sqrt()).to_event(1))

    return model, guide


@pytest.fixture(scope="module")
def lucas():
    """N = 500, n = 6, k = 3: parameters, data, and 1500 values of Pyro's own Trace_ELBO, per data point."""
    random = np.random.RandomState(0)
    w, v, mu = random.standard_normal((6, 3)), 0.3 * random.standard_normal((3, 6)), random.standard_normal(6)
    d, sigma = random.uniform(0.2, 1.0, 3), 0.7
    x = mu + random.standard_normal((500, 3)) @ w.T + sigma * random.standard_normal((500, 6))
    tensors = [torch.from_numpy(a) for a in (w, v, d, mu)]
    pair, objective = plain_pyro_pair(*tensors, torch.tensor(sigma).double()), pyro.infer.Trace_ELBO()
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        torch.manual_seed(0)
        draws = np.array([-objective.loss(*pair, torch.from_numpy(x)) / 500 for _ in range(1500)])
    return {"w": w, "v": v, "d": d, "mu": mu, "sigma": sigma, "x": x, "draws": draws}


def lucas_pair(c):
    model, guide = LinearVAE(6, 3, sigma=c["sigma"]).double(), Linear(6, 3).double()
    values = {model.W: c["w"], model.mu: c["mu"], guide.V: c["v"], guide.bias: -c["v"] @ c["mu"]}
    for parameter, value in values.items():
        parameter.data = torch.from_numpy(value)
    model.log_sigma.data = torch.tensor(math.log(c["sigma"])).double()
    guide.log_sigma.data = torch.from_numpy(0.5 * np.log(c["d"]))
    return model, guide


def test_pyros_own_elbo_averages_to_the_analytic_one(lucas):
    draws = lucas["draws"]
    model, guide = lucas_pair(lucas)
    exact = float(AnalyticELBO().per_datum(model, guide, torch.from_numpy(lucas["x"])).detach().mean())
    assert_consistent(draws.mean() - exact, draws.std(ddof=1) / math.sqrt(len(draws)))


def test_the_analytic_elbo_without_one_trace_is_refuted(lucas):
    c, draws = lucas, lucas["draws"]
    args = (c["w"], c["v"], c["d"], c["sigma"] ** 2, c["x"] - c["mu"])
    error = draws.std(ddof=1) / math.sqrt(len(draws))
    assert_consistent(draws.mean() - numpy_linear_elbo(*args).mean(), error)
    assert_refuted(draws.mean() - numpy_linear_elbo(*args, trace_d=False).mean(), error)


# --- gradients -------------------------------------------------------------------------------------


def gradient_of(objective, model, guide, x):
    parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
    gradients = torch.autograd.grad(objective.per_datum(model, guide, x).mean(), parameters)
    return torch.cat([g.reshape(-1) for g in gradients])


def gradient_z_scores(objective, pair, x, exact, repeats=150):
    """z-scores of a Monte Carlo gradient's mean over repeats, one a parameter."""
    draws = torch.stack([gradient_of(objective, *pair, x) for _ in range(repeats)])
    return (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(repeats))


def assert_gradients_consistent(z):
    """No parameter's gradient off by more than five standard errors."""
    assert float(z.abs().max()) < 5, f"p = {2 * scipy.stats.norm.sf(float(z.abs().max())):.1g}"


def assert_gradients_refuted(z):
    with pytest.raises(AssertionError, match="p = "):
        assert_gradients_consistent(z)
    # Bonferroni over the parameters.
    assert 2 * scipy.stats.norm.sf(float(z.abs().max())) * len(z) < CERTAIN


GRADIENT_GUIDES = {
    "Linear": lambda: Linear(DATA_DIM, LATENT_DIM).double(),
    "MeanField": lambda: MeanField(DATA_DIM, LATENT_DIM, hidden=(3,)).double(),
    "FullRank": lambda: FullRank(DATA_DIM, LATENT_DIM, hidden=(3,)).double(),
}


@pytest.fixture(params=GRADIENT_GUIDES)
def trainable(request):
    return make_model(3).requires_grad_(True), GRADIENT_GUIDES[request.param]()


@pytest.mark.parametrize("objective", [ELBO(num_particles=20), AnalyticKLELBO(num_particles=20)])
def test_gradients_average_to_those_of_the_analytic_elbo(objective, trainable, x):
    exact = gradient_of(AnalyticELBO(), *trainable, x)
    assert_gradients_consistent(gradient_z_scores(objective, trainable, x, exact))


@pytest.mark.parametrize("defect", ["detached", "sign", "no log-determinant"])
def test_a_defect_shows_in_the_gradient(defect, trainable, x):
    model, guide = trainable
    exact = gradient_of(AnalyticELBO(), model, guide, x)
    broken = BrokenGuide(guide, DEFECTS.get(defect))
    assert_gradients_refuted(gradient_z_scores(ELBO(num_particles=20), (model, broken), x, exact))


def test_gradient_of_the_analytic_elbo_is_that_of_finite_differences(trainable, x):
    model, guide = trainable
    parameters = [*model.parameters(), *guide.parameters()]
    exact = gradient_of(AnalyticELBO(), model, guide, x[:5])
    flat = nn.utils.parameters_to_vector(parameters).detach()
    step, estimate = 1e-5, torch.zeros_like(flat)
    for i in range(len(flat)):
        values = []
        for sign in (1, -1):
            shifted = flat.clone()
            shifted[i] += sign * step
            nn.utils.vector_to_parameters(shifted, parameters)
            values.append(numpy_elbo(model, guide, x[:5]).mean())
        estimate[i] = (values[0] - values[1]) / (2 * step)
    # Central differences: truncation of step^2, rounding of eps * |ELBO| / step.
    torch.testing.assert_close(estimate, exact, rtol=1e-7, atol=1e-7)


def test_the_loss_is_minus_the_sum_of_the_bound(model, guides, x):
    for name in ("Linear, trained", "FullRank, untrained"):
        objective = AnalyticELBO()
        total = -float(numpy_elbo(model, guides[name], x).sum())
        assert objective.loss(model, guides[name], x) == pytest.approx(total, rel=1e-12)
        assert float(objective(model, guides[name])(x)) == pytest.approx(total, rel=1e-12)


# --- what objectives refuse ------------------------------------------------------------------------


def two_latents(order, latent=lambda loc: dist.Normal(loc, 1.0)):
    """A program with two latents in the given order, and an observation if it is the model."""

    def program(x, observe):
        with pyro.plate("data", len(x)):
            z = {name: pyro.sample(name, latent(torch.zeros(len(x)))) for name in order}
            if observe:
                pyro.sample("x", dist.Normal(z["a"] + z["b"], 1.0), obs=x)

    return lambda x: program(x, observe=False), lambda x: program(x, observe=True)


def test_analytic_kl_sums_over_latents_in_one_order():
    guide, _ = two_latents("ab", lambda loc: dist.Normal(loc + 0.5, 0.5))
    _, model = two_latents("ab")
    x = torch.zeros(3)
    got = repeated(AnalyticKLELBO(num_particles=50), (model, guide), x)
    kl = 2 * (0.5 * (0.25 + 0.25 - 1) - math.log(0.5))
    fit = -0.5 * math.log(2 * math.pi) - 0.5 * (1.0**2 + 2 * 0.25)
    assert_consistent(*minus(got, (fit - kl, 0.0)))
    assert_refuted(*minus(got, (fit - kl / 2, 0.0)))


def test_analytic_kl_refuses_another_order():
    guide, _ = two_latents("ba")
    _, model = two_latents("ab")
    with pytest.raises(
        ValueError, match=r"one order for a closed-form KL, got \['a', 'b'\] in the model and \['b', 'a'\]"
    ):
        AnalyticKLELBO().loss(model, guide, torch.zeros(3))


def test_analytic_kl_refuses_a_site_without_closed_form():
    guide, _ = two_latents("ab", lambda loc: dist.StudentT(3.0, loc, 1.0))
    _, model = two_latents("ab")
    with pytest.raises(NotImplementedError, match="no closed-form KL at site 'a' between StudentT and Normal"):
        AnalyticKLELBO().loss(model, guide, torch.zeros(3))


def test_analytic_kl_refuses_a_site_scaled_in_one_half_alone():
    guide, model = two_latents("ab")
    with pytest.raises(ValueError, match="site 'a' under the same mask and scale"):
        AnalyticKLELBO().loss(poutine.scale(model, scale=0.5), guide, torch.zeros(3))


class StudentGuide(Guide):
    def posterior(self, x):
        return dist.StudentT(3.0, x[:, :LATENT_DIM], 1.0).to_event(1)


def test_analytic_elbo_refuses_a_guide_that_is_not_gaussian(model, x):
    with pytest.raises(TypeError, match="expected a Gaussian posterior for the closed form, got Independent"):
        AnalyticELBO().loss(model, StudentGuide(), x)


def test_analytic_elbo_refuses_a_model_that_is_not_linear(x):
    guide, model = two_latents("ab")
    with pytest.raises(TypeError, match=r"expected a model with expected_log_likelihood\(x, posterior\) and prior"):
        AnalyticELBO().loss(model, guide, x[:, 0])


def test_analytic_elbo_refuses_two_latents(model, x):
    guide, _ = two_latents("ab")
    with pytest.raises(ValueError, match=r"expected a guide with one latent site, got \['a', 'b'\]"):
        AnalyticELBO().loss(model, guide, x)


@pytest.mark.parametrize("objective", [ELBO(), AnalyticKLELBO()])
def test_sampling_objectives_refuse_a_distribution_without_rsample(objective):
    class Grid(dist.Normal):
        has_rsample = False

    guide, _ = two_latents("ab", lambda loc: Grid(loc, 1.0))
    _, model = two_latents("ab")
    with pytest.raises(ValueError, match="expected a reparameterised distribution at guide site 'a', got Grid"):
        objective.loss(model, guide, torch.zeros(3))
