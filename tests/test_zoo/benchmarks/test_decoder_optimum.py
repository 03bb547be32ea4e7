"""The best decoder of an encoder and the best variances of a guide: against NumPy, quadrature and autograd."""

import functools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal
from torch.optim import LBFGS

from guides import FullRank, MeanField
from inference import AnalyticKLELBO, LogJoint, decoder_jacobian, fit, rate_distortion
from inference.diagnostics.curvature import (
    constant_var,
    constant_var_penalty,
    expected_hessian,
    likelihood_curvature,
    negative_hessian,
)
from inference.distributions.gaussian import DiagNormal
from zoo import DeepGaussianVAE, FixedNoise, LinearVAE, WrappedDecoder
from zoo.benchmarks.decoder_optimum import OptimalDecoder

PASS, DETECT = 4.0, 4.9


def nodes(order=60):
    """Nodes and weights of Gauss-Hermite quadrature for a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(order)
    return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())


# --- the optimal decoder -------------------------------------------------------------------------------------------


def problem(num=12, data_dim=3, latent_dim=2, family=MeanField):
    torch.manual_seed(0)
    x = 2 * torch.randn(num, data_dim, dtype=torch.float64)
    guide = family(data_dim, latent_dim, hidden=(8,)).double()
    with torch.no_grad():
        for p in guide.parameters():
            p.mul_(2)
        return x, guide.posterior(x), torch.randn(7, latent_dim, dtype=torch.float64)


@pytest.mark.parametrize("family", [MeanField, FullRank])
def test_it_is_the_average_of_the_data_weighted_by_the_guides_density(family):
    x, distribution, z = problem(family=family)
    decoder = OptimalDecoder(distribution, x)
    density = np.exp([[distribution.log_prob(point)[i].item() for i in range(len(x))] for point in z])
    expected = density @ x.numpy() / density.sum(1, keepdims=True)
    assert decoder(z).numpy() == pytest.approx(expected, abs=1e-10)
    assert decoder(z.reshape(7, 1, 2)).shape == (7, 1, 3)
    assert (decoder.responsibilities(z).sum(-1) - 1).abs().max() < 1e-12


def test_far_from_all_codes_it_is_still_a_datum():
    x, distribution, _ = problem()
    far = OptimalDecoder(distribution, x)(torch.full((1, 2), 1e4, dtype=torch.float64))
    assert (far - x).abs().sum(-1).min() < 1e-9


def test_its_jacobian_is_autograds_and_a_covariance_for_one_variance():
    x, distribution, z = problem()
    decoder = OptimalDecoder(distribution, x)
    assert (decoder.jacobian(z) - decoder_jacobian(decoder, z)).abs().max() < 1e-10
    s = 0.8
    constant = OptimalDecoder(DiagNormal(distribution.mean, torch.full((1,), s, dtype=torch.float64)), x)
    r = constant.responsibilities(z).numpy()
    for point in range(len(z)):
        covariance = np.cov(np.hstack([x.numpy(), distribution.mean.numpy()]).T, aweights=r[point], ddof=0)[:3, 3:]
        assert constant.jacobian(z)[point].numpy() == pytest.approx(covariance / s**2, abs=1e-10)


def one_dimensional():
    """Three data, one latent: the distributions overlap, and everything is an integral over the line."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    distribution = DiagNormal(
        torch.tensor([[-0.5], [0.3], [1.0]], dtype=torch.float64), torch.tensor([[0.6], [0.9], [0.4]]).double()
    )
    decoder = OptimalDecoder(distribution, x)
    z = torch.linspace(-9, 10, 40001, dtype=torch.float64)[:, None]
    q = distribution.log_prob(z[:, None]).exp() / 3  # (grid, 3)
    return x, decoder, z, q, float(z[1] - z[0])


def squared_error(f, x, z, q, step):
    """E_i E_q ||x_i - f(z)||^2 per dimension, by the rectangle rule, which is spectrally accurate here."""
    return torch.einsum("gn,gnd->d", q, (x - f(z).unsqueeze(1)).square()) * step


def other_decoder(z):
    return torch.cat([z.sin(), 0.3 * z], -1)


def test_excess_risk_is_the_difference_of_the_risks():
    x, decoder, z, q, step = one_dimensional()
    best, other = (squared_error(f, x, z, q, step).sum().item() for f in (decoder, other_decoder))
    integral = ((other_decoder(z) - decoder(z)).square().sum(-1) * q.sum(-1)).sum().item() * step
    assert other - best == pytest.approx(integral, abs=1e-10)
    found = decoder.excess_risk(other_decoder, num_samples=2000, seed=0)
    assert abs(found.value - integral) < PASS * found.standard_error
    # Twin: weighted by the prior instead of q(z), the identity fails.
    prior = Normal(0, 1).log_prob(z[:, 0]).exp()
    wrong = ((other_decoder(z) - decoder(z)).square().sum(-1) * prior).sum().item() * step
    assert abs(found.value - wrong) > DETECT * found.standard_error
    assert decoder.excess_risk(decoder).value == 0


def test_the_optimal_noise_variance_is_the_risk_per_dimension():
    x, decoder, z, q, step = one_dimensional()
    expected = squared_error(decoder, x, z, q, step)
    found = decoder.likelihood_var(num_samples=2000, seed=0)
    assert bool(((found.value - expected).abs() < PASS * found.standard_error).all())
    wrong = x.var(0, correction=0)  # without the latent
    assert bool(((found.value - wrong).abs() > DETECT * found.standard_error).any())

    def log_likelihood(var):
        return (-0.5 * (2 * math.pi * var).log() - 0.5 * expected / var).sum()

    slope = torch.func.grad(log_likelihood)(expected)
    assert slope.abs().max() < 1e-12


def test_no_trained_decoder_beats_it_under_its_encoder():
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    model = DeepGaussianVAE(3, 2, hidden=(16,), noise=FixedNoise(0.5)).double()
    guide = MeanField(3, 2, hidden=(16,)).double()
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    fit(model, guide, x, steps=300, objective=AnalyticKLELBO(), optimizer=adam, seed=0, progress=False)
    decoder = OptimalDecoder(guide.posterior(x), x)
    best = DeepGaussianVAE(3, 2, network=decoder, noise=FixedNoise(0.5)).double()
    settings = {"num_samples": 2000, "chunk": 200, "seed": 0}  # the same draws for both
    trained, oracle = (rate_distortion(m, guide, x, **settings) for m in (model, best))
    excess = decoder.excess_risk(model.decode, num_samples=2000, seed=1)
    gain, predicted = trained.total.value - oracle.total.value, float(excess.value) / (2 * 0.25)
    error = math.hypot(trained.total.standard_error, oracle.total.standard_error, float(excess.standard_error) * 2)
    assert predicted > DETECT * error
    assert abs(gain - predicted) < PASS * error


def test_it_moves_and_follows_dtypes_and_refuses_what_it_cannot_use():
    x, distribution, z = problem()
    decoder = OptimalDecoder(distribution, x).float()
    assert decoder(z.float()).dtype == torch.float32
    assert list(decoder.parameters()) == []
    with pytest.raises(ValueError, match=r"posterior of batch \(N,\), got \(4, 3\) and \(12,\)"):
        OptimalDecoder(distribution, x[:4])
    with pytest.raises(TypeError, match="expected a Gaussian posterior, got Independent"):
        OptimalDecoder(dist.Laplace(distribution.mean, distribution.variance.sqrt()).to_event(1), x)
    with pytest.raises(ValueError, match="expected x to be finite"):
        OptimalDecoder(distribution, x / 0)
    _, full, _ = problem(family=FullRank)
    with pytest.raises(TypeError, match="full covariance"):
        OptimalDecoder(full, x).jacobian(z)


# --- variances and second derivatives ------------------------------------------------------------------------------


def curve(z):
    """A decoder from the line to the plane, not linear."""
    return torch.cat([z + 0.2 * z.square(), 1.3 * (0.8 * z).sin()], -1)


def log_joint(z, x, sigma):
    """log p(x, z) less constants, of latents (..., 1) and data (..., 2)."""
    return -0.5 * z.square().sum(-1) - 0.5 * (x - curve(z)).square().sum(-1) / sigma**2


def best_gaussians(x, sigma, *, constant):
    """Means (N,), variances and ELBO per data point (less constants) at the optimum over q, by quadrature and LBFGS."""
    points, weights = nodes()
    mean, log_var = x[:, 0].clone().requires_grad_(), torch.full((1 if constant else len(x),), math.log(sigma**2 / 2))
    log_var = log_var.double().requires_grad_()

    def elbo():
        z = mean + (0.5 * log_var).exp() * points[:, None]  # (Q, N)
        return weights @ log_joint(z.unsqueeze(-1), x, sigma) + 0.5 * log_var

    lbfgs = LBFGS(
        [mean, log_var], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        lbfgs.zero_grad()
        loss = -elbo().sum()
        loss.backward()
        return loss

    for _ in range(3):
        lbfgs.step(closure)
    return mean.detach(), log_var.detach().exp().expand(len(x)), elbo().detach()


def plane_data(sigma, num=20):
    torch.manual_seed(0)
    z = torch.randn(num, 1, dtype=torch.float64)
    return curve(z) + sigma * torch.randn(num, 2, dtype=torch.float64)


def test_at_the_optimum_the_precision_is_the_expected_curvature():
    sigma = 0.3
    x = plane_data(sigma)
    mean, var, _ = best_gaussians(x, sigma, constant=False)
    points, weights = nodes()
    z = (mean + var.sqrt() * points[:, None]).unsqueeze(-1)
    curvature = weights @ negative_hessian(lambda v: log_joint(v, x, sigma), z)[..., 0, 0]
    assert (curvature * var - 1).abs().max() < 1e-6
    at_mean = negative_hessian(lambda v: log_joint(v, x, sigma), mean[:, None])[..., 0, 0]
    assert (at_mean * var - 1).abs().max() > 1e-3  # Laplace's approximation is another

    draws = mean[:, None] + var.sqrt()[:, None] * torch.randn(2000, len(x), 1, dtype=torch.float64)
    found = expected_hessian(lambda v: log_joint(v, x, sigma), draws)
    assert ((found.value[:, 0, 0] - curvature) / found.standard_error[:, 0, 0]).abs().max() < 4.5  # of 20


def test_the_optimal_full_precision_is_the_expected_hessian():
    points, weights = nodes(40)
    grid = torch.cartesian_prod(points, points)
    weight = torch.cartesian_prod(weights, weights).prod(-1)

    def joint(z):
        f = torch.stack([z[..., 0] + 0.3 * z[..., 1].square(), (z[..., 0] * z[..., 1]).sin(), z[..., 1]], -1)
        return -0.5 * z.square().sum(-1) - 2 * (f - f.new_tensor([0.5, 0.2, -0.4])).square().sum(-1)

    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    raw = torch.tensor([-0.5, 0.0, -0.5], dtype=torch.float64, requires_grad=True)

    def factor():
        zero = torch.zeros_like(raw[0])
        return torch.stack([torch.stack([raw[0].exp(), zero]), torch.stack([raw[1], raw[2].exp()])])

    lbfgs = LBFGS([mean, raw], max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = -(weight @ joint(mean + grid @ factor().mT)) - raw[0] - raw[2]
        loss.backward()
        return loss

    lbfgs.step(closure)
    L = factor().detach()
    hessian = torch.einsum("q,qkl->kl", weight, negative_hessian(joint, mean.detach() + grid @ L.mT))
    assert (torch.cholesky_inverse(L) - hessian).abs().max() < 1e-6
    # A diagonal guide has the diagonal of the Hessian as precisions, not those of its inverse.
    assert (hessian.diagonal() - torch.linalg.inv(hessian).diagonal().reciprocal()).abs().max() > 1e-3


def test_the_hessian_of_a_log_joint_is_autograds_for_any_model():
    torch.manual_seed(0)
    model = DeepGaussianVAE(3, 2, hidden=(6,)).double()
    x, z = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 4, 2, dtype=torch.float64)
    found = negative_hessian(LogJoint(model, x), z)

    def one(point, datum):
        return model.prior().log_prob(point) + model.likelihood(point).log_prob(datum)

    for s, n in ((0, 0), (4, 3), (2, 1)):
        expected = -torch.autograd.functional.hessian(lambda point, n=n: one(point, x[n]), z[s, n])
        assert (found[s, n] - expected).abs().max() < 1e-10
    assert not found.requires_grad


def test_in_a_linear_model_it_is_the_precision_of_the_posterior():
    model = LinearVAE(5, 2, sigma=0.5).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    found = negative_hessian(LogJoint(model, x), torch.randn(1, 3, 2, dtype=torch.float64))[0]
    assert (found - model.posterior(x).precision_matrix).abs().max() < 1e-9


def test_the_likelihoods_curvature_is_the_diagonal_of_its_hessian():
    x, z, sigma = plane_data(0.3), torch.randn(20, 1, dtype=torch.float64), 0.3
    hessian = negative_hessian(lambda v: log_joint(v, x, sigma) + 0.5 * v.square().sum(-1), z)
    assert (likelihood_curvature(curve, z, x, sigma) - hessian[..., 0]).abs().max() < 1e-10

    def wide(v):
        return torch.stack([v[..., 0] * v[..., 1], v[..., 0].exp(), v[..., 1] ** 3], -1)

    v, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    hessian = negative_hessian(lambda u: -0.5 * (y - wide(u)).square().sum(-1) / 0.49, v)
    assert (likelihood_curvature(wide, v, y, 0.7) - hessian.diagonal(dim1=-2, dim2=-1)).abs().max() < 1e-10


def test_densities_that_are_flat_or_straight_have_no_curvature():
    z = torch.randn(3, 2)
    for flat in (lambda v: v.sum(-1), lambda v: torch.zeros(len(v))):
        assert negative_hessian(flat, z).abs().max() == 0
    with pytest.raises(ValueError, match=r"expected one log density a point, \(3,\), got \(3, 2\)"):
        negative_hessian(lambda v: v, z)
    with pytest.raises(ValueError, match=r"draws of shape \(S, N, K\) with S >= 2"):
        expected_hessian(lambda v: v.sum(-1), z)


def test_the_penalty_is_exact_for_quadratic_log_joints():
    """ELBO of a guide with variances v: sum_k (log v_k - H_k v_k) / 2, at its optima with and without a data point."""
    H = torch.tensor([[1.0, 9.0], [4.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    free = 0.5 * (-H.log() - 1).sum(-1).mean()
    v = constant_var(H)
    constant = 0.5 * (v.log() - H * v).sum(-1).mean()
    assert float(constant_var_penalty(H)) == pytest.approx(float(free - constant), abs=1e-12)
    slope = torch.func.grad(lambda v: 0.5 * (v.log() - H * v).sum(-1).mean())(v)
    assert slope.abs().max() < 1e-12
    assert float(constant_var_penalty(H[:1])) == 0


def test_at_little_noise_a_constant_variance_costs_the_penalty():
    """On data of the decoder's own curve; the rest is of the second order in sigma, neither the first nor the third."""
    rest = []
    for sigma in (0.01, 0.005):
        x = plane_data(0.0)
        mean, var, free = best_gaussians(x, sigma, constant=False)
        _, _, constant = best_gaussians(x, sigma, constant=True)
        lost = float((free - constant).mean())
        assert lost == pytest.approx(0.094, abs=0.001)
        predicted = 1 + decoder_jacobian(curve, mean[:, None]).square().sum(-2) / sigma**2
        rest.append([float(constant_var_penalty(H)) - lost for H in (predicted, var.reciprocal()[:, None])])
    assert np.abs(rest[0]).max() < 2e-4
    for coarse, fine in zip(*rest, strict=True):
        assert 3 < coarse / fine < 5


@pytest.mark.parametrize("bad", [torch.tensor([[1.0, -1.0]]), torch.tensor([1.0]), torch.tensor([[math.inf]])])
def test_curvatures_that_give_no_variance_are_refused(bad):
    for function in (constant_var, constant_var_penalty):
        with pytest.raises(ValueError, match=r"expected curvatures \(N, K\), positive and finite"):
            function(bad)


def test_it_serves_as_a_network_of_any_model():
    x, distribution, z = problem()
    model = WrappedDecoder(OptimalDecoder(distribution, x), lambda m: dist.Normal(m, 0.5).to_event(1), 3, 2).double()
    assert (model.decode(z) - OptimalDecoder(distribution, x)(z)).abs().max() < 1e-12
