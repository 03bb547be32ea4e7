"""Data sets against NumPy, scikit-learn and autograd; the files are written by the tests themselves."""

import gzip
import math
import re
import struct
import tracemalloc
import types
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
import torch

from zoo.data.datasets import Dataset, digits, digits_logit, fashion_mnist, linear_gaussian, load_data, mnist
from zoo.data.preprocessing import Logit, Raw, Scaled

TRANSFORMS = [Raw(), Scaled(16.0), Scaled(0.25), Logit(17), Logit(17, alpha=0.05, seed=3), Logit(256)]
IDX_NAMES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


def small_integers(seed=0, shape=(6, 4), levels=17):
    x = np.random.RandomState(seed).randint(0, levels, shape)
    x[0, :2] = 0, levels - 1  # both ends of the range
    return x


def images(num, seed):
    return np.random.RandomState(seed).randint(0, 256, (num, 28, 28)).astype(np.uint8)


def write_idx(path, array):
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def arrays():
    return images(7, 0), images(3, 1)


@pytest.fixture
def image_file(tmp_path, arrays):
    path = tmp_path / "pictures.npz"
    np.savez(path, x_train=arrays[0], x_test=arrays[1], y_train=np.arange(7), y_test=np.arange(3))
    return path


# --- preprocessing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_log_det_is_that_of_autograd(transform):
    x = torch.from_numpy(small_integers()).double()
    y, log_det = transform(x)
    for y_n, log_det_n in zip(y, log_det):
        jacobian = torch.autograd.functional.jacobian(transform.inverse, y_n)  # d x / d y
        torch.testing.assert_close(log_det_n, -torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inverse_gives_the_integers_back(transform, dtype):
    x = torch.from_numpy(small_integers())
    y, _ = transform(x.double())
    back = transform.inverse(y.to(dtype)).double()
    noise = np.random.RandomState(transform.seed).random_sample(x.shape) if isinstance(transform, Logit) else 0
    # Rounding y moves p by p (1 - p) |y| eps < eps / 4; the steps on p in [0, 1] add a few eps; then times L.
    tolerance = 4 * 256 * torch.finfo(dtype).eps
    np.testing.assert_allclose(back.numpy(), x.numpy() + noise, rtol=0, atol=tolerance)


def test_logit_is_scipys():
    from scipy.special import logit

    x = small_integers(levels=256)
    noise = np.random.RandomState(5).random_sample(x.shape)
    y, _ = Logit(256, alpha=1e-3, seed=5)(torch.from_numpy(x))
    np.testing.assert_allclose(y.numpy(), logit(1e-3 + 0.998 * (x + noise) / 256), rtol=1e-12)


def test_logit_attains_the_bound_for_a_uniform_distribution():
    # A standard logistic density of y is a uniform one of p: at alpha = 0 each of the L bins has probability
    # 1/L, whatever the noise.
    x = torch.arange(17)[:, None]
    y, log_det = Logit(17, alpha=0.0)(x)
    log_p = torch.nn.functional.logsigmoid(y).sum(-1) + torch.nn.functional.logsigmoid(-y).sum(-1)
    np.testing.assert_allclose((log_p + log_det).numpy(), -math.log(17), rtol=1e-12)


@pytest.mark.parametrize("bad", [-1.0, 17.0, 2.5, math.nan])
def test_logit_refuses_what_is_no_level(bad):
    with pytest.raises(ValueError, match=r"expected integers 0\.\.16, got 1 others"):
        Logit(17)(torch.tensor([[0.0, bad]]))


@pytest.mark.parametrize(
    "make", [lambda: Logit(1), lambda: Logit(2, alpha=0.5), lambda: Scaled(0.0), lambda: Scaled(math.nan)]
)
def test_preprocessing_parameters_are_checked(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# --- the container ---------------------------------------------------------------------------------


def test_to_moves_every_tensor_and_leaves_the_original():
    data = linear_gaussian(8, 3, 2, test_size=2)
    moved = data.to(dtype=torch.float32, device="cpu")
    tensors = [moved.train, moved.test, moved.train_log_det, moved.test_log_det, *moved.truth.values()]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert data.train.dtype == data.truth["W"].dtype == torch.float64
    torch.testing.assert_close(moved.train.double(), data.train, rtol=1e-6, atol=1e-6)
    assert (moved.name, moved.transform, moved.data_dim) == (data.name, data.transform, 3)
    assert digits().to(dtype=torch.float32).truth is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": torch.zeros(4)}, r"expected train \(N, D\) and test \(M, D\), got \(4,\) and \(2, 3\)"),
        ({"test": torch.zeros(2, 5)}, r"got \(4, 3\) and \(2, 5\)"),
        (
            {"test_log_det": torch.zeros(2, 1)},
            r"one log-determinant per row .* got shapes \(4,\) and \(2, 1\)",
        ),
        ({"image_shape": (2, 2)}, r"expected an image_shape of 3 values, got \(2, 2\)"),
        ({"train": torch.zeros(4, 3).long()}, "expected a floating dtype, got torch.int64"),
    ],
)
def test_dataset_refuses_shapes_that_do_not_fit(change, message):
    fields = {
        "train": torch.zeros(4, 3),
        "test": torch.zeros(2, 3),
        "train_log_det": torch.zeros(4),
        "test_log_det": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        Dataset("d", **{**fields, **change})


# --- digits ----------------------------------------------------------------------------------------


def test_digits_without_a_test_set_are_scikit_learns_in_order():
    data = digits(test_size=0)
    np.testing.assert_array_equal(data.train.numpy(), sklearn.datasets.load_digits().data)
    assert data.test.shape == (0, 64)
    assert data.train[0, :8].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]  # first row of the UCI file
    assert not data.train_log_det.any()
    assert data.train_log_det.shape == (1797,)
    assert data.test_log_det.shape == (0,)


@pytest.mark.parametrize("seed", [0, 4])
def test_digits_split_is_the_fixed_permutation(seed):
    rows = sklearn.datasets.load_digits().data
    order = np.random.RandomState(seed).permutation(1797)
    assert sorted(order) == list(range(1797))  # disjoint, and covers
    data = digits(seed=seed)
    np.testing.assert_array_equal(data.train.numpy(), rows[order[:1437]])
    np.testing.assert_array_equal(data.test.numpy(), rows[order[1437:]])


def test_scaled_digits_have_the_known_spectrum():
    data = digits(transform=Scaled(16.0), test_size=0)
    eigenvalues = np.linalg.eigvalsh(np.cov(data.train.numpy().T, ddof=0))[::-1]
    np.testing.assert_allclose(eigenvalues[:4], [0.6989, 0.6392, 0.5536, 0.3947], atol=5e-5)
    np.testing.assert_allclose(data.train_log_det.numpy(), -64 * math.log(16))


def test_logit_digits_have_the_known_spectrum():
    rows = digits_logit(test_size=0).train.numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T, ddof=0))[::-1]
    # The same stream (NumPy's frozen RandomState) as the reference, so equal to its printed digits.
    np.testing.assert_allclose(eigenvalues[:6], [33.96, 31.21, 27.65, 19.90, 13.43, 10.98], atol=0.005)


def test_the_split_does_not_change_the_noise():
    whole = digits_logit(test_size=0)
    order = torch.from_numpy(np.random.RandomState(2).permutation(1797))
    data = digits_logit(seed=2, test_size=100)
    assert torch.equal(torch.cat([data.train, data.test]), whole.train[order])
    assert torch.equal(torch.cat([data.train_log_det, data.test_log_det]), whole.train_log_det[order])
    assert not torch.equal(digits_logit(noise_seed=1, test_size=0).train, whole.train)


def test_log_likelihoods_of_preprocessings_compare():
    # The best spherical Gaussian is equivariant under scaling: in original units it has the same density.
    def log_likelihood(data):
        y = data.train - data.train.mean(0)
        normal = torch.distributions.Normal(0.0, y.square().mean().sqrt())
        return normal.log_prob(y).sum(-1) + data.train_log_det

    raw, scaled = (log_likelihood(digits(transform=t)) for t in (Raw(), Scaled(16.0)))
    torch.testing.assert_close(raw, scaled)


@pytest.mark.parametrize("test_size", [-1, 1797])
def test_digits_refuse_a_test_size_that_does_not_fit(test_size):
    with pytest.raises(ValueError, match=f"expected a test_size from 0 to 1796 or a share below 1, got {test_size}"):
        digits(test_size=test_size)


def test_a_test_size_below_one_is_a_share():
    data = digits(test_size=0.25)
    assert (len(data.train), len(data.test)) == (1348, 449)


def test_an_integer_dtype_is_refused():
    with pytest.raises(ValueError, match=r"expected a floating dtype, got torch.int32"):
        digits(dtype=torch.int32)


# --- linear-Gaussian data --------------------------------------------------------------------------


def test_linear_gaussian_truth_has_the_spectrum():
    spectrum = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)
    truth = linear_gaussian(10, 7, 3, sigma=0.5, spectrum=spectrum).truth
    w = truth["W"].numpy()
    np.testing.assert_allclose(w.T @ w, np.diag([4.75, 1.75, 0.75]), atol=1e-13)
    eigenvalues = np.linalg.eigvalsh(w @ w.T + truth["sigma"].item() ** 2 * np.eye(7))[::-1]
    np.testing.assert_allclose(eigenvalues, [5.0, 2.0, 1.0, 0.25, 0.25, 0.25, 0.25], rtol=1e-12)


def test_linear_gaussian_data_have_the_moments_of_the_truth():
    data = linear_gaussian(20000, 5, 2, sigma=0.3, seed=1)
    x, w, mu = data.train.numpy(), data.truth["W"].numpy(), data.truth["mu"].numpy()
    covariance = w @ w.T + 0.09 * np.eye(5)
    variances = np.diag(covariance)
    assert (abs(x.mean(0) - mu) < 4 * np.sqrt(variances / 20000)).all()
    standard_error = np.sqrt((covariance**2 + np.outer(variances, variances)) / 20000)  # Wishart
    assert (abs(np.cov(x.T) - covariance) < 4 * standard_error).all()


def test_linear_gaussian_residual_is_white_noise_of_sigma():
    data = linear_gaussian(5000, 4, 2, sigma=0.2, test_size=1000)
    truth = data.truth
    assert (len(truth["z"]), len(truth["z_test"])) == (4000, 1000)
    for x, z in ((data.train, truth["z"]), (data.test, truth["z_test"])):
        residual = (x - z @ truth["W"].T - truth["mu"]) / truth["sigma"]
        mean_square = residual.square().mean().item()
        assert abs(mean_square - 1) < 4 * math.sqrt(2 / residual.numel())


def test_linear_gaussian_default_spectrum_and_the_seed():
    first, again, other = (linear_gaussian(6, 4, 3, sigma=0.1, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_allclose(first.truth["W"].square().sum(0).numpy(), [3, 2, 1], rtol=1e-12)
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)
    held_out = linear_gaussian(6, 4, 3, sigma=0.1, test_size=2)
    assert torch.equal(torch.cat([held_out.train, held_out.test]), first.train)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10, 3, 4), {}, "expected 1 <= K <= D"),
        ((10, 3, 0), {}, "expected 1 <= K <= D"),
        ((10, 3, 2), {"sigma": 0.0}, "sigma=0.0"),
        (
            (10, 3, 2),
            {"spectrum": torch.tensor([2.0, 0.2])},
            r"expected a spectrum \(2,\) above sigma\^2 = 0.25",
        ),
        ((10, 3, 2), {"spectrum": torch.tensor([2.0])}, r"expected a spectrum \(2,\)"),
        ((10, 3, 2), {"test_size": 10}, "expected a test_size from 0 to 9 or a share below 1, got 10"),
    ],
)
def test_linear_gaussian_refuses_impossible_parameters(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear_gaussian(*arguments, **options)


# --- MNIST and its kin -----------------------------------------------------------------------------


@pytest.mark.parametrize("read", [mnist, fashion_mnist])
def test_images_from_npz(read, image_file, arrays):
    data = read(image_file, dtype=torch.float64)
    np.testing.assert_allclose(data.train.numpy(), arrays[0].reshape(7, 784) / 255)
    np.testing.assert_allclose(data.test.numpy(), arrays[1].reshape(3, 784) / 255)
    np.testing.assert_allclose(data.train_log_det.numpy(), np.full(7, -784 * math.log(255)))
    assert (data.name, data.image_shape) == (read.__name__, (28, 28))
    assert read(image_file).train.dtype == torch.float32


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_from_idx_files(suffix, tmp_path, arrays):
    for name, array in zip(IDX_NAMES, arrays):
        write_idx(tmp_path / (name + suffix), array)
    data = mnist(tmp_path, transform=Raw())
    np.testing.assert_array_equal(data.train.numpy(), arrays[0].reshape(7, 784))
    np.testing.assert_array_equal(data.test.numpy(), arrays[1].reshape(3, 784))


def test_max_train_changes_no_rows_noise(image_file):
    whole, part = (mnist(image_file, transform=Logit(256), max_train=size) for size in (None, 4))
    assert torch.equal(part.train, whole.train[:4])
    assert torch.equal(part.test, whole.test)
    assert not torch.equal(  # nor do train and test share it
        Logit(256).inverse(whole.train[:3].double()) % 1, Logit(256).inverse(whole.test.double()) % 1
    )
    with pytest.raises(ValueError, match="expected max_train from 1 to 7, got 8"):
        mnist(image_file, max_train=8)


def test_missing_images_say_what_to_do(tmp_path, arrays):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; expected .* path=None to download"):
        mnist(tmp_path / "absent")
    write_idx(tmp_path / IDX_NAMES[0], arrays[0])
    message = rf"expected the file {IDX_NAMES[1]} or {IDX_NAMES[1]}.gz, got \['{IDX_NAMES[0]}'\]"
    with pytest.raises(FileNotFoundError, match=message):
        mnist(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], r"expected 2352 bytes for \(3, 28, 28\), got 2351"),
        (lambda content: content + b"0", "expected 2352 bytes"),
        (lambda content: b"<html>" + content, "expected the IDX header .*, got b'<htm'"),
        (lambda content: content[:10], "expected the IDX header"),
    ],
)
def test_damaged_idx_files_are_refused(damage, message, tmp_path, arrays):
    for name, array in zip(IDX_NAMES, arrays):
        write_idx(tmp_path / name, array)
    path = tmp_path / IDX_NAMES[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        mnist(tmp_path)


def test_a_truncated_gzip_file_is_refused(tmp_path, arrays):
    for name, array in zip(IDX_NAMES, arrays):
        write_idx(tmp_path / f"{name}.gz", array)
    path = tmp_path / f"{IDX_NAMES[0]}.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable gzip file"):
        mnist(tmp_path)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"x_train": np.zeros((2, 784)), "x_test": np.zeros((2, 784))}, "expected uint8 .* got float64"),
        (
            {"x_train": np.zeros((2, 5), np.uint8), "x_test": images(1, 0)},
            r"train: .* got uint8 of shape \(2, 5\)",
        ),
        ({"images": images(1, 0)}, "expected the keys x_train and x_test, got one array"),
        ({"a": images(1, 0), "b": images(1, 0)}, r"got \['a', 'b'\]"),
    ],
)
def test_other_contents_are_refused_as_images(stored, message, tmp_path):
    np.savez(tmp_path / "a.npz", **stored)
    with pytest.raises(ValueError, match=message):
        mnist(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("read", "name"), [(mnist, "mnist_784"), (fashion_mnist, "Fashion-MNIST")], ids=["mnist", "fashion"]
)
def test_download_asks_openml_and_splits(read, name, monkeypatch, tmp_path):
    calls = []
    pixels = np.zeros((70000, 784), np.uint8)
    pixels[:, 0] = np.arange(70000) % 251

    def fetch(*args, **kwargs):
        calls.append((args, kwargs))
        return types.SimpleNamespace(data=pixels)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    data = read(transform=Raw(), max_train=5, cache=tmp_path)
    assert calls[0][0] == (name,)
    assert calls[0][1]["data_home"] == tmp_path
    assert calls[0][1]["version"] == 1
    assert data.train[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert data.test[0, 0] == 60000 % 251
    assert data.test.shape == (10000, 784)


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("no route"), ConnectionResetError("no route")])
def test_no_network_is_one_sentence(error, monkeypatch):
    def fetch(*_args, **_kwargs):
        warnings.warn("retrying", RuntimeWarning, stacklevel=1)
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    with pytest.raises(ConnectionError, match=r"could not download mnist_784 .*no route.* pass path=") as caught:
        mnist()
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_an_unexpected_download_is_refused(monkeypatch):
    answer = types.SimpleNamespace(data=np.zeros((10, 784)))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda *_args, **_kwargs: answer)
    with pytest.raises(ValueError, match=r"expected bytes of shape \(70000, 784\), got shape \(10, 784\)"):
        mnist()


# --- a user's own data -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ">f8", np.int64, np.uint8, bool])
def test_load_npy(dtype, tmp_path):
    array = small_integers(levels=2).astype(dtype)
    np.save(tmp_path / "mine.npy", array)
    data = load_data(tmp_path / "mine.npy")
    np.testing.assert_array_equal(data.train.numpy(), array.astype(float))
    assert (data.name, data.train.dtype, len(data.test)) == ("mine", torch.float64, 0)
    np.testing.assert_array_equal(load_data(str(tmp_path / "mine.npy")).train.numpy(), array.astype(float))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_load_npz_with_one_array_or_a_split(save, tmp_path):
    x, held_out = small_integers(0), small_integers(1, (2, 4))
    save(tmp_path / "one.npz", anything=x)
    np.testing.assert_array_equal(load_data(tmp_path / "one.npz").train.numpy(), x)
    labels = np.array(["a", None], dtype=object)  # beside a split, other keys are never read
    save(tmp_path / "two.npz", x_train=x, x_test=held_out, names=labels)
    data = load_data(tmp_path / "two.npz")
    np.testing.assert_array_equal(data.train.numpy(), x)
    np.testing.assert_array_equal(data.test.numpy(), held_out)
    with pytest.raises(ValueError, match="expected test_size=0, for x_test is the test set, got 1"):
        load_data(tmp_path / "two.npz", test_size=1)
    save(tmp_path / "three.npz", a=x, b=x)
    with pytest.raises(ValueError, match=r"expected one array, or the keys x_train and x_test, got \['a', 'b'\]"):
        load_data(tmp_path / "three.npz")
    save(tmp_path / "four.npz", x_train=x, x_test=held_out[:, :3])
    with pytest.raises(ValueError, match=r"expected rows of one shape, got \(6, 4\) and \(2, 3\)"):
        load_data(tmp_path / "four.npz")


@pytest.mark.parametrize(
    "text",
    [
        "1,2\n3,-4.5e-1\n",
        "length,width\n1,2\n3,-.45\n",
        "# saved by NumPy\r\n1, 2\r\n\r\n3,-0.45\r\n",
        '\ufeff"length","width"\n"1","2"\n3,-0.45',
    ],
    ids=["plain", "header", "comment", "quotes"],
)
def test_load_csv(text, tmp_path):
    (tmp_path / "table.csv").write_text(text, encoding="utf-8", newline="")
    np.testing.assert_array_equal(load_data(tmp_path / "table.csv").train.numpy(), [[1, 2], [3, -0.45]])


def test_load_csv_that_numpy_wrote(tmp_path):
    x = np.random.RandomState(0).standard_normal((5, 3))
    np.savetxt(tmp_path / "table.csv", x, delimiter=",", header="a,b,c", fmt="%.17g")
    np.testing.assert_array_equal(load_data(tmp_path / "table.csv").train.numpy(), x)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,x\n", "row 1, column 1: expected a number, got 'x'"),
        ("1,x\n3,4\n", "row 0, column 1: expected a number, got 'x'"),
        ("1,2\n3,\n", "row 1, column 1: expected a number, got ''"),
        ("1,2\n3\n", "row 1, column 1: expected a number, got ''"),
        ("1,2\n,\n", "row 1, column 0: expected a number, got ''"),
        ("1,2\n3,nan\n", "1 NaN or infinite of 4, the first .nan. at row 1, column 1"),
        ("", r"expected shape \(N, D\) .* got \(0, 0\)"),
        ("a,b\n", r"got \(0, 2\)"),
        ("a;b\n1;2\n", "expected a number, got '1;2'"),
    ],
)
def test_load_csv_names_the_cell(text, message, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "table.csv")


def test_load_refuses_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.npy: expected .* no such file"):
        load_data(tmp_path / "absent.npy")
    (tmp_path / "data.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected the suffix .npy, .npz or .csv, got '.pkl'"):
        load_data(tmp_path / "data.pkl")
    with pytest.raises(TypeError, match="expected a path, a tensor or an array, got list"):
        load_data([[1.0]])  # type: ignore[arg-type]


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_load_never_unpickles(suffix, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / f"data{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, np.array([[Trap(trace)]], dtype=object))
    with pytest.raises(ValueError, match=rf"data{suffix}: not a readable {suffix} .*pickles are refused"):
        load_data(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("keep", [0, 3, 60, 140, -1])
def test_load_refuses_truncated_files(suffix, keep, tmp_path):
    path = tmp_path / f"data{suffix}"
    (np.save if suffix == ".npy" else np.savez_compressed)(path, np.ones((6, 4)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"not a readable {suffix}"):
        load_data(path)


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_load_reads_or_refuses_flipped_bytes(save, tmp_path):
    path = tmp_path / ("data.npy" if save is np.save else "data.npz")
    save(path, np.ones((6, 4)))
    content, random, messages = path.read_bytes(), np.random.RandomState(0), []
    for _ in range(300):
        damaged = bytearray(content)
        damaged[random.randint(len(content))] ^= random.randint(1, 256)
        path.write_bytes(damaged)
        try:
            load_data(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 100  # and nothing but a ValueError came
    assert all(message.startswith(str(path)) for message in messages)


def test_load_refuses_a_damaged_member(tmp_path):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no array at all")
    with pytest.raises(ValueError, match=r"not a readable .npz"):
        load_data(path)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_load_takes_tensors_and_copies_them(kind):
    x = torch.from_numpy(small_integers()).to(kind)
    data = load_data(x)
    np.testing.assert_array_equal(data.train.numpy(), x.double().numpy())
    kept = data.train.clone()
    x.zero_()
    assert torch.equal(data.train, kept)


def test_load_detaches_and_flattens():
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    data = load_data(x, dtype=torch.float32)
    assert not data.train.requires_grad
    assert data.image_shape == (2, 3)
    assert torch.equal(data.train, x.detach().flatten(1))


def test_load_splits_as_digits_does_and_transforms_before():
    x = small_integers(shape=(20, 3))
    order = np.random.RandomState(7).permutation(20)
    data = load_data(x, transform=Logit(17), test_size=5, seed=7)
    whole, log_det = Logit(17)(torch.from_numpy(x))
    assert torch.equal(data.train, whole[order[:15]])
    assert torch.equal(data.test, whole[order[15:]])
    assert torch.equal(data.test_log_det, log_det[order[15:]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"data: expected shape \(N, D\) or \(N, ...\) with N, D > 0, got \(3,\)"),
        (np.zeros((0, 3)), r"got \(0, 3\)"),
        (np.zeros((3, 0)), r"got \(3, 0\)"),
        (np.array([["a"]]), "expected real numbers, got an array of dtype <U1"),
        (np.array([[1j]]), "expected real numbers, got an array of dtype complex128"),
        (np.array([[None]]), "expected real numbers, got an array of dtype object"),
        (
            np.array([[0, 1], [np.nan, -np.inf]]),
            r"2 NaN or infinite of 4, the first \(nan\) at row 1, column 0",
        ),
    ],
)
def test_load_refuses_what_are_no_rows_of_numbers(array, message):
    with pytest.raises(ValueError, match=message):
        load_data(array)


def test_load_refuses_what_the_dtype_cannot_hold():
    with pytest.raises(ValueError, match=r"data: expected values that torch.float32 can hold"):
        load_data(np.array([[1e300]]), dtype=torch.float32)


# --- files that promise more than they hold --------------------------------------------------------


def peak_of(read, path):
    """Bytes of Python's own allocations while a file is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def gzipped_zeros(path):
    header = struct.pack(">HBB3I", 0, 8, 3, 100_000, 28, 28)
    with gzip.open(path, "wb") as file:
        file.write(header)
        for _ in range(100):
            file.write(bytes(1000 * 784))
    return path


def test_a_small_gzip_file_of_many_zeros_is_not_unpacked(tmp_path):
    path = gzipped_zeros(tmp_path / f"{IDX_NAMES[0]}.gz")
    write_idx(tmp_path / IDX_NAMES[1], images(3, 0))
    assert path.stat().st_size < 1e6
    assert peak_of(lambda p: mnist(p.parent), path) < 10e6


def test_a_gzip_file_that_holds_more_than_it_says_is_not_unpacked(tmp_path):
    path = gzipped_zeros(tmp_path / f"{IDX_NAMES[0]}.gz")
    content = bytearray(gzip.decompress(path.read_bytes())[:16]) + bytes(78_400_000)
    content[4:8] = struct.pack(">I", 3)
    path.write_bytes(gzip.compress(bytes(content)))
    write_idx(tmp_path / IDX_NAMES[1], images(3, 0))
    assert peak_of(lambda p: mnist(p.parent), path) < 10e6


def write_header(path, header):
    """An array of 64 bytes under a header, as a `.npy` or the only member of a `.npz`."""
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
    if path.suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_array_that_promises_more_than_it_holds_is_not_made(suffix, tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000), }"
    assert peak_of(load_data, write_header(tmp_path / f"rows{suffix}", header)) < 10e6


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("kind", ["'<f8,('", "'9),f8'", "'<f9'", "[('a',)]", "{}", "-1", "'<f8', 'more': 1"])
def test_an_array_of_an_unreadable_type_is_refused(kind, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    write_header(path, f"{{'descr': {kind}, 'fortran_order': False, 'shape': (2, 4), }}".encode())
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_data(path)


def test_an_archive_of_many_zeros_is_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "rows.npz", x=np.zeros((10_000, 1000)))
    assert peak_of(load_data, tmp_path / "rows.npz") < 10e6


def test_arrays_in_either_order_are_read_as_they_are(tmp_path):
    rows = np.arange(12.0).reshape(3, 4)
    for i, array in enumerate((rows, np.asfortranarray(rows), rows.astype(">f4"), rows.astype(np.int16))):
        np.save(tmp_path / f"{i}.npy", array)
        assert np.array_equal(load_data(tmp_path / f"{i}.npy", test_size=0).train.numpy(), rows)
