"""Latents whose distribution is no density on the support that it declares: mapped, or refused by name."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from inference import LogJoint, evidence, gap, information_bounds, log_weights, rate_distortion
from inference.pair.improper import is_periodic

X = torch.tensor([-1.0, 0.3, 0.8], dtype=torch.float64)
KEEP = torch.tensor([True, True, False])
QUIET = {"seed": 0, "progress": False}
ZERO, TWO = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


def model_of(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            z = z.flatten(x.dim() + z.dim() - 2).sum(-1) if prior().event_shape else z
            pyro.sample("x", dist.Normal(z.cos(), 0.5), obs=x)

    return model


def guide_of(distribution):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", distribution())

    return guide


def angle():
    return dist.VonMises(ZERO + 2.5, 3.0)


def angles():
    return dist.VonMises(TWO, 1.0).to_event(1)


def normal():
    return dist.Normal(ZERO, 1.0)


def log_evidence_of_angle():
    grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)[:-1]
    log_f = angle().log_prob(grid) + dist.Normal(grid.cos(), 0.5).log_prob(X.unsqueeze(-1))
    return log_f.logsumexp(-1) + (grid[1] - grid[0]).log()


@pytest.mark.parametrize("method", ["quadrature", "adaptive", "bridge", "annealed"])
def test_the_evidence_of_an_angle_is_that_over_one_turn(method):
    got, truth = evidence(model_of(angle), X, method=method, **QUIET), log_evidence_of_angle()
    assert bool((got.lower <= truth + 1e-8).all())
    assert bool(((got.value - truth).abs() <= 1e-8 + 5 * got.standard_error).all())


@pytest.mark.parametrize("guide", [angle, lambda: dist.Uniform(ZERO - math.pi, math.pi)], ids=["angle", "interval"])
def test_weights_of_an_angle_average_to_the_evidence(guide):
    weights = log_weights(model_of(angle), guide_of(guide), X, num_samples=20_000, seed=0)
    mean, error = weights.exp().mean(0), weights.exp().std(0) / 20_000**0.5
    assert bool(((mean - log_evidence_of_angle().exp()).abs() < 4 * error).all())


def skewed():
    return dist.SineSkewed(dist.VonMises(ZERO.unsqueeze(0), 1.0).to_event(1), ZERO.unsqueeze(0) + 0.3)


def mixed():
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2).double()), dist.VonMises(TWO, 2.0))


def shifted():
    return dist.TransformedDistribution(dist.VonMises(ZERO, 1.0), dist.transforms.AffineTransform(1.0, 2.0))


def product():
    return dist.Normal(TWO[0], 1.0).expand([2]).to_event(1)


@pytest.mark.parametrize(("prior", "guide"), [(angle, normal), (angles, product), (mixed, normal), (normal, angle)])
def test_an_angle_against_a_real_number_is_refused(prior, guide):
    pair = model_of(prior), guide_of(guide)
    for door in (log_weights, log_weights, rate_distortion):  # each time
        with pytest.raises(ValueError, match="expected latent site 'z' on one support in model and guide"):
            door(*pair, X, num_samples=2)
    with pytest.raises(ValueError, match="'z'"):
        evidence(model_of(prior), X, method="defensive", guide=guide_of(guide), **QUIET)


@pytest.mark.parametrize("prior", [skewed, shifted])
def test_periodic_densities_on_the_line_have_no_coordinates(prior):
    with pytest.raises(ValueError, match="proper density on the support of latent site 'z'"):
        LogJoint(model_of(prior), X)


PROPER = {
    "little heavy": lambda: dist.StudentT(ZERO + 0.1),
    "cauchy": lambda: dist.Cauchy(TWO, 3.0).to_event(1),
    "wide": lambda: dist.Normal(ZERO, 1e10),
    "narrow": lambda: dist.Normal(ZERO + 1e3, 1e-9),
    "joint": lambda: dist.MultivariateNormal(TWO, torch.eye(2).double()),
    "spike": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2).double()), dist.Normal(TWO, torch.tensor([1e-9, 1.0]).double())
    ),
    "positive": lambda: dist.HalfCauchy(ZERO + 1),
}


@pytest.mark.parametrize("name", PROPER)
def test_proper_densities_are_not_taken_for_periodic_ones(name):
    torch.manual_seed(0)
    assert not any(is_periodic(PROPER[name]().expand([50])) for _ in range(20))


@pytest.mark.parametrize("support", [dist.constraints.real, dist.constraints.positive])
def test_an_improper_prior_is_refused_by_name(support):
    def flat():
        return dist.ImproperUniform(support, torch.Size(), torch.Size())

    for door in (LogJoint, lambda model, x: log_weights(model, guide_of(normal), x, num_samples=2)):
        with pytest.raises(ValueError, match="expected a proper distribution at latent site 'z', got ImproperUniform"):
            door(model_of(flat), X)


def by_distribution(scale):
    return dist.Normal(ZERO, scale).expand([3]).mask(KEEP)


def by_handler(scale):
    return dist.Normal(ZERO, scale)


def inside(scale):
    return dist.Normal(ZERO, scale).expand([3, 1]).mask(KEEP.unsqueeze(-1)).to_event(1)


def chain(program, *, end=None, handler=False):
    """Model or guide with a second latent, which is masked at the last data point."""

    def run(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5) if program == "guide" else dist.Normal(0 * x, 1.0))
            with poutine.mask(mask=KEEP if handler else True):
                pyro.sample("end", end(2.0 if program == "guide" else 1.0))
            if program == "model":
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return run


MASKED = pytest.mark.parametrize("end", [by_distribution, by_handler, inside], ids=lambda end: end.__name__)


@MASKED
def test_a_masked_latent_counts_nothing_in_the_weights(end):
    pair = [chain(half, end=end, handler=end is by_handler) for half in ("model", "guide")]
    weights = log_weights(*pair, X, num_samples=5)
    truth = dist.Normal(0 * X, 2**0.5).log_prob(X)
    torch.testing.assert_close(weights[:, 2], truth[2].expand(5))
    assert weights[:, :2].std(0).min() > 0.01


@MASKED
def test_a_masked_latent_counts_nothing_in_coordinates(end):
    model, guide = (chain(half, end=end, handler=end is by_handler) for half in ("model", "guide"))
    log_joint, u = LogJoint(model, X), torch.randn(4, 3, 2, dtype=torch.float64)
    z, last = u[..., 0], u[..., 1]
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X)
    expected = joint + dist.Normal(0.0, 1.0).log_prob(last)  # standard normal where it is masked, too
    torch.testing.assert_close(log_joint(u), expected)
    drawn, log_q = log_joint.sample_guide(guide, 3)
    truth = dist.Normal(0 * X, 2**0.5).log_prob(X)
    torch.testing.assert_close((log_joint(drawn) - log_q)[:, 2], truth[2].expand(3))


@MASKED
def test_a_masked_latent_is_refused_where_its_posterior_matters(end):
    model, guide = (chain(half, end=end, handler=end is by_handler) for half in ("model", "guide"))
    with pytest.raises(ValueError, match="expected no mask on latent site 'end'"):
        information_bounds(model, guide, X, progress=False)


@MASKED
@pytest.mark.parametrize("half", ["model", "guide"])
def test_a_latent_masked_in_one_half_alone_is_refused(end, half):
    plain = {"model": by_handler, "guide": by_handler}
    if end is inside:
        plain = dict.fromkeys(plain, lambda scale: dist.Normal(ZERO, scale).expand([3, 1]).to_event(1))
    pair = [
        chain(h, end=end if h == half else plain[h], handler=end is by_handler and h == half)
        for h in ("model", "guide")
    ]
    for door in (log_weights, rate_distortion):
        with pytest.raises(ValueError, match="latent site 'end' under the same mask in model and guide"):
            door(*pair, X, num_samples=2)
    with pytest.raises(ValueError, match="'end'"):
        gap(*pair, X, progress=False)
