"""The evidence that compare() estimates where there is no closed form: the balance heuristic of all guides."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from compared_guides import (
    assert_close,
    assert_printed,
    measure,
    nonlinear_guide,
    nonlinear_model,
    normal_model,
    parse,
    quadrature,
)
from scipy.special import logsumexp

from inference.comparison.pooled_weights import pooled_weights
from inference.comparison.tables import table
from inference.pair.call import Call

# --- a model without closed form -------------------------------------------------------------------------


SCALES = (1.0, 0.5)


def draws_again(guide, x, num):
    with pyro.poutine.trace() as traced, pyro.plate("samples", num, dim=-2):
        guide(x)
    return traced.trace.nodes["z"]["value"].numpy()


def test_evidence_without_closed_form_is_by_the_balance_heuristic(pooled):
    guides, x, tree = pooled
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        draws = [draws_again(guide, x, 4000) for guide in guides.values()]
    normal = scipy.stats.norm.logpdf
    first, second = x.numpy().T
    forms = ((0.5, 1.0), (0.0, 1.5))
    weights, total = [], []
    for (slope, sigma), z in zip(forms, draws, strict=True):
        joint = normal(z) + normal(first, np.tanh(2 * z), 0.5) + normal(second, z**2, 0.5)
        weights.append(joint - normal(z, slope * first, sigma))
        mixture = logsumexp([normal(z, a * first, s) for a, s in forms], axis=0) - math.log(2)
        total.append(joint - mixture)
    expected = logsumexp(np.concatenate(total), axis=0) - math.log(8000)
    variance = sum(np.exp(part - expected).var(0, ddof=1) for part in total) / 2  # within each guide's draws
    error = np.sqrt(variance / 8000)
    dataset = tree["train"].to_dataset().isel(seed=0)
    for i, w in enumerate(weights):
        one = dataset.isel(guide=i)
        assert_close(one["evidence"], expected, 1e-10)
        assert_close(one["iwae"], logsumexp(w, axis=0) - math.log(4000), 1e-10)
        assert_close(one["gap"], expected - w.mean(0), 1e-10)
        assert_close(one["evidence_se"], error, 1e-8)
        assert str(one["method"].values) == "balance heuristic"


def calls_of(guides, x):
    return {name: Call(nonlinear_model, guide, (x,)) for name, guide in guides.items()}


def test_the_mixtures_weights_are_of_all_guides_in_any_order():
    x = torch.randn(3, 2).double()
    calls = calls_of({"wide": nonlinear_guide(0.5, 1.0), "wider": nonlinear_guide(0.0, 1.5)}, x)
    found = pooled_weights(calls, 200, None)
    turned = found._replace(balanced=dict(reversed(found.balanced.items())))
    one, other = found.evidence(0.95), turned.evidence(0.95)
    for name in ("value", "raw_lower", "effective_sample_size"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_one_guide_leaves_out_none():
    x = torch.randn(3, 2).double()
    found = pooled_weights(calls_of({"wide": nonlinear_guide(0.5, 1.0)}, x), 20, None)
    assert found.left_out == ()
    assert found.evidence(0.95).method == "importance"


def test_a_guide_that_observes_is_part_of_the_mixture():
    """What it observes is no part of its density."""
    wide = nonlinear_guide(0.5, 1.0)

    def observing(x):
        wide(x)
        with pyro.plate("data", len(x)):
            pyro.sample("aim", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 0])

    x = torch.randn(3, 2).double()
    found = pooled_weights(calls_of({"observing": observing, "other": nonlinear_guide(0.0, 1.5)}, x), 20, None)
    assert found.left_out == ()


def normal_guide(shift, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 1.01 + shift, x.new_tensor(scale / 101**0.5)))

    return guide


@pytest.mark.parametrize(("shift", "scale"), [(2.0, 1.0), (0.5, 1.0), (0.0, 0.25), (0.0, 1.0)])
def test_a_bad_guide_beside_the_posterior_moves_no_evidence(shift, scale):
    x = 1.01**0.5 * torch.randn(20, 1, generator=torch.Generator().manual_seed(0)).double()
    truth = scipy.stats.norm.logpdf(x[:, 0].numpy(), 0.0, 1.01**0.5)
    guides = {"posterior": normal_guide(0.0, 1.0), "bad": normal_guide(shift, scale)}
    one = measure(normal_model, guides, x, num_samples=1000, seed=0)["train"].to_dataset().isel(seed=0, guide=0)
    assert (np.abs(one["evidence"] - truth) < 4 * one["evidence_se"] + 1e-9).all()
    assert float(one["mean_evidence_lower"]) - 1e-9 <= truth.mean() <= float(one["mean_evidence_upper"]) + 1e-9
    assert float(one["mean_evidence_upper"]) > float(one["elbo"].mean())


def half_line_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def half_line_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Exponential(x.new_ones(())))


def whole_line_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.6))


def test_a_guide_has_no_density_outside_its_support():
    x = torch.tensor([-0.5, 0.1, 0.7], dtype=torch.float64)
    truth = scipy.stats.norm.logpdf(x.numpy(), 0.0, 1.25**0.5)
    guides = {"half": half_line_guide, "whole": whole_line_guide}
    one = measure(half_line_model, guides, x, num_samples=4000, seed=0)["train"].to_dataset().isel(seed=0, guide=0)
    assert (np.abs(one["evidence"] - truth) < 4 * one["evidence_se"]).all()


def random_guide(x):
    """Random beyond its sites: its density is known at its own draws alone."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0] + 0.05 * torch.randn(()), x.new_tensor(0.1)))


def test_a_guide_without_a_density_elsewhere_is_left_out_by_name():
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).unsqueeze(-1)
    truth = scipy.stats.norm.logpdf(x[:, 0].numpy(), 0.0, 1.01**0.5)
    guides = {"posterior": normal_guide(0.0, 1.0), "wide": normal_guide(0.0, 3.0), "random": random_guide}
    one = measure(normal_model, guides, x, seed=0)["train"].to_dataset().isel(seed=0)
    assert set(one["method"].values) == {"balance heuristic without 'random'"}
    assert (np.abs(one["evidence"].isel(guide=0) - truth) < 4 * one["evidence_se"].isel(guide=0)).all()
    del guides["wide"]
    one = measure(normal_model, guides, x, seed=0)["train"].to_dataset().isel(seed=0)
    assert set(one["method"].values) == {"importance from 'posterior'"}
    assert_close(one["evidence"].isel(guide=1), truth, 1e-9)


def test_pooled_evidence_is_that_of_quadrature(pooled):
    _, x, tree = pooled
    one = tree["train"].to_dataset().isel(seed=0, guide=0)
    truth = np.array([quadrature(datum) for datum in x.numpy()])
    assert (np.abs(one["evidence"] - truth) < 4 * one["evidence_se"]).all()
    assert float(one["mean_evidence_lower"]) <= truth.mean() <= float(one["mean_evidence_upper"])
    # The twin: forgetting that there are two guides adds log 2.
    assert (np.abs(one["evidence"] + math.log(2) - truth) > 5 * one["evidence_se"]).all()


def test_the_table_prints_the_interval_of_an_estimated_evidence(pooled):
    _, _, tree = pooled
    one = tree["train"].to_dataset().isel(seed=0, guide=0)
    keys = ["mean_evidence", "mean_evidence_lower", "mean_evidence_upper"]
    assert_printed(parse(table(tree))["wide"]["log p"][0], [float(one[key]) for key in keys])
    assert "log p: balance heuristic" in table(tree)


def test_an_interval_without_upper_end_is_printed_as_infinite(pooled):
    _, x, _ = pooled
    tree = measure(nonlinear_model, {"narrow": nonlinear_guide(0.5, 0.05)}, x, num_samples=100)
    assert re.search(r"\[-\d+\.\d{4}, inf\]", table(tree))


def test_pooling_respects_whose_model_it_is(pooled):
    guides, x, _ = pooled

    def other_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Normal(z[..., None], x.new_tensor(2.0)).to_event(1), obs=x)

    pairs = {"a": (nonlinear_model, guides["wide"]), "b": (other_model, guides["wide"])}
    dataset = measure(None, pairs, x)["train"].to_dataset().isel(seed=0)
    assert_close(dataset["evidence"], dataset["iwae"], 1e-12)
