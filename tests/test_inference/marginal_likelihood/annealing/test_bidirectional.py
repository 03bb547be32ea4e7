"""Brackets on the assumption of converged chains, where the two ends or the modes disprove it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import Annealed, converged_bracket, summarise
from inference.marginal_likelihood.annealing.bidirectional import _ends

SIGMA = 0.05


def cubic(x):
    """x = z^3 - 3 z + noise: up to three thin modes."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x[:, 0]), 1.0))
        pyro.sample("x", dist.Normal(z**3 - 3 * z, SIGMA), obs=x[:, 0])


def at_one_mode(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(1.9 + 0 * x[:, 0], 0.2))


@pytest.fixture(scope="module")
def bracket():
    z, noise = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (z**3 - 3 * z + SIGMA * noise)[:, None]
    grid = torch.linspace(-8, 8, 800_001, dtype=torch.float64)
    log_f = torch.stack([-0.5 * grid**2 - 0.5 * ((v - grid**3 + 3 * grid) / SIGMA) ** 2 for v in x[:, 0]])
    truth = log_f.logsumexp(-1) + math.log(float(grid[1] - grid[0]) / (2 * math.pi * SIGMA))
    method = Annealed(50, 8, 2)
    return converged_bracket(cubic, x, guide=at_one_mode, method=method, num_steps=50, seed=0, progress=False), truth


def test_no_upper_end_of_a_fold_lies_below_the_lower_end(bracket):
    found, _ = bracket
    assert found.disproved.any()
    assert (found.upper_if_converged >= found.raw_lower).all()
    assert (found.upper_if_converged[found.disproved] == math.inf).all()
    assert ((found.raw_upper < found.raw_lower) == found.upside_down).all()
    assert f"which {int(found.disproved.sum())} of 30 data points disprove" in str(found)


def test_chains_that_miss_a_mode_have_no_upper_end_below_the_truth(bracket):
    """Most raw ends lie below the truth by a missed mode's share; of those that are kept Markov's inequality allows
    one in e^3 to lie three nats below it."""
    found, truth = bracket
    assert (found.raw_upper < truth - 0.1).double().mean() > 0.5
    assert (found.upper_if_converged >= truth - 1e-3).double().mean() >= 0.95


def weights(*values):
    """Two hundred weights about each value, of one datum each."""
    noise = 0.1 * torch.randn(200, len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return summarise([torch.tensor(values, dtype=torch.float64) + noise], 200)


def test_ends_upside_down_by_chance_are_one_and_beyond_it_disproved():
    """Lower ends near 0, upper ones near 1, at -.005, -1 and -1 where modes were missed."""
    ends = _ends(weights(0.0, 0.0, 0.0, 0.0), weights(-1.0, 0.005, 1.0, -1.0), torch.tensor([0, 0, 0, 1]) > 0)
    assert ends["disproved"].tolist() == [False, False, True, True]
    upper, lower = ends["upper_if_converged"], ends["raw_lower"]
    assert upper[0] == ends["raw_upper"][0]
    assert upper[1] == torch.maximum(lower[1], ends["raw_upper"][1])
    assert upper[2:].tolist() == [math.inf, math.inf]
