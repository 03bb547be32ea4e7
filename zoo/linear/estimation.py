r"""Probabilistic PCA by maximum likelihood: closed form, one pass over the data.

The covariance is a sum of squares throughout: each chunk of rows is centred at its own mean, and the difference between
that mean and the mean so far enters as one more row. So no large numbers are subtracted, and a stream costs the memory
of one batch. Each thread takes a share of the rows, with a single-threaded matrix product: on blocks this narrow that
beats a threaded product, whose threads moreover keep spinning for a while and slow what comes next.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

from inference.core.checks import check_count, check_positive
from inference.core.memory import at_once
from inference.core.ranks import Ranks, ranks
from inference.core.sources import as_tensors
from zoo.linear.gaussian_algebra import LinearGaussian
from zoo.linear.triangular_factor import Factor, merged

Array: TypeAlias = NDArray[np.float64]
Batch: TypeAlias = "Tensor | NDArray[Any]"
Data: TypeAlias = "Batch | Iterable[Batch]"
_ROUNDING = np.finfo(np.float64).eps  # times D: an eigenvalue below this part of the largest is taken for zero
_CHUNK_ROWS = 2048
_MAX_THREADS = 8  # each holds a chunk and two (D, D) matrices


class Spectrum(NamedTuple):
    """Eigendecomposition of the data covariance (divisor N), float64.

    Attributes:
        mean: Mean of the data, (D,).
        eigenvalues: Variances along the principal axes, descending, (D,).
        eigenvectors: Principal axes in columns, (D, D); the entry of largest magnitude in each is positive.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor


def maximum_likelihood(x: Data, latent_dim: int) -> LinearGaussian:
    r"""Maximum-likelihood parameters of probabilistic PCA, in float64 on the CPU.

    .. math:: \mu = \bar x, \qquad \sigma^2 = \frac{1}{D - K} \sum_{i > K} \lambda_i, \qquad
              W = U_K (\Lambda_K - \sigma^2 I)^{1/2}

    with :math:`\lambda_i, u_i` the eigenpairs of the data covariance (divisor N), in descending order. W is unique up
    to a rotation; here its columns lie along the principal axes, each with its entry of largest magnitude positive.

    Warning:
        With K at or above the rank of the data the likelihood has no maximum; this is an error. The last digits
        depend on ``torch.get_num_threads()``. The BLAS libraries are held to one thread while a batch is read in.

    References:
        Tipping and Bishop, "Probabilistic Principal Component Analysis", 1999.
        Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983 (merging of moments).

    Args:
        x: Data, (N, D) of a floating dtype, a tensor, an array or a data frame; or an iterable of such batches, read
            once, their sizes free. A list or tuple of one tensor, as a ``DataLoader`` over a ``TensorDataset`` yields,
            counts as that tensor. Of several ranks each reads its share of the rows, or of the batches.
        latent_dim: K.

    Returns:
        W (D, K), mu (D,) and sigma (), with :math:`\sigma > 0`.

    Raises:
        TypeError: If x or a batch is not a tensor or array, or not floating; if latent_dim is not an integer.
        ValueError: If x or a batch is not (N, D), empty, or not finite; if latent_dim is below 1, or not below both D
            and the rank of the data. Batches and rows are counted from 0; values are checked as they are read.

    Example:
        >>> x = torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
        >>> distribution = maximum_likelihood(x, 1)  # eigenvalues 2, 1/2, 0
        >>> distribution.W.squeeze(), distribution.sigma**2
        (tensor([1.3229, 0.0000, 0.0000], dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    check_count(latent_dim, "latent_dim")
    if ranks().size > 1:
        return _from_spectrum(*_shared_spectrum(x), latent_dim)
    mean, covariance = _moments(x)
    if latent_dim >= len(mean):
        _mean_of_discarded(covariance, latent_dim)  # names the rank
    eigenvalues, axes = _eigh(covariance, latent_dim)
    var = (covariance.trace() - eigenvalues.sum()) / (len(mean) - latent_dim)
    if var <= _ROUNDING * len(mean) * eigenvalues[0]:
        var = _mean_of_discarded(covariance, latent_dim)
    W = axes * np.sqrt(np.maximum(eigenvalues - var, 0.0))
    sigma = torch.tensor(float(var), dtype=torch.float64).sqrt()
    return LinearGaussian(torch.from_numpy(W), torch.from_numpy(mean), sigma)


def maximum_at_fixed_sigma(x: Data, latent_dim: int, sigma: float) -> LinearGaussian:
    r"""Maximum-likelihood W and mu of probabilistic PCA where sigma is given, in float64 on the CPU.

    .. math:: W = U_K (\Lambda_K - \sigma^2 I)_+^{1/2}

    Args:
        x: Data, as for :func:`maximum_likelihood`.
        latent_dim: K, up to D.
        sigma: Standard deviation of the noise.

    Raises:
        TypeError: As :func:`maximum_likelihood`.
        ValueError: As :func:`maximum_likelihood`, where it concerns x; if K is above D, or sigma not positive.
    """
    check_count(latent_dim, "latent_dim")
    check_positive(sigma, "sigma")
    mean, eigenvalues, axes = spectrum(x)
    if latent_dim > len(mean):
        raise ValueError(f"expected latent_dim up to the number {len(mean)} of columns of x, got {latent_dim}")
    W = axes[:, :latent_dim] * (eigenvalues[:latent_dim] - sigma**2).clip(min=0).sqrt()
    return LinearGaussian(W, mean, torch.tensor(sigma, dtype=torch.float64))


def spectrum(x: Data) -> Spectrum:
    """Mean, principal variances and principal axes of the data, from the same single pass.

    Args:
        x: Data, as for :func:`maximum_likelihood`.

    Returns:
        All D eigenpairs. Eigenvalues that rounding made negative are 0.

    Raises:
        TypeError, ValueError: As :func:`maximum_likelihood`, where they concern x.
    """
    if ranks().size > 1:
        return Spectrum(*map(torch.from_numpy, _shared_spectrum(x)))
    mean, covariance = _moments(x)
    eigenvalues, axes = _eigh(covariance, len(mean))
    return Spectrum(*map(torch.from_numpy, (mean, eigenvalues.clip(0.0), axes)))


def _eigh(covariance: Array, num: int) -> tuple[Array, Array]:
    """The ``num`` largest eigenvalues, descending, and their eigenvectors with the sign convention."""
    window = (len(covariance) - num, len(covariance) - 1)
    with _single_threaded_blas():
        values, vectors = scipy.linalg.eigh(covariance.T, subset_by_index=window, check_finite=False)
    values, vectors = values[::-1].copy(), vectors[:, ::-1]
    return values, _with_sign(vectors)


def _with_sign(vectors: Array) -> Array:
    """Columns whose entries of largest magnitude are positive."""
    peak = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    return vectors * np.where(peak < 0, -1.0, 1.0)


def _shared_spectrum(x: Data) -> tuple[Array, Array, Array]:
    """Mean, variances and axes of rows that the ranks share, from their triangular factors."""
    group = ranks()
    total = merged(group.in_turn(group.size, lambda rank: _factor(x, replace(group, rank=rank))))
    if total.count == 0:
        raise ValueError("expected at least one batch, got none")
    with np.errstate(over="ignore"):
        variances, axes = total.spectrum()
    if not np.isfinite(variances).all():
        raise ValueError("expected x with a finite covariance in float64, got values whose squares overflow")
    return total.mean, variances, _with_sign(axes)


def _factor(x: Data, group: Ranks) -> Factor:
    """The factor of one rank's share: of the rows of an array, or of the batches of an iterable."""
    found: Factor | None = None
    whole = isinstance(x, Tensor | np.ndarray)
    for i, (name, batch) in enumerate(_batches(x)):
        _check_batch(batch, name, found.mean.size if found else None)
        found = found or Factor(batch.shape[1])
        own = group.share(len(batch)) if whole else slice(0, len(batch) if i % group.size == group.rank else 0)
        share = range(len(batch))[own]
        for first in share[:: at_once(_CHUNK_ROWS)]:
            chunk = _as_float64(batch[first : min(first + at_once(_CHUNK_ROWS), share.stop)])
            _check_finite(chunk, name, first)
            found.add(chunk)
    return found or Factor(0)


def _from_spectrum(mean: Array, variances: Array, axes: Array, latent_dim: int) -> LinearGaussian:
    """Maximum-likelihood parameters from the spectrum of a triangular factor."""
    deviations = np.sqrt(variances)
    rank = int((deviations > _ROUNDING * len(mean) * deviations[0]).sum())
    _check_rank(rank, latent_dim)
    var = float(variances[latent_dim:].mean())
    W = axes[:, :latent_dim] * np.sqrt(np.maximum(variances[:latent_dim] - var, 0.0))
    return LinearGaussian(torch.from_numpy(W), torch.from_numpy(mean), torch.tensor(var, dtype=torch.float64).sqrt())


def _check_rank(rank: int, latent_dim: int) -> None:
    if latent_dim >= rank:
        constant = ": the data are constant, or a single row" if rank == 0 else ""
        raise ValueError(f"expected latent_dim below the rank {rank} of the data, got {latent_dim}{constant}")


def _mean_of_discarded(covariance: Array, latent_dim: int) -> float:
    """Mean of the eigenvalues beyond K, from all of them; raises where K is not below the rank."""
    values, _ = _eigh(covariance, len(covariance))
    rank = int((values > _ROUNDING * len(values) * values[0]).sum())
    _check_rank(rank, latent_dim)
    return float(values[latent_dim:].clip(0.0).mean())


def _moments(x: Data) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D), divisor N, in one pass."""
    shares: list[_Moments] = []
    threads = min(torch.get_num_threads(), _MAX_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        for name, batch in _batches(x):
            _check_batch(batch, name, shares[0].mean.size if shares else None)
            shares = shares or [_Moments(batch.shape[1]) for _ in range(threads)]
            _add(pool, shares, batch, name)
    if shares:
        return _merged(shares)
    raise ValueError("expected at least one batch, got none")


def _add(pool: ThreadPoolExecutor, shares: list[_Moments], batch: Batch, name: str) -> None:
    """Give each thread its part of the rows of a checked batch."""
    edges = np.linspace(0, len(batch), len(shares) + 1).astype(int)
    with _single_threaded_blas():
        list(pool.map(lambda share, start, stop: share.add(batch, name, start, stop), shares, edges, edges[1:]))


def _merged(shares: list[_Moments]) -> tuple[Array, Array]:
    """Mean and covariance of all the rows that the shares have seen."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = functools.reduce(_Moments.merge, shares)
        covariance = total.scatter / total.count
    if not np.isfinite(covariance.trace()):
        raise ValueError("expected x with a finite covariance in float64, got values whose squares overflow")
    return total.mean, covariance


class _Moments:
    """Count, mean (D,) and scatter (D, D) of the rows seen so far, without a cancelling difference."""

    def __init__(self, data_dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(data_dim)
        self.scatter = np.zeros((data_dim, data_dim))
        self._product = np.empty((data_dim, data_dim))
        self._rows = np.empty((0, data_dim))
        self._at_once = at_once(_CHUNK_ROWS)  # here, in the caller's thread, whose limit it is

    def add(self, batch: Batch, name: str, start: int, stop: int) -> None:
        """Take in the rows from ``start`` to ``stop``; raise if they are not finite."""
        for first in range(start, stop, self._at_once):
            chunk = _as_float64(batch[first : min(first + self._at_once, stop)])
            with np.errstate(over="ignore", invalid="ignore"):
                mean = chunk.mean(0)
                if not np.isfinite(mean).all():
                    _check_finite(chunk, name, first)
                self._add_chunk(chunk, mean)

    def _add_chunk(self, chunk: Array, mean: Array) -> None:
        num = len(chunk)
        if len(self._rows) <= num:
            self._rows = np.empty((num + 1, mean.size))
        rows = self._rows[: num + 1]
        np.subtract(chunk, mean, out=rows[:num])
        rows[num] = self._shift(num, mean)
        np.matmul(rows.T, rows, out=self._product)
        self.scatter += self._product

    def _shift(self, num: int, mean: Array) -> Array:
        """Move the mean for ``num`` more rows of that mean; the row whose square the scatter gains by it."""
        shift = mean - self.mean
        weight = num / (self.count + num)
        row = shift * np.sqrt(self.count * weight)
        self.mean += shift * weight
        self.count += num
        return row

    def merge(self, other: _Moments) -> _Moments:
        """Take in all that ``other`` has seen."""
        if other.count:
            row = self._shift(other.count, other.mean)
            self.scatter += other.scatter + np.outer(row, row)
        return self


_libraries = functools.cache(ThreadpoolController)  # finding them takes milliseconds


def _single_threaded_blas() -> AbstractContextManager[Any]:
    return _libraries().limit(limits=1, user_api="blas")


def _as_float64(rows: Batch) -> Array:
    return rows.detach().cpu().double().numpy() if isinstance(rows, Tensor) else np.asarray(rows, dtype=np.float64)


def _batches(x: Data) -> Iterator[tuple[str, Batch]]:
    """The batches with what to call them in an error."""
    x = x if isinstance(x, np.ndarray | list | tuple) else as_tensors(x)  # a data frame
    if isinstance(x, Tensor | np.ndarray):
        yield "x", x
    elif isinstance(x, Iterable):
        for i, batch in enumerate(x):
            yield f"batch {i}", batch[0] if isinstance(batch, list | tuple) and len(batch) == 1 else batch
    else:
        raise TypeError(f"expected x to be a tensor, an array or an iterable of them, got {type(x).__name__}")


def _check_batch(batch: Batch, name: str, data_dim: int | None) -> None:
    """Check type, dtype and shape of a batch, without reading its values."""
    if not isinstance(batch, Tensor | np.ndarray):
        raise TypeError(f"expected {name} to be a tensor or an array, got {type(batch).__name__}")
    floating = batch.is_floating_point() if isinstance(batch, Tensor) else np.issubdtype(batch.dtype, np.floating)
    if not floating:
        raise TypeError(f"expected {name} of a floating dtype, got {batch.dtype}")
    if batch.ndim != 2 or (data_dim is not None and batch.shape[1] != data_dim):
        raise ValueError(f"expected {name} of shape (N, {data_dim or 'D'}), got {tuple(batch.shape)}")
    if 0 in batch.shape:
        raise ValueError(f"expected {name} with at least one row and one column, got shape {tuple(batch.shape)}")


def _check_finite(chunk: Array, name: str, first_row: int) -> None:
    """Raise for the first entry that is NaN or infinite; ``first_row`` is the place of the chunk in its batch."""
    bad = np.argwhere(~np.isfinite(chunk))
    if len(bad):
        value, (row, column) = chunk[tuple(bad[0])], bad[0]
        raise ValueError(f"expected {name} to be finite, got {value} in row {first_row + row}, column {column}")
