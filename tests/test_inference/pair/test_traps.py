"""Pyro's traps, one regression test each: what goes wrong in stock Pyro, and that a pair under our tools is spared.

Users' pairs here are functions, PyroModules and plain modules of scalar Gaussians, whose evidence is written out.
"""

import abc
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.nn import PyroModule
from registry import data_for
from trap_pairs import (
    Normal,
    PlainModule,
    assert_exact,
    equicorrelated,
    grid_guide,
    grid_model,
    randn,
    reference,
    story,
    zeros,
)

from guides import Exact, Linear, TiedMeanField
from inference import (
    ELBO,
    AnalyticKLELBO,
    Importance,
    evidence,
    fit,
    iwae,
    log_weights,
    pareto_k,
    predictive,
    sample,
)
from inference.core.protocols import SupportsLogEvidence, SupportsPosterior
from zoo import PPCA, LatentVariableModel, LinearVAE

# --- an objective forgets the last pair ------------------------------------------------------------------


def test_one_objective_serves_pairs_of_different_plate_depth():
    model = PPCA(5, 2).double()
    x = data_for(model)
    objective, truth = ELBO(num_particles=3), equicorrelated(5)
    for _ in range(2):
        assert objective.loss(model, Exact(model), x) == pytest.approx(-float(evidence(model, x).value.sum()))
        assert objective.loss(grid_model, grid_guide, x) == pytest.approx(-float(truth.log_prob(x).sum()))


def test_a_stock_objective_remembers_the_first_plate_depth():
    model = PPCA(5, 2).double()
    x, objective = data_for(model), Trace_ELBO(num_particles=3, vectorize_particles=True)
    objective.loss(model, Exact(model), x)
    with pytest.raises(ValueError, match="collide"):
        objective.loss(grid_model, grid_guide, x)


def test_a_pair_may_go_deeper_than_at_its_first_call():
    def model(x):
        return grid_model(x) if x.dim() == 2 else story(lambda z: z, 1.0, x)

    def guide(x):
        if x.dim() == 2:
            return grid_guide(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", Normal(x / 2, 0.5**0.5))

    for x, truth in ((randn(6), reference(0.0, 2**0.5)), (randn(6, 3), equicorrelated(3))):
        assert_exact(log_weights(model, guide, x, num_samples=4), truth.log_prob(x))


# --- subsampled plates -----------------------------------------------------------------------------------


FULL, BATCH = 20, 4


def subsampled_pair(exact=True):
    """x_n ~ N(0, 2) of which each run takes a random part; ``chosen`` lists the indices."""
    chosen = []

    def model(x):
        with pyro.plate("data", FULL, subsample_size=BATCH) as index:
            chosen.append(index)
            z = pyro.sample("z", Normal(zeros(BATCH), 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", FULL, subsample_size=BATCH) as index:
            z = Normal(x[index] / 2, 0.5**0.5) if exact else Normal(zeros(BATCH), 1.0)
            pyro.sample("z", z)

    return model, guide, chosen


def test_weights_in_a_subsampled_plate_are_unscaled():
    x, (model, guide, chosen) = randn(FULL), subsampled_pair()
    weights = log_weights(model, guide, x, num_samples=7)
    assert_exact(weights, reference(0.0, 2**0.5).log_prob(x[chosen[-1]]))


@pytest.mark.parametrize("chunk", [1, 2])
def test_all_chunks_of_weights_are_of_the_same_subsample(chunk):
    x, (model, guide, chosen) = randn(FULL), subsampled_pair()
    weights = log_weights(model, guide, x, num_samples=7, chunk=chunk)
    assert_exact(weights, reference(0.0, 2**0.5).log_prob(x[chosen[-1]]))


@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_loss_of_a_subsampled_plate_is_that_of_all_data(num_particles):
    x, (model, guide, chosen) = randn(FULL), subsampled_pair()
    loss = ELBO(num_particles).loss(model, guide, x)
    assert loss == pytest.approx(-FULL / BATCH * float(reference(0.0, 2**0.5).log_prob(x[chosen[-1]]).sum()))


def test_predictive_draws_stay_within_the_subsample_of_the_guide():
    x, (model, guide, chosen) = 100.0 * torch.arange(FULL).double(), subsampled_pair()
    z = predictive(model, guide, x, num_samples=7)["z"]
    assert z.shape == (7, BATCH)
    assert float((z - x[chosen[-1]] / 2).abs().max()) < 5


def test_stock_renyi_elbo_fails_in_a_subsampled_plate_and_ours_holds():
    x, (model, guide, chosen) = 1.5 * randn(FULL), subsampled_pair(exact=False)
    truth, stock = reference(0.0, 2**0.5).log_prob(x), RenyiELBO(alpha=0.0, num_particles=10, vectorize_particles=True)
    theirs, ours = [], []
    for _ in range(200):
        theirs.append(-torch.tensor(stock.loss(model, guide, x)).double() - truth.sum())
        bound = iwae(log_weights(model, guide, x, num_samples=10)).value
        ours.append(FULL / BATCH * (bound - truth[chosen[-1]]).sum())
    theirs, ours = (float(e.mean() / e.std()) * math.sqrt(200) for e in map(torch.stack, (theirs, ours)))
    assert theirs > 5  # standard errors above the evidence
    assert ours < 3


# --- per datum, not pooled -------------------------------------------------------------------------------


def test_k_hat_is_per_datum_where_stock_pyro_pools_the_batch():
    model = PPCA(5, 2).double()
    x = model(n=100).detach()
    distribution = model.posterior(x)

    def wide_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(distribution.loc, scale_tril=1.3 * distribution.scale_tril))

    # Each weight is bounded; a product of a hundred of them is as good as unbounded.
    assert float(pareto_k(log_weights(model, wide_guide, x, num_samples=1000)).value.max()) < 0
    assert psis_diagnostic(model, wide_guide, x, num_particles=1000, max_plate_nesting=1) > 1


def test_weights_are_per_datum_where_stock_pyro_sums_the_batch():
    model = PPCA(5, 2).double()
    guide, x = Linear(5, 2).double(), data_for(model)
    torch.manual_seed(1)
    theirs, _, _ = vectorized_importance_weights(model, guide, x, num_samples=7, max_plate_nesting=1)
    guide_run = log_weights(model, guide, x, num_samples=7, chunk=7)  # finds the depth of the plates
    torch.manual_seed(1)
    ours = log_weights(model, guide, x, num_samples=7, chunk=7)
    assert guide_run.shape == ours.shape == (7, 20)
    assert theirs.shape == (7,)
    torch.testing.assert_close(ours.sum(1), theirs.detach())


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_prediction_is_not_the_data_where_stock_pyro_returns_them(num_samples):
    model = PPCA(5, 2).double()
    guide, x = Exact(model), data_for(model)
    theirs = Predictive(model, guide=guide, num_samples=num_samples, parallel=True)(x)["x"]
    ours = predictive(model, guide, x, num_samples=num_samples)["x"]
    assert torch.equal(theirs, x.expand(num_samples, 20, 5))
    assert ours.shape == theirs.shape
    assert not bool((ours == x).any())
    assert not bool((sample(model, x)["x"] == x).any())


# --- modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide_class", [Exact, TiedMeanField])
def test_a_guide_of_the_models_posterior_has_none_of_its_parameters(guide_class):
    model = LinearVAE(5, 2).double()
    guide = guide_class(model)
    loss = Trace_ELBO()(model, guide)
    assert list(guide.parameters()) == []
    assert list(guide.state_dict()) == []
    assert [name for name, _ in loss.named_parameters()] == ["model.W", "model.mu", "model.log_sigma"]
    trace = poutine.trace(guide).get_trace(data_for(model))
    assert [name for name, site in trace.nodes.items() if site["type"] == "param"] == []


def test_bound_methods_hide_parameters_that_our_modules_show():
    vae = PlainModule()
    assert list(Trace_ELBO()(vae.model, vae.guide).parameters()) == []
    model, guide = LinearVAE(5, 2), Linear(5, 2)
    assert len(list(Trace_ELBO()(model, guide).parameters())) == 6


def test_our_base_mixes_with_abc_and_protocols_need_no_base():
    with pytest.raises(TypeError, match="metaclass"):
        type("Stock", (PyroModule, abc.ABC), {})

    class Abstract(LatentVariableModel, abc.ABC):
        @abc.abstractmethod
        def log_evidence(self, x): ...

    with pytest.raises(TypeError, match="log_evidence"):
        Abstract(5, 2)
    assert isinstance(LinearVAE(5, 2), SupportsLogEvidence)
    assert not isinstance(LatentVariableModel(5, 2), SupportsLogEvidence)
    assert isinstance(Linear(5, 2), SupportsPosterior)


def test_our_tools_leak_no_site_to_a_handler_outside():
    model = PPCA(5, 2).double()
    guide, x = Linear(5, 2).double(), data_for(model)

    def program():
        log_weights(model, guide, x, num_samples=3)
        evidence(model, x, method=Importance(30), guide=guide)
        predictive(model, guide, x, num_samples=3)
        sample(model, n=3)
        fit(model, guide, x, steps=2, progress=False)

    assert list(poutine.trace(program).get_trace().nodes) == ["_INPUT", "_RETURN"]


def test_an_outer_handler_sees_an_objectives_parameters_only():
    model, guide = PPCA(5, 2).double(), Linear(5, 2).double()
    trace = poutine.trace(lambda: ELBO(3).loss(model, guide, data_for(model))).get_trace()
    sites = {name: site["type"] for name, site in trace.nodes.items() if name not in ("_INPUT", "_RETURN")}
    keys = {f"{half.store_name}.{key}" for half in (model, guide) for key, _ in half.named_parameters()}
    assert sites == dict.fromkeys(keys, "param")


def test_a_kl_without_closed_form_is_refused_where_stock_pyro_samples():
    def model(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Uniform(0.0, 1.0))
            pyro.sample("x", Normal(u, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = Normal(zeros(len(x)), 1.0)
            pyro.sample("u", dist.TransformedDistribution(base, [dist.transforms.SigmoidTransform()]))

    x = randn(4)
    kl_draws = {TraceMeanField_ELBO().loss(model, guide, x) for _ in range(3)}
    assert len(kl_draws) == 3
    with pytest.raises(NotImplementedError, match=r"'u' between TransformedDistribution and Uniform: use .* ELBO"):
        AnalyticKLELBO().loss(model, guide, x)
    bound, error = iwae(log_weights(model, guide, x, num_samples=10_000))
    truth = (reference(0.0, 1.0).cdf(x) - reference(0.0, 1.0).cdf(x - 1)).log()
    assert float(((bound - truth).abs() / error).max()) < 5
