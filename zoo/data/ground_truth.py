r"""Data sets with known sources and a known mixing.

.. math:: s_{nk} \sim p \text{ independent}, \quad x_n = f(s_n) + \sigma \epsilon_n
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from inference.core.checks import check_count
from inference.core.files import Unreadable, reading
from inference.core.seeding import random_state
from inference.core.storage import load_tree, save_tree
from zoo.data.datasets import Dataset
from zoo.mixings.base import Composition, LinearMixing, Mixing, describe, from_description

_TENSORS = ("train", "test", "train_log_det", "test_log_det", "truth")


@dataclass(frozen=True, eq=False, repr=False)
class MixedDataset(Dataset):
    """A :class:`zoo.Dataset` with its ground-truth mixing.

    Attributes:
        mixing: f, in float64 whatever the dtype of the data; `truth` holds the sources `z` (N, K) and `z_test` (M, K)
            and the noise's `sigma` (), all in the units of the data.
    """

    mixing: Mixing | None = None


def mixed(
    mixing: Mixing,
    *,
    sources: Distribution,
    num: int,
    noise: float = 0.0,
    test_size: int = 0,
    standardise: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> MixedDataset:
    r"""Draw independent sources and mix them.

    .. math:: x_n = f(s_n) + \sigma \epsilon_n

    Args:
        mixing: f.
        sources: Distribution of one source, batch (), event (), of which K are drawn, or of all, event (K,).
        num: Rows, those of the test set included.
        noise: sigma, the standard deviation of Gaussian noise; zero for none.
        test_size: The last rows, held out.
        standardise: Centre the data and divide them by one number, the training set's root mean square deviation. The
            mixing and sigma follow, so that the truth stays exact; the IMA contrast does not change.
        seed: Of sources and noise.
        dtype: Of the result; the data are drawn and mixed in float64.

    Returns:
        A `MixedDataset`.

    Raises:
        ValueError: If a number is out of range, the distribution has another shape, or the mixing's inverse does not
            lead back to the sources, which are then outside the domain where it is injective.

    Example:
        >>> from torch.distributions import Uniform
        >>> from zoo import moebius
        >>> data = mixed(moebius(3), sources=Uniform(-0.5, 0.5), num=100)
        >>> bool(torch.allclose(data.mixing(data.truth["z"]), data.train))
        True
    """
    check_count(num, "num", 2)
    check_count(test_size, "test_size", 0)
    if test_size >= num or not 0 <= noise < math.inf:
        raise ValueError(f"expected test_size below num and noise >= 0, got {test_size}, {num} and {noise}")
    with random_state(seed), torch.no_grad():
        s = _draw(sources, num, mixing.latent_dim)
        x = _mix(mixing, s)
        x = x + noise * torch.randn_like(x) if noise else x
    n = num - test_size
    if standardise:
        mean = x[:n].mean(0)
        scale = (x[:n] - mean).square().mean().sqrt()
        x, noise = (x - mean) / scale, noise / float(scale)
        mixing = _rescaled(mixing, mean, scale)
    truth = {"z": s[:n], "z_test": s[n:], "sigma": torch.tensor(noise, dtype=torch.float64)}
    truth = {name: value.to(dtype) for name, value in truth.items()}
    x, zeros = x.to(dtype), x.new_zeros(num, dtype=dtype)
    return MixedDataset("mixed", x[:n], x[n:], zeros[:n], zeros[n:], truth=truth, mixing=mixing)


def save_mixed(path: str | os.PathLike[str], data: MixedDataset) -> None:
    """Write a data set with its truth, the mixing included, to one file.

    Args:
        path: File to replace.
        data: From :func:`mixed`.

    Raises:
        ValueError: If the data set has no mixing.
        OSError: If the file cannot be written.
    """
    if data.mixing is None:
        raise ValueError("expected a data set with its mixing, got mixing=None")
    tree = {name: getattr(data, name) for name in _TENSORS}
    save_tree(path, {"name": data.name, "mixing": describe(data.mixing), **tree})


def load_mixed(path: str | os.PathLike[str]) -> MixedDataset:
    """Read what :func:`save_mixed` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or not of this kind.
    """
    kind = "a data set written by save_mixed"
    tree = load_tree(path, kind)
    names = {field.name for field in fields(MixedDataset)}
    with reading(path, kind):
        if not isinstance(tree, dict) or not {"mixing", *_TENSORS} <= set(tree) <= names:
            raise Unreadable("has other content")
        if not all(isinstance(tensor, Tensor) for name in _TENSORS for tensor in _leaves(tree[name])):
            raise Unreadable("has other content than tensors")
        return MixedDataset(**tree | {"mixing": from_description(tree["mixing"])})


def _leaves(entry: Any) -> list[Any]:
    return list(entry.values()) if isinstance(entry, dict) else [entry]


def _draw(sources: Distribution, num: int, latent_dim: int) -> Tensor:
    shape = sources.batch_shape + sources.event_shape
    if shape == (latent_dim,):
        draws = sources.sample((num,))
    elif shape == ():
        draws = sources.sample((num, latent_dim))
    else:
        raise ValueError(
            f"expected a distribution of one source, or of {latent_dim} with event ({latent_dim},), got {shape}"
        )
    return draws.double()


def _mix(mixing: Mixing, s: Tensor) -> Tensor:
    x = mixing(s)
    error = (mixing.inverse(x) - s).abs().amax()
    if not float(error) < 1e-6 * (1 + float(s.abs().amax())):
        raise ValueError(f"expected sources where the mixing is injective, got a round trip off by {float(error):.2g}")
    return x


def _rescaled(mixing: Mixing, mean: Tensor, scale: Tensor) -> Composition:
    eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    return Composition([mixing, LinearMixing(eye / scale, -mean / scale)])
