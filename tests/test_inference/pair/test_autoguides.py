"""Pyro's AutoGuides in one plate over the data: a density where auxiliary sites make every latent, else refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

from inference import (
    BILBO,
    ELBO,
    IWELBO,
    AnalyticKLELBO,
    DReG,
    FreeBitsELBO,
    evidence,
    information_bounds,
    log_weights,
    posterior_error,
    predictive,
    rate_distortion,
)
from inference.pair.call import Call

X = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
QUIET = {"seed": 0, "progress": False}


def model(x):
    """A real latent, a positive one, and a simplex of three."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
        pyro.sample("x", dist.Normal(z + share[..., 0], rate), obs=x)


@pytest.fixture
def guide():
    """An AutoNormal with other parameters for each data point."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    made = AutoNormal(model, init_scale=1.0)
    made(X)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def log_q(guide, name, support, value, event):
    """Density of a transformed Normal, written out by torch."""
    loc, scale = getattr(guide.locs, name).detach(), getattr(guide.scales, name).detach()
    base = td.Normal(loc, scale)
    return td.TransformedDistribution(td.Independent(base, event), td.biject_to(support)).log_prob(value)


def test_weights_of_an_autonormal_are_of_its_transformed_normals(guide):
    draw = Call(model, guide, (X,)).run(7)
    expected = log_q(guide, "z", td.constraints.real, draw.latents["z"], 0)
    expected = expected + log_q(guide, "rate", td.constraints.positive, draw.latents["rate"], 0)
    expected = expected + log_q(guide, "share", td.constraints.simplex, draw.latents["share"], 1)
    torch.testing.assert_close(draw.log_guide, expected)
    conditioned = poutine.trace(poutine.condition(model, data=draw.latents)).get_trace
    joint = conditioned(X)
    joint.compute_log_prob()
    log_p = sum(site["log_prob"] for site in joint.nodes.values() if site["type"] == "sample" and "log_prob" in site)
    torch.testing.assert_close(draw.log_joint, log_p - joint.nodes["data"].get("log_prob", 0))
    torch.testing.assert_close(draw.log_weights, draw.log_joint - draw.log_guide)
    assert list(draw.latents) == ["z", "rate", "share"]


def test_losses_of_an_autonormal_are_those_of_stock_pyro(guide):
    losses = []
    for objective in (Trace_ELBO(), ELBO()):
        torch.manual_seed(1)
        losses.append(float(objective.differentiable_loss(model, guide, X).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_doubly_reparameterised_gradient_has_the_plain_one_s_mean(guide):
    def gradients(objective):
        found = []
        for seed in range(100):
            torch.manual_seed(seed)
            loss = objective.differentiable_loss(model, guide, X)
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(guide.parameters()))]))
        return torch.stack(found)

    plain, double = gradients(IWELBO(4)), gradients(DReG(4))
    error = ((plain.var(0) + double.var(0)) / 100).sqrt()
    assert float(((plain.mean(0) - double.mean(0)) / error).abs().max()) < 4


@pytest.mark.parametrize("method", ["importance", "bridge"])
def test_evidence_by_an_autonormal_agrees_with_that_without_it(guide, method):
    truth = evidence(model, X, method="adaptive", **QUIET)
    got = evidence(model, X, method=method, guide=guide, **QUIET)
    error = (got.standard_error.square() + truth.standard_error.square()).sqrt()
    assert bool(((got.value - truth.value).abs() < 5 * error + 0.02).all())


def test_predictions_and_rates_know_no_auxiliary_sites(guide):
    assert set(predictive(model, guide, X, num_samples=4)) == {"z", "rate", "share", "x"}
    rates = rate_distortion(model, guide, X, num_samples=4000, **QUIET).rates
    draw = Call(model, guide, (X,)).run(4000)
    other = draw.log_guide - draw.total(draw.model_sites, observed=False)
    error = (rates.standard_error.square() + other.var(0) / 4000).sqrt()
    assert bool(((rates.value - other.mean(0)).abs() < 4 * error).all())


def test_information_needs_only_the_auxiliary_values(guide):
    found = information_bounds(model, guide, X, num_samples=4, **QUIET)
    assert 0 <= found.empirical.value <= found.ceiling
    assert found.bias_bound > 0


def test_closed_forms_refuse_a_delta_by_name(guide):
    for objective, error in ((AnalyticKLELBO(), NotImplementedError), (FreeBitsELBO(0.1), TypeError)):
        with pytest.raises(error, match="Delta"):
            objective.loss(model, guide, X)
    with pytest.raises(TypeError, match="prior is fitted and frozen"):
        BILBO().loss(model, guide, X)


def test_latents_that_an_autoguide_did_not_draw_are_refused_by_name(guide):
    reference = {name: value.detach() for name, value in Call(model, guide, (X,)).run(9).latents.items()}
    log_evidence = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected a density at any value of site 'z', got a Delta"):
        posterior_error(model, guide, X, reference=reference, log_evidence=log_evidence)


def test_an_autodelta_beside_an_autonormal_is_refused():
    pyro.clear_param_store()
    mixed = AutoGuideList(model)
    mixed.append(AutoNormal(poutine.block(model, expose=["z"])))
    mixed.append(AutoDelta(poutine.block(model, expose=["rate", "share"])))
    with pytest.raises(ValueError, match=r"of the latents \['z', 'rate', 'share'\].* got 3 numbers for 12 coordinates"):
        log_weights(model, mixed, X, num_samples=2)


def test_an_auxiliary_variable_that_makes_no_latent_is_refused():
    def auxiliary(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a, 1.0))

    def plain(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"expected the auxiliary guide sites \['a'\]"):
        log_weights(plain, auxiliary, X, num_samples=2)
