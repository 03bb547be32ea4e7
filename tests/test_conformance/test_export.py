"""Every member can be exported with any number of rows: encoder, posterior and decoder as graphs of torch.export."""

import pyro.distributions as dist
import pytest
import torch
from registry import GUIDES, MODELS, data_for
from torch import nn
from torch.export import Dim, export

from guides import ConvEncoder, FullRank, HMCRefined, MeanField, Resampled, WrappedEncoder
from zoo import AutoregressiveVAE, ConvDecoder, DeepGaussianVAE, LearntDiagonal, MixtureOfGaussians, WrappedDecoder

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


PAIRS = {
    f"{name}-{model}": (name, model)
    for name, member in GUIDES.items()
    for model in member.models or MODELS
    if all(isinstance(MODELS[model](), kind) for kind in member.asks)
}


@pytest.mark.parametrize(("name", "model"), PAIRS.values(), ids=PAIRS)
def test_a_guide_is_exported(name, model):
    model = MODELS[model]()
    guide, x = GUIDES[name](model), data_for(model, MORE)
    if hasattr(guide, "encode"):
        check_exported(guide, lambda guide, x: guide.encode(x), x)
    if name not in DERIVATIVES:
        check_exported(guide, posterior, x, latents(model))


X = torch.randn(MORE, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def unchecked(mean):
    """Validation of a distribution asks for the values of its parameters, which no graph of any number of rows has."""
    return dist.Normal(mean, 1.0, validate_args=False).to_event(1)


def unregistered():
    """Encoders and decoders beside the registry's, with their functions of rows."""
    torch.manual_seed(0)
    encoder, decoder = ConvEncoder((1, 4, 4), 4, channels=(3,)), ConvDecoder(2, (1, 4, 4), channels=(3,))
    linear, back = nn.Linear(16, 2), nn.Linear(2, 16)
    return {
        "WrappedEncoder": (WrappedEncoder(linear, unchecked), posterior, X, X[:, :2]),
        "ConvEncoder": (MeanField(16, 2, encoder=encoder), posterior, X, X[:, :2]),
        "standardised": (FullRank(16, 2, hidden=(8,)).standardise_by(X), posterior, X, X[:, :2]),
        "WrappedDecoder": (WrappedDecoder(back, unchecked, data_dim=16, latent_dim=2), decoded, X[:, :2]),
        "ConvDecoder": (DeepGaussianVAE(16, 2, network=decoder), decoded, X[:, :2]),
        "learnt prior": (DeepGaussianVAE(16, 2, prior=LearntDiagonal(2)), decoded, X[:, :2]),
        "mixture prior": (DeepGaussianVAE(16, 2, prior=MixtureOfGaussians(2, 3)), decoded, X[:, :2]),
        "AutoregressiveVAE": (AutoregressiveVAE(16, 2, hidden=(32,)), likelihood, X[:, :2], (X > 0).double()),
    }


def decoded(owner, z):
    return owner.decode(z)


def likelihood(owner, z, x):
    return owner.likelihood(z).log_prob(x)


@pytest.mark.parametrize("name", unregistered())
def test_what_is_not_registered_is_exported(name):
    owner, *rest = unregistered()[name]
    check_exported(owner.double(), *rest)


def test_guides_without_a_distribution_of_rows_have_none_to_export():
    """Draws by the model have no density; a local guide has one, of its own data alone, which it compares."""
    model, base = DeepGaussianVAE(16, 2, hidden=(8,)), MeanField(16, 2, hidden=(8,))
    for guide in (HMCRefined(model, base), Resampled(model, base)):
        assert not hasattr(guide, "posterior")
    with pytest.raises(ValueError, match="expected the data that the local guide was made for"):
        base.double().local(X[:N]).posterior(X)
