"""Diagnostics of the latent: collapse against the linear VAE's closed forms, information against Gaussian ones."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gaussian_pairs import DIGITS, eye, function_pair, optimum
from registry import data_for
from torch import nn

from guides import Linear, MeanField, TiedMeanField
from inference.diagnostics.collapse import (
    active_units,
    collapse_curve,
    collapsed,
    latent_kl,
    posterior_means,
    predicted_alive,
    predicted_kl,
)
from inference.information.encoder_information import mutual_information
from inference.plots import save_figure
from inference.plots.collapse import (
    alive_figure,
    collapse_curve_figure,
    landscape_figure,
    latent_kl_figure,
    threshold_figure,
)
from zoo import LinearVAE
from zoo.linear.estimation import spectrum

# --- what every door refuses -----------------------------------------------------------------------------


DISTRIBUTIONS = [
    (lambda x: dist.Laplace(x, 1.0).to_event(1), None, "Gaussian guide at site 'code', got Independent of Laplace"),
    (lambda x: dist.LogNormal(x, 1.0).to_event(1), None, "got Independent of LogNormal"),
    (
        lambda x: dist.Normal(x, 1.0).to_event(1),
        lambda x: dist.MultivariateNormal(0 * x, eye(2)),
        "independent Gaussian coordinates at site 'code', got MultivariateNormal",
    ),
    (
        lambda x: dist.Normal(x, 1.0).to_event(1),
        lambda x: dist.Cauchy(0 * x, 1.0).to_event(1),
        "independent Gaussian coordinates at site 'code', got Independent of Cauchy",
    ),
]
DOORS = [latent_kl, posterior_means, functools.partial(mutual_information, seed=0)]


@pytest.mark.parametrize("door", DOORS[1:])
@pytest.mark.parametrize(("posterior", "prior", "message"), DISTRIBUTIONS)
def test_other_distributions_are_refused_by_name(door, posterior, prior, message):
    with pytest.raises(TypeError, match=message):
        door(*function_pair(posterior, prior), torch.zeros(4, 2).double())


@pytest.mark.parametrize(("posterior", "prior"), [distribution[:2] for distribution in DISTRIBUTIONS[:3]])
def test_latent_kl_is_refused_where_coordinates_are_not_marginals(posterior, prior):
    with pytest.raises(
        TypeError, match=r"Gaussian against a distribution with independent coordinates, got (Indep|Multiv)"
    ):
        latent_kl(*function_pair(posterior, prior), torch.zeros(4, 2).double())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (function_pair(lambda x: dist.Normal(x, 1.0).to_event(1).mask(False)), "mask|Gaussian"),
        (
            function_pair(
                lambda x: dist.Normal(x[:2], 1.0).to_event(1),
                lambda x: dist.Normal(0 * x[:2], 1.0).to_event(1),
                subsample_size=2,
            ),
            "scale or subsampling",
        ),
        (
            function_pair(lambda x: dist.Normal(x[:, 0], 1.0), lambda x: dist.Normal(0 * x[:, 0], 1.0)),
            r"event \(K,\), got \(4,\) and \(\): is .to_event",
        ),
    ],
    ids=["mask", "subsampling", "scalar"],
)
def test_masked_scaled_and_scalar_sites_are_refused(door, pair, message):
    with pytest.raises((ValueError, TypeError), match=message):
        door(*pair, torch.zeros(4, 2).double())


@pytest.mark.parametrize("door", DOORS)
def test_pairs_of_several_latents_are_refused(door):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            return sum(pyro.sample(name, dist.Normal(0 * x, 1.0).to_event(1)) for name in ("a", "b"))

    def model(x):
        mean = guide(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"one latent site, got \['a', 'b'\]"):
        door(model, guide, torch.zeros(4, 2))


@pytest.mark.parametrize("door", DOORS)
def test_batch_normalisation_in_train_mode_is_refused(door):
    guide = MeanField(3, 2, encoder=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="batch normalisation"):
        door(LinearVAE(3, 2), guide, torch.randn(4, 3))
    guide.eval()
    door(LinearVAE(3, 2), guide, torch.randn(4, 3))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([[0.0]], {}, TypeError, "expected x to be a torch.Tensor of shape .N, D., got list"),
        (torch.zeros(4, 3).double(), {}, TypeError, "expected x of dtype torch.float32"),
        (torch.zeros(4, 3).long(), {}, TypeError, "floating"),
        (torch.zeros(4, 2), {}, ValueError, r"expected x of shape \(N, 3\), got \(4, 2\)"),
        (torch.zeros(0, 3), {}, ValueError, "at least one data point"),
        (torch.full((4, 3), math.nan), {}, ValueError, "to be finite"),
        (torch.zeros(4, 3), {"block": 0}, ValueError, "block to be at least 1, got 0"),
        (torch.zeros(4, 3), {"block": 2.0}, TypeError, "block to be an integer"),
    ],
)
def test_unfit_data_are_refused(door, x, options, error, message):
    with pytest.raises(error, match=message):
        door(LinearVAE(3, 2), Linear(3, 2), x, **options)


def test_unfit_arguments_of_the_information_are_refused():
    pair, x = (LinearVAE(3, 2), Linear(3, 2)), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="num_samples to be at least 2, got 1"):
        mutual_information(*pair, x, num_samples=1)
    with pytest.raises(ValueError, match=r"level between 0 and 1, got 1\.0"):
        mutual_information(*pair, x, level=1.0)
    floating = function_pair(lambda x: dist.Normal(x, 1.0).to_event(1), lambda x: dist.Normal(x, 1.0).to_event(1))
    with pytest.raises(ValueError, match="one prior for all data"):
        mutual_information(*floating, torch.randn(4, 2))
    assert latent_kl(*floating, torch.randn(4, 2)).abs().max() == 0.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: collapsed([[0.0]]), TypeError, "expected kl to be a floating tensor of shape .N, K., got list"),
        (lambda: collapsed(torch.zeros(2, 2).long()), TypeError, "got torch.int64"),
        (lambda: collapsed(torch.zeros(2)), ValueError, r"expected kl of shape \(N, K\), got \(2,\)"),
        (lambda: collapsed(torch.zeros(0, 2)), ValueError, r"got \(0, 2\)"),
        (lambda: collapsed(torch.full((2, 2), math.inf)), ValueError, "expected kl to be finite"),
        (lambda: collapsed(torch.zeros(2, 2), epsilon=-1.0), ValueError, "epsilon of at least 0, got -1.0"),
        (lambda: collapsed(torch.zeros(2, 2), epsilon=math.nan), ValueError, "epsilons to be finite"),
        (lambda: collapsed(torch.zeros(2, 2), delta=1.5), ValueError, "delta between 0 and 1, got 1.5"),
        (lambda: collapse_curve(torch.zeros(2, 2), 0.1), TypeError, "expected epsilons to be a floating tensor"),
        (lambda: collapse_curve(torch.zeros(2, 2), torch.zeros(1, 1)), ValueError, r"shape \(E,\), got \(1, 1\)"),
        (lambda: active_units(torch.zeros(2)), ValueError, r"expected means of shape \(N, K\), got \(2,\)"),
        (lambda: active_units(torch.zeros(2, 2), -0.1), ValueError, "threshold of at least 0, got -0.1"),
        (lambda: predicted_kl(torch.zeros(2, 2), 1.0, 2), ValueError, r"expected eigenvalues of shape \(D,\)"),
        (lambda: predicted_kl(torch.ones(2), 0.0, 2), ValueError, "positive finite sigma2, got 0.0"),
        (lambda: predicted_alive(torch.ones(2), 1.0, 0), ValueError, "latent_dim to be at least 1, got 0"),
        (lambda: collapse_curve_figure({}), ValueError, "at least one run, got none"),
        (lambda: latent_kl_figure({}), ValueError, "at least one run, got none"),
        (lambda: alive_figure({}), ValueError, "at least one run, got none"),
        (lambda: alive_figure({"deep": torch.ones(3)}), ValueError, r"shape \(M, 2\) for 'deep', got \(3,\)"),
        (lambda: threshold_figure({}), ValueError, "at least one run, got none"),
        (lambda: landscape_figure(torch.ones(3), {}, plane_labels=("a", "b")), ValueError, "at least one run"),
    ],
)
def test_unfit_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- figures ---------------------------------------------------------------------------------------------


def test_figures_show_the_numbers(tmp_path):
    x = DIGITS()
    runs, values = {}, spectrum(x).eigenvalues
    for sigma2 in (1.0, 0.5, 0.1):
        model, guide, _ = optimum(x, 20, sigma2)
        runs[f"sigma^2 = {sigma2:g}"] = latent_kl(model, guide, x)
    curve, bars = collapse_curve_figure(runs), latent_kl_figure(runs, prediction=predicted_kl(values, 0.1, 20))
    for (name, kl), line in zip(runs.items(), curve.axes[0].lines):
        assert line.get_label() == name
        assert (
            line.get_ydata().tolist()
            == (100 * collapse_curve(kl, torch.tensor(line.get_xdata(), dtype=torch.float64))).tolist()
        )
    heights = [patch.get_height() for patch in bars.axes[0].patches]
    assert heights == predicted_kl(values, 0.1, 20).tolist()
    lines = {line.get_label(): line.get_ydata() for line in bars.axes[0].lines}
    assert np.allclose(lines["sigma^2 = 0.1"], heights, atol=1e-9)
    for figure in (curve, bars):
        save_figure(figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_figure_of_live_latents_counts_the_runs_at_each_place():
    deep, linear = torch.tensor([[2, 0], [6, 2], [2, 0]]), torch.tensor([[2, 2], [6, 6], [6, 6]])
    ax = alive_figure({"deep": deep, "linear": linear}).axes[0]
    shown = [c for c in ax.collections if len(c.get_offsets())]
    assert [c.get_offsets().tolist() for c in shown] == [[[2, 0], [6, 2]], [[2, 2], [6, 6]]]
    assert [(c.get_sizes() / min(c.get_sizes())).tolist() for c in shown] == [[2, 1], [1, 2]]
    assert np.array_equal(ax.lines[0].get_xdata(), ax.lines[0].get_ydata())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["as predicted", "deep", "linear"]


def test_landscape_figures_show_lines_and_their_sign_changes():
    grid = torch.linspace(-1, 1, 5)
    lines = {"leading": {"evidence": grid, "ELBO": -grid}, "trailing": {"evidence": 2 * grid, "ELBO": grid**2}}
    figure = landscape_figure(grid, {"low": (lines, torch.outer(grid, grid))}, plane_labels=("one", "two"))
    shown = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert shown == {
        f"{objective}, {direction}": value.tolist()
        for direction, values in lines.items()
        for objective, value in values.items()
    }
    assert (figure.axes[1].get_xlabel(), figure.axes[1].get_ylabel()) == ("step to one", "step to two")
    ax = threshold_figure({"all": (grid, grid**3, 0.5, 0.25)}).axes[0]
    zero, curve, eigenvalue, found = (line.get_xydata().tolist() for line in ax.lines)
    assert [y for _, y in zero] == [0, 0]
    assert curve == [list(pair) for pair in zip(grid.tolist(), (grid**3).tolist())]
    assert [x for x, _ in eigenvalue] == [0.5, 0.5]
    assert found == [[0.25, 0.0]]


def test_a_tied_guide_of_an_untrained_model_needs_no_prediction():
    model = LinearVAE(5, 2).double()
    figure = latent_kl_figure({"tied": latent_kl(model, TiedMeanField(model), data_for(model))})
    assert len(figure.axes[0].patches) == 0
