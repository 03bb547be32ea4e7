"""Coordinates of bounded supports: against torch's own where those are exact, and against autograd and logarithms."""

import math

import pytest
import torch
from pyro import distributions as dist
from torch.distributions import biject_to, constraints
from torch.nn.functional import logsigmoid

from inference.posterior.coordinates import StickBreaking, coordinates_of, unrounded


def test_stick_breaking_is_that_of_torch_with_its_jacobian():
    u = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = coordinates_of(constraints.simplex), biject_to(constraints.simplex)
    y = ours(u)
    torch.testing.assert_close(y, theirs(u), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.inv(y), u, rtol=0, atol=1e-12)
    jacobian = torch.stack([torch.func.jacrev(StickBreaking())(row)[:-1] for row in u])
    log_det = ours.log_abs_det_jacobian(u, y)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-10)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_stick_breaking_resolves_a_small_rest_at_every_part(place):
    """One part holds all but 1e-200: the others come back exactly."""
    y = torch.full((3,), 5e-201, dtype=torch.float64)
    y[place] = 1.0
    transform = coordinates_of(constraints.independent(constraints.simplex, 0))
    torch.testing.assert_close(transform(transform.inv(y)), y, rtol=1e-12, atol=0)


@pytest.mark.parametrize("u", [-800.0, -40.0, 0.3, 30.0, 40.0, 800.0])
def test_densities_in_coordinates_are_exact_where_values_are_rounded(u):
    a, b = (torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.2))
    raw = torch.tensor([u], dtype=torch.float64)
    constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    expected = constant + a * logsigmoid(raw) + b * logsigmoid(-raw)
    for fn, parts in (
        (dist.Beta(a, b), raw),
        (dist.Beta(a.expand(1), b).to_event(1), raw),
        (dist.Dirichlet(torch.stack([a, b])), raw),
    ):
        transform = coordinates_of(fn.support)
        value = transform(parts)
        found = fn.log_prob(value) + transform.log_abs_det_jacobian(parts, value) + unrounded(fn, parts, value)
        torch.testing.assert_close(found.reshape(1), expected, rtol=1e-12, atol=1e-10)


def test_other_distributions_are_left_as_they_are():
    raw = torch.zeros(3, dtype=torch.float64)
    for fn in (dist.Normal(0.0, 1.0), dist.Uniform(0.0, 1.0), dist.Normal(raw, 1.0).to_event(1)):
        assert unrounded(fn, raw, raw) is None


def test_the_uniform_distribution_keeps_its_mass_beyond_rounding():
    transform = coordinates_of(dist.Uniform(0.0, 1.0).support)
    raw = torch.tensor([60.0], dtype=torch.float64)
    torch.testing.assert_close(transform.log_abs_det_jacobian(raw, transform(raw)).item(), -60.0, rtol=0, atol=1e-9)
    assert math.isclose(float(transform(raw)), 1.0, rel_tol=1e-15)
