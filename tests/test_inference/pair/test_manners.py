"""Several samples of a pair: side by side, as further rows, mapped or one by one, with the same numbers."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from inference import ELBO, Importance, LogJoint, compare, evidence, fit, gap, log_weights, refit
from inference.pair import draw
from inference.pair.call import Call
from inference.pair.handlers import isolated
from inference.pair.samples import AsRows, Mapped, OneByOne, SideBySide

QUIET = {"seed": 0, "progress": False}
X = torch.randn(5, 1, 4, 4, generator=torch.manual_seed(0), dtype=torch.float64)
Y = torch.randn(9, 2, generator=torch.manual_seed(1), dtype=torch.float64)
T = torch.randn(9, generator=torch.manual_seed(2), dtype=torch.float64)


class Pictures(nn.Module):
    """A linear decoder by transposed convolution behind .view, as in many published examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.conv, self.enc = nn.Linear(2, 8), nn.ConvTranspose2d(2, 1, 2, stride=2), nn.Linear(16, 2)
        self.double()

    def decode(self, z):
        return self.conv(self.lin(z).view(-1, 2, 2, 2))

    def model(self, x):
        pyro.module("pictures", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 0.5).to_event(3), obs=x)

    def guide(self, x):
        pyro.module("pictures", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.enc(x.flatten(1)), 0.9).to_event(1))

    def truth(self, x):
        f = self.decode(torch.eye(3, 2, dtype=torch.float64)).flatten(1).detach()
        w = (f[:2] - f[2]).T
        covariance = w @ w.T + 0.25 * torch.eye(16, dtype=torch.float64)
        return dist.MultivariateNormal(f[2], covariance).log_prob(x.flatten(1))


def regression(x, t):
    """No plate over what all data share, and x @ w, which takes one w alone."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("points", len(x)):
        pyro.sample("t", dist.Normal(x @ w, 0.5), obs=t)


def regression_guide(x, t):
    precision = 4 * x.T @ x + torch.eye(2, dtype=torch.float64)
    loc = torch.linalg.solve(precision, 4 * x.T @ t)
    pyro.sample("w", dist.MultivariateNormal(loc, precision_matrix=precision))


REGRESSION_TRUTH = dist.MultivariateNormal(0 * T, Y @ Y.T + 0.25 * torch.eye(9, dtype=torch.float64)).log_prob(T)


def test_pictures_behind_a_view_run_as_rows_with_one_warning():
    pair = Pictures()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = evidence(pair.model, X, guide=pair.guide, method=Importance(2000), **QUIET)
        evidence(pair.model, X, guide=pair.guide, method=Importance(10), **QUIET)
        gap(pair.model, pair.guide, X, method=Importance(50), num_samples=8, **QUIET)
        compare(pair.model, {"own": pair.guide}, X, num_samples=20, **QUIET)
        fit(pair.model, pair.guide, X, steps=2, objective=ELBO(3), **QUIET)
    said = [str(w.message) for w in caught if "several samples side by side" in str(w.message)]
    assert len(said) == 1
    assert "as further rows" in said[0]
    pair = Pictures()
    assert ((found.value - pair.truth(X)).abs() < 5 * found.standard_error).all()


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
@pytest.mark.parametrize("method", ["quadrature", "laplace"])
def test_pictures_have_the_evidence_of_their_closed_form(method):
    pair = Pictures()
    found = evidence(pair.model, X, method=method, **QUIET)
    torch.testing.assert_close(found.value, pair.truth(X), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
def test_every_manner_gives_the_densities_of_single_runs():
    pair = Pictures()
    call = Call(pair.model, pair.guide, (X,))
    first = call.probe()
    manners = [AsRows(1, -1, frozenset({0}), frozenset()), Mapped(1, frozenset()), OneByOne(1, frozenset())]
    values = {"z": torch.randn(3, 5, 2, dtype=torch.float64)}
    alone = torch.stack([call.run(values={"z": z}).log_joint[0] for z in values["z"]])
    for manner in manners:
        with isolated():
            run = manner.run(call, pair.model, values, 3)
        draw = type(first)(first.layout, 3, run.sites, {}, {}, call)
        torch.testing.assert_close(draw.log_joint, alone)


def test_a_program_that_mixes_its_samples_is_found_out():
    """It runs side by side without an error, and to another number."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + z.sum(0) * (z.dim() > 1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = T.clone()
    with pytest.warns(UserWarning, match="a sample's density depends on the samples beside it"):
        got = log_weights(model, guide, x, num_samples=6, **QUIET)
    truth = dist.Normal(0.0, 2**0.5).log_prob(x).expand(6, -1)
    torch.testing.assert_close(got, truth.to(got))


def test_a_pair_that_broadcasts_runs_side_by_side():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    manners = Call(model, model, (T,)).manners(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(manners.guide, SideBySide)
        assert isinstance(manners.model, SideBySide)


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
@pytest.mark.parametrize("method", ["auto", "laplace", "adaptive", "bridge", "importance", "defensive"])
def test_the_whole_data_set_has_the_evidence_of_its_closed_form(method):
    guide = regression_guide if method in ("importance", "defensive") else None
    settings = Importance(300) if method == "importance" else method
    found = evidence(regression, Y, T, guide=guide, method=settings, whole=True, **QUIET)
    assert found.value.shape == (1,)
    error = found.standard_error.nan_to_num(posinf=0.0)
    assert float((found.value - REGRESSION_TRUTH).abs()) < 1e-5 + 5 * float(error)


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
def test_weights_of_the_exact_posterior_of_the_whole_are_the_evidence():
    got = log_weights(regression, regression_guide, Y, T, num_samples=7, whole=True, **QUIET)
    torch.testing.assert_close(got, REGRESSION_TRUTH.expand(7, 1))
    columns = compare(regression, {"exact": regression_guide}, Y, T, num_samples=20, whole=True, **QUIET)["train"]
    assert abs(float(columns["mean_evidence"].values.ravel()[0]) - float(REGRESSION_TRUTH)) < 1e-9


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
def test_points_of_the_whole_lie_along_the_samples():
    log_joint = LogJoint(regression, Y, T, whole=True)
    u = torch.randn(4, 1, 2, dtype=torch.float64)
    alone = torch.stack([log_joint(point) for point in u])
    torch.testing.assert_close(log_joint(u), alone)
    rows = log_joint.rows(torch.zeros(6, dtype=torch.int64))
    assert rows.num_data == 6
    points = torch.randn(2, 6, 2, dtype=torch.float64)
    expected = torch.stack([log_joint(point.unsqueeze(-2))[:, 0] for point in points])
    torch.testing.assert_close(rows(points), expected)


def test_the_whole_and_a_plate_exclude_each_other():
    with pytest.raises(ValueError, match="whole=True or a plate over the data, got both"):
        log_weights(regression, regression_guide, Y, T, num_samples=2, whole=True, plate="points")


def test_missing_values_count_nothing_where_the_caller_says_so():
    x = torch.randn(5, 3, generator=torch.manual_seed(3), dtype=torch.float64)
    x[0, 1] = x[2, 0] = x[2, 2] = float("nan")

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 0.5).mask(~x.isnan()).to_event(1), obs=x.nan_to_num())

    def guide(x):
        variance = 1 / (1 + 4 * (~x.isnan()).sum(-1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(4 * x.nan_to_num().sum(-1) * variance, variance**0.5))

    def of(row):
        row = row[~row.isnan()]
        covariance = 0.25 * torch.eye(len(row), dtype=torch.float64) + 1
        return dist.MultivariateNormal(torch.zeros_like(row), covariance).log_prob(row)

    truth = torch.stack([of(row) for row in x])
    torch.testing.assert_close(evidence(model, x, missing=True, **QUIET).value, truth, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_weights(model, guide, x, num_samples=3, missing=True)[0], truth)
    with pytest.raises(ValueError, match="where NaN is a missing value that the model masks, say missing=True"):
        evidence(model, x, **QUIET)
    x[1, 1] = float("inf")
    with pytest.raises(ValueError, match="to be finite"):
        evidence(model, x, missing=True, **QUIET)


def test_a_model_that_does_not_mask_what_is_missing_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    with pytest.raises(ValueError, match=r"masks missing values|NaN|support"):
        evidence(model, torch.tensor([1.0, float("nan")]).double(), missing=True, **QUIET)


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
def test_the_parameters_of_an_autoguide_are_refitted_together():
    guide = pyro.infer.autoguide.AutoMultivariateNormal(regression)
    guide(Y, T)
    guide.double()
    found = refit(regression, guide, Y, T, num_samples=64, restarts=0, max_steps=200, whole=True, **QUIET)
    assert abs(float(found.elbo) - float(REGRESSION_TRUTH)) < 5 * float(found.standard_error) + 1e-3
    parts = gap(regression, guide, Y, T, method="quadrature", num_samples=64, restarts=0, whole=True, **QUIET)
    assert parts.second == "optimisation"
    assert float(parts.amortisation) > 0
    assert float(parts.approximation.abs()) < 0.05


def test_a_mixture_that_indexes_its_means_is_mapped_over_samples():
    """Means by ``locs[k]``, which several samples of the means do not fit; the components are summed out."""
    x = torch.tensor([-2.0, -1.4, 1.2, 2.3, 1.9], dtype=torch.float64)
    shares = torch.tensor([0.4, 0.6], dtype=torch.float64)

    def mixture(x):
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(shares), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[k], 0.8), obs=x)

    log_joint, u = LogJoint(mixture, x, whole=True), torch.randn(3, 1, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"several samples side by side.*torch\.func\.vmap"):
        found = log_joint(u)
    parts = dist.Normal(u[..., None], 0.8).log_prob(x) + shares.log()[:, None]
    expected = parts.logsumexp(-2).sum(-1) + dist.Normal(0.0, 2.0).log_prob(u).sum(-1)
    torch.testing.assert_close(found, expected)


def test_trials_are_made_at_the_first_call_of_a_pair_alone(monkeypatch):
    runs = dict.fromkeys(("model", "guide", "trial for angles"), 0)

    def counted(name, function):
        def run(*args):
            runs[name] += 1
            return function(*args)

        return run

    def model(t):
        with pyro.plate("data", len(t)):
            z = pyro.sample("z", dist.Normal(0 * t, 1.0))
            pyro.sample("t", dist.Normal(z, 1.0), obs=t)

    def guide(t):
        with pyro.plate("data", len(t)):
            pyro.sample("z", dist.Normal(t / 2, 1.0))

    monkeypatch.setattr(draw, "is_periodic", counted("trial for angles", draw.is_periodic))
    pair = counted("model", model), counted("guide", guide)
    first = log_weights(*pair, T, num_samples=10, seed=0)
    runs = dict.fromkeys(runs, 0)
    torch.testing.assert_close(log_weights(*pair, T, num_samples=10, seed=0), first, rtol=0, atol=0)
    assert runs == {"model": 2, "guide": 2, "trial for angles": 0}  # a probe, and the samples


def test_what_a_program_draws_outside_its_sites_does_not_count():
    """Samples together have other densities than by themselves, but so has each sample run twice."""

    def model(t):
        with pyro.plate("data", len(t)):
            z = pyro.sample("z", dist.Normal(0 * t, 1.0))
            pyro.sample("t", dist.Normal(z + torch.randn_like(t), 1.0), obs=t)

    def guide(t):
        with pyro.plate("data", len(t)):
            pyro.sample("z", dist.Normal(t / 2, 1.0))

    assert isinstance(Call(model, guide, (T,)).manners(4).model, SideBySide)
