"""Modes of densities with kinks, at which Newton's method stalls: one a hill, however many points it stalls at."""

import itertools
import math

import pytest
import torch
from pyro_problems import noisy

from inference.numerics.newton import Expansion, decrement
from inference.posterior.log_joint import LogJoint
from inference.posterior.modes import find_modes, in_sight, prior_scale


def modes_of(model, x, num_starts=32):
    log_joint = LogJoint(model, x)
    location, scale = prior_scale(log_joint)
    return find_modes(log_joint, log_joint.sample_prior(num_starts).to(location), location, scale), log_joint


def relu_net(dim, seed):
    torch.manual_seed(seed)
    sizes = (dim, 32, 32, 16)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers[:-1]).double().requires_grad_(False)


@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("sigma", [1.0, 0.1])
def test_points_at_kinks_of_one_hill_are_one_mode(dim, sigma):
    net = relu_net(dim, seed=dim)
    x = net(torch.randn(4, dim).double()) + sigma * torch.randn(4, 16).double()
    modes, log_joint = modes_of(noisy(net, dim, sigma), x)
    assert (modes.log_joint.isfinite().sum(0) <= 8).all()  # of 32 starts, each of which ends at another point
    assert modes.kinked.any()
    # None is lower than where a start leads that is the highest alone.
    highest = torch.stack([log_joint(u) for u in log_joint.sample_prior(1000)]).amax(0)
    assert (modes.log_joint[0] >= highest).all()


def test_both_peaks_at_kinks_stay_two_modes():
    modes, _ = modes_of(noisy(torch.abs, 1, 0.2), torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    assert modes.log_joint.isfinite().sum(0).tolist() == [2, 2]
    sharp, _ = modes_of(noisy(lambda z: (z.abs() - 1).abs(), 1, 0.2), torch.tensor([[-0.5]]).double())
    assert sharp.log_joint.isfinite().sum(0).tolist() == [2]
    assert sharp.kinked.sum(0).tolist() == [2]
    torch.testing.assert_close(sharp.location.flatten().sort().values, torch.tensor([-1.0, 1.0]).double())


def test_a_smooth_density_has_no_kinks():
    modes, _ = modes_of(noisy(torch.tanh, 3, 0.1), torch.zeros(5, 3).double())
    assert not modes.kinked.any()
    assert modes.converged[0].all()


def test_what_is_in_sight_has_no_dip_of_half_a_nat_between():
    """Two Gaussians of unit width: half a nat of dip is reached where they are some 3.1 apart."""

    def log_density(datum, points):
        apart = torch.tensor([[2.4], [3.4]], dtype=torch.float64)[datum]
        return torch.logaddexp(*(-0.5 * (points - side * apart / 2).square().sum(-1) for side in (-1, 1)))

    data = torch.arange(2)
    ends = torch.tensor([[1.2], [1.7]], dtype=torch.float64)
    height = log_density(data, ends).unsqueeze(0)
    every, none = torch.ones(1, 2).bool(), torch.zeros(1, 2).bool()
    args = (log_density, ends.unsqueeze(0), height, -ends.unsqueeze(0), height)
    assert in_sight(*args, every).tolist() == [[True, False]]
    assert in_sight(*args, none).tolist() == [[False, False]]


def test_a_whole_step_gains_what_a_parabola_has():
    """Log density -(z - 3)^2 / 2 s^2 at 0: nine halves of s^-2."""
    scale = torch.tensor([1.0, 0.1])
    at = Expansion(torch.zeros(2), (3 / scale**2).unsqueeze(-1), (-1 / scale**2).view(2, 1, 1))
    torch.testing.assert_close(decrement(at), 4.5 / scale**2)
    assert math.isclose(float(decrement(Expansion(at.value, 0 * at.gradient, at.hessian)).sum()), 0.0)
