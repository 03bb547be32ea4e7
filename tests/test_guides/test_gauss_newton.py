"""Guides whose covariance is the decoder's own: exact where that is known, and what a diagonal guide tends to."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import nn
from torch.distributions import biject_to

from guides import GaussNewtonDiagonal, GaussNewtonFull
from inference import AnalyticKLELBO, fit
from zoo import VAE, DeepGaussianVAE, FixedNoise, LinearVAE
from zoo.priors import factorised as priors

U = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def linear_model(sigma, data_dim=5, latent_dim=3):
    """A linear model in double precision from the start, so that sigma is the number given."""
    model = LinearVAE(data_dim, latent_dim).double().requires_grad_(False)
    with torch.no_grad():
        model.log_sigma.fill_(math.log(sigma))
    return model


def bounded_model(prior, sigma=0.3):
    return DeepGaussianVAE(4, 2, hidden=(8,), prior=prior, noise=FixedNoise(sigma)).double()


@pytest.mark.parametrize("sigma", [1.0, 0.1, 1e-4])
def test_the_covariance_of_a_linear_decoder_is_exact(sigma):
    model = linear_model(sigma)
    u = torch.randn(6, 3, dtype=torch.float64)
    precision = torch.eye(3, dtype=torch.float64) + model.W.T @ model.W / model.sigma**2
    distribution = GaussNewtonFull(model, hidden=(8,)).double().family(u)
    expected = torch.linalg.inv(precision)
    size = expected.diagonal().sqrt()
    off = (distribution.covariance_matrix - expected) / torch.outer(size, size)
    assert float(off.abs().max()) < 1e-10
    assert float(distribution.scale_tril.triu(1).abs().max()) == 0
    diagonal = GaussNewtonDiagonal(model, hidden=(8,)).double().family(u)
    torch.testing.assert_close(diagonal.variance, (1 / precision.diagonal()).expand(6, 3), rtol=1e-10, atol=0)


def test_standardised_models_are_seen_in_the_units_of_the_data():
    model = LinearVAE(4, 2).double().standardise_by(3 + 2 * torch.randn(50, 4).double())
    x = model(n=6).detach()
    distribution = GaussNewtonFull(model, hidden=(8,)).double().posterior(x)
    torch.testing.assert_close(
        distribution.covariance_matrix, model.posterior(x).covariance_matrix, rtol=1e-10, atol=1e-12
    )


BENDS = {  # -n'' in unconstrained coordinates, by hand
    "uniform": (lambda: priors.Uniform(2, -0.5, 0.5), lambda u: 2 * torch.sigmoid(u) * torch.sigmoid(-u)),
    "beta": (lambda: priors.Beta(2, 2.0, 3.5), lambda u: 5.5 * torch.sigmoid(u) * torch.sigmoid(-u)),
    "normal": (lambda: priors.StandardNormal(2), torch.ones_like),
    "laplace": (lambda: priors.Laplace(2), lambda u: torch.full_like(u, 1e-6)),  # flat: the floor
}


@pytest.mark.parametrize("name", BENDS)
def test_the_curvature_is_that_of_autograd_and_of_the_prior_by_hand(name):
    make, bend = BENDS[name]
    model = bounded_model(make())
    guide = GaussNewtonFull(model, hidden=(8,)).double()
    jacobian, curvature = guide.curvatures(U)
    transform = biject_to(model.prior().support)
    for i in range(3):
        for j in range(4):
            expected = torch.autograd.functional.jacobian(lambda u: model.decode(transform(u)), U[i, j]) / 0.3
            torch.testing.assert_close(jacobian[i, j], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(curvature, bend(U), rtol=1e-9, atol=1e-12)
    full, diagonal = guide.family(U), GaussNewtonDiagonal(model, hidden=(8,)).double().family(U)
    precision = jacobian.mT @ jacobian + torch.diag_embed(bend(U))
    torch.testing.assert_close(full.covariance_matrix, torch.linalg.inv(precision), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(diagonal.variance, 1 / precision.diagonal(dim1=-2, dim2=-1), rtol=1e-9, atol=0)


class SmoothLeaky(nn.Module):
    def forward(self, x):
        return 0.2 * x + 0.8 * nn.functional.softplus(x)


def smooth_model(sigma):
    """Three orthogonal layers with a smooth leaky unit between them, 2 -> 2."""
    layers = [nn.utils.parametrizations.orthogonal(nn.Linear(2, 2).double()) for _ in range(3)]
    network = nn.Sequential(layers[0], SmoothLeaky(), layers[1], SmoothLeaky(), layers[2])
    model = DeepGaussianVAE(2, 2, network=network, noise=FixedNoise(1.0)).double()
    model.noise.log_sigma.fill_(math.log(sigma))
    return model.requires_grad_(False)


def best_diagonal_sigma(model, x, start):
    """Standard deviations of the best diagonal Gaussian for each data point: its ELBO by Gauss-Hermite, by LBFGS."""
    nodes, weights = (torch.from_numpy(a) for a in hermegauss(20))
    t = torch.cartesian_prod(nodes, nodes).unsqueeze(1)
    w = torch.outer(weights, weights).flatten() / (2 * math.pi)
    scale = start.sigma.detach()
    shift, log_ratio = (torch.zeros_like(scale).requires_grad_() for _ in range(2))
    optimizer = torch.optim.LBFGS(
        [shift, log_ratio], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        z = start.loc.detach() + scale * (shift + log_ratio.exp() * t)
        log_joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
        loss = -(w @ log_joint + log_ratio.sum(-1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (scale * log_ratio.exp()).detach()


@pytest.mark.parametrize(("gamma2", "tolerance"), [(1e3, 1e-2), (1e4, 1e-3)])
def test_the_best_diagonal_variances_tend_to_these(gamma2, tolerance):
    model = smooth_model(gamma2**-0.5)
    z = torch.randn(16, 2, dtype=torch.float64)
    x, guide = model.decode(z), GaussNewtonDiagonal(model, hidden=(8,)).double()
    distribution = guide.family(z)
    best = best_diagonal_sigma(model, x, distribution)
    error = (best.square() / distribution.variance - 1).abs()
    assert float(error.median()) < tolerance
    assert float(error.median()) > 1e-6  # an optimiser that did not move would agree for good


@pytest.mark.parametrize("kind", [GaussNewtonDiagonal, GaussNewtonFull])
def test_the_gradient_reaches_encoder_and_decoder(kind):
    model = bounded_model(priors.Uniform(2, -0.5, 0.5))
    guide, x = kind(model, hidden=(8,)).double(), torch.randn(5, 4).double()
    assert {id(p) for p in guide.parameters()}.isdisjoint(id(p) for p in model.parameters())
    names = ["encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"]
    assert [name for name, _ in guide.named_parameters()] == names

    def entropy():
        return guide.posterior(x).base_dist.entropy().sum()

    weight = model.network[0].weight
    (gradient,) = torch.autograd.grad(entropy(), weight)
    step = torch.zeros_like(weight)
    step[0, 0] = 1e-6
    with torch.no_grad():
        weight += step
        up = entropy()
        weight -= 2 * step
        down = entropy()
    assert float(gradient[0, 0]) == pytest.approx(float(up - down) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("kind", [GaussNewtonDiagonal, GaussNewtonFull])
def test_it_trains_with_an_analytic_divergence_from_a_bounded_prior(kind):
    model = bounded_model(priors.Uniform(2, -0.5, 0.5))
    guide, x = kind(model, hidden=(8,)).double(), torch.randn(50, 4).double()
    objective = AnalyticKLELBO(200)
    before = float(objective.per_datum(model, guide, x).mean().detach())
    fit(
        model,
        guide,
        x,
        steps=60,
        objective=AnalyticKLELBO(),
        optimizer=partial(torch.optim.Adam, lr=0.02),
        progress=False,
        seed=0,
    )
    after = objective.per_datum(model, guide, x).detach()
    assert float(after.mean()) > before + 1


def test_a_model_without_gaussian_noise_is_refused():
    with pytest.raises(TypeError, match=r"expected a model with decode\(z\), sigma and prior\(\), got VAE"):
        GaussNewtonFull(VAE(5, 2))


def test_forward_mode_warns_of_nothing_at_first_use_in_a_process():
    script = (
        "import torch; from guides import GaussNewtonFull; from zoo import LinearVAE; "
        "print(GaussNewtonFull(LinearVAE(5, 2)).posterior(torch.zeros(4, 5)).event_shape)"
    )
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "torch.Size([2])\n"), done.stderr
