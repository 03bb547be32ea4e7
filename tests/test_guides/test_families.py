"""The families of guides: their densities, draws and gradients, what they reach on a model whose evidence is known."""

import math
import sys
from functools import partial

import mpmath
import numpy
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from torch.distributions import constraints

from guides import ConstantVariance, Flow, FullRank, HMCRefined, LowRank, MeanField, Mixture, Resampled
from guides.mixture import MixtureNormal
from guides.networks import mlp
from inference import ELBO, AnalyticELBO, elbo, fit, log_weights, predictive, reconstruct
from inference.numerics.linalg import cholesky_of_sum
from zoo import DeepGaussianVAE, LinearVAE
from zoo.priors import factorised as priors

KINDS = {
    "LowRank": lambda **options: LowRank(3, 2, hidden=(8,), **options),
    "ConstantVariance": lambda **options: ConstantVariance(3, 2, hidden=(8,), **options),
    "Mixture": lambda **options: Mixture(3, 2, num_components=3, hidden=(8,), **options),
    "Flow": lambda **options: Flow(3, 2, hidden=(8,), flow_hidden=(8,), **options),
}
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def guide_of(kind, **options):
    """A guide far from its initial state, whose scale is around one."""
    guide = KINDS[kind](**options).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(1.5)
    return guide


# --- densities and draws ---------------------------------------------------------------------------

REAL, UNIT = constraints.real_vector, constraints.unit_interval


def grid(num, reach):
    line = torch.linspace(-reach, reach, num, dtype=torch.float64)
    return torch.cartesian_prod(line, line).unsqueeze(1), float(line[1] - line[0]) ** 2


@pytest.mark.parametrize(
    ("kind", "support"),
    [
        pytest.param(kind, support, marks=[pytest.mark.slow] if kind == "Flow" and support is UNIT else [])
        for kind in KINDS
        for support in (REAL, UNIT)
    ],
    ids=lambda value: value if isinstance(value, str) else "real" if value is REAL else "unit interval",
)
@torch.no_grad()
def test_the_density_is_that_of_the_draws(kind, support):
    distribution = guide_of(kind, support=support).posterior(X[:1])
    draws, transform = distribution.sample((20_000,)), torch.distributions.biject_to(distribution.support)
    free = transform.inv(draws)
    t, area = grid(535, 8.0) if kind == "Flow" else grid(401, 12.0)
    u = free.mean(0) + free.std(0) * t
    z = transform(u)
    weights = (distribution.log_prob(z) + transform.log_abs_det_jacobian(u, z)).exp() * area * free.std(0).prod()
    # A spline's slope has kinks, whose error falls as the spacing squared: 1e-3 at a spacing of .06, 3e-4 at .03.
    torch.testing.assert_close(weights.sum(0), torch.ones(1).double(), rtol=0, atol=1e-3 if kind == "Flow" else 1e-8)
    for moment in (lambda a: a, lambda a: a.square(), lambda a: a.prod(-1, keepdim=True)):
        exact = torch.einsum("gn,gnk->nk", weights, moment(z))
        error = moment(draws).std(0) / math.sqrt(len(draws))
        assert float(((moment(draws).mean(0) - exact).abs() / error).max()) < 4.5
    assert float(((1.1 * draws).square().mean(0) - weights.T @ z.square().squeeze(1)).abs().max() / error.max()) > 4.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_distribution_over_a_larger_batch_is_the_same(kind):
    distribution = guide_of(kind).posterior(X)
    wide, z = distribution.expand((3, 4)), torch.randn(3, 4, 2).double()
    assert (wide.batch_shape, wide.event_shape, wide.rsample((5,)).shape) == ((3, 4), (2,), (5, 3, 4, 2))
    torch.testing.assert_close(wide.log_prob(z), torch.stack([distribution.log_prob(one) for one in z]))


@pytest.mark.parametrize("kind", KINDS)
def test_free_parameters_give_the_encoders_distribution(kind):
    # What a local guide stands on: it trains the rows that the encoder would have given.
    guide = guide_of(kind)
    rows, z = guide.encode(X).detach(), torch.randn(4, 2).double()
    assert rows.shape == (4, guide.num_parameters)
    torch.testing.assert_close(guide.family(rows).log_prob(z), guide.posterior(X).log_prob(z))


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_kept_in_the_description(kind):
    guide = KINDS[kind](support=(0.0, 1.0))
    again = type(guide)(**guide.config())
    again.load_state_dict(guide.state_dict())
    assert again.config() == guide.config()


# --- low rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1.0, 1e-4])
def test_a_low_rank_covariance_is_accurate_with_a_small_diagonal(d):
    guide = LowRank(3, 3, rank=2).double()
    entries = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = torch.cat([torch.zeros(3).double(), torch.full((3,), math.log(d), dtype=torch.float64), entries])[None]
    value = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    with mpmath.workdps(50):
        factor = mpmath.matrix(entries.reshape(3, 2).tolist())
        covariance = factor * factor.T + mpmath.mpf(math.exp(math.log(d))) ** 2 * mpmath.eye(3)
        r = mpmath.matrix(value.tolist())
        square = (r.T * mpmath.inverse(covariance) * r)[0]
        exact = -(square + mpmath.log(mpmath.det(covariance)) + 3 * mpmath.log(2 * mpmath.pi)) / 2
    distribution = guide.family(parameters)
    # The condition of the factors is 1 / d: that of the covariance, its square, would leave no digit.
    assert float(distribution.log_prob(value)) == pytest.approx(
        float(exact), rel=50 * torch.finfo(torch.float64).eps / d
    )
    factors = (torch.diag_embed(torch.full((1, 3), d, dtype=torch.float64)), entries.reshape(1, 3, 2))
    expected = sum(f @ f.mT for f in factors)
    torch.testing.assert_close(distribution.covariance_matrix, expected, rtol=1e-12, atol=1e-12)
    root = cholesky_of_sum(*factors)
    assert bool((root.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert torch.equal(root, root.tril())


# --- constant variance -----------------------------------------------------------------------------


def test_one_variance_serves_all():
    guide = ConstantVariance(3, 2, sigma=0.5, learn_sigma=False)
    variance = guide.posterior(X.float()).variance
    torch.testing.assert_close(variance, torch.full((4, 2), 0.25))
    assert not guide.log_sigma.requires_grad
    assert guide.num_parameters == 2
    with pytest.raises(ValueError, match="expected a positive finite sigma, got 0"):
        ConstantVariance(3, 2, sigma=0.0)


# --- the mixture's gradient ------------------------------------------------------------------------


def mixture_parameters():
    generator = torch.Generator().manual_seed(5)
    logits, locs, log_sigmas = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 2), (3, 2))
    )
    return [t.requires_grad_() for t in (logits, locs, 0.3 * log_sigmas)]


def exact_expectation(logits, locs, log_sigmas):
    """E[z_1 z_2^2 + z_1] of the mixture."""
    second = locs[:, 1].square() + (2 * log_sigmas[:, 1]).exp()
    return (logits.softmax(-1) * (locs[:, 0] * second + locs[:, 0])).sum()


def frozen_component(distribution, num):
    """Draws whose component is a constant: the planted defect, blind to the weights."""
    index = torch.distributions.Categorical(logits=distribution.log_weights).sample((num,))
    return distribution.locs[index] + distribution.sigmas[index] * torch.randn(num, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    "draw", [lambda distribution, num: distribution.rsample((num,)), frozen_component], ids=["ours", "frozen"]
)
def test_draws_of_a_mixture_carry_the_distributions_gradient(draw):
    parameters = mixture_parameters()
    exact = torch.autograd.grad(exact_expectation(*parameters), parameters)
    logits, locs, log_sigmas = parameters
    estimates = []
    for _ in range(50):
        z = draw(MixtureNormal(logits, locs, log_sigmas.exp()), 4000)
        estimates.append(
            torch.autograd.grad((z[:, 0] * z[:, 1].square() + z[:, 0]).mean(), parameters, allow_unused=True)
        )
    worst = []
    for expected, *got in zip(exact, *estimates):
        got = torch.stack([torch.zeros_like(expected) if g is None else g for g in got])
        error = got.std(0) / math.sqrt(len(got))
        worst.append(float(((got.mean(0) - expected).abs() / (error + 1e-12)).max()))
    assert (max(worst) < 4) == (draw is not frozen_component)


def test_moments_of_a_mixture_are_those_of_its_density():
    logits, locs, log_sigmas = (p.detach() for p in mixture_parameters())
    distribution = MixtureNormal(logits, locs, log_sigmas.exp())
    z, area = grid(401, 12.0)
    weights = distribution.log_prob(z.squeeze(1)).exp() * area
    mean = weights @ z.squeeze(1)
    torch.testing.assert_close(distribution.mean, mean)
    torch.testing.assert_close(distribution.variance, weights @ (z.squeeze(1) - mean).square())


# --- what a family reaches -------------------------------------------------------------------------


def rotated_model(degrees=45.0):
    """W = diag(2, 1) R, gamma^2 = 100: at 45 degrees diagonal guides lose .220912 nats for every x."""
    model = LinearVAE(2, 2, sigma=0.1, learn_sigma=False).double()
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    with torch.no_grad():
        model.W.copy_(torch.diag(torch.tensor([2.0, 1.0])) @ torch.tensor([[c, -s], [s, c]]))
    return model.requires_grad_(False)


def gap_at_the_optimum(guide, degrees):
    """Evidence less ELBO, mean over 100 data, after the guide alone was trained by LBFGS in closed form."""
    model, guide = rotated_model(degrees), guide.double()
    x = model(n=100)
    loss = AnalyticELBO()(model, guide)
    optimizer = torch.optim.LBFGS(guide.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    return float((model.log_evidence(x) - AnalyticELBO().per_datum(model, guide, x)).mean().detach())


def precision(degrees):
    W = rotated_model(degrees).W
    return torch.eye(2).double() + 100 * W.T @ W


def low_rank_of_one_sign():
    """A factor that is the same for all data at first: one that changes its sign between them may stay so."""
    guide = LowRank(2, 2, rank=1, hidden=())
    with torch.no_grad():
        guide.encoder[0].weight.zero_()
        guide.encoder[0].bias.fill_(0.1)
    return guide


DIAGONAL = {45: 0.220912, 30: 0.174150}
GAPS = {
    "MeanField": (lambda: MeanField(2, 2, hidden=()), DIAGONAL.get),
    # One variance for both coordinates, 2 / tr M.
    "ConstantVariance": (
        lambda: ConstantVariance(2, 2, hidden=()),
        lambda degrees: float((precision(degrees).trace() / 2).log() - 0.5 * precision(degrees).logdet()),
    ),
    "FullRank": (lambda: FullRank(2, 2, hidden=()), lambda degrees: 0.0),  # noqa: ARG005
    "LowRank": (low_rank_of_one_sign, lambda degrees: 0.0),  # noqa: ARG005
}


@pytest.mark.parametrize("degrees", DIAGONAL)
@pytest.mark.parametrize("kind", GAPS)
def test_the_gap_of_each_gaussian_family_is_the_one_known(kind, degrees):
    make, expected = GAPS[kind]
    assert gap_at_the_optimum(make(), degrees) == pytest.approx(expected(degrees), abs=1e-5)


@pytest.mark.slow
def test_a_flow_closes_the_gap_that_correlations_make():
    model, x = rotated_model(), rotated_model()(n=1000)
    guide = Flow(2, 2, hidden=(32,), flow_hidden=(32,), context_dim=4).double()
    for lr, steps in ((5e-3, 3000), (5e-4, 1500)):
        adam = partial(torch.optim.Adam, lr=lr)
        fit(model, guide, x, steps=steps, batch_size=250, optimizer=adam, objective=ELBO(4), progress=False, seed=0)
    found = elbo(log_weights(model, guide, x, num_samples=200, seed=1, progress=False))
    gap = float((model.log_evidence(x) - found.value).mean())
    error = float(found.standard_error.square().sum().sqrt()) / len(x)
    assert -3 * error < gap < 0.220912 / 10  # a tenth of what diagonal guides lose


def test_a_flows_draw_brings_the_density_that_its_inverse_gives():
    guide = Flow(3, 2, hidden=(8,), flow_hidden=(8,)).double()
    distribution = guide.posterior(X)
    drawn = distribution.rsample((50,))
    brought, found = distribution.log_prob(drawn), distribution.log_prob(drawn.clone())
    torch.testing.assert_close(brought, found, rtol=1e-9, atol=1e-9)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(v.sum(), parameters, retain_graph=True) for v in (brought, found))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        assert not distribution.log_prob(drawn).requires_grad
        fixed = distribution.sample((50,))
    assert distribution.log_prob(fixed).requires_grad


# --- guides known by their draws -------------------------------------------------------------------


def one_dimensional(prior=None):
    model = DeepGaussianVAE(1, 1, hidden=(8,), prior=prior).double()
    with torch.no_grad():
        model.noise.log_sigma.fill_(math.log(0.5))
        for parameter in model.network.parameters():
            parameter.mul_(3)
    guide = MeanField(1, 1, hidden=(), support=model.prior().support).double()
    with torch.no_grad():
        guide.encoder[0].weight.fill_(0.2)
        guide.encoder[0].bias.fill_(0.1)
    return model, guide


ONE = torch.tensor([[1.3]]).double()


def log_ratio(model, guide, z):
    distribution = guide.posterior(ONE)
    return model.prior().log_prob(z) + model.likelihood(z).log_prob(ONE) - distribution.log_prob(z)


def cdf_of(density, z):
    """The distribution function of a density that is given on a grid, as a function of numbers."""
    mass = torch.cumulative_trapezoid(density, z)
    table = numpy.concatenate([[0.0], (mass / mass[-1]).numpy()])
    return lambda value: numpy.interp(value, z.numpy(), table)


@torch.no_grad()
def test_a_resampled_draw_has_the_distribution_of_the_iwae_bound():
    model, base = one_dimensional()
    z = torch.linspace(-8, 8, 1601).double()
    points = z.reshape(-1, 1, 1)
    ratio = log_ratio(model, base, points).squeeze(-1)
    q = base.posterior(ONE).log_prob(points).squeeze(-1).exp()
    # Either of the two may be the one: q(z) E_{z'} 2 w(z) / (w(z) + w(z')).
    share = torch.sigmoid(ratio.unsqueeze(1) - ratio) @ (q * (z[1] - z[0]))
    cdf = cdf_of(2 * q * share, z)
    draws = Resampled(model, base, num_proposals=2).draw(ONE, 20_000).flatten().numpy()
    assert scipy.stats.kstest(draws, cdf).pvalue > 1e-3
    assert scipy.stats.kstest(base.posterior(ONE).sample((20_000,)).flatten().numpy(), cdf).pvalue < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("prior", [None, lambda: priors.Uniform(1, -2.0, 2.0)], ids=["normal", "uniform"])
@pytest.mark.parametrize(
    "refine",
    [
        lambda *pair: Resampled(*pair, num_proposals=500),
        lambda *pair: HMCRefined(*pair, num_steps=60, num_leapfrog=8, step=0.3),
    ],
    ids=["resampled", "hmc"],
)
def test_refined_draws_are_those_of_the_posterior(prior, refine):
    model, base = one_dimensional(None if prior is None else prior())
    z = torch.linspace(-8, 8, 4001).double() if prior is None else torch.linspace(-2, 2, 4003)[1:-1].double()
    points = z.reshape(-1, 1, 1)
    log_joint = (model.prior().log_prob(points) + model.likelihood(points).log_prob(ONE)).squeeze(-1)
    cdf = cdf_of((log_joint - log_joint.max()).exp(), z)
    draws = refine(model, base).draw(ONE, 3000)
    assert draws.shape == (3000, 1, 1)
    assert scipy.stats.kstest(draws.flatten().numpy(), cdf).pvalue > 1e-3
    assert scipy.stats.kstest(base.posterior(ONE).sample((3000,)).flatten().numpy(), cdf).pvalue < 1e-6


REFINED = {"Resampled": Resampled, "HMCRefined": HMCRefined}


def refined(kind):
    model = DeepGaussianVAE(3, 2, hidden=(8,)).double()
    return model, REFINED[kind](model, MeanField(3, 2, hidden=(8,)).double())


@pytest.mark.parametrize("kind", REFINED)
def test_a_guide_without_density_predicts_and_reconstructs(kind):
    model, guide = refined(kind)
    z = Predictive(model, guide=guide, num_samples=7, parallel=True)(X)["z"]
    assert z.shape == (7, 4, 2)
    assert len(set(z.flatten().tolist())) == 7 * 4 * 2
    assert predictive(model, guide, X, num_samples=7)["x"].shape == (7, 4, 3)
    assert reconstruct(model, guide, X, num_samples=7).shape == (4, 3)


@pytest.mark.parametrize("kind", REFINED)
def test_a_guide_without_density_is_refused_by_name(kind):
    model, guide = refined(kind)
    message = f"expected a guide with a density, got {kind}, of which only samples are known"
    with pytest.raises(ValueError, match=message):
        log_weights(model, guide, X, num_samples=3)
    with pytest.raises(ValueError, match=message):
        Trace_ELBO().loss(model, guide, X)
    with pytest.raises(
        ValueError, match="expected a reparameterised distribution at guide site 'z', got SampledDistribution"
    ):
        ELBO().loss(model, guide, X)


@pytest.mark.parametrize("kind", REFINED)
def test_the_model_inside_a_guide_leaks_no_site_and_no_parameter(kind):
    model, guide = refined(kind)
    trace = poutine.trace(guide).get_trace(X)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["data", "z"]
    assert {name for name, _ in guide.named_parameters()} == {f"base.{n}" for n, _ in guide.base.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert not trace.nodes["z"]["value"].requires_grad


def test_what_a_refined_guide_cannot_stand_on_is_refused():
    model, guide = refined("Resampled")
    with pytest.raises(TypeError, match=r"expected a model with prior\(\) and likelihood\(z\), got Sequential"):
        Resampled(mlp(2, 2), guide.base)
    with pytest.raises(TypeError, match=r"expected a guide with posterior\(x\) to start from, got Resampled"):
        Resampled(model, guide)
    with pytest.raises(ValueError, match="expected num_proposals to be at least 1, got 0"):
        Resampled(model, guide.base, num_proposals=0)
    with pytest.raises(ValueError, match="expected a positive step, got 0"):
        HMCRefined(model, guide.base, step=0)


# --- the optional dependency -----------------------------------------------------------------------


def test_without_zuko_a_flow_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ImportError, match=r"pip install elbozoo\[flows\]"):
        Flow(3, 2)


def test_a_flow_leaves_the_validation_of_distributions_as_it_was(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    for validate in (True, False):
        monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", validate)
        Flow(3, 2)
        assert torch.distributions.Distribution._validate_args is validate
    assert "zuko.flows" in sys.modules
