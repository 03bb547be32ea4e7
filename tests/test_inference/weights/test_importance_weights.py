"""Importance weights and what is read off them, against NumPy, SciPy, ArviZ and brute-force repetition."""

import dataclasses
import math
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from registry import GUIDES, MODELS, data_for, for_models_with
from scipy.special import logsumexp

from guides import Exact, MeanField
from inference import (
    effective_sample_size,
    elbo,
    iter_log_weights,
    iwae,
    log_weights,
    memory_limit,
    pareto_k,
    summarise,
)
from inference.core.estimates import Estimate
from inference.core.protocols import SupportsLogEvidence, SupportsPosterior
from inference.weights.summary import merge
from zoo import PPCA, LinearVAE, digits

READINGS = {"elbo": elbo, "iwae": iwae, "effective_sample_size": effective_sample_size, "pareto_k": pareto_k}
LOG_ZERO = -math.inf


def normal_weights(num_samples, num_data=5, *, sd=0.5, offset=0.0, seed=0):
    return torch.from_numpy(offset + sd * np.random.RandomState(seed).standard_normal((num_samples, num_data)))


def pareto_weights(num_samples, num_data=5, *, k=0.3, seed=0):
    """Log weights whose tail is exactly Pareto: exceedances of any threshold have shape k."""
    return torch.from_numpy(-k * np.log(np.random.RandomState(seed).random_sample((num_samples, num_data))))


def some_zero_weights(num_samples):
    weights = normal_weights(num_samples)
    weights[::7, 1] = LOG_ZERO
    weights[1:, 2] = LOG_ZERO
    return weights


MATRICES = {
    "light tails": normal_weights(300),
    "heavy tails": normal_weights(300, sd=3.0),
    "far below": normal_weights(300, offset=-1e5),
    "far above": normal_weights(300, offset=1e5),
    "two samples": normal_weights(2),
    "zero weights": some_zero_weights(300),
}


@pytest.fixture(params=MATRICES, ids=list(MATRICES))
def matrix(request):
    return MATRICES[request.param]


def rounding(matrix, factor=1.0):
    """Error of sums of log weights in float64: eps times their magnitude, times a few operations."""
    finite = matrix[torch.isfinite(matrix)]
    return factor * 16 * np.finfo(float).eps * max(1.0, float(finite.abs().max()))


def assert_close(got, expected, tolerance):
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=tolerance, atol=tolerance)


def random_chunks(matrix, seed=0):
    """The rows of a matrix in chunks of random sizes."""
    random = np.random.RandomState(seed)
    cuts = np.unique(random.randint(1, max(2, len(matrix)), size=6))
    return [chunk for chunk in torch.tensor_split(matrix, cuts.tolist()) if len(chunk)]


# --- reductions against NumPy ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's own inf - inf, below
def test_elbo_is_the_mean_and_its_error_that_of_a_mean(matrix):
    value, error = elbo(matrix)
    w = matrix.numpy()
    expected = w.std(0, ddof=1) / math.sqrt(len(w))
    assert_close(value, w.mean(0), rounding(matrix))
    assert_close(error, np.where(np.isnan(expected), math.inf, expected), rounding(matrix, 10))


def test_iwae_is_the_log_mean_weight_and_its_error_the_delta_method(matrix):
    value, error = iwae(matrix)
    expected = logsumexp(matrix.numpy(), axis=0) - math.log(len(matrix))
    relative = np.exp(matrix.numpy() - expected)  # weights over their mean
    assert_close(value, expected, rounding(matrix))
    assert_close(error, relative.std(0, ddof=1) / math.sqrt(len(matrix)), rounding(matrix, 10))


@pytest.mark.parametrize("num_particles", [1, 2, 10, 100])
def test_grouped_iwae_averages_independent_bounds(num_particles):
    matrix = normal_weights(600, sd=1.5)
    value, error = iwae(matrix, num_particles)
    groups = matrix.numpy().reshape(-1, num_particles, matrix.shape[1])
    bounds = logsumexp(groups, axis=1) - math.log(num_particles)
    assert_close(value, bounds.mean(0), 1e-12)
    assert_close(error, bounds.std(0, ddof=1) / math.sqrt(len(bounds)), 1e-12)


def test_grouped_iwae_of_one_is_the_elbo_of_all_the_log_mean_weight():
    matrix = normal_weights(50)
    assert_close(iwae(matrix, 1).value, elbo(matrix).value.numpy(), 1e-12)
    assert_close(iwae(matrix, 50).value, iwae(matrix).value.numpy(), 1e-12)
    assert bool((iwae(matrix, 50).standard_error == math.inf).all())


def test_grouped_iwae_wants_groups_of_one_size():
    with pytest.raises(ValueError, match="expected num_particles to divide S = 10, got 3"):
        iwae(normal_weights(10), 3)


def test_effective_sample_size_is_that_of_kish(matrix):
    value, error = effective_sample_size(matrix)
    w = np.exp(matrix.numpy() - matrix.numpy().max(0))
    size = w.sum(0) ** 2 / (w**2).sum(0)
    influence = 2 * w / w.mean(0) - w**2 / (w**2).mean(0) - 1
    assert_close(value, size, rounding(matrix, 10))
    # The influence is a difference of moments of order one: rounding enters under the root.
    np.testing.assert_allclose(
        error.numpy(), size * np.sqrt((influence**2).mean(0) / len(w)), rtol=1e-6, atol=len(w) * rounding(matrix) ** 0.5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reductions_are_computed_in_float64(dtype):
    matrix = normal_weights(400, offset=-1e5).to(dtype)
    for read in READINGS.values():
        assert_close(read(matrix).value, read(matrix.double()).value.numpy(), 0.0)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, 4), [[0.0]]], ids=repr)
@pytest.mark.parametrize("read", READINGS.values(), ids=list(READINGS))
def test_reductions_want_a_matrix(read, bad):
    with pytest.raises(ValueError, match=r"expected log weights of shape \(S, N\), got"):
        read(bad)


# --- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, -163.2, -1e5, 1e5])
@pytest.mark.parametrize("num_samples", [2, 24, 25, 1000])
def test_equal_weights_are_exact_and_have_no_tail(num_samples, offset):
    summary = summarise([torch.full((num_samples, 3), offset, dtype=torch.float64)], num_samples)
    tolerance = 16 * np.finfo(float).eps * max(1.0, abs(offset))
    for estimate, value in ((summary.elbo, offset), (summary.iwae, offset)):
        assert_close(estimate.value, value, tolerance)
        assert bool((estimate.standard_error <= math.sqrt(tolerance)).all())
    assert_close(summary.effective_sample_size.value, num_samples, 10 * tolerance)
    assert bool((summary.pareto_k.value == -math.inf).all())


def drawn_states(num_states, num_samples=10_000):
    """Weights of a discrete latent: one value for each of its states, (S, 3)."""
    value = torch.randn(num_states, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return value[torch.randint(num_states, (num_samples, 3))]


@pytest.mark.parametrize("num_states", [2, 5, 20])
@pytest.mark.parametrize("offset", [0.0, -500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_of_few_repeated_weights_are_not_fitted(num_states, offset, dtype):
    matrix = (offset + drawn_states(num_states)).to(dtype)
    assert bool((pareto_k(matrix).value == math.inf).all())


def test_one_weight_of_another_size_breaks_equality():
    matrix = torch.zeros(10_000, 2, dtype=torch.float64)
    matrix[0, 1] = -3.0
    assert pareto_k(matrix).value.tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("sd", [1e-1, 1e-2, 1e-3])
def test_weights_rounded_to_single_precision_are_no_ties(sd):
    matrix = -500 + sd * torch.randn(10_000, 3, dtype=torch.float64)
    exact, rounded = pareto_k(matrix), pareto_k(matrix.float())
    assert bool(exact.value.isfinite().all())
    assert bool(((rounded.value - exact.value).abs() < exact.standard_error).all())


def test_one_sample_has_no_error():
    summary = summarise([torch.tensor([[-3.0, LOG_ZERO]], dtype=torch.float64)], 1)
    for estimate in (summary.elbo, summary.iwae):
        assert estimate.value.tolist() == [-3.0, LOG_ZERO]
        assert estimate.standard_error.tolist() == [math.inf, math.inf]
    assert float(summary.effective_sample_size.value[0]) == 1.0
    assert float(summary.effective_sample_size.standard_error[0]) == math.inf


def test_zero_weights_make_the_elbo_infinite_and_leave_the_iwae():
    matrix = some_zero_weights(100)
    summary = summarise([matrix], 100)
    assert torch.isneginf(summary.elbo.value).tolist() == [False, True, True, False, False]
    assert (summary.elbo.standard_error == math.inf).tolist() == [False, True, True, False, False]
    assert_close(summary.iwae.value[2], float(matrix[0, 2]) - math.log(100), 1e-14)
    assert_close(summary.effective_sample_size.value[2], 1.0, 1e-14)


@pytest.mark.parametrize("num_samples", [30, 100, 1000])
def test_zero_weights_are_not_taken_for_equal_weights(num_samples):
    matrix = some_zero_weights(num_samples)[:, :2]
    assert_close(pareto_k(matrix).value, arviz_k(matrix), 1e-12)
    # One weight among zeros is the heaviest tail there is.
    assert float(pareto_k(some_zero_weights(num_samples)).value[2]) == math.inf


@pytest.mark.parametrize("num_samples", [30, 1000])
def test_weights_that_are_all_zero_estimate_nothing(num_samples):
    summary = summarise([torch.full((num_samples, 2), LOG_ZERO, dtype=torch.float64)], num_samples)
    assert bool(torch.isneginf(summary.iwae.value).all())
    assert bool((summary.iwae.standard_error == math.inf).all())
    assert bool((summary.effective_sample_size.value == 0).all())
    assert bool((summary.pareto_k.value == math.inf).all())


# --- k-hat against ArviZ ---------------------------------------------------------------------------


def arviz_k(matrix):
    """ArviZ's own k-hat of all samples, (N,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            import arviz

            return arviz.psislw(matrix.numpy().T)[1]
        # ArviZ 1.x takes minus the log weights, none of them infinite, and cuts the tail a draw earlier, by rounding
        # down: with five tails of the length in the paper, a small r_eff makes it a fifth of what it is given.
        tail = math.ceil(min(len(matrix) / 5, 3 * math.sqrt(len(matrix))))
        largest = np.sort(matrix.numpy().T)[:, -5 * tail :]
        return array_stats.psislw(-np.maximum(largest, largest[:, -1:] - 700), r_eff=1e-9, axis=-1)[1]


@pytest.mark.parametrize("num_samples", [30, 100, 225, 1000, 10_000])
@pytest.mark.parametrize("make", [normal_weights, pareto_weights])
def test_streaming_k_is_that_of_arviz_on_the_full_set(num_samples, make):
    matrix = make(num_samples)
    expected = arviz_k(matrix)
    assert bool(np.isfinite(expected).all())
    for chunks in ([matrix], matrix.split(7), random_chunks(matrix), random_chunks(matrix, seed=1)):
        assert_close(summarise(chunks, num_samples).pareto_k.value, expected, 1e-12)


def test_streaming_k_does_not_depend_on_the_order_of_the_samples():
    matrix = normal_weights(1000, sd=2.0)
    for ordered in (matrix.sort(0)[0], matrix.sort(0, descending=True)[0]):
        assert_close(summarise(ordered.split(50), 1000).pareto_k.value, arviz_k(matrix), 1e-12)


def test_below_30_samples_no_tail_is_fitted():
    assert bool((pareto_k(normal_weights(29)).value == math.inf).all())
    assert bool(torch.isfinite(pareto_k(normal_weights(30)).value).all())


@pytest.mark.parametrize("offset", [-1e5, 1e5])
def test_k_does_not_depend_on_the_offset(offset):
    matrix = normal_weights(1000)
    assert_close(pareto_k(matrix + offset).value, pareto_k(matrix).value.numpy(), 1e-7)


# --- standard errors against repetition ------------------------------------------------------------


def assert_spread(estimate, *, shrinkage=1.0):
    """The spread of 2000 repetitions, one a column, is the reported error, by a chi-square test at 1e-4."""
    repeats = len(estimate.value)
    statistic = (repeats - 1) * float(estimate.value.var() / estimate.standard_error.square().mean()) / shrinkage**2
    lower, upper = scipy.stats.chi2.ppf([5e-5, 1 - 5e-5], repeats - 1)
    assert lower < statistic < upper


REPEATED = {
    "elbo": lambda: elbo(normal_weights(1000, 2000, seed=2)),
    "iwae": lambda: iwae(normal_weights(1000, 2000, seed=2)),
    "iwae of groups of 10": lambda: iwae(normal_weights(1000, 2000, seed=2), 10),
    "effective sample size": lambda: effective_sample_size(normal_weights(1000, 2000, seed=2)),
}


@pytest.mark.parametrize("estimate", REPEATED.values(), ids=list(REPEATED))
def test_standard_errors_are_the_spread_of_repetitions(estimate):
    assert_spread(estimate())


@pytest.mark.parametrize("estimate", REPEATED.values(), ids=list(REPEATED))
def test_an_error_too_small_by_a_fifth_is_noticed(estimate):
    value, error = estimate()
    with pytest.raises(AssertionError):
        assert_spread(Estimate(value, 0.8 * error))


def test_error_of_k_is_the_spread_of_repetitions():
    # ArviZ draws k towards 1/2 with the weight of ten of the M = 300 tail draws, which shrinks the spread.
    assert_spread(pareto_k(pareto_weights(10_000, 400)), shrinkage=300 / 310)


# --- streaming -------------------------------------------------------------------------------------


def assert_same_summary(a, b, tolerance):
    assert a.num_samples == b.num_samples
    for name in READINGS:
        for x, y in zip(getattr(a, name), getattr(b, name)):
            # Errors are roots of differences: of rounding only the root's size can be asked.
            torch.testing.assert_close(x, y, rtol=1e-7, atol=math.sqrt(tolerance))
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.log_sums, b.log_sums, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.top.sort(0)[0], b.top.sort(0)[0], rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_in_any_chunking_equals_the_matrix(matrix, seed):
    chunks = random_chunks(matrix, seed)
    whole = summarise([matrix], len(matrix))
    assert_same_summary(summarise(chunks, len(matrix)), whole, rounding(matrix))
    assert_same_summary(summarise(iter(matrix.split(1)), len(matrix)), whole, rounding(matrix))


def test_merged_summaries_are_the_summary_of_all(matrix):
    for at in {1, len(matrix) // 2}:
        parts = [summarise([part], len(part)) for part in (matrix[:at], matrix[at:])]
        whole = summarise([matrix], len(matrix))
        assert_same_summary(merge(*parts), whole, rounding(matrix))
        assert_same_summary(merge(*reversed(parts)), whole, rounding(matrix))


def test_merging_ten_guides_keeps_k_exact():
    matrix = normal_weights(10_000, sd=2.0)
    merged = None
    for part in matrix.split(1000):
        summary = summarise([part], 1000)
        merged = summary if merged is None else merge(merged, summary)
    assert_close(merged.pareto_k.value, arviz_k(matrix), 1e-12)


@pytest.mark.parametrize("chunks", [[], [torch.zeros(3, 2)], [torch.zeros(3, 2)] * 2])
def test_summarise_counts_its_rows(chunks):
    with pytest.raises(ValueError, match=rf"expected 4 rows of log weights, got {3 * len(chunks)}"):
        summarise(chunks, 4)


MEMORY_SCRIPT = """
import re, torch
from guides import MeanField
from inference import iter_log_weights, log_weights, summarise
from zoo import LinearVAE

def peak():
    with open("/proc/self/status") as file:  # not ru_maxrss, which starts from that of the parent
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) // 1024

def growth(run):
    before = peak()
    run()
    return peak() - before

torch.manual_seed(0)
model, guide, x = LinearVAE(5, 2).double(), MeanField(5, 2).double(), torch.zeros(4, 5).double()

def stream(num_samples):
    return summarise(iter_log_weights(model, guide, x, num_samples=num_samples, chunk=10_000), num_samples)

def matrix(num_samples):
    return log_weights(model, guide, x, num_samples=num_samples, chunk=10_000)

stream(300_000)  # so many chunks that one is recorded, which holds its tensors
print(growth(lambda: stream(3_000_000)), growth(lambda: matrix(4_000_000)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_times_the_samples_cost_the_same_memory():
    script = [sys.executable, "-W", "ignore", "-c", MEMORY_SCRIPT]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120)
    stream, matrix = map(int, done.stdout.split())  # MiB
    assert stream < 24  # a stored matrix of them takes 96
    assert matrix > 64, "the control, four million samples kept in memory, was not seen"


# --- log weights of a pair -------------------------------------------------------------------------


def recording_pair(record):
    """A pair in float64 whose guide keeps what it drew."""

    def normal(loc, sigma):
        return dist.Normal(torch.as_tensor(loc, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(0.5, 2.0))
            pyro.sample("x", normal(z, 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            record.append(pyro.sample("z", normal(0.9 * x, 0.4)))

    return model, guide


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_log_weights_are_log_joint_minus_log_guide(chunk):
    record, x = [], torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    weights = log_weights(*recording_pair(record), x, num_samples=10, chunk=chunk)
    sizes = [10] if chunk is None else [min(chunk, 10 - at) for at in range(0, 10, chunk)]
    runs = [z.numpy().reshape(-1, 3) for z in record][-len(sizes) :]  # before them, a run to learn the plates
    assert [len(run) for run in runs] == sizes
    z, normal = np.concatenate(runs), scipy.stats.norm.logpdf
    expected = normal(z, 0.5, 2) + normal(x.numpy(), z, 0.3) - normal(z, 0.9 * x.numpy(), 0.4)
    assert_close(weights, expected, 1e-12)


def test_iter_log_weights_yields_chunks_without_gradient():
    model = LinearVAE(5, 2)
    chunks = list(iter_log_weights(model, MeanField(5, 2), torch.zeros(4, 5), num_samples=10, chunk=4))
    assert [tuple(chunk.shape) for chunk in chunks] == [(4, 4), (4, 4), (2, 4)]
    assert not any(chunk.requires_grad for chunk in chunks)


def test_weights_in_a_subsampled_plate_are_unscaled():
    def model(x):
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def exact(x):
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    expected = np.tile(scipy.stats.norm.logpdf(x.numpy(), 0, math.sqrt(2)), (5, 1))
    assert_close(log_weights(model, exact, x, num_samples=5), expected, 1e-6)  # sqrt(0.5) is a float32 in Pyro


@for_models_with(SupportsLogEvidence, SupportsPosterior)
def test_every_weight_of_the_exact_posterior_is_the_evidence(model):
    x = data_for(model)
    weights = log_weights(model, Exact(model), x, num_samples=50)
    assert float((weights - model.log_evidence(x).detach()).abs().max()) < 1e-9


def test_every_exact_weight_is_the_evidence_of_the_digits():
    x = digits(test_size=0).train
    model = PPCA.from_data(x, 8)
    evidence = model.log_evidence(x).detach()
    assert float((log_weights(model, Exact(model), x, num_samples=5) - evidence).abs().max()) < 1e-9
    # In float32 each of 64 squared residuals carries a few roundings of data up to 16 over sigma = 2.2.
    model, x = model.float(), x.float()
    single = log_weights(model, Exact(model), x, num_samples=5)
    assert single.dtype == torch.float32
    bound = 64 * np.finfo(np.float32).eps * 16 / float(model.sigma.detach()) * 4
    assert float((single - evidence).abs().max()) < bound


def p_same_distribution(a, b):
    """Bonferroni-corrected p-value that the columns of two matrices have the same distributions."""
    return min(scipy.stats.ks_2samp(p, q).pvalue for p, q in zip(a.T.numpy(), b.T.numpy())) * a.shape[1]


@pytest.mark.parametrize("guide", ["TiedMeanField", "Linear", "MeanField", "FullRank"])
def test_a_sample_at_a_time_has_the_distribution_of_all_at_once(guide):
    torch.manual_seed(3)
    model = MODELS["LinearVAE"]()
    guide, x = GUIDES[guide](model), data_for(model, 4)
    a, b = (log_weights(model, guide, x, num_samples=400, chunk=chunk) for chunk in (1, 400))
    assert p_same_distribution(a, b) > 1e-4
    assert p_same_distribution(a, b + b.std(0)) < 1e-6


def test_chunk_one_serves_a_model_that_cannot_broadcast():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.stack([z[i] for i in range(len(x))]), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.tensor([0.0, 1.0, 3.0])
    expected = scipy.stats.norm.logpdf(x.numpy(), 0, math.sqrt(2))
    weights = log_weights(model, guide, x, num_samples=6, chunk=1)
    np.testing.assert_allclose(weights, np.tile(expected, (6, 1)), rtol=1e-5)


@dataclasses.dataclass
class UnhashableModel:
    sigma: float
    observes: bool = False

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), self.sigma))
            if self.observes:
                pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


def test_a_dataclass_is_a_model_though_it_has_no_hash():
    x = torch.tensor([0.0, 1.0, 2.0])
    got = log_weights(UnhashableModel(2.0, observes=True), UnhashableModel(2.0), x, num_samples=5)
    torch.testing.assert_close(got, dist.Normal(0.0, 1.0).log_prob(x).expand(5, 3))


def test_swapped_halves_and_a_second_tensor_are_refused():
    model, guide, x = LinearVAE(5, 2), MeanField(5, 2, hidden=(4,)), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"expected a model that observes data, .* while the guide observes \['x'\]"):
        log_weights(guide, model, x, num_samples=2)
    with pytest.raises(TypeError, match=r"expected one tensor of data for LinearVAE, got a second one of shape \(4,\)"):
        log_weights(model, guide, x, torch.zeros(4), num_samples=2)


class _Constant(dist.Normal):
    """A standard normal that reports one log-density everywhere."""

    def __init__(self, value):
        super().__init__(torch.zeros(3), torch.ones(3))
        self._value = value

    def expand(self, *_, **__):
        return self

    def log_prob(self, value):
        return torch.tensor([0.0, self._value, 0.0]).expand(value.shape)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_density_that_breaks_down_names_the_datum(value):
    def model(_):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", _Constant(value), obs=torch.zeros(3))

    def guide(_):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(FloatingPointError, match="log weight of data point 1 is NaN or"):
        log_weights(model, guide, torch.zeros(3), num_samples=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "expected num_samples to be at least 1, got 0"),
        ({"num_samples": 2.0}, TypeError, "expected num_samples to be an integer, got 2.0"),
        ({"num_samples": True}, TypeError, "expected num_samples to be an integer, got True"),
        ({"num_samples": 3, "chunk": 0}, ValueError, "expected chunk to be at least 1, got 0"),
        ({"num_samples": 3, "plate": "rows"}, ValueError, "one vectorised plate 'rows' over the data"),
    ],
)
def test_unfit_options_are_named(options, error, message):
    model = LinearVAE(5, 2)
    with pytest.raises(error, match=message):
        log_weights(model, MeanField(5, 2), torch.zeros(4, 5), **options)


def test_a_scaled_density_is_no_importance_weight():
    model = LinearVAE(5, 2)
    with pytest.raises(ValueError, match="expected site 'z' to carry no scale but the plate's"):
        log_weights(poutine.scale(model, scale=0.5), MeanField(5, 2), torch.zeros(4, 5), num_samples=3)


def test_a_masked_datum_weighs_one():
    model = LinearVAE(5, 2)
    mask = torch.tensor([True, False, True, False])
    pair = [poutine.mask(half, mask=mask) for half in (model, MeanField(5, 2))]
    weights = log_weights(*pair, torch.ones(4, 5), num_samples=3)
    assert (weights == 0).all(0).tolist() == [False, True, False, True]


def test_rows_are_run_in_blocks_of_which_the_last_is_shorter():
    """Under the exact guide each weight is the evidence, whatever was drawn."""
    torch.manual_seed(0)
    model, x = LinearVAE(5, 2).double(), torch.randn(100, 5).double()
    with memory_limit(1), torch.no_grad():  # blocks of 64 rows
        got = log_weights(model, Exact(model), x, num_samples=3, seed=0, progress=False)
        torch.testing.assert_close(got, model.log_evidence(x).expand(3, -1))


@pytest.mark.parametrize(("chunk", "progress", "shown"), [(4, True, False), (2, True, True), (2, False, False)])
def test_a_bar_is_shown_where_it_is_asked_for_and_has_chunks(chunk, progress, shown, capsys):
    model = LinearVAE(5, 2)
    log_weights(model, Exact(model), torch.zeros(3, 5), num_samples=4, chunk=chunk, progress=progress)
    assert ("log weights" in capsys.readouterr().err) == shown


def test_rounding_of_large_log_weights_is_no_tail():
    """The largest weights differ by a billionth of a nat: a tail at one nat, and rounding at ten thousand."""
    tail, smaller = 1e-9 * pareto_weights(150), torch.full((150, 5), -1.0).double()
    assert bool(pareto_k(torch.cat([smaller, tail]) + 1).value.isfinite().all())
    assert bool((pareto_k(torch.cat([smaller, tail]) + 1e4).value == math.inf).all())
