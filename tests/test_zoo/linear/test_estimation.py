"""Closed-form probabilistic PCA against scikit-learn, printed reference numbers and extended precision."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from zoo.linear.estimation import maximum_at_fixed_sigma, maximum_likelihood, spectrum
from zoo.linear.gaussian_algebra import LinearGaussian

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def digits() -> Array:
    return load_digits(return_X_y=True)[0]


def data(num: int = 300, dim: int = 6, offset: float = 0.0, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, dim)) @ np.diag(np.arange(1.0, dim + 1)) @ rng.normal(size=(dim, dim)) + offset


def batches(x: Array, sizes: list[int]) -> Iterator[Array]:
    return (part for part in np.split(x, np.cumsum(sizes)))


def assert_same(distribution: LinearGaussian, other: LinearGaussian, rtol: float = 1e-10) -> None:
    for name in ("W", "mu", "sigma"):
        expected = getattr(other, name)
        torch.testing.assert_close(
            getattr(distribution, name), expected, rtol=0, atol=rtol * float(expected.abs().max())
        )


def test_raw_digits(digits: Array) -> None:
    distribution = maximum_likelihood(digits, 8)
    assert distribution.sigma.item() ** 2 == pytest.approx(6.99633457, abs=5e-9)
    assert distribution.log_prob(torch.from_numpy(digits)).mean().item() == pytest.approx(-163.23588991, abs=5e-9)


@pytest.mark.parametrize("latent_dim", [2, 8, 16, 32])
def test_evidence_is_that_of_scikit_learn_with_divisor_n(digits: Array, latent_dim: int) -> None:
    """Its covariance has the divisor N - 1; both of its variances take the same factor."""
    pca = PCA(latent_dim, svd_solver="full").fit(digits)
    factor = (len(digits) - 1) / len(digits)
    pca.explained_variance_ *= factor
    pca.noise_variance_ *= factor
    ours = maximum_likelihood(digits, latent_dim).log_prob(torch.from_numpy(digits)).numpy()
    np.testing.assert_allclose(ours, pca.score_samples(digits), rtol=1e-9)


# k: sigma^2, log-likelihood, rate 1/2 sum log(lambda_i / sigma^2); digits / 16
TABLE = {
    1: (0.063403, -3.7485, 1.2000),
    2: (0.054117, 0.0057, 2.5137),
    5: (0.036197, 8.9076, 6.4814),
    10: (0.022751, 17.4519, 12.7961),
    20: (0.011274, 27.2773, 25.4383),
    40: (0.002307, 40.6125, 62.8734),
}


@pytest.mark.parametrize("latent_dim", TABLE)
def test_scaled_digits(digits: Array, latent_dim: int) -> None:
    x = digits / 16
    distribution, eigenvalues = maximum_likelihood(x, latent_dim), spectrum(x).eigenvalues
    var = distribution.sigma.item() ** 2
    rate = 0.5 * (eigenvalues[:latent_dim] / var).log().sum().item()
    evidence = distribution.log_prob(torch.from_numpy(x)).mean().item()
    expected_var, expected_evidence, expected_rate = TABLE[latent_dim]
    assert var == pytest.approx(expected_var, abs=5.1e-7)
    assert evidence == pytest.approx(expected_evidence, abs=5.1e-5)
    assert rate == pytest.approx(expected_rate, abs=5.1e-5)
    assert evidence == pytest.approx(-rate - 32 * (1 + math.log(2 * math.pi * var)), rel=1e-12)


def test_it_is_a_maximum() -> None:
    x = torch.from_numpy(data())
    distribution = maximum_likelihood(x, 2)
    parameters = [t.clone().requires_grad_() for t in (distribution.W, distribution.mu, distribution.sigma)]
    LinearGaussian(*parameters).log_prob(x).mean().backward()
    for parameter in parameters:
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=1e-12)


def test_columns_are_principal_axes_with_a_fixed_sign(digits: Array) -> None:
    W = maximum_likelihood(digits, 5).W
    gram = W.mT @ W
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-10 * float(gram.max()))
    assert gram.diagonal().diff().max() < 0
    assert torch.equal(W.abs().amax(0), W.amax(0))


def test_spectrum_is_that_of_numpy(digits: Array) -> None:
    mean, eigenvalues, axes = spectrum(digits)
    covariance = np.cov(digits.T, ddof=0)
    np.testing.assert_allclose(mean, digits.mean(0), rtol=1e-13)
    np.testing.assert_allclose(eigenvalues, np.linalg.eigvalsh(covariance)[::-1], atol=1e-11)
    np.testing.assert_allclose((axes * eigenvalues) @ axes.mT, covariance, atol=1e-11)
    assert int((eigenvalues > 1e-10).sum()) == 61


def test_a_large_mean_costs_no_more_than_it_cost_the_data() -> None:
    """Against a covariance with 64-bit mantissas; subtracting N mean mean' would lose 12 digits here, not 6."""
    offset = 1e6
    x = data(num=20_000, dim=4, offset=offset)
    x[10_000:] += 1.0  # the first rows do not have the mean of all
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean(0)
    covariance = np.asarray(centred.T @ centred / len(x), dtype=np.float64)
    atol = np.finfo(np.float64).eps * offset * covariance.max()
    for source in (x, batches(x, [3000, 1, 7000])):
        _, eigenvalues, axes = spectrum(source)
        np.testing.assert_allclose((axes * eigenvalues) @ axes.mT, covariance, rtol=0, atol=atol)


SOURCES = {
    "tensor": lambda x: torch.from_numpy(x),
    "tensor with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "column-major": lambda x: np.asfortranarray(x),
    "reversed view": lambda x: x[::-1],
    "list of tensors": lambda x: [torch.from_numpy(x[:100]), torch.from_numpy(x[100:])],
    "generator of uneven batches": lambda x: batches(x, [1, 150, 2]),
    "loader": lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(x)), batch_size=64),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same(source: str) -> None:
    x = data()
    assert_same(maximum_likelihood(SOURCES[source](x), 2), maximum_likelihood(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_accumulated_in_double(dtype: torch.dtype) -> None:
    x = torch.from_numpy(data()).to(dtype)
    assert_same(maximum_likelihood(x, 2), maximum_likelihood(x.double(), 2), rtol=0)


def test_read_only_arrays_are_taken() -> None:
    x = data()
    x.flags.writeable = False
    assert maximum_likelihood(x, 2).W.shape == (6, 2)


def test_constant_columns_and_fewer_data_than_columns_are_legal() -> None:
    x = data(num=8, dim=20)
    x[:, 3] = 5.0
    distribution = maximum_likelihood(x, 3)
    pca = PCA(3, svd_solver="covariance_eigh").fit(x)
    np.testing.assert_allclose(
        distribution.sigma**2 * 17, (np.var(x, axis=0).sum() - pca.explained_variance_.sum() * 7 / 8)
    )
    assert distribution.W[3].abs().max() < 1e-12


def test_a_noise_far_below_the_signal_is_found() -> None:
    x = data(num=500, dim=5)
    x[:, 2:] = 1e-4 * np.random.default_rng(1).normal(size=(500, 3))
    exact = np.linalg.svd(x - x.mean(0), compute_uv=False)[2:] ** 2 / 500
    assert maximum_likelihood(x, 2).sigma.item() ** 2 == pytest.approx(exact.mean(), rel=1e-4)


def broken(value: float, row: int, column: int) -> Array:
    x = data(num=5000, dim=4)
    x[row, column] = value
    return x


X = data(num=10, dim=4)
LOW_RANK = data(num=50, dim=2) @ np.ones((2, 1)) @ np.ones((1, 5)) + np.outer(data(50, 1), np.arange(5)) + 3.0
BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "NaN": (broken(np.nan, 4321, 2), 2, ValueError, "expected x to be finite, got nan in row 4321, column 2"),
    "infinity": (torch.from_numpy(broken(-np.inf, 0, 3)), 2, ValueError, "finite, got -inf in row 0, column 3"),
    "NaN in a batch": ([X, X, broken(np.nan, 7, 1)], 2, ValueError, "expected batch 2 to be finite, got nan in row 7"),
    "overflow": (X * 1e200, 2, ValueError, "finite covariance in float64, got values whose squares overflow"),
    "integers": (np.arange(20).reshape(5, 4), 2, TypeError, "expected x of a floating dtype, got int64"),
    "integer tensor": (torch.ones(5, 4).int(), 2, TypeError, "expected x of a floating dtype, got torch.int32"),
    "integer batch": ([X, np.ones((5, 4), bool)], 2, TypeError, "expected batch 1 of a floating dtype, got bool"),
    "vector": (X[0], 2, ValueError, r"expected x of shape \(N, D\), got \(4,\)"),
    "images": (X.reshape(10, 2, 2), 2, ValueError, r"expected x of shape \(N, D\), got \(10, 2, 2\)"),
    "no rows": (X[:0], 2, ValueError, r"at least one row and one column, got shape \(0, 4\)"),
    "no columns": (X[:, :0], 2, ValueError, r"at least one row and one column, got shape \(10, 0\)"),
    "empty batch": ([X, X[:0]], 2, ValueError, r"expected batch 1 with at least one row"),
    "no batches": ([], 2, ValueError, "expected at least one batch, got none"),
    "columns differ": ([X, X[:, :3]], 2, ValueError, r"expected batch 1 of shape \(N, 4\), got \(10, 3\)"),
    "list of lists": (X.tolist(), 2, TypeError, "expected batch 0 to be a tensor or an array, got list"),
    "number": (3.0, 2, TypeError, "expected x to be a tensor, an array or an iterable of them, got float"),
    "no latents": (X, 0, ValueError, "expected latent_dim to be at least 1, got 0"),
    "fraction of a latent": (X, 1.5, TypeError, "expected latent_dim to be an integer, got 1.5"),
    "as many latents as columns": (X, 4, ValueError, "latent_dim below the rank 4 of the data, got 4"),
    "more latents than columns": ([X], 7, ValueError, "latent_dim below the rank 4 of the data, got 7"),
    "as many latents as the rank": (LOW_RANK, 2, ValueError, "latent_dim below the rank 2 of the data, got 2"),
    "more latents than the rank": ([LOW_RANK], 4, ValueError, "latent_dim below the rank 2 of the data, got 4"),
    "constant data": (np.ones((9, 3)), 1, ValueError, "latent_dim below the rank 0 of the data, got 1"),
    "one datum": (X[:1], 1, ValueError, "latent_dim below the rank 0 of the data, got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_what_was_expected_and_what_came(case: str) -> None:
    x, latent_dim, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        maximum_likelihood(x, latent_dim)


def test_digits_have_rank_61(digits: Array) -> None:
    assert maximum_likelihood(digits, 60).sigma > 0
    for latent_dim in (61, 63):
        with pytest.raises(ValueError, match=f"below the rank 61 of the data, got {latent_dim}"):
            maximum_likelihood(digits, latent_dim)


def test_the_thread_counts_of_the_libraries_are_restored() -> None:
    before = threadpool_info()
    maximum_likelihood(data(), 2)
    with pytest.raises(ValueError, match="finite"):
        maximum_likelihood(broken(np.nan, 0, 0), 2)
    assert threadpool_info() == before


MEMORY = """
import numpy as np
from pathlib import Path
from zoo.linear.estimation import maximum_likelihood
def stream(num):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((5000, 32)) for _ in range(num // 5000))
def peak(num):  # in kB; ru_maxrss would start from the peak of the process that started this one
    maximum_likelihood(stream(num), 4)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
small = peak(10_000)
print((peak(1_000_000) - small) / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_stream() -> None:
    """A million rows (244 MB) against ten thousand."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20


@pytest.mark.parametrize(("sigma", "live"), [(0.3, 4), (1.5, 2), (9.0, 0)])
def test_at_a_given_sigma_the_maximum_leaves_zero_columns(sigma, live):
    x = np.random.default_rng(0).standard_normal((200, 4)) * [5.0, 2.0, 1.0, 0.5]
    distribution = maximum_at_fixed_sigma(x, 4, sigma)
    values = np.linalg.eigvalsh(np.cov(x.T, ddof=0))[::-1]
    assert int((distribution.W.abs().amax(0) > 0).sum()) == live == int((values > sigma**2).sum())
    above, below = values[values > sigma**2], values[values <= sigma**2]
    log_det = np.log(above).sum() + len(below) * np.log(sigma**2)
    expected = -0.5 * (4 * np.log(2 * np.pi) + log_det + len(above) + below.sum() / sigma**2)
    assert float(distribution.log_prob(torch.from_numpy(x)).mean()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("latent_dim", "sigma"), [(5, 1.0), (2, 0.0), (2, np.nan)])
def test_a_given_sigma_and_k_are_checked(latent_dim, sigma):
    with pytest.raises(
        ValueError, match=r"expected (latent_dim up to the number 4 of columns|a positive finite sigma)"
    ):
        maximum_at_fixed_sigma(np.eye(4), latent_dim, sigma)
