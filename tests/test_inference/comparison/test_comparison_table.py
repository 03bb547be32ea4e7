"""The printed table and the figures of a comparison show its numbers."""

import math

import numpy as np
import pytest
from compared_guides import (
    assert_close,
    assert_printed,
    data,
    make_model,
    mean_field,
    measure,
    parse,
)
from matplotlib.collections import PathCollection

from inference import Importance
from inference.comparison.paired_differences import (
    differences,
)
from inference.comparison.tables import table
from inference.plots.comparison import elbo_against_evidence, gap_histogram, pareto_k_map, save_figure

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
def test_the_histogram_shows_every_gap_and_their_mean(split, tree):
    dataset = tree[split].to_dataset().isel(seed=0)
    for ax, name in zip(panels(gap_histogram(tree, split), 3), dataset["guide"].values):
        gap = dataset["gap"].sel(guide=name).values
        assert ax.get_title() == name
        assert sum(bar.get_height() for bar in ax.patches) == len(gap)
        edges = [bar.get_x() for bar in ax.patches] + [ax.patches[-1].get_x() + ax.patches[-1].get_width()]
        assert_close([bar.get_height() for bar in ax.patches], np.histogram(gap, edges)[0])
        assert_close(ax.lines[0].get_xdata(), [gap.mean()] * 2)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_scatter_plot_shows_every_datum_and_the_diagonal(split, tree):
    dataset = tree[split].to_dataset().isel(seed=0)
    for ax, name in zip(panels(elbo_against_evidence(tree, split), 3), dataset["guide"].values):
        one = dataset.sel(guide=name)
        diagonal, points = ax.lines
        assert_close(diagonal.get_xdata(), diagonal.get_ydata())
        assert_close(points.get_xdata(), one["evidence"].values)
        assert_close(points.get_ydata(), one["elbo"].values)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_map_shows_every_datum_in_the_colour_of_its_k(split, tree):
    dataset = tree[split].to_dataset().isel(seed=0)
    figure = pareto_k_map(tree, split)
    for ax, name in zip(panels(figure, 3), dataset["guide"].values):
        (points,) = (artist for artist in ax.collections if isinstance(artist, PathCollection))
        assert_close(points.get_offsets(), dataset["map"].values)
        assert_close(points.get_array(), dataset["pareto_k"].sel(guide=name).values.clip(-1.0, 1.5))
    assert len(figure.axes) == 4  # with the colour bar


def test_figures_mark_what_has_no_upper_end():
    model = make_model()
    x = data(model, 6, 1)
    tree = measure(lambda x: model(x), {"a": mean_field()}, x, method=Importance(50), seed=0)
    unbounded = np.isinf(tree["train"]["evidence_upper"].values[0, 0])
    assert unbounded.any()
    (ax,) = panels(gap_histogram(tree), 1)
    label = ax.get_legend().get_texts()[0].get_text()
    assert label.startswith("mean ≥ ")
    assert f">= {label.removeprefix('mean ≥ ')}" in table(tree)
    (ax,) = panels(elbo_against_evidence(tree), 1)
    (arrows,) = (artist for artist in ax.collections if isinstance(artist, PathCollection))
    assert len(arrows.get_offsets()) == unbounded.sum()
    assert "right of" in arrows.get_label()


@pytest.mark.parametrize("draw", [gap_histogram, elbo_against_evidence, pareto_k_map])
def test_many_guides_fill_several_rows(draw, case, tmp_path):
    model, guides, splits, _ = case
    names = [f"guide {i}" for i in range(6)]
    figure = draw(measure(model, dict.fromkeys(names, guides["tied"]), splits["train"], num_samples=30))
    assert [ax.get_title() for ax in panels(figure, 6)] == names
    for suffix, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        path = tmp_path / f"figure.{suffix}"
        save_figure(figure, path)
        assert path.read_bytes()[:4] == magic
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("draw", [gap_histogram, elbo_against_evidence, pareto_k_map])
def test_an_unknown_split_is_named(draw, tree):
    with pytest.raises(ValueError, match=r"expected split to be one of \['train', 'held_out'\], got 'test'"):
        draw(tree, "test")
