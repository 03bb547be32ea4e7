"""The printed table and the figures of a comparison show its numbers."""

import inspect
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from compared_guides import (
    assert_close,
    assert_printed,
    data,
    make_model,
    mean_field,
    measure,
    parse,
)
from matplotlib.figure import Figure

from inference import Importance, plots
from inference.comparison.paired_differences import (
    differences,
)
from inference.comparison.tables import table
from inference.core.estimates import normal_quantile
from inference.plots import elbo_against_evidence, gap_figure, pareto_k_shares, save_figure

# --- table -----------------------------------------------------------------------------------------------


def test_the_table_prints_the_right_numbers(tree):
    rows = parse(table(tree))
    for i, split in enumerate(("train", "held_out")):
        for name in ("exact", "tied", "untrained"):
            one = tree[split].to_dataset().isel(seed=0).sel(guide=name)
            num, row = one.sizes["datum"], {head: splits[i] for head, splits in rows[name].items()}
            elbo, truth, iwae, ess = (float(one[key].mean()) for key in ("elbo", "evidence", "iwae", "ess"))
            elbo_se, iwae_se = (math.sqrt(float((one[key] ** 2).sum())) / num for key in ("elbo_se", "iwae_se"))
            assert_printed(row["ELBO"], [elbo])
            assert_printed(row["log p"], [truth])
            assert_printed(row["gap"], [truth - elbo, elbo_se])
            assert_printed(row["IWAE"], [iwae])
            assert_printed(row["log p - IWAE"], [truth - iwae, iwae_se])
            assert_printed(row["bits/dim"], [-(truth + float(one["log_det"].mean())) / (5 * math.log(2))])
            assert_printed(row["ESS"], [ess], digits=0)
            assert_printed(row["k>0.7"], [100 * float((one["pareto_k"] > 0.7).mean())], digits=1)


def test_the_table_prints_paired_differences(tree):
    rows = parse(table(tree))
    got = differences(tree).isel(seed=0)
    for name in ("tied", "untrained"):
        one = got.sel(guide=name)
        assert_printed(rows[name]["difference"], np.stack([one["difference"], one["standard_error"]]).T)
    assert "difference" not in rows["exact"]


def test_the_table_of_one_guide_has_no_differences(case):
    model, guides, splits, _ = case
    assert "paired" not in table(measure(model, {"tied": guides["tied"]}, splits["train"]))


def test_the_tables_columns_are_aligned(tree):
    blocks = table(tree).split("\n\n")
    for block in blocks[:2]:
        assert len({len(line) for line in block.splitlines()[1:]}) == 1


# --- figures ---------------------------------------------------------------------------------------------


def panels(figure, num):
    """The axes with guides on them."""
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert len(axes) == num
    return axes


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_gap_figure_shows_means_intervals_and_quantiles(split, tree):
    dataset = tree[split].to_dataset().isel(seed=0)
    (ax,) = gap_figure(tree, split).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == dataset["guide"].values.tolist()
    for place, name in enumerate(dataset["guide"].values):
        one = dataset.sel(guide=name)
        gap, error = one["gap"].values, math.sqrt(float((one["elbo_se"] ** 2).sum())) / one.sizes["datum"]
        quantiles = next(line for line in ax.lines if list(line.get_ydata()) == [place, place])
        assert_close(quantiles.get_xdata(), np.quantile(gap, [0.05, 0.95]))
        dot, _, (whisker,) = ax.containers[place].lines
        assert_close(float(dot.get_xdata()[0]), gap.mean())
        width = normal_quantile(0.95) * error  # the evidence is exact
        assert_close(whisker.get_segments()[0][:, 0], gap.mean() + np.array([-width, width]), 1e-9)
        assert ax.texts[place].get_text() == f"{abs(gap.mean()):.4f}"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_scatter_plot_shows_every_difference(split, tree):
    dataset = tree[split].to_dataset().isel(seed=0)
    for ax, name in zip(panels(elbo_against_evidence(tree, split), 3), dataset["guide"].values):
        one = dataset.sel(guide=name)
        zero, points = ax.lines
        assert_close(zero.get_ydata(), [0, 0])
        assert_close(points.get_xdata(), one["evidence"].values)
        assert_close(points.get_ydata(), one["elbo"].values - one["evidence"].values)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_bars_show_the_shares_of_k(split, tree):
    dataset = tree[split].to_dataset().isel(seed=0)
    (ax,) = pareto_k_shares(tree, split).axes
    for place, name in enumerate(dataset["guide"].values):
        k = dataset["pareto_k"].sel(guide=name).values
        bars = [bar for bar in ax.patches if round(bar.get_y() + bar.get_height() / 2) == place]
        ends = [-math.inf, 0.5, 0.7, 1.0, math.inf]
        k = np.where(np.isinf(k), -9.0, k)  # of weights that are all equal
        assert_close([bar.get_width() for bar in bars], [100 * np.mean((k > a) & (k <= b)) for a, b in pairwise(ends)])
        assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(100)


def test_k_that_is_unknown_has_a_share_of_its_own():
    (ax,) = pareto_k_shares({"a": torch.tensor([0.1, math.nan, 0.6, 2.0])}).axes
    assert [bar.get_width() for bar in ax.patches] == [25, 25, 0, 25, 25]
    assert ax.get_legend().get_texts()[-1].get_text() == "unknown"


def test_figures_mark_what_has_no_upper_end():
    model = make_model()
    x = data(model, 6, 1)
    tree = measure(lambda x: model(x), {"a": mean_field()}, x, method=Importance(50), seed=0)
    unbounded = np.isinf(tree["train"]["evidence_upper"].values[0, 0])
    assert unbounded.any()
    (ax,) = gap_figure(tree).axes
    (mark,) = (line for line in ax.lines if line.get_marker() == ">")
    assert mark.get_label() == "mean, at least"
    assert f">= {float(mark.get_xdata()[0]):.4f}" in table(tree)
    assert ax.texts[0].get_text().startswith("≥ ")
    (ax,) = panels(elbo_against_evidence(tree), 1)
    (arrows,) = (line for line in ax.lines if line.get_marker() == "v")
    assert len(arrows.get_xdata()) == unbounded.sum()
    assert "lies lower" in arrows.get_label()


def test_the_axis_of_gaps_is_logarithmic_where_they_differ_much(tree):
    assert gap_figure(tree).axes[0].get_xscale() == "symlog"
    few = tree.copy()
    few["train"] = few["train"].to_dataset().isel(guide=[2])
    assert gap_figure(few).axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("draw", [gap_figure, elbo_against_evidence, pareto_k_shares])
def test_figures_of_many_guides_name_each_and_are_written(draw, case, tmp_path):
    model, guides, splits, _ = case
    names = [f"guide {i}" for i in range(6)]
    figure = draw(measure(model, dict.fromkeys(names, guides["tied"]), splits["train"], num_samples=30))
    shown = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert names == (shown or [label.get_text() for label in figure.axes[0].get_yticklabels()])
    for suffix, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        path = tmp_path / f"figure.{suffix}"
        save_figure(figure, path)
        assert path.read_bytes()[:4] == magic
    assert len(list(tmp_path.iterdir())) == 2
    assert figure._repr_png_()[:4] == b"\x89PNG"  # what a notebook asks for


def test_figures_draw_where_they_are_told(tree):
    figure = Figure(figsize=(9, 9), layout="constrained")
    left, right = figure.subfigures(1, 2)
    top, bottom = right.subplots(2)
    assert gap_figure(tree, ax=top) is right
    assert pareto_k_shares(tree, ax=bottom) is right
    assert elbo_against_evidence(tree, figure=left) is left
    assert [len(part.axes) for part in (left, right)] == [3, 2]


@pytest.mark.parametrize("name", sorted({*plots.__all__} - {"save_figure"}))
def test_every_figure_can_be_told_where_to_draw(name):
    parameters = inspect.signature(getattr(plots, name)).parameters
    (place,) = [parameters[place] for place in ("ax", "figure") if place in parameters]
    assert (place.kind, place.default) == (place.KEYWORD_ONLY, None)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda tree: gap_figure(tree, ax=Figure()), "axes of matplotlib, .*, got Figure"),
        (
            lambda tree: elbo_against_evidence(tree, figure=Figure().subplots()),
            "subfigure of matplotlib, got Axes",
        ),
        (lambda _: plots.rank_histogram(torch.zeros(3)), "expected SBC, got Tensor"),
        (lambda _: plots.coverage_figure(None), "expected Coverage, got NoneType"),
        (lambda _: plots.tarp_curve([]), "as in {'mine': TARP}, got list"),
        (lambda _: plots.training_gap_figure({1: 0.5}), "expected Gap, got float"),
        (lambda _: plots.gap_parts_figure({"model": None}), "as in {'mine': Gap}, got NoneType"),
        (lambda _: plots.rate_distortion_figure([]), "as in {'mine': Sequence}, got list"),
        (lambda _: plots.latent_kl_figure(torch.zeros(3, 2)), "as in {'mine': result}, got Tensor"),
    ],
)
def test_what_a_figure_cannot_draw_is_named(draw, message, tree):
    with pytest.raises(TypeError, match=message):
        draw(tree)


def test_old_names_of_figures_say_the_new_ones():
    for old, new in (("gap_histogram", gap_figure), ("pareto_k_map", pareto_k_shares)):
        with pytest.warns(DeprecationWarning, match=new.__name__):
            assert getattr(plots, old) is new


@pytest.mark.parametrize("draw", [gap_figure, elbo_against_evidence, pareto_k_shares])
def test_an_unknown_split_is_named(draw, tree):
    with pytest.raises(ValueError, match=r"expected split to be one of \['train', 'held_out'\], got 'test'"):
        draw(tree, "test")
