"""A comparison as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xarray as xr

from inference.comparison.paired_differences import bits_per_dim, differences

# Above this k-hat an importance-weighted estimate is not reliable (Vehtari et al. 2015).
_HEAVY = 0.7


def table(tree: xr.DataTree) -> str:
    """The comparison as text: one line per guide, training and held-out columns side by side, nats per data point.

    With several seeds each cell is their mean, with the standard deviation over them; else the gap carries the Monte
    Carlo standard error. Below come the paired differences to the first guide.

    Args:
        tree: What :func:`compare` returned.
    """
    splits = {str(name): group.to_dataset() for name, group in tree.children.items()}
    guides = [str(name) for name in next(iter(splits.values()))["guide"].values]
    data_dim = int(tree.attrs["data_dim"])
    blocks = [
        _block(guides, {split: _gap_cells(dataset) for split, dataset in splits.items()}),
        _block(guides, {split: _weight_cells(dataset, data_dim) for split, dataset in splits.items()}),
    ]
    lines = [*blocks[0], "", *blocks[1]]
    parts = {split: _part_cells(dataset) for split, dataset in splits.items()}
    if any(parts.values()):
        lines += ["", *_block(guides, parts)]
    lines += [*_difference_lines(tree, guides), "", *_notes(tree, splits)]
    return "\n".join(lines)


def _block(guides: Sequence[str], cells: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """A table under two lines of headings: the split, then the quantity."""
    columns = [["", "guide", *guides]]
    for split, by_head in cells.items():
        heads = list(by_head)
        columns += [[split if head == heads[0] else "", head, *by_head[head]] for head in heads]
    return _align(columns)


def _gap_cells(dataset: xr.Dataset) -> dict[str, list[str]]:
    error = np.sqrt((dataset["elbo_se"] ** 2).sum("datum")) / dataset.sizes["datum"]
    gap = dataset["mean_evidence"] - dataset["elbo"].mean("datum")
    return {
        "ELBO": _cells(dataset["elbo"].mean("datum")),
        "log p": _bracket(dataset),
        "gap": _cells(gap, np.hypot(error, dataset["mean_evidence_se"])),
    }


def _weight_cells(dataset: xr.Dataset, data_dim: int) -> dict[str, list[str]]:
    error = np.sqrt((dataset["iwae_se"] ** 2).sum("datum")) / dataset.sizes["datum"]
    gap = dataset["mean_evidence"] - dataset["iwae"].mean("datum")
    heavy = (dataset["pareto_k"] > _HEAVY).mean("datum") * 100
    return {
        "IWAE": _cells(dataset["iwae"].mean("datum")),
        "log p - IWAE": _cells(gap, error),
        "ESS": [f"{v:.0f}" for v in dataset["ess"].mean(("datum", "seed")).values],
        f"k>{_HEAVY}": [f"{v:.1f}%" for v in heavy.mean("seed").values],
        "bits/dim": [f"{v:.4f}" for v in bits_per_dim(dataset, data_dim).mean("seed").values],
    }


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
    methods = ", ".join(sorted({str(m) for m in first["method"].values.ravel()}))
    return [
        f"Nats per data point, means over the data ({sizes}); ± is {spread}.",
        f"log p: {methods}; gap = log p - ELBO; IWAE and ESS of {samples} samples;",
        f"k>{_HEAVY}: share of data whose importance weights are not to be trusted.",
    ]


def _difference_lines(tree: xr.DataTree, guides: Sequence[str]) -> list[str]:
    if len(guides) < 2:
        return []
    result = differences(tree)
    columns = [["", "guide", *guides[1:]]]
    for split in result["split"].values:
        chosen = result.sel(split=split, guide=list(guides[1:]))
        columns.append([str(split), "difference", *_cells(chosen["difference"], chosen["standard_error"])])
    return [
        "",
        f"ELBO minus that of {guides[0]!r}, paired per data point, ± the standard error over the data",
        *_align(columns),
    ]
