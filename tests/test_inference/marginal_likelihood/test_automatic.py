"""The choice of a method, and what the door does around every method: blocks, tolerance, budget, resuming."""

import copy
import itertools
import math
import time
from contextlib import nullcontext
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from registry import data_for

from guides import Exact, FullRank, MeanField
from inference import Adaptive, Annealed, Importance, Quadrature, evidence, gap
from inference.marginal_likelihood.automatic import Automatic
from inference.marginal_likelihood.base.intervals import without_upper_end
from inference.marginal_likelihood.base.method import Method
from inference.marginal_likelihood.base.result import ASYMPTOTIC, EXACT, NUMERICAL, PROBABILISTIC
from zoo import DeepGaussianVAE, LinearVAE

COUNTS = torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0], dtype=torch.float64)
ADAPTED = Automatic(adaptive=Adaptive(2000))
# So few samples show no tail, so that everything is annealed.
ANNEALED = Automatic(adaptive=Adaptive(20), annealed=Annealed(num_temperatures=50, num_chains=8))


def linear(latent_dim=2, sigma=0.5):
    return LinearVAE(5, latent_dim, sigma=sigma).double().requires_grad_(False)


def test_a_closed_form_is_taken_after_a_look_at_three_data():
    model = linear()
    got = evidence(model, data_for(model), seed=0)
    assert got.guarantee == (EXACT,) * 20
    assert torch.equal(got.value, model.log_evidence(data_for(model)))


@pytest.mark.parametrize(("first", "refused"), [(2, True), (3, False)])
def test_the_first_three_data_points_alone_are_looked_at(first, refused):
    class WrongFrom(LinearVAE):
        def log_evidence(self, x):
            return super().log_evidence(x) + (torch.arange(len(x)) >= first)

    model = WrongFrom(5, 2, sigma=0.5).double().requires_grad_(False)
    with pytest.raises(ValueError, match="at data point 2") if refused else nullcontext():
        evidence(model, data_for(linear()))


@pytest.mark.parametrize("off", [1e-4, 3.0])
def test_a_closed_form_that_disagrees_with_its_own_model_is_refused(off):
    class Wrong(LinearVAE):
        def log_evidence(self, x):
            return super().log_evidence(x) + off

    model = Wrong(5, 2, sigma=0.5).double().requires_grad_(False)
    with pytest.raises(ValueError, match=r"expected log_evidence of Wrong to agree with log p\(x, z\) - log p\(z \| x"):
        evidence(model, data_for(linear()))


@pytest.mark.parametrize(("factor", "refused"), [(0.95, False), (1.05, True)])
def test_a_closed_form_may_be_off_by_rounding_alone(factor, refused):
    """By a millionth of a nat and of its own size."""

    class Rounded(LinearVAE):
        def log_evidence(self, x):
            exact = super().log_evidence(x)
            return exact + factor * 1e-6 * (1 + exact.abs())

    model = Rounded(5, 2, sigma=0.5).double().requires_grad_(False)
    with pytest.raises(ValueError, match="expected log_evidence of Rounded") if refused else nullcontext():
        evidence(model, torch.zeros(3, 5).double())


def test_a_closed_form_of_a_model_of_one_sample_at_a_time_is_checked():
    class OneByOne(LinearVAE):
        off = 0.0

        def likelihood(self, z):
            if z.dim() > 2:
                raise RuntimeError(f"expected (N, K), got {tuple(z.shape)}")
            return super().likelihood(z)

        def log_evidence(self, x):
            return super().log_evidence(x) + self.off

    model = OneByOne(5, 2, sigma=0.5).double().requires_grad_(False)
    x = data_for(linear())
    assert torch.equal(evidence(model, x).value, model.log_evidence(x))
    model.off = 1e-3
    with pytest.raises(ValueError, match="expected log_evidence of OneByOne to agree"):
        evidence(model, x)


@pytest.mark.parametrize("sigma", [1e-4, 1.0, 100.0])
def test_a_right_closed_form_passes_at_every_noise(sigma):
    model = linear(sigma=sigma)
    x = model(n=6).detach()
    assert torch.equal(evidence(model, x, seed=0).value, model.log_evidence(x))


def test_few_dimensions_are_integrated():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), 2.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    got = evidence(model, COUNTS, seed=0, progress=False)
    truth = torch.tensor([scipy.stats.nbinom.logpmf(c, 3, 2 / 3) for c in COUNTS.tolist()])
    assert got.guarantee == (NUMERICAL,) * 5
    torch.testing.assert_close(got.value, truth, atol=1e-8, rtol=0)


class ShortOfCells(Quadrature):
    """For every second data point."""

    def attempt(self, problem):
        found, _ = super().attempt(problem)
        short = torch.arange(len(found.value)) % 2 == 1
        return without_upper_end(found, short), short


@pytest.mark.parametrize("dim", [2, 3])
def test_data_that_quadrature_has_too_few_cells_for_are_sampled(dim):
    model = linear(dim, sigma=0.3)
    x = model(n=6).detach()
    method = replace(ADAPTED, quadrature=ShortOfCells(tolerance=1e-2))
    got = evidence(Plain(model), x, method=method, seed=0, progress=False)
    assert got.method == "quadrature and adaptive"
    assert got.guarantee == (NUMERICAL, ASYMPTOTIC) * 3
    assert all(note.startswith("1000000 cells of quadrature were too few; adaptive: 1 m") for note in got.notes[1::2])
    assert set(got.notes[::2]) == {""}
    error = (got.value - model.log_evidence(x)).abs()
    assert (error[::2] < 1e-2).all()
    assert (error[1::2] < 4 * got.standard_error[1::2]).all()


def test_too_few_cells_in_earnest_leave_an_interval_with_two_ends():
    model = linear(3, sigma=0.3)
    x = model(n=4).detach()
    few = Quadrature(tolerance=1e-2, max_cells=10)
    assert evidence(Plain(model), x, method=few, seed=0, progress=False).guarantee == (PROBABILISTIC,) * 4
    got = evidence(Plain(model), x, method=replace(ADAPTED, quadrature=few), seed=0, progress=False)
    assert got.guarantee == (ASYMPTOTIC,) * 4
    assert ((got.value - model.log_evidence(x)).abs() < 4 * got.standard_error).all()


class Plain:
    """A linear model without its closed form."""

    def __new__(cls, model):
        return lambda x: model(x)


@pytest.mark.parametrize("with_guide", [False, True])
def test_many_dimensions_are_sampled_adaptively(with_guide):
    model = linear(5, sigma=0.3)
    x = model(n=12).detach()
    guide = MeanField(5, 5, hidden=(8,)).double() if with_guide else None
    got = evidence(Plain(model), x, method=ADAPTED, guide=guide, seed=0, progress=False)
    assert got.method == "adaptive"
    assert got.guarantee == (ASYMPTOTIC,) * 12
    assert ((got.value - model.log_evidence(x)).abs() < 4 * got.standard_error).all()
    assert all(note.startswith("adaptive: 1 modes found from ") for note in got.notes)


def test_what_adaptive_sampling_leaves_open_is_annealed_as_well():
    model = linear(5, sigma=0.3)
    x = model(n=12).detach()
    got = evidence(Plain(model), x, method=ANNEALED, seed=0, progress=False)
    assert got.method == "adaptive and annealed"
    assert got.guarantee == (PROBABILISTIC,) * 12
    assert (got.lower < model.log_evidence(x)).all()
    assert got.mean.lower < float(model.log_evidence(x).mean())
    # each of the two bears half of the risk
    alone = evidence(Plain(model), x, method=ANNEALED.adaptive, seed=0, progress=False)
    assert (got.lower >= alone.raw_lower - math.log(40) - 1e-12).all()
    for note in got.notes:
        assert note.startswith("adaptive without an upper end: 1 modes found")
        assert note.endswith("annealed: the weights show no variance")
    assert "no upper end" in str(got)


def opened_second(monkeypatch, worth):
    """Adaptive sampling denies the second data point an upper end; its draws are worth some number."""
    original = Adaptive.estimate

    def open_second(self, problem):
        second = torch.tensor([False, True, False, False])
        found = without_upper_end(original(self, problem), second)
        return replace(found, effective_sample_size=torch.where(second, worth, found.effective_sample_size))

    monkeypatch.setattr(Adaptive, "estimate", open_second)


def test_only_data_points_left_open_are_annealed(monkeypatch):
    model = linear(5, sigma=0.3)
    x = model(n=4).detach()
    opened_second(monkeypatch, worth=50.0)
    method = Automatic(adaptive=Adaptive(2000), annealed=Annealed(200, 16))  # with errors of .2 nats
    got = evidence(Plain(model), x, method=method, seed=0, progress=False)
    assert got.guarantee == (ASYMPTOTIC, PROBABILISTIC, ASYMPTOTIC, ASYMPTOTIC)
    assert ["annealed:" in note for note in got.notes] == [False, True, False, False]
    assert (got.value - model.log_evidence(x)).abs().max() < 0.5


@pytest.mark.parametrize("num_chains", [8, 40])
def test_a_few_chains_are_not_run_where_k_hat_alone_is_in_doubt(num_chains, monkeypatch):
    """They have no upper end, and their lower one is Markov's as well; of more of them k-hat is known."""
    model = linear(5, sigma=0.3)
    x = model(n=4).detach()
    opened_second(monkeypatch, worth=1900.0)
    method = Automatic(adaptive=Adaptive(2000), annealed=Annealed(50, num_chains))
    got = evidence(Plain(model), x, method=method, seed=0, progress=False)
    assert ["annealed:" in note for note in got.notes] == [False, num_chains == 40, False, False]
    assert (got.lower <= model.log_evidence(x)).all()
    if num_chains == 8:
        assert got.method == "adaptive"
        assert got.guarantee[1] == PROBABILISTIC
        assert got.lower[1] == pytest.approx(float(got.raw_lower[1]) - math.log(20))
        assert "k-hat alone denies an upper end" in got.notes[1]


def test_a_refinement_changes_every_method_that_it_repeats(monkeypatch):
    """Quadrature of a posterior that needs more cells than it has: each time with more, and a finer tolerance."""
    seen, original = [], Quadrature.attempt

    def noted(self, problem):
        seen.append((self.max_cells, self.tolerance))
        return original(self, problem)

    monkeypatch.setattr(Quadrature, "attempt", noted)
    x = COUNTS.unsqueeze(-1)
    method = Automatic(quadrature=Quadrature(max_cells=2))
    got = evidence(Plain(linear(1)), x.expand(-1, 5), method=method, seed=0, tolerance=1e-4, progress=False)
    assert len(seen) > 1
    assert all(b[0] == 4 * a[0] and b[1] == pytest.approx(0.1 * a[1]) for a, b in itertools.pairwise(seen))
    assert got.guarantee == (NUMERICAL,) * 5
    finer = Automatic().refined()
    for name in ("adaptive", "annealed", "quadrature"):
        assert getattr(finer, name) == getattr(Automatic(), name).refined()


def test_a_density_that_adaptive_sampling_cannot_take_is_annealed():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 4), 1.0).to_event(1))
            pyro.factor("far", torch.where(z[..., 0] > 5.0, math.nan, 0.0 * z[..., 0]))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    got = evidence(model, COUNTS, method=Automatic(annealed=Annealed(50, 8)), seed=0, progress=False)
    assert got.method == "annealed"
    assert all("adaptive sampling failed (" in note for note in got.notes)
    truth = dist.Normal(0.0, math.sqrt(5.0)).log_prob(COUNTS)
    assert (got.lower < truth).all()


def test_a_function_with_one_global_latent_is_refused_by_name():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"inside one vectorised plate 'data' .* got model site 'mu' in plates \[\]"):
        evidence(model, COUNTS)


# --- the door --------------------------------------------------------------------------------------


def pair(latent_dim=2):
    model = DeepGaussianVAE(5, latent_dim, hidden=(8,)).double().requires_grad_(False)
    return model, FullRank(5, latent_dim, hidden=(8,)).double(), data_for(model, 30)


def test_blocks_join_to_the_whole_and_differ_in_their_noise():
    model, guide, x = pair()
    options = {"method": Importance(4000), "guide": guide, "seed": 0, "progress": False}
    whole, blocks = evidence(model, x, **options), evidence(model, torch.cat([x[:10]] * 3), block=10, **options)
    assert blocks.value.shape == (30,)
    assert blocks.num_samples == 4000
    same = whole.value[:10]
    for part in blocks.value.split(10):
        assert ((part - same).abs() < 6 * whole.standard_error[:10] + 0.05).all()
    first, second, _ = blocks.value.split(10)
    assert not torch.equal(first, second)


class Interrupt(Exception):
    pass


def test_an_interrupted_estimate_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    model, guide, x = pair()
    options = {"method": Importance(200), "guide": guide, "seed": 3, "block": 7, "progress": False}
    expected = evidence(model, x, **options)
    file = tmp_path / "evidence.safetensors"
    calls = []
    original = Importance.estimate

    def counted(self, problem):
        calls.append(len(problem.call.args[0]))
        if len(calls) == 4:
            raise Interrupt
        return original(self, problem)

    monkeypatch.setattr(Importance, "estimate", counted)
    with pytest.raises(Interrupt):
        evidence(model, x, checkpoint=file, **options)
    got = evidence(model, x, checkpoint=file, **options)
    assert calls == [7, 7, 7, 7, 7, 2]
    assert torch.equal(got.value, expected.value)
    assert got.guarantee == expected.guarantee
    with pytest.raises(ValueError, match="expected a checkpoint of this estimate"):
        evidence(model, x + 1, checkpoint=file, **options)
    with pytest.raises(ValueError, match="expected a checkpoint of this estimate"):
        evidence(model, x, checkpoint=file, **{**options, "seed": 4})


def test_a_tolerance_refines_the_data_that_need_it_and_no_others(monkeypatch):
    model = linear()
    x, near = data_for(model), copy.deepcopy(model)
    near.W.data *= 1.02  # its posterior is nearly the model's: light tails, some spread
    guide = Exact(near)
    rows = []
    original = Importance.estimate

    def counted(self, problem):
        rows.append((self.num_samples, len(problem.call.args[0])))
        return original(self, problem)

    monkeypatch.setattr(Importance, "estimate", counted)
    first = evidence(model, x, method=Importance(1000), guide=guide, seed=0)
    assert first.upper.isfinite().double().mean() > 0.5
    tol = float((first.upper - first.lower).quantile(0.4) / 2)
    rows.clear()
    got = evidence(model, x, method=Importance(1000), guide=guide, seed=0, tolerance=tol)
    assert [n for n, _ in rows] == [1000, 4000, 16_000, 64_000][: len(rows)]
    assert 0 < rows[1][1] < 20
    narrow = got.upper - got.lower <= 2 * tol
    assert narrow.double().mean() > 0.9
    kept = first.upper - first.lower <= 2 * tol
    assert torch.equal(got.value[kept], first.value[kept])
    rows.clear()
    evidence(model, x, method=Importance(100), guide=guide, seed=0, tolerance=1e-9, budget=1e-9)
    assert rows == [(100, 20)]  # no time: nothing is refined


def test_cost_is_told():
    model, guide, x = pair()
    got = evidence(model, x, method=Importance(300, search=False), guide=guide, seed=0)
    assert got.evaluations == 300
    assert 0 < got.seconds < 60
    assert math.isfinite(got.mean.standard_error)


def test_every_method_has_a_name_of_its_own_and_a_default():
    from inference.marginal_likelihood.estimate import METHODS

    for name, method in METHODS.items():
        assert issubclass(method, Method)
        assert method().name == name


# --- what a reviewer found -------------------------------------------------------------------------


def with_sigma(x, sigma=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, sigma), obs=x)


def with_sigma_guide(x, sigma=1.0):  # noqa: ARG001
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def other_model(x, sigma=1.0):
    with_sigma(x, 2 * sigma)


def test_a_checkpoint_is_bound_to_every_argument_and_the_model(tmp_path):
    file = tmp_path / "evidence.safetensors"
    options = {"method": Importance(50), "guide": with_sigma_guide, "seed": 0, "checkpoint": file}
    first = evidence(with_sigma, COUNTS, sigma=0.5, **options)
    assert torch.equal(evidence(with_sigma, COUNTS, sigma=0.5, **options).value, first.value)
    for model, sigma in ((with_sigma, 5.0), (other_model, 0.5)):
        with pytest.raises(ValueError, match="expected a checkpoint of this estimate"):
            evidence(model, COUNTS, sigma=sigma, **options)


def subsampling(x):
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def subsampling_guide(x):
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("z", dist.Normal(x[index], 1.0))


def test_a_model_that_subsamples_is_not_taken_apart():
    with pytest.raises(ValueError, match="expected a model of all rows of its first argument"):
        evidence(subsampling, COUNTS, method=Importance(50), guide=subsampling_guide, seed=0, block=2)
    with pytest.raises(ValueError, match="expected a pair that takes all its data, got a subsampling plate 'data'"):
        gap(subsampling, subsampling_guide, COUNTS, method=Importance(50), progress=False)


def test_a_guide_bound_to_its_data_goes_along_with_blocks():
    model, guide, x = pair()
    local = guide.local(x)
    got = evidence(model, x, method=Importance(4000), guide=local, seed=0, block=7, progress=False)
    truth = evidence(model, x, method="quadrature", progress=False)
    assert ((got.value - truth.value).abs() < 5 * got.standard_error + 0.05).all()
    with pytest.raises(ValueError, match="expected the data that the local guide was made for"):
        local.local(x.flip(0))


def test_a_budget_is_that_of_the_whole_estimate(monkeypatch):
    model, guide, x = pair()
    calls = []
    original = Importance.estimate

    def counted(self, problem):
        calls.append(self.num_samples)
        time.sleep(0.05)
        return original(self, problem)

    monkeypatch.setattr(Importance, "estimate", counted)
    options = {"method": Importance(100), "guide": guide, "seed": 0, "block": 10, "tolerance": 1e-9, "progress": False}
    evidence(model, x, budget=0.01, **options)
    assert calls == [100, 100, 100]


def test_a_budget_that_lasts_changes_nothing():
    model, guide, x = pair()
    options = {"method": Importance(20, search=False), "guide": guide, "seed": 0, "tolerance": 1e-9, "progress": False}
    got = evidence(model, x[:3], budget=1e6, **options)
    assert got.num_samples == 64 * 20
    assert torch.equal(got.value, evidence(model, x[:3], **options).value)


def test_a_two_sided_annealed_value_stays_in_its_own_interval():
    model = linear(5, sigma=0.5)
    x = model(n=6).detach()
    method = Automatic(adaptive=Adaptive(20), annealed=Annealed(num_temperatures=100, num_chains=200))
    got = evidence(Plain(model), x, method=method, guide=Exact(model), seed=0, progress=False)
    assert got.upper.isfinite().any()
    assert ((got.lower <= got.value) & (got.value <= got.upper)).all()


def test_a_closed_form_that_is_no_number_is_refused():
    class Broken(LinearVAE):
        def log_evidence(self, x):
            return super().log_evidence(x) * math.nan

    with pytest.raises(ValueError, match="expected log_evidence of Broken to agree"):
        evidence(Broken(5, 2).double().requires_grad_(False), torch.zeros(3, 5).double())


def test_blocks_of_one_setting_tell_the_most_samples():
    model, guide, x = pair()
    got = evidence(
        model, x, method=Importance(300, search=False), guide=guide, seed=0, block=10, tolerance=1e-3, progress=False
    )
    assert got.num_samples == 64 * 300
