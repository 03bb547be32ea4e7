"""The card of a trained pair."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

import zoo
from guides import Exact, MeanField
from inference import ELBO, log_weights
from inference.core.estimates import Interval
from zoo import PPCA, Card, LinearVAE, card

FAST = {"rows": 6, "split": 2, "num_samples": 50, "simulated": 0, "progress": False}


@pytest.fixture(scope="module")
def exact():
    data = zoo.named_dataset("synthetic")
    model = PPCA.from_data(data.train, 3)
    return card(model, Exact(model), data, name="ppca/synthetic", dataset="synthetic", **FAST), model, data


def test_a_card_of_an_exact_pair_has_no_gap_and_the_closed_form(exact):
    found, model, data = exact
    expected = model.log_evidence(data.test[:6]).mean().item()
    assert found.evidence.value == pytest.approx(expected, rel=1e-12)
    assert found.evidence == Interval(*[found.evidence.value] * 3, 0.0)
    assert found.elbo.value == pytest.approx(expected, rel=1e-9)
    assert found.guarantee == {"exact": 6}
    assert (found.num_data, found.num_split, found.dataset) == (6, 2, "synthetic")


def test_the_check_is_by_another_method_and_meets_the_evidence(exact):
    found, *_ = exact
    assert found.check_method == "adaptive" != found.method
    assert found.agrees
    away = found.check._replace(lower=found.evidence.upper + 1, upper=found.evidence.upper + 2)
    assert not replace(found, check=away).agrees
    assert "DISAGREES" in str(replace(found, check=away))


def test_a_card_survives_json(exact):
    found, *_ = exact
    open_end = replace(found, gap=Interval(1.0, 0.5, math.inf, 0.1), pareto_k=0.3, approximation=None)
    text = open_end.to_json()
    assert json.loads(text)["gap"]["upper"] is None  # JSON has no infinity
    assert Card.from_json(text) == open_end


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": 1}'])
def test_what_is_no_card_is_refused(text):
    with pytest.raises(ValueError, match="expected a card"):
        Card.from_json(text)


def test_every_entry_is_printed(exact):
    found, *_ = exact
    assert {field.name for field in fields(Card)} - set(vars(found)) == set()
    for text in (str(found), found._repr_html_()):
        for words in ("ppca/synthetic", "PPCA(data_dim=20", "by adaptive", "Pareto", "least coverage", "torch"):
            assert words in text


def test_elbo_and_iwae_are_those_of_the_weights():
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model, guide = LinearVAE(4, 2), MeanField(4, 2, hidden=(8,))
    found = card(model, guide, x, check=None, **FAST)
    weights = log_weights(model, guide, x, num_samples=50, seed=0).double()
    assert found.elbo.value == pytest.approx(float(weights.mean()), rel=1e-9)
    assert found.iwae.value == pytest.approx(float((weights.logsumexp(0) - math.log(50)).mean()), rel=1e-9)
    assert found.elbo.lower < ELBO(num_particles=4000).per_datum(model, guide, x).mean().item() < found.elbo.upper
    assert (found.check, found.check_method, found.data, found.latent_dim) == (None, "", "a tensor", 2)


def test_coverage_of_an_exact_guide_is_nominal():
    data = zoo.named_dataset("synthetic")
    model = PPCA.from_data(data.train, 2)
    found = card(model, Exact(model), data, check=None, **(FAST | {"simulated": 400}))
    assert found.coverage.lower <= 0.9 <= found.coverage.upper


@pytest.mark.parametrize("setting", ["rows", "split", "num_samples"])
def test_settings_are_checked_before_anything_runs(setting):
    with pytest.raises(ValueError, match=setting):
        card(LinearVAE(4, 2), MeanField(4, 2), torch.zeros(3, 4), **(FAST | {setting: 0}))


def test_a_pair_of_shared_latents_is_one_data_point_with_a_reference():
    model, guide, stored = zoo.load("linear_regression/multivariate_normal")
    reference = ("the closed form", stored.check.value)
    found = card(model, guide, model.data, check=reference, whole=True, **(FAST | {"simulated": 100}))
    assert (found.num_data, found.num_split, found.coverage, found.collapsed) == (1, 1, None, None)
    assert (found.check, found.check_method) == (stored.check, "the closed form")
    assert found.agrees
    assert found.gap.lower <= stored.check.value - found.elbo.value + 4 * found.elbo.standard_error
    assert found.data == "tensors of shape (20, 3) and (20,)"
    assert found.model == "ClassicModel(name=linear regression, shapes=[[20, 3], [20]])"
