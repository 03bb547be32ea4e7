"""Triangular factors: they merge to that of all rows, and find a noise that sums of squares lose."""

import numpy as np
import pytest
import torch
from several_ranks import on_ranks

from zoo.linear.estimation import maximum_likelihood, spectrum
from zoo.linear.triangular_factor import Factor, merged

N, D, K = 400, 6, 2


def rows(sigma, offset=0.0):
    """Data of a signal of deviation one in two directions, and noise."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(N, K)) @ np.linalg.qr(rng.normal(size=(D, K)))[0].T
    return signal + sigma * rng.normal(size=(N, D)) + offset


def exact_sigma(x):
    return np.sqrt((np.linalg.svd(x - x.mean(0), compute_uv=False)[K:] ** 2).sum() / N / (D - K))


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_factors_of_parts_merge_to_that_of_all_rows(parts):
    x = rows(0.3, offset=5.0)
    total = merged(Factor(D).add(part) for part in np.array_split(x, parts))
    covariance = np.cov(x.T, bias=True)
    np.testing.assert_allclose(total.triangle.T @ total.triangle / N, covariance, rtol=0, atol=1e-13)
    np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-14)
    variances, axes = total.spectrum()
    np.testing.assert_allclose(axes @ np.diag(variances) @ axes.T, covariance, rtol=0, atol=1e-13)


def estimated():
    batches = [torch.from_numpy(part) for part in np.array_split(rows(1e-6), 5)]
    found = [maximum_likelihood(rows(1e-6), K), maximum_likelihood(batches, K), maximum_likelihood(rows(0.5, 3.0), K)]
    texts = []
    for bad in (np.where(np.arange(N)[:, None] == N - 1, np.nan, rows(0.1)), np.ones((N, D))):
        try:
            maximum_likelihood(bad, K)
        except ValueError as error:
            texts.append(str(error))
    return [(f.W, f.mu, f.sigma) for f in found], spectrum(rows(0.5, 3.0)).eigenvalues, texts


def test_ranks_find_a_noise_of_a_millionth_of_the_signal(tmp_path):
    alone = maximum_likelihood(rows(0.5, 3.0), K)
    for (array, batches, plain), eigenvalues, (nan, constant) in on_ranks(estimated, 2, tmp_path):
        for found in (array, batches):
            assert found[2].item() == pytest.approx(exact_sigma(rows(1e-6)), rel=1e-7)
        for got, want in zip(plain, (alone.W, alone.mu, alone.sigma), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(eigenvalues, spectrum(rows(0.5, 3.0)).eigenvalues, rtol=1e-10, atol=1e-12)
        assert nan == f"expected x to be finite, got nan in row {N - 1}, column 0"
        assert (
            constant
            == "expected latent_dim below the rank 0 of the data, got 2: the data are constant, or a single row"
        )
