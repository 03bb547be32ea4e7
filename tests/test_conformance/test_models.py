"""What every model of the registry does, through Pyro, torch.func and this library."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_model_relations
from pyro.ops.stats import effective_sample_size
from references import (
    EXACT,
    assert_block_diagonal,
    assert_moments,
    assert_same_covariance,
    assert_same_moments,
    largest,
    normal_log_prob,
    quadrature,
    reference_log_joint,
    reference_log_likelihood,
    reference_marginal,
    state,
    trace_of,
    train_by_svi,
    unchanged,
)
from registry import MODELS, data_for, for_models_with, observation_of, simulate
from torch.func import jacrev

from guides import TiedMeanField
from inference import (
    evidence,
    sample,
)
from inference.core.protocols import (
    SupportsExpectedLogLikelihood,
    SupportsPosterior,
)
from zoo.linear.models import LinearGaussianModel

DRAWS = {"call": lambda m, n: m(n=n).detach(), "sample": lambda m, n: sample(m, n=n)["x"]}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_prior_predictive_has_the_moments_of_a_simulation(model, draw):
    draws, (_, reference) = draw(model, 20_000), simulate(model, 20_000)
    assert draws.shape == reference.shape
    assert_same_moments(draws, reference)
    assert_same_covariance(draws, reference)


@for_models_with(*EXACT)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_prior_predictive_has_the_moments_of_the_marginal(model, draw):
    distribution = reference_marginal(model)
    assert_moments(draw(model, 20_000), distribution.mean, distribution.covariance_matrix)


def test_trace_of_a_conditioned_model_scores_the_joint_density(model):
    x, z = data_for(model), torch.randn(20, model.latent_dim, dtype=torch.float64)
    trace = trace_of(poutine.condition(model, data={"z": z}), x)
    torch.testing.assert_close(trace.log_prob_sum(), reference_log_joint(model, x, z).sum())
    assert trace.nodes["z"]["log_prob"].shape == trace.nodes["x"]["log_prob"].shape == (20,)


def test_block_hides_a_site_and_leaves_the_other(model):
    x = data_for(model)
    trace = trace_of(poutine.block(model, hide=["z"]), x)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["data", "x"]


def test_do_cuts_the_latent_off_the_data(model):
    x, z = data_for(model), torch.full((20, model.latent_dim), 2.0, dtype=torch.float64)
    trace = trace_of(poutine.do(model, data={"z": z}), x)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], reference_log_likelihood(model, x, z))
    # Pyro leaves a fresh draw at the site; what was intervened with has no term of its own.
    fresh = trace.nodes["z"]["value"]
    assert not bool((fresh == z).any())
    rest = trace.log_prob_sum() - trace.nodes["x"]["log_prob_sum"]
    torch.testing.assert_close(rest, normal_log_prob(fresh, torch.zeros_like(fresh), 1.0).sum())


def test_data_under_do_scatter_around_the_decoded_latent(model):
    num, z = 20_000, torch.full((model.latent_dim,), 2.0, dtype=torch.float64)
    draws = poutine.do(model, data={"z": z.expand(num, -1)})(n=num)
    assert_moments(draws, model.decode(z), observation_of(model).variance(model, z).diag())


def test_uncondition_draws_the_data_too(model):
    x = data_for(model)
    trace = trace_of(poutine.uncondition(model), x)
    assert not trace.nodes["x"]["is_observed"]
    z, draw = trace.nodes["z"]["value"], trace.nodes["x"]["value"]
    assert not torch.equal(draw, x)
    torch.testing.assert_close(trace.log_prob_sum(), reference_log_joint(model, draw, z).sum())


def test_inspect_finds_data_and_latent_in_the_plate(model):
    relations = get_model_relations(model, (data_for(model),))
    assert relations["sample_sample"] == {"z": [], "x": ["z"]}
    assert relations["plate_sample"] == {"data": ["z", "x"]}
    assert relations["observed"] == ["x"]


def posterior_moments(model, x):
    """Mean, standard deviation and kurtosis of each posterior coordinate by quadrature, (N, K) each."""
    _, z, weights = quadrature(model, x)
    mean = weights.T @ z
    variance = weights.T @ z.square() - mean.square()
    fourth = torch.stack([w @ (z - m).pow(4) for w, m in zip(weights.T, mean)])
    return mean, variance.sqrt(), fourth / variance.square()


# Likelihoods of three kinds; the others in the slow tests, for each takes seconds.
SAMPLED = ["LinearVAE", "IMAVAE", "VAE-categorical"]


@pytest.mark.parametrize(
    "make_model", [pytest.param(m, marks=[] if m in SAMPLED else [pytest.mark.slow]) for m in MODELS], indirect=True
)
def test_nuts_samples_the_posterior(model):
    x = data_for(model, 3)
    mcmc = MCMC(NUTS(model), num_samples=150, warmup_steps=60, disable_progbar=True)
    mcmc.run(x)
    z, (mean, sd, kurtosis) = mcmc.get_samples()["z"], posterior_moments(model, x)
    squares = ((z - mean) / sd).square()
    mean_error = sd / effective_sample_size(z[None]).sqrt()
    squares_error = ((kurtosis - 1) / effective_sample_size(squares[None])).sqrt()
    assert z.shape == (150, 3, model.latent_dim)
    assert largest((z.mean(0) - mean) / mean_error) < 5
    assert largest((squares.mean(0) - 1) / squares_error) < 5


@for_models_with(*EXACT)
def test_the_posterior_is_gaussian_with_the_moments_of_quadrature(model):
    x = data_for(model, 3)
    distribution, (mean, sd, kurtosis) = model.posterior(x), posterior_moments(model, x)
    torch.testing.assert_close(distribution.mean, mean)
    torch.testing.assert_close(distribution.variance.sqrt(), sd)
    torch.testing.assert_close(kurtosis, torch.full_like(kurtosis, 3.0))


@for_models_with(*EXACT)
def test_exact_evidence_is_that_of_a_dense_gaussian(model):
    x = data_for(model)
    torch.testing.assert_close(model.log_evidence(x), reference_marginal(model).log_prob(x))


@for_models_with(*EXACT)
def test_exact_evidence_and_posterior_are_those_of_quadrature(model):
    x = data_for(model, 3)
    log_evidence, z, _ = quadrature(model, x)
    torch.testing.assert_close(evidence(model, x).value, log_evidence)
    some = z[:: len(z) // 50, None].expand(-1, 3, -1)
    expected = reference_log_joint(model, x, some) - log_evidence
    torch.testing.assert_close(model.posterior(x).log_prob(some), expected)


@for_models_with(SupportsExpectedLogLikelihood, SupportsPosterior)
def test_autonormal_finds_the_best_mean_field_posterior(model):
    model.requires_grad_(False)
    x, guide = data_for(model, 5), AutoNormal(model)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=10, vectorize_particles=True))
    for _ in range(300):
        svi.step(x)
    found = dist.Normal(guide.locs.z, guide.scales.z).to_event(1)
    reached, best = (
        (model.expected_log_likelihood(x, q) - torch.distributions.kl_divergence(q, model.prior())).detach()
        for q in (found, TiedMeanField(model).posterior(x))
    )
    assert float((best - reached).min()) > 0
    assert float((best - reached).max()) < 0.05


def test_likelihood_takes_any_leading_dimensions(model):
    z = torch.randn(3, 4, model.latent_dim, dtype=torch.float64)
    distribution = model.likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == ((3, 4), (model.data_dim,))
    assert distribution.sample((2,)).shape == (2, 3, 4, model.data_dim)
    x = torch.randn(model.data_dim, dtype=torch.float64)
    one_by_one = torch.stack([model.likelihood(z_n).log_prob(x) for z_n in z.flatten(0, 1)])
    torch.testing.assert_close(distribution.log_prob(x), one_by_one.view(3, 4))


def test_prior_is_over_one_latent(model):
    distribution = model.prior()
    assert (distribution.batch_shape, distribution.event_shape) == ((), (model.latent_dim,))
    z = torch.randn(3, 4, model.latent_dim, dtype=torch.float64)
    torch.testing.assert_close(distribution.log_prob(z), normal_log_prob(z, torch.zeros_like(z), 1.0))


def test_likelihood_of_a_datum_depends_on_its_own_latent_alone(model):
    x, z = data_for(model, 4), torch.randn(4, model.latent_dim, dtype=torch.float64)
    assert_block_diagonal(jacrev(lambda z: model.likelihood(z).log_prob(x))(z))


@for_models_with(LinearGaussianModel)
def test_the_marginal_scores_data_by_their_evidence(model):
    x = data_for(model)
    trace = trace_of(model.marginal(), x)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], model.log_evidence(x))
    torch.testing.assert_close(model.log_evidence(x), reference_marginal(model).log_prob(x))


@for_models_with(LinearGaussianModel)
def test_the_marginal_samples_the_distribution_of_the_data(model):
    distribution = reference_marginal(model)
    assert_moments(model.marginal()(n=20_000).detach(), distribution.mean, distribution.covariance_matrix)


@for_models_with(LinearGaussianModel)
def test_the_marginal_trains_the_model_it_was_made_of(model):
    x, marginal = data_for(model), model.marginal()
    before, start = state(model), float(model.log_evidence(x).mean().detach())
    train_by_svi(marginal, lambda x: None, x, steps=40)  # noqa: ARG005
    assert unchanged(before, model) == []
    assert float(model.log_evidence(x).mean().detach()) - start > 0.1
