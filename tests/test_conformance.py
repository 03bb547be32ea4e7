"""What every model, guide and pair of the registry in conftest.py does, through Pyro, torch.func and this library."""

import copy
import inspect
import math
import pickle
import subprocess
import sys
import typing
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from conftest import (
    GUIDES,
    MODELS,
    PAIRS,
    data_for,
    for_models_with,
    for_pairs_with,
    has_closed_kl,
    models_with,
    pairs_with,
    simulate,
)
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_model_relations
from pyro.ops.stats import effective_sample_size
from torch import nn
from torch.func import functional_call, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from guides import Exact, TiedMeanField
from inference import (
    ELBO,
    AnalyticELBO,
    AnalyticKLELBO,
    Importance,
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
from inference.comparison.guide_comparison import compare
from inference.core.protocols import (
    SupportsDecoder,
    SupportsExpectedLogLikelihood,
    SupportsLogEvidence,
    SupportsPosterior,
)
from zoo import VAE
from zoo.linear.models import LinearGaussianModel

OBJECTIVES = [Trace_ELBO, ELBO, AnalyticKLELBO, AnalyticELBO]
# What an objective asks of the model beyond being one.
ASKS = {AnalyticELBO: [SupportsExpectedLogLikelihood]}
EXACT = [SupportsLogEvidence, SupportsPosterior]


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


def elbo_per_datum(model, guide, x, num=500):
    """ELBO per datum of the data and its standard error, written out: no Pyro, nothing of inference."""
    with torch.no_grad():
        law = guide.posterior(x)
        z = law.sample((num,))
        w = model.prior().log_prob(z) + model.likelihood(z).log_prob(x) - law.log_prob(z)
    return float(w.mean()), float(w.std(0).square().sum().sqrt()) / math.sqrt(num) / len(x)


def normal_log_prob(value, loc, sigma):
    return torch.distributions.Normal(loc, sigma).log_prob(value).sum(-1)


def reference_log_likelihood(model, x, z):
    """log p(x_n | z_n) from the decoded mean and the noise, by the parameters alone where the decoder is linear."""
    if isinstance(model, VAE):
        p = model.decode(z)
        return (x.xlogy(p) + (1 - x).xlogy(1 - p)).sum(-1)
    if not isinstance(model, LinearGaussianModel):
        return normal_log_prob(x, model.decode(z), model.sigma)
    s = model.standardise
    mean = s.shift + s.scale * (z @ model.W.T + model.mu)
    return normal_log_prob(x, mean, model.log_sigma.exp() * s.scale)


def reference_log_joint(model, x, z):
    """log p(z_n) + log p(x_n | z_n) by hand, see :func:`reference_log_likelihood`."""
    return normal_log_prob(z, torch.zeros_like(z), 1.0) + reference_log_likelihood(model, x, z)


def reference_marginal(model):
    """The law of x from the parameters alone, as a dense Gaussian."""
    s = model.standardise
    W, sigma = model.W * s.scale, model.log_sigma.exp() * s.scale
    covariance = W @ W.T + sigma**2 * torch.eye(len(W), dtype=W.dtype)
    return torch.distributions.MultivariateNormal(s.shift + s.scale * model.mu, covariance)


@torch.no_grad()
def quadrature(model, x, step=0.2, reach=10.0):
    """Log evidence (N,), and z (S, K) with its posterior weights (S, N), by the trapezoidal rule on a grid over z.

    Spectrally accurate for smooth laws that vanish at the edge: two shifted grids must agree, the edge be empty.
    """
    dim = model.latent_dim
    assert dim <= 3, "a grid serves few latents only: give the model of the registry K <= 3"
    line = torch.arange(-reach, reach, step, dtype=x.dtype)
    log_evidence = []
    for shift in (0.0, 0.5):
        z = torch.cartesian_prod(*[line + shift * step] * dim).reshape(-1, dim)
        parts = [reference_log_joint(model, x, part.unsqueeze(1)) for part in z.split(2**16)]
        log_joint = torch.cat(parts) + dim * math.log(step)
        log_evidence.append(log_joint.logsumexp(0))
    weights = (log_joint - log_evidence[1]).exp()
    edge = z.abs().amax(-1) > reach - 1
    assert largest(weights[edge].sum(0)) < 1e-9
    torch.testing.assert_close(*log_evidence, rtol=0, atol=1e-7)
    return log_evidence[1], z, weights


def largest(tensor):
    """The largest absolute value, as a number."""
    return float(tensor.detach().abs().max())


def assert_same_moments(draws, reference):
    """Mean and variance over the first dimension agree within 5 standard errors, those of both sets of draws."""
    for moment in (lambda a: a, lambda a: (a - a.mean(0)).square()):
        a, b = moment(draws), moment(reference)
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert largest((a.mean(0) - b.mean(0)) / error) < 5


def assert_same_covariance(draws, reference):
    """Covariances of draws (n, D) agree within 5 standard errors, those of both sets of draws."""

    def products(a):
        centred = a - a.mean(0)
        return torch.einsum("si,sj->sij", centred, centred)

    a, b = products(draws), products(reference)
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


def under(*cases):
    """Every pair under every objective that serves its model; a case is an objective and its further arguments."""
    names = ["make_pair", "objective", "options"][: len(cases[0]) + 1]
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(pair, *case, id="-".join((*pair, case[0].__name__, *map(str, dict(*case[1:]).values()))))
            for case in cases
            for pair in pairs_with(*ASKS.get(case[0], []))
            if case[0] is not AnalyticKLELBO or has_closed_kl(*pair)
        ],
        indirect=["make_pair"],
    )


under_every_objective = under(*[(objective,) for objective in OBJECTIVES])


# --- which models a claim covers -------------------------------------------------------------------


def accepts(call):
    """Whether a call goes through, and does not end in the TypeError by which this library refuses a model."""
    try:
        call()
    except TypeError as error:
        if str(error).startswith("expected a model with "):
            return False
        raise
    return True


# A capability, and the door of the library that lets in the models that have it and no others.
DOORS = {
    SupportsLogEvidence: lambda model: evidence(model, data_for(model), method="exact"),
    SupportsPosterior: Exact,
    SupportsExpectedLogLikelihood: lambda model: AnalyticELBO().loss(
        model, GUIDES["MeanField"](model), data_for(model)
    ),
}


@pytest.mark.parametrize("capability", DOORS)
def test_a_claim_covers_the_models_that_the_library_lets_in_and_no_others(capability):
    let_in = [name for name, make in MODELS.items() if accepts(lambda make=make: DOORS[capability](make()))]
    assert models_with(capability) == let_in
    assert pairs_with(capability) == [(m, g) for m, g in PAIRS if m in let_in]


def asked_of_the_model(guide_name):
    """What a guide's constructor says that it asks of a model, ``object`` where it takes none."""
    guide_class = type(GUIDES[guide_name](MODELS[next(m for m, g in PAIRS if g == guide_name)]()))
    return typing.get_type_hints(guide_class.__init__).get("model", object)


def test_every_model_pairs_with_every_guide_that_asks_no_more_of_it():
    expected = [(m, g) for m in MODELS for g in GUIDES if isinstance(MODELS[m](), asked_of_the_model(g))]
    assert expected == [pair for pair in PAIRS if pair[1] in GUIDES]
    refused = [(m, g) for m in MODELS for g in GUIDES if (m, g) not in PAIRS]
    assert not any(accepts(lambda m=m, g=g: GUIDES[g](MODELS[m]())) for m, g in refused)


def parameters_of(mark):
    return mark.args[1]


def test_no_claim_leaves_out_a_model_or_a_pair_that_it_is_about():
    every = {name: make() for name, make in MODELS.items()}
    # What the references of the general claims ask for.
    assert all(isinstance(model, SupportsDecoder) for model in every.values())
    assert all(isinstance(model, VAE) or model.sigma.numel() for model in every.values())
    assert models_with() == list(every)
    assert pairs_with() == PAIRS
    # Where the law is a known Gaussian, all closed forms are there.
    linear = [name for name, model in every.items() if hasattr(model, "W")]
    assert models_with(LinearGaussianModel) == linear
    assert models_with(LinearGaussianModel, *DOORS) == linear
    assert parameters_of(for_models_with(*EXACT).mark) == models_with(*EXACT)
    assert parameters_of(for_pairs_with(*EXACT).mark) == pairs_with(*EXACT)
    covered = Counter((case.values[0], case.values[1]) for case in parameters_of(under_every_objective.mark))
    analytic = [pair for pair in PAIRS if hasattr(every[pair[0]], "expected_log_likelihood")]
    assert set(covered.values()) == {1}
    closed = [pair for pair in PAIRS if has_closed_kl(*pair)]
    assert {guide for _, guide in PAIRS} - {guide for _, guide in closed} == {"Mixture", "Flow"}
    assert len(covered) == len(PAIRS) * 2 + len(closed) + len(analytic)


# --- training --------------------------------------------------------------------------------------


@under_every_objective
@pytest.mark.parametrize("train", [train_by_svi, train_by_torch, train_by_fit])
def test_training_moves_every_parameter_and_raises_the_elbo(pair, train, objective):
    x = data_for(pair[0])
    before, (start, start_error) = state(*pair), elbo_per_datum(*pair, x)
    train(*pair, x, objective, steps=40)
    end, end_error = elbo_per_datum(*pair, x)
    assert unchanged(before, *pair) == []
    assert end - start > 5 * (start_error + end_error)


@under_every_objective
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
    z = torch.ones(len(x), pair[0].latent_dim, dtype=x.dtype)
    assert torch.equal(guide.posterior(x).log_prob(z), pair[1].posterior(x).log_prob(z))


# --- draws -----------------------------------------------------------------------------------------


def test_predictive_draws_latents_from_the_guide(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    z = Predictive(model, guide=guide, num_samples=num, parallel=True)(x)["z"].detach()
    assert z.shape == (num, 6, model.latent_dim)
    assert_same_moments(z, guide.posterior(x).sample((num,)))


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


DRAWS = {"call": lambda m, n: m(n=n).detach(), "sample": lambda m, n: sample(m, n=n)["x"]}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_prior_predictive_has_the_moments_of_an_ancestral_simulation(model, draw):
    draws, (_, reference) = draw(model, 20_000), simulate(model, 20_000)
    assert draws.shape == reference.shape
    assert_same_moments(draws, reference)
    assert_same_covariance(draws, reference)


@for_models_with(LinearGaussianModel)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
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
    mean = model.decode(z)
    var = mean * (1 - mean) if isinstance(model, VAE) else (model.sigma**2).expand(model.data_dim)
    assert_moments(draws, mean, var.diag())


def test_uncondition_draws_the_data_too(model):
    x = data_for(model)
    trace = trace_of(poutine.uncondition(model), x)
    assert not trace.nodes["x"]["is_observed"]
    z, draw = trace.nodes["z"]["value"], trace.nodes["x"]["value"]
    assert not torch.equal(draw, x)
    torch.testing.assert_close(trace.log_prob_sum(), reference_log_joint(model, draw, z).sum())


@under((Trace_ELBO,), (ELBO,), (AnalyticKLELBO,))
def test_scale_multiplies_the_loss(pair, objective):
    model, guide = pair
    x = data_for(model)
    torch.manual_seed(1)
    loss = objective().loss(model, guide, x)
    torch.manual_seed(1)
    doubled = objective().loss(poutine.scale(model, scale=2.0), poutine.scale(guide, scale=2.0), x)
    assert doubled == 2 * loss


@under((Trace_ELBO,), (ELBO,), (AnalyticKLELBO,))
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


def posterior_moments(model, x):
    """Mean, standard deviation and kurtosis of each posterior coordinate by quadrature, (N, K) each."""
    _, z, weights = quadrature(model, x)
    mean = weights.T @ z
    variance = weights.T @ z.square() - mean.square()
    fourth = torch.stack([w @ (z - m).pow(4) for w, m in zip(weights.T, mean)])
    return mean, variance.sqrt(), fourth / variance.square()


def test_nuts_samples_the_posterior(model):
    x = data_for(model, 3)
    mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(x)
    z, (mean, sd, kurtosis) = mcmc.get_samples()["z"], posterior_moments(model, x)
    squares = ((z - mean) / sd).square()
    mean_error = sd / effective_sample_size(z[None]).sqrt()
    squares_error = ((kurtosis - 1) / effective_sample_size(squares[None])).sqrt()
    assert z.shape == (300, 3, model.latent_dim)
    assert largest((z.mean(0) - mean) / mean_error) < 5
    assert largest((squares.mean(0) - 1) / squares_error) < 5


@for_models_with(SupportsPosterior, LinearGaussianModel)
def test_the_posterior_is_gaussian_with_the_moments_of_quadrature(model):
    x = data_for(model, 3)
    law, (mean, sd, kurtosis) = model.posterior(x), posterior_moments(model, x)
    torch.testing.assert_close(law.mean, mean)
    torch.testing.assert_close(law.variance.sqrt(), sd)
    torch.testing.assert_close(kurtosis, torch.full_like(kurtosis, 3.0))


@for_models_with(*EXACT)
def test_exact_evidence_and_posterior_are_those_of_quadrature(model):
    x = data_for(model, 3)
    log_evidence, z, _ = quadrature(model, x)
    torch.testing.assert_close(evidence(model, x).value, log_evidence)
    some = z[:: len(z) // 50, None].expand(-1, 3, -1)
    expected = reference_log_joint(model, x, some) - log_evidence
    torch.testing.assert_close(model.posterior(x).log_prob(some), expected)


def test_importance_evidence_is_that_of_quadrature_within_its_interval(pair):
    model, guide = pair
    x, level = data_for(model, 6), 1 - 2 * float(scipy.stats.norm.sf(5))
    truth, _, _ = quadrature(model, x)
    got = evidence(model, x, method=Importance(5000), guide=guide, level=level, seed=0)
    assert float((got.lower - truth).max()) < 1e-7
    assert float((truth - got.upper).max()) < 1e-7


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


@for_pairs_with(SupportsExpectedLogLikelihood)
def test_vmap_over_an_ensemble_is_the_loop_for_a_deterministic_objective(make_pair):
    losses = [AnalyticELBO()(*make_pair()) for _ in range(3)]
    x = data_for(losses[0].model)
    expected = torch.stack([loss(x) for loss in losses])
    assert len(set(expected.tolist())) == 3
    torch.testing.assert_close(ensemble_losses(losses, x), expected)


def reference_loss(model, guide, x):
    """Minus the ELBO summed over data, and its standard error: none where the model has the closed form."""
    if isinstance(model, SupportsExpectedLogLikelihood):
        return -AnalyticELBO().per_datum(model, guide, x).sum(), 0.0
    value, error = elbo_per_datum(model, guide, x, num=20_000)
    return -len(x) * value, len(x) * error


@under((ELBO,), (AnalyticKLELBO,))
@pytest.mark.parametrize("num_particles", [1, 400])
def test_vmap_over_an_ensemble_draws_for_each_member(make_pair, objective, num_particles):
    pairs = [make_pair() for _ in range(3)]
    x = data_for(pairs[0][0])
    got = ensemble_losses([objective(num_particles)(*pair) for pair in pairs], x)
    for loss, (model, guide) in zip(got, pairs):
        per_datum = torch.stack([objective().per_datum(model, guide, x).detach() for _ in range(100)])
        variance = per_datum.var(0).sum()
        expected, error = reference_loss(model, guide, x)
        assert largest(loss - expected) < 5 * math.hypot(float((variance / num_particles).sqrt()), error) + 1e-9


def test_vmap_gives_equal_members_different_noise(make_pair):
    model, guide = make_pair()
    losses = ensemble_losses([ELBO()(*copy.deepcopy((model, guide))) for _ in range(3)], data_for(model))
    if isinstance(guide, Exact):  # every weight is the evidence, whatever the noise
        torch.testing.assert_close(losses, losses[:1].expand(3))
    else:
        assert len(set(losses.tolist())) == 3


@under((ELBO, {}), (ELBO, {"num_particles": 5}), (AnalyticKLELBO, {"num_particles": 5}), (AnalyticELBO, {}))
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


@for_models_with(LinearGaussianModel)
def test_the_marginal_scores_data_by_their_evidence(model):
    x = data_for(model)
    trace = trace_of(model.marginal(), x)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], model.log_evidence(x))
    torch.testing.assert_close(model.log_evidence(x), reference_marginal(model).log_prob(x))


@for_models_with(LinearGaussianModel)
def test_the_marginal_samples_the_law_of_the_data(model):
    law = reference_marginal(model)
    assert_moments(model.marginal()(n=20_000).detach(), law.mean, law.covariance_matrix)


@for_models_with(LinearGaussianModel)
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
import guides, inference, inference.comparison.guide_comparison, inference.plots.comparison, zoo
print(differences(before, global_state()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def flat_parameters(module):
    """All parameters in one vector."""
    return nn.utils.parameters_to_vector(module.parameters()).detach()


# Calls that take a seed, and a tensor that their noise decides.
SEEDED = {
    "evidence": lambda m, g, x: evidence(m, x, method=Importance(30), guide=g, seed=1).value,
    "fit": lambda m, g, x: (fit(m, g, x, steps=2, batch_size=7, seed=1, progress=False), flat_parameters(m))[1],
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
