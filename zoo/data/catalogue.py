"""Data sets by name, as a command line gives them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributions import Uniform

from zoo.data.datasets import Dataset, digits, digits_logit, fashion_mnist, linear_gaussian, load_data, mnist
from zoo.data.ground_truth import mixed
from zoo.data.preprocessing import Scaled
from zoo.mixings import moebius

_MADE: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "digits-scaled": lambda: digits(transform=Scaled(16.0)),
    "digits-logit": digits_logit,
    "synthetic": lambda: linear_gaussian(2000, 20, 8, test_size=500),
    "moebius": lambda: mixed(
        moebius(2, minimum=0.7), sources=Uniform(-0.5, 0.5), num=5000, test_size=1000, standardise=True
    ),
}
_IMAGES: dict[str, Callable[..., Dataset]] = {"mnist": mnist, "fashion-mnist": fashion_mnist}


def dataset_names() -> tuple[str, ...]:
    """The names that :func:`named_dataset` accepts."""
    return (*_MADE, *_IMAGES)


def named_dataset(name: str | os.PathLike[str], *, test_size: float = 0.2) -> Dataset:
    """A data set in float64 by its name, or from a file.

    Args:
        name: One of :func:`dataset_names`, images with ``=PATH`` for a local copy (``"mnist=mnist.npz"``); or the path
            of a .npy, .npz or .csv file.
        test_size: The share of a file's rows that is held out, unless it brings test rows of its own.

    Raises:
        FileNotFoundError: If it is neither a name nor a file.
        TypeError: If it is neither text nor a path.
        ValueError: If the file is damaged or of another format, see :func:`zoo.load_data`.

    Example:
        >>> named_dataset("synthetic").data_dim
        20
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"expected the name of a data set or a path, got {type(name).__name__}")
    name = os.fspath(name)
    if name in _MADE:
        return _MADE[name]()
    kind, _, path = name.partition("=")
    if kind in _IMAGES:
        return _IMAGES[kind](path or None, dtype=torch.float64)
    if not Path(name).suffix and not Path(name).exists():
        raise FileNotFoundError(f"expected a data set, one of {', '.join(dataset_names())}, or a file, got {name!r}")
    data = load_data(name)
    return data if len(data.test) else load_data(name, test_size=test_size)
