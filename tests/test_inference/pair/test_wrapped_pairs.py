"""Pairs whose halves are wrapped by Pyro's handlers: the right numbers, or a refusal that says what is wrong."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from inference import Importance, compare, evidence, gap, iwae, log_weights, sbc, simulate

X = torch.tensor([0.4, -1.2, 0.9, 2.0, -0.3, 0.1], dtype=torch.float64)
SHIFT = torch.full((6,), 0.7, dtype=torch.float64)
FIRST = torch.tensor([True, False] * 3)
QUIET = {"seed": 0, "progress": False}


def unobserved_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def shifted_model(x):
    with pyro.plate("data", len(x)):
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)


def posterior(name="z", shift=0.0):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(name, dist.Normal((x - shift) / 1.25, math.sqrt(0.2)))

    return guide


def conditioned_inside(x):
    return poutine.condition(unobserved_model, data={"x": x})(x)


def noisy_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + torch.randn(len(x)), 0.5), obs=x)


def log_normal(loc, var):
    return torch.distributions.Normal(torch.as_tensor(loc, dtype=torch.float64), math.sqrt(var)).log_prob(X)


EVIDENCE = log_normal(0.0, 1.25)
SHIFTED = log_normal(0.7, 1.25)
PRIOR_OF_SHIFT = torch.distributions.Normal(0.0, 1.0).log_prob(SHIFT)
MASKED = torch.where(FIRST, EVIDENCE, 0.0)

RIGHT = {
    "condition, inside": (conditioned_inside, posterior(), EVIDENCE),
    "condition, outside": (pyro.condition(unobserved_model, data={"x": X}), posterior(), EVIDENCE),
    "condition on a latent": (
        pyro.condition(shifted_model, data={"shift": SHIFT}),
        posterior(shift=0.7),
        SHIFTED + PRIOR_OF_SHIFT,
    ),
    "do": (poutine.do(shifted_model, data={"shift": SHIFT}), posterior(shift=0.7), SHIFTED),
    "do on what is observed": (poutine.do(model, data={"x": X}), posterior(), EVIDENCE),
    "mask": (poutine.mask(model, mask=FIRST), poutine.mask(posterior(), mask=FIRST), MASKED),
    "block of nothing": (poutine.block(model, hide=["other"]), poutine.block(posterior(), expose=["z"]), EVIDENCE),
    "reparam": (poutine.reparam(model, config={"z": LocScaleReparam(0.0)}), posterior("z_decentered"), EVIDENCE),
    "trace": (poutine.trace(model), poutine.trace(posterior()), EVIDENCE),
    "seed": (poutine.seed(model, rng_seed=1), posterior(), EVIDENCE),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_wrapped_pair_has_the_numbers_of_its_closed_form(name):
    wrapped, guide, truth = RIGHT[name]
    torch.testing.assert_close(log_weights(wrapped, guide, X, num_samples=5, seed=0), truth.expand(5, -1))
    found = evidence(wrapped, X, guide=guide, **QUIET)
    torch.testing.assert_close(found.value, truth, rtol=0, atol=1e-6)
    assert (found.lower <= truth + 1e-9).all()
    assert (truth <= found.upper + 1e-9).all()


@pytest.mark.parametrize("name", ["do", "reparam"])
def test_gap_and_comparison_of_a_wrapped_pair_are_exact(name):
    wrapped, guide, truth = RIGHT[name]
    found = gap(wrapped, guide, X, num_samples=20, restarts=0, max_steps=5, **QUIET)
    torch.testing.assert_close(found.total, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-6)
    columns = compare(wrapped, {"own": guide}, X, num_samples=20, **QUIET)["train"]
    torch.testing.assert_close(torch.from_numpy(columns["elbo"].values)[0, 0], truth, rtol=0, atol=1e-6)


def test_an_intervention_on_the_latent_leaves_the_likelihood_alone():
    z = torch.full((6,), 0.3, dtype=torch.float64)
    found = evidence(poutine.do(model, data={"z": z}), X, guide=posterior(), **QUIET)
    torch.testing.assert_close(found.value, log_normal(0.3, 0.25))


@pytest.mark.parametrize("name", ["condition, inside", "do", "mask", "reparam"])
def test_the_posterior_of_a_wrapped_model_is_calibrated(name):
    wrapped, guide, _ = RIGHT[name]
    simulation = simulate(wrapped, guide, X, num_simulations=600, num_samples=19, **QUIET)
    assert sbc(simulation, seed=0).p_value > 0.01
    off = simulate(wrapped, poutine.do(guide, data={}), X, num_simulations=600, num_samples=19, **QUIET)
    assert off.names == simulation.names


def _importance(model, guide):
    return evidence(model, X, guide=guide, method=Importance(50), **QUIET)


DOORS = {
    "log_weights": lambda model, guide: log_weights(model, guide, X, num_samples=3, seed=0),
    "evidence": lambda model, guide: evidence(model, X, guide=guide, **QUIET),
    "importance": _importance,
    "gap": lambda model, guide: gap(model, guide, X, num_samples=8, restarts=0, **QUIET),
    "compare": lambda model, guide: compare(model, {"own": guide}, X, num_samples=8, **QUIET),
    "simulate": lambda model, guide: simulate(model, guide, X, num_simulations=12, num_samples=19, **QUIET),
}
REFUSED = {
    "block of a latent": (poutine.block(shifted_model, hide=["shift"]), "hidden by poutine.block"),
    "noise outside pyro.sample": (noisy_model, "randomness outside of pyro.sample"),
    "replay": (poutine.replay(model, trace=poutine.trace(posterior()).get_trace(X)), "'z'.*poutine.replay"),
    "scale": (poutine.scale(model, scale=2.0), "scale"),
    "uncondition": (poutine.uncondition(model), "observes data"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_wrapper_that_leaves_no_density_is_named(name, door):
    wrapped, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        DOORS[door](wrapped, posterior())


def test_noise_of_a_guide_outside_its_sites_leaves_its_weights_right():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 1.25 + 0.3 * torch.randn(len(x), dtype=x.dtype), 0.6))

    value, error = iwae(log_weights(model, guide, X, num_samples=4000, seed=0))
    assert ((value - EVIDENCE).abs() < 4 * error).all()


def test_data_of_an_enclosing_condition_are_no_simulated_data():
    wrapped, guide, _ = RIGHT["condition, outside"]
    with pytest.raises(ValueError, match=r"observes its argument at site 'x'"):
        simulate(wrapped, guide, X, num_simulations=12, num_samples=19, **QUIET)
