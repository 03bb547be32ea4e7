"""Weighted and free-bits ELBOs against closed forms, and schedules that follow the steps."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from guides import FullRank, Linear, MeanField
from inference import (
    ELBO,
    AnalyticELBO,
    AnalyticKLELBO,
    BetaELBO,
    CyclicalAnnealing,
    FreeBitsELBO,
    LinearAnnealing,
    fit,
)
from inference.distributions.gaussian import coordinate_kl
from zoo import LinearVAE, linear_gaussian

X = linear_gaussian(30, 5, 2).train


def pair(guide=Linear):
    torch.manual_seed(3)
    return LinearVAE(5, 2).double(), guide(5, 2).double()


def closed_form(model, guide, x):
    """Reconstruction and KL per data point, (N,), of a linear model with a Gaussian guide."""
    distribution = guide.posterior(x)
    kl = torch.distributions.kl_divergence(distribution, model.prior())
    return model.expected_log_likelihood(x, distribution), kl


@torch.no_grad()
def monte_carlo(objective, model, guide):
    """Mean over the data of the objective, and its standard error, from many particles."""
    draws = torch.stack([objective.per_datum(model, guide, X).mean() for _ in range(400)])
    return draws.mean(), draws.std() / math.sqrt(len(draws))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 4.0])
def test_beta_weighs_the_kl(beta):
    model, guide = pair()
    reconstruction, kl = closed_form(model, guide, X)
    value, error = monte_carlo(BetaELBO(beta, 10), model, guide)
    assert abs(value - (reconstruction - beta * kl).mean()) < 4 * error
    # The same criterion refuses a weight that is twice as large, where there is a weight.
    if beta > 0:
        assert abs(value - (reconstruction - 2 * beta * kl).mean()) > 5 * error


def test_beta_one_is_the_elbo_draw_by_draw():
    values = []
    for objective in (ELBO(3), BetaELBO(1.0, 3)):
        torch.manual_seed(0)
        values.append(objective.per_datum(*pair(), X))
    torch.testing.assert_close(*values)


def test_free_bits_of_nothing_are_the_elbo_and_of_much_stop_the_kl():
    model, guide = pair()
    values = []
    for objective in (AnalyticKLELBO(), FreeBitsELBO(0.0)):
        torch.manual_seed(0)
        values.append(objective.per_datum(model, guide, X).mean())
    torch.testing.assert_close(*values)
    torch.manual_seed(0)
    much = FreeBitsELBO(1000.0).per_datum(model, guide, X).mean()
    torch.testing.assert_close(much, values[0] + closed_form(model, guide, X)[1].mean() - 2 * 1000.0)


def test_free_bits_count_for_each_coordinate():
    model, guide = pair()
    rates = coordinate_kl(guide.posterior(X), model.prior()).mean(0)
    between = rates.mean().item()  # one coordinate below, one above
    torch.manual_seed(0)
    free = FreeBitsELBO(between).per_datum(model, guide, X).mean()
    torch.manual_seed(0)
    elbo = AnalyticKLELBO().per_datum(model, guide, X).mean()
    torch.testing.assert_close(elbo - free, between - rates.min())


def test_coordinate_kl_is_that_of_the_marginals():
    model, guide = pair(FullRank)
    distribution = guide.posterior(X)
    marginals = torch.distributions.Normal(
        distribution.mean, distribution.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    )
    expected = torch.distributions.kl_divergence(marginals, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(coordinate_kl(distribution, model.prior()), expected)
    with pytest.raises(TypeError, match="expected a Gaussian against a distribution with independent coordinates"):
        coordinate_kl(model.prior(), distribution)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="expected beta to be a finite number of at least zero"):
        BetaELBO(bad)
    with pytest.raises(ValueError, match="expected free_nats to be a finite number of at least zero"):
        FreeBitsELBO(bad)


# --- schedules ---------------------------------------------------------------------------------------------------


def betas_of(objective, steps, **options):
    """The weight at each step of a run of fit."""
    seen, kind = [], type(objective)

    class Spy(kind):
        def bound_at(self, draw, step):
            seen.append(self.beta.item())
            return super().bound_at(draw, step)

    objective.__class__ = Spy
    fit(*pair(), X, steps=steps, objective=objective, progress=False, **options)
    objective.__class__ = kind
    return seen


def test_fit_moves_along_the_schedule():
    assert betas_of(BetaELBO(LinearAnnealing(4)), 6) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert betas_of(BetaELBO(LinearAnnealing(2, start=0.5)), 3) == [0.5, 0.75, 1.0]
    assert betas_of(BetaELBO(CyclicalAnnealing(4)), 6) == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    assert betas_of(BetaELBO(lambda step: 1 / (1 + step)), 3) == [1.0, 0.5, pytest.approx(1 / 3)]


def test_a_second_run_begins_the_schedule_anew():
    objective = BetaELBO(LinearAnnealing(4))
    assert betas_of(objective, 3) == betas_of(objective, 3) == [0.0, 0.25, 0.5]


def test_svi_moves_along_the_schedule():
    objective = BetaELBO(LinearAnnealing(4))
    svi = pyro.infer.SVI(*pair(), pyro.optim.Adam({"lr": 1e-3}), loss=objective)
    betas = []
    for _ in range(3):
        betas.append(objective.beta.item())
        svi.step(X)
    assert betas == [0.0, 0.25, 0.5]
    svi.evaluate_loss(X)
    assert objective.beta.item() == 0.75


def test_a_resumed_run_goes_on_at_its_place_in_the_schedule(tmp_path):
    def run(steps, checkpoint=None):
        model, guide = pair(MeanField)
        options = {"objective": BetaELBO(LinearAnnealing(20)), "seed": 0, "progress": False}
        history = fit(model, guide, X, steps=steps, checkpoint=checkpoint, **options)
        return history.loss, list(model.parameters()) + list(guide.parameters())

    losses, expected = run(20)
    run(8, tmp_path / "run.safetensors")
    resumed, got = run(20, tmp_path / "run.safetensors")
    assert resumed == losses
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_annealing_ends_at_the_optimum_of_the_elbo():
    model, guide = pair()
    schedule = LinearAnnealing(500)
    fit(
        model,
        guide,
        X,
        steps=3000,
        objective=BetaELBO(schedule, 4),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / 3000)),
        seed=0,
        progress=False,
    )
    best = LinearVAE.optimum(X, 2).log_evidence(X).mean()
    assert 0 <= (best - AnalyticELBO().per_datum(model, guide, X).mean()).item() < 0.02


def nested(half, scale=1.0):
    """Latents in a further plate, masked at some data points and scaled, in model and guide alike."""

    def program(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            with poutine.mask(mask=MASK), poutine.scale(scale=scale):
                mean = x[:, :2] if half == "guide" else 0 * x[:, :2]
                z = pyro.sample("z", dist.Normal(mean, 0.5 if half == "guide" else 1.0).to_event(1))
            if half == "model":
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0].expand(3, -1))

    return program


MASK = torch.arange(len(X)) % 3 > 0


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_free_bits_honour_masks_scales_and_further_plates(scale, num_particles):
    pair = nested("model", scale), nested("guide", scale)
    values = []
    for objective in (AnalyticKLELBO(num_particles), FreeBitsELBO(0.0, num_particles)):
        torch.manual_seed(0)
        values.append(objective.per_datum(*pair, X).mean())
    torch.testing.assert_close(*values)
    torch.manual_seed(0)
    much = FreeBitsELBO(1000.0, num_particles).per_datum(*pair, X).mean()
    each = scale * coordinate_kl(dist.Normal(X[:, :2], 0.5).to_event(1), dist.Normal(0 * X[:, :2], 1.0).to_event(1))
    rate = 3 * (each.sum(-1) * MASK).mean()
    torch.testing.assert_close(much, values[0] + rate - 6 * 1000.0)


def test_free_bits_refuse_masks_that_differ():
    def unmasked(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))

    with pytest.raises(ValueError, match="expected site 'z' under the same mask and scale in model and guide"):
        FreeBitsELBO(0.1).loss(nested("model"), unmasked, X)
