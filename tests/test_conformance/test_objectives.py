"""What every objective of the registry does with every pair that it serves."""

import copy
import math

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from references import (
    changed,
    elbo_per_datum,
    largest,
    state,
    train_by_fit,
    train_by_svi,
    train_by_torch,
    unchanged,
)
from registry import (
    data_for,
    for_pairs_with,
    under,
    under_every_objective,
)
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from guides import Exact
from inference import (
    ELBO,
    AnalyticELBO,
    AnalyticKLELBO,
)
from inference.core.protocols import (
    SupportsExpectedLogLikelihood,
)


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


def ensemble_losses(losses, x):
    """Losses of several pairs at once: their parameters stacked, one functional call, vmapped."""
    parameters, buffers = stack_module_state(losses)
    return vmap(lambda p, b: functional_call(losses[0], (p, b), (x,)), randomness="different")(parameters, buffers)


@for_pairs_with(SupportsExpectedLogLikelihood)
def test_vmap_is_the_loop_for_a_deterministic_objective(make_pair):
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
def test_a_traced_graph_of_the_loss_gives_the_same_value(pair, objective, options):
    model, guide = pair
    loss = objective(**options)(model, guide)
    graph = make_fx(loss)(data_for(model, 6))
    x = data_for(model, 6, seed=2)
    loss(x)
    torch.manual_seed(1)
    expected = loss(x)
    torch.manual_seed(1)
    torch.testing.assert_close(graph(x), expected)
