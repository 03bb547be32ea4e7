"""The registry: a new model, guide, objective or evidence method is one line here, and runs through every test unasked.

A test takes ``model``, ``pair``, ``make_model`` or ``make_pair`` and runs on all of the registry. A claim about closed
forms names the capability that it is about, ``@for_models_with(SupportsLogEvidence)``: its models follow from that.
What tests must know of a member beyond its being one (how its data look, what it bounds) stands in its line.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.infer
import pytest
import torch
from observations import BERNOULLI, CATEGORIES, FACTORS, GAUSSIAN, LINEAR, Observation
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
    StudentT,
    TiedMeanField,
)
from inference.core.protocols import SupportsExpectedLogLikelihood, SupportsPosterior, SupportsPrecision
from inference.marginal_likelihood import (
    Adaptive,
    Annealed,
    Bridge,
    Defensive,
    Importance,
    Laplace,
    Limit,
    Quadrature,
    SmoothedImportance,
)
from inference.marginal_likelihood.analytic.exact import Exact as ExactEvidence
from inference.marginal_likelihood.automatic import Automatic
from inference.marginal_likelihood.base.method import Method
from inference.objectives import (
    BILBO,
    CIWAE,
    CUBO,
    ELBO,
    IWELBO,
    MIWAE,
    PIWAE,
    AnalyticBetaELBO,
    AnalyticELBO,
    AnalyticKLELBO,
    AnalyticTargetRate,
    AnnealedPrecision,
    BetaELBO,
    DReG,
    FittedPrior,
    FreeBitsELBO,
    GeometricAnnealing,
    SampledTargetRate,
    StickingTheLanding,
    TargetRate,
    VRBound,
    WakeSleep,
    WakeWake,
)
from zoo import (
    IMAVAE,
    PPCA,
    VAE,
    CategoricalLikelihood,
    DeepGaussianVAE,
    FactorAnalysis,
    LatentVariableModel,
    LinearVAE,
)

# --- models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelMember:
    """A model, small, in float64.

    Attributes:
        make: Makes a new one.
        observation: Its likelihood, written out by hand.
        rebuilt: Whether a file says all that is needed to make it again.
    """

    make: Callable[[], LatentVariableModel]
    observation: Observation
    rebuilt: bool = True

    def __call__(self) -> LatentVariableModel:
        model = self.make().double()
        model.member = next(name for name, member in MODELS.items() if member is self)  # copies are members, too
        return model


MODELS: dict[str, ModelMember] = {
    "PPCA": ModelMember(lambda: PPCA(5, 2), LINEAR),
    "LinearVAE": ModelMember(lambda: LinearVAE(5, 2, sigma=0.5), LINEAR),
    "FactorAnalysis": ModelMember(lambda: FactorAnalysis(5, 2, sigma=0.5), FACTORS),
    "DeepGaussianVAE": ModelMember(lambda: DeepGaussianVAE(5, 2, hidden=(8,)), GAUSSIAN),
    "IMAVAE": ModelMember(lambda: IMAVAE(5, 2, gamma2=25.0, hidden=(8,)), GAUSSIAN),
    "VAE-Bernoulli": ModelMember(lambda: VAE(5, 2, hidden=(8,)), BERNOULLI),
    "VAE-categorical": ModelMember(
        lambda: VAE(5, 2, likelihood=CategoricalLikelihood(3), hidden=(8,)), CATEGORIES, rebuilt=False
    ),
    "LinearVAE-wide-standardised": ModelMember(lambda: LinearVAE(2, 3).standardise_by(3 + torch.randn(20, 2)), LINEAR),
}


def observation_of(model) -> Observation:
    """The likelihood by hand of a member, or of another model of a member's class or of a subclass."""
    name = getattr(model, "member", None)
    if name is None:
        name = next(name for name, like in _EXAMPLES.items() if isinstance(model, type(like)))
    return MODELS[name].observation


def data_for(model, num=20, seed=1):
    """Data away from the origin, (num, D), that no model of the registry was made with."""
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    noise = torch.randn(num, model.data_dim, generator=generator, dtype=like.dtype)
    return observation_of(model).data(noise)


def simulate(model, num, seed=1):
    """Ancestral draws of (z, x), written out with NumPy's generator: nothing of Pyro, nothing of the model's own."""
    random = np.random.RandomState(seed)
    z = torch.from_numpy(random.standard_normal((num, model.latent_dim)))
    noise = torch.from_numpy(random.standard_normal((num, model.data_dim)))
    with torch.no_grad():
        return z, observation_of(model).draw(model, z, noise)


# --- guides and pairs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class GuideMember:
    """A guide of a model, in float64.

    Attributes:
        make: Makes a new one of a model.
        asks: Classes or protocols that the model must be an instance of.
        models: Names of the models that it meets; None for all that it can.
        closed_kl: Whether its divergence from the prior is known without sampling.
        noiseless: Whether every importance weight is the evidence, whatever was drawn.
    """

    make: Callable[[Any], Guide]
    asks: tuple[type, ...] = ()
    models: tuple[str, ...] | None = None
    closed_kl: bool = True
    noiseless: bool = False

    def __call__(self, model: Any) -> Guide:
        guide = self.make(model).double()
        guide.member = next(name for name, member in GUIDES.items() if member is self)
        return guide


def _encoder(kind, **options):
    return lambda model: kind(model.data_dim, model.latent_dim, **options)


_SMALL = {"hidden": (8,)}
# These differ from the others in their distribution alone, so that each meets one model.
_ONE = ("DeepGaussianVAE",)

GUIDES: dict[str, GuideMember] = {
    "Exact": GuideMember(Exact, asks=(SupportsPosterior,), noiseless=True),
    "TiedMeanField": GuideMember(TiedMeanField, asks=(SupportsPosterior,)),
    "Linear": GuideMember(_encoder(Linear)),
    "MeanField": GuideMember(_encoder(MeanField, **_SMALL)),
    "FullRank": GuideMember(_encoder(FullRank, **_SMALL)),
    "LowRank": GuideMember(_encoder(LowRank, **_SMALL), models=_ONE),
    "ConstantVariance": GuideMember(_encoder(ConstantVariance, **_SMALL), models=_ONE),
    "Mixture": GuideMember(_encoder(Mixture, **_SMALL), models=_ONE, closed_kl=False),
    "StudentT": GuideMember(_encoder(StudentT, **_SMALL), models=_ONE, closed_kl=False),
    "Flow": GuideMember(_encoder(Flow, flow_hidden=(8,), **_SMALL), models=_ONE, closed_kl=False),
    "GaussNewtonDiagonal": GuideMember(lambda model: GaussNewtonDiagonal(model, **_SMALL), models=_ONE),
    "GaussNewtonFull": GuideMember(lambda model: GaussNewtonFull(model, **_SMALL), models=_ONE),
    "SemiAmortised": GuideMember(
        lambda model: SemiAmortised(model, _encoder(MeanField, **_SMALL)(model), steps=2, num_samples=4), models=_ONE
    ),
}

with torch.random.fork_rng(devices=[]):
    _EXAMPLES = {name: make() for name, make in MODELS.items()}


def _serves(model, guide):
    member = GUIDES[guide]
    met = member.models is None or model in member.models
    return met and all(isinstance(_EXAMPLES[model], capability) for capability in member.asks)


# (model name, guide name)
PAIRS = [(m, g) for m in MODELS for g in GUIDES if _serves(m, g)]


def build_pair(model, guide):
    """A new model and a new guide by their names."""
    made = MODELS[model]()
    return made, GUIDES[guide](made)


def models_with(*capabilities):
    """Names of the models that are instances of every given class or protocol, of all where none is given."""
    names = [name for name, model in _EXAMPLES.items() if all(isinstance(model, c) for c in capabilities)]
    if not names:  # pytest would skip the test
        raise LookupError(f"expected a model with {capabilities} in the registry")
    return names


def pairs_with(*capabilities):
    """(model name, guide name) of the pairs whose model is an instance of every given class or protocol."""
    names = models_with(*capabilities)
    return [(m, g) for m, g in PAIRS if m in names]


def for_models_with(*capabilities):
    """Restrict ``model`` and ``make_model`` of a test to the models with the capabilities."""
    return pytest.mark.parametrize("make_model", models_with(*capabilities), indirect=True)


def for_pairs_with(*capabilities):
    """Restrict ``pair`` and ``make_pair`` of a test to the pairs whose model has the capabilities."""
    return pytest.mark.parametrize("make_pair", pairs_with(*capabilities), indirect=True, ids="-".join)


# Pairs that a file alone says how to make again.
for_rebuilt_pairs = pytest.mark.parametrize(
    "make_pair", [(m, g) for m, g in PAIRS if MODELS[m].rebuilt], indirect=True, ids="-".join
)


# --- objectives ------------------------------------------------------------------------------------

# Pairs of every kind: closed forms, a full covariance, no closed-form divergence, data that are not Gaussian, and a
# model whose precision can be set.
SOME = [
    ("LinearVAE", "MeanField"),
    ("FactorAnalysis", "FullRank"),
    ("DeepGaussianVAE", "Mixture"),
    ("VAE-Bernoulli", "Linear"),
    ("IMAVAE", "MeanField"),
]


@dataclass(frozen=True)
class ObjectiveMember:
    """An objective, and what it claims.

    Attributes:
        make: Makes a new one; takes ``num_particles`` where it samples.
        asks: Classes or protocols that the model must be an instance of.
        closed_kl: Whether it needs a guide whose divergence from the prior is known.
        everywhere: Whether it runs on all pairs, not on SOME alone.
        program: Makes of a model the one that it trains.
        bounds: Its mean over the data is a bound of the log evidence from "below" or "above"; None for no bound.
        tight: At the exact posterior every draw of it is the evidence.
        gradient: The objective of the same expected gradient, where one is known that is no noisier.
        subsamples: Whether it takes a subsampling plate; else it refuses one.
        trains: Halves that it moves.
        value: The loss of a data point is minus its bound; False where a stock objective has no bound per data point.
        samples_elbo: It is the ELBO on average, whatever is scaled or masked, for any number of particles.
    """

    make: Callable[..., pyro.infer.ELBO]
    asks: tuple[type, ...] = ()
    closed_kl: bool = False
    everywhere: bool = False
    program: Callable[[Any], Any] = field(default=lambda model: model)
    bounds: str | None = None
    tight: bool = False
    gradient: Callable[[], pyro.infer.ELBO] | None = None
    subsamples: bool = True
    trains: tuple[str, ...] = ("model", "guide")
    value: bool = True
    samples_elbo: bool = False

    def __call__(self, **options: Any) -> pyro.infer.ELBO:
        return self.make(**options)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(model name, guide name) of the pairs that it serves."""
        served = pairs_with(*self.asks)
        return [p for p in (PAIRS if self.everywhere else SOME) if p in served and self._has_kl(p[1])]

    def _has_kl(self, guide: str) -> bool:
        return GUIDES[guide].closed_kl or not self.closed_kl


_EXPECTED = (SupportsExpectedLogLikelihood,)
_CLOSED = {"asks": _EXPECTED, "closed_kl": True, "subsamples": False}


def _weighted(kind, *args, num_particles=3):
    """Makes an objective of importance weights, of three particles by default."""
    return lambda num_particles=num_particles: kind(*args, num_particles)


OBJECTIVES: dict[str, ObjectiveMember] = {
    "Trace_ELBO": ObjectiveMember(Trace_ELBO, everywhere=True, gradient=AnalyticELBO, value=False, samples_elbo=True),
    "ELBO": ObjectiveMember(
        ELBO, everywhere=True, bounds="below", tight=True, gradient=AnalyticELBO, samples_elbo=True
    ),
    "AnalyticKLELBO": ObjectiveMember(
        AnalyticKLELBO, closed_kl=True, everywhere=True, bounds="below", gradient=AnalyticELBO, samples_elbo=True
    ),
    "AnalyticELBO": ObjectiveMember(AnalyticELBO, everywhere=True, bounds="below", tight=True, **_CLOSED),
    "AnalyticBetaELBO": ObjectiveMember(lambda: AnalyticBetaELBO(1.5), bounds="below", **_CLOSED),
    "AnalyticTargetRate": ObjectiveMember(lambda: AnalyticTargetRate(0.1), **_CLOSED),
    "AnnealedPrecision": ObjectiveMember(
        lambda: AnnealedPrecision(ELBO(), GeometricAnnealing(40, 20.0, 25.0)), asks=(SupportsPrecision,)
    ),
    "BILBO": ObjectiveMember(BILBO, closed_kl=True, program=lambda model: FittedPrior(model, model.latent_dim)),
    "BetaELBO": ObjectiveMember(
        lambda num_particles=1: BetaELBO(1.5, num_particles), bounds="below", gradient=lambda: AnalyticBetaELBO(1.5)
    ),
    "FreeBitsELBO": ObjectiveMember(
        lambda num_particles=1: FreeBitsELBO(0.1, num_particles), closed_kl=True, bounds="below"
    ),
    "IWELBO": ObjectiveMember(_weighted(IWELBO), bounds="below", tight=True),
    "DReG": ObjectiveMember(_weighted(DReG), bounds="below", tight=True, gradient=lambda: IWELBO(3)),
    "StickingTheLanding": ObjectiveMember(StickingTheLanding, bounds="below", tight=True, gradient=AnalyticELBO),
    "CIWAE": ObjectiveMember(_weighted(CIWAE, 0.5), bounds="below", tight=True),
    "MIWAE": ObjectiveMember(_weighted(MIWAE, 2), bounds="below", tight=True),
    "PIWAE": ObjectiveMember(_weighted(PIWAE, 2), bounds="below", tight=True),
    "VRBound": ObjectiveMember(_weighted(VRBound, 0.5), bounds="below", tight=True),
    "CUBO": ObjectiveMember(_weighted(CUBO, 2, num_particles=16), bounds="above", tight=True, trains=("guide",)),
    "TargetRate": ObjectiveMember(
        lambda num_particles=1: TargetRate(0.1, 1.0, num_particles),
        closed_kl=True,
        gradient=lambda: AnalyticTargetRate(0.1),
    ),
    "SampledTargetRate": ObjectiveMember(lambda num_particles=1: SampledTargetRate(0.1, 1.0, num_particles)),
    "WakeWake": ObjectiveMember(_weighted(WakeWake, num_particles=10), bounds="below", tight=True),
    "WakeSleep": ObjectiveMember(_weighted(WakeSleep, num_particles=10), bounds="below", tight=True),
}


def under(*names, pairs=None):
    """Every pair, or every given one, under each of the named objectives that serves it."""
    cases = [
        pytest.param(pair, OBJECTIVES[name], id="-".join((*pair, name)))
        for name in names
        for pair in OBJECTIVES[name].pairs
        if pairs is None or pair in pairs
    ]
    return pytest.mark.parametrize(("make_pair", "objective"), cases, indirect=["make_pair"])


def objectives_that(has):
    """Names of the objectives of which something holds."""
    names = [name for name, member in OBJECTIVES.items() if has(member)]
    if not names:
        raise LookupError("expected an objective of that kind in the registry")
    return names


under_every_objective = under(*OBJECTIVES)


# --- evidence methods ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodMember:
    """A method of estimating the evidence, with settings that answer in a second, and where it is at home.

    Attributes:
        method: With its settings.
        families: Of :func:`zoo.known_answers`, at which it claims to answer.
        sigmas: Standard deviations of the noise there.
        guided: Whether it takes a guide.
        registered: Whether it claims the registered models whose evidence is known in closed form.
        two_sided: Whether it claims two-sided intervals at a level of confidence.
    """

    method: Method
    families: tuple[str, ...]
    sigmas: tuple[float, ...] = (1.0, 0.1)
    guided: bool = True
    registered: bool = True
    two_sided: bool = False


_LINEAR = ("linear K=1", "linear K=4")
_SEEN = (*_LINEAR, "fold", "bimodal", "banana", "ring")  # by the guide
_SMOOTH = ("linear K=1", "fold", "half-seen fold", "bimodal", "banana")  # for a mode finder, up to three latents

METHODS: dict[str, MethodMember] = {
    "auto": MethodMember(Automatic(), (*_LINEAR, *_SMOOTH[1:])),
    "exact": MethodMember(ExactEvidence(), _LINEAR, guided=False),
    "importance": MethodMember(Importance(2000), _SEEN, two_sided=True),
    "limit": MethodMember(Limit(), _LINEAR, sigmas=(1e-3,), registered=False),
    "annealed": MethodMember(Annealed(num_temperatures=100), (*_LINEAR, "bimodal")),
    "adaptive": MethodMember(Adaptive(4000, num_draws=200, num_rounds=8), (*_SEEN, "half-seen fold"), two_sided=True),
    "defensive": MethodMember(Defensive(4000), _SEEN, two_sided=True),
    "bridge": MethodMember(Bridge(4000), (*_LINEAR, "fold", "half-seen fold"), two_sided=True),
    "laplace": MethodMember(Laplace(), _LINEAR),
    "quadrature": MethodMember(Quadrature(), _SMOOTH),
    "smoothed": MethodMember(SmoothedImportance(2000), _SEEN, two_sided=True),
}
