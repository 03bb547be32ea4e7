"""Densities of a draw: of latent sites alone, whatever else a guide observes, adds or records."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from inference import (
    CUBO,
    ELBO,
    IWELBO,
    AnalyticKLELBO,
    BetaELBO,
    DReG,
    StickingTheLanding,
    WakeSleep,
    WakeWake,
    evidence,
    gap,
    information_bounds,
    log_weights,
    predictive,
    rate_distortion,
    simulate,
)
from inference.pair.call import Call

X = torch.tensor([-1.0, 0.3, 0.8, 2.0], dtype=torch.float64)
TRUTH = dist.Normal(torch.zeros(4, dtype=torch.float64), 2**0.5).log_prob(X)
QUIET = {"seed": 0, "progress": False}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def with_factor(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        pyro.factor("auxiliary", torch.full_like(x, -5.0), has_rsample=False)


def with_observation(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        pyro.sample("auxiliary", dist.Normal(0 * z, 1.0), obs=x, infer={"is_auxiliary": True})


def with_scaled_observation(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        with poutine.scale(scale=3.0):
            pyro.sample("auxiliary", dist.Normal(0 * x, 1.0), obs=x, infer={"is_auxiliary": True})


GUIDES = pytest.mark.parametrize("guide", [with_factor, with_observation], ids=lambda guide: guide.__name__)


@GUIDES
def test_what_a_guide_observes_is_no_part_of_its_weights(guide):
    torch.testing.assert_close(log_weights(model, guide, X, num_samples=3), TRUTH.expand(3, 4))


def test_a_scale_on_what_a_guide_observes_is_no_scale_of_its_density():
    torch.testing.assert_close(log_weights(model, with_scaled_observation, X, num_samples=3), TRUTH.expand(3, 4))
    stock = Trace_ELBO().loss(model, with_scaled_observation, X)
    assert ELBO().loss(model, with_scaled_observation, X) == pytest.approx(stock, rel=1e-12)


@GUIDES
@pytest.mark.parametrize("method", ["importance", "smoothed", "defensive", "adaptive", "bridge"])
def test_evidence_by_a_guide_that_observes_is_the_closed_form(guide, method):
    got = evidence(model, X, method=method, guide=guide, **QUIET)
    assert bool(((got.value - TRUTH).abs() < 1e-6 + 5 * got.standard_error).all())


@GUIDES
def test_the_gap_and_the_rate_leave_out_what_a_guide_observes(guide):
    assert gap(model, guide, X, progress=False).total.abs().max() < 1e-6
    got, plain = (rate_distortion(model, g, X, **QUIET).rates.value for g in (guide, exact))
    torch.testing.assert_close(got, plain)
    many = X.repeat(3)
    bounds = [information_bounds(model, g, many, **QUIET).information for g in (guide, exact)]
    assert bounds[0] == bounds[1]


@GUIDES
@pytest.mark.parametrize("objective", [ELBO(), AnalyticKLELBO(), BetaELBO(1.0)], ids=lambda o: type(o).__name__)
def test_losses_keep_what_a_guide_observes_as_stock_pyro_does(guide, objective):
    torch.manual_seed(0)
    stock = Trace_ELBO().loss(model, guide, X)
    torch.manual_seed(0)
    plain = objective.loss(model, exact, X)
    torch.manual_seed(0)
    own = objective.loss(model, guide, X)
    if not isinstance(objective, AnalyticKLELBO):
        assert own == pytest.approx(stock, rel=1e-12)
    assert own - plain == pytest.approx(stock + float(TRUTH.sum()), rel=1e-9)


@pytest.mark.parametrize(
    "objective",
    [ELBO(2), IWELBO(2), StickingTheLanding(2), DReG(2), WakeWake(2), WakeSleep(2), CUBO()],
    ids=lambda o: type(o).__name__,
)
def test_a_factor_trains_its_parameters_under_each_objective(objective):
    weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.factor("auxiliary", weight * x**2, has_rsample=False)

    objective.differentiable_loss(model, guide, X).backward()
    assert float(weight.grad) == pytest.approx(float(X.square().sum()), rel=1e-12)


def test_a_plate_without_a_size_has_that_of_its_sites():
    def program(x, observe):
        with pyro.plate("data"):
            mean = torch.zeros(len(x)).double() if observe else x / 2
            z = pyro.sample("z", dist.Normal(mean, 1.0 if observe else 0.5**0.5))
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    sizeless = lambda x: program(x, observe=True)  # noqa: E731
    guide = lambda x: program(x, observe=False)  # noqa: E731
    torch.testing.assert_close(log_weights(sizeless, guide, X, num_samples=5), TRUTH.expand(5, 4))
    torch.testing.assert_close(evidence(sizeless, X, method="quadrature", **QUIET).value, TRUTH)
    assert Call(sizeless, guide, (X,)).probe().layout.plate_scale == 1


@pytest.mark.parametrize("half", ["model", "guide"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_a_deterministic_value_is_no_random_site(inside, half):
    def recording(program):
        def recorded(x):
            if inside:
                with pyro.plate("elsewhere", len(x)):
                    assert pyro.deterministic("twice", 2 * x).shape == x.shape
            else:
                pyro.deterministic("twice", 2 * x)
            program(x)

        return recorded

    pair = (recording(model), exact) if half == "model" else (model, recording(exact))
    torch.testing.assert_close(log_weights(*pair, X, num_samples=2), TRUTH.expand(2, 4))
    torch.testing.assert_close(evidence(pair[0], X, method="quadrature", **QUIET).value, TRUTH)
    assert simulate(*pair, X, num_simulations=8, num_samples=9, **QUIET).names == ("z",)
    if half == "model":
        torch.testing.assert_close(predictive(*pair, X)["twice"], 2 * X.unsqueeze(0))
