"""Pairs of unusual form, each beside the evidence by a closed form: what is said of them holds, or is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from inference import (
    Adaptive,
    Annealed,
    Importance,
    Quadrature,
    compare,
    evidence,
    gap,
    log_weights,
    simulated_draws,
)
from inference.marginal_likelihood.automatic import Automatic

QUIET = {"seed": 0, "progress": False}
DOUBLE = {"dtype": torch.float64}
X = torch.tensor([0.2, 0.5, 2.0], **DOUBLE)


def normal(mean, variance):
    return dist.Normal(torch.tensor(mean, **DOUBLE), torch.tensor(variance, **DOUBLE).sqrt())


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def wide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def within(low, high):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x.new_full((len(x),), low), x.new_full((len(x),), high)))

    return guide


EVIDENCE = normal(0.0, 2.0).log_prob(X)


@pytest.mark.parametrize("method", ["importance", "smoothed"])
def test_a_guide_of_narrower_support_gives_a_lower_bound_alone(method):
    found = evidence(model, X, guide=within(0.0, 1.0), method=method, **QUIET)
    assert set(found.guarantee) == {"probabilistic"}
    assert bool((found.lower <= EVIDENCE).all())
    assert bool(found.upper.isinf().all())
    assert "support of 'z'" in found.notes[0]
    assert bool(evidence(model, X, guide=wide, method=method, **QUIET).upper.isfinite().all())


def test_compare_takes_the_widest_support_of_the_guides():
    narrow = {"narrow": within(0.0, 1.0)}
    alone = compare(model, narrow, X, num_samples=500, **QUIET)["train"]
    assert math.isinf(float(alone["evidence_upper"].min()))
    both = compare(model, {**narrow, "wide": wide}, X, num_samples=500, **QUIET)["train"]
    names = ("evidence", "evidence_se", "evidence_upper")
    value, error, upper = (torch.from_numpy(both[name].values).flatten(0, -2)[0] for name in names)
    assert bool(((value - EVIDENCE).abs() < 4 * error).all())
    assert bool(upper.isfinite().all())


def test_a_guide_that_leaves_the_support_gives_starts_alone():
    def half(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfNormal(x.new_ones(len(x))))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    # The posterior of a normal prior, twice the part above zero.
    truth = EVIDENCE + math.log(2) + torch.special.log_ndtr(X / 2**0.5)
    for method in (Adaptive(2000, 200, 3), "quadrature"):
        found = evidence(half, X, guide=wide, method=method, **QUIET)
        assert bool(((found.value - truth).abs() <= 4 * found.standard_error + 1e-6).all())


def test_a_pair_that_subsamples_is_refused_where_rows_have_names():
    def some(program):
        def part(x):
            with pyro.plate("data", 3, subsample_size=2) as index:
                program(x[index])

        return part

    def latent(x):
        pyro.sample("z", dist.Normal(x / 2, 0.8))

    def joint(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for door in (
        lambda: evidence(some(joint), X, guide=some(latent), method=Importance(50), **QUIET),
        lambda: compare(some(joint), {"own": some(latent)}, X, num_samples=50, **QUIET),
    ):
        with pytest.raises(ValueError, match="takes all its data, got a subsampling plate 'data'"):
            door()


@pytest.mark.parametrize("method", ["auto", "importance", "adaptive"])
def test_no_data_are_refused(method):
    with pytest.raises(ValueError, match="at least one data point, got none"):
        evidence(model, X[:0], guide=wide, method=method, **QUIET)


def test_a_delta_in_the_model_is_deterministic():
    def doubled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            twice = pyro.sample("twice", dist.Delta(2 * z))
            pyro.sample("x", dist.Normal(twice, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(8 * x / 17, (1 / 17) ** 0.5))

    truth = normal(0.0, 4.25).log_prob(X)
    torch.testing.assert_close(log_weights(doubled, guide, X, num_samples=3, **QUIET), truth.expand(3, -1))
    torch.testing.assert_close(evidence(doubled, X, **QUIET).value, truth, atol=1e-7, rtol=0.0)
    assert abs(float(gap(doubled, guide, X, num_samples=32, **QUIET).total.max())) < 1e-6
    assert list(simulated_draws(doubled, X, seed=0).latents) == ["z"]


def test_an_affine_transform_of_a_bounded_guide_has_a_density():
    def uniform(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(len(x)), 4 * x.new_ones(len(x))))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x):
        beta = dist.Beta(1 + 10 * x / 4, 1 + 10 * (1 - x / 4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(beta, [dist.transforms.AffineTransform(0.0, 4.0)]))

    truth = (torch.special.ndtr((4 - X) / 0.1) - torch.special.ndtr(-X / 0.1)).log() - math.log(4)
    found = evidence(uniform, X, guide=guide, method="importance", **QUIET)
    assert bool(((found.value - truth).abs() < 4 * found.standard_error).all())


class Network(nn.Module):
    """A decoder in float32 that makes its prior by ``torch.zeros``, without a dtype."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.linear(z), 0.3).to_event(1), obs=x)


def test_tensors_without_a_dtype_are_float64_in_converted_modules():
    network, x = Network(), torch.randn(4, 3)
    w, b = (p.detach().double() for p in network.linear.parameters())
    truth = dist.MultivariateNormal(b, w @ w.T + 0.09 * torch.eye(3, **DOUBLE)).log_prob(x.double())
    found = evidence(network, x, **QUIET).value
    assert float((found - truth).abs().max()) < 1e-6
    assert torch.get_default_dtype() == torch.float32
    assert network.linear.weight.dtype == torch.float32


class Regression(PyroModule):
    """Weights with priors, as in Pyro's tutorial of Bayesian regression."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


@pytest.mark.parametrize("guided", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["guide", "no guide"])
@pytest.mark.filterwarnings("ignore:.*several samples side by side")
def test_weights_with_priors_are_integrated_out_in_float64(guided):
    x = torch.randn(8, 2)
    y = x @ torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(8)
    regression = Regression()
    guide = AutoDiagonalNormal(regression)
    guide(x, y)
    design = torch.cat([x, torch.ones(8, 1)], 1).double()
    covariance = design @ design.T + 0.25 * torch.eye(8, **DOUBLE)
    truth = float(dist.MultivariateNormal(torch.zeros(8, **DOUBLE), covariance).log_prob(y.double()))
    given = guide if guided else None
    found = evidence(regression, x, y, guide=given, method=Adaptive(4000, 500, 6), whole=True, **QUIET)
    assert abs(float(found.value) - truth) < 4 * float(found.standard_error)
    assert float(found.standard_error) < 0.05


# --- counts, branches, and latents that no look for modes reaches -----------------------------------------------------


@pytest.mark.parametrize("count", [5000, 3_000_000])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_counts_are_taken_in_the_precision_of_their_distribution(count, dtype):
    rate = torch.tensor(2 / count, **DOUBLE)

    def counted(x):
        with pyro.plate("data", len(x)):
            r = pyro.sample("r", dist.Gamma(torch.full((len(x),), 2.0, **DOUBLE), rate))
            pyro.sample("x", dist.Poisson(r), obs=x)

    found = evidence(counted, torch.tensor([count], dtype=dtype), **QUIET)
    truth = dist.GammaPoisson(torch.tensor(2.0, **DOUBLE), rate).log_prob(torch.tensor(float(count), **DOUBLE))
    assert found.guarantee == ("numerical",)
    assert abs(float(found.value) - float(truth)) < 1e-6


def test_a_sum_over_discrete_latents_of_counts_is_exact():
    count = 3_000_000
    rates = count * torch.tensor([1.0, 1.001], **DOUBLE)

    def counted(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(x),), 0.5, **DOUBLE)))
            pyro.sample("x", dist.Poisson(rates[0] + (rates[1] - rates[0]) * k), obs=x)

    found = evidence(counted, torch.tensor([count]), **QUIET)
    truth = dist.Poisson(rates).log_prob(torch.tensor(float(count), **DOUBLE)).logsumexp(0) - math.log(2)
    assert found.guarantee == ("exact",)
    assert abs(float(found.value) - float(truth)) < 1e-6


def branching(threshold):
    """A latent that is made only where another is large."""

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0)) if z > threshold else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    return model


def branching_guide(x):
    if pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)) > 0.0:
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))


@pytest.mark.filterwarnings("ignore:.* does not run on several samples")
@pytest.mark.parametrize(
    "measure",
    [
        lambda: evidence(branching(0.0), X, whole=True, **QUIET),
        lambda: evidence(branching(1.0), X, whole=True, method=Annealed(20, num_chains=40), **QUIET),
        lambda: log_weights(branching(0.0), branching_guide, X, num_samples=50, whole=True, **QUIET),
        lambda: compare(branching(0.0), {"g": branching_guide}, X, whole=True, **QUIET),
    ],
    ids=["evidence", "annealed", "log_weights", "compare"],
)
def test_latents_of_some_runs_alone_are_refused(measure):
    with pytest.raises(ValueError, match="the same sample sites in every run, got 'w' in some alone"):
        measure()


def test_a_whole_data_set_that_needs_too_many_cells_is_sampled():
    torch.manual_seed(0)
    rows = torch.randn(12, 3, **DOUBLE)
    labels = (rows.sum(-1) > 0).double()

    def steps(rows, labels):
        weights = pyro.sample("w", dist.Normal(rows.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(rows)):
            chance = torch.where((rows * weights).sum(-1) > 0, 0.9, 0.1).double()
            pyro.sample("y", dist.Bernoulli(chance), obs=labels)

    method = Automatic(quadrature=Quadrature(max_cells=1000))
    found = evidence(steps, rows, labels, whole=True, method=method, **QUIET)
    draws = torch.randn(400_000, 3, generator=torch.Generator().manual_seed(1), **DOUBLE)
    right = ((draws @ rows.T > 0) == (labels > 0)).sum(-1)
    values = 0.9**right * 0.1 ** (12 - right)
    assert "too few" in found.notes[0]
    error = math.hypot(float(found.standard_error), float(values.std() / values.mean()) / math.sqrt(len(values)))
    assert abs(float(found.value) - float(values.mean().log())) < 5 * error
    assert error < 0.05


def either(x):
    """Two switches of which one alone is on: either of them, as likely."""
    with pyro.plate("data", len(x)):
        chance = torch.full((len(x),), 0.5, **DOUBLE)
        first, second = pyro.sample("a", dist.Bernoulli(chance)), pyro.sample("b", dist.Bernoulli(chance))
        pyro.sample("x", dist.Normal((first - second).square(), 0.1), obs=x)


def the_first(x):
    with pyro.plate("data", len(x)):
        odds = torch.full((len(x),), 12.0, **DOUBLE)
        pyro.sample("a", dist.Bernoulli(logits=odds))
        pyro.sample("b", dist.Bernoulli(logits=-odds))


def one_of_two(x):
    """Switches as one vector, which no enumeration sums out."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((len(x), 2), 0.5, **DOUBLE)).to_event(1))
        pyro.sample("x", dist.Normal((z[..., 0] - z[..., 1]).square(), 0.1), obs=x)


def the_first_of_two(x):
    with pyro.plate("data", len(x)):
        odds = torch.tensor([12.0, -12.0], **DOUBLE).expand(len(x), 2)
        pyro.sample("z", dist.Bernoulli(logits=odds).to_event(1))


@pytest.mark.parametrize(("model", "guide"), [(either, the_first), (one_of_two, the_first_of_two)])
def test_equal_weights_of_discrete_draws_bound_from_below_alone(model, guide):
    x = torch.ones(3, **DOUBLE)
    truth = evidence(either, x, **QUIET).value
    found = evidence(model, x, guide=guide, method=Importance(1000), **QUIET)
    assert found.guarantee == ("probabilistic",) * 3
    assert found.upper.isinf().all()
    assert (found.lower < truth).all()
    assert "no draw took" in found.notes[0]
    row = compare(model, {"one": guide}, x, **QUIET)["train"].sel(guide="one", seed=0)
    assert (row["evidence_upper"].values == math.inf).all()


def test_discrete_latents_that_the_guide_leaves_out_stay_exact():
    def nothing(x):
        pass

    found = evidence(either, torch.ones(2, **DOUBLE), guide=nothing, method=Importance(10), **QUIET)
    torch.testing.assert_close(found.value, evidence(either, torch.ones(2, **DOUBLE), **QUIET).value)
    assert found.upper.isfinite().all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_float32_function_sums_within_its_rounding(seed):
    chances, means = torch.tensor([0.3, 0.7]), torch.tensor([999.0, 1001.0])

    def chosen(x):
        k = pyro.sample("k", dist.Categorical(chances))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(means[k], 5.0), obs=x)

    x = 1000 + 5 * torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
    found = evidence(chosen, x, whole=True, **QUIET)
    terms = dist.Normal(means.double(), 5.0).log_prob(x.double().unsqueeze(-1)).sum(0)
    truth = float((chances.double().log() + terms).logsumexp(0))
    assert found.guarantee == ("numerical",)
    assert float(found.lower) <= truth <= float(found.upper)
    assert float(found.upper - found.lower) < 0.1


@pytest.mark.parametrize("seed", range(10))
def test_terms_that_cancel_are_within_their_own_rounding(seed):
    """Densities of e^41 and of e^-41, whose logs nearly sum to zero."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.cat([torch.full((30,), 1e-18), torch.ones(30)])
    noise = torch.randn(60, generator=generator)
    x = torch.where(scales < 1, noise * scales, 9 + 0.05 * noise)

    def switched(x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0 * k, scales), obs=x)

    found = evidence(switched, x, whole=True, **QUIET)
    truth = float(dist.Normal(0.0, scales.double()).log_prob(x.double()).sum())
    assert found.guarantee == ("numerical",)
    assert float(found.lower) <= truth <= float(found.upper)
    assert float(found.upper - found.lower) < 0.01


@pytest.mark.parametrize("value", [1.0, 2e-33])  # of a log density of minus infinity, and of NaN
def test_a_float32_function_that_underflows_says_nothing(value):
    def underflowing(x):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0 * k, 1e-33), obs=x)

    found = evidence(underflowing, torch.tensor([value]), whole=True, **QUIET)
    assert found.guarantee == ("probabilistic",)
    assert (found.lower, found.upper) == (-math.inf, math.inf)
