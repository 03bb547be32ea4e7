"""Pairs with AutoGuides in files."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from inference import load_pair, log_weights, save_pair
from inference.pair.module import Module

OPTIONS = {"num_samples": 6, "whole": True, "seed": 0, "progress": False}


class Regression(Module):
    """Of y on x, with an outlier's indicator that no AutoGuide takes."""

    def __init__(self, width=2):
        super().__init__()
        self.width = width

    def forward(self, x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(self.width), 1.0).to_event(1))
        far = pyro.sample("far", dist.Bernoulli(x.new_tensor(0.1)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(w @ x.T, (0.5 + far).unsqueeze(-1)).to_event(1), obs=y)

    def config(self):
        return {"width": self.width}


def pair(family, width=2, seed=0):
    torch.manual_seed(seed)
    data = torch.randn(7, width).double(), torch.randn(7).double()
    model = Regression(width)
    guide = family(poutine.block(model, hide=["far"]))
    with poutine.block():
        guide(*data)
    for parameter in guide.double().parameters():
        parameter.data.add_(0.1)
    return model, guide, data


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize(
    "family", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
def test_an_autoguide_comes_back_from_the_file_alone(family, tmp_path):
    model, guide, data = pair(family)
    save_pair(tmp_path / "pair.safetensors", model, guide)
    expected = log_weights(model, guide, *data, **OPTIONS)
    state = torch.get_rng_state()
    pyro.clear_param_store()
    again = load_pair(tmp_path / "pair.safetensors")
    assert type(again[1]) is family
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())
    assert torch.equal(log_weights(*again, *data, **OPTIONS), expected)


def test_autoguides_of_different_sizes_are_loaded_side_by_side(tmp_path):
    made = {}
    for width in (2, 3):
        pyro.clear_param_store()
        made[width] = pair(AutoMultivariateNormal, width)
        save_pair(tmp_path / f"{width}.safetensors", *made[width][:2])
    for width, (model, guide, data) in made.items():
        again = load_pair(tmp_path / f"{width}.safetensors")
        assert torch.equal(log_weights(*again, *data, **OPTIONS), log_weights(model, guide, *data, **OPTIONS))


def test_a_given_model_is_loaded_into(tmp_path):
    model, guide, data = pair(AutoNormal)
    save_pair(tmp_path / "pair.safetensors", model, guide)
    own = Regression()
    loaded, again = load_pair(tmp_path / "pair.safetensors", own)
    assert loaded is own
    assert torch.equal(log_weights(own, again, *data, **OPTIONS), log_weights(model, guide, *data, **OPTIONS))


def test_other_autoguides_need_an_instance(tmp_path):
    model, guide, _ = pair(AutoDelta)
    save_pair(tmp_path / "pair.safetensors", model, guide)
    with pytest.raises(ValueError, match=r"AutoDelta cannot be rebuilt from the file alone"):
        load_pair(tmp_path / "pair.safetensors")
