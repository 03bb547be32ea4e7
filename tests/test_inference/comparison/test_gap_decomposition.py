"""The gap and its two parts: against closed forms, against theory in the limit of little noise, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from registry import data_for

from guides import (
    Exact,
    FullRank,
    GaussNewtonFull,
    Guide,
    Linear,
    LowRank,
    MeanField,
    Mixture,
    StudentT,
    TiedMeanField,
    WrappedEncoder,
    local_gauss_newton,
)
from inference import Importance, elbo, evidence, gap, log_weights, memory_limit, refit
from inference.comparison.gap_decomposition import _of_mean
from inference.comparison.local_problem import LocalProblem
from inference.comparison.refit_starts import starts_at_modes
from inference.comparison.refitting import _chosen, _settled
from inference.distributions.gaussian import DiagNormal
from inference.marginal_likelihood.analytic.exact import Exact as ExactEvidence
from inference.marginal_likelihood.analytic.near_deterministic import limit_terms
from inference.numerics.jacobian import decoder_jacobian
from inference.numerics.lbfgs import Minimum, minimise
from inference.numerics.whitened_noise import WhitenedNoise
from inference.pair.call import Call
from inference.pair.module import Module
from zoo import IMAVAE, DeepGaussianVAE, LinearVAE, Uniform, triangular_mlp

# --- the optimiser ---------------------------------------------------------------------------------


def test_it_solves_many_quadratics_of_different_shape_at_once():
    root = torch.randn(200, 6, 6, dtype=torch.float64)
    hessian, target = root @ root.mT + 0.01 * torch.eye(6), torch.randn(200, 6, dtype=torch.float64)

    def evaluate(point, index):
        image = (hessian[index] @ point.unsqueeze(-1)).squeeze(-1)
        return (0.5 * point * image - point * target[index]).sum(-1), image - target[index]

    found = minimise(evaluate, torch.zeros(200, 6, dtype=torch.float64))
    torch.testing.assert_close(found.point, torch.linalg.solve(hessian, target), atol=1e-3, rtol=1e-3)
    assert (found.gradient_norm < 1e-5).all()


def test_it_goes_along_a_curved_valley_and_never_up():
    def evaluate(point, index):  # noqa: ARG001
        with torch.enable_grad():
            p = point.detach().requires_grad_()
            value = (100 * (p[:, 1] - p[:, 0] ** 2) ** 2 + (1 - p[:, 0]) ** 2) + torch.where(p[:, 0] < -3, math.nan, 0)
            (gradient,) = torch.autograd.grad(value.sum(), p)
        return value.detach().nan_to_num(math.inf), gradient

    start = (1.5 * torch.randn(100, 2, dtype=torch.float64)).clamp(min=-2.9)
    found = minimise(evaluate, start)
    torch.testing.assert_close(found.point, torch.ones(100, 2, dtype=torch.float64), atol=1e-5, rtol=0)
    one = minimise(evaluate, start, max_steps=1)
    assert (one.value <= evaluate(start, None)[0]).all()
    assert (one.steps == 1).all()


def test_each_row_counts_its_own_steps_and_says_how_it_ended():
    scale, target = torch.tensor([[1.0, 1.0], [1.0, 100.0], [0.0, 0.0]]).double(), torch.ones(3, 2).double()

    def evaluate(point, index):
        gradient = scale[index] * (point - target[index])
        return 0.5 * (gradient * (point - target[index])).sum(-1), gradient

    found = minimise(evaluate, torch.zeros(3, 2, dtype=torch.float64))
    assert found.steps[2] == 0
    assert 0 < found.steps[0] < found.steps[1] < 200
    assert found.converged.tolist() == [True] * 3
    short = minimise(evaluate, torch.zeros(3, 2).double(), max_steps=int(found.steps[0]))
    assert short.converged.tolist() == [True, False, True]
    valley = minimise(evaluate, torch.full((3, 2), 1e3).double(), tolerance=0.0, max_steps=25, least_gain=1e9)
    assert valley.steps.max() <= 10  # so many steps have to gain as much


# --- the noise -------------------------------------------------------------------------------------


def test_slow_minimisations_end_at_a_small_gradient_in_the_end():
    def evaluate(point, _):
        return point.pow(4).sum(-1), 4 * point.pow(3)

    start = torch.full((1, 1), 0.7, dtype=torch.float64)
    whole = minimise(evaluate, start, tolerance=1e-40)
    found = minimise(evaluate, start, tolerance=1e-40, in_the_end=1e-2)
    assert int(found.steps) == 30 < int(whole.steps)
    assert float(found.gradient_norm) <= 1e-2


def test_whitened_noise_has_exact_moments_and_normal_marginals():
    white = WhitenedNoise()
    with white:
        first, other = torch.randn((40, 7, 5), dtype=torch.float64), torch.randn(41, 3, 2).double()
    with white:
        again = torch.randn((40, 7, 5), dtype=torch.float64)
    assert torch.equal(first, again)
    for noise in (first, other):
        second = torch.einsum("snk,snl->nkl", noise, noise) / len(noise)
        torch.testing.assert_close(noise.mean(0), torch.zeros_like(noise[0]), atol=1e-6, rtol=0)
        torch.testing.assert_close(second, torch.eye(noise.shape[-1]).expand_as(second).to(second), atol=1e-5, rtol=0)
    with WhitenedNoise():
        many = torch.randn((2000, 1, 3), dtype=torch.float64)
    # of each antithetic pair one, as the two are not independent
    assert scipy.stats.kstest(many[:1000].flatten().numpy(), "norm").pvalue > 0.01


def test_even_noise_is_normal_and_means_over_it_err_less():
    torch.manual_seed(0)
    slopes, shifts = torch.randn(2, 40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    spread = {}
    for even in (False, True):
        with WhitenedNoise(even=even):
            noise, wide = torch.randn((1024, 100, 2), dtype=torch.float64), torch.randn(1024, 2, 3, 9)
        spread[even] = (noise @ slopes + shifts).tanh().mean((0, -1)).std()
        for drawn in (noise, wide.double()):
            second = torch.einsum("s...k,s...l->...kl", drawn, drawn) / len(drawn)
            torch.testing.assert_close(second, torch.eye(drawn.shape[-1]).expand_as(second).double(), atol=1e-5, rtol=0)
    assert 4 * spread[True] < spread[False]
    assert scipy.stats.kstest(noise[:, 0, 0].numpy(), "norm").statistic < 0.01
    assert not torch.equal(noise[:, 0], noise[:, 1])  # each row has a shift of its own
    assert wide.dtype == torch.float32


def test_other_requests_are_left_alone():
    torch.manual_seed(0)
    expected = torch.randn(5, 3), torch.randn(4), torch.rand(6, 2, 2)
    torch.manual_seed(0)
    with WhitenedNoise():
        got = torch.randn(5, 3), torch.randn(4), torch.rand(6, 2, 2)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


# --- linear models: both parts in closed form ------------------------------------------------------


def linear_model(data_dim=6, latent_dim=3, sigma=0.3):
    model = LinearVAE(data_dim, latent_dim, sigma=sigma).double().requires_grad_(False)
    model.W.data = torch.randn(data_dim, latent_dim).double()
    return model


def family_gap(model):
    """What independent coordinates leave: half the sum of log M_kk minus half log det M."""
    m = model.W.mT @ model.W / model.sigma.square() + torch.eye(model.latent_dim).double()
    return 0.5 * (m.diagonal().log().sum() - torch.logdet(m))


GUIDES = {
    "MeanField": (lambda m: MeanField(m.data_dim, m.latent_dim, hidden=(8,)).double(), True),
    "Linear": (lambda m: Linear(m.data_dim, m.latent_dim).double(), True),
    "TiedMeanField": (TiedMeanField, True),
    "FullRank": (lambda m: FullRank(m.data_dim, m.latent_dim, hidden=(8,)).double(), False),
    "LowRank": (lambda m: LowRank(m.data_dim, m.latent_dim, rank=2, hidden=(8,)).double(), False),
    "Exact": (Exact, False),
    "WrappedEncoder": (
        lambda m: WrappedEncoder(
            torch.nn.Linear(m.data_dim, 2 * m.latent_dim).double(),
            lambda out: dist.Normal(out.chunk(2, -1)[0], out.chunk(2, -1)[1].exp()).to_event(1),
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", GUIDES)
def test_on_linear_models_both_parts_are_the_closed_forms(name):
    make, diagonal = GUIDES[name]
    model = linear_model()
    x, guide = model(n=30).detach(), make(model)
    if name == "WrappedEncoder":  # Pyro's Normal draws otherwise than by torch.randn: noise that is not whitened
        got = gap(model, guide, x[:4], num_samples=2000, restarts=0, progress=False)
        torch.testing.assert_close(got.approximation, family_gap(model).expand(4), atol=0.05, rtol=0)
        return
    got = gap(model, guide, x, restarts=1, progress=False)
    approximation = family_gap(model) if diagonal else torch.tensor(0.0).double()
    truth = torch.distributions.kl_divergence(guide.posterior(x), model.posterior(x)).detach()
    torch.testing.assert_close(got.approximation, approximation.expand(30), atol=1e-6, rtol=0)
    torch.testing.assert_close(got.amortisation, truth - approximation, atol=1e-6, rtol=1e-8)
    torch.testing.assert_close(got.total, truth, atol=1e-6, rtol=1e-8)
    torch.testing.assert_close(got.approximation + got.amortisation, got.total, atol=1e-6, rtol=1e-12)
    assert got.gradient_norm.max() < 1e-4


@pytest.mark.parametrize("sigma", [1e-2, 1e-4])
def test_it_is_right_at_little_noise(sigma):
    model = linear_model(sigma=sigma)
    x = model(n=10).detach()
    got = gap(model, local_gauss_newton(model, x), x, restarts=0, progress=False)
    torch.testing.assert_close(got.approximation, family_gap(model).expand(10), atol=1e-6, rtol=0)


def test_the_elbo_of_the_parts_is_the_one_that_weights_give():
    model = DeepGaussianVAE(5, 2, hidden=(8,)).double().requires_grad_(False)
    guide, x = MeanField(5, 2, hidden=(8,)).double(), data_for(model)
    got = refit(model, guide, x, restarts=0, progress=False)
    value, error = elbo(log_weights(model, guide, x, num_samples=20_000))
    assert ((got.own_elbo - value).abs() < 4 * (error.square() + got.own_standard_error.square()).sqrt()).all()
    again, error = elbo(log_weights(model, got.guide, x, num_samples=20_000))
    assert ((got.elbo - again).abs() < 4 * (error.square() + got.standard_error.square()).sqrt()).all()
    assert (got.improvement >= 0).all()
    assert got.improvement.median() > 0.1  # an untrained encoder leaves something to find


def test_no_other_guide_of_the_family_is_better():
    """The certificate: around the optimum every random step loses, on noise of its own."""
    model = DeepGaussianVAE(5, 2, hidden=(8,)).double().requires_grad_(False)
    guide, x = MeanField(5, 2, hidden=(8,)).double(), data_for(model)
    best = refit(model, guide, x, progress=False)
    assert best.gradient_norm.max() < 1e-5
    optimum = best.guide.offsets.detach().clone()
    for scale in (0.1, 1.0):
        with torch.no_grad():
            best.guide.offsets.copy_(optimum + scale * torch.randn_like(optimum))
        other = refit(model, best.guide, x, max_steps=1, restarts=0, tolerance=math.inf, progress=False)
        margin = 4 * (other.own_standard_error.square() + best.standard_error.square()).sqrt()
        assert (other.own_elbo < best.elbo + margin).all()
        assert (other.own_elbo < best.elbo).double().mean() > 0.95


# --- in the limit of little noise ------------------------------------------------------------------


class Bent(torch.nn.Module):
    """A smooth decoder whose columns are oblique: A z + 0.3 tanh(B z)."""

    def __init__(self, latent_dim, data_dim, seed, spread):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = 1 + spread * torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64)
        self.b = torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64)

    def forward(self, z):
        return z @ self.a.mT + 0.3 * torch.tanh(z @ self.b.mT)


@pytest.mark.parametrize(
    ("latent_dim", "data_dim", "seed", "spread"),
    [
        (2, 2, 9, 1),
        pytest.param(5, 5, 1, 1, marks=pytest.mark.slow),
        pytest.param(10, 10, 3, 1, marks=pytest.mark.slow),
        (2, 10, 0, 0.15),
    ],
)
def test_the_gap_is_the_contrast_and_a_full_covariance_closes_it(latent_dim, data_dim, seed, spread):
    network = Bent(latent_dim, data_dim, seed, spread)
    singular = torch.linalg.svdvals(decoder_jacobian(network, torch.randn(200, latent_dim).double()))
    assert (singular[:, 0] / singular[:, -1]).max() <= 100
    model = IMAVAE(data_dim, latent_dim, gamma2=1e5, network=network).double()
    x = model(n=8).detach()
    guide = local_gauss_newton(model, x)
    terms = limit_terms(model, x, guide.posterior(x).mean[None])
    assert terms.valid.all()
    assert terms.contrast.mean() >= 1
    got = refit(model, guide, x, restarts=0, num_samples=64, progress=False)
    difference = terms.log_evidence - got.elbo - terms.contrast
    assert (difference.abs() <= 0.02 * terms.contrast).all()
    full = refit(
        model, local_gauss_newton(model, x, family=GaussNewtonFull), x, restarts=0, num_samples=64, progress=False
    )
    assert (terms.log_evidence - full.elbo).abs().max() < 5e-3


def gauss_hermite(model, x, terms, num=40):
    """log p(x) for two latents, by a tensor rule around the nearest latent; nothing of the library's estimators."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    grid = torch.tensor(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    log_weights = torch.tensor(np.log(np.outer(weights, weights).reshape(-1)))
    jacobian = decoder_jacobian(model.decode, terms.z) / model.sigma
    factor = torch.linalg.cholesky(jacobian.mT @ jacobian + torch.eye(2).double())
    z = terms.z + torch.linalg.solve(factor.mT, grid[:, None, :, None]).squeeze(-1)
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    whole = torch.logsumexp(log_weights[:, None] + joint + 0.5 * grid.square().sum(-1)[:, None], 0)
    return whole - torch.linalg.slogdet(factor).logabsdet


@pytest.mark.slow
def test_the_gap_rises_to_the_contrast_tenfold_a_decade():
    network = triangular_mlp(2, seed=2)
    distance, off = {}, {}
    for gamma2 in (1e3, 1e4, 1e5):
        model = IMAVAE(2, 2, gamma2=gamma2, network=network).double().requires_grad_(False)
        torch.manual_seed(5)
        x = model(n=256)
        guide = local_gauss_newton(model, x)
        terms = limit_terms(model, x, guide.posterior(x).mean[None])
        got = refit(model, guide, x, restarts=0, num_samples=256, progress=False)
        found = gauss_hermite(model, x, terms) - got.elbo
        assert (found > -1e-6).all()
        distance[gamma2] = float((found - terms.contrast).abs().mean())
        # 1 / (-n'' + gamma^2 |J_k|^2) at the latent that made x
        distribution, jacobian = got.guide.posterior(x), decoder_jacobian(model.decode, terms.z)
        off[gamma2] = float(
            (distribution.variance.detach() * (1 + gamma2 * jacobian.square().sum(1)) - 1).abs().median()
        )
    assert 8 < distance[1e3] / distance[1e4] < 12
    assert 8 < distance[1e4] / distance[1e5] < 12
    assert off[1e3] < 0.01
    assert off[1e4] < 0.001


def test_a_bounded_prior_keeps_its_support():
    model = IMAVAE(3, 2, gamma2=1e4, prior=Uniform(2, -0.5, 0.5), hidden=(16,)).double().requires_grad_(False)
    x = model(n=10)
    guide = local_gauss_newton(model, x)
    best = refit(model, guide, x, restarts=0, progress=False)
    assert (best.guide.posterior(x).sample((50,)).abs() < 0.5).all()
    assert (best.improvement >= 0).all()


# --- blocks of rows --------------------------------------------------------------------------------


def test_blocks_of_rows_find_what_all_rows_together_find():
    model = linear_model()
    guide, x = MeanField(6, 3, hidden=(8,)).double(), model(n=6).detach()
    with memory_limit(0.1):  # 6 rows of 8 x 16 draws in blocks of one
        got = refit(model, guide, x, num_samples=16, restarts=0, seed=0, progress=False)
    left = model.log_evidence(x) - got.elbo
    torch.testing.assert_close(left, family_gap(model).expand(6), atol=1e-6, rtol=0)
    assert got.steps.shape == got.converged.shape == (6,)
    assert got.converged.all()
    posterior, exact = got.guide.posterior(x), model.posterior(x)
    torch.testing.assert_close(posterior.mean, exact.mean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cuts", [True, False])
def test_chosen_rows_have_the_loss_that_they_have_among_all(cuts):
    model = linear_model()
    x = model(n=5).detach()
    local = MeanField(6, 3, hidden=(8,)).double().local(x)
    problem = LocalProblem(Call(model, local, (x,)), local, 16)
    assert problem._cuts
    point, index = torch.randn(7, 6).double(), torch.tensor([4, 0, 0, 2, 0, 4, 1])
    expected = []
    for place, row in enumerate(index.tolist()):
        whole = problem.start.clone()
        whole[row] = point[place]
        problem.set(whole)
        expected.append(problem._minus_elbo().detach()[row])
    problem._cuts = cuts
    torch.testing.assert_close(problem.minus_elbo(point, index)[0], torch.stack(expected))


@pytest.mark.parametrize("sigma", [0.3, 30.0])  # rows differ by tens, and by tenths of a nat
def test_rows_whose_noise_depends_on_their_number_stay_together(sigma):
    model = linear_model(sigma=sigma)
    x = model(n=5).detach()
    guide = StudentT(6, 3, hidden=(8,)).double()  # draws by uniform noise, which is not whitened
    for parameter in guide.parameters():
        parameter.data.zero_()
    local = guide.local(x)
    problem = LocalProblem(Call(model, local, (x,)), local, 256)
    assert not problem._cuts
    problem._cuts, index = True, torch.arange(5)
    cut = problem.minus_elbo(problem.start[:3], index[:3])[0]
    assert ((cut - problem._minus_elbo()[:3]).abs() > 1e-3).any()


def test_a_family_that_contains_the_posterior_starts_at_it():
    model = linear_model()
    x = model(n=3).detach()
    local = FullRank(6, 3, hidden=(8,)).double().local(x)
    problem = LocalProblem(Call(model, local, (x,)), local, 64)
    starts = starts_at_modes(problem, max_steps=100)
    elbo = -problem.minus_elbo(starts.point, starts.rows)[0]
    best = torch.stack([elbo[starts.rows == row].max() for row in range(3)])
    torch.testing.assert_close(best, model.log_evidence(x).detach(), atol=1e-3, rtol=0)


# --- which point is taken --------------------------------------------------------------------------


def cubic_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))[..., 0]
        pyro.sample("x", dist.Normal(z**3 - 3 * z, x.new_tensor(0.5)), obs=x[:, 0])


def cubic_truth(x, sigma=0.5):
    """log p(x) by a grid, and the best Gaussian's ELBO, in which the polynomial of degree six is integrated exactly."""
    grid = np.linspace(-8, 8, 400_001)
    log_f = scipy.stats.norm.logpdf(grid) + scipy.stats.norm.logpdf(x, grid**3 - 3 * grid, sigma)
    log_p = log_f.max() + np.log(np.trapezoid(np.exp(log_f - log_f.max()), grid))
    m, s = np.meshgrid(np.linspace(-2.5, 2.5, 1001), np.geomspace(0.01, 2, 400))
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    z = [m + s * node for node in nodes]
    square = sum(w * ((x - t**3 + 3 * t) / sigma) ** 2 for t, w in zip(z, weights / weights.sum(), strict=True))
    elbo = -0.5 * (square + m**2 + s**2 - 1) + np.log(s / sigma) - 0.5 * np.log(2 * np.pi)
    return log_p, elbo.max()


def test_a_trial_point_far_out_is_worth_plus_infinity():
    x = torch.zeros(2, 1, dtype=torch.float64)
    local = MeanField(1, 1, hidden=(8,)).double().local(x)
    problem = LocalProblem(Call(cubic_model, local, (x,)), local, 16)
    value, _ = problem.minus_elbo(problem.start + 1e3, torch.arange(2))
    assert (value == math.inf).all()


def test_on_a_fold_the_refit_is_the_best_gaussian_and_never_above():
    log_p, best = cubic_truth(-0.114)
    guide = MeanField(1, 1, hidden=(8,)).double()
    x = torch.full((20, 1), -0.114, dtype=torch.float64)
    found = refit(cubic_model, guide, x, restarts=0, seed=0, progress=False)
    assert (found.elbo < log_p + 4 * found.standard_error).all()
    assert ((found.elbo - best).abs() < 5 * found.standard_error + 1e-3).all()


def test_what_is_won_on_the_optimisers_noise_is_won_on_all():
    """Data points that differ in their noise alone end at Gaussians of nearly one ELBO, a polynomial's expectation."""
    x, sigma = torch.full((30, 1), -0.114, dtype=torch.float64), 0.5
    local = MeanField(1, 1, hidden=(8,)).double().local(x)
    problem = LocalProblem(Call(cubic_model, local, (x,)), local, 1024)
    found = minimise(problem.minus_elbo, problem.start + torch.tensor([1.5, -1.0]), tolerance=1e-5)
    problem.set(found.point)
    q = local.posterior(x)
    m, s = q.mean.detach()[:, 0], q.stddev.detach()[:, 0]
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    z = m + s * torch.tensor(nodes).unsqueeze(-1)
    squares = ((x[:, 0] - z**3 + 3 * z) / sigma).square() * torch.tensor(weights / weights.sum()).unsqueeze(-1)
    elbo = -0.5 * (squares.sum(0) + m**2 + s**2) + s.log()
    assert (elbo.max() - elbo).max() < 2e-5


def test_a_mixture_is_found_no_worse_than_the_mean_field_in_it():
    model = linear_model(latent_dim=2)
    x, guide = torch.randn(2, 6).double(), Mixture(6, 2, hidden=(4,)).double()
    left = model.log_evidence(x) - refit(model, guide, x, restarts=0, max_steps=100, seed=0, progress=False).elbo
    assert (left < family_gap(model) + 1e-3).all()


def test_the_gradient_is_that_of_the_point_returned():
    model = DeepGaussianVAE(5, 2, hidden=(8,)).double().requires_grad_(False)
    guide, x = MeanField(5, 2, hidden=(8,)).double(), data_for(model)
    rough = refit(model, guide, x, restarts=0, max_steps=1, seed=0, progress=False)
    fine = refit(model, guide, x, restarts=0, seed=0, progress=False)
    assert (rough.gradient_norm > 1e-3).any()
    assert fine.gradient_norm.max() < 1e-4


def test_the_text_counts_the_refits_that_ended_on_a_slope():
    model = DeepGaussianVAE(5, 2, hidden=(8,)).double().requires_grad_(False)
    guide, x = MeanField(5, 2, hidden=(8,)).double(), data_for(model, 6)
    rough = gap(model, guide, x, method="importance", restarts=0, max_steps=1, seed=0, progress=False)
    count = int((~rough.converged).sum())
    assert count > 0
    assert str(rough).endswith(f"; the refit of {count} data points is not stationary")
    fine = gap(model, guide, x, known=rough.evidence, restarts=0, seed=0, progress=False)
    assert "stationary" not in str(fine)


def test_a_tie_goes_to_the_optimiser_and_a_clear_winner_does_not():
    noise = torch.tensor([-1.0, 1.0] * 4).double().unsqueeze(-1)
    level, first = torch.tensor([0.0, 0.01]).double().reshape(2, 1, 1), torch.tensor([0])
    assert int(_chosen(level + torch.stack([noise, -noise]), first)) == 0
    assert int(_chosen(level + torch.stack([noise, noise]), first)) == 1  # clear in pairs
    assert int(_chosen(-level + torch.stack([noise, 0 * noise]), first)) == 1  # as high, and certain
    assert int(_chosen(torch.zeros(3, 8, 1).double(), torch.tensor([1]))) == 1


def test_a_last_point_that_is_worse_on_fresh_noise_is_not_taken(monkeypatch):
    """The optimiser calls it flat and low, as where a component of small weight stands where none of its draws is."""
    torch.manual_seed(0)
    model = LinearVAE(4, 2).double()
    x = model(n=3).detach()
    local = MeanField(4, 2, hidden=(5,)).double().local(x)
    problem = LocalProblem(Call(model, local, (x,)), local, 64)
    away = problem.start + torch.tensor([[30.0], [0.0], [0.0]])
    flat = Minimum(away, torch.zeros(3), torch.full((3,), 1e-9), torch.ones(3), torch.ones(3).bool())
    monkeypatch.setattr("inference.comparison.refitting.minimise", lambda *_, **__: flat)
    best = {"point": problem.start, "steps": torch.zeros(3), "scale": torch.ones(3)}
    found = _settled(problem, best, max_steps=5, tolerance=1e-6)
    assert torch.equal(found["point"], problem.start)
    assert found["converged"].tolist() == [False, True, True]
    assert found["gradient_norm"][0] > 1


# --- intervals -------------------------------------------------------------------------------------


def test_the_error_of_a_mean_is_that_of_independent_errors():
    assert _of_mean(torch.tensor([3.0, 4.0])) == 2.5


def test_the_mean_gap_of_an_exact_guide_may_be_zero():
    model = linear_model()
    got = gap(model, Exact(model), model(n=4).detach(), seed=0, progress=False)
    assert 0 <= got.mean["gap"].lower < 1e-6


def test_the_intervals_hold_the_closed_forms():
    model = linear_model()
    x = model(n=20).detach()
    guide = MeanField(6, 3, hidden=(8,)).double()
    got = gap(model, guide, x, restarts=0, seed=0, progress=False)
    truth = torch.distributions.kl_divergence(guide.posterior(x), model.posterior(x)).detach()
    best = family_gap(model)
    assert (got.total_lower - 1e-6 <= truth).all()
    assert (truth <= got.total_upper + 1e-6).all()
    assert (got.approximation_upper + 1e-6 >= best).all()
    assert (got.amortisation_lower - 1e-6 <= truth - best).all()
    for part, expected in zip(got.mean.values(), (truth.mean(), best, truth.mean() - best), strict=True):
        assert part.lower - 1e-6 <= float(expected) <= part.upper + 1e-6
        assert part.lower <= part.upper < 2 * float(expected) + 0.1
    assert got.mean["approximation"].lower == 0
    assert all(math.isfinite(part.upper) for part in got.mean.values())  # at the level asked for, exact or not
    assert str(got) in repr(got)


def test_an_elbo_above_the_evidence_is_said_not_turned_around():
    model = linear_model()
    x = model(n=6).detach()
    exact = evidence(model, x)
    moved = {end: getattr(exact, end) - 20 * (torch.arange(6) < 2) for end in ("value", "lower", "upper")}
    guide = MeanField(6, 3, hidden=(8,)).double()
    got = gap(model, guide, x, known=replace(exact, guarantee=("numerical",) * 6, **moved), seed=0, progress=False)
    assert got.contradicted.tolist() == [True] * 2 + [False] * 4
    assert got.evidence.guarantee == ("asymptotic",) * 2 + ("numerical",) * 4
    assert got.total_upper[:2].isinf().all()
    assert (got.total_lower <= got.total_upper).all()
    assert str(got).endswith("; an ELBO contradicts the upper end of log p of 2 data points")
    assert not gap(model, Exact(model), x, seed=0, progress=False).contradicted.any()


def test_without_an_upper_end_of_log_p_the_text_says_at_least():
    model = linear_model()
    x = model(n=4).detach()
    guide = MeanField(6, 3, hidden=(8,)).double()
    got = gap(model, guide, x, method=Importance(50), restarts=0, seed=0, progress=False)
    assert math.isinf(got.mean["gap"].upper)
    assert math.isinf(got.mean["approximation"].upper)
    truth = float(torch.distributions.kl_divergence(guide.posterior(x), model.posterior(x)).detach().mean())
    assert str(got).startswith(f"gap >= {got.mean['gap'].lower:.4f} nats = approximation >= 0.0000 + amortisation >= ")
    assert got.mean["gap"].lower < truth


def test_a_one_sided_gap_is_no_less_than_what_the_refit_wins():
    """Twenty draws of a poor guide may all miss the posterior, which the refit finds."""
    torch.manual_seed(0)
    model = DeepGaussianVAE(4, 2, hidden=(6,)).double().requires_grad_(False)
    guide, x = MeanField(4, 2, hidden=(4,)).double(), model(n=4).detach()
    got = gap(model, guide, x, method=Importance(20), restarts=0, max_steps=20, seed=0, progress=False)
    assert got.total_upper.isinf().all()
    assert (got.total_lower >= got.amortisation_lower).all()
    assert got.mean["gap"].lower >= got.mean["amortisation"].lower > 0
    assert (got.total_lower > (got.evidence.lower - got.elbo)).any()


def test_a_guide_of_local_parameters_has_an_optimisation_gap():
    model = linear_model()
    x = model(n=4).detach()
    got = gap(model, MeanField(6, 3, hidden=(8,)).double().local(x), x, restarts=0, seed=0, progress=False)
    assert list(got.mean) == ["gap", "approximation", "optimisation"]
    assert " + optimisation " in str(got)


# --- guides of a user, and what is refused ---------------------------------------------------------

COUNTS = torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0], dtype=torch.float64)


def two_sites(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        shift = pyro.sample("shift", dist.Normal(x.new_tensor(0.0), 0.5))
        pyro.sample("x", dist.Poisson(rate * shift.exp()), obs=x)


class TwoSiteGuide(Module):
    """A user's guide: one row of parameters for each data point, or the same for all of them."""

    def __init__(self, num=None):
        super().__init__()
        shape = (1 if num is None else num, 4)
        self.parameters_ = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x):
        m, s, n, t = self.parameters_.expand(len(x), -1).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(m, s.exp()))
            pyro.sample("shift", dist.Normal(n, t.exp()))

    def local(self, x):
        return TwoSiteGuide(len(x))


def test_a_users_model_with_two_latent_sites_is_split():
    truth = evidence(two_sites, COUNTS, method="importance", guide=TwoSiteGuide(), seed=1)
    got = gap(two_sites, TwoSiteGuide(), COUNTS, known=truth, num_samples=500, progress=False)
    torch.testing.assert_close(got.approximation + got.amortisation, got.total)
    assert (got.amortisation > 0.01).all()
    # independent sites leave something: rate and shift trade off in the posterior
    assert (got.approximation > -4 * got.total_error).all()
    assert got.approximation.mean() < 0.2 < got.total.mean()


class Unknown(Guide):
    def posterior(self, x):
        return dist.Normal(x[:, :2], 1.0).to_event(1)


def test_a_guide_that_cannot_be_freed_has_a_gap_without_parts():
    model = LinearVAE(5, 2).double().requires_grad_(False)
    x = data_for(model)
    got = gap(model, Unknown(), x, num_samples=4000, progress=False)
    truth = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(x[:, :2], torch.eye(2).double()), model.posterior(x)
    )
    assert ((got.total - truth).abs() < 5 * got.total_error).all()
    assert got.approximation is None
    assert got.amortisation is None
    assert str(got).endswith("approximation: unknown, amortisation: unknown")
    with pytest.raises(
        TypeError, match=r"expected a guide with local\(x\), an AutoGuide, or one of all data .*, got Unknown"
    ):
        refit(model, Unknown(), x)


def test_a_local_guide_refuses_other_data():
    model, guide = LinearVAE(5, 2).double(), MeanField(5, 2).double()
    x = data_for(model)
    local = guide.local(x)
    assert torch.equal(local.posterior(x.clone()).mean, guide.posterior(x).mean)
    for other in (x.flip(0), x[:7]):
        with pytest.raises(ValueError, match="expected the data that the local guide was made for"):
            log_weights(model, local, other, num_samples=2)


def test_a_freed_guide_without_rows_and_a_wrong_evidence_are_refused():
    class Shared(TwoSiteGuide):
        def local(self, x):  # noqa: ARG002
            guide = TwoSiteGuide()
            guide.scalar = torch.nn.Parameter(torch.zeros(()))
            return guide

    with pytest.raises(ValueError, match="expected the freed guide's parameters to have one row for each data point"):
        refit(two_sites, Shared(), COUNTS, progress=False)
    truth = evidence(two_sites, COUNTS[:2], method="importance", guide=TwoSiteGuide(), seed=1)
    with pytest.raises(ValueError, match="expected the evidence of 5 data points, got that of 2"):
        gap(two_sites, TwoSiteGuide(), COUNTS, known=truth, restarts=0, progress=False)


def test_a_seed_repeats_the_split_and_leaves_the_random_state():
    model = DeepGaussianVAE(5, 2, hidden=(8,)).double().requires_grad_(False)
    guide, x = MeanField(5, 2, hidden=(8,)).double(), data_for(model)
    before = torch.get_rng_state()
    a, b = (refit(model, guide, x, seed=3, progress=False) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.elbo, b.elbo)
    assert np.isfinite(a.elbo.numpy()).all()


# --- what a reviewer found -------------------------------------------------------------------------


def quartic(x):
    """A heavy fourth power in the log joint: whitened noise has too small a fourth moment."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", DiagNormal(x.new_zeros(len(x), 1), x.new_ones(1)))
        pyro.sample("x", dist.Normal(0.3 * z.squeeze(-1) ** 4, 1.0), obs=x)


class WideGuide(Module):
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", DiagNormal(self.shift.expand(len(x), 1), x.new_ones(1)))

    def local(self, x):
        return WideLocal(len(x))


class WideLocal(Module):
    def __init__(self, num):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(num, 1, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", DiagNormal(self.shift, x.new_ones(1)))


def test_the_elbo_is_right_where_the_log_joint_is_far_from_quadratic():
    x = torch.zeros(400, dtype=torch.float64)
    with memory_limit(1000):  # in one block
        got = refit(quartic, WideGuide(), x, restarts=0, max_steps=1, num_samples=128, progress=False)
    # E[-(0.3 z^4)^2 / 2] - log(2 pi) / 2 with E z^8 = 105; KL to the prior is zero
    truth = -0.5 * 0.09 * 105 - 0.5 * math.log(2 * math.pi)
    error = float(got.own_elbo.std()) / math.sqrt(len(x))
    assert abs(float(got.own_elbo.mean()) - truth) < 4 * error


def test_evaluations_see_the_same_noise_whoever_draws_it():
    """Pyro's Normal draws by torch.normal, which is not whitened: it must still be the same at every evaluation."""
    local = TwoSiteGuide(len(COUNTS))
    problem = LocalProblem(Call(two_sites, local, (COUNTS,)), local, 128)
    found, index = minimise(problem.minus_elbo, problem.start), torch.arange(len(COUNTS))
    assert found.gradient_norm.max() < 1e-3
    for first, second in zip(
        problem.minus_elbo(found.point, index), problem.minus_elbo(found.point, index), strict=True
    ):
        assert torch.equal(first, second)


def test_a_nested_plate_and_single_precision_run():
    def model(x):
        with pyro.plate("data", x.shape[-1], dim=-1):
            with pyro.plate("inner", 3, dim=-2):
                z = pyro.sample("z", DiagNormal(x.new_zeros(3, x.shape[-1], 2), x.new_ones(1)))
            pyro.sample("x", dist.Normal(z.sum(-1).sum(-2, keepdim=True), 1.0), obs=x)

    class Inner(Module):
        def __init__(self, num=1):
            super().__init__()
            self.m = torch.nn.Parameter(torch.zeros(num, 2))

        def forward(self, x):
            with pyro.plate("data", x.shape[-1], dim=-1), pyro.plate("inner", 3, dim=-2):
                pyro.sample("z", DiagNormal(self.m.expand(3, x.shape[-1], 2), x.new_ones(1)))

        def local(self, x):
            return Inner(x.shape[-1])

    best = refit(model, Inner(), torch.tensor([1.0, 2.0, -1.0, 0.5]), restarts=0, num_samples=16, progress=False)
    assert best.elbo.shape == (4,)
    assert (best.improvement >= 0).all()


def test_a_method_object_is_taken_as_well_as_its_name():
    model = linear_model()
    x = model(n=4).detach()
    a, b = (gap(model, TiedMeanField(model), x, method=m, seed=0, progress=False) for m in ("exact", ExactEvidence()))
    assert torch.equal(a.total, b.total)


def test_dropout_in_train_mode_is_refused():
    class Dropping(Guide):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def posterior(self, x):
            return dist.Normal(self.drop(x)[:, :3], 1.0).to_event(1)

    model = linear_model()
    with pytest.raises(ValueError, match=r"expected modules as they are after training, got Dropout"):
        gap(model, Dropping(), model(n=4).detach(), progress=False)
