"""What objects show of themselves: a line each, a small table in a notebook, a data frame."""

import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from registry import GUIDES, MODELS, OBJECTIVES, PAIRS, build_pair

import guides
import inference
import zoo
from guides import Exact, Linear, MeanField
from inference import (
    IWELBO,
    BetaELBO,
    Estimate,
    LinearAnnealing,
    compare,
    elbo,
    evidence,
    fit,
    frame,
    gap,
    log_weights,
    table,
)
from zoo import PPCA, LinearVAE, linear_gaussian

X = linear_gaussian(30, 5, 2).train
LONGEST = 400


@pytest.fixture(scope="module")
def history():
    pair = LinearVAE(5, 2).double(), Linear(5, 2).double()
    return fit(*pair, X, steps=200, validation=X, evaluate_every=50, seed=0, progress=False)


@pytest.fixture(scope="module")
def results(history):
    model = LinearVAE(5, 2).double()
    guide = MeanField(5, 2, hidden=(8,)).double()
    weights = log_weights(model, guide, X, num_samples=20)
    split = gap(model, guide, X[:3], restarts=0, max_steps=2, num_samples=8, progress=False)
    return {"history": history, "evidence": evidence(model, X), "gap": split, "estimate": elbo(weights)}


@pytest.mark.parametrize("name", ["history", "evidence", "gap", "estimate"])
def test_a_result_is_a_line_and_a_short_table(results, name):
    result = results[name]
    assert "tensor" not in repr(result)
    assert len(repr(result)) < LONGEST
    html = result._repr_html_()
    assert html.count("<tr") < 25
    assert "<table" in html


def test_a_history_tells_losses_and_the_best_step(history):
    text = repr(history)
    best = min(history.validation, key=lambda pair: pair[1])
    assert f"loss {history.loss[0]:.4f} -> {history.loss[-1]:.4f}" in text
    assert f"{best[1]:.4f} at step {best[0]}" in text
    assert repr(inference.History()) == "<History of 0 steps in 0.0 s>"


def test_a_history_draws_its_losses(history):
    ax = history.plot()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), history.loss)
    np.testing.assert_allclose(ax.lines[1].get_xydata(), history.validation)
    assert ax.lines[2].get_xdata()[0] == history.best_step
    assert "nats" in ax.get_ylabel()
    given = Figure().subplots()
    assert history.plot(given) is given


def test_an_estimate_tells_its_mean_and_error():
    estimate = Estimate(torch.tensor([1.0, 3.0]), torch.tensor([0.3, 0.4]))
    assert repr(estimate) == "<Estimate of 2 numbers: mean 2.0000 ±0.2500>"


@pytest.mark.parametrize("make", [*MODELS.values()], ids=[*MODELS])
def test_models_show_their_dimensions(make):
    model = make()
    text = f"data_dim={model.data_dim}, latent_dim={model.latent_dim}"
    assert text in repr(model).splitlines()[1]
    assert all(f"<td>{size}</td>" in model._repr_html_() for size in (model.data_dim, model.latent_dim))


@pytest.mark.parametrize("name", GUIDES)
def test_guides_show_their_dimensions_or_their_model(name):
    model, guide = build_pair(*next(pair for pair in PAIRS if pair[1] == name))
    settings = repr(guide).splitlines()[min(1, len(repr(guide).splitlines()) - 1)]
    assert f"latent_dim={model.latent_dim}" in settings or f"model={type(model).__name__!r}" in settings
    assert "<table" in guide._repr_html_()


def test_settings_of_a_module_are_shown():
    assert "hidden=[7]" in repr(MeanField(5, 2, hidden=(7,)))
    assert "sigma=0.25" in repr(LinearVAE(5, 2, sigma=0.25))
    assert repr(Exact(PPCA(5, 2))) == "Exact(model='PPCA')"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_show_how_they_were_made(name):
    objective = OBJECTIVES[name].make()
    if isinstance(objective, inference.objectives.base.Objective):
        assert re.fullmatch(rf"{type(objective).__name__}\(.*\)", repr(objective))
        assert "<table" in objective._repr_html_() or not objective._settings()


def test_settings_of_an_objective_are_shown():
    assert repr(IWELBO(5)) == "IWELBO(num_particles=5)"
    assert repr(BetaELBO(0.5)) == "BetaELBO(beta=0.5, num_particles=1)"
    assert "beta=LinearAnnealing(" in repr(BetaELBO(LinearAnnealing(10)))


def test_a_frame_of_a_comparison_holds_what_the_table_prints():
    model = PPCA.from_data(X, 2)
    pair = {"exact": Exact(model), "own": Linear(5, 2).double()}
    tree = compare(model, pair, X, held_out=X + 1, num_samples=50, split=4, progress=False)
    whole = frame(tree)
    assert list(whole.index) == [(s, g) for s in ("train", "held_out") for g in ("exact", "own")]
    for (split, name), row in whole.iterrows():
        one = tree[split].to_dataset().sel(guide=name).isel(seed=0)
        np.testing.assert_allclose(row["elbo"], one["elbo"].mean(), rtol=1e-12)
        np.testing.assert_allclose(row["gap"], one["gap"].mean(), atol=1e-9)
        np.testing.assert_allclose(row["amortisation"], one["amortisation"][:4].mean(), rtol=1e-12)
        assert row["gap_lower"] - 1e-9 <= row["gap"] <= row["gap_upper"] + 1e-9
        assert f"{row['elbo']:.4f}" in table(tree)


def test_a_frame_says_where_nothing_bounds_the_gap():
    model = PPCA.from_data(X, 2)
    guide = MeanField(5, 2).double()
    row = frame(compare(lambda x: model(x), {"a": guide}, X[:6], num_samples=20, progress=False)).loc[("train", "a")]
    assert row["gap_upper"] == row["log_p_upper"] == np.inf
    assert row["gap_lower"] < np.inf


def test_a_frame_of_a_result_has_a_row_for_each_data_point(results):
    assert len(frame(results["evidence"])) == 30
    assert list(frame(results["evidence"])["guarantee"]) == ["exact"] * 30
    assert frame(results["history"])["loss"].tolist() == results["history"].loss
    split = frame(results["gap"])
    np.testing.assert_allclose(split["total"], split["approximation"] + split["amortisation"])
    np.testing.assert_allclose(split["evidence_value"] - split["elbo"], split["total"])
    assert frame(torch.zeros(4, 3)).shape == (4, 3)


def test_a_frame_of_nothing_per_data_point_is_refused():
    with pytest.raises(TypeError, match="expected a result with numbers per data point, got int"):
        frame(3)


def test_the_three_packages_have_one_version():
    assert inference.__version__ == guides.__version__ == zoo.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", inference.__version__)
