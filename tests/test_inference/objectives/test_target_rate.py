"""Target rates against the frontier of linear models, and BILBO against closed forms and stock Pyro."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import FullRank, Linear, MeanField
from guides.base import Guide
from inference import BILBO, AnalyticKLELBO, FittedPrior, SampledTargetRate, TargetRate, compare, fit, iwae, log_weights
from inference.distributions.gaussian import DiagNormal
from inference.objectives.base import Objective
from zoo import PPCA, LinearGaussian, LinearVAE, digits, linear_gaussian
from zoo.data.preprocessing import Scaled

X = linear_gaussian(60, 5, 2).train


def pair(guide=Linear):
    torch.manual_seed(3)
    return LinearVAE(5, 2, sigma=0.5).double(), guide(5, 2).double()


def rate_of(model, guide, x):
    """Mean rate and distortion in closed form."""
    distribution = guide.posterior(x)
    rate = torch.distributions.kl_divergence(distribution, model.prior()).mean()
    return float(rate.detach()), -float(model.expected_log_likelihood(x, distribution).detach().mean())


class Reconstruction(Objective):
    def bound(self, draw):
        return draw.total(draw.model_sites, observed=True).mean(0)


def seeded_mean(objective, *arguments):
    torch.manual_seed(7)
    return objective.per_datum(*arguments).mean()


# --- target rate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.0, 3.0, 50.0])
def test_the_penalty_is_the_distance_of_the_mean_rate(target):
    model, guide = pair()
    value = seeded_mean(TargetRate(target, 2.5, 3), model, guide, X)
    rate, _ = rate_of(model, guide, X)
    expected = seeded_mean(Reconstruction(3), model, guide, X) - 2.5 * abs(rate - target)
    torch.testing.assert_close(value, expected)


def test_far_above_its_target_it_is_the_elbo_up_to_a_constant():
    model, guide = pair()
    values = [seeded_mean(objective, model, guide, X) for objective in (TargetRate(0.0), AnalyticKLELBO())]
    torch.testing.assert_close(*values)


def test_the_sampled_rate_is_unbiased_away_from_the_corner():
    model, guide = pair()
    rate, distortion = rate_of(model, guide, X)
    with torch.no_grad():
        draws = torch.stack([SampledTargetRate(50.0, 2.5, 10).per_datum(model, guide, X).mean() for _ in range(400)])
    error = float(draws.std()) / 20
    assert abs(float(draws.mean()) - (-distortion - 2.5 * (50 - rate))) < 4 * error
    assert abs(float(draws.mean()) - (-distortion - 2.5 * (50 + rate))) > 6 * error


@pytest.mark.parametrize("kind", [TargetRate, SampledTargetRate])
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_rates_and_weights_that_are_none_are_refused(kind, bad):
    with pytest.raises(ValueError, match="expected rate to be a finite number of at least zero"):
        kind(bad)
    with pytest.raises(ValueError, match="expected weight to be a finite number of at least zero"):
        kind(1.0, bad)


def trained_to(target, weight, steps):
    x = digits(transform=Scaled(16.0), test_size=0).train
    torch.manual_seed(0)
    model = LinearVAE(64, 10, sigma=math.sqrt(0.05), learn_sigma=False).double()
    guide = Linear(64, 10).double()
    with torch.no_grad():
        model.mu.copy_(x.mean(0))
        guide.bias.copy_(-guide.V @ x.mean(0))
    fit(
        model,
        guide,
        x,
        steps=steps,
        objective=TargetRate(target, weight),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))),
        seed=0,
        progress=False,
    )
    return rate_of(model, guide, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "weight", "rate", "slack", "distortion"),
    [(4.0, 5.0, 4.0, 0.02, -11.552), (12.0, 1.0, 12.0, 0.02, None), (4.0, 1.0, 8.87, 0.05, None)],
)
def test_linear_digits_reach_their_target_or_stay_at_the_elbo(target, weight, rate, slack, distortion):
    got, reached = trained_to(target, weight, steps=6000)
    print(f"target {target} weight {weight}: rate {got:.4f}, distortion {reached:.4f}")
    assert got == pytest.approx(rate, abs=slack)
    if distortion is not None:
        assert reached == pytest.approx(distortion, abs=0.05)


# --- BILBO -------------------------------------------------------------------------------------------------------


class UnitVariance(Guide):
    """q = N(V x + b, I); its draws are cubature points, exact for what is quadratic in z."""

    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.V = nn.Parameter(0.5 * torch.randn(latent_dim, data_dim).double())
        self.bias = nn.Parameter(torch.zeros(latent_dim).double())

    def posterior(self, x):
        return Cubature(x @ self.V.mT + self.bias, x.new_ones(1))


class Cubature(DiagNormal):
    """2 K draws side by side: the mean and sqrt(K) sigma to either side along each axis."""

    def rsample(self, sample_shape=()):
        if len(self.batch_shape) < 2:  # a probe of one sample
            return super().rsample(sample_shape)
        dim = self.event_shape[0]
        points = math.sqrt(dim) * torch.cat([torch.eye(dim), -torch.eye(dim)]).to(self.loc)
        return self.loc + self.sigma * points.unsqueeze(1)


def test_the_rate_is_the_closed_form_of_the_second_moments():
    model, guide = pair()
    guide.log_sigma.data.normal_()
    model = FittedPrior(model, 2).double()
    value = seeded_mean(BILBO(3), model, guide, X) - seeded_mean(Reconstruction(3), model, guide, X)
    distribution = guide.posterior(X)
    moments, variances = distribution.mean.square().mean(0), distribution.variance[0]  # the same for all data
    torch.testing.assert_close(value, -0.5 * (1 + moments / variances).log().sum(), rtol=0, atol=1e-10)
    floating = torch.distributions.Normal(0.0, (moments + variances).sqrt())
    normal = torch.distributions.Normal(distribution.mean, distribution.variance.sqrt())
    mean_kl = torch.distributions.kl_divergence(normal, floating).sum(1).mean()
    torch.testing.assert_close(value, -mean_kl, rtol=0, atol=1e-10)


def test_gradients_are_those_of_stock_pyro_with_the_floating_prior():
    decoder, encoder = nn.Linear(2, 5).double(), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    def model(x, floating=True):
        sigma = (encoder(x).square().mean(0) + 1).sqrt() if floating else x.new_ones(2)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), sigma).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    parameters = [*decoder.parameters(), *encoder.parameters()]

    def gradients(objective, program):
        torch.manual_seed(7)
        return torch.autograd.grad(objective.differentiable_loss(program, guide, X), parameters)

    fitted = FittedPrior(lambda x: model(x, floating=False), 2).double()
    ours, theirs = gradients(BILBO(), fitted), gradients(pyro.infer.TraceMeanField_ELBO(), model)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    unit = gradients(pyro.infer.TraceMeanField_ELBO(), fitted)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, unit, strict=True)) > 1


def test_unit_variance_has_the_optimum_of_the_likelihood():
    torch.manual_seed(1)
    model, guide = FittedPrior(LinearVAE(5, 2).double(), 2).double(), UnitVariance(5, 2)
    fit(
        model,
        guide,
        X,
        steps=4,
        objective=BILBO(4),
        optimizer=lambda p: torch.optim.LBFGS(
            p, max_iter=40, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=0
        ),
        progress=False,
    )
    best = float(PPCA.from_data(X, 2).log_evidence(X).detach().mean())
    assert float(BILBO(4).per_datum(model, guide, X).detach().mean()) == pytest.approx(best, abs=1e-6)
    model.freeze(guide, X)
    distribution = model.model.linear_gaussian
    frozen = LinearGaussian(distribution.W * model.second_moment.sqrt(), distribution.mu, distribution.sigma)
    assert float(frozen.log_prob(X).detach().mean()) == pytest.approx(best, abs=1e-6)
    # There the guide is the exact posterior of the frozen model: every weight is the evidence, up to the gap of 1e-6
    # nats, which is half the variance of the log weights.
    weights = log_weights(model, guide, X, num_samples=4)
    assert 0.5 * float((weights - frozen.log_prob(X).detach()).square().mean()) < 2e-6


def test_a_model_without_anything_to_freeze_is_refused():
    with pytest.raises(TypeError, match=r"FittedPrior\(model\), got LinearVAE"):
        BILBO().per_datum(*pair(), X)


def test_a_fitted_prior_is_no_model_before_it_is_frozen():
    model, guide = pair()
    fitted = FittedPrior(model, 2).double()
    for refused in (
        lambda: compare(fitted, {"g": guide}, X, num_samples=2, progress=False),
        lambda: log_weights(fitted, guide, X, num_samples=2),
    ):
        with pytest.raises(ValueError, match=r"FittedPrior.*not frozen: call \.freeze"):
            refused()
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 5\), got \(4, 3\)"):
        fitted.freeze(guide, X[:4, :3])
    with pytest.raises(ValueError, match=r"expected codes of event \(3,\), got \(2,\)"):
        FittedPrior(model, 3).double().freeze(guide, X)


@pytest.mark.parametrize("guide_class", [Linear, MeanField, FullRank])
def test_frozen_it_has_the_second_moments_of_the_training_codes(guide_class):
    model, guide = pair(guide_class)
    fitted = FittedPrior(model, 2).double()
    fitted.freeze(guide, X)
    distribution = guide.posterior(X)
    moments = (distribution.mean.square() + distribution.variance).mean(0).detach()
    torch.testing.assert_close(fitted.second_moment, moments)
    estimate = iwae(log_weights(fitted, guide, X, num_samples=5000))
    own = model.linear_gaussian
    exact = LinearGaussian(own.W * moments.sqrt(), own.mu, own.sigma).log_prob(X).detach()
    error = estimate.standard_error.square().sum().sqrt()
    assert abs(float((estimate.value - exact).sum())) < 4 * float(error)
    wrong = LinearGaussian(own.W * (2 * moments).sqrt(), own.mu, own.sigma).log_prob(X).detach()
    assert abs(float((estimate.value - wrong).sum())) > 6 * float(error)
    again = FittedPrior(LinearVAE(5, 2).double(), 2).double()
    again.load_state_dict(fitted.state_dict())
    assert again.frozen
