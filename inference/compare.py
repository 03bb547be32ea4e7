"""One table for several guides: ELBO, importance-weighted bound, evidence, gap and k-hat, per datum and in the mean."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from inference.checks import check_arguments, check_count, check_finite
from inference.estimates import Evidence, check_level, concatenate
from inference.exact_evidence import Exact
from inference.importance import WeightSummary, iter_log_weights, merge, summarise
from inference.importance_evidence import from_weights
from inference.methods import Problem
from inference.pair import Program
from inference.protocols import SupportsLogEvidence
from inference.seeding import seeded
from inference.storage import atomic_path

Pairs = Mapping[str, tuple[Program, Program]]

# Rows measured together: what bounds the memory, whatever the size of the data set.
_BLOCK = 2048

TRAIN, HELD_OUT = "train", "held_out"


def compare(
    model: Program | None,
    guides: Mapping[str, Any],
    x: Tensor,
    *,
    held_out: Tensor | None = None,
    num_samples: int = 1000,
    log_det: Tensor | float | None = None,
    held_out_log_det: Tensor | float | None = None,
    seeds: Sequence[int] | None = None,
    chunk: int | None = None,
    plate: str | None = None,
    level: float = 0.95,
    seed: int | None = 0,
    progress: bool = True,
) -> xr.DataTree:
    """Measure how far the ELBO of each guide lies below the evidence of its model, per datum.

    Where the model has a closed form, that is the evidence. Elsewhere it is estimated from the importance weights of
    all guides of that model together.

    Args:
        model: Pyro model that the guides share; None where every entry of ``guides`` brings its own.
        guides: Name to guide, or name to (model, guide). With ``seeds``: name to a function that trains one from a
            seed and returns it.
        x: Training data, (N, D).
        held_out: Held-out data, (M, D).
        num_samples: Importance samples per datum.
        log_det: Log-determinant of the preprocessing of ``x``, (N,) or a number: bits per dimension are then those
            of the original data.
        held_out_log_det: Likewise of ``held_out``; both are given, or none.
        seeds: Training seeds, to show the spread over them.
        chunk: See :func:`inference.importance.iter_log_weights`.
        plate: See :func:`inference.importance.iter_log_weights`.
        level: Confidence level of the intervals.
        seed: Seed of the importance samples.
        progress: Show a progress bar.

    Returns:
        A tree with the groups ``train`` and, with held-out data, ``held_out``. Each holds per seed, guide and datum
        ``elbo``, ``iwae``, ``evidence`` (with ``_se``, ``_lower``, ``_upper``), ``gap``, ``pareto_k`` and ``ess``;
        per seed and guide ``mean_evidence`` with its own interval; per datum ``log_det`` and a two-dimensional
        ``map`` of the data. Nats throughout. :func:`inference.table` prints it, :func:`save_comparison` writes netCDF.

    Raises:
        TypeError: If data or guides are of the wrong type.
        ValueError: If there is no guide, or data or a pair are unfit.
    """
    check_count(num_samples, "num_samples", 2)
    check_level(level)
    data = {TRAIN: x} | ({} if held_out is None else {HELD_OUT: held_out})
    for part in data.values():
        check_arguments(() if model is None else (model,), (part,), {})
    if held_out is not None and isinstance(held_out, Tensor) and held_out.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"expected held_out of shape (M, {', '.join(map(str, x.shape[1:]))}), got {tuple(held_out.shape)}"
        )
    if held_out is not None and (log_det is None) != (held_out_log_det is None):
        raise ValueError("expected log_det and held_out_log_det both or neither, got one of them")
    offsets = {TRAIN: _offsets(log_det, x, "log_det")}
    if held_out is not None:
        offsets[HELD_OUT] = _offsets(held_out_log_det, held_out, "held_out_log_det")
    rows = _pairs(model, guides, None if seeds is None else list(seeds))
    for pair in (pair for by_name in rows.values() for pair in by_name.values()):
        for part in data.values():
            check_arguments(pair, (part,), {})
    groups: dict[str, xr.Dataset] = {}
    num_blocks = sum(-(-len(part) // _BLOCK) for part in data.values())
    total = sum(len(pairs) for pairs in rows.values()) * num_blocks
    with seeded(seed), tqdm(total=total, disable=not progress, desc="compare", unit="block") as bar:
        for split, part in data.items():
            by_seed = []
            for pairs in rows.values():
                options = {"num_samples": num_samples, "chunk": chunk, "plate": plate, "level": level, "bar": bar}
                blocks = [_measure(pairs, block, **options) for block in part.split(_BLOCK)]
                by_seed.append(_collect(pairs, blocks))
            groups[split] = _with_data(xr.concat(by_seed, xr.Variable("seed", list(rows))), part, offsets[split])
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "num_samples": num_samples,
        "level": level,
        "data_dim": math.prod(x.shape[1:]),
        "trained": int(seeds is not None),
    }
    return tree


def _pairs(model: Program | None, guides: Mapping[str, Any], seeds: list[int] | None) -> dict[int, Pairs]:
    """Pairs by seed and name, trained where there are seeds."""
    if not isinstance(guides, Mapping) or not guides:
        raise ValueError(f"expected guides as a mapping from names with at least one entry, got {guides!r}")
    if seeds is not None and not seeds:
        raise ValueError("expected at least one seed, got none")
    for name, entry in guides.items():
        if seeds is not None and (isinstance(entry, nn.Module) or not callable(entry)):
            raise TypeError(f"expected {name!r} to be a function of a seed, with seeds=, got {type(entry).__name__}")
    return {
        seed: {name: _as_pair(name, model, entry if seeds is None else entry(seed)) for name, entry in guides.items()}
        for seed in ([0] if seeds is None else seeds)
    }


def _as_pair(name: str, model: Program | None, entry: Any) -> tuple[Program, Program]:
    pair = entry if isinstance(entry, tuple) else (model, entry)
    if len(pair) != 2 or not all(callable(half) for half in pair):
        raise TypeError(f"expected {name!r} to be a guide beside a model, or (model, guide), got {entry!r}")
    return pair


Block = tuple[dict[str, dict[str, Tensor]], dict[int, Evidence]]


def _measure(
    pairs: Pairs,
    block: Tensor,
    *,
    num_samples: int,
    chunk: int | None,
    plate: str | None,
    level: float,
    bar: Any,
) -> Block:
    """Everything per datum of a block: columns by the guide's name, evidence by the model's identity."""
    weights = {}
    for name, (model, guide) in pairs.items():
        chunks = iter_log_weights(model, guide, block, num_samples=num_samples, chunk=chunk, plate=plate)
        weights[name] = summarise(chunks, num_samples)
        bar.update()
    truths: dict[int, Evidence] = {}
    for model, _ in pairs.values():
        if id(model) not in truths:
            shared = [weights[name] for name, (other, _) in pairs.items() if other is model]
            truths[id(model)] = _reference(model, shared, block, level)
    return {name: _per_datum(weights[name], truths[id(model)]) for name, (model, _) in pairs.items()}, truths


def _collect(pairs: Pairs, blocks: Sequence[Block]) -> xr.Dataset:
    """The blocks of one seed side by side, with the mean evidence over all of them."""
    truths = {key: concatenate([truth[key] for _, truth in blocks]) for key in blocks[0][1]}
    variables: dict[str, Any] = {}
    for key in next(iter(blocks[0][0].values())):
        rows = [torch.cat([columns[name][key] for columns, _ in blocks]).cpu() for name in pairs]
        variables[key] = (("guide", "datum"), torch.stack(rows).numpy())
    own = [truths[id(model)] for model, _ in pairs.values()]
    for i, end in enumerate(("", "_lower", "_upper", "_se")):
        variables[f"mean_evidence{end}"] = (("guide",), [truth.mean[i] for truth in own])
    variables["method"] = (("guide",), [truth.method for truth in own])
    num_data = len(own[0].value)
    return xr.Dataset(variables, {"guide": list(pairs), "datum": np.arange(num_data)})


def _reference(model: Program, weights: Sequence[WeightSummary], data: Tensor, level: float) -> Evidence:
    if isinstance(model, SupportsLogEvidence):
        return Exact().estimate(Problem(model, (data,)))
    pooled = weights[0]
    for other in weights[1:]:
        pooled = merge(pooled, other)
    return from_weights(pooled, level)


def _per_datum(weights: WeightSummary, truth: Evidence) -> dict[str, Tensor]:
    elbo, iwae = weights.elbo, weights.iwae
    return {
        "elbo": elbo.value,
        "elbo_se": elbo.standard_error,
        "iwae": iwae.value,
        "iwae_se": iwae.standard_error,
        "evidence": truth.value,
        "evidence_lower": truth.lower,
        "evidence_upper": truth.upper,
        "evidence_se": truth.standard_error,
        "gap": truth.value - elbo.value,
        "pareto_k": weights.pareto_k.value,
        "ess": weights.effective_sample_size.value,
    }


def _offsets(log_det: Tensor | float | None, data: Tensor, name: str) -> Tensor:
    """Log-determinants per datum, (N,)."""
    offsets = torch.as_tensor(0.0 if log_det is None else log_det, dtype=torch.float64).cpu()
    if offsets.shape not in ((), (len(data),)):
        raise ValueError(f"expected {name} as a number or of shape ({len(data)},), got {tuple(offsets.shape)}")
    check_finite(offsets.reshape(-1), name)
    return offsets.expand(len(data))


def _with_data(dataset: xr.Dataset, data: Tensor, offsets: Tensor) -> xr.Dataset:
    place = principal_map(data).cpu().numpy()
    return dataset.assign(log_det=(("datum",), offsets.numpy().copy()), map=(("datum", "axis"), place))


def principal_map(x: Tensor) -> Tensor:
    """Coordinates of data along their first two principal axes, (N, 2) float64, zero-padded where D is one."""
    flat = x.reshape(len(x), -1).double()
    centred = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(centred.mT @ centred)
    axes = vectors.flip(-1)[:, :2]
    return torch.nn.functional.pad(centred @ axes, (0, 2 - axes.shape[1]))


def differences(tree: xr.DataTree, reference: str | None = None, *, quantity: str = "elbo") -> xr.Dataset:
    """Differences of a quantity's data mean to that of one guide, paired per datum.

    Args:
        tree: What :func:`compare` returned.
        reference: Guide to compare with; the first by default.
        quantity: Any variable per guide and datum.

    Returns:
        ``difference`` and ``standard_error`` in nats per datum, over split, seed and guide. The error is that of
        the mean of paired differences over the data, which holds the Monte Carlo error, too.

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
            raise ValueError(f"expected a quantity per guide and datum, got {quantity!r}")
        paired = dataset[quantity] - dataset[quantity].sel(guide=reference, drop=True)
        error = (
            paired.std("datum", ddof=1) / math.sqrt(paired.sizes["datum"])
            if paired.sizes["datum"] > 1
            else paired.mean("datum") * math.nan
        )
        splits.append(xr.Dataset({"difference": paired.mean("datum"), "standard_error": error}))
    return xr.concat(splits, xr.Variable("split", list(tree.children)))


def bits_per_dim(dataset: xr.Dataset, data_dim: int) -> xr.DataArray:
    """Bits per dimension of the original data by seed and guide: -(log p + log-determinant) / (D log 2)."""
    total = dataset["mean_evidence"] + dataset["log_det"].mean()
    return -total / (data_dim * math.log(2))


def save_comparison(tree: xr.DataTree, path: str | os.PathLike[str]) -> None:
    """Write a comparison to a netCDF file, atomically; :func:`load_comparison` reads it.

    Args:
        tree: What :func:`compare` returned.
        path: File to replace, ``.nc`` by custom.
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
