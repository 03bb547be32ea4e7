"""Data that the modes found do not explain: they are looked at again, or have no numerical guarantee."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.special
import scipy.stats
import torch

import inference.marginal_likelihood.quadrature.adaptive_quadrature as adaptive_quadrature
import inference.posterior.misfit as misfit
from inference import LogJoint, evidence
from inference.core.seeding import seeded
from inference.marginal_likelihood.base.result import NUMERICAL, PROBABILISTIC
from inference.posterior.misfit import search_unexplained, unexplained
from inference.posterior.modes import Modes, prior_scale

WIDTH, SIGMA = 0.015, 0.3
PLACES = torch.tensor([[1.7, -1.3], [-0.4, 0.9], [-1.8, -1.6]], dtype=torch.float64)


def needles(x):
    """x = 3 on a needle about a place in the plane, 0 elsewhere."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        away = ((z - x[:, 1:]) / WIDTH).square().sum(-1)
        pyro.sample("x", dist.Normal(3 * (-0.5 * away).exp(), SIGMA), obs=x[:, 0])


def needle_data(value=2.9):
    return torch.cat([torch.full((3, 1), value, dtype=torch.float64), PLACES], -1)


def needle_evidence(value=2.9):
    """By the squared distance from the needle's place, which is non-central chi-square under the prior."""
    found = []
    for shift in PLACES.square().sum(-1).tolist():
        parts = []
        for low, high in ((1e-9, 6 * WIDTH), (6 * WIDTH, 12.0)):
            r = np.linspace(low, high, 100_001)
            log_f = np.log(2 * r) + scipy.stats.ncx2.logpdf(r**2, 2, shift)
            log_f += scipy.stats.norm.logpdf(value, 3 * np.exp(-0.5 * (r / WIDTH) ** 2), SIGMA)
            parts.append(math.log(np.trapezoid(np.exp(log_f - log_f.max()), r)) + log_f.max())
        found.append(scipy.special.logsumexp(parts))
    return torch.tensor(found, dtype=torch.float64)


def test_needles_in_the_plane_are_found_where_the_data_ask_for_one():
    got = evidence(needles, needle_data(), seed=0, progress=False)
    assert got.guarantee == (NUMERICAL,) * 3
    torch.testing.assert_close(got.value, needle_evidence(), rtol=0, atol=1e-6)
    adapted = evidence(needles, needle_data(), method="adaptive", seed=0, progress=False)
    assert ((adapted.value - needle_evidence()).abs() < 4 * adapted.standard_error).all()


def test_what_no_look_explains_has_no_numerical_guarantee(monkeypatch):
    """The twin: with a look of 16 draws the needles stay hidden, 35 nats are missing, and the result says so."""
    monkeypatch.setattr(adaptive_quadrature, "with_features", lambda density, _: density)
    monkeypatch.setattr(misfit, "_DRAWS", 16)
    monkeypatch.setattr("inference.posterior.modes._PROBES", (16, 16, 16, 16))
    got = evidence(needles, needle_data(), seed=0, progress=False)
    hidden = got.value < needle_evidence() - 10
    assert hidden.any()
    assert all(kind == PROBABILISTIC for kind, bad in zip(got.guarantee, hidden.tolist(), strict=True) if bad)
    assert (got.lower <= needle_evidence()).all()
    assert got.upper[hidden].isinf().all()
    adapted = evidence(needles, needle_data(), method="adaptive", seed=0, progress=False)
    missed = adapted.value < needle_evidence() - 10
    assert adapted.upper[missed].isinf().all()
    assert all(note.endswith("further ones that matter") for note, bad in zip(adapted.notes, missed.tolist()) if bad)


def linear(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 0.5 * torch.ones(20).double()).to_event(1), obs=x)


def posterior_mean(x):
    """Of both coordinates, by the precision of their sum: 1 / 2 of the prior and 20 / .25 of the data."""
    return 0.5 * 80 / 80.5 * x.mean(-1, keepdim=True).expand(-1, 2)


def modes_of(log_joint, location):
    """The modes of a Gaussian posterior."""
    hessian = -torch.eye(2).double().expand(1, len(location), 2, 2)
    flags = torch.ones(1, len(location)).bool()
    return Modes(location.unsqueeze(0), log_joint(location).unsqueeze(0), hessian, flags, ~flags)


def test_data_of_the_model_are_explained_and_others_are_not():
    with seeded(0):
        z = torch.randn(200, 2).double()
        x = z.sum(-1, keepdim=True) + 0.5 * torch.randn(200, 20).double()
        x[:3] += 5 * torch.randn(3, 20).double()
        log_joint = LogJoint(linear, x)
        odd = unexplained(log_joint, modes_of(log_joint, posterior_mean(x)))
    assert odd.tolist() == [True] * 3 + [False] * 197


def test_explained_data_are_not_looked_at_again(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(misfit, "likeliest", refuse)
    with seeded(0):
        x = torch.randn(5, 2).double().sum(-1, keepdim=True) + 0.5 * torch.randn(5, 20).double()
        log_joint = LogJoint(linear, x)
        modes = modes_of(log_joint, posterior_mean(x))
        found, odd = search_unexplained(log_joint, modes, *prior_scale(log_joint))
    assert found is modes
    assert not odd.any()


def test_a_factor_has_no_replications_and_explains_itself():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.factor("x", -100 * (x[:, 0] - z.sum(-1)).square() - 1000)

    log_joint = LogJoint(model, torch.zeros(3, 1).double())
    u = torch.randn(7, 3, 2).double()
    torch.testing.assert_close(log_joint.replicated(u), log_joint.terms(u).likelihood)
    assert not unexplained(log_joint, modes_of(log_joint, torch.zeros(3, 2).double())).any()
