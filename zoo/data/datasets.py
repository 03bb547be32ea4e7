"""Data sets that account for their preprocessing: each data point carries the log-determinant of its transformation.

A model is fitted to y = T(x). Its density of the original data is

    log p(x) = log p(y) + log |det dT/dx|,

so log-likelihoods and bits per dimension compare across preprocessings once the log-determinant is added.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.files import Array, as_rows, download_images, read_arrays, read_images
from zoo.data.preprocessing import RAW, UNIT, Logit, Transform

Split = tuple[Tensor, Tensor]  # the places of the training and of the test rows


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    r"""Training and test rows, and what the preprocessing did to their density.

    .. math:: \log p(x_n) = \log p(y_n) + \log |\det \partial y_n / \partial x_n|

    Warning:
        Under `Raw` or `Scaled` a model's density of integers has no upper bound; only with `Logit` is the left side
        related to their probability: it is a lower bound, on average over the noise.

    Args:
        name: what plots and tables call it.
        train: shape (N, D), after preprocessing.
        test: shape (M, D); M may be 0.
        train_log_det: shape (N,), nats.
        test_log_det: shape (M,), nats.
        image_shape: the shape of one data point before flattening, or None.
        truth: parameters that generated the data, where they are known.
        transform: the preprocessing; its `inverse` takes samples of a model back to the original units.

    Raises:
        ValueError: shapes that do not fit each other, or integer tensors.

    Example:
        >>> from zoo.data.preprocessing import Scaled
        >>> data = digits(transform=Scaled(16.0))
        >>> data, data.data_dim, data.image_shape
        (Dataset('digits', train (1437, 64), test (360, 64), torch.float64), 64, (8, 8))
        >>> data.to(dtype=torch.float32).test.dtype
        torch.float32
    """

    name: str
    train: Tensor
    test: Tensor
    train_log_det: Tensor
    test_log_det: Tensor
    image_shape: tuple[int, ...] | None = None
    truth: dict[str, Tensor] | None = None
    transform: Transform = RAW

    def __post_init__(self) -> None:
        if self.train.ndim != 2 or self.test.ndim != 2 or self.train.shape[1] != self.test.shape[1]:
            raise ValueError(f"expected train (N, D) and test (M, D), got {_shapes(self.train, self.test)}")
        if self.train_log_det.shape != self.train.shape[:1] or self.test_log_det.shape != self.test.shape[:1]:
            came = _shapes(self.train_log_det, self.test_log_det)
            raise ValueError(f"expected one log-determinant per row of {self!r}, got shapes {came}")
        if self.image_shape is not None and math.prod(self.image_shape) != self.data_dim:
            raise ValueError(f"expected an image_shape of {self.data_dim} values, got {self.image_shape}")
        if not self.train.dtype.is_floating_point:
            raise ValueError(f"expected a floating dtype, got {self.train.dtype}")

    def __repr__(self) -> str:
        train, test = tuple(self.train.shape), tuple(self.test.shape)
        return f"Dataset({self.name!r}, train {train}, test {test}, {self.train.dtype})"

    @property
    def data_dim(self) -> int:
        """Dimension D of one row."""
        return self.train.shape[1]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Dataset":
        """Return a copy with every tensor, the truth included, in another dtype or on another device."""
        truth = {name: value.to(device=device, dtype=dtype) for name, value in (self.truth or {}).items()}
        return replace(
            self,
            train=self.train.to(device=device, dtype=dtype),
            test=self.test.to(device=device, dtype=dtype),
            train_log_det=self.train_log_det.to(device=device, dtype=dtype),
            test_log_det=self.test_log_det.to(device=device, dtype=dtype),
            truth=truth or None,
        )


def digits(
    *, transform: Transform = RAW, test_size: int | float = 360, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Dataset:
    """Load scikit-learn's handwritten digits, 1797 images of 8 x 8 integers 0..16; three pixels are constant.

    References:
        Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998, UCI repository.

    Args:
        transform: `Raw()`, `Scaled(16.0)` or `Logit(17)`; applied to all rows before the split.
        test_size: rows held out at random, a number or a share below 1; 0 keeps all rows in their original order.
        seed: seed of the split, `RandomState(seed).permutation(1797)`; its last entries are the test set.
        dtype: floating dtype of the result.

    Returns:
        A `Dataset` with D = 64 and `image_shape` (8, 8).

    Raises:
        ValueError: the test size or the dtype is out of range.

    Example:
        >>> digits(test_size=0).train.shape
        torch.Size([1797, 64])
    """
    from sklearn.datasets import load_digits

    rows = load_digits().data
    return _assemble("digits", rows, (8, 8), _split(len(rows), test_size, seed), transform, dtype)


def digits_logit(
    *, test_size: int | float = 360, seed: int = 0, noise_seed: int = 0, dtype: torch.dtype = torch.float64
) -> Dataset:
    """Dequantise the digits and map them to logits: `digits` with `Logit(17)`, for real-valued models.

    Args:
        test_size: as in `digits`.
        seed: seed of the split; it leaves the noise of each row as it is.
        noise_seed: seed of the noise.
        dtype: floating dtype of the result.

    Returns:
        A `Dataset` whose log-determinants belong to unit bins.

    Raises:
        ValueError: the test size or the dtype is out of range.

    Example:
        >>> digits_logit().transform
        Logit(levels=17, alpha=1e-06, seed=0)
    """
    return digits(transform=Logit(17, seed=noise_seed), test_size=test_size, seed=seed, dtype=dtype)


def linear_gaussian(
    num_data: int,
    data_dim: int,
    latent_dim: int,
    *,
    sigma: float = 0.5,
    spectrum: Tensor | None = None,
    test_size: int | float = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Dataset:
    r"""Draw data from a linear-Gaussian model with known parameters.

    .. math::
        x = W z + \mu + \sigma \epsilon, \qquad W = Q\,(\Lambda - \sigma^2 I)^{1/2}, \quad Q^\top Q = I_K,
        \qquad \operatorname{Cov} x = W W^\top + \sigma^2 I

    References:
        Probabilistic principal component analysis, Tipping and Bishop, 1999, doi:10.1111/1467-9868.00196.

    Args:
        num_data: number of rows, those of the test set included.
        data_dim: D.
        latent_dim: K, from 1 to D.
        sigma: standard deviation of the noise, positive.
        spectrum: shape (K,), the leading eigenvalues of the covariance, each above sigma^2; None for
            sigma^2 + (K, ..., 1).
        test_size: the last rows, held out.
        seed: seed of `numpy.random.RandomState`.
        dtype: floating dtype of the result; the data are drawn in float64.

    Returns:
        A `Dataset` whose `truth` holds `W` (D, K), `mu` (D,), `sigma` (), `z` (N, K) and `z_test` (M, K).

    Raises:
        ValueError: a size, sigma or the spectrum is out of range.

    Example:
        >>> data = linear_gaussian(100, 5, 2, sigma=0.1)
        >>> data.train.shape, data.truth["W"].shape
        (torch.Size([100, 5]), torch.Size([5, 2]))
    """
    lam = _spectrum(data_dim, latent_dim, sigma, spectrum)
    n = num_data - _checked(test_size, num_data)
    random = np.random.RandomState(seed)
    q, r = np.linalg.qr(random.standard_normal((data_dim, latent_dim)))
    w = q * np.sign(np.diag(r)) * np.sqrt(lam - sigma**2)  # LAPACK's choice of signs must not show
    mu = random.standard_normal(data_dim)
    z = random.standard_normal((num_data, latent_dim))
    x = z @ w.T + mu + sigma * random.standard_normal((num_data, data_dim))
    values = {"W": w, "mu": mu, "sigma": sigma, "z": z[:n], "z_test": z[n:]}
    truth = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
    order = torch.arange(num_data)
    return replace(_assemble("linear_gaussian", x, None, (order[:n], order[n:]), RAW, dtype), truth=truth)


def mnist(
    path: str | os.PathLike[str] | None = None,
    *,
    transform: Transform = UNIT,
    max_train: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Load MNIST, 28 x 28 handwritten digits, from a file, a folder or OpenML, in the standard split.

    References:
        Gradient-based learning applied to document recognition, LeCun et al., 1998, doi:10.1109/5.726791.

    Args:
        path: a `.npz` with the keys `x_train` and `x_test`, a folder of IDX files, or None to download.
        transform: `Scaled(255.0)` (the default), `Raw()` or `Logit(256)`. It sees the test rows first, so
            that `max_train` changes no row's noise, and works in float64 (`Logit` needs 3.4 GB for all rows).
        max_train: keep only the first rows of the training set; None for all.
        cache: folder in which a download is kept; None for scikit-learn's.
        dtype: floating dtype of the result.

    Returns:
        A `Dataset` with D = 784 and `image_shape` (28, 28); 60000 and 10000 rows in the original.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder has no IDX images.
        ConnectionError: the download failed.
        ValueError: a damaged file, or `max_train` or the dtype is out of range.

    Example:
        >>> mnist("no/such/file.npz")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: ...file.npz: there is no such file or folder; expected a .npz with the keys ...
    """
    images = download_images("mnist_784", cache) if path is None else read_images(path)
    return _images("mnist", images, transform, max_train, dtype)


def fashion_mnist(
    path: str | os.PathLike[str] | None = None,
    *,
    transform: Transform = UNIT,
    max_train: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Load Fashion-MNIST, 28 x 28 pictures of clothes; arguments, result and errors are those of `mnist`.

    References:
        Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms, Xiao et al., 2017,
        arXiv:1708.07747.
    """
    images = download_images("Fashion-MNIST", cache) if path is None else read_images(path)
    return _images("fashion_mnist", images, transform, max_train, dtype)


def load_data(
    source: str | os.PathLike[str] | Tensor | Array,
    *,
    transform: Transform = RAW,
    test_size: int | float = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Dataset:
    """Load a user's own data, from a file, a tensor or an array.

    Warning:
        A csv's first line is a header where none of its fields is a number; column names 0,1,2 pass for data.

    Args:
        source: a `.npy`, a `.npz` (one array, or a split under the keys `x_train` and `x_test`; other keys are
            ignored), a `.csv`, or an array of shape (N, D) or (N, ...), copied and flattened.
        transform: preprocessing, e.g. `Logit(256)` for bytes; applied to all rows before the split.
        test_size: rows held out at random, as in `digits`; 0 keeps all rows in their order.
        seed: seed of the split.
        dtype: floating dtype of the result.

    Returns:
        A `Dataset` on the CPU, named after the file; `image_shape` where a data point had more than one dimension.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the source is neither a path nor a tensor nor an array.
        ValueError: unknown suffix, damaged or pickled file, unexpected keys, a cell that is not a number, NaN or
            infinite values, a shape that is not (N, D), a test size that does not fit.

    Example:
        >>> load_data(torch.eye(4), test_size=1)
        Dataset('data', train (3, 4), test (1, 4), torch.float64)
    """
    label, first, second = _read(source)
    rows, image_shape = as_rows(first, label)
    if second is None:
        split = _split(len(rows), test_size, seed)
    elif test_size:
        raise ValueError(f"{label}: expected test_size=0, for x_test is the test set, got {test_size}")
    elif first.shape[1:] != second.shape[1:]:
        raise ValueError(f"{label}: expected rows of one shape, got {first.shape} and {second.shape}")
    else:
        rows, split = _joined(rows, as_rows(second, f"{label}, x_test")[0])
    return _assemble(Path(label).stem, rows, image_shape, split, transform, dtype)


def _read(source: str | os.PathLike[str] | Tensor | Array) -> tuple[str, Array, Array | None]:
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        return "data", (source.double() if source.is_floating_point() else source).numpy(), None
    if isinstance(source, np.ndarray):
        return "data", source, None
    if isinstance(source, str | os.PathLike):
        return os.fspath(source), *read_arrays(source)
    raise TypeError(f"expected a path, a tensor or an array, got {type(source).__name__}")


def _images(
    name: str, images: tuple[Array, Array], transform: Transform, max_train: int | None, dtype: torch.dtype
) -> Dataset:
    train, test = (part.reshape(len(part), -1) for part in images)
    if max_train is not None and not 0 < max_train <= len(train):
        raise ValueError(f"expected max_train from 1 to {len(train)}, got {max_train}")
    rows, split = _joined(train[:max_train], test)
    return _assemble(name, rows, (28, 28), split, transform, dtype)


def _joined(train: Array, test: Array) -> tuple[Array, Split]:
    """Put the test rows first, so that their noise does not depend on the size of the training set."""
    order = torch.arange(len(test) + len(train))
    return np.concatenate([test, train]), (order[len(test) :], order[: len(test)])


def _split(num_data: int, test_size: int | float, seed: int) -> Split:
    """Hold out rows at random; where none is held out, the order is the original one."""
    num_train = num_data - _checked(test_size, num_data)
    order = np.random.RandomState(seed).permutation(num_data) if test_size else np.arange(num_data)
    return torch.from_numpy(order[:num_train]), torch.from_numpy(order[num_train:])


def _checked(test_size: int | float, num_data: int) -> int:
    """A number of test rows from a number or, below one, a share."""
    size = round(test_size * num_data) if 0 < test_size < 1 else test_size
    if not 0 <= size < num_data or size != int(size):
        raise ValueError(f"expected a test_size from 0 to {num_data - 1} or a share below 1, got {test_size}")
    return int(size)


def _assemble(
    name: str,
    rows: Array,
    image_shape: tuple[int, ...] | None,
    split: Split,
    transform: Transform,
    dtype: torch.dtype,
) -> Dataset:
    """Transform all rows in their original order, then split them: a split never changes the noise."""
    y, log_det = (t.to(dtype) for t in transform(torch.from_numpy(np.asarray(rows, dtype=np.float64))))
    if not bool(y.isfinite().all() & log_det.isfinite().all()):
        raise ValueError(f"{name}: expected values that {dtype} can hold after preprocessing, got infinite ones")
    train, test = split
    return Dataset(name, y[train], y[test], log_det[train], log_det[test], image_shape=image_shape, transform=transform)


def _spectrum(data_dim: int, latent_dim: int, sigma: float, spectrum: Tensor | None) -> NDArray[np.float64]:
    """Check the parameters of `linear_gaussian` and return the leading eigenvalues, shape (K,)."""
    if not 1 <= latent_dim <= data_dim or not 0 < sigma < math.inf:
        raise ValueError(f"expected 1 <= K <= D and sigma > 0, got K={latent_dim}, D={data_dim}, {sigma=}")
    if spectrum is None:
        return sigma**2 + np.arange(latent_dim, 0.0, -1.0)
    lam = torch.as_tensor(spectrum, dtype=torch.float64).detach().cpu().numpy()
    if lam.shape != (latent_dim,) or not (np.isfinite(lam) & (lam > sigma**2)).all():
        raise ValueError(f"expected a spectrum ({latent_dim},) above sigma^2 = {sigma**2}, got {spectrum}")
    return lam


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
