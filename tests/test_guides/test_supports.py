"""Guides on bounded supports: densities, draws, moments and divergences, against SciPy, autograd and closed forms."""

import copy

import numpy
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch
from torch.autograd import gradcheck
from torch.distributions import constraints, kl_divergence

from guides import FullRank, Linear, MeanField
from guides.supports import describe_support, read_support
from inference import ELBO, AnalyticKLELBO, log_weights
from inference.distributions.expectations import expectation
from inference.distributions.gaussian import DiagNormal, FullNormal, coordinate_kl
from inference.distributions.transformed import Transformed, is_unbounded, push_forward, vector_support
from zoo import DeepGaussianVAE
from zoo.priors import factorised as priors

SUPPORTS = {
    "unit interval": constraints.unit_interval,
    "centred interval": constraints.interval(-0.5, 0.5),
    "vector interval": constraints.independent(constraints.interval(2.0, 5.0), 1),
    "positive": constraints.positive,
    "above": constraints.greater_than(-1.0),
    "below": constraints.less_than(3.0),
}
# What SciPy knows as the derivative and inverse of the transform of each support.
INVERSES = {
    "unit interval": lambda z: scipy.special.logit(z),
    "centred interval": lambda z: scipy.special.logit(z + 0.5),
    "vector interval": lambda z: scipy.special.logit((z - 2) / 3),
    "positive": lambda z: scipy.special.log1p(z - 1),
    "above": lambda z: scipy.special.log1p(z),
    "below": lambda z: scipy.special.log1p(2 - z),
}
MEAN = torch.tensor([[0.3, -1.2, 0.0], [2.0, 0.1, -0.7]], dtype=torch.float64)
SIGMA = torch.tensor([[0.4, 1.0, 1.75], [0.02, 0.7, 1e-3]], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6, -0.3], [0.6, 0.8, 0.1], [-0.3, 0.1, 0.5]], dtype=torch.float64)


def doubles(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def quad(function, lower, upper, points=None):
    """SciPy's adaptive integral, to what its own estimate of the error says is enough."""
    value, error, *_ = scipy.integrate.quad(
        function, lower, upper, epsabs=1e-13, epsrel=1e-12, limit=500, points=points, full_output=True
    )
    assert error < 1e-9 * max(1, abs(value))
    return value


def distribution_on(name):
    return Transformed(DiagNormal(MEAN, SIGMA), SUPPORTS[name])


# --- the distribution ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_density_is_that_of_a_change_of_variables(name):
    distribution, z = distribution_on(name), distribution_on(name).sample()
    u = torch.from_numpy(INVERSES[name](z.numpy()))
    # dT/du by a finite difference of the inverse would lose digits; autograd of the transform does not.
    free = u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(distribution.transform(free).sum(), free)
    expected = scipy.stats.norm(MEAN, SIGMA).logpdf(u).sum(-1) - slope.abs().log().sum(-1).numpy()
    torch.testing.assert_close(distribution_on(name).log_prob(z), torch.from_numpy(expected), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_density_integrates_to_one_and_is_zero_outside(name):
    support = vector_support(SUPPORTS[name]).base_constraint
    ends = [float(getattr(support, end, limit)) for end, limit in (("lower_bound", -30), ("upper_bound", 200))]
    one = Transformed(DiagNormal(MEAN[:1, :1], SIGMA[:1, :1]), SUPPORTS[name])
    mass = quad(
        lambda z: float(one.log_prob(*doubles([[z]])).exp()),
        *ends,
        [float(one.mean)],
    )
    assert mass == pytest.approx(1, abs=1e-8)
    for end, limit, step in zip(ends, (-30, 200), (-0.1, 0.1)):
        if end != limit:
            assert float(one.log_prob(torch.full((1, 1), end + step, dtype=torch.float64))) == -torch.inf


@pytest.mark.parametrize("name", SUPPORTS)
def test_draws_have_the_support_the_quantiles_and_the_gradient(name):
    mean, sigma = MEAN.clone().requires_grad_(), SIGMA
    distribution = Transformed(DiagNormal(mean, sigma), SUPPORTS[name])
    draws = distribution.rsample((4000,))
    assert distribution.has_rsample
    assert draws.shape == (4000, 2, 3)
    assert bool(distribution.support.check(draws).all())
    pit = scipy.stats.norm(MEAN, SIGMA).cdf(INVERSES[name](draws.detach().numpy()))
    pit = 1 - pit if name == "below" and pit[:, 0, 0].mean() > 0.9 else pit
    assert all(scipy.stats.kstest(pit[:, i, j], "uniform").pvalue > 1e-4 for i in range(2) for j in range(3))
    (got,) = torch.autograd.grad(draws.sum(), mean)
    u = distribution.transform.inv(draws.detach()).requires_grad_()
    (expected,) = torch.autograd.grad(distribution.coordinate_transform(u).sum(), u)
    torch.testing.assert_close(got, expected.sum(0), rtol=1e-6, atol=1e-6)


def test_a_draw_rounded_to_the_supports_end_is_scored_where_drawn():
    distribution = Transformed(
        DiagNormal(torch.full((1, 1), 60.0).double(), torch.ones(1).double()), constraints.unit_interval
    )
    z = distribution.sample()
    assert float(z) > 1 - 1e-15
    u = float(distribution.transform.inv(z))
    assert u > 50
    expected = scipy.stats.norm(60, 1).logpdf(u) + u  # the slope of the sigmoid is exp(-u) there
    assert float(distribution.log_prob(z)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("covariance", [None, COVARIANCE])
def test_mean_and_variance_are_those_of_quadrature(name, covariance):
    base = DiagNormal(MEAN, SIGMA) if covariance is None else FullNormal(MEAN, torch.linalg.cholesky(covariance))
    distribution = Transformed(base, SUPPORTS[name])
    transform, sigma = distribution.coordinate_transform, base.variance.sqrt()

    def moment(power, m, s, centre=0.0):
        return quad(
            lambda t: (float(transform(*doubles(m + s * t))) - centre) ** power * scipy.stats.norm.pdf(t),
            -12,
            12,
        )

    for i, j in ((0, 0), (0, 2), (1, 1)):
        m, s = float(MEAN[i, j]), float(sigma[i, j])
        mean = moment(1, m, s)
        assert float(distribution.mean[i, j]) == pytest.approx(mean, abs=1e-10, rel=1e-9)
        assert float(distribution.variance[i, j]) == pytest.approx(moment(2, m, s, mean), abs=1e-10, rel=1e-8)


def test_expansion_is_the_same_distribution_over_more():
    distribution = distribution_on("unit interval")
    wide = distribution.expand((5, 2))
    assert (wide.batch_shape, wide.event_shape) == ((5, 2), (3,))
    z = distribution.sample()
    torch.testing.assert_close(wide.log_prob(z.expand(5, 2, 3)), distribution.log_prob(z).expand(5, 2))
    assert distribution.expand((2,)) is distribution


def test_a_distribution_on_all_vectors_is_left_alone():
    distribution = DiagNormal(MEAN, SIGMA)
    assert (
        push_forward(distribution, constraints.real_vector)
        is push_forward(distribution, constraints.real)
        is distribution
    )
    assert is_unbounded(copy.deepcopy(constraints.real_vector))


@pytest.mark.parametrize("bad", [constraints.simplex, constraints.boolean, constraints.lower_cholesky])
def test_a_support_that_no_vector_of_free_coordinates_has_is_refused(bad):
    with pytest.raises(ValueError, match="support"):
        MeanField(3, 2, support=bad)


def test_what_is_no_support_is_refused():
    with pytest.raises(TypeError, match=r"expected a constraint of torch\.distributions as support, got str"):
        MeanField(3, 2, support="unit_interval")


# --- expectations and divergences ------------------------------------------------------------------

PRIORS = {
    "uniform": (dist.Uniform(*doubles(-0.5, 0.5)), constraints.interval(-0.5, 0.5), scipy.stats.uniform(-0.5, 1)),
    "wide uniform": (dist.Uniform(*doubles(-2, 7)), constraints.interval(-0.5, 0.5), scipy.stats.uniform(-2, 9)),
    "beta": (dist.Beta(*doubles(2, 3.5)), constraints.unit_interval, scipy.stats.beta(2, 3.5)),
    "spiked beta": (dist.Beta(*doubles(0.5, 0.7)), constraints.unit_interval, scipy.stats.beta(0.5, 0.7)),
    "gamma": (dist.Gamma(*doubles(2, 1.5)), constraints.positive, scipy.stats.gamma(2, scale=1 / 1.5)),
    "normal": (dist.Normal(*doubles(0.2, 0.6)), constraints.unit_interval, scipy.stats.norm(0.2, 0.6)),
    "laplace": (dist.Laplace(*doubles(0.3, 0.8)), constraints.real, scipy.stats.laplace(0.3, 0.8)),
    "student": (dist.StudentT(*doubles(4, 0.3, 0.8)), constraints.real, scipy.stats.t(4, 0.3, 0.8)),
}


def scipy_kl(transform, prior, m, s):
    """KL of the transform of N(m, s^2) by SciPy: the integral of log q(u) - log p(T(u)) - log T'(u)."""

    def integrand(t):
        u = torch.tensor(m + s * t, dtype=torch.float64, requires_grad=True)
        z = u * 1.0 if transform is None else transform(u)
        (slope,) = torch.autograd.grad(z, u)
        log_ratio = scipy.stats.norm(m, s).logpdf(u.item()) - prior.logpdf(z.item()) - slope.abs().log().item()
        return log_ratio * scipy.stats.norm.pdf(t)

    kink = [(0.3 - m) / s] if transform is None and abs((0.3 - m) / s) < 10 else None
    return quad(integrand, -10, 10, kink)


@pytest.mark.parametrize("name", PRIORS)
def test_kl_of_a_gaussian_guide_is_that_of_scipy(name):
    factor, support, reference = PRIORS[name]
    prior, distribution = factor.expand((3,)).to_event(1), push_forward(DiagNormal(MEAN, SIGMA), support)
    transform = distribution.coordinate_transform if isinstance(distribution, Transformed) else None
    rates = coordinate_kl(distribution, prior)
    assert rates.shape == (2, 3)
    torch.testing.assert_close(kl_divergence(distribution, prior), rates.sum(-1), rtol=1e-12, atol=1e-12)
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 1)):
        expected = scipy_kl(transform, reference, float(MEAN[i, j]), float(SIGMA[i, j]))
        assert float(rates[i, j]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", PRIORS)
def test_kl_with_a_full_covariance_is_the_mean_log_ratio(name):
    factor, support, _ = PRIORS[name]
    prior = factor.expand((3,)).to_event(1)
    distribution = push_forward(FullNormal(MEAN, torch.linalg.cholesky(COVARIANCE)), support)
    z = distribution.sample((20_000,))
    ratios = distribution.log_prob(z) - prior.log_prob(z)
    error = ratios.std(0) / 20_000**0.5
    kl = kl_divergence(distribution, prior)
    assert bool(((ratios.mean(0) - kl).abs() < 4 * error).all())
    # Without the correlations it is another distribution, and the same test notices.
    other = kl_divergence(push_forward(DiagNormal(MEAN, COVARIANCE.diagonal().sqrt()), support), prior)
    assert not bool(((ratios.mean(0) - other).abs() < 4 * error).all())


@pytest.mark.parametrize("name", PRIORS)
def test_kl_is_differentiable(name):
    factor, support, _ = PRIORS[name]
    prior = factor.expand((3,)).to_event(1)
    inputs = (MEAN[:1].clone().requires_grad_(), SIGMA[:1].clone().requires_grad_())
    assert gradcheck(lambda m, s: kl_divergence(push_forward(DiagNormal(m, s), support), prior), inputs)


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.01, 1e-13), (1.0, 1e-13), (3.0, 1e-12), (6.0, 1e-9), (12.0, 2e-5)])
def test_the_stated_accuracy_of_the_quadrature_holds(sigma, tolerance):
    got = expectation(torch.nn.functional.softplus, *doubles([0.4], [sigma]))
    expected = quad(lambda t: numpy.logaddexp(0, 0.4 + sigma * t) * scipy.stats.norm.pdf(t), -12, 12)
    assert float(got) == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_the_logit_normal_closest_to_the_uniform_distribution():
    # What a collapsed guide of a model with a uniform prior looks like; the two figures were found independently.
    prior = priors.Uniform(1, -0.5, 0.5).double()()

    def divergence(variance):
        base = DiagNormal(torch.zeros(1).double(), torch.full((1,), variance**0.5).double())
        return float(kl_divergence(push_forward(base, prior.support), prior))

    best = scipy.optimize.minimize_scalar(divergence, bounds=(0.5, 10), method="bounded", options={"xatol": 1e-9})
    assert best.x == pytest.approx(3.058, abs=0.01)
    assert best.fun == pytest.approx(0.00951, abs=0.0002)


def test_a_guide_beyond_the_priors_support_has_no_finite_kl():
    prior = dist.Uniform(-0.4 * torch.ones(3).double(), 0.5).to_event(1)
    assert bool((coordinate_kl(distribution_on("centred interval"), prior) == torch.inf).all())
    with pytest.raises(ValueError, match=r"give the guide support=model.prior\(\).support"):
        kl_divergence(DiagNormal(MEAN, SIGMA), prior)


# --- guides ----------------------------------------------------------------------------------------

BOUNDED_PRIORS = {
    "uniform": lambda: priors.Uniform(2, -0.5, 0.5),
    "beta": lambda: priors.Beta(2, 2.0, 3.0),
    "learnt beta": lambda: priors.LearntBeta(2, 1.5, 2.0),
}
KINDS = {
    "Linear": Linear,
    "MeanField": lambda *dims, **options: MeanField(*dims, hidden=(8,), **options),
    "FullRank": lambda *dims, **options: FullRank(*dims, hidden=(8,), **options),
}
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", BOUNDED_PRIORS)
def test_the_analytic_kl_is_the_monte_carlo_one_without_its_noise(kind, prior):
    model = DeepGaussianVAE(4, 2, hidden=(8,), prior=BOUNDED_PRIORS[prior]()).double()
    guide = KINDS[kind](4, 2, support=model.prior().support).double()
    with torch.no_grad():
        draws = torch.stack([ELBO(40).per_datum(model, guide, X) for _ in range(100)])
        exact = torch.stack([AnalyticKLELBO(40).per_datum(model, guide, X) for _ in range(100)])
    error = ((draws.var(0) + exact.var(0)) / 100).sqrt()
    assert bool(((draws.mean(0) - exact.mean(0)).abs() < 4 * error).all())
    kl = kl_divergence(guide.posterior(X), model.prior()).detach()
    assert bool((kl > 6 * error).any())  # so that a KL of nought would have failed
    weights = log_weights(model, guide, X, num_samples=50)
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", [(0, 1), (-0.5, 0.5), (2.0, None), (None, 1.0)])
def test_a_guide_is_rebuilt_with_its_support(kind, support):
    guide = KINDS[kind](4, 2, support=support)
    again = type(guide)(**guide.config())
    again.load_state_dict(guide.state_dict())
    z = guide.posterior(X.float()).sample()
    torch.testing.assert_close(again.posterior(X.float()).log_prob(z), guide.posterior(X.float()).log_prob(z))
    assert guide.config()["support"] == list(support)
    assert "support" not in KINDS[kind](4, 2).config()


def test_bounds_of_tensors_become_numbers_where_they_can():
    low, high = torch.zeros(2), torch.ones(2)
    assert describe_support(read_support(constraints.interval(low, high))) == {"support": [0.0, 1.0]}
    uneven = read_support(constraints.interval(low, torch.tensor([1.0, 2.0])))
    with pytest.raises(NotImplementedError, match="cannot be rebuilt"):
        describe_support(uneven)
    distribution = MeanField(4, 2, support=uneven).posterior(X.float())
    assert float(distribution.mean[:, 1].detach().max()) > 0.5
    assert bool(uneven.check(distribution.sample((100,))).all())
