"""Paired differences and bits per dimension of a comparison of guides, and its file."""

from __future__ import annotations

import io
import math
import os
from typing import TYPE_CHECKING

import numpy as np
import scipy
import torch

from inference.core.files import atomic_path, check_seal, reading, seal
from inference.numerics.multiple_testing import holm

if TYPE_CHECKING:
    import xarray as xr

# Rounding of the difference of two values, in units of the data's dtype and of their size.
_ROUNDING = 256


def splits_of(tree: xr.DataTree) -> dict[str, xr.Dataset]:
    """The data sets of a comparison by name.

    Raises:
        TypeError: If it is not a whole comparison.
    """
    import xarray as xr

    if not isinstance(tree, xr.DataTree) or not tree.children or "data_dim" not in tree.attrs:
        raise TypeError(
            "expected the whole tree that compare returned, whose groups are the data sets (tree, not tree['train']), "
            f"got {type(tree).__name__} with groups {list(getattr(tree, 'children', ()))}"
        )
    return {str(name): group.to_dataset() for name, group in tree.children.items()}


def models_of(dataset: xr.Dataset) -> list[list[str]]:
    """Names of the guides, grouped by model: guides of one model share its evidence."""
    groups: list[list[str]] = []
    for name in map(str, dataset["guide"].values):
        own = dataset["evidence"].sel(guide=name).values
        same = (g for g in groups if np.array_equal(dataset["evidence"].sel(guide=g[0]).values, own, equal_nan=True))
        group = next(same, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def differences(tree: xr.DataTree, reference: str | None = None, *, quantity: str = "elbo") -> xr.Dataset:
    """Paired differences of a quantity's data mean to that of one guide of the same model.

    Args:
        tree: What :func:`compare` returned.
        reference: Guide to compare with; by default the first of each model.
        quantity: Any variable per guide and data point.

    Returns:
        ``difference`` and ``standard_error`` in nats per data point, over split, seed and guide; NaN for guides of
        another model than the reference's, whose ELBOs are bounds of something else. The error is that of the mean of
        paired differences over the data points that have the quantity, which holds the Monte Carlo error, too.
        ``p_value`` is that of a difference of zero, two-sided and by Student's distribution of means, adjusted by Holm
        for the number of differences that can be tested; NaN where there is none beyond rounding.

    Raises:
        TypeError: If ``tree`` is not a whole comparison.
        ValueError: If there is no such guide or quantity.
    """
    import xarray as xr

    splits = splits_of(tree)
    results = [_differences(dataset, reference, quantity) for dataset in splits.values()]
    return xr.concat(results, xr.Variable("split", list(splits)))


def _differences(dataset: xr.Dataset, reference: str | None, quantity: str) -> xr.Dataset:
    """Differences of one data set."""
    import xarray as xr

    names = [str(name) for name in dataset["guide"].values]
    if reference is not None and reference not in names:
        raise ValueError(f"expected reference to be one of {names}, got {reference!r}")
    if quantity not in dataset or dataset[quantity].dims != ("seed", "guide", "datum"):
        raise ValueError(f"expected a quantity per guide and data point, got {quantity!r}")
    values = dataset[quantity]
    paired = xr.full_like(values, math.nan)
    for group in models_of(dataset):
        first = group[0] if reference is None else reference
        if first in group:
            paired.loc[{"guide": group}] = values.sel(guide=group) - values.sel(guide=first, drop=True)
    count = paired.notnull().sum("datum")
    error = paired.std("datum", ddof=1).where(count > 1) / np.sqrt(count)
    result = xr.Dataset({"difference": paired.mean("datum"), "standard_error": error})
    epsilon = torch.finfo(getattr(torch, dataset.attrs["dtype"])).eps
    rounding = _ROUNDING * epsilon * abs(values).mean("datum")
    return result.assign(p_value=_p_values(result, count, rounding))


def _p_values(result: xr.Dataset, count: xr.DataArray, rounding: xr.DataArray) -> xr.DataArray:
    """Two-sided p-values of the differences, adjusted by Holm over the guides of each seed; NaN where undefined."""
    import xarray as xr

    difference, error = np.abs(result["difference"]), result["standard_error"]
    tested = (difference > rounding) | (error > rounding)
    statistic = difference / np.maximum(error, rounding)
    raw = xr.apply_ufunc(lambda t, n: 2 * scipy.stats.t.sf(t, np.maximum(n - 1, 1)), statistic, count).where(tested)
    raw = raw.transpose("seed", "guide")
    for row in raw.values:
        defined = ~np.isnan(row)
        row[defined] = holm(torch.from_numpy(row[defined])).numpy()
    return raw


def bits_per_dim(dataset: xr.Dataset, data_dim: int) -> xr.DataArray:
    """Bits per dimension of the original data by seed and guide: -(log p + log-determinant) / (D log 2)."""
    total = dataset["mean_evidence"] + dataset["log_det"].mean()
    return -total / (data_dim * math.log(2))


def save_comparison(tree: xr.DataTree, path: str | os.PathLike[str]) -> None:
    """Write a comparison to a netCDF file, atomically; :func:`load_comparison` reads it.

    Args:
        tree: What :func:`compare` returned.
        path: File to replace; its suffix is usually ``.nc``.

    Raises:
        TypeError: If ``tree`` is not a whole comparison.
        OSError: If the file cannot be written.
    """
    splits_of(tree)
    with atomic_path(path) as temporary:
        tree.to_netcdf(temporary, engine="h5netcdf")
        seal(temporary)


def load_comparison(path: str | os.PathLike[str]) -> xr.DataTree:
    """Read a comparison from a netCDF file into memory.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another kind or of an older version, with its name.
    """
    import xarray as xr

    with reading(path, "a comparison"):
        content = check_seal(path)
        with xr.open_datatree(io.BytesIO(content), engine="h5netcdf") as file:
            tree = file.load()
        splits_of(tree)
        return tree
