"""The mean evidence of a data set: the bias that every logarithm has, and rows without an upper end."""

import math

import pyro
import pyro.distributions as dist
import torch

from inference import Importance, evidence


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, x.new_tensor(1.7 * 0.5**0.5)).to_event(1))


def test_the_mean_of_many_data_allows_for_the_bias_of_the_log():
    for seed in range(2):
        x = 2**0.5 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        truth = float(dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1).mean())
        result = evidence(model, x, method=Importance(300, search=False), guide=guide, seed=seed, progress=False)
        got, spread = result.mean, float(result.standard_error.square().sum().sqrt()) / 4000
        assert abs(got.value - truth) < 3 * got.standard_error
        assert got.value < truth - spread  # without the bias it would be too low by several errors


def test_rows_with_an_upper_end_have_a_mean_of_their_own():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = evidence(model, x, method=Importance(4000, search=False), guide=guide, seed=0, progress=False)
    assert bool(result.bounded.all())
    assert result.bounded_mean == result.mean
    result.upper[1] = math.inf
    chosen = torch.tensor([0, 2, 3, 4])
    assert result.bounded_mean.value == float(result.value[chosen].mean())
    assert result.bounded.tolist() == [True, False, True, True, True]
