"""compare(): every column against an independent computation, the printed table, the file and the figures."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
import xarray as xr
from matplotlib.collections import PathCollection
from scipy.special import logsumexp
from sklearn.decomposition import PCA

from guides import Exact, Guide, Linear, MeanField, TiedMeanField
from inference import AnalyticELBO, Importance, evidence, fit, log_weights
from inference.comparison.guide_comparison import compare
from inference.comparison.paired_differences import (
    bits_per_dim,
    differences,
    load_comparison,
    principal_map,
    save_comparison,
)
from inference.comparison.resources import _Watch
from inference.comparison.tables import table
from inference.distributions.gaussian import DiagNormal, FullNormal
from inference.plots.comparison import elbo_against_evidence, gap_histogram, pareto_k_map, save_figure
from zoo import PPCA, LinearVAE, digits

NUM_SAMPLES = 200
HELD_OUT_LOG_DET = torch.linspace(0, 1, 12, dtype=torch.float64)


def make_model(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LinearVAE(5, 2, sigma=0.7).double().requires_grad_(False)


def mean_field(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MeanField(5, 2, hidden=(8,)).double().requires_grad_(False)


def data(model, num, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(n=num)


class Unknown(Guide):
    """A guide that cannot be freed for each data point."""

    def posterior(self, x):
        return DiagNormal(x[:, :2], torch.ones_like(x[:, :2]))


class NarrowGuide(Guide):
    """The exact posterior at half its width."""

    def __init__(self, model):
        super().__init__()
        self.exact = (model,)

    def posterior(self, x):
        distribution = self.exact[0].posterior(x)
        return FullNormal(distribution.loc, 0.5 * distribution.scale_tril)


def measure(model, guides, x, **options):
    return compare(model, guides, x, **{"num_samples": NUM_SAMPLES, "progress": False, **options})


@pytest.fixture(scope="module")
def case():
    """A model, three guides, training and held-out data, and their comparison."""
    model = make_model()
    guides = {"exact": Exact(model), "tied": TiedMeanField(model), "untrained": mean_field()}
    x, y = data(model, 30, 1), 1 + data(model, 12, 2)
    tree = measure(model, guides, x, held_out=y, log_det=0.5, held_out_log_det=HELD_OUT_LOG_DET, seed=7)
    return model, guides, {"train": x, "held_out": y}, tree


@pytest.fixture
def tree(case):
    return case[3]


def weights_again(model, guides, splits, seed):
    """The draws of a comparison: it goes through the splits, and in each through the guides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            split: [log_weights(model, guide, x, num_samples=NUM_SAMPLES).numpy() for guide in guides.values()]
            for split, x in splits.items()
        }


def assert_close(got, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=tolerance, atol=tolerance)


# --- columns ---------------------------------------------------------------------------------------


def numpy_columns(w, truth):
    """Everything per data point from weights (S, N), by NumPy and SciPy."""
    relative = np.exp(w - logsumexp(w, axis=0)) * len(w)
    return {
        "elbo": w.mean(0),
        "elbo_se": w.std(0, ddof=1) / math.sqrt(len(w)),
        "iwae": logsumexp(w, axis=0) - math.log(len(w)),
        "iwae_se": relative.std(0, ddof=1) / math.sqrt(len(w)),
        "evidence": truth,
        "evidence_lower": truth,
        "evidence_upper": truth,
        "evidence_se": np.zeros_like(truth),
        "gap": truth - w.mean(0),
        "ess": relative.sum(0) ** 2 / (relative**2).sum(0),
    }


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_columns_are_those_of_numpy(split, case):
    model, guides, splits, tree = case
    distribution = model.linear_gaussian
    covariance = distribution.W.numpy() @ distribution.W.numpy().T + float(distribution.sigma) ** 2 * np.eye(5)
    truth = scipy.stats.multivariate_normal(distribution.mu.numpy(), covariance).logpdf(splits[split].numpy())
    weights = weights_again(model, guides, splits, seed=7)[split]
    for name, w in zip(guides, weights):
        one = tree[split].to_dataset().sel(guide=name).isel(seed=0)
        for key, expected in numpy_columns(w, truth).items():
            assert_close(one[key], expected, 1e-6 if key.endswith("_se") else 1e-10)
        assert_close(one["mean_evidence"], truth.mean())
        for end in ("lower", "upper"):
            assert_close(one[f"mean_evidence_{end}"], truth.mean())
        assert float(one["mean_evidence_se"]) == 0
        assert str(one["method"].values) == "exact"


def test_gap_of_the_tied_guide_is_the_closed_form(case):
    model, guides, splits, tree = case
    for split, x in splits.items():
        exact = model.log_evidence(x) - AnalyticELBO().per_datum(model, guides["tied"], x)
        one = tree[split].to_dataset().sel(guide="tied").isel(seed=0)
        error = float(np.sqrt((one["elbo_se"] ** 2).sum())) / len(x)
        assert abs(float(one["gap"].mean()) - float(exact.mean())) < 4 * error
        # The untrained guide's gap is another: the criterion would see a wrong column.
        other = tree[split].to_dataset().sel(guide="untrained").isel(seed=0)
        assert abs(float(other["gap"].mean()) - float(exact.mean())) > 10 * error


def test_the_tree_has_the_promised_shape(case):
    _, guides, splits, tree = case
    assert list(tree.children) == ["train", "held_out"]
    for split, x in splits.items():
        dataset = tree[split].to_dataset()
        assert dict(dataset.sizes) == {"seed": 1, "guide": 3, "datum": len(x), "axis": 2}
        assert dataset["guide"].values.tolist() == list(guides)
        assert dataset["elbo"].dims == ("seed", "guide", "datum")
    assert tree.attrs == {"num_samples": NUM_SAMPLES, "level": 0.95, "data_dim": 5, "trained": 0}


def test_without_held_out_data_there_is_one_group(case):
    model, guides, splits, _ = case
    assert list(measure(model, guides, splits["train"]).children) == ["train"]


def test_the_map_is_that_of_principal_components(case):
    _, _, splits, tree = case
    for split, x in splits.items():
        got, expected = tree[split]["map"].values, PCA(2).fit_transform(x.numpy())
        signs = np.sign((got * expected).sum(0))
        assert_close(got * signs, expected, 1e-10)


def test_the_map_of_one_dimension_is_padded():
    x = torch.tensor([[1.0], [3.0], [5.0]])
    got = principal_map(x)
    assert got.dtype == torch.float64
    assert got.abs().tolist() == [[2.0, 0.0], [0.0, 0.0], [2.0, 0.0]]


def test_every_guide_may_bring_its_own_model(case):
    model, guides, splits, _ = case
    other = make_model(1)
    pairs = {"a": (model, guides["tied"]), "b": (other, TiedMeanField(other))}
    one = measure(None, pairs, splits["train"])["train"].to_dataset().isel(seed=0)
    for name, its_model in (("a", model), ("b", other)):
        assert_close(one["evidence"].sel(guide=name), its_model.log_evidence(splits["train"]).numpy())


def test_a_comparison_repeats_and_leaves_the_random_state(case):
    model, guides, splits, tree = case
    before = torch.get_rng_state()
    options = {"held_out": splits["held_out"], "log_det": 0.5, "held_out_log_det": HELD_OUT_LOG_DET}
    again, other = (measure(model, guides, splits["train"], **options, seed=seed) for seed in (7, 8))
    assert torch.equal(before, torch.get_rng_state())
    for split in ("train", "held_out"):  # all but the time that it took
        assert again[split].to_dataset().drop_vars("seconds").identical(tree[split].to_dataset().drop_vars("seconds"))
    assert again.attrs == tree.attrs
    assert not np.array_equal(other["train"]["elbo"], tree["train"]["elbo"])


# --- differences -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("door", [table, differences, lambda t: gap_histogram(t), lambda t: save_comparison(t, "x.nc")])
def test_a_part_of_a_comparison_is_refused_by_name(door, tree):
    for part in (tree["train"], tree["train"].to_dataset(), {"train": tree["train"]}):
        with pytest.raises(TypeError, match="expected the whole tree that compare returned"):
            door(part)


# --- the parts of the gap, coverage and cost -------------------------------------------------------


def test_the_gap_is_split_on_the_first_rows_and_nan_elsewhere():
    model = make_model()
    x = data(model, 30, 1)
    guides = {"mean field": mean_field(), "tied": TiedMeanField(model), "unknown": Unknown()}
    dataset = measure(model, guides, x, split=12)["train"].to_dataset().isel(seed=0)
    precision = model.W.mT @ model.W / model.sigma.square() + torch.eye(2).double()
    expected = float(0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)))
    for name in ("mean field", "tied"):
        one = dataset.sel(guide=name)
        np.testing.assert_allclose(one["approximation"].values[:12], np.full(12, expected), atol=1e-6)
        assert np.isnan(one["approximation"].values[12:]).all()
        total = one["approximation"].values[:12] + one["amortisation"].values[:12]
        posterior = guides[name].posterior(x[:12])
        truth = torch.distributions.kl_divergence(posterior, model.posterior(x[:12])).detach().numpy()
        np.testing.assert_allclose(total, truth, atol=1e-6)
    assert np.isnan(dataset["approximation"].sel(guide="unknown")).all()
    rows = table(measure(model, guides, x, split=12)).splitlines()
    head = next(i for i, row in enumerate(rows) if "approximation" in row)
    unknown = next(row for row in rows[head:] if row.startswith("unknown"))
    assert unknown.split()[1:3] == ["unknown", "unknown"]
    assert "approximation" not in table(measure(model, guides, x))


def test_a_lower_bound_of_the_evidence_bounds_the_approximation_gap():
    model = make_model()
    x = data(model, 6, 1)
    tree = measure(lambda x: model(x), {"a": mean_field()}, x, split=3)
    assert np.isinf(tree["train"]["evidence_upper"]).any()
    rows = table(tree).splitlines()
    head = next(i for i, row in enumerate(rows) if "approximation" in row)
    assert next(row for row in rows[head:] if row.startswith("a ")).split()[1] == ">="


def test_without_an_upper_end_the_table_prints_bounds():
    model = make_model()
    x = data(model, 6, 1)
    tree = measure(lambda x: model(x), {"a": mean_field()}, x, method=Importance(50), seed=0)
    one = tree["train"].to_dataset().isel(seed=0, guide=0)
    assert math.isinf(float(one["mean_evidence_upper"]))
    text = table(tree)
    error = {key: math.sqrt(float((one[f"{key}_se"] ** 2).sum())) / 6 for key in ("elbo", "iwae")}
    lower, quantile = float(one["mean_evidence_lower"]), scipy.stats.norm.ppf(0.975)
    for key in ("elbo", "iwae"):
        assert f">= {max(0.0, lower - float(one[key].mean()) - quantile * error[key]):.4f}" in text
    assert f"<= {-lower / (5 * math.log(2)):.4f}" in text
    assert ">=, <=: nothing bounds log p from above; these are bounds from its lower end at 95%." in text
    truth = float(model.log_evidence(x).mean())
    assert lower - float(one["elbo"].mean()) < truth - float(one["elbo"].mean())


def test_an_evidence_that_is_the_iwae_is_not_compared_with_it():
    model = make_model()
    x, guides = data(model, 6, 1), {"a": mean_field()}
    assert "log p - IWAE" not in table(measure(lambda x: model(x), guides, x))
    assert "log p - IWAE" in table(measure(model, guides, x))


def test_rows_with_an_upper_end_are_summed_up_beside_the_rest():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(-1)

    def guide(x):  # the first data point's is far too narrow
        sigma = torch.full((6,), 0.12).double()
        sigma[0] = 0.01
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 1.01, sigma))

    tree = measure(normal_model, {"a": guide}, x, num_samples=4000, seed=0)
    one = tree["train"].to_dataset().isel(seed=0, guide=0)
    assert np.isfinite(one["evidence_upper"]).values.tolist() == [False] + [True] * 5
    assert math.isinf(float(one["mean_evidence_upper"]))
    truth = scipy.stats.norm.logpdf(x[1:, 0].numpy(), 0.0, 1.01**0.5).mean()
    assert float(one["bounded_evidence_lower"]) < truth < float(one["bounded_evidence_upper"])
    expected = f"train, a: 5 of 6 log p have an upper end, mean {float(one['bounded_evidence']):.4f} ["
    assert expected in table(tree)


def test_coverage_is_nominal_and_less_for_a_narrow_guide():
    model = make_model()
    x = data(model, 30, 1)
    guides = {"exact": Exact(model), "narrow": NarrowGuide(model)}
    tree = measure(model, guides, x, simulated=1000)
    cover = tree["train"].to_dataset()["coverage"].isel(seed=0)
    error = math.sqrt(0.9 * 0.1 / 1000)
    assert abs(float(cover.sel(guide="exact")) - 0.9) < 4 * error
    half = 2 * scipy.stats.norm.cdf(0.5 * scipy.stats.norm.ppf(0.95)) - 1  # of an interval half as wide
    assert abs(float(cover.sel(guide="narrow")) - half) < 4 * error + 0.01
    assert "cover 90%" in table(tree)


def test_evidence_without_closed_form_may_come_from_a_method():
    model = make_model()
    x = data(model, 6, 1)
    guides = {"a": mean_field()}
    tree = measure(lambda x: model(x), guides, x, method="quadrature")
    dataset = tree["train"].to_dataset().isel(seed=0, guide=0)
    np.testing.assert_allclose(dataset["evidence"].values, model.log_evidence(x).numpy(), atol=1e-8)
    assert str(dataset["method"].values) == "quadrature"
    with pytest.raises(ValueError, match="expected method to be one of"):
        measure(model, guides, x, method="guess")


def test_costs_are_those_of_one_elbo(case):
    model, _, splits, tree = case
    dataset = tree["train"].to_dataset().isel(seed=0)
    assert (dataset["seconds"] > 0).all()
    # at least the draws, the means of the data and their residuals: 30 x (2 + 5 + 5) numbers
    assert (dataset["memory"] >= 30 * 12 * 8).all()
    more = measure(model, {"tied": TiedMeanField(model)}, torch.cat([splits["train"]] * 10))
    assert float(more["train"]["memory"].squeeze()) > 5 * float(dataset["memory"].sel(guide="tied"))


def test_differences_of_one_datum_have_no_error():
    model = make_model()
    tree = measure(model, {"a": Exact(model), "b": mean_field()}, torch.zeros(1, 5).double())
    assert bool(differences(tree)["standard_error"].isnull().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "flow"}, r"expected reference to be one of \['exact', 'tied', 'untrained'\], got 'flow'"),
        ({"quantity": "entropy"}, "expected a quantity per guide and data point, got 'entropy'"),
        ({"quantity": "mean_evidence"}, "expected a quantity per guide and data point, got 'mean_evidence'"),
    ],
)
def test_unknown_references_and_quantities_are_named(options, message, tree):
    with pytest.raises(ValueError, match=message):
        differences(tree, **options)


# --- bits per dimension ----------------------------------------------------------------------------


def test_bits_per_dim_are_minus_log2_of_the_density_of_the_originals(tree):
    for split, offset in (("train", 0.5), ("held_out", float(HELD_OUT_LOG_DET.mean()))):
        dataset = tree[split].to_dataset()
        expected = -(dataset["mean_evidence"].values + offset) / (5 * math.log(2))
        assert_close(bits_per_dim(dataset, 5), expected)


def test_bits_per_dim_do_not_depend_on_the_units():
    x = digits(test_size=0).train
    model = PPCA.from_data(x, 8)
    rescaled = PPCA(64, 8).double()
    with torch.no_grad():
        rescaled.W.copy_(model.W / 16)
        rescaled.mu.copy_(model.mu / 16)
        rescaled.log_sigma.copy_(model.log_sigma - math.log(16))
    raw = measure(model, {"exact": Exact(model)}, x, num_samples=2)
    unit = measure(rescaled, {"exact": Exact(rescaled)}, x / 16, num_samples=2, log_det=-64 * math.log(16))
    bits = [float(bits_per_dim(tree["train"].to_dataset(), 64).squeeze()) for tree in (raw, unit)]
    assert abs(bits[0] - bits[1]) < 1e-9
    assert bits[0] == pytest.approx(163.23588991 / (64 * math.log(2)), abs=1e-9)
    # Without the log-determinant they are off by log2 16.
    forgotten = bits_per_dim(unit["train"].to_dataset().assign(log_det=0.0), 64)
    assert bits[0] - float(forgotten.squeeze()) == pytest.approx(4.0, abs=1e-9)


def test_bits_per_dim_of_a_zoo_dataset_are_those_of_raw_digits():
    from zoo import Raw, Scaled

    bits = []
    for transform in (Raw(), Scaled(16.0)):
        dataset = digits(transform=transform)
        model = PPCA.from_data(dataset.train, 8)
        tree = measure(
            model,
            {"exact": Exact(model)},
            dataset.train,
            held_out=dataset.test,
            num_samples=2,
            log_det=dataset.train_log_det,
            held_out_log_det=dataset.test_log_det,
        )
        bits.append([float(bits_per_dim(tree[split].to_dataset(), 64).squeeze()) for split in tree.children])
    assert_close(bits[0], bits[1], 1e-9)


# --- seeds -----------------------------------------------------------------------------------------


def train_linear(model, x):
    def train(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            guide = Linear(5, 2).double()
        fit(model, guide, x, steps=20, objective=AnalyticELBO(), seed=seed, progress=False)
        return guide

    return train


@pytest.fixture(scope="module")
def seeded_tree():
    model = make_model()
    x = data(model, 30, 1)
    factories = {"linear": train_linear(model, x), "tied": lambda _: TiedMeanField(model)}
    return measure(model, factories, x, seeds=[3, 1, 2]), model, x


def test_factories_are_called_once_a_seed(seeded_tree):
    tree, model, x = seeded_tree
    assert tree["train"]["seed"].values.tolist() == [3, 1, 2]
    assert tree.attrs["trained"] == 1
    for i, seed in enumerate((3, 1, 2)):
        exact = float(AnalyticELBO().per_datum(model, train_linear(model, x)(seed), x).detach().mean())
        one = tree["train"].to_dataset().isel(seed=i).sel(guide="linear")
        error = float(np.sqrt((one["elbo_se"] ** 2).sum())) / len(x)
        assert abs(float(one["elbo"].mean()) - exact) < 4 * error


def test_the_spread_over_seeds_is_that_of_numpy(seeded_tree):
    tree = seeded_tree[0]
    rows = parse(table(tree))
    for i, name in enumerate(("linear", "tied")):
        elbos = tree["train"]["elbo"].values[:, i].mean(-1)
        gaps = tree["train"]["mean_evidence"].values[:, i] - elbos
        assert_printed(rows[name]["ELBO"][0], [elbos.mean(), elbos.std(ddof=1)])
        assert_printed(rows[name]["gap"][0], [gaps.mean(), gaps.std(ddof=1)])
    paired = np.diff(tree["train"]["elbo"].values.mean(-1), axis=1)[:, 0]
    assert_printed(rows["tied"]["difference"][0], [paired.mean(), paired.std(ddof=1)])
    assert "standard deviation over 3 seeds" in table(tree)


# --- table -----------------------------------------------------------------------------------------


def parse(text):
    """The numbers of a table: guide to quantity to one list of numbers a split."""
    rows, heads = {}, []
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if cells[0] == "guide":
            heads = cells[1:]
        elif len(cells) != len(heads) + 1:
            heads = []
        elif heads:
            row = rows.setdefault(cells[0], {})
            for head, cell in zip(heads, cells[1:]):
                row.setdefault(head, []).append([float(n) for n in re.findall(r"-?\d+(?:\.\d+)?|inf|nan", cell)])
    return rows


def assert_printed(numbers, expected, digits=4):
    """Equal to half a unit of the last place."""
    np.testing.assert_allclose(numbers, expected, rtol=0, atol=0.5001 * 10**-digits)


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


# --- a model without closed form -------------------------------------------------------------------

SCALES = (1.0, 0.5)


def nonlinear_model(x):
    """z ~ N(0, 1), x ~ N([tanh 2z, z^2], 0.5): no closed form, one-dimensional quadrature."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
        mean = torch.stack([torch.tanh(2 * z), z**2], -1)
        pyro.sample("x", dist.Normal(mean, x.new_tensor(0.5)).to_event(1), obs=x)


def nonlinear_guide(slope, sigma):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x[:, 0], x.new_tensor(sigma)))

    return guide


def quadrature(x):
    def density(z):
        normal = scipy.stats.norm.pdf
        return normal(z) * normal(x[0], np.tanh(2 * z), 0.5) * normal(x[1], z**2, 0.5)

    return math.log(scipy.integrate.quad(density, -8, 8, points=[-1, 0, 1], epsabs=1e-13)[0])


@pytest.fixture(scope="module")
def pooled():
    random = np.random.RandomState(0)
    z = random.standard_normal(12)
    x = np.stack([np.tanh(2 * z), z**2], -1) + 0.5 * random.standard_normal((12, 2))
    guides = {"wide": nonlinear_guide(0.5, 1.0), "wider": nonlinear_guide(0.0, 1.5)}
    x = torch.from_numpy(x)
    return guides, x, measure(nonlinear_model, guides, x, num_samples=4000, seed=1)


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


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, x.new_tensor(0.1)), obs=x[:, 0])


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


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["case", "seeded_tree", "pooled"])
def test_a_comparison_survives_the_file(which, request, tmp_path):
    tree = next(part for part in request.getfixturevalue(which) if isinstance(part, xr.DataTree))
    path = tmp_path / "folder" / "comparison.nc"
    save_comparison(tree, path)
    assert list(path.parent.iterdir()) == [path]
    loaded = load_comparison(path)
    path.unlink()  # it was read, not opened
    assert loaded.identical(tree)
    assert table(loaded) == table(tree)


def test_an_interrupted_save_leaves_the_old_file(tree, tmp_path, monkeypatch):
    path = tmp_path / "comparison.nc"
    save_comparison(tree, path)
    before = path.read_bytes()

    def interrupted(_, target, **__):
        with open(target, "wb") as file:
            file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(xr.DataTree, "to_netcdf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_comparison(tree, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_reads_the_old_file_during_a_save_reads_it_to_the_end(tree, tmp_path):
    path = tmp_path / "comparison.nc"
    save_comparison(tree, path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        save_comparison(tree.isel(datum=slice(3)), path)
        assert reader.read() == before
    assert load_comparison(path)["train"].sizes["datum"] == 3


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a comparison at .*none\.nc, found no file"):
        load_comparison(tmp_path / "none.nc")


# --- figures ---------------------------------------------------------------------------------------


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


# --- what compare refuses, before anything runs ----------------------------------------------------

REFUSED = {
    "no guides": ({"guides": {}}, ValueError, "with at least one entry, got {}"),
    "a list of guides": ({"guides": [mean_field()]}, ValueError, "expected guides as a mapping from names"),
    "no callable": ({"guides": {"a": 3}}, TypeError, "expected 'a' to be a guide of the given model, or .* got int"),
    "three halves": ({"guides": {"a": (1, 2, 3)}}, TypeError, "expected 'a' to be a guide of .*got tuple"),
    "no model": ({"model": None}, TypeError, "expected 'a' to be a guide of the given model, or"),
    "one sample": ({"num_samples": 1}, ValueError, "expected num_samples to be at least 2, got 1"),
    "no seeds": ({"seeds": []}, ValueError, "expected at least one seed, all different"),
    "level": ({"level": 95}, ValueError, "expected level between 0 and 1, got 95"),
    "log_det": ({"log_det": torch.zeros(3)}, ValueError, r"expected log_det .*of shape \(30,\), got \(3,\)"),
    "log_det that is not finite": ({"log_det": math.nan}, ValueError, "expected log_det to be finite, got 1 NaN"),
    "one log_det of two": (
        {"held_out": torch.zeros(4, 5).double(), "log_det": 0.0},
        ValueError,
        "expected log_det and held_out_log_det both or neither, got one of them",
    ),
    "held_out_log_det": (
        {"held_out": torch.zeros(4, 5).double(), "log_det": 0.0, "held_out_log_det": torch.zeros(30)},
        ValueError,
        r"expected .*log_det .*of shape \(4,\), got \(30,\)",
    ),
    "held-out data of another D": (
        {"held_out": torch.zeros(4, 3).double()},
        ValueError,
        r"expected x of shape \(N, 5\), got \(4, 3\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unfit_arguments_are_refused_before_anything_runs(name):
    options, error, message = REFUSED[name]
    model, guide, runs = make_model(), mean_field(), []
    guide.encoder.register_forward_hook(lambda *_: runs.append(1))
    arguments = {"model": model, "guides": {"a": guide}, "x": data(model, 30, 1), **options}
    with pytest.raises(error, match=message):
        measure(**arguments)
    assert not runs


def test_evidence_and_compare_agree(case):
    model, _, splits, tree = case
    got = evidence(model, splits["train"])
    assert_close(tree["train"]["evidence"].values[0, 0], got.value.numpy())


# --- files and arguments that cannot work ----------------------------------------------------------


def test_a_damaged_comparison_is_refused_by_its_name(tmp_path):
    sound = tmp_path / "sound.nc"
    model, guide, x = LinearVAE(5, 2).double(), Linear(5, 2).double(), torch.randn(10, 5).double()
    save_comparison(compare(model, {"mine": guide}, x, num_samples=5, progress=False), sound)
    content = sound.read_bytes()
    damaged = [content[: len(content) * i // 5] for i in range(5)] + [b"no such file at all" * 50]
    for place in range(0, len(content), len(content) // 40):
        damaged.append(content[:place] + bytes([content[place] ^ 85]) + content[place + 1 :])
    for i, bad in enumerate(damaged):
        (tmp_path / f"{i}.nc").write_bytes(bad)
        with pytest.raises(ValueError, match=rf"/{i}\.nc (is damaged|has no digest)"):
            load_comparison(tmp_path / f"{i}.nc")


def test_a_comparison_of_an_older_version_is_named_as_such(tmp_path):
    xr.DataTree.from_dict({"train": xr.Dataset({"elbo": 1.0})}).to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    with pytest.raises(
        ValueError, match=r"old\.nc has no digest at its end: it was cut, or written by a version before"
    ):
        load_comparison(tmp_path / "old.nc")


TOO_LATE = {
    "simulated": ({"simulated": 20}, "expected simulated to be 0 or at least 100"),
    "split": ({"split": 41}, "expected split of at most the 40 rows of x, got 41"),
    "split of held out": ({"split": 30, "held_out": torch.zeros(20, 5).double()}, "at most the 20 rows of held_out"),
    "name": ({"guides": {"a\0b": Linear(5, 2).double()}}, "expected printable text as every guide's name"),
    "number for a name": (
        {"guides": {3: Linear(5, 2).double()}},
        "expected printable text as every guide's name, got 3",
    ),
    "seed twice": ({"guides": {"a": lambda _: Linear(5, 2).double()}, "seeds": [1, 1]}, "all different"),
    "chunk": ({"chunk": 0}, "expected chunk to be at least 1, got 0"),
}


@pytest.mark.parametrize(("change", "message"), TOO_LATE.values(), ids=TOO_LATE)
def test_what_cannot_work_is_refused_before_anything_is_measured(change, message, monkeypatch):
    monkeypatch.setattr("inference.comparison.guide_comparison._measure", lambda *_, **__: pytest.fail("it began"))
    options = {"guides": {"a": Linear(5, 2).double()}, "num_samples": 5, "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        compare(LinearVAE(5, 2).double(), options.pop("guides"), torch.zeros(40, 5).double(), **options)


def test_a_model_that_cannot_be_simulated_is_refused_first(monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.sum(-1))

    monkeypatch.setattr("inference.comparison.guide_comparison._measure", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(ValueError, match="argument"):
        compare(model, {"a": Linear(5, 2).double()}, torch.zeros(40, 5).double(), simulated=100, progress=False)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (600, 700)])
def test_the_map_has_the_principal_axes_of_the_data(shape):
    torch.manual_seed(0)
    x = torch.randn(shape).double() * torch.cat([torch.tensor([9.0, 5.0]), torch.ones(shape[1] - 2)]).double()
    got, centred = principal_map(x), x - x.mean(0)
    _, vectors = np.linalg.eigh((centred.mT @ centred).numpy())
    want = centred @ torch.from_numpy(vectors[:, ::-1][:, :2].copy())
    assert torch.allclose(got.abs(), want.abs(), atol=1e-8 * float(want.abs().max()))


def test_the_map_of_wide_data_makes_no_matrix_of_columns():
    with _Watch() as watch:
        place = principal_map(torch.randn(8, 60_000))
    assert place.shape == (8, 2)
    assert watch.peak < 100e6
