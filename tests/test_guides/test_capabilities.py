"""What every guide can do with every kind of model, as one frozen table: a change in it is a change to be explained."""

import pytest
import torch
from torch.distributions import kl_divergence

import guides
import inference.pair.module
from guides import (
    ConstantVariance,
    Exact,
    Flow,
    FullRank,
    GaussNewtonDiagonal,
    GaussNewtonFull,
    HMCRefined,
    Linear,
    LowRank,
    MeanField,
    Mixture,
    Resampled,
    SemiAmortised,
    StudentT,
    TiedMeanField,
)
from inference import ELBO, log_weights, predictive
from inference.core.protocols import SupportsPosterior
from inference.distributions.gaussian import coordinate_kl
from zoo import VAE, DeepGaussianVAE, LinearVAE
from zoo.priors import factorised as priors

MODELS = {
    "linear": lambda: LinearVAE(3, 2),
    "deep": lambda: DeepGaussianVAE(3, 2, hidden=(4,)),
    "Laplace": lambda: DeepGaussianVAE(3, 2, hidden=(4,), prior=priors.Laplace(2)),
    "uniform": lambda: DeepGaussianVAE(3, 2, hidden=(4,), prior=priors.Uniform(2, -0.5, 0.5)),
    "beta": lambda: DeepGaussianVAE(3, 2, hidden=(4,), prior=priors.Beta(2, 2.0, 3.0)),
    "Bernoulli": lambda: VAE(3, 2, hidden=(4,)),
}


def encoder(kind, **options):
    return lambda model: kind(3, 2, support=model.prior().support, **options)


def refining(kind, **options):
    return lambda model: kind(model, encoder(MeanField, hidden=(4,))(model), **options)


GUIDES = {
    "Exact": Exact,
    "TiedMeanField": TiedMeanField,
    "Linear": encoder(Linear),
    "MeanField": encoder(MeanField, hidden=(4,)),
    "FullRank": encoder(FullRank, hidden=(4,)),
    "LowRank": encoder(LowRank, hidden=(4,)),
    "ConstantVariance": encoder(ConstantVariance, hidden=(4,)),
    "Mixture": encoder(Mixture, hidden=(4,)),
    "StudentT": encoder(StudentT, hidden=(4,)),
    "Flow": encoder(Flow, hidden=(4,), flow_hidden=(4,)),
    "GaussNewtonDiagonal": lambda model: GaussNewtonDiagonal(model, hidden=(4,)),
    "GaussNewtonFull": lambda model: GaussNewtonFull(model, hidden=(4,)),
    "SemiAmortised": refining(SemiAmortised, steps=1),
    "Resampled": refining(Resampled, num_proposals=3),
    "HMCRefined": refining(HMCRefined, num_steps=1),
}

# S samples; D density, for importance weights; R reparameterised, for training by sampling; K divergence from the
# prior without sampling; C the same for each coordinate; P posterior(x); M its mean and variance; F rebuilt from a
# file. A dash: the two do not go together.
CAPABILITIES = {
    #                       linear      deep        Laplace     uniform     beta        Bernoulli
    "Exact":               ("SDRKCPMF", "-",        "-",        "-",        "-",        "-"),
    "TiedMeanField":       ("SDRKCPMF", "-",        "-",        "-",        "-",        "-"),
    "Linear":              ("SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF"),
    "MeanField":           ("SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF"),
    "FullRank":            ("SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF"),
    "LowRank":             ("SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF"),
    "ConstantVariance":    ("SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF"),
    "Mixture":             ("SDRPMF",   "SDRPMF",   "SDRPMF",   "SDRPF",    "SDRPF",    "SDRPMF"),
    "StudentT":            ("SDRPMF",   "SDRPMF",   "SDRPMF",   "SDRPF",    "SDRPF",    "SDRPMF"),
    "Flow":                ("SDRPF",    "SDRPF",    "SDRPF",    "SDRPF",    "SDRPF",    "SDRPF"),
    "GaussNewtonDiagonal": ("SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "-"),
    "GaussNewtonFull":     ("SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "-"),
    "SemiAmortised":       ("SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF", "SDRKCPMF"),
    "Resampled":           ("S",        "S",        "S",        "S",        "S",        "S"),
    "HMCRefined":          ("S",        "S",        "S",        "S",        "S",        "S"),
}  # fmt: skip


def finite(tensor):
    return bool(tensor.isfinite().all())


CHECKS = {
    "S": lambda model, guide, x: finite(predictive(model, guide, x, num_samples=3)["x"]),
    "D": lambda model, guide, x: finite(log_weights(model, guide, x, num_samples=3)),
    "R": lambda model, guide, x: finite(ELBO(2)(model, guide)(x)),
    "K": lambda model, guide, x: finite(kl_divergence(guide.posterior(x), model.prior())),
    "C": lambda model, guide, x: finite(coordinate_kl(guide.posterior(x), model.prior())),
    "P": lambda model, guide, x: isinstance(guide, SupportsPosterior),  # noqa: ARG005
    "M": lambda model, guide, x: finite(guide.posterior(x).mean) and finite(guide.posterior(x).variance),  # noqa: ARG005
    "F": lambda model, guide, x: "data_dim" in guide.config() or "model" in guide.config(),  # noqa: ARG005
}
# How the library says that it cannot; anything else is an error.
REFUSALS = (NotImplementedError, TypeError, ValueError, AttributeError)


def can(check, *args):
    try:
        return check(*args)
    except REFUSALS:
        return False


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("guide_name", GUIDES)
def test_a_guide_can_do_with_a_model_what_the_table_says(guide_name, model_name):
    model = MODELS[model_name]()
    x = (torch.randn(4, 3) > 0).float()
    try:
        guide = GUIDES[guide_name](model)
    except TypeError:
        got = "-"
    else:
        got = "".join(letter for letter, check in CHECKS.items() if can(check, model, guide, x))
    assert got == CAPABILITIES[guide_name][list(MODELS).index(model_name)]


def test_what_a_guide_declares_of_its_density_is_so():
    model = MODELS["deep"]()
    for name, row in CAPABILITIES.items():
        if row[1] != "-":
            assert GUIDES[name](model).has_density == ("D" in row[1])


def test_every_guide_of_the_package_is_in_the_table():

    bases = {"Guide", "EncoderGuide", "SampledGuide"}
    others = {"WrappedEncoder", "Local"}  # made of what a user or another guide gives
    classes = {n for n in guides.__all__ if isinstance(getattr(guides, n), type)}
    programs = {n for n in classes if issubclass(getattr(guides, n), inference.pair.module.Module)}
    assert programs - bases - others == set(CAPABILITIES)
