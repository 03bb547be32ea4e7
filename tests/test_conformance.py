"""What every model, guide and pair of the registry in conftest.py does, through Pyro, torch.func and this library."""

import copy
import inspect
import math
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import data_for
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_model_relations
from pyro.ops.stats import effective_sample_size
from torch import nn
from torch.func import functional_call, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from guides import TiedMeanField
from inference import (
    ELBO,
    AnalyticELBO,
    AnalyticKLELBO,
    elbo,
    evidence,
    fit,
    load_pair,
    log_weights,
    predictive,
    reconstruct,
    sample,
    save_pair,
)
from inference.compare import compare

OBJECTIVES = [Trace_ELBO, ELBO, AnalyticKLELBO, AnalyticELBO]
OURS = [ELBO, AnalyticKLELBO, AnalyticELBO]


# --- helpers ---------------------------------------------------------------------------------------


def state(*modules):
    """A copy of every parameter and buffer."""
    return {k: v.clone() for k, v in nn.ModuleList(modules).state_dict().items()}


def unchanged(before, *modules):
    """Names of the trainable parameters that are what they were, bit for bit."""
    trainable = [k for k, p in nn.ModuleList(modules).named_parameters() if p.requires_grad]
    after = state(*modules)
    return [k for k in trainable if torch.equal(before[k], after[k])]


def changed(before, *modules):
    """Names of the tensors, buffers included, that are not what they were, bit for bit."""
    return [k for k, v in state(*modules).items() if not torch.equal(before[k], v)]


def train_by_svi(model, guide, x, objective=Trace_ELBO, steps=3):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), objective())
    for _ in range(steps):
        svi.step(x)


def train_by_torch(model, guide, x, objective=Trace_ELBO, steps=3):
    loss = objective()(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()


def train_by_fit(model, guide, x, objective=ELBO, steps=3):
    fit(model, guide, x, steps=steps, objective=objective(), progress=False)


def elbo_per_datum(model, guide, x):
    """ELBO per datum of the data and its standard error, written out: no Pyro, nothing of inference."""
    with torch.no_grad():
        law = guide.posterior(x)
        z = law.sample((500,))
        w = model.prior().log_prob(z) + model.likelihood(z).log_prob(x) - law.log_prob(z)
    return float(w.mean()), float(w.std(0).square().sum().sqrt()) / math.sqrt(500) / len(x)


def normal_log_prob(value, loc, sigma):
    return torch.distributions.Normal(loc, sigma).log_prob(value).sum(-1)


def reference_log_likelihood(model, x, z):
    """log p(x_n | z_n) from the parameters alone."""
    s = model.standardise
    mean = s.shift + s.scale * (z @ model.W.T + model.mu)
    return normal_log_prob(x, mean, model.log_sigma.exp() * s.scale)


def reference_log_joint(model, x, z):
    """log p(z_n) + log p(x_n | z_n) from the parameters alone."""
    return normal_log_prob(z, torch.zeros_like(z), 1.0) + reference_log_likelihood(model, x, z)


def reference_marginal(model):
    """The law of x from the parameters alone, as a dense Gaussian."""
    s = model.standardise
    W, sigma = model.W * s.scale, model.log_sigma.exp() * s.scale
    covariance = W @ W.T + sigma**2 * torch.eye(len(W), dtype=W.dtype)
    return torch.distributions.MultivariateNormal(s.shift + s.scale * model.mu, covariance)


def largest(tensor):
    """The largest absolute value, as a number."""
    return float(tensor.detach().abs().max())


def assert_same_moments(draws, reference):
    """Mean and variance over the first dimension agree within 5 standard errors, those of both sets of draws."""
    for moment in (lambda a: a, lambda a: (a - a.mean(0)).square()):
        a, b = moment(draws), moment(reference)
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert largest((a.mean(0) - b.mean(0)) / error) < 5


def assert_moments(draws, mean, covariance):
    """Mean and covariance of draws (n, D) agree within 5 standard errors with those of a Gaussian."""
    num, var = len(draws), covariance.diagonal()
    assert largest((draws.mean(0) - mean) / (var / num).sqrt()) < 5
    error = ((torch.outer(var, var) + covariance.square()) / num).sqrt()
    assert largest((draws.T.cov() - covariance) / error) < 5


def trace_of(model, *args, **kwargs):
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return trace


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("train", [train_by_svi, train_by_torch, train_by_fit])
def test_training_moves_every_parameter_and_raises_the_elbo(pair, train, objective):
    x = data_for(pair[0])
    before, (start, start_error) = state(*pair), elbo_per_datum(*pair, x)
    train(*pair, x, objective, steps=40)
    end, end_error = elbo_per_datum(*pair, x)
    assert unchanged(before, *pair) == []
    assert end - start > 5 * (start_error + end_error)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_step_of_svi_is_one_step_of_torch(pair, objective):
    x, (model, guide) = data_for(pair[0]), copy.deepcopy(pair)
    torch.manual_seed(1)
    train_by_svi(*pair, x, objective, steps=1)
    torch.manual_seed(1)
    train_by_torch(model, guide, x, objective, steps=1)
    assert changed(state(*pair), model, guide) == []


def test_every_parameter_of_the_pair_belongs_to_exactly_one_half(pair):
    model, guide = pair
    own = [{id(p) for p in half.parameters()} for half in pair]
    assert not own[0] & own[1]
    assert {id(p) for p in Trace_ELBO()(model, guide).parameters()} == own[0] | own[1]


@pytest.mark.parametrize("train", [train_by_svi, train_by_torch, train_by_fit])
def test_two_pairs_of_one_class_train_independently(make_pair, train):
    first, second = make_pair(), make_pair()
    x = data_for(first[0])
    before_first, before_second = state(*first), state(*second)
    train(*first, x)
    assert unchanged(before_first, *first) == []
    assert changed(before_second, *second) == []
    trained_first = state(*first)
    train(*second, x)
    assert unchanged(before_second, *second) == []
    assert changed(trained_first, *first) == []


def deepcopied(pair):
    return copy.deepcopy(pair)


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [deepcopied, pickled])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained-by-SVI"])
def test_a_copy_is_equal_and_trains_independently_of_its_original(pair, duplicate, trained):
    x = data_for(pair[0])
    if trained:
        train_by_svi(*pair, x)
    before, twin = state(*pair), duplicate(pair)
    assert changed(before, *twin) == []
    assert {half.store_name for half in pair}.isdisjoint(half.store_name for half in twin)
    train_by_svi(*twin, x)
    assert unchanged(before, *twin) == []
    assert changed(before, *pair) == []
    after = state(*twin)
    train_by_svi(*pair, x)
    assert unchanged(before, *pair) == []
    assert changed(after, *twin) == []


def test_svi_goes_on_with_weights_that_were_assigned(pair):
    x = data_for(pair[0])
    train_by_svi(*pair, x)
    for half in pair:
        half.load_state_dict({k: v.clone() for k, v in half.state_dict().items()}, assign=True)
    before = state(*pair)
    train_by_svi(*pair, x)
    assert unchanged(before, *pair) == []


def test_a_saved_pair_is_rebuilt_from_its_file(pair, tmp_path):
    x = data_for(pair[0])
    train_by_svi(*pair, x)
    save_pair(tmp_path / "pair.safetensors", *pair)
    model, guide = load_pair(tmp_path / "pair.safetensors")
    assert changed(state(*pair), model, guide) == []
    torch.testing.assert_close(guide.posterior(x).mean, pair[1].posterior(x).mean, rtol=0, atol=0)


# --- draws -----------------------------------------------------------------------------------------


def test_predictive_draws_latents_from_the_guide(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    law = guide.posterior(x)
    z = Predictive(model, guide=guide, num_samples=num, parallel=True)(x)["z"].detach()
    assert z.shape == (num, 6, model.latent_dim)
    sd = law.variance.sqrt()
    assert largest((z.mean(0) - law.mean) / sd) < 5 / math.sqrt(num)
    assert largest(z.std(0) / sd - 1) < 5 / math.sqrt(2 * num)


def test_predictive_of_an_unconditioned_model_draws_new_data(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    draws = Predictive(poutine.uncondition(model), guide=guide, num_samples=num, parallel=True)(x)["x"].detach()
    assert draws.shape == (num, *x.shape)
    assert_same_moments(draws, model.likelihood(guide.posterior(x).sample((num,))).sample())


def test_our_predictive_draws_latents_and_new_data(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    draws = predictive(model, guide, x, num_samples=num)
    z = guide.posterior(x).sample((num,))
    assert_same_moments(draws["z"], z)
    assert_same_moments(draws["x"], model.likelihood(z).sample())


def test_reconstruction_is_the_mean_of_decoded_latents(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    got = reconstruct(model, guide, x, num_samples=num)
    decoded = model.decode(guide.posterior(x).sample((num,)))
    error = decoded.std(0) * math.sqrt(2 / num)
    assert largest((got - decoded.mean(0)) / error) < 5


@pytest.mark.parametrize("draw", [lambda m, n: m(n=n), lambda m, n: sample(m, n=n)["x"]], ids=["call", "sample"])
def test_the_prior_predictive_has_the_mean_and_covariance_of_the_law(model, draw):
    law = reference_marginal(model)
    assert_moments(draw(model, 20_000), law.mean, law.covariance_matrix)


# --- effect handlers -------------------------------------------------------------------------------


def test_trace_of_a_conditioned_model_scores_the_joint_law(model):
    x, z = data_for(model), torch.randn(20, model.latent_dim, dtype=torch.float64)
    trace = trace_of(poutine.condition(model, data={"z": z}), x)
    torch.testing.assert_close(trace.log_prob_sum(), reference_log_joint(model, x, z).sum())
    assert trace.nodes["z"]["log_prob"].shape == trace.nodes["x"]["log_prob"].shape == (20,)


def test_replay_takes_the_latents_of_a_guide_trace(pair):
    model, guide = pair
    x = data_for(model)
    guide_trace = trace_of(guide, x)
    z = guide_trace.nodes["z"]["value"]
    trace = trace_of(poutine.replay(model, trace=guide_trace), x)
    torch.testing.assert_close(trace.nodes["z"]["value"], z, rtol=0, atol=0)
    torch.testing.assert_close(trace.log_prob_sum(), reference_log_joint(model, x, z).sum())
    torch.testing.assert_close(guide_trace.log_prob_sum(), guide.posterior(x).log_prob(z).sum())


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
    noise = model.sigma**2 * torch.eye(model.data_dim, dtype=torch.float64)
    assert_moments(draws, model.decode(z), noise)


def test_uncondition_draws_the_data_too(model):
    x = data_for(model)
    trace = trace_of(poutine.uncondition(model), x)
    assert not trace.nodes["x"]["is_observed"]
    z, draw = trace.nodes["z"]["value"], trace.nodes["x"]["value"]
    assert not bool((draw == x).any())
    torch.testing.assert_close(trace.log_prob_sum(), reference_log_joint(model, draw, z).sum())


@pytest.mark.parametrize("objective", [Trace_ELBO, ELBO, AnalyticKLELBO])
def test_scale_multiplies_the_loss(pair, objective):
    model, guide = pair
    x = data_for(model)
    torch.manual_seed(1)
    loss = objective().loss(model, guide, x)
    torch.manual_seed(1)
    doubled = objective().loss(poutine.scale(model, scale=2.0), poutine.scale(guide, scale=2.0), x)
    assert doubled == 2 * loss


@pytest.mark.parametrize("objective", [Trace_ELBO, ELBO, AnalyticKLELBO])
def test_masked_data_add_nothing_to_the_loss(pair, objective):
    model, guide = pair
    x, mask = data_for(model), torch.arange(20) % 3 > 0
    masked = poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask)
    torch.manual_seed(1)
    kept = ELBO if objective is Trace_ELBO else objective
    expected = -float(kept().per_datum(model, guide, x)[mask].sum().detach())
    torch.manual_seed(1)
    assert objective().loss(*masked, x) == pytest.approx(expected, rel=1e-12)
    torch.manual_seed(1)
    corrupted = torch.where(mask[:, None], x, 1e3)
    assert objective().loss(*masked, corrupted) == pytest.approx(expected, rel=1e-12)


def test_masked_data_have_zero_log_weights_and_the_others_their_own(pair):
    model, guide = pair
    x, mask = data_for(model), torch.arange(20) % 3 > 0
    torch.manual_seed(1)
    expected = log_weights(model, guide, x, num_samples=7)
    torch.manual_seed(1)
    got = log_weights(poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask), x, num_samples=7)
    torch.testing.assert_close(got, expected * mask, rtol=1e-12, atol=0)


def test_log_weights_are_the_difference_of_log_densities(pair):
    model, guide = pair
    x, drawn = data_for(model), []

    def spying_guide(x):
        drawn.append(guide(x))

    got = log_weights(model, spying_guide, x, num_samples=7, chunk=7)
    z = drawn[-1]
    expected = reference_log_joint(model, x, z) - guide.posterior(x).log_prob(z)
    torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
def test_the_first_call_draws_what_every_later_one_does(pair, chunk):
    # The first finds out how deep the plates go; that costs no random number.
    x, draws = data_for(pair[0]), []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append(log_weights(*pair, x, num_samples=7, chunk=chunk))
        draws.append(ELBO(5).per_datum(*pair, x).detach())
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])


def test_inspect_finds_data_and_latent_in_the_plate(model):
    relations = get_model_relations(model, (data_for(model),))
    assert relations["sample_sample"] == {"z": [], "x": ["z"]}
    assert relations["plate_sample"] == {"data": ["z", "x"]}
    assert relations["observed"] == ["x"]


# --- other inference engines -----------------------------------------------------------------------


def test_nuts_samples_the_exact_posterior(model):
    x = data_for(model, 3)
    mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(x)
    z, law = mcmc.get_samples()["z"], model.posterior(x)
    sd = law.variance.sqrt()
    squares = ((z - law.mean) / sd).square()
    mean_error = sd / effective_sample_size(z[None]).sqrt()
    squares_error = math.sqrt(2) / effective_sample_size(squares[None]).sqrt()
    assert z.shape == (300, 3, model.latent_dim)
    assert largest((z.mean(0) - law.mean) / mean_error) < 5
    assert largest((squares.mean(0) - 1) / squares_error) < 5


def test_autonormal_finds_the_best_mean_field_posterior(model):
    model.requires_grad_(False)
    x, guide = data_for(model, 5), AutoNormal(model)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=10, vectorize_particles=True))
    for _ in range(300):
        svi.step(x)
    found = dist.Normal(guide.locs.z, guide.scales.z).to_event(1)
    reached, best = (
        (model.expected_log_likelihood(x, law) - torch.distributions.kl_divergence(law, model.prior())).detach()
        for law in (found, TiedMeanField(model).posterior(x))
    )
    assert float((best - reached).min()) > 0
    assert float((best - reached).max()) < 0.05


# --- shapes, dtypes, independence of the data ------------------------------------------------------


def test_likelihood_takes_any_leading_dimensions(model):
    z = torch.randn(3, 4, model.latent_dim, dtype=torch.float64)
    law = model.likelihood(z)
    assert (law.batch_shape, law.event_shape) == ((3, 4), (model.data_dim,))
    assert law.sample((2,)).shape == (2, 3, 4, model.data_dim)
    x = torch.randn(model.data_dim, dtype=torch.float64)
    one_by_one = torch.stack([model.likelihood(z_n).log_prob(x) for z_n in z.flatten(0, 1)])
    torch.testing.assert_close(law.log_prob(x), one_by_one.view(3, 4))


def test_prior_is_over_one_latent(model):
    law = model.prior()
    assert (law.batch_shape, law.event_shape) == ((), (model.latent_dim,))
    z = torch.randn(3, 4, model.latent_dim, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(z), normal_log_prob(z, torch.zeros_like(z), 1.0))


def assert_block_diagonal(jacobian):
    """A Jacobian (N, N, K) is zero between different data, and nowhere zero within one."""
    num = len(jacobian)
    other = ~torch.eye(num, dtype=torch.bool)
    assert largest(jacobian[other]) == 0
    assert bool((jacobian[~other].abs().sum(-1) > 0).all())


def test_likelihood_of_a_datum_depends_on_its_own_latent_alone(model):
    x, z = data_for(model, 4), torch.randn(4, model.latent_dim, dtype=torch.float64)
    assert_block_diagonal(jacrev(lambda z: model.likelihood(z).log_prob(x))(z))


def test_posterior_of_a_latent_depends_on_its_own_datum_alone(pair):
    model, guide = pair
    x, z = data_for(model, 4), torch.randn(4, model.latent_dim, dtype=torch.float64)
    assert_block_diagonal(jacrev(lambda x: guide.posterior(x).log_prob(z))(x))


def test_a_datum_by_itself_is_what_it_is_in_company(pair):
    model, guide = pair
    x, z = data_for(model, 4), torch.randn(4, model.latent_dim, dtype=torch.float64)
    together = [guide.posterior(x).log_prob(z), model.likelihood(z).log_prob(x)]
    alone = [
        torch.cat([guide.posterior(x[i : i + 1]).log_prob(z[i : i + 1]) for i in range(4)]),
        torch.cat([model.likelihood(z[i : i + 1]).log_prob(x[i : i + 1]) for i in range(4)]),
    ]
    torch.testing.assert_close(alone, together)


def test_one_datum_is_sampled_and_evaluated(pair):
    model, guide = pair
    assert model(n=1).shape == (1, model.data_dim)
    x = data_for(model, 1)
    weights = log_weights(model, guide, x, num_samples=4000)
    value, error = elbo(weights)
    assert weights.shape == (4000, 1)
    expected, expected_error = elbo_per_datum(model, guide, x)
    # The exact guide has no Monte Carlo error, only that of rounding.
    assert abs(float(value) - expected) < 5 * math.hypot(float(error), expected_error) + 1e-10


def test_single_precision_agrees_with_double(pair):
    doubles = pair
    model, guide = (half.float() for half in copy.deepcopy(pair))
    x, z = data_for(doubles[0]), torch.randn(20, model.latent_dim, dtype=torch.float64)
    assert model(n=3).dtype == guide(x.float()).dtype == torch.float32
    assert torch.cat([log_weights(model, guide, x.float(), num_samples=2)]).dtype == torch.float32
    for single, double in zip((model, guide), doubles):
        got, expected = (
            trace_of(poutine.condition(half, data={"z": latent}), data).log_prob_sum()
            for half, data, latent in ((single, x.float(), z.float()), (double, x, z))
        )
        assert got.dtype == torch.float32
        # Each of some 1000 squares of size 10 or so is off by a few eps of itself.
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)


# --- torch.func ------------------------------------------------------------------------------------


def ensemble_losses(losses, x):
    """Losses of several pairs at once: their parameters stacked, one functional call, vmapped."""
    parameters, buffers = stack_module_state(losses)
    return vmap(lambda p, b: functional_call(losses[0], (p, b), (x,)), randomness="different")(parameters, buffers)


def test_vmap_over_an_ensemble_is_the_loop_for_a_deterministic_objective(make_pair):
    losses = [AnalyticELBO()(*make_pair()) for _ in range(3)]
    x = data_for(losses[0].model)
    expected = torch.stack([loss(x) for loss in losses])
    assert len(set(expected.tolist())) == 3
    torch.testing.assert_close(ensemble_losses(losses, x), expected)


@pytest.mark.parametrize("objective", [ELBO, AnalyticKLELBO])
@pytest.mark.parametrize("num_particles", [1, 400])
def test_vmap_over_an_ensemble_draws_for_each_member(make_pair, objective, num_particles):
    pairs = [make_pair() for _ in range(3)]
    x = data_for(pairs[0][0])
    got = ensemble_losses([objective(num_particles)(*pair) for pair in pairs], x)
    for loss, (model, guide) in zip(got, pairs):
        per_datum = torch.stack([objective().per_datum(model, guide, x).detach() for _ in range(100)])
        variance = per_datum.var(0).sum()
        expected = -AnalyticELBO().per_datum(model, guide, x).sum()
        assert largest(loss - expected) < 5 * float((variance / num_particles).sqrt()) + 1e-9


def test_vmap_gives_equal_members_different_noise(make_pair):
    model, guide = make_pair()
    losses = ensemble_losses([AnalyticKLELBO()(*copy.deepcopy((model, guide))) for _ in range(3)], data_for(model))
    assert len(set(losses.tolist())) == 3


def objective_cases():
    cases = [(ELBO, {}), (ELBO, {"num_particles": 5}), (AnalyticKLELBO, {"num_particles": 5}), (AnalyticELBO, {})]
    return [pytest.param(c, k, id=c.__name__ + "".join(map(str, k.values()))) for c, k in cases]


@pytest.mark.parametrize(("objective", "options"), objective_cases())
def test_a_traced_graph_of_the_loss_gives_the_same_value_from_the_same_seed(pair, objective, options):
    model, guide = pair
    loss = objective(**options)(model, guide)
    graph = make_fx(loss)(data_for(model, 6))
    x = data_for(model, 6, seed=2)
    loss(x)
    torch.manual_seed(1)
    expected = loss(x)
    torch.manual_seed(1)
    torch.testing.assert_close(graph(x), expected)


# --- the marginal ----------------------------------------------------------------------------------


def test_the_marginal_scores_data_by_their_evidence(model):
    x = data_for(model)
    trace = trace_of(model.marginal(), x)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], model.log_evidence(x))
    torch.testing.assert_close(model.log_evidence(x), reference_marginal(model).log_prob(x))


def test_the_marginal_samples_the_law_of_the_data(model):
    law = reference_marginal(model)
    assert_moments(model.marginal()(n=20_000).detach(), law.mean, law.covariance_matrix)


def test_the_marginal_trains_the_model_it_was_made_of(model):
    x, marginal = data_for(model), model.marginal()
    before, start = state(model), float(model.log_evidence(x).mean().detach())
    train_by_svi(marginal, lambda x: None, x, steps=40)  # noqa: ARG005
    assert unchanged(before, model) == []
    assert float(model.log_evidence(x).mean().detach()) - start > 0.1


# --- nothing global --------------------------------------------------------------------------------


def global_state():
    """What a library call must leave as it was; self-contained, for it also runs in a process of its own."""
    import random

    import numpy
    import pyro
    import torch

    return {
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(numpy.random.get_state()),  # noqa: NPY002
        "python generator": str(random.getstate()),
        "pyro settings": {k: str(v) for k, v in pyro.settings.get().items()},
        "validation": torch.distributions.Distribution._validate_args,
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "parameter store": sorted(pyro.get_param_store().keys()),
    }


def differences(before, after):
    return [k for k in before if before[k] != after[k]]


def test_importing_the_packages_changes_nothing_global():
    script = f"""
{inspect.getsource(global_state)}
{inspect.getsource(differences)}
before = global_state()
import guides, inference, inference.compare, inference.plots, zoo
print(differences(before, global_state()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


# Calls that take a seed, and a tensor that their noise decides.
SEEDED = {
    "evidence": lambda m, g, x: evidence(m, x, method="importance", guide=g, num_samples=30, seed=1).value,
    "fit": lambda m, g, x: (fit(m, g, x, steps=2, batch_size=7, seed=1, progress=False), m.W.detach())[1],
    "compare": lambda m, g, x: torch.tensor(
        compare(m, {"guide": g}, x, num_samples=30, seed=1, progress=False)["train"]["elbo"].values
    ),
    "sample": lambda m, _, x: sample(m, x, seed=1)["x"],
    "predictive": lambda m, g, x: predictive(m, g, x, num_samples=2, seed=1)["x"],
    "reconstruct": lambda m, g, x: reconstruct(m, g, x, seed=1),
}


@pytest.mark.parametrize("call", SEEDED)
def test_a_seeded_call_changes_nothing_global(pair, call):
    x, before = data_for(pair[0]), global_state()
    SEEDED[call](*pair, x)
    assert differences(before, global_state()) == []


@pytest.mark.parametrize("call", SEEDED)
def test_a_seeded_call_gives_the_same_bits_whatever_the_global_generator(pair, call):
    x, twin = data_for(pair[0]), copy.deepcopy(pair)
    first = SEEDED[call](*pair, x)
    torch.manual_seed(123)
    assert torch.equal(SEEDED[call](*twin, x), first)


def test_log_weights_move_the_generator_and_nothing_else_global(pair):
    x, before = data_for(pair[0]), global_state()
    log_weights(*pair, x, num_samples=3)
    assert differences(before, global_state()) == ["torch generator"]
