"""Semi-amortised refinement: against the closed-form optimum of a linear model, the refit, and what must not change."""

import copy
from itertools import pairwise

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from registry import data_for

from guides import (
    ConstantVariance,
    Exact,
    Flow,
    FullRank,
    HMCRefined,
    LowRank,
    MeanField,
    Mixture,
    SemiAmortised,
    TiedMeanField,
)
from inference import ELBO, AnalyticELBO, elbo, fit, gap, log_weights, refit
from inference.pair.call import Call
from zoo import DeepGaussianVAE, LinearVAE, OptimalNoise, Scaled, Uniform, digits


def linear_model(data_dim=6, latent_dim=3, sigma=0.5):
    model = LinearVAE(data_dim, latent_dim, sigma=sigma).double().requires_grad_(False)
    model.W.data = torch.randn(data_dim, latent_dim).double()
    return model


def exact_elbo(model, guide, x):
    """The ELBO of each datum in closed form."""
    return AnalyticELBO().per_datum(model, guide, x).detach()


@pytest.fixture
def deep():
    """A deep model, a guide trained briefly on it, and data."""
    torch.manual_seed(0)
    x = digits(transform=Scaled(16.0), dtype=torch.float32).train
    model, guide = DeepGaussianVAE(64, 4, hidden=(32,)), MeanField(64, 4, hidden=(32,))
    model, guide = model.standardise_by(x), guide.standardise_by(x)
    fit(model, guide, x, steps=150, batch_size=128, optimizer=lambda p: torch.optim.Adam(p, lr=5e-3), progress=False)
    return model.double().requires_grad_(False), guide.double(), x[:30].double()


# --- on a linear model, where the noise is exact and so is the ELBO --------------------------------


@pytest.mark.parametrize("family", [MeanField, FullRank, LowRank, ConstantVariance])
def test_the_elbo_rises_with_every_step_for_every_datum(family):
    model = linear_model()
    base, x = family(6, 3, hidden=(8,)).double(), data_for(model)
    values = [exact_elbo(model, SemiAmortised(model, base, steps=t), x) for t in (0, 1, 2, 4, 8, 16, 32)]
    torch.testing.assert_close(values[0], exact_elbo(model, base, x), rtol=0, atol=0)
    rises = torch.stack(values).diff(dim=0)
    # The noise is stored as float32 numbers of order one, so that its moments are exact to 1e-6 or so.
    assert rises.min() > -1e-4
    assert (rises.mean(1) > 0).all()


def test_the_steps_lead_to_the_closed_form_optimum_of_the_family():
    model = linear_model()
    x = data_for(model)
    for family, optimum in ((MeanField, TiedMeanField(model)), (FullRank, Exact(model))):
        base, best = family(6, 3, hidden=(8,)).double(), exact_elbo(model, optimum, x)
        start = (best - exact_elbo(model, base, x)).mean()
        ends = [(best - exact_elbo(model, SemiAmortised(model, base, steps=t), x)).mean() for t in (10, 30, 100)]
        assert start > 10
        assert 0 < ends[2] < ends[1] < ends[0] < 0.1 * start
        assert ends[2] < 1e-3 * start


def test_the_sampled_elbo_rises_and_a_descent_is_found_out():
    model = linear_model()
    base, x = MeanField(6, 3, hidden=(8,)).double(), data_for(model)

    def sampled(guide):
        value, error = elbo(log_weights(model, guide, x, num_samples=4000))
        return float(value.mean()), float(error.square().sum().sqrt() / len(x))

    def rises(guides):
        found = [sampled(guide) for guide in guides]
        return all(b > a - 4 * (ea**2 + eb**2) ** 0.5 for (a, ea), (b, eb) in pairwise(found))

    class Descending(SemiAmortised):  # planted: steps down the ELBO
        def _elbo(self, x, parameters):
            return -super()._elbo(x, parameters)

    assert rises([SemiAmortised(model, base, steps=t) for t in (0, 1, 2, 5, 10, 20)])
    assert not rises([Descending(model, base, steps=t) for t in (0, 1, 2, 5, 10, 20)])


# --- on a deep model -------------------------------------------------------------------------------


def test_five_steps_leave_a_tenth_of_the_amortisation_gap(deep):
    model, guide, x = deep[0], deep[1], deep[2][:20]
    best = refit(model, guide, x, num_samples=64, restarts=0, progress=False)
    lost = best.improvement.mean()
    assert lost > 0.3
    left = []
    for steps in (5, 20):
        found = refit(model, SemiAmortised(model, guide, steps=steps), x, num_samples=64, restarts=0, progress=False)
        left.append(found.improvement.mean())
        assert abs((found.elbo - best.elbo).mean()) < 0.02 * lost  # the family's best is the same
    assert left[0] < 0.1 * lost
    assert left[1] < 0.01 * lost


def test_a_refined_guide_has_less_amortisation_gap_and_the_same_rest(deep):
    model, guide, x = deep
    options = {"num_samples": 64, "restarts": 0, "progress": False}
    before = gap(model, guide, x[:10], method="importance", **options)
    after = gap(model, SemiAmortised(model, guide, steps=10), x[:10], known=before.evidence, **options)
    assert after.amortisation.mean() < 0.1 * before.amortisation.mean()
    torch.testing.assert_close(after.approximation, before.approximation, atol=0.05, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", [Mixture, Flow])
def test_families_without_a_natural_unit_rise_too(deep, family):
    model, _, x = deep
    base = family(64, 4, hidden=(16,)).standardise_by(x).double()

    def value(steps):
        torch.manual_seed(0)
        return elbo(log_weights(model, SemiAmortised(model, base, steps=steps), x, num_samples=500))

    (start, start_error), (end, end_error) = value(0), value(10)
    assert (end - start).mean() > 4 * (start_error + end_error).mean()


# --- the distribution is a function of the data point ----------------------------------------------


def test_no_steps_are_the_base_guide_bit_for_bit():
    model = linear_model()
    base, x = MeanField(6, 3, hidden=(8,)).double(), data_for(model)
    own, refined = base.posterior(x), SemiAmortised(model, base, steps=0).posterior(x)
    assert torch.equal(own.mean, refined.mean)
    assert torch.equal(own.variance, refined.variance)


@pytest.mark.parametrize("family", [MeanField, Mixture, Flow])
def test_a_row_has_one_distribution_whatever_generator_and_batch(deep, family):
    model, _, x = deep
    guide = SemiAmortised(model, family(64, 4, hidden=(16,)).standardise_by(x).double(), steps=3)
    z = torch.randn(30, 4, dtype=torch.float64)
    state = torch.get_rng_state()
    first = guide.posterior(x).log_prob(z)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(guide.posterior(x).log_prob(z), first)
    backwards = guide.posterior(x.flip(0)).log_prob(z.flip(0)).flip(0)
    torch.testing.assert_close(backwards, first, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(guide.posterior(x).log_prob(z), first, rtol=0, atol=0)


def test_a_saved_state_gives_the_same_distribution():
    model = linear_model()
    guide = SemiAmortised(model, MeanField(6, 3, hidden=(8,)).double(), steps=3).double()
    other = SemiAmortised(model, MeanField(6, 3, hidden=(8,)).double(), steps=3).double()
    other.load_state_dict(guide.state_dict())
    x = data_for(model)
    assert torch.equal(other.posterior(x).mean, guide.posterior(x).mean)


def test_the_support_of_the_latent_is_kept():
    prior = Uniform(2, -0.5, 0.5)
    model = DeepGaussianVAE(3, 2, hidden=(8,), prior=prior).double().requires_grad_(False)
    base = MeanField(3, 2, hidden=(8,), support=prior().support).double()
    x = 0.3 * torch.randn(40, 3).double()
    values = []
    for steps in (0, 20):
        guide = SemiAmortised(model, base, steps=steps)
        assert guide.posterior(x).sample((50,)).abs().max() < 0.5
        values.append(elbo(log_weights(model, guide, x, num_samples=2000)))
    (start, start_error), (end, end_error) = values
    assert (end - start).mean() > 4 * (start_error + end_error).mean()


# --- inside Pyro and inside other runs -------------------------------------------------------------


def test_no_site_of_the_model_leaks():
    model = linear_model()
    guide = SemiAmortised(model, MeanField(6, 3, hidden=(8,)).double(), steps=2)
    trace = poutine.trace(guide).get_trace(data_for(model))
    assert {name for name, node in trace.nodes.items() if node["type"] == "sample"} == {"data", "z"}
    names = {name for name, node in trace.nodes.items() if node["type"] == "param"}
    assert names == {f"{guide.store_name}.base.{name}" for name, _ in guide.base.named_parameters()}


def test_it_runs_inside_particle_plates_and_other_guides():
    model = linear_model()
    guide = SemiAmortised(model, MeanField(6, 3, hidden=(8,)).double(), steps=3)
    x = data_for(model)
    alone = guide.posterior(x)
    draw = Call(model, guide, (x,)).run(7)
    site = draw.guide_sites["z"]
    assert site.value.shape == (7, 20, 3)
    torch.testing.assert_close(site.fn.mean.expand(7, 20, 3), alone.mean.expand(7, 20, 3), rtol=0, atol=0)
    with pyro.plate("outer", 5, dim=-2):
        assert poutine.trace(guide).get_trace(x).nodes["z"]["value"].shape == (5, 20, 3)
    assert HMCRefined(model, guide, num_steps=1)(x).shape == (20, 3)
    nested = SemiAmortised(model, MeanField(6, 3, hidden=(8,)).double(), steps=1)
    assert Predictive(model, guide=nested, num_samples=4, parallel=True)(x)["z"].shape == (4, 20, 3)


def test_the_gradient_goes_straight_through_to_the_encoder():
    model = linear_model()
    base, x = MeanField(6, 3, hidden=(8,)).double(), data_for(model)
    guide = SemiAmortised(model, base, steps=4)
    start = base.encode(x)
    parameters = (start + guide._refinement(x, start)).detach().requires_grad_()
    (at_the_end,) = torch.autograd.grad(
        (model.expected_log_likelihood(x, base.family(parameters)) - kl(base.family(parameters), model)).sum(),
        parameters,
    )
    expected = torch.autograd.grad(start, list(base.parameters()), at_the_end)
    got = torch.autograd.grad(exact_elbo_with_gradient(model, guide, x), list(base.parameters()))
    torch.testing.assert_close(got, expected)


def kl(distribution, model):
    return torch.distributions.kl_divergence(distribution, model.prior())


def exact_elbo_with_gradient(model, guide, x):
    return AnalyticELBO().per_datum(model, guide, x).sum()


def test_single_precision_ends_where_double_does(deep):
    model, guide, x = deep
    double = SemiAmortised(model, guide, steps=40).double()
    single = [half.float() for half in copy.deepcopy((model, double))]
    distribution, other = double.posterior(x), single[1].posterior(x.float())
    assert other.mean.dtype == torch.float32
    # Both are next to the same optimum, where the ELBO is flat: nats are half the squares of such distances.
    assert ((other.mean - distribution.mean) / distribution.stddev).abs().mean() < 0.05
    assert (other.stddev / distribution.stddev).log().abs().mean() < 0.05


# --- what is refused -------------------------------------------------------------------------------


def test_parts_and_numbers_that_do_not_fit_are_refused():
    model, base = linear_model(), MeanField(6, 3, hidden=(8,))
    with pytest.raises(TypeError, match=r"expected a model with prior\(\)"):
        SemiAmortised(torch.nn.Linear(2, 2), base)
    with pytest.raises(TypeError, match="expected a guide with encode"):
        SemiAmortised(model, Exact(model))
    with pytest.raises(ValueError, match="expected steps to be at least 0"):
        SemiAmortised(model, base, steps=-1)
    with pytest.raises(ValueError, match="expected num_samples to be at least 2"):
        SemiAmortised(model, base, num_samples=1)
    for rate in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a positive finite rate"):
            SemiAmortised(model, base, rate=rate)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 6\), got \(4, 5\)"):
        SemiAmortised(model, base)(torch.zeros(4, 5))


def test_a_batch_dependent_model_is_refused_until_frozen():
    model, base = DeepGaussianVAE(5, 2, hidden=(8,), noise=OptimalNoise()), MeanField(5, 2, hidden=(8,))
    x = torch.randn(20, 5)
    guide = SemiAmortised(model, base, steps=1)
    with pytest.raises(ValueError, match="not frozen"):
        ELBO().loss(model, guide, x)
    model.freeze(base, x)
    assert SemiAmortised(model, base, steps=1).posterior(x).mean.shape == (20, 2)
