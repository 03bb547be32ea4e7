"""What every objective of the registry does with every pair that it serves."""

import copy
import math

import pyro
import pytest
import torch
from pyro import poutine
from references import (
    changed,
    elbo_per_datum,
    largest,
    reference_marginal,
    state,
    train_by_fit,
    train_by_svi,
    train_by_torch,
    unchanged,
)
from registry import (
    GUIDES,
    MODELS,
    OBJECTIVES,
    SOME,
    build_pair,
    data_for,
    for_pairs_with,
    objectives_that,
    under,
    under_every_objective,
)
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import inference.objectives
from inference import ELBO, AnalyticELBO, Objective, StickingTheLanding
from inference.core.protocols import SupportsExpectedLogLikelihood, SupportsPrecision


def test_every_exported_objective_is_registered():
    exported = [getattr(inference.objectives, name) for name in inference.objectives.__all__]
    classes = {thing for thing in exported if isinstance(thing, type) and issubclass(thing, Objective)}
    ours = {type(member()) for member in OBJECTIVES.values() if isinstance(member(), Objective)}
    assert ours == classes - {Objective}


def trained_halves(objective, pair):
    """The halves of a pair that an objective moves, and the others."""
    halves = dict(zip(("model", "guide"), pair))
    moved = [half for name, half in halves.items() if name in objective.trains]
    return moved, [half for half in pair if half not in moved]


# --- training --------------------------------------------------------------------------------------


def assert_training_raises_the_elbo(pair, train, objective):
    x, (moved, left) = data_for(pair[0]), trained_halves(objective, pair)
    before, before_left = state(*moved), state(*left)
    start, start_error = elbo_per_datum(*pair, x)
    train(objective.program(pair[0]), pair[1], x, objective, steps=40)
    end, end_error = elbo_per_datum(*pair, x)
    assert unchanged(before, *moved) == []
    assert changed(before_left, *left) == []
    assert end - start > 5 * (start_error + end_error)


@under(*OBJECTIVES, pairs=SOME[::4])  # the others, too, in the slow one
def test_training_moves_every_parameter_and_raises_the_elbo(pair, objective):
    assert_training_raises_the_elbo(pair, train_by_fit, objective)


@pytest.mark.slow
@under_every_objective
def test_training_raises_the_elbo_of_every_pair(pair, objective):
    assert_training_raises_the_elbo(pair, train_by_fit, objective)


# For one pair: on all of them a step of one is a step of the other, as the next test has it.
@under(*OBJECTIVES, pairs=SOME[:1])
@pytest.mark.parametrize("train", [train_by_svi, pytest.param(train_by_torch, marks=pytest.mark.slow)])
def test_training_by_hand_raises_the_elbo_as_well(pair, train, objective):
    assert_training_raises_the_elbo(pair, train, objective)


@under_every_objective
def test_one_step_of_svi_is_one_step_of_torch(pair, objective):
    x, (model, guide) = data_for(pair[0]), copy.deepcopy(pair)
    torch.manual_seed(1)
    train_by_svi(objective.program(pair[0]), pair[1], x, objective, steps=1)
    torch.manual_seed(1)
    train_by_torch(objective.program(model), guide, x, objective, steps=1)
    assert changed(state(*pair), model, guide) == []


@under(*OBJECTIVES, pairs=SOME)
def test_a_deepcopy_trains_by_itself(pair, objective):
    x, twin = data_for(pair[0]), copy.deepcopy(pair)
    before, (moved, _) = state(*pair), trained_halves(objective, twin)
    start = state(*moved)
    train_by_svi(objective.program(twin[0]), twin[1], x, objective)
    assert unchanged(start, *moved) == []
    assert changed(before, *pair) == []


# --- the bound and the loss ------------------------------------------------------------------------

per_datum_objectives = under(*objectives_that(lambda member: member.value), pairs=SOME)


@per_datum_objectives
def test_the_loss_is_minus_the_sum_of_a_bound_for_each_row(pair, objective):
    x, program = data_for(pair[0]), objective.program(pair[0])
    torch.manual_seed(1)
    bound = objective().per_datum(program, pair[1], x)
    torch.manual_seed(1)
    loss = objective()(program, pair[1])(x)
    assert (bound.shape, bound.dtype, bound.requires_grad) == ((20,), torch.float64, True)
    torch.testing.assert_close(loss, -bound.sum())


class Sampled(nn.Module):
    """A half of a pair in a plate over 100 data points, of which it is given ten."""

    def __init__(self, program):
        super().__init__()
        self.program, self.latent_dim = program, program.latent_dim

    def plate(self, x):
        return pyro.plate("data", 10 * len(x), subsample=torch.arange(len(x)))


class SampledModel(Sampled):
    def forward(self, x):
        with self.plate(x):
            z = pyro.sample("z", self.program.prior())
            pyro.sample("x", self.program.likelihood(z), obs=x)


class SampledGuide(Sampled):
    def forward(self, x):
        with self.plate(x):
            pyro.sample("z", self.program.posterior(x))


class ByHand(Objective):
    """A user's own objective, which does not know of plates."""

    def bound(self, draw):
        return draw.log_weights.mean(0)


def assert_scaled(make, program, pair):
    """The loss of ten of 100 data points is ten times that of the ten."""
    (model, guide), x = pair, data_for(pair[0], 10)
    torch.manual_seed(1)
    loss = make().loss(program(SampledModel(model)), SampledGuide(guide), x)
    torch.manual_seed(1)
    bound = make().per_datum(program(model), guide, x).detach()
    assert bound.shape == (10,)
    assert loss == pytest.approx(-10 * float(bound.sum()), rel=1e-9)


# The precision is set at the model itself, which a plate of a user's own hides.
@under(*objectives_that(lambda m: m.subsamples and m.value and SupportsPrecision not in m.asks), pairs=SOME)
def test_the_loss_of_a_subsample_has_the_scale_of_the_plate(pair, objective):
    assert_scaled(objective, objective.program, pair)


@pytest.mark.parametrize("names", SOME, ids="-".join)
def test_an_objective_of_a_users_own_has_the_scale_of_the_plate(names):
    assert_scaled(ByHand, lambda model: model, build_pair(*names))


@under(*objectives_that(lambda member: not member.subsamples), pairs=SOME)
def test_a_closed_form_refuses_a_subsampling_plate(pair, objective):
    with pytest.raises(ValueError, match="scale or subsampling"):
        objective().loss(pair[0], SampledGuide(pair[1]), data_for(pair[0], 10))


# --- direction -------------------------------------------------------------------------------------

# Draws of a bound and of a gradient, and how often the data stand side by side in each.
REPEATS, COPIES = 60, 20


def mean_of_bound(objective, model, guide, x):
    """Mean of an objective over data and draws, and its standard error; the data are as they are."""
    x = x.repeat(COPIES, 1)
    with torch.no_grad():
        draws = torch.stack([objective().per_datum(model, guide, x).mean() for _ in range(REPEATS)])
    return float(draws.mean()), float(draws.std()) / math.sqrt(REPEATS)


def keeps_its_side(value, error, truth, side):
    """Whether a mean bound lies on its side of the truth, within four standard errors and rounding."""
    slack = 4 * error + 1e-9
    return value <= truth + slack if side == "below" else -value >= truth - slack


def gaussian_pair(guide_name):
    """A linear model, a guide of it without common parameters, data of its own, and their mean log evidence."""
    model = MODELS["LinearVAE"]()
    x = model(n=20).detach()
    guide = GUIDES[guide_name](copy.deepcopy(model))
    return model, guide, x, float(reference_marginal(model).log_prob(x).mean().detach())


# The second moment of an untrained guide's weights, of which an upper bound is made, is beyond any number of draws.
GUIDES_OF = {"below": ("MeanField", "TiedMeanField", "Exact"), "above": ("TiedMeanField", "Exact")}
CLAIMS = [(name, guide) for name, member in OBJECTIVES.items() for guide in GUIDES_OF.get(member.bounds, ())]


def many_particles(member):
    """The objective; where it bounds from above, with particles enough for the limit that it claims."""
    return member if member.bounds == "below" else lambda: member(num_particles=200)


@pytest.mark.parametrize(("name", "guide_name"), CLAIMS)
def test_a_bound_is_on_its_side_of_the_evidence(name, guide_name):
    member, (model, guide, x, truth) = OBJECTIVES[name], gaussian_pair(guide_name)
    assert keeps_its_side(*mean_of_bound(many_particles(member), model, guide, x), truth, member.bounds)


class Lifted(Objective):
    """The ELBO with the divergence of the wrong sign."""

    def bound(self, draw):
        rate = draw.total(draw.guide_sites) - draw.total(draw.model_sites, observed=False)
        return (draw.total(draw.model_sites, observed=True) + rate).mean(0)


class Doubled(Objective):
    """The importance-weighted bound without its division by the number of particles."""

    def bound(self, draw):
        return draw.log_weights.logsumexp(0)


class Negative(Objective):
    """Minus the ELBO, which claims to be an upper bound."""

    def bound(self, draw):
        return -draw.log_weights.mean(0)


@pytest.mark.parametrize(
    ("defect", "side"),
    [(Lifted, "below"), (lambda: Doubled(3), "below"), (lambda: Negative(16), "above")],
    ids=["sign", "division", "direction"],
)
def test_a_bound_on_the_wrong_side_is_found(defect, side):
    model, guide, x, truth = gaussian_pair("TiedMeanField")
    assert not keeps_its_side(*mean_of_bound(defect, model, guide, x), truth, side)


@pytest.mark.parametrize("name", objectives_that(lambda member: member.tight))
def test_at_the_exact_posterior_a_bound_is_the_evidence(name):
    model, guide, x, truth = gaussian_pair("Exact")
    bound = OBJECTIVES[name]().per_datum(model, guide, x).mean().detach()
    assert abs(float(bound)) == pytest.approx(abs(truth), rel=1e-9)


# --- gradients on average --------------------------------------------------------------------------


def gradients_of(objective, pair, x):
    """Gradients of the loss by all parameters, each a mean over draws, (REPEATS, P)."""
    loss, parameters, x = objective()(*pair), [p for half in pair for p in half.parameters()], x.repeat(COPIES, 1)
    found = [torch.autograd.grad(loss(x) / COPIES, parameters) for _ in range(REPEATS)]
    return torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in found])


def differs_on_average(objective, reference, pair, x):
    """Whether the means of two gradients differ by more than five standard errors, in some direction.

    The directions are those of the parameters and, to see a small bias that is common to many, that of the difference
    of the first halves of both, which the second halves are then asked about.
    """
    a, b = (gradients_of(make, pair, x) for make in (objective, reference))
    half = REPEATS // 2
    direction = (a[:half].mean(0) - b[:half].mean(0)).unsqueeze(-1)
    scores = []
    for one, other in ((a, b), (a[half:] @ direction, b[half:] @ direction)):
        error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
        scores.append(float(((one.mean(0) - other.mean(0)).abs() / (error + 1e-9)).max()))
    return max(scores) > 5


@pytest.mark.parametrize("name", objectives_that(lambda member: member.gradient is not None))
def test_a_gradient_has_the_mean_of_its_reference(name):
    pair = build_pair("LinearVAE", "MeanField")
    assert not differs_on_average(OBJECTIVES[name], OBJECTIVES[name].gradient, pair, data_for(pair[0]))


def test_a_biased_gradient_is_found():
    # Sticking the landing with several particles leaves out a score that does not vanish on average.
    pair = build_pair("LinearVAE", "MeanField")
    assert differs_on_average(lambda: StickingTheLanding(3), OBJECTIVES["IWELBO"], pair, data_for(pair[0]))


# --- scales and masks ------------------------------------------------------------------------------


@under(*objectives_that(lambda member: member.samples_elbo))
def test_scale_multiplies_the_loss(pair, objective):
    model, guide = pair
    x = data_for(model)
    torch.manual_seed(1)
    loss = objective().loss(model, guide, x)
    torch.manual_seed(1)
    doubled = objective().loss(poutine.scale(model, scale=2.0), poutine.scale(guide, scale=2.0), x)
    assert doubled == 2 * loss


@under(*objectives_that(lambda member: member.samples_elbo))
def test_masked_data_add_nothing_to_the_loss(pair, objective):
    model, guide = pair
    x, mask = data_for(model), torch.arange(20) % 3 > 0
    masked = poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask)
    torch.manual_seed(1)
    kept = objective() if objective.value else ELBO()  # the stock objective has no bound per data point
    expected = -float(kept.per_datum(model, guide, x)[mask].sum().detach())
    torch.manual_seed(1)
    assert objective().loss(*masked, x) == pytest.approx(expected, rel=1e-12)
    torch.manual_seed(1)
    corrupted = torch.where(mask[:, None], x, data_for(model, seed=2))
    assert objective().loss(*masked, corrupted) == pytest.approx(expected, rel=1e-12)


# --- torch.func ------------------------------------------------------------------------------------


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
    value, error = elbo_per_datum(model, guide, x, num=1000)
    return -len(x) * value, len(x) * error


@under(*objectives_that(lambda member: member.samples_elbo and member.value))
@pytest.mark.parametrize("num_particles", [1, 20])
def test_vmap_over_an_ensemble_draws_for_each_member(make_pair, objective, num_particles):
    pairs = [make_pair() for _ in range(3)]
    x = data_for(pairs[0][0])
    got = ensemble_losses([objective(num_particles=num_particles)(*pair) for pair in pairs], x)
    for loss, (model, guide) in zip(got, pairs):
        draws = objective().per_datum(model, guide, x.repeat(100, 1)).detach().reshape(100, len(x))
        variance = draws.var(0).sum()
        expected, error = reference_loss(model, guide, x)
        assert largest(loss - expected) < 5 * math.hypot(float((variance / num_particles).sqrt()), error) + 1e-9


def test_vmap_gives_equal_members_different_noise(make_pair):
    model, guide = make_pair()
    losses = ensemble_losses([ELBO()(*copy.deepcopy((model, guide))) for _ in range(3)], data_for(model))
    if GUIDES[guide.member].noiseless:  # every weight is the evidence, whatever the noise
        torch.testing.assert_close(losses, losses[:1].expand(3))
    else:
        assert len(set(losses.tolist())) == 3


# That the step of one particle is traced with all its bits, for every pair, is the claim of captured training.
@under(*objectives_that(lambda member: member.samples_elbo and member.value), pairs=SOME)
def test_a_traced_graph_of_five_particles_gives_the_same_value(pair, objective):
    loss = objective(num_particles=5)(objective.program(pair[0]), pair[1])
    graph = make_fx(loss)(data_for(pair[0], 6))
    x = data_for(pair[0], 6, seed=2)
    loss(x)
    torch.manual_seed(1)
    expected = loss(x)
    torch.manual_seed(1)
    torch.testing.assert_close(graph(x), expected)
