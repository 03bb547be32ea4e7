"""The registry: a new model or guide is one line below, and then runs through every conformance test unasked.

A test takes ``model``, ``pair``, ``make_model`` or ``make_pair`` and runs on all of the registry. A claim about closed
forms names the capability that it is about, ``@for_models_with(SupportsLogEvidence)``: its models follow from that.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO

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
from inference import ELBO, AnalyticELBO, AnalyticKLELBO
from inference.core.protocols import SupportsExpectedLogLikelihood
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


OBJECTIVES = [Trace_ELBO, ELBO, AnalyticKLELBO, AnalyticELBO]


# What an objective asks of the model beyond being one.
ASKS = {AnalyticELBO: [SupportsExpectedLogLikelihood]}


def under(*cases):
    """Every pair under every objective that serves its model; a case is an objective and its further arguments."""
    names = ["make_pair", "objective", "options"][: len(cases[0]) + 1]
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(pair, *case, id="-".join((*pair, case[0].__name__, *map(str, dict(*case[1:]).values()))))
            for case in cases
            for pair in pairs_with(*ASKS.get(case[0], []))
            if case[0] is not AnalyticKLELBO or has_closed_kl(*pair)
        ],
        indirect=["make_pair"],
    )


under_every_objective = under(*[(objective,) for objective in OBJECTIVES])
