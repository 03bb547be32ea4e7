"""The ladder of problems with known evidence: each answer against integrals that know nothing of it."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from inference import evidence
from zoo.benchmarks.ladder import LATENT_DIMS, SIGMAS, known_answers

CURVED = ("fold", "half-seen fold", "bimodal", "banana", "ring")


@pytest.fixture(scope="module")
def ladder():
    return known_answers(num_data=4, seed=0)


def panels(log_f, edges):
    """log of the integral of exp(log_f) by Gauss-Legendre rules between the edges."""
    node, weight = np.polynomial.legendre.leggauss(30)
    edges = np.unique(edges)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    return scipy.special.logsumexp(log_f(middle[:, None] + half[:, None] * node), b=weight * half[:, None])


def by_height(x, curvature, sigma):
    """Noisy curvature t^2 over the positive half line, in panels that crowd about the root."""

    def log_f(root):
        noise = scipy.stats.norm.logpdf(x, curvature * root**2, sigma)
        return math.log(2) + scipy.stats.norm.logpdf(root) + noise

    centre = math.sqrt(max(x / curvature, 0.0))
    steps = sigma * 10.0 ** np.arange(-2, 6, 0.25)
    return panels(log_f, np.clip(np.concatenate([centre - steps, [centre], centre + steps, [0, 12]]), 0, 12))


def numerically(problem, row):
    """log p(x) of one data point from the distributions alone."""
    x, sigma = problem.x[row].tolist(), problem.sigma
    if problem.family == "banana":
        return by_height(x[0], 0.7, math.hypot(1, sigma))
    if problem.family == "bimodal":
        return by_height(x[0], 1.0, sigma) + scipy.stats.norm.logpdf(x[1], 0, math.hypot(1, sigma))
    if problem.family == "ring":
        return scipy.stats.exponnorm.logpdf(x[0], 2 / sigma, 0, sigma)
    return by_height(x[0], 1.0, sigma)


def test_the_ladder_is_complete(ladder):
    names = [(p.family, p.sigma) for p in ladder]
    expected = [(f"linear K={k}", s) for k in LATENT_DIMS for s in SIGMAS] + [(f, s) for f in CURVED for s in SIGMAS]
    assert names == [*expected, ("unseen mode", 0.02)]
    for problem in ladder:
        assert problem.x.shape == (4, problem.model.data_dim)
        assert problem.z.shape == (4, problem.model.latent_dim)
        assert problem.log_evidence.shape == (4,)
        assert {t.dtype for t in (problem.x, problem.z, problem.log_evidence)} == {torch.float64}


def test_linear_answers_are_those_of_mpmath(ladder):
    """The covariance at sigma = 1e-4 has a condition number of 1e9: in fifty digits it has none."""
    mpmath = pytest.importorskip("mpmath")
    for problem in ladder:
        if not problem.family.startswith("linear") or problem.model.latent_dim > 4:
            continue
        with mpmath.workdps(50):
            W = mpmath.matrix(problem.model.W.tolist())
            covariance = W * W.T + mpmath.exp(mpmath.mpf(float(problem.model.log_sigma))) ** 2 * mpmath.eye(W.rows)
            log_det = mpmath.log(mpmath.det(covariance))
            for x, found in zip((problem.x - problem.model.mu).tolist(), problem.log_evidence.tolist(), strict=True):
                square = (mpmath.matrix([x]) * mpmath.lu_solve(covariance, mpmath.matrix(x)))[0]
                true = -(square + log_det + W.rows * mpmath.log(2 * mpmath.pi)) / 2
                assert found == pytest.approx(float(true), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("latent_dim", LATENT_DIMS)
def test_linear_answers_are_those_of_scipy(latent_dim, ladder):
    for problem in ladder:
        if problem.family == f"linear K={latent_dim}":
            weights, sigma = problem.model.W.numpy(), float(problem.model.sigma)
            covariance = weights @ weights.T + sigma**2 * np.eye(len(weights))
            distribution = scipy.stats.multivariate_normal(problem.model.mu.numpy(), covariance)
            # Rounding of the covariance, times its condition number, moves the squares of some 2 K units.
            tolerance = 10 * np.finfo(float).eps * np.linalg.cond(covariance) * len(weights)
            np.testing.assert_allclose(
                problem.log_evidence, distribution.logpdf(problem.x.numpy()), rtol=0, atol=tolerance
            )


@pytest.mark.parametrize("family", CURVED)
def test_curved_answers_are_those_of_integrals_on_a_line(family, ladder):
    for problem in ladder:
        if problem.family == family:
            true = [numerically(problem, row) for row in range(len(problem.x))]
            np.testing.assert_allclose(problem.log_evidence, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [1.0, 1e-2, 1e-4])
def test_answers_hold_far_out_and_below_the_fold(sigma):
    from zoo.benchmarks.ladder import _fold_evidence

    x = [-4 * sigma, 0.0, sigma**2 / 2, sigma, 1e-3, 1.0, 30.0]
    found = _fold_evidence(torch.tensor(x, dtype=torch.float64).unsqueeze(-1), 1.0, sigma)
    np.testing.assert_allclose(found, [by_height(value, 1.0, sigma) for value in x], rtol=1e-9, atol=1e-9)


def test_quadrature_finds_one_of_the_two_classes_of_the_last_rung():
    (*_, problem) = known_answers([], [], num_data=5)
    x = problem.x[:, 0].numpy()
    first = scipy.stats.norm.logcdf(30) + scipy.stats.norm.logpdf(x, 0, 0.02)
    second = scipy.stats.norm.logsf(30) + scipy.stats.norm.logpdf(x, 1, 0.02)
    np.testing.assert_allclose(problem.log_evidence, np.logaddexp(first, second), rtol=1e-12)
    np.testing.assert_allclose(second - first, np.linspace(0, 3, 5), atol=1e-9)
    found = evidence(problem.model, problem.x, method="quadrature", guide=problem.guide, seed=0, progress=False)
    np.testing.assert_allclose(found.value, first, atol=1e-6)


def test_draws_are_those_of_the_posterior():
    """Residuals are standard normal, and so are the latents over all data; beyond the step they follow the tail."""
    for problem in known_answers([4], [0.1], num_data=4000)[:-1]:
        residual = (problem.x - problem.model.decode(problem.z)) / 0.1
        for values in (residual, problem.z):
            assert scipy.stats.kstest(values.flatten(), "norm").pvalue > 1e-4
        assert scipy.stats.kstest(residual.flatten() + 0.2, "norm").pvalue < 1e-4
    (*_, unseen) = known_answers([], [], num_data=4000)
    z = unseen.z[:, 0].numpy()
    beyond = z > 30
    share = scipy.special.expit(np.linspace(0, 3, 4000))
    assert abs(beyond.sum() - share.sum()) < 4 * math.sqrt((share * (1 - share)).sum())
    uniform = np.exp(scipy.special.log_ndtr(-z[beyond]) - scipy.special.log_ndtr(-30))
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-4
    assert scipy.stats.kstest(z[~beyond], "norm").pvalue > 1e-4


@pytest.mark.slow
def test_guides_are_as_good_as_their_family_says():
    ladder = {p.family: p for p in known_answers([16], [0.01], num_data=50)}

    def bias(name):
        problem = ladder[name]
        found = evidence(problem.model, problem.x, method="importance", guide=problem.guide, seed=0, progress=False)
        return float((found.value - problem.log_evidence).mean()), found.standard_error.square().mean().sqrt()

    for name in ("linear K=16", "fold", "bimodal"):
        error, spread = bias(name)
        assert abs(error) < 4 * spread / math.sqrt(50)
    assert -math.log(2) - 0.01 < bias("half-seen fold")[0] < -0.5  # near the fold itself the roots lie together
    assert bias("unseen mode")[0] < -math.log(2)


def test_the_seed_decides_and_the_global_state_stays():
    state = torch.get_rng_state()
    first, again, other = (known_answers([2], [0.1], num_data=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].x, other[0].x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_data": 0}, "expected num_data to be at least 1, got 0"),
        ({"latent_dims": [0]}, "expected data_dim to be at least 1, got 0"),
        ({"sigmas": [0.0]}, "expected positive finite sigmas, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        known_answers(**arguments)
