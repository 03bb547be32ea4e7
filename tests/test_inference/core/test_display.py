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
    ELBO,
    IWELBO,
    Annealed,
    BetaELBO,
    Estimate,
    LinearAnnealing,
    Snapshots,
    bdmc,
    c2st,
    check_pair,
    compare,
    converged_bracket,
    coverage,
    elbo,
    elbo_entropies,
    evidence,
    fit,
    fit_best,
    frame,
    gap,
    gradient_noise,
    iter_log_weights,
    log_weights,
    mcc,
    mutual_information,
    posterior_draws,
    posterior_error,
    rate_distortion,
    rate_distortion_curve,
    refit,
    sbc,
    self_consistency,
    simulate,
    summarise,
    table,
    tarp,
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


@pytest.fixture(scope="module")
def measured():
    model, guide = LinearVAE(5, 2).double(), Linear(5, 2).double()
    simulation = simulate(model, guide, X[:6], num_simulations=100, num_samples=9, seed=0, progress=False)
    ranks = sbc(simulation, num_bins=5, seed=0)
    chains = {"guide": guide, "method": Annealed(5, num_chains=2), "seed": 0, "progress": False}
    trained = fit_best(lambda: (LinearVAE(5, 2), Linear(5, 2)), X.float(), seeds=(0, 1), steps=2, progress=False)
    found = {
        "weights": summarise(iter_log_weights(model, guide, X, num_samples=9, progress=False), 9),
        "refit": refit(model, guide, X[:3], restarts=0, max_steps=2, num_samples=8, progress=False),
        "restarts": trained,
        "bracket": bdmc(model, posterior_draws(model, X[:4], num_samples=2, seed=0), **chains),
        "converged bracket": converged_bracket(model, X[:4], num_steps=4, **chains),
        "draws": posterior_draws(model, X[:4], num_samples=2, seed=0),
        "simulation": simulation,
        "sbc": ranks,
        "coverage": coverage(ranks),
        "tarp": tarp(simulation, seed=0),
        "c2st": c2st(X[:15], X[15:], seed=0),
        "curve": rate_distortion_curve(lambda _, seed: (model, guide), [1.0], X[:5], progress=False)[0],  # noqa: ARG005
        "rates": rate_distortion(model, guide, X[:5], progress=False),
        "rate": rate_distortion(model, guide, X[:5], progress=False).rate,
        "entropies": elbo_entropies(model, guide, X[:5]),
        "noise": gradient_noise(ELBO(), model, guide, X[:5], num_repeats=3, progress=False)["encoder"],
        "mcc": mcc(X[:, :2], X[:, 2:4]),
        "information": mutual_information(model, guide, X[:6], seed=0, progress=False),
        "posterior error": posterior_error(model, guide, X[:5], num_samples=20, seed=0),
        "consistency": self_consistency(model, guide, X[:5], seed=0, progress=False),
        "check": check_pair(model, guide, X[:5]),
    }
    return found


# Rows of the frame: the data points, one, a threshold, a parameter, a latent, a door.
ROWS = {"weights": 30, "refit": 3, "restarts": 2, "simulation": 100, "sbc": 100, "tarp": 100, "c2st": 1, "curve": 1}
ROWS |= {"bracket": 4, "converged bracket": 4, "draws": 4, "rates": 5, "rate": 1, "entropies": 5, "mcc": 2}
ROWS |= {"information": 6, "posterior error": 5, "consistency": 5}


def test_every_result_is_short_and_has_a_frame(measured):
    for name, result in measured.items():
        text = repr(result)
        assert "tensor(" not in text or name == "c2st"
        assert len(text) < 2 * LONGEST, name
        assert len(frame(result)) == ROWS.get(name, len(frame(result))) > 0, name
        assert not hasattr(result, "_repr_html_") or result._repr_html_().count("<tr") < 25


def test_a_frame_of_single_numbers_is_one_row_with_ends(measured):
    rate = measured["rate"]
    assert frame(rate).to_dict("records") == [rate._asdict()]
    curve = [measured["curve"], measured["curve"]]
    assert list(frame(curve)["rate_lower"]) == [curve[0].rate.lower] * 2
    assert dict(frame(measured["restarts"])["elbo"]) == measured["restarts"].elbo
    assert list(frame(measured["check"])["name"]) == [door.name for door in measured["check"].doors]


def test_a_line_holds_the_numbers_of_a_result(measured):
    value = measured["mcc"].value
    assert repr(measured["mcc"]).startswith(f"<MCC: value {value:.4g}, matching (2,) of mean 0.5, correlations (2, 2)")
    assert repr(measured["entropies"]).count(" of mean ") == 1
    assert repr(Snapshots(3)) == "Snapshots(every=3)"


def test_a_frame_of_nothing_per_data_point_is_refused():
    with pytest.raises(TypeError, match="expected a result with numbers, got int"):
        frame(3)


def test_the_three_packages_have_one_version():
    assert inference.__version__ == guides.__version__ == zoo.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", inference.__version__)
