"""Simulated data in the place of views of arguments, of whole data sets, and of guides that are refitted."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from inference import sbc, simulate
from inference.pair.call import Call
from inference.pair.simulated import with_simulated_data

QUIET = {"seed": 0, "progress": False}
X = torch.randn(6, 4, generator=torch.manual_seed(0), dtype=torch.float64)


def _pair(observe):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 4), 1.0).to_event(1))
            observe(z, x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    return model, guide


def reshaped(z, x):
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.reshape(-1, 4))


def columns(z, x):
    for k in range(4):
        pyro.sample(f"x_{k}", dist.Normal(z[..., k], 1.0), obs=x[:, k])


@pytest.mark.parametrize("observe", [reshaped, columns])
def test_views_of_an_argument_are_simulated(observe):
    model, guide = _pair(observe)
    result = sbc(simulate(model, guide, X, num_simulations=600, **QUIET), seed=0)
    assert result.p_value > 0.001
    assert float(result.symmetry.min()) > 0.001 / len(result.names)

    def too_narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.3).to_event(1))

    assert sbc(simulate(model, too_narrow, X, num_simulations=600, **QUIET), seed=0).p_value < 1e-6

    def shifted(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.4, 0.5**0.5).to_event(1))

    assert float(sbc(simulate(model, shifted, X, num_simulations=600, **QUIET), seed=0).symmetry.min()) < 1e-6


def test_a_view_is_filled_and_the_rest_of_its_argument_kept():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 2])

    call = Call(model, model, (X,))
    new = with_simulated_data(call, call.probe().model_sites, {"x": torch.arange(6.0, dtype=torch.float64)})
    expected = X.clone()
    expected[:, 2] = torch.arange(6.0)
    assert torch.equal(new.args[0], expected)


def _mean(y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("points", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_a_guide_that_is_refitted_to_each_data_set_is_calibrated():
    def posterior(y):
        """The exact posterior, as an AutoNormal that optimisation would end at."""
        guide = AutoNormal(_mean)
        guide(y)
        with torch.no_grad():
            guide.locs.mean.copy_(y.sum() / (1 + len(y)))
            guide.scales.mean = torch.tensor((1 + len(y)) ** -0.5, dtype=torch.float64)
        return guide

    y = X[:, 0].contiguous()
    guide = posterior(y)
    with pytest.raises(ValueError, match="expected refit= to fit AutoNormal to each simulated data set"):
        simulate(_mean, guide, y, num_simulations=100, whole=True, **QUIET)
    options = {"num_simulations": 200, "num_samples": 19, "whole": True, **QUIET}
    result = sbc(simulate(_mean, guide, y, refit=posterior, **options), seed=0)
    assert result.p_value > 0.001
    assert float(result.symmetry.min()) > 0.0005
    assert sbc(simulate(_mean, guide, y, refit=lambda _: guide, **options), seed=0).p_value < 1e-3
