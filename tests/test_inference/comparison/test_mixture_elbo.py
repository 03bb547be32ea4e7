"""The ELBO of a mixture component by component."""

import numpy as np
import torch
from squared_problem import elbo_on_grid, squared_model

from guides import FullRank, Mixture
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
