"""Pyro's AutoGuides over all data: trained by fit, weighed against a regression's evidence by a grid."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import Trace_ELBO, autoguide
from pyro_problems import guide_of_parts

from inference import evidence, fit, iwae, log_weights

torch.manual_seed(0)
X = torch.randn(8, 2, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -1.0]).double() + 0.3 * torch.randn(8, dtype=torch.float64)


def model(x, y):
    """Linear regression with unknown noise."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(x.new_tensor(-1.0), 0.5))
    pyro.sample("y", dist.Normal(w @ x.T, sigma.unsqueeze(-1)).to_event(1), obs=y)


def log_evidence():
    """By the trapezoidal rule in log sigma, given which the evidence is a Gaussian's."""
    grid = torch.linspace(-8, 4, 4001, dtype=torch.float64)
    covariance = X @ X.T + (2 * grid).exp().reshape(-1, 1, 1) * torch.eye(8)
    values = td.MultivariateNormal(torch.zeros(8).double(), covariance).log_prob(Y) + td.Normal(-1.0, 0.5).log_prob(
        grid
    )
    return float(values.logsumexp(0)) + math.log(12 / 4000)


class Easy(EasyGuide):
    """A Gaussian over both sites together."""

    def guide(self, x, y):  # noqa: ARG002
        group = self.group(match="w|sigma")
        loc = pyro.param("loc", torch.zeros(3, dtype=torch.float64))
        scale = pyro.param("scale", torch.full((3,), 0.3).double(), constraint=dist.constraints.positive)
        group.sample("both", dist.Normal(loc, scale).to_event(1))


FAMILIES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoNormalizingFlow": lambda m: autoguide.AutoNormalizingFlow(m, partial(iterated, 2, affine_autoregressive)),
    "AutoStructured": lambda m: autoguide.AutoStructured(m, conditionals="normal", dependencies="linear"),
    "AutoGuideList": lambda m: guide_of_parts(m, "w", "sigma"),
    "EasyGuide": Easy,
    "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
}


SETTINGS = {"AutoIAFNormal": (0.02, 600)}  # rate and steps: it starts far away


@pytest.fixture
def double():
    """Numbers are float64 by default: Pyro's flows make their own, networks and base distribution."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def trained(family, rate=0.03, steps=300):
    """A guide of a family after some steps: near, but not at, the posterior."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    guide = family(model)
    options = {"optimizer": lambda p: torch.optim.Adam(p, rate), "seed": 0, "progress": False}
    objective = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    history = fit(model, guide, (X, Y), steps=steps, objective=objective, **options)
    assert sum(history.loss[-5:]) < sum(history.loss[:5])
    return guide.laplace_approximation(X, Y) if hasattr(guide, "laplace_approximation") else guide


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_an_autoguide_have_the_evidence_as_their_mean(name):
    weights = log_weights(
        model,
        trained(FAMILIES[name], *SETTINGS.get(name, ())),
        X,
        Y,
        num_samples=4000,
        whole=True,
        seed=0,
    )
    relative = weights.exp() / weights.exp().mean()
    error = float(relative.std()) / math.sqrt(len(weights))
    assert error < 0.2
    assert abs(float(iwae(weights).value) - log_evidence()) < 4 * error
    pyro.clear_param_store()


@pytest.mark.parametrize("name", ["AutoDelta", "AutoLaplaceApproximation"])
def test_point_masses_train_but_have_no_density(name):
    pyro.clear_param_store()
    guide = getattr(autoguide, name)(model)
    options = {"optimizer": lambda p: torch.optim.Adam(p, 0.05), "seed": 0, "progress": False}
    history = fit(model, guide, (X, Y), steps=60, objective=Trace_ELBO(), **options)
    assert history.loss[-1] < history.loss[0]
    refusal = "expected a density at guide site 'w', got a Delta"
    with pytest.raises(ValueError, match=refusal):
        log_weights(model, guide, X, Y, num_samples=2, whole=True)
    with pytest.raises(ValueError, match=refusal):
        evidence(model, X, Y, method="importance", guide=guide, whole=True, progress=False)
    pyro.clear_param_store()
