"""Moments of gradients against NumPy and a closed form, and what a measurement leaves behind."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import MeanField
from inference import ELBO, DReG, gradient_noise
from zoo import LinearVAE


def test_moments_are_those_of_the_gradients_one_by_one():
    torch.manual_seed(0)
    model, guide = LinearVAE(3, 2).double(), MeanField(3, 2, hidden=(4,)).double()
    x = torch.randn(5, 3).double()
    noise = gradient_noise(ELBO(2), model, guide, x, num_repeats=7, seed=3, progress=False)
    torch.manual_seed(3)
    rows = []
    for _ in range(7):
        loss = ELBO(2).differentiable_loss(model, guide, x)
        gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
        rows.append(torch.cat([g.flatten() for g in gradients]).numpy())
    rows = np.array(rows)
    got = {name: torch.cat([getattr(noise[g], name) for g in ("decoder", "encoder")]) for name in ("mean", "variance")}
    np.testing.assert_allclose(got["mean"], rows.mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got["variance"], rows.var(0, ddof=1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(noise["encoder"].standard_error.square() * 7, noise["encoder"].variance)


def location_pair():
    """z ~ N(3, 1) that the data say nothing of, and a guide N(m, 4)."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_full((), 3.0), 1.0))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("m", lambda: x.new_ones(())), 2.0))

    return model, guide


def test_the_ratio_is_that_of_the_closed_form():
    """z = m + 2 e with m = 1: the gradient of the loss in m is z - 3, of mean -2 and variance 4."""
    noise = gradient_noise(ELBO(), *location_pair(), torch.zeros(1).double(), num_repeats=500, seed=0, progress=False)
    assert list(noise) == ["encoder"]
    encoder = noise["encoder"]
    assert abs(float(encoder.mean) + 2) < 4 * float(encoder.standard_error)
    assert float(encoder.variance) == pytest.approx(4, abs=4 * 4 * math.sqrt(2 / 500))
    assert encoder.signal_to_noise == pytest.approx(1, abs=4 * math.sqrt(1.5 / 500))
    assert encoder.signal_to_noise**2 == pytest.approx(float(encoder.per_parameter) ** 2 - 1 / 500)


def test_without_signal_the_ratio_is_about_zero():
    model, guide = location_pair()
    pyro.param("m", torch.tensor(3.0).double())
    noise = gradient_noise(ELBO(), model, guide, torch.zeros(1).double(), num_repeats=300, seed=0, progress=False)
    assert noise["encoder"].signal_to_noise < 4 / math.sqrt(300)


def test_a_measurement_leaves_everything_as_it_was():
    model, guide = LinearVAE(3, 2), MeanField(3, 2, hidden=(4,))
    objective, x = DReG(3), torch.randn(5, 3)
    before = [p.detach().clone() for half in (model, guide) for p in half.parameters()]
    state = torch.get_rng_state()
    gradient_noise(objective, model, guide, x, num_repeats=3, seed=0, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    after = [p for half in (model, guide) for p in half.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))
    assert int(objective.step) == 0


def test_groups_may_be_given_and_a_pair_without_parameters_is_refused():
    model, guide = LinearVAE(3, 2), MeanField(3, 2, hidden=(4,))
    x = torch.randn(5, 3)
    noise = gradient_noise(ELBO(), model, guide, x, num_repeats=2, groups={"W": [model.W]}, progress=False)
    assert {name: group.mean.shape for name, group in noise.items()} == {"W": (6,)}
    for half in (model, guide):
        half.requires_grad_(False)
    with pytest.raises(ValueError, match="expected a pair with at least one trainable parameter"):
        gradient_noise(ELBO(), model, guide, x, num_repeats=2, progress=False)
    with pytest.raises(ValueError, match="expected num_repeats to be at least 2, got 1"):
        gradient_noise(ELBO(), model, guide, x, num_repeats=1, progress=False)


def test_parameters_of_both_halves_are_counted_once():
    layer = nn.Linear(3, 2)
    shared = MeanField(3, 2, hidden=(4,))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            distribution = shared.posterior(torch.zeros_like(x))
            z = pyro.sample("z", distribution)
            pyro.sample("x", dist.Normal(z @ pyro.module("layer", layer).weight, 1.0).to_event(1), obs=x)

    noise = gradient_noise(ELBO(), model, shared, torch.randn(5, 3), num_repeats=2, progress=False)
    sizes = {name: len(group.mean) for name, group in noise.items()}
    assert sizes == {"decoder": 8, "encoder": sum(p.numel() for p in shared.parameters())}
