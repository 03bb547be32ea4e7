"""A comparison as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from inference.comparison.paired_differences import bits_per_dim, differences, models_of, splits_of
from inference.core.estimates import normal_quantile

if TYPE_CHECKING:
    import xarray as xr

# Above this k-hat an importance-weighted estimate is not reliable (Vehtari et al. 2015).
_HEAVY = 0.7


def table(tree: xr.DataTree) -> str:
    """The comparison as text: one line per guide, training and held-out columns side by side, nats per data point.

    With several seeds each cell is their mean, with the standard deviation over them; else the gap carries the Monte
    Carlo standard error. Where log p has a lower end alone, what depends on it is printed as the bound that it is.
    Below come the paired differences to the first guide of each model.

    Args:
        tree: What :func:`compare` returned.

    Raises:
        TypeError: If ``tree`` is not a whole comparison.
    """
    splits = splits_of(tree)
    guides = [str(name) for name in next(iter(splits.values()))["guide"].values]
    data_dim, width = int(tree.attrs["data_dim"]), normal_quantile(float(tree.attrs["level"]))
    blocks = [
        _block(guides, {split: _gap_cells(dataset, width) for split, dataset in splits.items()}),
        _block(guides, {split: _weight_cells(dataset, width, data_dim) for split, dataset in splits.items()}),
    ]
    lines = [*blocks[0], "", *blocks[1]]
    parts = {split: _part_cells(dataset) for split, dataset in splits.items()}
    if any(parts.values()):
        lines += ["", *_block(guides, parts)]
    lines += [*_difference_lines(tree, splits), "", *_notes(tree, splits)]
    return "\n".join(lines)


def _block(guides: Sequence[str], cells: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """A table under two lines of headings: the split, then the quantity."""
    columns = [["", "guide", *guides]]
    for split, by_head in cells.items():
        heads = list(by_head)
        columns += [[split if head == heads[0] else "", head, *by_head[head]] for head in heads]
    return _align(columns)


def _gap_cells(dataset: xr.Dataset, width: float) -> dict[str, list[str]]:
    return {
        "ELBO": _cells(dataset["elbo"].mean("datum")),
        "log p": _bracket(dataset),
        "gap": _below_evidence(dataset, "elbo", width, dataset["mean_evidence_se"]),
    }


def _weight_cells(dataset: xr.Dataset, width: float, data_dim: int) -> dict[str, list[str]]:
    heavy = (dataset["pareto_k"] > _HEAVY).mean("datum") * 100
    cells = {
        "IWAE": _cells(dataset["iwae"].mean("datum")),
        "log p - IWAE": _below_evidence(dataset, "iwae", width),
        "ESS": [f"{v:.0f}" for v in dataset["ess"].mean(("datum", "seed")).values],
        f"k>{_HEAVY}": [f"{v:.1f}%" for v in heavy.mean("seed").values],
        "bits/dim": _bits(dataset, data_dim),
    }
    # Where log p is estimated by this very IWAE, their difference is zero and says nothing.
    same = (dataset["evidence"] == dataset["iwae"]).all(("seed", "datum")).values
    cells["log p - IWAE"] = ["" if s else cell for s, cell in zip(same, cells["log p - IWAE"], strict=True)]
    return {head: column for head, column in cells.items() if any(column)}


def least_below_evidence(dataset: xr.Dataset, name: str, width: float) -> xr.DataArray:
    """How far the mean of a bound lies below the lower end of the mean evidence, at least; never negative.

    Args:
        dataset: One split of a comparison.
        name: Of the bound, ``elbo`` or ``iwae``.
        width: Half-width of an interval in standard errors.
    """
    error = error_of_mean(dataset, name)
    return (dataset["mean_evidence_lower"] - dataset[name].mean("datum") - width * error).clip(min=0.0)


def error_of_mean(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Monte Carlo standard error of the mean of a bound over the data."""
    return (dataset[f"{name}_se"] ** 2).sum("datum") ** 0.5 / dataset.sizes["datum"]


def _below_evidence(dataset: xr.Dataset, name: str, width: float, other: xr.DataArray | float = 0.0) -> list[str]:
    """How far the mean of a bound lies below the evidence: at least so far where that has a lower end alone."""
    mean, error = dataset[name].mean("datum"), error_of_mean(dataset, name)
    least = least_below_evidence(dataset, name, width).mean("seed").values
    cells = _cells(dataset["mean_evidence"] - mean, (error**2 + other**2) ** 0.5)
    return [f">= {_number(v)}" if o else cell for o, v, cell in zip(_open(dataset), least, cells, strict=True)]


def _bits(dataset: xr.Dataset, data_dim: int) -> list[str]:
    """Bits per dimension: at most so many where log p has a lower end alone."""
    most = bits_per_dim(dataset.assign(mean_evidence=dataset["mean_evidence_lower"]), data_dim).mean("seed").values
    values = bits_per_dim(dataset, data_dim).mean("seed").values
    return [f"<= {m:.4f}" if o else f"{v:.4f}" for o, m, v in zip(_open(dataset), most, values, strict=True)]


def _open(dataset: xr.Dataset) -> list[bool]:
    """Of which guides nothing bounds the mean evidence from above, at some seed."""
    return [bool(o) for o in (dataset["mean_evidence_upper"] == math.inf).any("seed").values]


def _part_cells(dataset: xr.Dataset) -> dict[str, list[str]]:
    """Approximation and amortisation of the rows that were split, coverage, and cost; nothing where all are missing."""
    rows = dataset["approximation"].notnull().any(("seed", "guide"))
    cells: dict[str, list[str]] = {}
    if bool(rows.any()):
        chosen = dataset.isel(datum=np.flatnonzero(rows.values))
        for head in ("approximation", "amortisation"):
            cells[head] = _cells(chosen[head].mean("datum", skipna=False))
        # Where nothing bounds the evidence from above, nothing bounds what the family leaves.
        open_ends = np.isinf(chosen["evidence_upper"]).any(("seed", "datum")).values
        cells["approximation"] = [
            f">= {cell}" if open_end and cell != "unknown" else cell
            for cell, open_end in zip(cells["approximation"], open_ends, strict=True)
        ]
    if bool(dataset["coverage"].notnull().any()):
        cells["cover 90%"] = [f"{100 * v:.1f}%" for v in dataset["coverage"].mean("seed").values]
    if cells:
        cells["ms"] = [f"{1000 * v:.1f}" for v in dataset["seconds"].mean("seed").values]
        cells["MB"] = [f"{v / 1e6:.1f}" for v in dataset["memory"].mean("seed").values]
    return cells


def _cells(value: xr.DataArray, error: xr.DataArray | None = None) -> list[str]:
    """One number per guide, with its standard deviation over seeds where there are several, else with its own error."""
    means = value.mean("seed").values
    if value.sizes["seed"] > 1:
        spread = value.std("seed", ddof=1).values
    elif error is not None:
        spread = error.isel(seed=0).values
    else:
        return [_number(v) for v in means]
    return [f"{_number(v)} ±{e:.4f}" for v, e in zip(means, spread, strict=True)]


def _number(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    text = f"{value:.4f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no minus zero


def _bracket(dataset: xr.Dataset) -> list[str]:
    cells = []
    means = dataset.mean("seed")
    for i, value in enumerate(means["mean_evidence"].values):
        lower, upper = (float(means[f"mean_evidence_{end}"].values[i]) for end in ("lower", "upper"))
        if lower == upper:
            cells.append(f"{value:.4f}")
        else:
            cells.append(f"{value:.4f} [{lower:.4f}, {'inf' if math.isinf(upper) else f'{upper:.4f}'}]")
    return cells


def _align(columns: Iterable[Sequence[str]]) -> list[str]:
    columns = list(columns)
    widths = [max(len(cell) for cell in column) for column in columns]
    rows = []
    for row in zip(*columns, strict=True):
        first, rest = row[0].ljust(widths[0]), [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]
        rows.append("  ".join([first, *rest]).rstrip())
    return rows


def _notes(tree: xr.DataTree, splits: Mapping[str, xr.Dataset]) -> list[str]:
    sizes = ", ".join(f"{name} {dataset.sizes['datum']}" for name, dataset in splits.items())
    first = next(iter(splits.values()))
    num_seeds, samples = first.sizes["seed"], tree.attrs["num_samples"]
    spread = f"the standard deviation over {num_seeds} seeds" if num_seeds > 1 else "the Monte Carlo standard error"
    methods = ", ".join(sorted({str(m) for dataset in splits.values() for m in dataset["method"].values.ravel()}))
    lines = [
        f"Nats per data point, means over the data ({sizes}); ± is {spread}.",
        f"log p: {methods}; gap = log p - ELBO; IWAE and ESS of {samples} samples;",
        f"k>{_HEAVY}: share of data whose importance weights are not to be trusted.",
    ]
    if any(any(_open(dataset)) for dataset in splits.values()):
        level = float(tree.attrs["level"])
        lines.append(f">=, <=: nothing bounds log p from above; these are bounds from its lower end at {level:.0%}.")
        if methods.startswith("importance"):
            lines.append('compare(..., method="auto") adapts to each data point and bounds most from both sides.')
    for split, dataset in splits.items():
        wrong = int(dataset["contradicted"].any(("seed", "guide")).sum()) if "contradicted" in dataset else 0
        if wrong:
            lines.append(f"{split}: a guide's bound contradicts the upper end of log p of {wrong} data points.")
    if any(bool(dataset["approximation"].notnull().any()) for dataset in splits.values()):
        lines.append(
            "approximation, amortisation: by the best guide that a refit found; a better one moves nats from the"
        )
        lines.append(
            "first to the second, whose number is a lower bound, and >= in the first holds for the best one only."
        )
    return lines + [line for split, dataset in splits.items() for line in _bounded_lines(split, dataset)]


def _bounded_lines(split: str, dataset: xr.Dataset) -> list[str]:
    """The mean evidence over the data points that have an upper end, of each model where only some have."""
    lines, num_data = [], dataset.sizes["datum"]
    for names in models_of(dataset):
        one = dataset.sel(guide=names[0]).isel(seed=0)
        count = int(one["num_bounded"])
        if 0 < count < num_data:
            value, lower, upper = (float(one[f"bounded_evidence{end}"]) for end in ("", "_lower", "_upper"))
            mean = f"{value:.4f} [{lower:.4f}, {upper:.4f}]"
            lines.append(f"{split}, {', '.join(names)}: {count} of {num_data} log p have an upper end, mean {mean}.")
    return lines


def _difference_lines(tree: xr.DataTree, splits: Mapping[str, xr.Dataset]) -> list[str]:
    """ELBO differences of the guides of each model; those of different models bound different numbers."""
    result, lines = differences(tree), list[str]()
    for names in models_of(next(iter(splits.values()))):
        if len(names) < 2:
            continue
        columns = [["", "guide", *names[1:]]]
        for split in splits:
            chosen = result.sel(split=split, guide=names[1:])
            columns.append([split, "difference", *_cells(chosen["difference"], chosen["standard_error"])])
        title = f"ELBO minus that of {names[0]!r}, paired per data point, ± the standard error over the data"
        lines += ["", title, *_align(columns)]
    return lines
