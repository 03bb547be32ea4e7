"""Evidence by quadrature: against integrals that are products or have one dimension, at every width of the noise.

The truths know no mode finder: Gauss-Legendre panels that crowd, on all scales, about every sign change and every dip
of the residual on a line of 240,001 points.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro_problems import noisy
from registry import data_for, for_models_with

import inference.marginal_likelihood.quadrature.adaptive_quadrature as quadrature
import inference.marginal_likelihood.quadrature.gauss_kronrod as kronrod
import inference.marginal_likelihood.quadrature.integrator as nested
from guides.base import Guide
from inference import LogJoint, Quadrature, evidence
from inference.distributions.gaussian import FullNormal
from inference.marginal_likelihood.base.result import NUMERICAL, PROBABILISTIC
from inference.marginal_likelihood.quadrature.features import with_features
from inference.marginal_likelihood.quadrature.peaks import Finder, _refined, _unique
from inference.marginal_likelihood.quadrature.slices import Density, Slices
from inference.numerics.newton import maximise
from inference.posterior.modes import find_modes, prior_scale
from zoo import LinearVAE, known_answers
from zoo.linear.models import LinearGaussianModel

SIGMAS = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
CURVES = {
    "fold": lambda z: z**2 + 0.3 * z,
    "wave": lambda z: torch.sin(2 * z) + 0.5 * z,
    "cubic": lambda z: z**3 - z,
    "bend": lambda z: z + 0.3 * torch.sin(2 * z),
}


def legendre(log_f, edges, order=40):
    """Log of the integral of exp(log_f) over panels."""
    node, weight = np.polynomial.legendre.leggauss(order)
    low, high = edges[:-1], edges[1:]
    t = ((low + high) / 2)[:, None] + ((high - low) / 2)[:, None] * node
    return scipy.special.logsumexp(log_f(t), b=weight * ((high - low) / 2)[:, None])


def on_a_line(h, y, sigma):
    """log of the integral of N(t; 0, 1) N(y; h(t), sigma^2) over t."""

    def residual(t):
        return h(torch.from_numpy(t)).numpy() - y

    t = np.linspace(-12, 12, 240_001)
    r = residual(t)
    dips = (np.abs(r[1:-1]) < np.abs(r[:-2])) & (np.abs(r[1:-1]) <= np.abs(r[2:]))
    centres = np.concatenate([t[:-1][r[:-1] * r[1:] <= 0], t[1:-1][dips], [0.0]])
    scales = sigma * 10.0 ** np.arange(-2, 6, 0.5)
    edges = centres[:, None] + np.concatenate([-scales, [0.0], scales])
    edges = np.unique(np.clip(np.append(edges, [-12, 12]), -12, 12))
    return legendre(lambda t: scipy.stats.norm.logpdf(t) + scipy.stats.norm.logpdf(residual(t), scale=sigma), edges)


def rotation(dim, seed):
    random = np.random.RandomState(seed)
    return torch.from_numpy(scipy.stats.ortho_group.rvs(dim, random_state=random) if dim > 1 else np.ones((1, 1)))


def separable(names, sigma, num, seed=5):
    """f(z) = Q h(R z), data from it, and their evidence: a product of integrals on a line."""
    dim = len(names)
    q, r = rotation(dim, 1), rotation(dim, 2)

    def f(z):
        v = z @ r.T
        return torch.stack([CURVES[name](v[..., i]) for i, name in enumerate(names)], -1) @ q.T

    random = np.random.RandomState(seed)
    z, noise = torch.from_numpy(random.standard_normal((2, num, dim)))
    x = f(z) + sigma * noise
    true = [sum(on_a_line(CURVES[name], y, sigma) for name, y in zip(names, row)) for row in (x @ q).tolist()]
    return noisy(f, dim, sigma), x, torch.tensor(true, dtype=torch.float64)


def check(model, x, true, label, *, guide=None, seed=0, **options):
    """Within 1e-6 nats, and within ten times the error that it states."""
    got = evidence(model, x, guide=guide, method=Quadrature(**options), seed=seed, progress=False)
    error, stated = (got.value - true).abs(), torch.minimum(got.upper - got.value, got.value - got.lower)
    print(
        f"{label}: max error {error.max():.1e}, max error / stated {(error / stated).max():.1e}, "
        f"{got.evaluations:.3g} evaluations, {got.seconds:.1f} s"
    )
    assert float(error.max()) < 1e-6
    assert bool((error <= 10 * stated).all())
    assert bool((stated >= 1e-12).all())
    assert got.guarantee == (NUMERICAL,) * len(x)
    return got


# --- truths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("names", [("fold",), ("wave",), ("fold", "wave")], ids="-".join)
def test_separable_maps_in_one_and_two_dimensions(names, sigma):
    check(*separable(names, sigma, num=6), label=f"{names} sigma={sigma}")


@pytest.mark.slow
@pytest.mark.parametrize("sigma", SIGMAS)
def test_separable_maps_in_three_dimensions(sigma):
    check(*separable(("fold", "bend", "cubic"), sigma, num=2), label=f"K=3 sigma={sigma}")


def test_a_separable_map_in_three_dimensions():
    check(*separable(("bend", "bend", "fold"), 0.01, num=1, seed=1), label="K=3 sigma=0.01")


@pytest.mark.parametrize("sigma", SIGMAS)
def test_fold(sigma):
    """Two modes at +-sqrt(x), one at the fold itself, and none."""
    x = torch.tensor([[4.0], [1e-4], [0.0], [-0.5]], dtype=torch.float64)
    true = torch.tensor([on_a_line(lambda t: t**2, y, sigma) for y in x[:, 0].tolist()], dtype=torch.float64)
    check(noisy(lambda z: z.square(), 1, sigma), x, true, label=f"fold sigma={sigma}")


@pytest.mark.parametrize("sigma", SIGMAS)
def test_ridge_around_the_origin(sigma):
    """x = |z|^2 + noise: the posterior is a thin ring, and |z|^2 is chi-squared."""
    x = torch.tensor([[0.3], [1.5], [4.0]], dtype=torch.float64)
    true = [shell(y, 2, sigma) for y in x[:, 0].tolist()]
    model = noisy(lambda z: z.square().sum(-1, keepdim=True), 2, sigma)
    check(model, x, torch.tensor(true, dtype=torch.float64), label=f"ring sigma={sigma}")


def shell(y, dim, sigma):
    ends = np.sqrt(np.linspace(max(y - 14 * sigma, 0.0), y + 14 * sigma, 21))

    def log_f(r):
        return scipy.stats.chi2.logpdf(r**2, dim) + np.log(2 * r) + scipy.stats.norm.logpdf(y, loc=r**2, scale=sigma)

    return legendre(log_f, ends)


def check_ring_of_the_ladder(sigma, seed):
    """All twenty data, from the starts that examples/estimator_scorecard.py has."""
    index, problem = next(
        (i, p) for i, p in enumerate(known_answers(seed=seed)) if (p.family, p.sigma) == ("ring", sigma)
    )
    label = f"ladder {seed}, ring sigma={sigma}"
    check(problem.model, problem.x, problem.log_evidence, label, guide=problem.guide, seed=1000 * seed + index)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("sigma", [1e-3, 1e-4])
def test_rings_of_the_ladder(sigma, seed):
    check_ring_of_the_ladder(sigma, seed)


@pytest.mark.parametrize("sigma", [*SIGMAS[:3], *(pytest.param(s, marks=pytest.mark.slow) for s in SIGMAS[3:])])
def test_banana(sigma):
    """x = z_1 + .7 z_2^2 + noise: z_1 integrates out by conjugacy."""
    x = torch.tensor([[0.3], [4.0]], dtype=torch.float64)
    true = torch.tensor([banana(y, sigma) for y in x[:, 0].tolist()], dtype=torch.float64)
    check(noisy(lambda z: z[..., :1] + 0.7 * z[..., 1:] ** 2, 2, sigma), x, true, label=f"banana sigma={sigma}")


def banana(y, sigma):
    width = math.hypot(1, sigma)
    return legendre(
        lambda t: scipy.stats.norm.logpdf(t) + scipy.stats.norm.logpdf(y, loc=0.7 * t**2, scale=width),
        np.linspace(-12, 12, 201),
    )


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [1.0, 1e-2, 1e-4])
def test_banana_in_three_dimensions(sigma):
    x = torch.tensor([[0.3], [4.0]], dtype=torch.float64)
    true = torch.tensor([banana(y, sigma) for y in x[:, 0].tolist()], dtype=torch.float64)
    check(noisy(lambda z: z[..., :1] + 0.7 * z[..., 1:2] ** 2, 3, sigma), x, true, label=f"banana K=3 sigma={sigma}")


@pytest.mark.slow
def test_ridge_around_the_origin_in_three_dimensions():
    x = torch.tensor([[0.3], [4.0]], dtype=torch.float64)
    true = torch.tensor([shell(y, 3, 1.0) for y in x[:, 0].tolist()], dtype=torch.float64)
    check(noisy(lambda z: z.square().sum(-1, keepdim=True), 3, 1.0), x, true, label="shell K=3 sigma=1")


@for_models_with(LinearGaussianModel)
def test_linear_gaussian_models_of_the_registry(model):
    if LogJoint(model, data_for(model)).dim > 2:
        pytest.skip("three dimensions are covered below")
    x = data_for(model)
    check(model, x, model.log_evidence(x).detach(), label=type(model).__name__)


@pytest.mark.parametrize(("latent_dim", "sigma"), [(1, 1e-4), (2, 1.0), (2, 1e-4), (3, 1e-4)])
def test_linear_gaussian_models_in_float32_and_of_any_noise(latent_dim, sigma):
    model = LinearVAE(4, latent_dim, sigma=sigma).requires_grad_(False)
    x = model(n=3)
    exact = evidence(model, x)
    check(model, x, exact.value, label=f"linear K={latent_dim} sigma={sigma}")


def test_a_users_poisson_model_with_two_latent_sites():
    """Gamma rate and offset: the rate integrates out, which leaves a negative binomial's sum over the offset."""
    x = torch.tensor([0.0, 3.0, 40.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            scale = pyro.sample("scale", dist.Uniform(x.new_tensor(0.5), 2.0))
            pyro.sample("x", dist.Poisson(rate * scale), obs=x)

    def log_f(count):
        return lambda s: scipy.stats.nbinom.logpmf(count, 2, 1 / (1 + s)) - math.log(1.5)

    true = [legendre(log_f(count), np.linspace(0.5, 2, 11)) for count in x.tolist()]
    check(model, x, torch.tensor(true, dtype=torch.float64), label="Poisson")


def test_heavy_tails():
    """Cauchy latent, no information: the evidence is that of the noise, however far the tail goes."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Cauchy(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    x = torch.tensor([0.0, 2.0], dtype=torch.float64)
    check(model, x, torch.from_numpy(scipy.stats.norm.logpdf(x)), label="Cauchy")


def plateau(x):
    """A density that is constant up to |z| = x and nothing beyond: 2 x / sqrt(2 pi)."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.factor("x", torch.where(z.abs() < x, z.square() / 2, -torch.inf))


def check_plateaus():
    x = torch.linspace(3, 30, 200, dtype=torch.float64)
    check(plateau, x, (2 * x / math.sqrt(2 * math.pi)).log(), label="plateau")


def test_a_density_that_ends_between_cell_edge_and_first_node():
    check_plateaus()


def test_cells_that_do_not_compare_their_edges_fail_the_check(monkeypatch):
    monkeypatch.setattr(nested, "_jumps", lambda cells: torch.zeros_like(cells.value))
    with pytest.raises(AssertionError):
        check_plateaus()


def test_peaks_that_crowd_keep_some_everywhere():
    """Sixty-four equal peaks over three standard deviations, and a single one in the next slice."""
    row = torch.tensor([0] * 64 + [1])
    position = torch.cat([torch.linspace(0, 3, 64, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    kept = _unique(row, position, torch.ones_like(position))
    assert row[kept].tolist() == sorted(row[kept].tolist())
    first = position[kept][row[kept] == 0]
    assert float(first.diff().min()) >= 1.0
    assert float((position[:64, None] - first).abs().min(1).values.max()) < 2.0
    assert int((row[kept] == 1).sum()) == 1


class Kinks:
    """Lines with a sharp peak, from afar of which Newton's step leads farther away."""

    width, sharp = 1, 1e-3
    peak = torch.tensor([0.7, -2.1, 0.0, 4.99], dtype=torch.float64)

    def log(self, rows, points):
        return -(1 + ((points[:, 0] - self.peak[rows]) / self.sharp).square()).sqrt()


def test_a_sharp_peak_is_found_by_halving_where_newton_leads_away():
    low, high = torch.full((4,), -3.0).double(), torch.full((4,), 5.0).double()
    position, scale, height = _refined(Kinks(), torch.arange(4), low, high)
    assert float((position - Kinks.peak).abs().max()) < 0.2 * Kinks.sharp
    torch.testing.assert_close(scale, torch.full_like(scale, Kinks.sharp), rtol=0.1, atol=0)
    torch.testing.assert_close(height, -torch.ones_like(height), rtol=0, atol=0.02)


# --- what the guarantee does not cover ---------------------------------------------------------------


def needle(x):
    """A likelihood with a broad part at the origin and a needle at 40 prior standard deviations."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        broad = dist.Normal(0.0, 1.0).log_prob(x)
        spike = 820.0 + dist.Normal(40.0, 0.01).log_prob(z)
        pyro.factor("x", torch.logaddexp(broad, spike))


class AtTheNeedle(Guide):
    """A guide that knows where the needle stands."""

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(40 + torch.zeros_like(x), 0.01))


def test_a_mode_that_no_start_reaches_is_missed_without_the_guide():
    x = torch.zeros(2, dtype=torch.float64)
    broad = scipy.stats.norm.logpdf(0.0)
    spike = 820 + scipy.stats.norm.logpdf(40.0, scale=math.hypot(1, 0.01))
    missed = evidence(needle, x, method="quadrature", seed=0, progress=False)
    torch.testing.assert_close(missed.value, torch.full_like(x, broad), rtol=0, atol=1e-6)
    assert bool((missed.upper < np.logaddexp(broad, spike) - 1).all())
    found = evidence(needle, x, method="quadrature", guide=AtTheNeedle(), seed=0, progress=False)
    torch.testing.assert_close(found.value, torch.full_like(x, np.logaddexp(broad, spike)), rtol=0, atol=1e-6)
    assert "needle" in Quadrature.__doc__


def test_a_row_that_needs_too_many_cells_keeps_a_lower_end_only():
    x = torch.tensor([[4.0], [-3.0]], dtype=torch.float64)
    model = noisy(lambda z: torch.where(z > 0, 30 * torch.sin(40 * z) ** 2, z), 1, 0.1)
    got = evidence(model, x, method=Quadrature(max_cells=400), seed=0, progress=False)
    assert got.guarantee == (PROBABILISTIC, NUMERICAL)
    assert got.upper[0] == math.inf
    assert math.isfinite(float(got.upper[1]))
    more = evidence(model, x, method=Quadrature(max_cells=400), tolerance=1e-6, seed=0, progress=False)
    assert bool((more.upper - more.lower < 2e-6).all())
    assert -math.inf < got.lower[0] < more.lower[0]


# --- the planted defect -------------------------------------------------------------------------------


def test_rules_with_wrong_weights_fail_the_check(monkeypatch):
    for name in ("_KRONROD", "_GAUSS"):
        monkeypatch.setattr(kronrod, name, tuple(1.00001 * weight for weight in getattr(kronrod, name)))
    with pytest.raises(AssertionError):
        check(*separable(("fold",), 0.1, num=2), label="defect")


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_polynomials_through_the_nodes_are_exact_at_the_edges(tolerance):
    nodes = kronrod.rule(torch.zeros((), dtype=torch.float64), tolerance)[0]
    weights = kronrod.at_edges(nodes)
    for power in range(len(nodes)):
        ends = torch.tensor([(-1.0) ** power, 1.0], dtype=torch.float64)
        torch.testing.assert_close(nodes**power @ weights, ends, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("tolerance", "size"), [(0.0, 7), (0.01, 5)])
def test_rules_are_exact_for_polynomials(tolerance, size):
    nodes, fine, coarse = (part.numpy() for part in kronrod.rule(torch.zeros((), dtype=torch.float64), tolerance))
    for weights, degree in ((fine, 3 * size + 1 + size % 2), (coarse, 2 * size - 1)):
        for power in range(degree + 1):
            np.testing.assert_allclose(nodes**power @ weights, (1 + (-1) ** power) / (power + 1), atol=2e-15)
    np.testing.assert_allclose(nodes[1::2], np.polynomial.legendre.leggauss(size)[0], atol=1e-15)


# --- modes -----------------------------------------------------------------------------------------------


def test_newton_climbs_rosenbrock_and_leaves_a_saddle():
    starts = torch.tensor([[-1.2, 1.0], [2.0, -1.0], [0.0, 5.0]], dtype=torch.float64)

    def rosenbrock(_, z):
        return -((1 - z[:, 0]) ** 2) - 100 * (z[:, 1] - z[:, 0] ** 2) ** 2

    points, at, rest = maximise(rosenbrock, starts)
    torch.testing.assert_close(points, torch.ones_like(points), rtol=0, atol=1e-5)
    hessian = torch.tensor([[-802.0, 400.0], [400.0, -200.0]], dtype=torch.float64)
    torch.testing.assert_close(at.hessian, hessian.expand(3, 2, 2), rtol=1e-3, atol=1e-3)
    assert bool(rest.all())
    wells, _, _ = maximise(
        lambda _, z: -((z[:, 0] ** 2 - 1) ** 2), torch.tensor([[1e-3], [-1e-3]], dtype=torch.float64)
    )
    torch.testing.assert_close(wells[:, 0], torch.tensor([1.0, -1.0], dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_fold_has_two_modes_and_a_linear_model_its_mean():
    x = torch.tensor([[4.0]], dtype=torch.float64)
    log_joint = LogJoint(noisy(lambda z: z.square(), 1, 0.01), x)
    starts = torch.linspace(-3, 3, 8, dtype=torch.float64).view(8, 1, 1)
    modes = find_modes(log_joint, starts, *prior_scale(log_joint))
    assert modes.location.shape == (2, 1, 1)
    # d/dz of -z^2/2 - (4 - z^2)^2 / 2 sigma^2 vanishes at z^2 = 4 - sigma^2 / 2.
    expected = torch.full((2,), math.sqrt(4 - 0.01**2 / 2), dtype=torch.float64)
    torch.testing.assert_close(modes.location.abs().flatten(), expected, rtol=1e-9, atol=0)
    model = LinearVAE(5, 2, sigma=0.5).double().requires_grad_(False)
    x = model(n=4)
    log_joint = LogJoint(model, x)
    modes = find_modes(log_joint, log_joint.sample_prior(5), *prior_scale(log_joint))
    posterior = model.posterior(x)
    assert isinstance(posterior, FullNormal)
    torch.testing.assert_close(modes.location[0], posterior.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(modes.hessian[0], -torch.linalg.inv(posterior.covariance_matrix), rtol=1e-8, atol=1e-8)


# --- what is refused ---------------------------------------------------------------------------------------


def test_refusals_name_what_was_expected():
    x = torch.zeros(3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most 3 latent dimensions for quadrature, got 4"):
        evidence(LinearVAE(5, 4).double(), x, method="quadrature")
    with pytest.raises(ValueError, match="expected tolerance between"):
        Quadrature(tolerance=0.0)
    with pytest.raises(ValueError, match="expected grid to be at least 5, got 2"):
        Quadrature(grid=2)


def test_a_loose_tolerance_costs_less_and_holds_the_truth():
    model = LinearVAE(4, 3, sigma=0.1).double().requires_grad_(False)
    x, costs = model(n=2), []
    truth = model.log_evidence(x)
    for tolerance in (1e-7, 1e-4, 1e-2):
        got = evidence(model, x, method=Quadrature(tolerance=tolerance), seed=0, progress=False)
        assert ((got.lower <= truth) & (truth <= got.upper)).all()
        assert (got.upper - got.lower < 4 * tolerance).all()
        costs.append(got.evaluations)
    assert costs[1] < 0.75 * costs[0]  # to a quarter of it, where 1e-7 is worked to as a whole
    assert costs[2] < 0.25 * costs[0]


def test_thin_rings_at_a_loose_tolerance_hold_the_truth():
    """Their integrals over one coordinate rise steeply at the ring's edges, where two coarse rules agree by chance."""
    y, sigma = 1.266545300142199, 0.002706941299741837
    truth = torch.tensor([shell(y, 2, sigma)], dtype=torch.float64)
    model = noisy(lambda z: z.square().sum(-1, keepdim=True), 2, sigma)
    x = torch.tensor([[y]], dtype=torch.float64)
    for seed in range(4):
        got = evidence(model, x, method=Quadrature(tolerance=1e-2), seed=seed, progress=False)
        assert got.guarantee == (NUMERICAL,)
        assert ((got.value - truth).abs() < (got.upper - got.value) / 3).all()


def test_a_narrow_dip_is_seen_on_a_line_at_any_tolerance():
    """The likelihood is wide but for a hole of a hundredth of the prior, where no node of a few cells stands."""
    sigma, width, centre, y = 0.455, 0.0124, 0.2208, torch.tensor([[-0.2648]], dtype=torch.float64)

    def bump(z):
        return 3 * (-0.5 * ((z - centre) / width).square()).exp()

    t = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64)
    joint = dist.Normal(0.0, 1.0).log_prob(t) + dist.Normal(bump(t), sigma).log_prob(y[0, 0])
    truth = (joint.logsumexp(0) + math.log(1e-5)).reshape(1)
    got = evidence(noisy(bump, 1, sigma), y, method=Quadrature(tolerance=1e-2), seed=0, progress=False)
    torch.testing.assert_close(got.value, truth, rtol=0, atol=1e-6)


# --- isolated holes and hills ------------------------------------------------------------------------------

# Noise, width and centre of a bump in two dimensions, and the datum: posteriors as wide as the prior but for a small
# hole or hill between the nodes.
BUMPS = (
    (0.18375021131778746, 0.01054106596465222, 1.8481423273607875, 0.7017089165928709, 0.2121307998632359),
    (0.00582298521314282, 0.014064126003160806, -1.818568090806107, -1.4067642211966973, -0.007914714457410767),
    (0.011134478146774441, 0.021791296075996617, 0.9838753278603112, -0.026414732794031615, 0.0013619330974206367),
    (0.0011630147260402774, 0.019206427694614815, 1.05445106080372, 0.06207126707170252, -0.0018928081693808916),
    (0.21703271720597225, 0.010413677173508166, -0.9658812727662349, -1.006275449373713, -0.03468778509421557),
    (0.8783238765019821, 0.012356926351828801, 1.5752351543650613, 1.7172636728147799, 0.8653835117776305),
)


# A ring, half a thousandth of its radius wide.
RING = (1.1443e-3, 6.7330e-2, -1.9593, 1.3665, 1.4383)


# In three dimensions.
HOLES = (
    (0.0018, 0.0147, -0.493, 0.138, -1.31, -0.000548),
    (0.274, 0.0303, -1.18, -0.574, -1.33, -0.138),
    (0.635, 0.0175, 1.86, -0.166, -0.0326, 1.81),
)


def bump_problem(rows=BUMPS):
    table = torch.tensor(rows, dtype=torch.float64)
    sigma, width, centre, x = table[:, :1], table[:, 1:2], table[:, 2:-1], table[:, -1:]
    dim = centre.shape[-1]

    def model(x, sigma, width, centre):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            mean = 3 * (-0.5 * ((z - centre) / width).square().sum(-1, keepdim=True)).exp()
            pyro.sample("x", dist.Normal(mean, sigma).to_event(1), obs=x)

    truth = torch.tensor([around_a_bump(*row) for row in rows], dtype=torch.float64)
    return model, (x, sigma, width, centre), truth


def around_a_bump(sigma, width, *place_and_x):
    """By the distance from the centre, whose square is non-central chi-squared; the bump is over at nine widths."""
    *place, x = place_and_x
    shift, far, order = math.hypot(*place), 9 * width, len(place) / 2 - 1

    def log_f(r):
        mean = 3 * np.exp(-0.5 * (r / width) ** 2)
        bessel = np.log(scipy.special.ive(order, r * shift)) - order * math.log(shift)
        prior = (order + 1) * np.log(r) - 0.5 * (r - shift) ** 2 + bessel
        return prior + scipy.stats.norm.logpdf(x, loc=mean, scale=sigma)

    return legendre(log_f, np.concatenate([np.linspace(0, far, 4001), np.linspace(far, shift + 10, 400)[1:]]))


def density_of(model, args, starts):
    """The density of a bump problem about the modes that starts (S, N, d) lead to."""
    log_joint = LogJoint(lambda x: model(x, *args[1:]), args[0])
    location, scale = prior_scale(log_joint)
    return Density.around(log_joint, find_modes(log_joint, starts, location, scale), location, scale)


def test_isolated_holes_and_hills_are_met():
    model, args, truth = bump_problem()
    for seed in range(2):
        got = evidence(model, *args, method="quadrature", seed=seed, progress=False)
        assert ((got.lower <= truth) & (truth <= got.upper)).all()
        assert (got.upper - got.lower < 4e-7).all()
        assert got.guarantee == (NUMERICAL,) * len(truth)


def test_holes_in_three_dimensions_are_found_and_modes_are_none():
    model, args, _ = bump_problem(HOLES)
    centre = args[3]
    density = density_of(model, args, torch.stack([torch.zeros_like(centre), 0.99 * centre]))
    led = with_features(density, 1e-7)
    assert led.features.isfinite().all(-1).sum(0).tolist() == [1, 1, 0]  # the hill of the last is a mode
    place = led.origin + (led.frame @ led.features[0].unsqueeze(-1)).squeeze(-1)
    assert ((place - centre).abs()[:2] < 0.1).all()
    assert with_features(density, 1e-2) is density  # where the nodes see as much


@pytest.mark.slow
def test_isolated_holes_in_three_dimensions_are_met():
    model, args, truth = bump_problem(HOLES)
    method = Quadrature(max_cells=10_000_000)
    got = evidence(model, *args, method=method, seed=0, progress=False)
    assert got.guarantee == (NUMERICAL,) * len(truth)
    torch.testing.assert_close(got.value, truth, rtol=0, atol=1e-8)


def test_the_end_of_a_grid_beside_a_narrow_peak_does_not_displace_it():
    """A ring has two peaks on each line; points about the mode may all lie on one side of the nearer one."""
    model, args, _ = bump_problem([RING])
    density = density_of(model, args, torch.tensor([[RING[2:4]]], dtype=torch.float64) * 0.97)
    mode = density.modes[0, 0]
    lines = mode[0] + torch.linspace(-0.02, 0.02, 1601, dtype=torch.float64)
    peaks = Finder().find(Slices(density, torch.zeros_like(lines, dtype=torch.long), lines.unsqueeze(-1), 33))
    near = (peaks.position - mode[1]).abs() < 0.3
    assert (peaks.scale[near] < 1e-3).all()
    assert (torch.bincount(peaks.row[near], minlength=len(lines)) == 2).all()


def test_of_two_peaks_in_one_place_the_narrow_one_stays():
    row, place = torch.zeros(4, dtype=torch.long), torch.tensor([0.0, 1e-5, 1.1e-5, 3.0])
    assert _unique(row, place, torch.tensor([1.0, 1e-4, 1e-4, 1.0])).tolist() == [1, 3]
    assert _unique(row, place, torch.tensor([1e-4, 1.0, 1e-4, 1.0])).tolist() == [0, 3]


def test_rules_that_are_not_led_to_holes_and_hills_miss_them(monkeypatch):
    monkeypatch.setattr(quadrature, "with_features", lambda density, _: density)
    model, args, truth = bump_problem()
    got = evidence(model, *args, method="quadrature", seed=0, progress=False)
    assert ((got.value - truth).abs() > 10 * (got.upper - got.value)).any()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_smooth_posteriors_have_no_isolated_features(dim):
    model = LinearVAE(4, dim, sigma=0.3).double().requires_grad_(False)
    log_joint = LogJoint(model, model(n=5))
    location, scale = prior_scale(log_joint)
    modes = find_modes(log_joint, log_joint.sample_prior(5), location, scale)
    density = with_features(Density.around(log_joint, modes, location, scale), 1e-7)
    assert density.features.isnan().all()
