"""Estimates of the bounds and of their gradients against closed forms."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from bounded_pairs import (
    CERTAIN,
    DATA_DIM,
    DEFECTS,
    INEXACT,
    LATENT_DIM,
    BrokenGuide,
    BrokenModel,
    arrays,
    assert_consistent,
    assert_refuted,
    gap_to,
    make_model,
    minus,
    numpy_elbo,
    numpy_kl,
    numpy_linear_elbo,
    repeated,
    weights_of,
)
from torch import nn

from guides import FullRank, Linear, MeanField
from inference import ELBO, AnalyticELBO, AnalyticKLELBO, elbo, log_weights
from zoo import LinearVAE

# --- Monte Carlo against the closed form -----------------------------------------------------------------


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


# --- gradients -------------------------------------------------------------------------------------------


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
