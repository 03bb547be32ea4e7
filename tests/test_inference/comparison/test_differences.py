"""differences(): paired over data, with the errors that they have."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import xarray as xr
from compared_guides import (
    assert_close,
    data,
    make_model,
    mean_field,
    measure,
)

from guides import TiedMeanField
from inference.comparison.paired_differences import (
    differences,
    save_comparison,
)
from inference.comparison.tables import table
from inference.plots.comparison import gap_figure

# --- differences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["elbo", "iwae", "gap", "ess"])
@pytest.mark.parametrize("reference", [None, "exact", "tied"])
def test_differences_are_paired_per_datum(reference, quantity, tree):
    got = differences(tree, reference, quantity=quantity)
    for split in ("train", "held_out"):
        values = tree[split][quantity].values[0]
        paired = values - values[{"tied": 1}.get(reference, 0)]
        one = got.sel(split=split).isel(seed=0)
        assert_close(one["difference"], paired.mean(1))
        assert_close(one["standard_error"], paired.std(1, ddof=1) / math.sqrt(paired.shape[1]))
    assert not got["difference"].sel(guide=reference or "exact").any()


def test_paired_errors_hold_the_monte_carlo_error():
    """Of two copies of one guide the difference is noise: its z-score over 40 seeds is standard normal."""
    model = make_model()
    x, guide, copy = data(model, 40, 3), mean_field(), mean_field()
    z = []
    for seed in range(40):
        one = differences(measure(model, {"a": guide, "b": copy}, x, num_samples=50, seed=seed)).sel(guide="b")
        z.append(float(one["difference"].squeeze()) / float(one["standard_error"].squeeze()))
    lower, upper = scipy.stats.chi2.ppf([5e-5, 1 - 5e-5], 40)
    assert lower < np.sum(np.square(z)) < upper


def test_p_values_are_students_adjusted_by_holm(tree):
    got = differences(tree).isel(seed=0).sel(split="train")
    raw = {}
    for name in ("tied", "untrained"):
        one = got.sel(guide=name)
        raw[name] = 2 * scipy.stats.t.sf(abs(float(one["difference"] / one["standard_error"])), 29)
    small, large = sorted(raw, key=raw.__getitem__)
    assert float(got["p_value"].sel(guide=small)) == pytest.approx(min(1, 2 * raw[small]))
    assert float(got["p_value"].sel(guide=large)) == pytest.approx(min(1, max(2 * raw[small], raw[large])))
    assert math.isnan(float(got["p_value"].sel(guide="exact")))


def test_errors_count_the_rows_that_are_there():
    model = make_model()
    guides = {"mean field": mean_field(), "tied": TiedMeanField(model)}
    tree = measure(model, guides, data(model, 60, 1), split=12, seed=0)
    values = tree["train"]["amortisation"].values[0]
    paired = (values[1] - values[0])[:12]
    one = differences(tree, quantity="amortisation").sel(guide="tied").squeeze()
    assert_close(one["standard_error"], scipy.stats.sem(paired))
    assert_close(one["p_value"], scipy.stats.ttest_1samp(paired, 0.0).pvalue)


def test_a_guide_under_two_names_is_measured_once_and_tested_never(case):
    model, guides, splits, _ = case
    pair = {"exact": guides["exact"], "untrained": guides["untrained"]}
    alone, beside = (
        differences(measure(model, chosen, splits["train"], seed=0))
        for chosen in (pair, pair | {"same": pair["exact"]})
    )
    assert not beside["difference"].sel(guide="same").any()
    assert bool(beside["p_value"].sel(guide="same").isnull().all())
    assert_close(beside["p_value"].sel(guide="untrained"), alone["p_value"].sel(guide="untrained"))


def test_rounding_is_no_significance(tree):
    dataset = tree["train"].to_dataset()
    shifted = dataset["elbo"].sel(guide="exact") + 1e-14 * (1 + np.arange(30) % 2)
    changed = dataset.copy(deep=True)
    changed["elbo"].loc[{"guide": "tied"}] = shifted
    other = xr.DataTree.from_dict({"train": changed})
    other.attrs = tree.attrs
    assert bool(differences(other)["p_value"].sel(guide="tied").isnull().all())


def test_guides_of_different_models_are_not_subtracted(case):
    model, guides, splits, _ = case
    other = make_model(1)
    pairs = {"a": (model, guides["tied"]), "b": (other, TiedMeanField(other)), "c": (model, guides["exact"])}
    tree = measure(None, pairs, splits["train"])
    got = differences(tree)
    assert bool(got["p_value"].sel(guide=["a", "b"]).isnull().all())
    assert float(got["difference"].sel(guide="b").squeeze()) == 0
    assert bool(got["p_value"].sel(guide="c").notnull().all())
    assert bool(differences(tree, "a")["difference"].sel(guide="b").isnull().all())
    lines = table(tree).splitlines()
    assert [line for line in lines if "minus" in line] == [
        "ELBO minus that of 'a', paired per data point, ± the standard error over the data"
    ]
    start = next(i for i, line in enumerate(lines) if "minus" in line)
    assert [line.split()[0] for line in lines[start + 2 : start + 4]] == ["guide", "c"]


@pytest.mark.parametrize("door", [table, differences, lambda t: gap_figure(t), lambda t: save_comparison(t, "x.nc")])
def test_a_part_of_a_comparison_is_refused_by_name(door, tree):
    for part in (tree["train"], tree["train"].to_dataset(), {"train": tree["train"]}):
        with pytest.raises(TypeError, match="expected the whole tree that compare returned"):
            door(part)
