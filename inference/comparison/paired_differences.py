"""Paired differences and bits per dimension of a comparison of guides, and its file."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
import xarray as xr
from scipy.stats import norm
from torch import Tensor

from inference.core.storage import atomic_path
from inference.numerics.multiple_testing import holm


def differences(tree: xr.DataTree, reference: str | None = None, *, quantity: str = "elbo") -> xr.Dataset:
    """Paired differences of a quantity's data mean to that of one guide.

    Args:
        tree: What :func:`compare` returned.
        reference: Guide to compare with; the first by default.
        quantity: Any variable per guide and data point.

    Returns:
        ``difference`` and ``standard_error`` in nats per data point, over split, seed and guide. The error is that of
        the mean of paired differences over the data, which holds the Monte Carlo error, too. ``p_value`` is that of a
        difference of zero, two-sided and by the normal distribution of means, adjusted by Holm for the number of
        further guides.

    Raises:
        ValueError: If there is no such guide or quantity.
    """
    splits = []
    for group in tree.children.values():
        dataset = group.to_dataset()
        names = [str(name) for name in dataset["guide"].values]
        reference = names[0] if reference is None else reference
        if reference not in names:
            raise ValueError(f"expected reference to be one of {names}, got {reference!r}")
        if quantity not in dataset or dataset[quantity].dims != ("seed", "guide", "datum"):
            raise ValueError(f"expected a quantity per guide and data point, got {quantity!r}")
        paired = dataset[quantity] - dataset[quantity].sel(guide=reference, drop=True)
        error = (
            paired.std("datum", ddof=1) / math.sqrt(paired.sizes["datum"])
            if paired.sizes["datum"] > 1
            else paired.mean("datum") * math.nan
        )
        result = xr.Dataset({"difference": paired.mean("datum"), "standard_error": error})
        splits.append(result.assign(p_value=_p_values(result, reference)))
    return xr.concat(splits, xr.Variable("split", list(tree.children)))


def _p_values(result: xr.Dataset, reference: str) -> xr.DataArray:
    """Two-sided p-values of the differences, adjusted by Holm over the guides of each seed; NaN at the reference."""
    z = (result["difference"] / result["standard_error"]).transpose("seed", "guide")
    adjusted = np.full(z.shape, math.nan)
    others = (result["guide"] != reference).values
    for row, values in zip(adjusted, 2 * norm.sf(np.abs(z.values[:, others])), strict=True):
        row[others] = holm(torch.from_numpy(values)).numpy()
    return xr.DataArray(adjusted, z.coords, z.dims)


def bits_per_dim(dataset: xr.Dataset, data_dim: int) -> xr.DataArray:
    """Bits per dimension of the original data by seed and guide: -(log p + log-determinant) / (D log 2)."""
    total = dataset["mean_evidence"] + dataset["log_det"].mean()
    return -total / (data_dim * math.log(2))


def save_comparison(tree: xr.DataTree, path: str | os.PathLike[str]) -> None:
    """Write a comparison to a netCDF file, atomically; :func:`load_comparison` reads it.

    Args:
        tree: What :func:`compare` returned.
        path: File to replace; its suffix is usually ``.nc``.
    """
    with atomic_path(path) as temporary:
        tree.to_netcdf(temporary, engine="h5netcdf")


def load_comparison(path: str | os.PathLike[str]) -> xr.DataTree:
    """Read a comparison from a netCDF file into memory.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"expected a comparison at {os.fspath(path)}, found no file")
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()


def principal_map(x: Tensor) -> Tensor:
    """Coordinates of data along their first two principal axes, (N, 2) float64, zero-padded where D is one."""
    flat = x.reshape(len(x), -1).double()
    centred = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(centred.mT @ centred)
    axes = vectors.flip(-1)[:, :2]
    return torch.nn.functional.pad(centred @ axes, (0, 2 - axes.shape[1]))
