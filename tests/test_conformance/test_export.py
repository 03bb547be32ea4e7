"""Every member can be exported with any number of rows: encoder, posterior and decoder as graphs of torch.export."""

import pytest
import torch
from registry import GUIDES, MODELS, data_for
from torch import nn
from torch.export import Dim, export

N, MORE = 9, 12

# Their posterior takes derivatives by functorch or autograd, which torch.export does not trace for any number of rows.
DERIVATIVES = {"GaussNewtonDiagonal", "GaussNewtonFull", "SemiAmortised"}


class Method(nn.Module):
    """A function of a module and tensors as a module."""

    def __init__(self, owner, function):
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *tensors):
        return self.function(self.owner, *tensors)


def check_exported(owner, function, *tensors):
    """The graph of some rows gives the numbers of the module for more of them."""
    module = Method(owner.eval(), function)
    rows = tuple(tensor[:N] for tensor in tensors)
    graph = export(module, rows, dynamic_shapes=(tuple({0: Dim("N")} for _ in tensors),)).module()
    torch.testing.assert_close(graph(*tensors), module(*tensors))


def posterior(owner, x, z):
    return owner.posterior(x).log_prob(z)


def latents(model):
    return torch.randn(MORE, model.latent_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_exported(name):
    model = MODELS[name]()
    check_exported(model, lambda model, z: model.decode(z), latents(model))
    if hasattr(model, "posterior"):
        check_exported(model, posterior, data_for(model, MORE), latents(model))


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_exported(name):
    member = GUIDES[name]
    models = (MODELS[model]() for model in member.models or MODELS)
    model = next(model for model in models if all(isinstance(model, kind) for kind in member.asks))
    guide, x = member(model), data_for(model, MORE)
    if hasattr(guide, "encode"):
        check_exported(guide, lambda guide, x: guide.encode(x), x)
    if name not in DERIVATIVES:
        check_exported(guide, posterior, x, latents(model))
