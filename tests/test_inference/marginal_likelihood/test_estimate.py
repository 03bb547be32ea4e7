"""Evidence: what its fields say, whether its intervals keep their word, and what every public door refuses."""

import dataclasses
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from linear_problems import rescaled
from registry import data_for, for_models_with

from guides import Exact, MeanField
from inference import (
    Adaptive,
    AnalyticELBO,
    Importance,
    Quadrature,
    evidence,
    fit,
    iter_log_weights,
    log_weights,
    predictive,
    reconstruct,
    summarise,
)
from inference.comparison.guide_comparison import compare
from inference.marginal_likelihood.base.intervals import evidence_from_weights
from inference.marginal_likelihood.base.result import ASYMPTOTIC, EXACT, PROBABILISTIC
from inference.marginal_likelihood.importance import adaptive_mixture
from inference.marginal_likelihood.quadrature import adaptive_quadrature
from zoo import LinearGaussian, LinearVAE
from zoo.linear.models import LinearGaussianModel

PER_DATUM = ["value", "lower", "upper", "standard_error"]


def random_model(seed=0, data_dim=4, latent_dim=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LinearVAE(data_dim, latent_dim, sigma=0.2 + float(torch.rand(()))).double()
        model.mu.data.normal_()
    return model.requires_grad_(False)


def numpy_evidence(model, x):
    distribution = model.linear_gaussian
    w, sigma = distribution.W.detach().numpy(), float(distribution.sigma.detach())
    covariance = w @ w.T + sigma**2 * np.eye(len(w))
    return scipy.stats.multivariate_normal(distribution.mu.detach().numpy(), covariance).logpdf(x.numpy())


def importance(model, guide, x, **options):
    # The weights alone are judged here: modes beyond them are looked for elsewhere.
    method = Importance(options.pop("num_samples", 1000), chunk=options.pop("chunk", None), search=False)
    return evidence(model, x, method=method, guide=guide, **{"seed": 0, **options})


# --- fields ----------------------------------------------------------------------------------------


@for_models_with(LinearGaussianModel)
def test_exact_evidence_is_scipys_and_has_no_width(model):
    x = data_for(model)
    got = evidence(model, x)
    np.testing.assert_allclose(got.value.numpy(), numpy_evidence(model, x), rtol=1e-12, atol=1e-11)
    assert torch.equal(got.lower, got.value)
    assert torch.equal(got.upper, got.value)
    assert not got.standard_error.any()
    assert got.guarantee == (EXACT,) * len(x)
    assert (got.method, got.num_samples, got.pareto_k, got.effective_sample_size) == ("exact", 0, None, None)
    mean = numpy_evidence(model, x).mean()
    assert got.mean == (pytest.approx(mean, rel=1e-12), got.mean.value, got.mean.value, 0.0)


@pytest.mark.parametrize("method", ["exact", Importance(100)], ids=["exact", "importance"])
def test_every_field_is_one_float64_number_a_row_without_gradient(method):
    model, x = LinearVAE(5, 2), torch.randn(7, 5)
    guide = None if method == "exact" else MeanField(5, 2)
    got = evidence(model, x, method=method, guide=guide)
    fields = [getattr(got, name) for name in PER_DATUM]
    if method == "importance":
        fields += [got.pareto_k, got.effective_sample_size]
        assert got.num_samples == 100
    for field in fields:
        assert (field.shape, field.dtype, field.requires_grad) == ((7,), torch.float64, False)
    assert len(got.guarantee) == 7


@for_models_with(LinearGaussianModel)
def test_importance_evidence_by_the_exact_posterior_has_no_width(model):
    x = data_for(model)
    got = importance(model, Exact(model), x, num_samples=500)
    np.testing.assert_allclose(got.value.numpy(), numpy_evidence(model, x), rtol=1e-12, atol=1e-9)
    # The error is the root of a difference that rounding alone keeps from zero.
    assert float((got.upper - got.lower).max()) < 1e-6
    assert got.guarantee == (ASYMPTOTIC,) * len(x)
    assert bool((got.pareto_k == -math.inf).all())
    torch.testing.assert_close(got.effective_sample_size, torch.full((len(x),), 500.0).double())


def test_importance_evidence_is_read_off_the_weights():
    model = random_model()
    x = model(n=6)
    guide = rescaled(model, 1.3)
    got = importance(model, guide, x, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        summary = summarise([log_weights(model, guide, x, num_samples=1000)], 1000)
    assert torch.equal(got.value, summary.iwae.value)
    assert torch.equal(got.standard_error, summary.iwae.standard_error)
    assert torch.equal(got.pareto_k, summary.pareto_k.value)
    assert torch.equal(got.effective_sample_size, summary.effective_sample_size.value)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_two_sided_intervals_are_normal_quantiles(level):
    model = random_model()
    x = model(n=6)
    got = importance(model, rescaled(model, 1.3), x, level=level)
    assert got.guarantee == (ASYMPTOTIC,) * 6
    width = scipy.stats.norm.ppf(0.5 + level / 2) * got.standard_error.numpy()
    np.testing.assert_allclose(got.upper.numpy(), got.value.numpy() + width, rtol=1e-12)
    np.testing.assert_allclose(got.lower.numpy(), got.value.numpy() - width, rtol=1e-12)
    spread = float((got.standard_error**2).sum().sqrt()) / 6
    bias = 0.5 * float((got.standard_error**2).mean())  # of a logarithm, at second order
    width = scipy.stats.norm.ppf(0.5 + level / 2) * spread + bias
    value = float(got.value.mean())
    assert got.mean == pytest.approx((value, value - width, value + width, math.hypot(spread, bias)), rel=1e-12)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_a_guide_of_half_the_width_gets_a_lower_bound_only(level):
    model = random_model()
    x = model(n=6)
    got = importance(model, rescaled(model, 0.5), x, level=level, num_samples=10_000)
    assert float(got.pareto_k.median()) > 0.5  # 0.75 asymptotically
    assert got.guarantee == (PROBABILISTIC,) * 6
    cost = -math.log(1 - level)
    np.testing.assert_allclose(got.lower.numpy(), got.value.numpy() - cost, rtol=1e-12)
    assert bool((got.upper == math.inf).all())
    # For the mean, Markov speaks of the product of all estimates: its cost is shared.
    assert got.mean.lower == pytest.approx(got.mean.value - cost / 6, rel=1e-12)
    assert got.mean.upper == math.inf


def test_one_datum_without_two_sides_takes_them_from_the_mean():
    weights = 0.1 * torch.randn(1000, 3, dtype=torch.float64)
    weights[:, 1] *= 50
    got = evidence_from_weights(summarise([weights], 1000))
    assert got.guarantee == (ASYMPTOTIC, PROBABILISTIC, ASYMPTOTIC)
    assert torch.isfinite(got.upper).tolist() == [True, False, True]
    assert got.mean.upper == math.inf


def test_weights_that_are_partly_zero_are_no_reason_for_trust():
    weights = torch.zeros(100, 2).double()
    weights[:, 0] = torch.where(torch.arange(100) < 3, 0.0, -math.inf)
    got = evidence_from_weights(summarise([weights], 100))
    assert got.guarantee == (PROBABILISTIC, ASYMPTOTIC)


def test_a_state_that_no_draw_visits_leaves_no_upper_end():
    log_joint = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64).log()
    guide = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)
    state = torch.multinomial(guide, 1000, replacement=True)
    got = evidence_from_weights(summarise([(log_joint - guide.log())[state].unsqueeze(1)], 1000))
    assert got.guarantee == (PROBABILISTIC,)
    assert float(got.upper) == math.inf
    assert float(got.lower) < 0


@pytest.mark.parametrize("num_samples", [1, 2, 29])
def test_a_few_samples_give_a_lower_bound(num_samples):
    model = random_model()
    x = model(n=6)
    got = importance(model, rescaled(model, 1.3), x, num_samples=num_samples)
    assert got.guarantee == (PROBABILISTIC,) * 6
    assert bool(torch.isfinite(got.lower).all())
    assert got.mean.upper == math.inf


def test_an_evidence_is_frozen():
    got = evidence(random_model(), torch.zeros(3, 4).double())
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.value = 0


# --- intervals keep their word ---------------------------------------------------------------------


def problems(factor, *, num_problems, num_data=5, num_samples=1000, level=0.95):
    """Evidence by a rescaled posterior, and the truth, of random models and data."""
    for seed in range(num_problems):
        model = random_model(seed, data_dim=2 + seed % 4, latent_dim=1 + seed % 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x = model(n=num_data)
        guide = rescaled(model, factor)
        yield importance(model, guide, x, num_samples=num_samples, level=level, seed=seed), numpy_evidence(model, x)


def coverage(results, *, shrink=1.0):
    """How many two-sided intervals there are, and how many hold the truth."""
    inside = []
    for got, truth in results:
        two_sided = np.array(got.guarantee) == ASYMPTOTIC
        width = shrink * (got.upper - got.value).numpy()[two_sided]
        inside += list(np.abs(got.value.numpy() - truth)[two_sided] <= width)
    return len(inside), sum(inside)


def assert_covered(num, inside, level):
    """At least as many as a binomial at the level has with probability 99.9%."""
    assert inside >= scipy.stats.binom.ppf(0.001, num, level)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_two_sided_intervals_cover_the_truth_as_often_as_they_say(level):
    results = list(problems(1.4, num_problems=100, level=level))
    num, inside = coverage(results)
    assert num > 300  # the criterion on k-hat lets most of the good guides through
    assert_covered(num, inside, level)
    # The twin: an error of half the size covers less, beyond doubt.
    num, inside = coverage(results, shrink=0.5)
    with pytest.raises(AssertionError):
        assert_covered(num, inside, level)
    assert scipy.stats.binom.cdf(inside, num, level) < 1e-6


@pytest.mark.parametrize("factor", [0.7, 0.5, 0.3])
def test_heavy_tails_get_no_two_sided_claim_that_is_false(factor):
    num, inside = coverage(problems(factor, num_problems=40))
    assert num < 0.1 * 40 * 5
    assert num - inside <= scipy.stats.binom.ppf(0.999, 40 * 5, 0.05)


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("num_samples", [1, 30])
def test_markovs_bound_fails_no_more_often_than_it_says(num_samples, level):
    above, num = 0, 0
    for got, truth in problems(0.5, num_problems=40, num_samples=num_samples, level=level):
        above += int((got.lower.numpy() > truth).sum())
        num += len(truth)
    assert above <= scipy.stats.binom.ppf(0.999, num, 1 - level)


def test_a_value_that_forgot_to_divide_breaks_markovs_bound():
    above, num = 0, 0
    for got, truth in problems(0.5, num_problems=40, num_samples=1000):
        above += int((got.lower.numpy() + math.log(1000) > truth).sum())
        num += len(truth)
    assert scipy.stats.binom.sf(above - 1, num, 0.05) < 1e-6


@pytest.fixture(scope="module")
def repetitions():
    """200 evidences of the same eight data with different seeds, and the true mean."""
    model = random_model(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = model(n=8)
    guide = rescaled(model, 1.5)
    return [importance(model, guide, x, num_samples=500, seed=seed) for seed in range(200)], numpy_evidence(model, x)


def test_the_means_error_is_the_spread_of_repetitions(repetitions):
    means = [got.mean for got in repetitions[0]]
    spread = np.var([m.value for m in means], ddof=1) / np.mean([m.standard_error**2 for m in means])
    lower, upper = scipy.stats.chi2.ppf([5e-5, 1 - 5e-5], 199) / 199
    assert lower < spread < upper
    # The mean of the data's own errors, as if they were one, is another number.
    naive = np.mean([got.standard_error.mean() ** 2 for got in repetitions[0]])
    assert not lower < np.var([m.value for m in means], ddof=1) / naive < upper


def test_the_means_interval_covers_the_true_mean(repetitions):
    truth = repetitions[1].mean()
    inside = sum(got.mean.lower <= truth <= got.mean.upper for got in repetitions[0])
    assert inside >= scipy.stats.binom.ppf(0.001, 200, 0.95)


# --- seeds -----------------------------------------------------------------------------------------


def global_state():
    """What a library call could change behind the caller's back."""
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy_state, random.getstate(), list(pyro.get_param_store())


def test_a_seed_repeats_and_leaves_every_global_state():
    model = random_model()
    guide, x = MeanField(4, 2).double(), torch.randn(5, 4).double()
    before = global_state()
    a, b, c = (importance(model, guide, x, seed=seed, num_samples=50) for seed in (1, 1, 2))
    after = global_state()
    assert torch.equal(a.value, b.value)
    assert not torch.equal(a.value, c.value)
    assert before == after


def test_without_a_seed_the_callers_state_is_used_and_advanced():
    model = random_model()
    guide, x = MeanField(4, 2).double(), torch.randn(5, 4).double()
    values = []
    for _ in range(2):
        torch.manual_seed(11)
        values.append(importance(model, guide, x, seed=None, num_samples=50).value)
    values.append(importance(model, guide, x, seed=None, num_samples=50).value)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])


def test_the_value_does_not_depend_on_looking_at_the_plates_first():
    model = random_model()
    guide, x = rescaled(model, 1.3), torch.randn(5, 4).double()
    first, again = (importance(model, guide, x, chunk=chunk, num_samples=200).value for chunk in (200, None))
    assert torch.equal(first, again)


# --- errors: bad data at every public door ---------------------------------------------------------


class Counted:
    """A pair that counts how often its encoder, its likelihood and its closed forms are run."""

    def __init__(self, monkeypatch):
        self.calls = 0
        self.model, self.guide = LinearVAE(5, 2).double(), MeanField(5, 2, hidden=(8,)).double()
        self.guide.encoder.register_forward_hook(self.count)
        for owner, name in (
            (LinearVAE, "likelihood"),
            (LinearVAE, "expected_log_likelihood"),
            (LinearGaussian, "log_prob"),
            (LinearGaussian, "posterior"),
        ):
            monkeypatch.setattr(owner, name, self.counting(getattr(owner, name)))

    def count(self, *_):
        self.calls += 1

    def counting(self, method):
        def counted(*args, **kwargs):
            self.count()
            return method(*args, **kwargs)

        return counted


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


GOOD = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

DOORS = {
    "model.log_evidence": lambda c, x: c.model.log_evidence(x),
    "evidence, exact": lambda c, x: evidence(c.model, x),
    "evidence, importance": lambda c, x: evidence(c.model, x, method=Importance(30), guide=c.guide),
    "log_weights": lambda c, x: log_weights(c.model, c.guide, x, num_samples=3),
    "log_weights, keyword": lambda c, x: log_weights(c.model, c.guide, x=x, num_samples=3),
    "log_weights, exact guide": lambda c, x: log_weights(c.model, Exact(c.model), x, num_samples=3),
    "iter_log_weights": lambda c, x: list(iter_log_weights(c.model, c.guide, x, num_samples=3)),
    "fit": lambda c, x: fit(c.model, c.guide, x, steps=1, progress=False),
    "fit, analytic": lambda c, x: fit(c.model, c.guide, x, steps=1, objective=AnalyticELBO(), progress=False),
    "fit, validation": lambda c, x: fit(c.model, c.guide, GOOD, validation=x, steps=1, progress=False),
    "compare": lambda c, x: compare(c.model, {"a": c.guide}, x, num_samples=30, progress=False),
    "compare, held out": lambda c, x: compare(
        c.model, {"a": c.guide}, GOOD, held_out=x, num_samples=30, progress=False
    ),
    "predictive": lambda c, x: predictive(c.model, c.guide, x),
    "reconstruct": lambda c, x: reconstruct(c.model, c.guide, x),
    "model": lambda c, x: c.model(x),
    "guide": lambda c, x: c.guide(x),
}
# A call reads no values (that would stop the device), and a closed form takes any floating dtype to float64.
READ_NO_VALUES = {"model", "guide"}
TAKE_ANY_DTYPE = {"model.log_evidence", "evidence, exact"}


def with_a(value):
    x = GOOD.clone()
    x[2, 1] = value
    return x


WRONG_TYPE = r"expected (x to be a torch\.Tensor of shape \(N, 5\)|data as a tensor or a tuple with tensors), got .*{}"
BAD = {
    "list": (GOOD.tolist(), TypeError, WRONG_TYPE.format("list")),
    "integers": (torch.ones(4, 5, dtype=torch.int64), TypeError, r"expected x of a floating dtype, got torch\.int64"),
    "booleans": (torch.ones(4, 5) > 0, TypeError, r"expected x of a floating dtype, got torch\.bool"),
    "complex": (GOOD + 0j, TypeError, r"expected x of a floating dtype, got torch\.complex128"),
    "float32": (GOOD.float(), TypeError, r"expected x of dtype torch\.float64, the parameters', got torch\.float32"),
    "1-D": (GOOD[0], ValueError, r"expected x of shape \(N, 5\), got \(5,\)"),
    "3-D": (GOOD[None], ValueError, r"expected x of shape \(N, 5\), got \(1, 4, 5\)"),
    "wrong D": (GOOD[:, :3], ValueError, r"expected x of shape \(N, 5\), got \(4, 3\)"),
    "transposed": (GOOD.mT, ValueError, r"expected x of shape \(N, 5\), got \(5, 4\)"),
    "empty": (
        GOOD[:0],
        ValueError,
        r"expected (at least one data point|data of N >= 1 rows in the first tensor), got (none|.+\(0, 5\))",
    ),
    "NaN": (with_a(math.nan), ValueError, r"expected .+ to be finite, got 1 NaN or infinite of 20 .+ at \(2, 1\)"),
    "infinity": (with_a(-math.inf), ValueError, r"expected .+ to be finite, got 1 NaN or .+ the first \(-inf\)"),
}


def doors_and_bad_data():
    for door in DOORS:
        for name in BAD:
            reads_nothing = door in READ_NO_VALUES and name in {"NaN", "infinity"}
            if not reads_nothing and not (door in TAKE_ANY_DTYPE and name == "float32"):
                yield pytest.param(door, name, id=f"{door}-{name}")


@pytest.mark.parametrize(("door", "bad"), list(doors_and_bad_data()))
def test_bad_data_are_refused_at_the_door_before_anything_runs(door, bad, counted):
    x, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        DOORS[door](counted, x)
    assert counted.calls == 0


@pytest.mark.parametrize("door", DOORS)
def test_good_data_pass_and_the_counter_sees_them_run(door, counted):
    DOORS[door](counted, GOOD)
    assert counted.calls > 0


@pytest.mark.parametrize("door", sorted(TAKE_ANY_DTYPE))
def test_closed_forms_take_any_floating_dtype_to_float64(door, counted):
    single, double = (DOORS[door](counted, x) for x in (GOOD.float(), GOOD.float().double()))
    if door != "model.log_evidence":
        single, double = single.value, double.value
    assert single.dtype == torch.float64
    assert torch.equal(single, double)


# --- errors: bad options ---------------------------------------------------------------------------


def function_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


BAD_OPTIONS = {
    "unknown method": (
        {"method": "annealing"},
        ValueError,
        r"expected method to be one of \['.*'exact', .*'importance'.*\], got 'annealing'",
    ),
    "no guide": ({"method": "importance"}, ValueError, "expected a guide for method='importance', got none"),
    "level 1": ({"level": 1.0}, ValueError, "expected level between 0 and 1, got 1.0"),
    "level 95": ({"level": 95}, ValueError, "expected level between 0 and 1, got 95"),
    "no method": ({"method": 3}, TypeError, "expected a method or the name of one, got 3"),
    "tolerance 0": ({"tolerance": 0.0}, ValueError, "expected a positive finite tolerance, got 0.0"),
    "no time": ({"budget": -1.0}, ValueError, "expected a positive finite budget, got -1.0"),
    "no rows": ({"block": 0}, ValueError, "expected block to be at least 1, got 0"),
    "misplaced": ({"num_samples": 30}, TypeError, r"expected \['num_samples'\] in the method, as in method=Imp"),
    "no seed": ({"checkpoint": "file"}, ValueError, "expected a seed for an estimate with a checkpoint, got none"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_runs(name, counted):
    options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        evidence(counted.model, GOOD, **options)
    assert counted.calls == 0


@pytest.mark.parametrize(("num_samples", "error"), [(0, ValueError), (0.5, TypeError)])
def test_a_method_refuses_a_number_of_samples_that_is_none(num_samples, error):
    with pytest.raises(error, match=f"num_samples to be .+, got {num_samples}"):
        Importance(num_samples)


def test_a_closed_form_takes_no_arguments_but_the_data(counted):
    for args, kwargs in (((GOOD,), {}), ((), {"covariates": GOOD})):
        with pytest.raises(TypeError, match="expected no arguments beyond the data for method='exact', got"):
            evidence(counted.model, GOOD, *args, method="exact", **kwargs)
    assert counted.calls == 0


def test_a_model_without_closed_form_is_named_with_the_way_out():
    with pytest.raises(TypeError, match=r"log_evidence\(x\) or discrete latents .* for method='exact', got function"):
        evidence(function_model, GOOD, method="exact")


@pytest.mark.parametrize("method", ["auto", "adaptive", "annealed", "laplace", "quadrature"])
def test_a_guide_in_place_of_the_model_has_no_evidence(method):
    guide, x = MeanField(4, 2).double(), torch.zeros(3, 4).double()
    with pytest.raises(ValueError, match="expected a model that observes data, got one of latent sites alone"):
        evidence(guide, x, method=method, progress=False)


def test_a_function_pair_has_importance_evidence():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 1.0))

    got = importance(function_model, guide, GOOD, num_samples=5000)
    truth = scipy.stats.norm.logpdf(GOOD[:, 0].numpy(), 0, math.sqrt(2))
    assert got.guarantee == (ASYMPTOTIC,) * 4
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


def test_a_refinement_is_logged(caplog):
    model = random_model()
    guide, x = rescaled(model, 1.1), model(n=5).detach()
    with caplog.at_level("INFO"):
        evidence(model, x, guide=guide, method=Importance(20), tolerance=1e-3, seed=0, progress=False)
    assert "5 of 5 intervals are wider than the tolerance: refined by Importance(num_samples=80" in caplog.text


@pytest.mark.parametrize(
    ("method", "tolerance", "module", "search"),
    [
        (Quadrature(tolerance=0.1), 1e-4, adaptive_quadrature, "search_modes"),
        (Quadrature(tolerance=0.1), 1e-4, adaptive_quadrature, "importance_estimate"),
        (Adaptive(200), 0.02, adaptive_mixture, "first_mixture"),
    ],
    ids=["quadrature", "its check", "adaptive"],
)
def test_refinements_keep_the_modes_and_the_check_of_the_first(method, tolerance, module, search, monkeypatch):
    """One search for all of them, also where some rows alone are refined; and one check, to convince once."""
    torch.manual_seed(0)
    model, x = LinearVAE(5, 2).double(), 3 * torch.randn(12, 5).double()
    counted, original = [], getattr(module, search)
    monkeypatch.setattr(module, search, lambda *a, **k: (counted.append(1), original(*a, **k))[1])
    got = evidence(model, x, method=method, tolerance=tolerance, seed=0, progress=False)
    assert len(counted) == 1
    assert got.evaluations > evidence(model, x, method=method, seed=0, progress=False).evaluations
    truth = model.log_evidence(x)
    assert bool(((got.value - truth).abs() < torch.clamp(4 * got.standard_error, min=tolerance)).all())
