"""Results as pandas data frames, for notebooks, LaTeX and Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from inference.comparison.paired_differences import bits_per_dim, splits_of
from inference.core.display import data_frame
from inference.core.estimates import normal_quantile

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_MEANS = ("elbo", "iwae", "ess", "approximation", "amortisation")
_ONE_A_GUIDE = ("coverage", "seconds", "memory", "method")


def frame(result: Any) -> pd.DataFrame:
    """A result as a pandas data frame: ``frame(result).to_latex()``, ``.to_markdown()``, ``.to_csv(path)``.

    Args:
        result: What :func:`compare` returned gives a row for each split, guide and, if there are several, seed: means
            over the data in nats, with ``_se`` for standard errors and ``_lower``, ``_upper`` for the ends of intervals
            at the comparison's level; an end that nothing bounds is infinite. A dataset gives all of its variables.
            A result per data point (``Evidence``, ``Gap``, ``Estimate``, ``Refit`` ...) gives a row for each data
            point, a training ``History`` one for each step, one of single numbers (``Interval``, ``C2ST``, ``Card``)
            one row, and a list of such one each. Weights (S, N) give a column for each data point.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> import torch
        >>> from zoo import PPCA
        >>> frame(PPCA(5, 2).double().log_evidence(torch.zeros(4, 5).double())).shape
        (4, 1)
    """
    import pandas as pd
    import xarray as xr

    if isinstance(result, xr.DataTree):
        return _of_comparison(result)
    if isinstance(result, xr.Dataset):
        return result.to_dataframe()
    if isinstance(result, Tensor):
        return pd.DataFrame(result.detach().cpu().numpy())
    return data_frame(result)


def _of_comparison(tree: xr.DataTree) -> pd.DataFrame:
    import pandas as pd

    data_dim, width = int(tree.attrs["data_dim"]), normal_quantile(float(tree.attrs["level"]))
    parts = {split: _means(dataset, width, data_dim).to_dataframe() for split, dataset in splits_of(tree).items()}
    whole = pd.concat(parts, names=["split"]).reorder_levels(["split", "guide", "seed"]).dropna(axis=1, how="all")
    return whole if len(whole.index.unique("seed")) > 1 else whole.droplevel("seed")


def _means(dataset: xr.Dataset, width: float, data_dim: int) -> xr.Dataset:
    """Means over the data by seed and guide, and the ends of the gap's interval."""
    import xarray as xr

    means = xr.Dataset({name: dataset[name].mean("datum", skipna=name in _MEANS[3:]) for name in _MEANS})
    for name in ("elbo", "iwae"):
        means[f"{name}_se"] = np.sqrt((dataset[f"{name}_se"] ** 2).sum("datum")) / dataset.sizes["datum"]
    for end in ("", "_lower", "_upper", "_se"):
        means[f"log_p{end}"] = dataset[f"mean_evidence{end}"]
    means["gap"] = means["log_p"] - means["elbo"]
    means["gap_lower"] = (means["log_p_lower"] - means["elbo"] - width * means["elbo_se"]).clip(min=0.0)
    means["gap_upper"] = means["log_p_upper"] - means["elbo"] + width * means["elbo_se"]
    means["heavy_tails"] = (dataset["pareto_k"] > 0.7).mean("datum")
    means["bits_per_dim"] = bits_per_dim(dataset, data_dim)
    return means.assign({name: dataset[name] for name in _ONE_A_GUIDE})
