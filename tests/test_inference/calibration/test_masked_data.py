"""Calibration of pairs some of whose latents or observations are masked, or whose data are missing."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from inference import sbc, simulate, tarp

QUIET = {"seed": 0, "progress": False}
NAN = float("nan")
X = torch.tensor([[0.4, NAN, 1.0], [2.0, 1.0, 0.3], [NAN, -1.0, NAN], [0.1, -0.2, 0.5]], dtype=torch.float64)
MASK = torch.tensor([[True, True], [True, False], [True, True], [True, False]])


def some_seen(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 0.5).mask(~x.isnan()).to_event(1), obs=x.nan_to_num())


def posterior(x, width=1.0):
    variance = 1 / (1 + 4 * (~x.isnan()).sum(-1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(4 * x.nan_to_num().sum(-1) * variance, width * variance**0.5))


def test_missing_values_stay_missing_in_simulated_data():
    simulation = simulate(some_seen, posterior, X, num_simulations=800, missing=True, **QUIET)
    assert sbc(simulation, seed=0).p_value > 0.001
    narrow = simulate(some_seen, lambda x: posterior(x, 0.6), X, num_simulations=800, missing=True, **QUIET)
    assert sbc(narrow, seed=0).p_value < 1e-6
    with pytest.raises(ValueError, match="missing=True"):
        simulate(some_seen, posterior, X, num_simulations=800, **QUIET)


def walk(x, mask):
    """Two steps of a random walk, seen through noise; the second is masked for some data points."""
    with pyro.plate("data", len(x)):
        z = x.new_zeros(len(x))
        for t in range(2):
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def smoother(x, mask, shift=0.0, masked_shift=0.0):
    """The exact posterior: of z_0 given both observations or the first, and of z_1 given z_0 and its own."""
    with pyro.plate("data", len(x)):
        both = (2 * x[:, 0] + x[:, 1]) / 5, x.new_tensor(0.4) ** 0.5
        first = x[:, 0] / 2, x.new_tensor(0.5) ** 0.5
        mean, sd = (torch.where(mask[:, 1], a, b) for a, b in zip(both, first))
        z = pyro.sample("z_0", dist.Normal(mean + shift, sd))
        with poutine.mask(mask=mask[:, 1]):
            own = torch.where(mask[:, 1], (z + x[:, 1]) / 2, z + masked_shift)
            pyro.sample("z_1", dist.Normal(own, 0.5**0.5))


def _simulated(guide):
    x = X.nan_to_num()[:, :2].contiguous()
    return simulate(walk, guide, x, MASK, num_simulations=800, **QUIET)


def test_masked_latents_count_for_nothing_in_calibration():
    simulation = _simulated(smoother)
    assert sbc(simulation, seed=0).p_value > 0.001
    assert torch.equal(simulation.truth[:4, 1] != 0, MASK[:, 1])
    away = _simulated(lambda x, mask: smoother(x, mask, masked_shift=100.0))
    assert torch.equal(away.draws, simulation.draws)
    assert tarp(simulation, seed=0).p_value > 0.001
    assert sbc(_simulated(lambda x, mask: smoother(x, mask, shift=0.5)), seed=0).p_value < 1e-6


def test_a_guide_without_the_mask_is_refused():
    def unmasked(x, mask):
        smoother(x, torch.ones_like(mask))

    with pytest.raises(ValueError, match="under the same mask"):
        _simulated(unmasked)


def test_what_depends_on_a_masked_latent_is_refused():
    def reads_on(x, mask):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask[:, 1]):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x, mask):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask[:, 1]):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.5**0.5))

    with pytest.raises(ValueError, match="depends on a masked latent"):
        simulate(reads_on, guide, X.nan_to_num(), MASK, num_simulations=800, **QUIET)
