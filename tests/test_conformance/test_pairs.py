"""What every pair of the registry does: training, copies, weights, and nothing global."""

import copy
import inspect
import math
import pickle
import subprocess
import sys
import typing
from collections import Counter

import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from references import (
    EXACT,
    changed,
    elbo_per_datum,
    quadrature,
    reference_log_joint,
    state,
    trace_of,
    train_by_fit,
    train_by_svi,
    train_by_torch,
    unchanged,
)
from registry import (
    GUIDES,
    MODELS,
    OBJECTIVES,
    PAIRS,
    SOME,
    build_pair,
    data_for,
    for_models_with,
    for_pairs_with,
    models_with,
    pairs_with,
    under_every_objective,
)
from torch import nn

import guides
from guides import Exact
from inference import (
    ELBO,
    AnalyticELBO,
    Importance,
    elbo,
    evidence,
    fit,
    log_weights,
    predictive,
    reconstruct,
    sample,
)
from inference.comparison.guide_comparison import compare
from inference.core.protocols import (
    SupportsDecoder,
    SupportsExpectedLogLikelihood,
    SupportsLogEvidence,
    SupportsPosterior,
)
from zoo.linear.models import LinearGaussianModel


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
def test_a_claim_covers_exactly_the_models_that_the_library_accepts(capability):
    let_in = [name for name, make in MODELS.items() if accepts(lambda make=make: DOORS[capability](make()))]
    assert models_with(capability) == let_in
    assert pairs_with(capability) == [(m, g) for m, g in PAIRS if m in let_in]


def asked_of_the_model(guide_name):
    """What a guide's constructor says that it asks of a model, ``object`` where it takes none."""
    guide_class = type(GUIDES[guide_name](MODELS[next(m for m, g in PAIRS if g == guide_name)]()))
    return typing.get_type_hints(guide_class.__init__).get("model", object)


def test_every_model_pairs_with_every_guide_that_asks_no_more_of_it():
    widely = [name for name, member in GUIDES.items() if member.models is None]
    expected = [(m, g) for m in MODELS for g in widely if isinstance(MODELS[m](), asked_of_the_model(g))]
    assert expected == [pair for pair in PAIRS if pair[1] in widely]
    refused = [(m, g) for m in MODELS for g in widely if (m, g) not in PAIRS]
    assert not any(accepts(lambda m=m, g=g: GUIDES[g](MODELS[m]())) for m, g in refused)


def test_every_model_and_every_guide_is_in_a_pair():
    assert {m for m, _ in PAIRS} == set(MODELS)
    assert {g for _, g in PAIRS} == set(GUIDES)


def test_every_guide_of_the_package_with_a_density_is_registered():
    classes = [getattr(guides, name) for name in guides.__all__ if isinstance(getattr(guides, name), type)]
    programs = {thing for thing in classes if issubclass(thing, guides.Guide)}
    # Bases, guides known by their draws alone, and those that are made of a user's or another guide.
    others = {guides.Guide, guides.EncoderGuide, guides.Local, guides.WrappedEncoder}
    others |= {thing for thing in programs if not thing.has_density}
    assert programs - others == {type(build_pair(m, g)[1]) for m, g in PAIRS}


def has_closed_kl(model, guide):
    """Whether the divergence of a guide from the prior of the model is known without sampling."""
    try:
        torch.distributions.kl_divergence(guide.posterior(data_for(model)), model.prior())
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_a_guide_has_a_closed_form_divergence_where_it_is_declared(names):
    assert has_closed_kl(*build_pair(*names)) == GUIDES[names[1]].closed_kl


def parameters_of(mark):
    return mark.args[1]


def test_no_claim_leaves_out_a_model_or_a_pair_that_it_is_about():
    every = {name: make() for name, make in MODELS.items()}
    # What the references of the general claims ask for.
    assert all(isinstance(model, SupportsDecoder) for model in every.values())
    assert models_with() == list(every)
    assert pairs_with() == PAIRS
    # Where the data are known to be Gaussian, all closed forms are there.
    gaussian = [name for name, member in MODELS.items() if member.observation.marginal is not None]
    assert models_with(*DOORS) == models_with(*EXACT) == gaussian
    assert set(models_with(LinearGaussianModel)) <= set(gaussian)
    assert parameters_of(for_models_with(*EXACT).mark) == models_with(*EXACT)
    assert parameters_of(for_pairs_with(*EXACT).mark) == pairs_with(*EXACT)


def test_every_objective_runs_on_every_pair_that_it_serves():
    covered = Counter((case.values[0], case.id.split("-")[-1]) for case in parameters_of(under_every_objective.mark))
    assert set(covered.values()) == {1}
    for name, member in OBJECTIVES.items():
        served = [
            p for p in PAIRS if p[0] in models_with(*member.asks) and (GUIDES[p[1]].closed_kl or not member.closed_kl)
        ]
        expected = served if member.everywhere else [p for p in served if p in SOME]
        assert sorted(expected) == sorted(pair for pair, objective in covered if objective == name) != []


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


def test_importance_evidence_agrees_with_quadrature(pair):
    model, guide = pair
    x, level = data_for(model, 6), 1 - 2 * float(scipy.stats.norm.sf(5))
    truth, _, _ = quadrature(model, x)
    got = evidence(model, x, method=Importance(5000), guide=guide, level=level, seed=0)
    assert float((got.lower - truth).max()) < 1e-7
    assert float((truth - got.upper).max()) < 1e-7


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
def test_a_seeded_call_repeats_and_changes_nothing_global(pair, call):
    x, twin, before = data_for(pair[0]), copy.deepcopy(pair), global_state()
    first = SEEDED[call](*pair, x)
    assert differences(before, global_state()) == []
    torch.manual_seed(123)
    assert torch.equal(SEEDED[call](*twin, x), first)


def test_log_weights_move_the_generator_and_nothing_else_global(pair):
    x, before = data_for(pair[0]), global_state()
    log_weights(*pair, x, num_samples=3)
    assert differences(before, global_state()) == ["torch generator"]
