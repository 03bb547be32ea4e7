"""Pairs as users write them, of kinds that no other test has: numbers beside an independent truth at each door."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

from inference import Adaptive, Importance, evidence, fit, iwae, log_weights, sbc, simulate
from inference.marginal_likelihood.automatic import Automatic

DOUBLE = {"dtype": torch.float64}
QUIET = {"seed": 0, "progress": False}
WHOLE = {"whole": True}


def line(low, high, number):
    """Midpoints of an interval, and the log of their distance."""
    return low + (torch.arange(number, **DOUBLE) + 0.5) / number * (high - low), math.log((high - low) / number)


def drawn(guide, *args):
    torch.manual_seed(0)
    pyro.clear_param_store()
    guide(*args)
    return guide.double()


def zero_inflated_counts():
    """Plates in both dimensions, a global share of zeros and a rate of each column."""
    x = torch.tensor([[0.0, 3, 0], [1, 0, 0], [5, 2, 4], [0, 0, 1]], **DOUBLE)
    two = torch.tensor(2.0, **DOUBLE)

    def model(x):
        gate = pyro.sample("gate", dist.Beta(two, two))
        with pyro.plate("columns", 3, dim=-1):
            rate = pyro.sample("rate", dist.Gamma(two, 1.0))
            with pyro.plate("rows", len(x), dim=-2):
                pyro.sample("x", dist.ZeroInflatedPoisson(rate, gate=gate), obs=x)

    (gates, step), (rates, width) = line(0, 1, 200), line(0, 20, 2000)
    shape = (len(rates), len(gates), 1, 1)
    counts = dist.ZeroInflatedPoisson(rates.view(-1, 1, 1, 1).expand(shape), gate=gates.view(1, -1, 1, 1).expand(shape))
    columns = counts.log_prob(x).sum(2) + dist.Gamma(two, 1.0).log_prob(rates).view(-1, 1, 1)
    joint = (columns.logsumexp(0) + width).sum(-1) + dist.Beta(two, two).log_prob(gates)
    return model, drawn(AutoNormal(model), x), (x,), (joint.logsumexp(0) + step).reshape(1), WHOLE


def changepoint():
    """Two rates and the enumerated time at which one takes over from the other."""
    x = torch.tensor([4.0, 5, 3, 6, 1, 0, 1, 2], **DOUBLE)
    times = torch.arange(8)

    def model(x):
        rates = [pyro.sample(name, dist.Gamma(x.new_tensor(3.0), 1.0)) for name in ("early", "late")]
        change = pyro.sample("change", dist.Categorical(x.new_ones(8) / 8), infer={"enumerate": "parallel"})
        with pyro.plate("times", 8):
            pyro.sample("x", dist.Poisson(torch.where(times < change, *rates)), obs=x)

    def log_gamma_poisson(part):
        total, number = 3 + part.sum(), len(part)
        return torch.lgamma(total) - math.lgamma(3) - total * math.log(1 + number) - torch.lgamma(part + 1).sum()

    parts = torch.stack([log_gamma_poisson(x[:t]) + log_gamma_poisson(x[t:]) for t in range(8)])
    guide = drawn(AutoNormal(poutine.block(model, hide=["change"])), x)
    return model, guide, (x,), (parts.logsumexp(0) - math.log(8)).reshape(1), WHOLE


def correlation():
    """The Cholesky factor of a correlation matrix."""
    x = torch.randn(10, 2, generator=torch.manual_seed(0), **DOUBLE) @ torch.tensor([[1.0, 0.6], [0, 0.8]], **DOUBLE)

    def model(x):
        factor = pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(1.5, **DOUBLE)))
        with pyro.plate("points", len(x)):
            pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), scale_tril=factor), obs=x)

    r, _ = line(-1, 1, 20_000)
    prior = 0.5 * (1 - r * r).log()
    matrices = torch.eye(2, **DOUBLE) + r.view(-1, 1, 1) * (1 - torch.eye(2, **DOUBLE))
    joint = prior + dist.MultivariateNormal(x.new_zeros(2), matrices.unsqueeze(1)).log_prob(x).sum(-1)
    return model, drawn(AutoNormal(model), x), (x,), (joint.logsumexp(0) - prior.logsumexp(0)).reshape(1), WHOLE


def transformed_latent():
    """A latent as a TransformedDistribution in both halves."""
    y = torch.tensor([1.0, 3, 0, 7, 2], **DOUBLE)
    net = nn.Linear(1, 2, **DOUBLE)

    def positive(loc, scale):
        return dist.TransformedDistribution(dist.Normal(loc, scale), [dist.transforms.ExpTransform()])

    def model(y):
        with pyro.plate("data", len(y)):
            rate = pyro.sample("rate", positive(y.new_zeros(()), y.new_ones(())))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def guide(y):
        pyro.module("net", net)
        with pyro.plate("data", len(y)):
            out = net(y.log1p().unsqueeze(-1))
            pyro.sample("rate", positive(out[..., 0], 0.3 + out[..., 1].sigmoid()))

    u, step = line(-9, 6, 4000)
    u = u.unsqueeze(-1)
    truth = (dist.Normal(0.0, 1.0).log_prob(u) + dist.Poisson(u.exp()).log_prob(y)).logsumexp(0) + step
    return model, guide, (y,), truth, {}


def single_precision_data():
    """Data in float32, all else in float64, and a Python number for an argument."""
    x = torch.randn(5, generator=torch.manual_seed(0))
    net = nn.Linear(1, 2)

    def model(x, sigma):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **DOUBLE), 1.0))
            pyro.sample("x", dist.Normal(z, sigma), obs=x)

    def guide(x, sigma):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            out = net(x.unsqueeze(-1) / sigma).double()
            pyro.sample("z", dist.Normal(out[..., 0], 0.3 + out[..., 1].sigmoid()))

    return model, guide, (x, 0.5), dist.Normal(torch.zeros((), **DOUBLE), 1.25**0.5).log_prob(x.double()), {}


def nested_groups():
    """Groups within a whole, observations within groups, and recorded values."""
    x = torch.randn(4, 3, generator=torch.manual_seed(0), **DOUBLE)

    def model(x):
        centre = pyro.sample("centre", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("groups", 4, dim=-2):
            level = pyro.sample("level", dist.Normal(centre, 1.0))
            pyro.deterministic("excess", level - centre)
            with pyro.plate("seen", 3, dim=-1):
                pyro.sample("x", dist.Normal(level, 0.5), obs=x)

    blocks = torch.block_diag(*[torch.ones(3, 3, **DOUBLE)] * 4)
    covariance = 4 + blocks + 0.25 * torch.eye(12, **DOUBLE)
    truth = dist.MultivariateNormal(torch.zeros(12, **DOUBLE), covariance).log_prob(x.flatten()).reshape(1)
    return model, drawn(AutoMultivariateNormal(model), x), (x,), truth, WHOLE


CASES = [zero_inflated_counts, changepoint, correlation, transformed_latent, single_precision_data, nested_groups]
QUICK = {transformed_latent, single_precision_data, nested_groups}


def trained(case):
    model, guide, args, truth, options = case()
    data = args if len(args) > 1 else args[0]
    fit(model, guide, data, steps=300, optimizer=lambda p: torch.optim.Adam(p, 0.03), **QUIET, **options)
    return model, guide, args, truth, options


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_weights_and_evidence_agree_with_the_truth(case):
    model, guide, args, truth, options = trained(case)
    value, error = iwae(log_weights(model, guide, *args, num_samples=4000, seed=1, **options))
    assert ((value - truth).abs() < 4 * error + 1e-9).all()
    for method in ("auto", Adaptive(2000, 500, 6)):
        found = evidence(model, *args, guide=guide, method=method, **QUIET, **options)
        assert ((found.value - truth).abs() < 4 * found.standard_error.nan_to_num() + 1e-4).all()
        assert (found.lower <= truth + 4 * found.standard_error.nan_to_num() + 1e-4).all()


def test_simulated_data_have_the_dtype_of_those_observed():
    model, guide, args, _, _ = single_precision_data()
    simulation = simulate(model, guide, *args, num_simulations=100, num_samples=19, **QUIET)
    assert simulation.data.dtype == torch.float32
    assert sbc(simulation, seed=0).ranks.shape == (100, 2)


def simulated(like):
    x = torch.ones(3, 2, **DOUBLE)

    def model(x):
        with pyro.plate("data", len(x)):
            like(pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)), x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    return simulate(model, guide, x, num_simulations=3, num_samples=19, **QUIET)


def test_what_draws_data_of_another_shape_is_named():
    def like(z, x):
        pyro.sample("x", dist.Poisson(z.exp().unsqueeze(-1)).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"shape that it observes, \(3, 2\), got a Independent that draws \(3, 1\)"):
        simulated(like)


def test_a_factor_is_no_data_that_can_be_drawn():
    def like(z, x):
        pyro.factor("score", dist.Normal(z.unsqueeze(-1), 1.0).log_prob(x).sum(-1))

    with pytest.raises(ValueError, match=r"got pyro\.factor at \['score'\]"):
        simulated(like)


def test_directions_have_weights_but_no_coordinates():
    def model(x):
        with pyro.plate("data", len(x)):
            towards = pyro.sample("towards", dist.ProjectedNormal(x.new_tensor([1.0, 0.0])))
            pyro.sample("x", dist.Normal(towards, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("towards", dist.ProjectedNormal(2 * x))

    x = torch.tensor([[0.6, 0.6], [-0.2, 0.9]], **DOUBLE)
    angle, step = line(-math.pi, math.pi, 2000)
    towards = torch.stack([angle.cos(), angle.sin()], -1)
    joint = dist.ProjectedNormal(x.new_tensor([1.0, 0.0])).log_prob(towards).unsqueeze(-1)
    truth = (joint + dist.Normal(towards.unsqueeze(1), 0.5).to_event(1).log_prob(x)).logsumexp(0) + step
    found = evidence(model, x, guide=guide, method=Importance(4000, search=False), **QUIET)
    assert ((found.value - truth).abs() < 4 * found.standard_error).all()
    lower = evidence(model, x, guide=guide, method=Importance(4000), **QUIET)
    assert lower.upper.isinf().all()
    assert (lower.lower < truth).all()
    with pytest.raises(ValueError, match=r"'towards', got ProjectedNormal .*Importance need no coordinates"):
        evidence(model, x, guide=guide, **QUIET)


@pytest.mark.slow
def test_auto_waits_for_no_three_dimensional_grid_of_single_samples():
    def model(x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        assert w.shape == (3,)
        with pyro.plate("points", len(x)):
            pyro.sample("x", dist.Normal(w[0] + w[1] * w[2], 1.0), obs=x)

    x = torch.tensor([0.3, 1.0, -0.2], **DOUBLE)
    guide, method = drawn(AutoMultivariateNormal(model), x), Automatic(Adaptive(300, 100, 2))
    found = evidence(model, x, whole=True, guide=guide, method=method, broadcast=False, **QUIET)
    assert found.method == "adaptive"
