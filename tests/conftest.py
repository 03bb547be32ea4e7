"""The registry: a new model or guide is one line below, and then runs through every conformance test unasked.

A test takes ``model``, ``pair``, ``make_model`` or ``make_pair`` and runs on all of the registry. A claim about closed
forms names the capability that it is about, ``@for_models_with(SupportsLogEvidence)``: its models follow from that.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # figures without a display
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side: threads of torch would only fight

import numpy as np
import pyro
import pytest
import torch

from guides import (
    ConstantVariance,
    Exact,
    Flow,
    FullRank,
    GaussNewtonDiagonal,
    GaussNewtonFull,
    Guide,
    Linear,
    LowRank,
    MeanField,
    Mixture,
    SemiAmortised,
    TiedMeanField,
)
from zoo import IMAVAE, PPCA, VAE, DeepGaussianVAE, LatentVariableModel, LinearVAE

# Name to a function that makes a new model: small, in float64.
MODELS: dict[str, Callable[[], LatentVariableModel]] = {
    "PPCA": lambda: PPCA(5, 2).double(),
    "LinearVAE": lambda: LinearVAE(5, 2, sigma=0.5).double(),
    "DeepGaussianVAE": lambda: DeepGaussianVAE(5, 2, hidden=(8,)).double(),
    "IMAVAE": lambda: IMAVAE(5, 2, gamma2=25.0, hidden=(8,)).double(),
    "VAE-Bernoulli": lambda: VAE(5, 2, hidden=(8,)).double(),
    "LinearVAE-wide-standardised": lambda: LinearVAE(2, 3).standardise_by(3 + torch.randn(20, 2)).double(),
}

# Name to a function that makes a new guide of a model; it raises TypeError where the two do not go together.
GUIDES: dict[str, Callable[[Any], Guide]] = {
    "Exact": Exact,
    "TiedMeanField": TiedMeanField,
    "Linear": lambda model: Linear(model.data_dim, model.latent_dim).double(),
    "MeanField": lambda model: MeanField(model.data_dim, model.latent_dim, hidden=(8,)).double(),
    "FullRank": lambda model: FullRank(model.data_dim, model.latent_dim, hidden=(8,)).double(),
}

# Further guides: they differ from those above in their law alone, so that each meets one model.
FAMILIES: dict[str, Callable[[Any], Guide]] = {
    "LowRank": lambda model: LowRank(model.data_dim, model.latent_dim, hidden=(8,)).double(),
    "ConstantVariance": lambda model: ConstantVariance(model.data_dim, model.latent_dim, hidden=(8,)).double(),
    "Mixture": lambda model: Mixture(model.data_dim, model.latent_dim, hidden=(8,)).double(),
    "Flow": lambda model: Flow(model.data_dim, model.latent_dim, hidden=(8,), flow_hidden=(8,)).double(),
    "GaussNewtonDiagonal": lambda model: GaussNewtonDiagonal(model, hidden=(8,)).double(),
    "GaussNewtonFull": lambda model: GaussNewtonFull(model, hidden=(8,)).double(),
    "SemiAmortised": lambda model: SemiAmortised(
        model, MeanField(model.data_dim, model.latent_dim, hidden=(8,)), steps=2, num_samples=4
    ).double(),
}


def _is_pair(model, guide):
    with torch.random.fork_rng(devices=[]):
        try:
            GUIDES[guide](MODELS[model]())
        except TypeError:
            return False
    return True


PAIRS = [(m, g) for m in MODELS for g in GUIDES if _is_pair(m, g)] + [("DeepGaussianVAE", g) for g in FAMILIES]


def build_pair(model, guide):
    """A new model and a new guide by their names."""
    made = MODELS[model]()
    return made, (GUIDES | FAMILIES)[guide](made)


def models_with(*capabilities):
    """Names of the models that are instances of every given class or protocol, of all where none is given."""
    with torch.random.fork_rng(devices=[]):
        names = [name for name, make in MODELS.items() if all(isinstance(make(), c) for c in capabilities)]
    if not names:  # pytest would skip the test
        raise LookupError(f"expected a model with {capabilities} in the registry")
    return names


def pairs_with(*capabilities):
    """(model name, guide name) of the pairs whose model is an instance of every given class or protocol."""
    names = models_with(*capabilities)
    return [(m, g) for m, g in PAIRS if m in names]


def has_closed_kl(model, guide):
    """Whether the divergence of the guide of that name from the prior of the model is known without sampling."""
    with torch.random.fork_rng(devices=[]):
        made = build_pair(model, guide)
        try:
            torch.distributions.kl_divergence(made[1].posterior(data_for(made[0])), made[0].prior())
        except NotImplementedError:
            return False
    return True


def for_models_with(*capabilities):
    """Restrict ``model`` and ``make_model`` of a test to the models with the capabilities."""
    return pytest.mark.parametrize("make_model", models_with(*capabilities), indirect=True)


def for_pairs_with(*capabilities):
    """Restrict ``pair`` and ``make_pair`` of a test to the pairs whose model has the capabilities."""
    return pytest.mark.parametrize("make_pair", pairs_with(*capabilities), indirect=True, ids="-".join)


@pytest.fixture(params=list(MODELS))
def make_model(request):
    """A function that makes a new model; the test runs once for each in the registry."""
    return MODELS[request.param]


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(params=PAIRS, ids="-".join)
def make_pair(request):
    """A function that makes a new (model, guide); the test runs once for each in the registry."""
    return lambda: build_pair(*request.param)


@pytest.fixture
def pair(make_pair):
    return make_pair()


def data_for(model, num=20, seed=1):
    """Data away from the origin, (num, D), that no model of the registry was made with."""
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    x = 1 + 1.5 * torch.randn(num, model.data_dim, generator=generator, dtype=like.dtype)
    return (x > 0).to(x) if isinstance(model, VAE) else x


def simulate(model, num, seed=1):
    """Ancestral draws of (z, x), written out with NumPy's generator: nothing of Pyro, nothing of the model's law."""
    random = np.random.RandomState(seed)
    z = torch.from_numpy(random.standard_normal((num, model.latent_dim)))
    noise = torch.from_numpy(random.standard_normal((num, model.data_dim)))
    with torch.no_grad():
        if isinstance(model, VAE):
            return z, (torch.special.ndtr(noise) < model.decode(z)).to(z)
        return z, model.decode(z) + model.sigma * noise


# Torch shows some warnings once a process, and warnings are errors here: let no test depend on which one came first.
torch.set_warn_always(True)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from one seed, whatever ran before it, and leaves the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _own_param_store():
    """An empty parameter store for every test: tests of users' pairs register fixed names such as "decoder" in it."""
    with pyro.get_param_store().scope():
        yield


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
