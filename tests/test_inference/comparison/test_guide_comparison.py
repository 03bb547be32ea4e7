"""compare(): every column against an independent computation, the printed table, the file and the figures."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from compared_guides import (
    HELD_OUT_LOG_DET,
    NUM_SAMPLES,
    assert_close,
    assert_printed,
    data,
    make_model,
    mean_field,
    measure,
    normal_model,
    parse,
    train_linear,
)
from scipy.special import logsumexp
from torch import nn

from guides import Exact, Guide, TiedMeanField
from inference import AnalyticELBO, Importance, compare, evidence, log_weights
from inference.comparison import guide_comparison
from inference.comparison.paired_differences import (
    bits_per_dim,
    differences,
)
from inference.comparison.tables import table
from inference.distributions.gaussian import DiagNormal, FullNormal
from zoo import PPCA, digits


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


def weights_again(model, guides, splits, seed):
    """The draws of a comparison: it goes through the splits, and in each through the guides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            split: [log_weights(model, guide, x, num_samples=NUM_SAMPLES).numpy() for guide in guides.values()]
            for split, x in splits.items()
        }


# --- columns ---------------------------------------------------------------------------------------------


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
        assert dict(dataset.sizes) == {"seed": 1, "guide": 3, "datum": len(x)}
        assert dataset["guide"].values.tolist() == list(guides)
        assert dataset["elbo"].dims == ("seed", "guide", "datum")
    assert tree.attrs == {"num_samples": NUM_SAMPLES, "level": 0.95, "data_dim": 5, "trained": 0}


def test_without_held_out_data_there_is_one_group(case):
    model, guides, splits, _ = case
    assert list(measure(model, guides, splits["train"]).children) == ["train"]


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


# --- the parts of the gap, coverage and cost -------------------------------------------------------------


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
    assert 'compare(..., method="auto") adapts to each data point' in text
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


# --- bits per dimension ----------------------------------------------------------------------------------


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


# --- seeds -----------------------------------------------------------------------------------------------


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


# --- what compare refuses, before anything runs ----------------------------------------------------------


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


class OneMode(nn.Module):
    """A guide of one of the two modes of a square's roots."""

    def __init__(self, dim):
        super().__init__()
        self.loc = nn.Parameter(torch.full((dim,), 1.4, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.full((dim,), -2.0, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), -1), self.log_scale.exp()).to_event(1))


def square(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.3).to_event(1), obs=x)


@pytest.mark.parametrize(("dim", "number"), [(1, 3), (1, 200), (4, 3)])
def test_guides_that_miss_a_mode_give_no_upper_end(dim, number):
    x = torch.full((number, dim), 2.0, dtype=torch.float64)
    row = compare(square, {"one": OneMode(dim)}, x, seed=1, progress=False)["train"].sel(guide="one", seed=0)
    grid = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid.square(), 0.3).log_prob(x[0, 0])
    truth = dim * float(joint.logsumexp(0) + (grid[1] - grid[0]).log())
    assert (row["evidence_upper"].values == math.inf).all()
    assert (row["evidence_lower"].values < truth).all()


def test_a_look_for_modes_leaves_the_draws_as_they_were(monkeypatch):
    x = torch.full((3, 1), 2.0, dtype=torch.float64)
    guides = {"one": OneMode(1), "other": OneMode(1)}
    with_look = compare(square, guides, x, seed=1, progress=False)["train"]
    assert np.isinf(with_look["evidence_upper"].values).all()
    monkeypatch.setattr(guide_comparison, "_where_visited", lambda found, *_: found)
    without = compare(square, guides, x, seed=1, progress=False)["train"]
    for name in ("elbo", "iwae", "evidence"):
        np.testing.assert_array_equal(with_look[name].values, without[name].values)
    assert np.isfinite(without["evidence_upper"].values).all()
