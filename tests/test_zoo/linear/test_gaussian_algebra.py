"""Linear-Gaussian algebra against arithmetic with 50 digits, dense Gaussians and exact cubature."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal
from torch.func import grad, hessian, vmap

from zoo.linear.gaussian_algebra import LinearGaussian

SHAPES = ("tall", "zero column", "repeated column", "graded columns", "square", "wide", "one column")
PLACES = ("from the model", "far off", "at the mean")


def problem(index: int) -> tuple[LinearGaussian, Tensor]:
    """One of a family of random problems, sigma from 1e-6 to 1e3; the index picks the shape and the place of x."""
    rng = np.random.default_rng(index)
    shape, place = SHAPES[index % len(SHAPES)], PLACES[index // len(SHAPES) % len(PLACES)]
    D = int(rng.integers(2, 9))
    K = {"square": D, "wide": D + 2, "one column": 1}.get(shape) or int(rng.integers(2, D + 1))
    W = rng.normal(size=(D, K)) * 10 ** rng.uniform(-1, 1)
    W[:, 0] *= shape != "zero column"
    if shape == "repeated column":
        W[:, -1] = W[:, 0]
    if shape == "graded columns":
        W *= 10 ** rng.uniform(-3, 3, size=K)
    mu, sigma = rng.normal(size=D), 10 ** rng.uniform(-6, 3)
    offset = {
        "from the model": W @ rng.normal(size=K) + sigma * rng.normal(size=D),
        "far off": rng.normal(size=D) * 10 ** rng.uniform(-1, 3),
        "at the mean": np.zeros(D),
    }
    return LinearGaussian(*map(torch.tensor, (W, mu, sigma))), torch.tensor(mu + offset[place])


def fifty_digits(distribution: LinearGaussian, x: Tensor) -> mpmath.mpf:
    """Log-density of x from the Cholesky factor of the dense covariance."""
    with mpmath.workdps(50):
        W, sigma = mpmath.matrix(distribution.W.tolist()), mpmath.mpf(distribution.sigma.item())
        D = W.rows
        L = mpmath.cholesky(W * W.T + sigma**2 * mpmath.eye(D))
        white: list[mpmath.mpf] = []
        for i, (a, b) in enumerate(zip(x.tolist(), distribution.mu.tolist())):
            done = mpmath.fdot((L[i, j], white[j]) for j in range(i))
            white.append((mpmath.mpf(a) - mpmath.mpf(b) - done) / L[i, i])
        log_det = 2 * mpmath.fsum(mpmath.log(L[i, i]) for i in range(D))
        return -(D * mpmath.log(2 * mpmath.pi) + log_det + mpmath.fdot(white, white)) / 2


def relative_error(value: Tensor, reference: mpmath.mpf) -> float:
    return float(abs(value.item() - reference) / abs(reference))


@pytest.fixture(scope="module")
def problems() -> list[tuple[LinearGaussian, Tensor, mpmath.mpf]]:
    return [(distribution, x, fifty_digits(distribution, x)) for distribution, x in map(problem, range(300))]


def test_log_prob_is_accurate_at_every_noise_level(problems: list[tuple[LinearGaussian, Tensor, mpmath.mpf]]) -> None:
    errors = [relative_error(distribution.log_prob(x), reference) for distribution, x, reference in problems]
    assert max(errors) < 1e-7
    assert float(np.median(errors)) < 1e-15


def test_low_rank_normal_of_torch_is_not(problems: list[tuple[LinearGaussian, Tensor, mpmath.mpf]]) -> None:
    errors = []
    for distribution, x, reference in problems[:100]:
        noise = distribution.sigma.square().expand(x.shape)
        value = LowRankMultivariateNormal(distribution.mu, distribution.W, noise, validate_args=False).log_prob(x)
        errors.append(relative_error(value, reference))
    assert max(errors) > 1e-3


def test_single_precision_parameters_are_evaluated_in_double() -> None:
    torch.manual_seed(0)
    distribution = LinearGaussian(torch.randn(30, 5), torch.randn(30), torch.tensor(1e-3))
    x = distribution.mu + torch.randn(30)
    value = distribution.log_prob(x)
    assert value.dtype == torch.float64
    assert relative_error(value, fifty_digits(distribution, x)) < 1e-12


def dense(distribution: LinearGaussian) -> MultivariateNormal:
    covariance = distribution.W @ distribution.W.mT + distribution.sigma.square() * torch.eye(
        distribution.W.shape[0], dtype=distribution.W.dtype
    )
    return MultivariateNormal(distribution.mu, covariance, validate_args=False)


def unflatten(flat: Tensor, D: int, K: int) -> tuple[LinearGaussian, Tensor]:
    x, W, mu, log_sigma = flat.split([D, D * K, D, 1])
    return LinearGaussian(W.reshape(D, K), mu, log_sigma.squeeze().exp()), x


def third(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of the squared Hessian: third derivatives."""
    return grad(lambda t: hessian(f)(t).square().sum())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func.hessian's own
@pytest.mark.parametrize(("D", "K"), [(4, 2), (3, 3), (2, 4), (1, 1)])
@pytest.mark.parametrize("columns", ["independent", "zero", "repeated"])
def test_derivatives_are_those_of_the_dense_normal(D: int, K: int, columns: str) -> None:
    flat = torch.randn(2 * D + D * K + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(D))
    flat[-1] = -2.0
    W = flat[D : D + D * K].view(D, K)  # a view: what follows changes flat
    if columns == "zero":
        W[:, 0] = 0.0
    if columns == "repeated":
        W[:, -1] = W[:, 0]

    def ours(t: Tensor) -> Tensor:
        distribution, x = unflatten(t, D, K)
        return distribution.log_prob(x)

    def reference(t: Tensor) -> Tensor:
        distribution, x = unflatten(t, D, K)
        return dense(distribution).log_prob(x)

    for operator in (grad, hessian) if (D, K) != (3, 3) else (grad, hessian, third):
        expected = operator(reference)(flat)
        torch.testing.assert_close(operator(ours)(flat), expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
    leaf = flat.clone().requires_grad_()
    (plain,) = torch.autograd.grad(ours(leaf), leaf)
    torch.testing.assert_close(plain, grad(ours)(flat))


@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2, 1.0, 1e3])
def test_gradient_in_x_is_the_scaled_residual(sigma: float) -> None:
    """d log p / d x = -(x - mu - W m) / sigma^2 = -C^-1 (x - mu), here from 50 digits."""
    torch.manual_seed(1)
    distribution = LinearGaussian(torch.randn(6, 2).double(), torch.zeros(6).double(), torch.tensor(sigma).double())
    x = distribution.W @ torch.randn(2).double() + sigma * torch.randn(6).double()
    with mpmath.workdps(50):
        W = mpmath.matrix(distribution.W.tolist())
        C = W * W.T + mpmath.mpf(distribution.sigma.item()) ** 2 * mpmath.eye(6)
        expected = torch.tensor([-float(v) for v in mpmath.lu_solve(C, mpmath.matrix(x.tolist()))], dtype=torch.float64)
    error = (grad(distribution.log_prob)(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-8


def test_vmap_over_an_ensemble_equals_the_loop() -> None:
    torch.manual_seed(0)
    W, mu, x = torch.randn(3, 5, 2).double(), torch.zeros(3, 5).double(), torch.randn(7, 5).double()
    sigma = torch.tensor([0.1, 1.0, 10.0]).double()

    def total(W: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        return LinearGaussian(W, mu, sigma).log_prob(x).sum()

    loop = [total(*parameters) for parameters in zip(W, mu, sigma)]
    torch.testing.assert_close(vmap(total)(W, mu, sigma), torch.stack(loop))
    slope = torch.stack([grad(total)(*parameters) for parameters in zip(W, mu, sigma)])
    torch.testing.assert_close(vmap(grad(total))(W, mu, sigma), slope)


@pytest.mark.parametrize("index", range(21))
def test_posterior_is_that_of_fifty_digits(index: int) -> None:
    distribution, x = problem(index)
    loc, scale_tril = distribution.posterior(x)
    with mpmath.workdps(50):
        W, var = mpmath.matrix(distribution.W.tolist()), mpmath.mpf(distribution.sigma.item()) ** 2
        r = mpmath.matrix([mpmath.mpf(a) - mpmath.mpf(b) for a, b in zip(x.tolist(), distribution.mu.tolist())])
        M = W.T * W + var * mpmath.eye(W.cols)
        m = torch.tensor([float(v) for v in mpmath.lu_solve(M, W.T * r)], dtype=torch.float64)
        L = torch.tensor([[float(v) for v in row] for row in mpmath.cholesky(var * M**-1).tolist()]).double()
    torch.testing.assert_close(loc, m, rtol=0, atol=1e-8 * float(m.abs().max()))
    torch.testing.assert_close(scale_tril, L, rtol=0, atol=1e-6 * float(L.abs().max()))


@pytest.mark.parametrize("columns", ["independent", "zero", "repeated"])
def test_posterior_is_differentiable(columns: str) -> None:
    torch.manual_seed(0)
    W = torch.randn(4, 2).double()
    W[:, 0] = {"independent": W[:, 0], "zero": torch.zeros(4).double(), "repeated": W[:, 1]}[columns]
    x, mu, sigma = torch.randn(3, 4).double(), torch.randn(4).double(), torch.tensor(0.5).double()
    inputs = tuple(t.requires_grad_() for t in (x, W, mu, sigma))
    assert torch.autograd.gradcheck(lambda x, W, mu, sigma: LinearGaussian(W, mu, sigma).posterior(x), inputs)


def test_posterior_comes_in_the_dtype_of_the_parameters() -> None:
    distribution = LinearGaussian(torch.ones(3, 2), torch.zeros(3), torch.tensor(1.0))
    loc, scale_tril = distribution.posterior(torch.ones(5, 3).double())
    assert (loc.dtype, scale_tril.dtype, loc.shape) == (torch.float32, torch.float32, (5, 2))


def cubature(distribution: LinearGaussian, x: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Expected log-likelihood from 2K points, exact for a quadratic integrand."""
    K = loc.shape[-1]
    steps = math.sqrt(K) * scale_tril.mT
    points = torch.cat([loc.unsqueeze(-2) + steps, loc.unsqueeze(-2) - steps], -2)  # (..., 2K, K)
    return (
        Normal(points @ distribution.W.mT + distribution.mu, distribution.sigma)
        .log_prob(x.unsqueeze(-2))
        .sum(-1)
        .mean(-1)
    )


def test_expected_log_likelihood_is_exact_for_a_gaussian() -> None:
    torch.manual_seed(0)
    distribution = LinearGaussian(torch.randn(5, 3).double(), torch.randn(5).double(), torch.tensor(0.3).double())
    x, loc = torch.randn(4, 5).double(), torch.randn(2, 4, 3).double()  # one leading dimension more
    std = torch.rand(4, 3).double() + 0.1
    tril = torch.randn(4, 3, 3).double().tril()
    expected = cubature(distribution, x, loc, torch.diag_embed(std))
    torch.testing.assert_close(distribution.expected_log_likelihood(x, loc, var=std.square()), expected)
    expected = cubature(distribution, x, loc, tril)
    torch.testing.assert_close(distribution.expected_log_likelihood(x, loc, scale_tril=tril), expected)


@pytest.mark.parametrize("sigma", [1e-3, 1.0, 100.0])
def test_elbo_at_the_exact_posterior_is_the_evidence(sigma: float) -> None:
    torch.manual_seed(0)
    distribution = LinearGaussian(torch.randn(6, 2).double(), torch.randn(6).double(), torch.tensor(sigma).double())
    x = distribution.mu + torch.randn(4, 2).double() @ distribution.W.mT + sigma * torch.randn(4, 6).double()
    loc, scale_tril = distribution.posterior(x)
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    kl = torch.distributions.kl_divergence(MultivariateNormal(loc, scale_tril=scale_tril), prior)
    elbo = distribution.expected_log_likelihood(x, loc, scale_tril=scale_tril) - kl
    torch.testing.assert_close(elbo, distribution.log_prob(x), rtol=1e-9, atol=0)


ONE = torch.tensor(1.0)
DISTRIBUTION = LinearGaussian(torch.ones(3, 2), torch.zeros(3), ONE)
expected_log_likelihood = DISTRIBUTION.expected_log_likelihood
BAD = {
    "W": (lambda: LinearGaussian(torch.ones(3), torch.zeros(3), ONE), r"expected W of shape \(D, K\).*got \(3,\)"),
    "mu": (lambda: LinearGaussian(DISTRIBUTION.W, torch.zeros(2), ONE), r"expected mu of shape \(3,\), got \(2,\)"),
    "sigma": (
        lambda: LinearGaussian(DISTRIBUTION.W, DISTRIBUTION.mu, torch.ones(3)),
        r"expected sigma of shape \(\), got \(3,\)",
    ),
    "log_prob": (lambda: DISTRIBUTION.log_prob(torch.ones(5, 4)), r"expected x of shape \(\.\.\., 3\), got \(5, 4\)"),
    "posterior": (lambda: DISTRIBUTION.posterior(ONE), r"expected x of shape \(\.\.\., 3\), got \(\)"),
    "loc": (
        lambda: expected_log_likelihood(DISTRIBUTION.mu, DISTRIBUTION.mu, var=ONE),
        r"expected loc of shape \(\.\.\., 2\), got \(3,\)",
    ),
    "neither": (lambda: expected_log_likelihood(DISTRIBUTION.mu, torch.ones(2)), "one of var and scale_tril, got none"),
    "both": (
        lambda: expected_log_likelihood(DISTRIBUTION.mu, torch.ones(2), var=torch.ones(2), scale_tril=torch.eye(2)),
        "one of var and scale_tril, got both",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_what_was_expected_and_what_came(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
