"""The ELBO of a mixture component by component."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from squared_problem import elbo_on_grid, squared_model

from guides import FullRank, Mixture
from inference import refit
from inference.comparison.mixture_elbo import mixed, mixture_elbo
from inference.numerics.whitened_noise import WhitenedNoise
from inference.pair.call import Call


def pair(**options):
    torch.manual_seed(1)
    x = torch.tensor([[0.5], [1.0], [2.0]]).double()
    guide = Mixture(1, 1, hidden=(4,), **options).double().requires_grad_(False)
    return Call(squared_model, guide, (x,)), guide.posterior(x), x


def test_it_is_the_integral():
    call, q, x = pair()
    known = mixed(call)
    wide = np.linspace(-15, 15, 30_001)
    values = torch.stack([mixture_elbo(call, known, 4000) for _ in range(8)])
    parts = zip(x, q.log_weights.exp()[:, 0], q.locs[..., 0], q.sigmas[..., 0], strict=True)
    expected = torch.tensor([elbo_on_grid(*(part.numpy() for part in row), wide).item() for row in parts])
    assert ((values.mean(0) - expected).abs() < 5 * values.std(0) / 8**0.5).all()


def test_at_given_noise_the_weights_gradient_is_that_of_the_value():
    torch.manual_seed(0)
    x = torch.tensor([[1.0], [2.0]]).double()
    local = Mixture(1, 1, hidden=(4,)).double().local(x)
    call, noise = Call(squared_model, local, (x,)), WhitenedNoise()
    known = mixed(call)

    def value(offsets):
        with torch.no_grad():
            local.offsets.copy_(offsets)
        with noise:
            return mixture_elbo(call, known, 32)

    start = local.offsets.detach().clone()
    (gradient,) = torch.autograd.grad(value(start).sum(), local.offsets)
    for i in range(start.shape[1]):
        step = torch.zeros_like(start)
        step[:, i] = 1e-5
        change = (value(start + step) - value(start - step)).detach() / 2e-5
        torch.testing.assert_close(change, gradient[:, i], rtol=1e-6, atol=1e-6)


def test_other_guides_and_mixtures_of_all_data_are_left_as_they_are():
    call, _, x = pair()
    assert mixed(call) == ("z", 1, 2, 1)
    assert mixed(Call(squared_model, FullRank(1, 1, hidden=(4,)).double(), (x,))) is None
    assert mixed(Call(squared_model, call.guide, (x,), whole=True)) is None


# --- bounded supports ------------------------------------------------------------------------------


def bounded_model(x):
    """Whose posterior has two modes between the ends, or one at each."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(-2 * x.new_ones(1), 2.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0] ** 2, 0.3), obs=x[:, 0])


def bounded_elbo(q, x):
    """By the trapezoidal rule over unconstrained coordinates."""
    u = torch.linspace(-60, 60, 120_001, dtype=torch.float64).reshape(-1, 1, 1)
    z = 2 * (u / 2).tanh()
    log_q = q.base_dist.log_prob(u.expand(-1, len(x), 1))
    log_slope = np.log(4) - u[..., 0] - 2 * torch.nn.functional.softplus(-u[..., 0])
    log_p = dist.Normal(z[..., 0] ** 2, 0.3).log_prob(x[:, 0]) - np.log(4) + log_slope
    return torch.trapezoid(log_q.exp() * torch.where(log_q > -700, log_p - log_q, 0.0), u[:, 0, 0], dim=0)


def test_on_a_bounded_support_it_is_the_integral_near_the_ends_too():
    torch.manual_seed(0)
    x = torch.tensor([[1.0], [3.9], [4.0]]).double()
    local = Mixture(1, 1, hidden=(4,), support=(-2.0, 2.0)).double().local(x)
    with torch.no_grad():
        local.offsets.copy_(-local.start)
        local.offsets[:, 2:4] += torch.tensor([[-1.0, 1.0], [-4.0, 5.0], [-38.0, 42.0]])
    call = Call(bounded_model, local.requires_grad_(False), (x,))
    values = torch.stack([mixture_elbo(call, mixed(call), 2000) for _ in range(8)])
    expected = bounded_elbo(local.posterior(x), x)
    assert ((values.mean(0) - expected).abs() < 5 * values.std(0) / 8**0.5 + 1e-9).all()


def test_refits_on_a_bounded_support_find_both_modes():
    x, found = torch.tensor([[2.0]]).double(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        guide = Mixture(1, 1, hidden=(4,), support=(-2.0, 2.0)).double()
        got = refit(bounded_model, guide, x, restarts=1, max_steps=100, seed=seed, progress=False)
        assert got.converged.all()
        found.append(bounded_elbo(got.guide.posterior(x), x).detach())
        assert ((got.elbo - found[-1]).abs() < 5 * got.standard_error + 1e-4).all()
    torch.testing.assert_close(*found, atol=2e-3, rtol=0)


def test_a_masked_latent_on_a_bounded_support_is_left_as_it_is():
    x = torch.ones(2, 1).double()
    guide = Mixture(1, 1, hidden=(4,), support=(-2.0, 2.0)).double()
    assert mixed(Call(bounded_model, guide, (x,))) == ("z", 1, 2, 1)
    assert mixed(Call(bounded_model, poutine.mask(guide, mask=True), (x,))) is None
