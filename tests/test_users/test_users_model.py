"""A user's own model through every door: a function with two latent sites and counts, whose evidence is in closed form.

.. math:: r \\sim \\text{Gamma}(2, .3), \\quad s \\sim \\text{Beta}(2, 3), \\quad x_1 \\sim \\text{Poisson}(r s),
    \\quad x_2 \\sim \\text{Poisson}(r (1 - s))

Both posteriors are conjugate, so that a guide may be exact, and the gap of one that is not is a sum of divergences.
"""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import kl_divergence

from inference import Adaptive, Annealed, Bridge, compare, coverage, evidence, gap, sbc, simulate
from inference.marginal_likelihood.estimate import METHODS

COUNTS = torch.tensor([[3.0, 5.0], [0.0, 0.0], [0.0, 9.0], [14.0, 6.0]]).double()
SHAPE, RATE, FIRST, SECOND = 2.0, 0.3, 2.0, 3.0
REFUSE = {"exact": "log_evidence", "limit": "decode"}
QUICK = {"annealed": Annealed(20, 400, 2), "adaptive": Adaptive(3000), "bridge": Bridge(3000, 20)}
APPLY = sorted(set(METHODS) - set(REFUSE) - {"laplace"})


def model(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(SHAPE), RATE))
        share = pyro.sample("share", dist.Beta(x.new_tensor(FIRST), SECOND))
        pyro.sample("x", dist.Poisson(torch.stack([rate * share, rate * (1 - share)], -1)).to_event(1), obs=x)


def distributions(x, width):
    """The exact posteriors where the width is one, wider ones below."""
    rate = dist.Gamma(width * (SHAPE + x.sum(-1)), width * (RATE + 1))
    return rate, dist.Beta(width * (FIRST + x[..., 0]), width * (SECOND + x[..., 1]))


def guide(x, width=1.0):
    """Samples the sites in the other order."""
    with pyro.plate("data", len(x)):
        rate, share = distributions(x, width)
        pyro.sample("share", share)
        pyro.sample("rate", rate)


class Amortised(torch.nn.Module):
    """A guide with one width for all data, or one for each."""

    def __init__(self, log_width):
        super().__init__()
        self.log_width = torch.nn.Parameter(log_width)

    def forward(self, x):
        guide(x, self.log_width.exp())

    def local(self, x):
        return Amortised(self.log_width.detach().expand(len(x)).clone())


WIDE = Amortised(torch.tensor(0.5).double().log())


def exact_evidence(x):
    """The total is negative binomial, the first of it beta-binomial."""
    total = x.sum(-1)
    distribution = scipy.stats.nbinom(SHAPE, RATE / (RATE + 1)), scipy.stats.betabinom(total, FIRST, SECOND)
    return distribution[0].logpmf(total) + distribution[1].logpmf(x[:, 0])


def on_a_grid(x):
    """The same by the trapezoidal rule in log rate and the share's logit."""
    log_rate, logit = np.linspace(-25, 6, 500)[:, None], np.linspace(-25, 25, 500)
    rate, share = np.exp(log_rate), scipy.special.expit(logit)
    prior = scipy.stats.gamma.logpdf(rate, SHAPE, scale=1 / RATE) + log_rate
    prior = prior + scipy.stats.beta.logpdf(share, FIRST, SECOND) + np.log(share * scipy.special.expit(-logit))
    cell = math.log(31 / 499 * 50 / 499)
    terms = [
        scipy.stats.poisson.logpmf(a, rate * share) + scipy.stats.poisson.logpmf(b, rate * scipy.special.expit(-logit))
        for a, b in x
    ]
    return np.array([scipy.special.logsumexp(prior + term) for term in terms]) + cell


TRUE = exact_evidence(COUNTS.numpy())


def test_the_closed_form_is_that_of_a_grid():
    np.testing.assert_allclose(on_a_grid(COUNTS.numpy()), TRUE, atol=1e-9)


# --- evidence ----------------------------------------------------------------------------------------


def deviations(got, true):
    """Distance from the truth in units of the error that is stated: its own, or the half-width of an interval."""
    unit = torch.where(got.standard_error > 0, got.standard_error, (got.upper - got.lower) / 2)
    return ((got.value - torch.as_tensor(true)) / unit).abs()


@pytest.mark.parametrize("name", APPLY)
def test_every_method_agrees_with_the_closed_form_within_its_error(name):
    got = evidence(model, COUNTS, method=QUICK.get(name, name), guide=WIDE, seed=1, progress=False)
    assert bool((deviations(got, TRUE) < 4).all())
    assert bool((deviations(got, TRUE + 0.2) > 4).all())  # the criterion would see a wrong evidence
    assert bool((got.upper - got.lower < 0.2).all())


def test_laplace_is_near_and_claims_nothing():
    got = evidence(model, COUNTS, method="laplace", seed=0, progress=False)
    assert np.abs(got.value.numpy() - TRUE).max() < 0.2
    assert bool(got.upper.isinf().all())


@pytest.mark.parametrize("name", REFUSE)
def test_methods_for_other_models_say_so(name):
    with pytest.raises(TypeError, match=REFUSE[name]):
        evidence(model, COUNTS, method=name, progress=False)


# --- gap and comparison ------------------------------------------------------------------------------


def divergence(x, width):
    return sum(kl_divergence(q, p) for q, p in zip(distributions(x, width), distributions(x, 1.0), strict=True))


def missed(num_samples):
    """What the optimum of one parameter on S draws misses: chi-squared over 2 S, at four standard deviations."""
    return 4**2 / (2 * num_samples)


def test_the_gap_is_the_divergence_and_all_of_it_amortisation():
    got = gap(model, WIDE, COUNTS, num_samples=400, restarts=0, progress=False)
    expected = divergence(COUNTS, 0.5)
    assert bool(((got.total - expected).abs() < 4 * got.total_error).all())
    assert bool(((got.amortisation - expected).abs() < 4 * got.amortisation_error + missed(400)).all())
    assert bool((got.approximation.abs() < missed(400)).all())
    assert bool((expected > 4 * missed(400)).all())


def test_a_function_has_a_gap_but_not_its_parts():
    got = gap(model, guide, COUNTS, num_samples=50, progress=False)
    assert float(got.total.abs().max()) < 1e-6
    assert got.approximation is None


def test_compare_measures_guides_of_both_kinds():
    guides = {"exact": guide, "wide": WIDE}
    options = {"method": "quadrature", "split": 2, "simulated": 200, "num_samples": 4000, "progress": False}
    table = compare(model, guides, COUNTS, **options)["train"].to_dataset().isel(seed=0)
    wide, exact = table.sel(guide="wide"), table.sel(guide="exact")
    np.testing.assert_allclose(table["evidence"], np.stack([TRUE, TRUE]), atol=1e-6)
    np.testing.assert_allclose(exact["gap"], 0, atol=1e-6)
    expected = divergence(COUNTS, 0.5).numpy()
    assert (np.abs(wide["gap"].values - expected) < 4 * wide["elbo_se"].values).all()
    np.testing.assert_allclose(wide["amortisation"][:2], expected[:2], atol=missed(128))
    np.testing.assert_allclose(wide["approximation"][:2], 0, atol=missed(128))
    assert np.isnan(wide["amortisation"][2:]).all()
    assert np.isnan(exact["amortisation"]).all()
    # Of 2 sites times 200 simulations, at the nominal 90 %; the wide guide's intervals hold more.
    error = math.sqrt(0.9 * 0.1 / 400)
    assert abs(float(exact["coverage"]) - 0.9) < 4 * error
    assert float(wide["coverage"]) > 0.9 + 2 * error


# --- calibration -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "calibrated"), [(1.0, True), (0.5, False)])
def test_calibration_by_simulation_separates_exact_from_wide(width, calibrated):
    tested = functools.partial(guide, width=width)
    rows = COUNTS.new_zeros(500, 2)
    result = sbc(simulate(model, tested, rows, num_simulations=2000, num_samples=99, seed=0, progress=False))
    assert result.names == ("share", "rate", "log_likelihood")
    assert (result.p_value > 1e-3) == calibrated
    assert bool(coverage(result, (0.5,)).consistent[0, :2].all()) == calibrated


# --- a global latent ---------------------------------------------------------------------------------


def global_model(x):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Poisson((slope * z).exp().unsqueeze(-1).expand(-1, 2)).to_event(1), obs=x)


def global_guide(x):
    pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros_like(x[:, 0]), 1.0))


DOORS = {
    **{
        name: functools.partial(evidence, global_model, COUNTS, method=name, guide=global_guide, progress=False)
        for name in sorted(set(METHODS) - set(REFUSE))
    },
    "gap": functools.partial(gap, global_model, global_guide, COUNTS, method="quadrature", progress=False),
    "compare": functools.partial(compare, global_model, {"mine": global_guide}, COUNTS, progress=False),
    "compare by quadrature": functools.partial(
        compare, global_model, {"mine": global_guide}, COUNTS, method="quadrature", simulated=100, progress=False
    ),
    "simulate": functools.partial(simulate, global_model, global_guide, COUNTS, progress=False),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_global_latent_is_refused_by_name_at_every_door(door):
    with pytest.raises(ValueError, match=r"inside one vectorised plate 'data' .* got model site 'slope'"):
        DOORS[door]()
