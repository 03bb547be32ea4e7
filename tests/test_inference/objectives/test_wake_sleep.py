"""Reweighted wake-sleep against gradients in closed form, and the pairs that it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_problems import optimal_guide
from torch import nn

from guides import Linear, TiedMeanField
from inference import IWELBO, WakeSleep, WakeWake, fit, gradient_noise
from zoo import LinearVAE

REPEATS = 100


def pair_with_exact_guide():
    torch.manual_seed(0)
    model = LinearVAE(3, 1, sigma=0.7).double()
    model.mu.data.normal_()
    return model, optimal_guide(model)


def distance(noise, exact):
    return float(((noise.mean - exact) / noise.standard_error).abs().max())


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("objective", [WakeWake(5), WakeSleep(5)], ids=lambda o: type(o).__name__)
def test_at_the_exact_posterior_the_model_climbs_the_evidence(objective):
    """Fisher's identity: the mean of grad log p(x, z) over the posterior is grad log p(x)."""
    model, guide = pair_with_exact_guide()
    x = torch.randn(200, 3).double()
    noise = gradient_noise(objective, model, guide, x, num_repeats=REPEATS, seed=1, progress=False)["decoder"]
    exact = flat(torch.autograd.grad(-model.log_evidence(x).sum(), list(model.parameters())))
    assert distance(noise, exact) < 4
    assert distance(noise, 1.1 * exact) > 6


def sleep_gradient(model, guide):
    """Gradient of -E_{p(z, x)} log q(z | x), a Gaussian integral, for a linear guide of one latent."""
    w, mu, var = model.W.detach()[:, 0], model.mu.detach(), float(model.sigma.detach()) ** 2
    slope = 1 - guide.V[0] @ w
    square = slope.square() + (guide.V[0] @ mu + guide.bias[0]).square() + var * guide.V[0].square().sum()
    log_q = -0.5 * square / (2 * guide.log_sigma[0]).exp() - guide.log_sigma[0] - 0.5 * math.log(2 * math.pi)
    return flat(torch.autograd.grad(-log_q, list(guide.parameters())))


def test_asleep_the_guide_climbs_its_mean_log_density_of_dreams():
    model, guide = pair_with_exact_guide()
    guide.V.data += 0.1
    guide.log_sigma.data += 0.2
    x = 100 + torch.randn(1000, 3).double()  # of which dreams know nothing
    noise = gradient_noise(WakeSleep(2), model, guide, x, num_repeats=REPEATS, seed=1, progress=False)["encoder"]
    exact = 1000 * sleep_gradient(model, guide)
    assert distance(noise, exact) < 4
    assert distance(noise, 1.1 * exact) > 6


def bernoulli_pair():
    """z ~ Bernoulli(.3), x ~ N(2 z, 1): a latent without reparameterised draws."""
    logit, shift = nn.Parameter(torch.tensor(0.4).double()), nn.Parameter(torch.tensor(2.0).double())

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(pyro.param("shift", lambda: shift.detach()) * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", lambda: logit.detach())))

    return model, guide


def test_wake_wake_moves_a_discrete_guide_towards_the_posterior():
    model, guide = bernoulli_pair()
    x = torch.tensor([0.5]).double()
    noise = gradient_noise(WakeWake(20_000), model, guide, x, num_repeats=50, seed=1, progress=False)
    odds = 0.3 / 0.7 * torch.exp(-0.5 * (x - 2.0).square() + 0.5 * x.square())
    posterior = odds / (1 + odds)
    exact = torch.sigmoid(torch.tensor(0.4).double()) - posterior  # of minus E_post log q
    assert distance(noise["encoder"], exact) < 4
    assert distance(noise["decoder"], -posterior * (x - 2.0)) < 4
    assert distance(noise["encoder"], -exact) > 6


def test_a_discrete_latent_trains_through_svi_and_fit():
    x = torch.tensor([0.5]).double().expand(50)
    odds = 0.3 / 0.7 * math.exp(-0.5 * 1.5**2 + 0.5 * 0.5**2)

    def no_parameter(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    guide = bernoulli_pair()[1]
    svi = pyro.infer.SVI(no_parameter, guide, pyro.optim.Adam({"lr": 0.05}), WakeWake(100))
    for _ in range(200):
        svi.step(x)
    assert float(pyro.param("logit").detach().sigmoid()) == pytest.approx(odds / (1 + odds), abs=0.03)
    with pytest.raises(ValueError, match="expected a reparameterised distribution at guide site 'z'"):
        IWELBO(2).loss(no_parameter, guide, x)


@pytest.mark.parametrize("objective", [WakeWake(10), WakeSleep(10)], ids=lambda o: type(o).__name__)
def test_fit_trains_a_linear_vae_with_it(objective):
    torch.manual_seed(2)
    truth, model, guide = LinearVAE(4, 1, sigma=0.5), LinearVAE(4, 1), Linear(4, 1)
    x = truth(n=200).detach()
    fit(model, guide, x, steps=250, objective=objective, optimizer=lambda p: torch.optim.Adam(p, lr=0.05), seed=0,
        progress=False)  # fmt: skip
    best = LinearVAE.optimum(x.double(), 1).log_evidence(x).detach().mean()
    assert 0 <= float(best - model.log_evidence(x).detach().mean()) < 0.1


@pytest.mark.parametrize("objective", [WakeWake(2), WakeSleep(2)], ids=lambda o: type(o).__name__)
def test_a_pair_that_shares_parameters_is_refused_by_name(objective):
    model, _ = pair_with_exact_guide()
    with pytest.raises(ValueError, match=r"without common parameters for wake-sleep, got \['W', 'log_sigma', 'mu'\]"):
        objective.differentiable_loss(model, TiedMeanField(model), torch.zeros(4, 3).double())


def test_what_cannot_be_dreamt_or_counted_is_refused():
    model, guide = pair_with_exact_guide()

    def other(x):
        return model(2 * x)

    with pytest.raises(ValueError, match=r"expected every observed value to be an argument or a view of one.*site 'x'"):
        WakeSleep(2).differentiable_loss(other, guide, torch.zeros(4, 3).double())
    with pytest.raises(ValueError, match="expected num_particles to be at least 2"):
        WakeWake(1)
