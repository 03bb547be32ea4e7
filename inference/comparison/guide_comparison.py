"""One table for several guides: ELBO, IWAE bound, evidence, gap and k-hat, per data point and in the mean."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from inference.calibration.simulation import Simulation
from inference.calibration.simulation_based_calibration import coverage, sbc
from inference.calibration.simulator import simulate
from inference.comparison.pooled_weights import Pooled, pooled_weights
from inference.comparison.refitting import refit_columns
from inference.comparison.resources import Cost, cost
from inference.core.checks import check_count, check_finite
from inference.core.columns import FileColumns, columns_of
from inference.core.estimates import check_level, normal_quantile
from inference.core.memory import at_once
from inference.core.protocols import SupportsLocal, SupportsLogEvidence
from inference.core.ranks import ranks
from inference.core.seeding import random_state, seeded
from inference.core.sources import Column, opened
from inference.marginal_likelihood.analytic.exact import Exact
from inference.marginal_likelihood.base.checkpoint import Recognised, check_checkpoints, in_blocks
from inference.marginal_likelihood.base.intervals import confronted, joint_level, without_upper_end
from inference.marginal_likelihood.base.joined import Joined
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence, replace_rows, take_rows
from inference.marginal_likelihood.estimate import as_method
from inference.marginal_likelihood.importance.importance_sampling import density_of_guide
from inference.marginal_likelihood.importance.unvisited import Density, two_sided_where_visited
from inference.pair.call import Call, check_same_call
from inference.pair.rows import RowBlocks, RowsNotFollowed, with_known_rows
from inference.pair.run import Program
from inference.weights.summary import WeightSummary

if TYPE_CHECKING:
    import xarray as xr


class Entry(NamedTuple):
    """A pair that is compared: as it was given, and in float64, converted once. Both are called without data yet.

    The data of the second are converted where it is settled, or some of its rows are taken.
    """

    own: Call
    double: Call

    def on(self, data: Call) -> Entry:
        """The pair called with the arguments of another call."""
        own = replace(self.own, args=data.args, kwargs=data.kwargs)
        if self.double is self.own:
            return Entry(own, own)
        return Entry(own, replace(own, model=self.double.model, guide=self.double.guide, doubles=True))


Entries = Mapping[str, Entry]

# Rows measured together: a bound on memory, whatever the size of the data set.
_BLOCK = 2048

# Data points of a block at most on which modes are looked for that no guide visits.
_LOOKED_AT = 32

# Fewest simulations that a coverage is counted on, and rows on which simulation is tried before all else.
_SIMULATED = 100
_TRIED = 4
TRAIN, HELD_OUT = "train", "held_out"


def compare(
    model: Program | None,
    guides: Mapping[str, Any],
    x: Any,
    *args: Any,
    held_out: Any = None,
    num_samples: int = 1000,
    log_det: Tensor | float | None = None,
    held_out_log_det: Tensor | float | None = None,
    seeds: Sequence[int] | None = None,
    method: str | Method | None = None,
    split: int = 0,
    simulated: int = 0,
    chunk: int | None = None,
    block: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    level: float = 0.95,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> xr.DataTree:
    """Compare guides: how far the ELBO of each lies below the evidence of its model, per data point.

    Where the model has a closed form, that is the evidence. Elsewhere it is estimated by ``method``, or by importance
    sampling from the mixture of all guides of that model in equal shares (the balance heuristic), so that a bad guide
    beside a good one costs precision and nothing else. That takes no draws beyond those of the guides' own weights,
    which is affordable for thousands of data points. ``method="auto"`` does as :func:`inference.evidence`: it adapts to
    each data point, is tighter where all guides are poor, and takes at least ten times the draws. A guide whose density
    is known at its own draws alone is left out of the mixture, and ``method`` in the result names it. An interval is
    two-sided only where the guides visit the modes that a further look finds, on up to 32 data points of a block; if
    one of these has a mode that they miss, none of the block has an upper end.

    Warning:
        The standard error of an ELBO is that of a normal limit. It is too small where few draws carry most of the mean:
        where log p(x, z) falls so fast that draws of a wide guide meet its depths hardly ever, as exp(z) does.

    Args:
        model: Pyro model that the guides share; None where every entry of ``guides`` has its own.
        guides: Name to guide, or name to (model, guide). With ``seeds``: name to a function that trains one from a
            seed and returns it.
        x: Training data, (N, D): the first argument of models and guides; or a tuple of their positional arguments.
        *args: Further positional arguments of both.
        held_out: Held-out data, (M, D), or the tuple of positional arguments that hold them.
        num_samples: Importance samples per data point.
        log_det: Log-determinant of the preprocessing of ``x``, (N,) or a number: bits per dimension are then those
            of the original data.
        held_out_log_det: Likewise of ``held_out``; both are given, or none.
        seeds: Training seeds, to show the spread over them.
        method: How to estimate an evidence that has no closed form, see :func:`inference.evidence`; None weights the
            draws of the guides as draws of their mixture. The guide that a method is given is the model's best by ELBO.
        split: Rows of each data set, from its start, whose gap is split into approximation and amortisation gap, see
            :func:`inference.gap`. That refits the guides; 0 leaves it.
        simulated: Data simulated from the model, at least 100, on which the coverage of a guide's central 90 %
            intervals is counted, see :func:`inference.coverage`; 0 leaves it.
        chunk: See :func:`inference.iter_log_weights`.
        block: Rows measured together; None chooses.
        plate: See :func:`inference.iter_log_weights`.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        level: Confidence level of the intervals.
        checkpoint: Beginning of the names of files that say which blocks of rows are finished, and that hold these
            rows, see :func:`inference.evidence`: one of each data set and training seed. An interrupted call goes on
            from there, and the result of one training seed is a view of the files. Needs a seed.
        seed: Seed of the importance samples.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of models and guides, the same for training and held-out data.

    Returns:
        A tree with the groups ``train`` and, with held-out data, ``held_out``. Each holds per seed, guide and data
        point ``elbo``, ``iwae``, ``evidence`` (with ``_se``, ``_lower``, ``_upper``), ``gap``, ``pareto_k``,
        ``ess`` and whether a guide's bound has ``contradicted`` the evidence's upper end, and ``approximation`` and
        ``amortisation`` as far as a refit found the family's best (a better one moves nats from the first to the
        second), NaN where they are not known; per seed and guide ``mean_evidence`` with its own interval,
        ``bounded_evidence`` likewise over the ``num_bounded`` data points that have an upper end, ``coverage``, and the
        ``seconds`` and bytes of ``memory`` that one ELBO of one block takes; per data point ``log_det`` and a
        two-dimensional ``map`` of the data. Nats throughout.
        :func:`inference.table` prints it, :func:`inference.save_comparison` writes netCDF.

    Raises:
        TypeError: If data or guides are of the wrong type.
        ValueError: If there is no guide, the data are not finite or have the wrong shape, a model and a guide are not a
            valid pair, a name cannot be saved, ``split`` is above the number of rows, or the model's data cannot be
            simulated; before anything is measured.
        OSError: As :func:`inference.evidence`.
    """
    import xarray as xr

    check_count(num_samples, "num_samples", 2)
    block = at_once(_BLOCK) if block is None else block
    check_count(block, "block")
    check_count(split, "split", 0)
    if isinstance(x, Tensor) and split > len(x):
        raise ValueError(f"expected split of at most the {len(x)} rows of x, got {split}")
    check_count(simulated, "simulated", 0)
    check_level(level)
    chosen = None if method is None else as_method(method)
    named = {TRAIN: opened((*x, *args) if isinstance(x, tuple) else (x, *args))}
    if held_out is not None:
        named[HELD_OUT] = opened(held_out if isinstance(held_out, tuple) else (held_out,))
    layout = Call(model or _no_program, None, (), kwargs, plate, whole=whole, missing=missing)
    data = {name: replace(layout, args=part) for name, part in named.items()}
    for call in data.values():
        call.check()
    shape = _first(data[TRAIN]).shape[1:]
    if held_out is not None and not whole and _first(data[HELD_OUT]).shape[1:] != shape:
        raise ValueError(
            f"expected held_out of shape (M, {', '.join(map(str, shape))}), got {tuple(_first(data[HELD_OUT]).shape)}"
        )
    if held_out is not None and (log_det is None) != (held_out_log_det is None):
        raise ValueError("expected log_det and held_out_log_det both or neither, got one of them")
    offsets = {TRAIN: _offsets(log_det, _num_data(data[TRAIN]), "log_det")}
    if held_out is not None:
        offsets[HELD_OUT] = _offsets(held_out_log_det, _num_data(data[HELD_OUT]), "held_out_log_det")
    _check_sizes(data, split, simulated, chunk)
    trainings = [0] if seeds is None else list(seeds)
    files = {(name, i): _file(checkpoint, name, i) for name in data for i in trainings}
    check_checkpoints(seed, *files.values())
    by_seed = _entries(model, guides, None if seeds is None else trainings, layout)
    for entry in (entry for entries in by_seed.values() for entry in entries.values()):
        check_same_call(entry.on(data[TRAIN]).own, (num_samples, seed, block, level, repr(chosen)))
        for part in data.values():
            entry.on(part).own.check()
        if simulated:
            _simulated(entry.on(data[TRAIN]).own, _TRIED, 1)
    groups: dict[str, xr.Dataset] = {}
    num_blocks = sum(-(-_num_data(part) // block) for part in data.values())
    total = sum(map(len, by_seed.values())) * num_blocks
    seed, hidden = ranks().agreed(seed), not (progress and ranks().first)
    with seeded(seed), tqdm(total=total, disable=hidden, desc="compare", unit="block") as bar:
        for name, part in data.items():
            measured = []
            for trained, entries in by_seed.items():
                setting = {"num_samples": num_samples, "chunk": chunk, "level": level, "bar": bar}
                part = _with_rows(part, entries, block, split)
                found = _measured(entries, part, block, files[name, trained], seed, method=chosen, **setting)
                columns = _collect(entries, *found)
                measured.append(columns.assign(_of_guides(columns, entries, part, split, simulated, block)))
            groups[name] = _with_data(_over_seeds(measured, list(by_seed)), part, offsets[name])
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "num_samples": num_samples,
        "level": level,
        "data_dim": math.prod(_first(data[TRAIN]).shape) if whole else math.prod(shape),
        "trained": int(seeds is not None),
    }
    return tree


def _file(checkpoint: str | os.PathLike[str] | None, name: str, trained: int) -> str | None:
    """The checkpoint of one data set and training seed."""
    return None if checkpoint is None else f"{os.fspath(checkpoint)}.{name}.{trained}"


def _check_sizes(data: Mapping[str, Call], split: int, simulated: int, chunk: int | None) -> None:
    """Refuse numbers that could not be used in the end.

    Raises:
        ValueError: If there are too few simulations, or fewer rows than are to be split.
    """
    if 0 < simulated < _SIMULATED:
        raise ValueError(f"expected simulated to be 0 or at least {_SIMULATED}, five for each bin, got {simulated}")
    for name, part in data.items():
        if split > _num_data(part):
            raise ValueError(f"expected split to be at most the {_num_data(part)} rows of {name}, got {split}")
    if chunk is not None:
        check_count(chunk, "chunk")


def _entries(
    model: Program | None, guides: Mapping[str, Any], seeds: list[int] | None, layout: Call
) -> dict[int, Entries]:
    """Pairs by seed and name, trained where there are seeds."""
    if not isinstance(guides, Mapping) or not guides:
        raise ValueError(f"expected guides as a mapping from names with at least one entry, got {_kind(guides)}")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(f"expected at least one seed, all different, got {seeds}")
    for seed in seeds or ():
        check_count(seed, "every seed", 0)
    for name, entry in guides.items():
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise ValueError(f"expected printable text as every guide's name, got {name!r}")
        if seeds is not None and (isinstance(entry, nn.Module) or not callable(entry)):
            raise TypeError(f"expected {name!r} to be a function of a seed, with seeds=, got {type(entry).__name__}")
    return {
        seed: {
            name: _as_entry(name, model, entry if seeds is None else entry(seed), layout)
            for name, entry in guides.items()
        }
        for seed in ([0] if seeds is None else seeds)
    }


def _kind(value: Any) -> str:
    """What a wrong argument is: an empty or short value itself, a module by its class."""
    return repr(value) if isinstance(value, str | dict) or value is None else type(value).__name__


def _as_entry(name: str, model: Program | None, entry: Any, layout: Call) -> Entry:
    pair = entry if isinstance(entry, tuple) else (model, entry)
    if len(pair) != 2 or not all(callable(half) for half in pair):
        raise TypeError(f"expected {name!r} to be a guide of the given model, or (model, guide), got {_kind(entry)}")
    call = replace(layout, model=pair[0], guide=pair[1])
    return Entry(call, call.double())


def _first(call: Call) -> Tensor | Column:
    """The first tensor among the arguments: the data that are mapped and counted."""
    found = next((leaf for leaf in tree_leaves(call.args) if isinstance(leaf, Tensor | Column)), None)
    if found is None or len(found.shape) == 0:
        raise TypeError(f"expected x to be a torch.Tensor of shape (N, D), got {[type(a).__name__ for a in call.args]}")
    return found


def _num_data(call: Call) -> int:
    return 1 if call.whole else len(_first(call))


def _with_rows(part: Call, entries: Entries, block: int, split: int) -> Call:
    """The arguments with those that are rows of data, which is checked where only some of several are run."""
    several, whole = len(part.args) + len(part.kwargs) > 1, _num_data(part)
    if part.whole or not several or not (whole > block or 0 < split < whole):
        return part
    call = next(iter(entries.values())).on(part).own
    rows = with_known_rows(call).row_arguments
    return part if rows is None else part.with_rows(rows)


def _rows(part: Call, index: Tensor) -> Call:
    return part if len(index) == _num_data(part) else part.rows(index)


def _no_program() -> None:
    """The model of a call whose arguments alone are wanted."""


# Columns by name, each (G, N) over the guides, and the evidence of each guide's model.
Block = tuple[dict[str, Tensor], dict[str, Evidence]]


class _Measured:
    """What blocks of rows say as that of all rows, in memory or in files.

    Args:
        number: Rows of all blocks; None takes those of the first one.
        entries: The pairs: guides of one model share its evidence, which goes by the first one's name.
        path: Of the files; None keeps all in memory.
    """

    def __init__(self, number: int | None, entries: Entries, path: str | None) -> None:
        first = {id(entry.own.model): name for name, entry in reversed([*entries.items()])}
        self._models = {name: first[id(entry.own.model)] for name, entry in entries.items()}
        self._columns = columns_of(number, path and f"{path}.rows")
        self._truths = {name: Joined(number, path and f"{path}.{i}.rows") for i, name in enumerate(first.values())}

    @property
    def blocks(self) -> int:
        """Blocks so far."""
        return self._columns.blocks

    def add(self, part: Block) -> None:
        """Take in the next block."""
        columns, truths = part
        for name, joined in self._truths.items():
            joined.add(truths[name])
        self._columns.add(columns)

    def whole(self) -> Block:
        """All rows so far."""
        whole = {name: joined.whole() for name, joined in self._truths.items()}
        return self._columns.whole(), {name: whole[first] for name, first in self._models.items()}

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` needs to know."""
        return {"columns": self._file.state(), "truths": {name: j.state() for name, j in self._truths.items()}}

    def synchronise(self) -> None:
        """Wait until all rows so far are on the disk."""
        self._file.synchronise()
        for joined in self._truths.values():
            joined.synchronise()

    def resume(self, state: Mapping[str, Any], size: int | None = None) -> None:
        """Go on from a state, see :meth:`inference.core.columns.FileColumns.resume`."""
        self._file.resume(state["columns"], size)
        for name, joined in self._truths.items():
            joined.resume(state["truths"][name], size)

    @property
    def _file(self) -> FileColumns:
        assert isinstance(self._columns, FileColumns)
        return self._columns


def _measured(entries: Entries, part: Call, block: int, checkpoint: str | None, seed: int | None, **sets: Any) -> Block:
    """Everything per data point, block by block; each of several has a seed of its own."""
    blocks, bar = RowBlocks(part, block), sets.pop("bar")
    # Of one block every call and rank draws, also where it is read from a file: what is drawn next comes after that.
    only = _measure(entries, blocks[0], bar=bar, **sets) if len(blocks) == 1 else None
    pairs = [entry.on(part).own for entry in entries.values()]
    probes = [entry.on(blocks[0]).own.probe for entry in entries.values()]
    return in_blocks(
        _Measured(blocks.number, entries, checkpoint),
        blocks,
        lambda i: only or _measure(entries, blocks[i], bar=bar, **sets),
        seed=0 if only else int(torch.randint(2**31, ())),
        recognised=lambda: Recognised(part, pairs, probes, sets | {"seed": seed, "block": block, "names": [*entries]}),
        checkpoint=checkpoint,
        progress=False,
    )


def _measure(
    entries: Entries,
    block: Call,
    *,
    num_samples: int,
    chunk: int | None,
    level: float,
    method: Method | None,
    bar: Any,
) -> Block:
    """Everything per data point of a block: columns, and the evidence of its model, by the guide's name."""
    by_model = dict[int, dict[str, Entry]]()
    for name, entry in entries.items():
        by_model.setdefault(id(entry.own.model), {})[name] = entry.on(block)
    truths, by_guide = dict[str, Evidence](), dict[str, dict[str, Tensor]]()
    for group in by_model.values():
        pooled = pooled_weights({name: entry.own for name, entry in group.items()}, num_samples, chunk)
        truth, contradicted = _confronted(_reference(group, pooled, method, level), pooled, level)
        truths |= dict.fromkeys(group, truth)
        by_guide |= {name: _per_datum(weights, truth, contradicted) for name, weights in pooled.own.items()}
        bar.update(len(group))
    keys = next(iter(by_guide.values()))
    return {key: torch.stack([by_guide[name][key].cpu() for name in entries]) for key in keys}, truths


def _collect(entries: Entries, columns: Mapping[str, Tensor], truths: Mapping[str, Evidence]) -> xr.Dataset:
    """What was measured with one seed, with the mean evidence over all data points."""
    import pandas as pd
    import xarray as xr

    own = [truths[name] for name in entries]
    variables: dict[str, Any] = {key: (("guide", "datum"), value.numpy()) for key, value in columns.items()}
    for i, end in enumerate(("", "_lower", "_upper", "_se")):
        variables[f"mean_evidence{end}"] = (("guide",), [truth.mean[i] for truth in own])
    for i, end in enumerate(("", "_lower", "_upper")):
        variables[f"bounded_evidence{end}"] = (("guide",), [truth.bounded_mean[i] for truth in own])
    variables["num_bounded"] = (("guide",), [truth.num_bounded for truth in own])
    variables["method"] = (("guide",), [truth.method for truth in own])
    num_data = len(own[0].value)
    return xr.Dataset(variables, {"guide": list(entries), "datum": pd.RangeIndex(num_data)})


def _over_seeds(measured: list[xr.Dataset], seeds: list[int]) -> xr.Dataset:
    """What was measured with each seed, side by side; that of one is not copied."""
    import xarray as xr

    if len(seeds) == 1:
        return measured[0].expand_dims({"seed": seeds})
    return xr.concat(measured, xr.Variable("seed", seeds))


def _reference(group: Entries, pooled: Pooled, method: Method | None, level: float) -> Evidence:
    entry = group[pooled.best]
    if isinstance(entry.own.model, SupportsLogEvidence):
        return Exact().estimate(Problem(entry.own, level, progress=False))
    problem = Problem(entry.double.settled(), level, progress=False)
    if method is not None:
        return method.estimate(problem)
    return _where_visited(pooled.evidence(level), problem, [group[name].double for name in pooled.mixed])


def _where_visited(found: Evidence, problem: Problem, calls: Sequence[Call]) -> Evidence:
    """Evidence that is two-sided only where the guides visit the modes that a further look finds.

    Of many data points some are looked at, and stand for all: where the guides miss modes of one, none has an upper
    end. What is drawn leaves the random state as it was.

    Args:
        found: From the weights of the guides' mixture.
        problem: With one of the guides.
        calls: Of all guides in it.
    """
    two_sided = found.upper.isfinite().nonzero()[:, 0]
    if len(two_sided) == 0:
        return found
    chosen = two_sided[:: -(-len(two_sided) // _LOOKED_AT)]

    def density(part: Problem) -> Density | None:
        each = [density_of_guide(replace(part, call=replace(part.call, guide=call.guide))) for call in calls]
        known = [one for one in each if one is not None]
        if len(known) < len(each):
            return None
        return lambda u: torch.stack([one(u) for one in known]).logsumexp(0) - math.log(len(known))

    with random_state(None), torch.no_grad():
        try:
            part = two_sided_where_visited(take_rows(found, chosen), problem, density, rows=chosen)
        except RowsNotFollowed:  # no run takes some of them alone
            return two_sided_where_visited(found, problem, density)
    if bool(part.upper.isinf().any()):
        found = without_upper_end(found, found.upper.isfinite())
    return replace_rows(found, chosen, part)


def _confronted(truth: Evidence, pooled: Pooled, level: float) -> tuple[Evidence, Tensor]:
    """The evidence beside the ELBOs of all guides and their IWAE bounds, the latter by Markov's inequality."""
    parts = list(pooled.own.values())
    each = joint_level(level, 2 * len(parts) * len(truth.value))
    elbos = [part.elbo.value - normal_quantile(each) * part.elbo.standard_error for part in parts]
    iwaes = [part.iwae.value + math.log(1 - each) for part in parts]
    return confronted(truth, torch.stack([*elbos, *iwaes]).to(truth.value), each)


def _of_guides(
    measured: xr.Dataset, entries: Entries, part: Call, split: int, simulated: int, block: int
) -> dict[str, Any]:
    """Cost of a guide, the split of its gap on the first rows, and the coverage of its intervals."""
    num_data, count = measured.sizes["datum"], min(split, measured.sizes["datum"])
    unknown = np.broadcast_to(math.nan, (len(entries), num_data))
    parts = [unknown.copy() if split else unknown for _ in range(2)]
    columns: dict[str, Any] = {name: [] for name in ("coverage", "seconds", "memory")}
    for i, (name, entry) in enumerate(entries.items()):
        if split:
            known = measured["evidence"].sel(guide=name).values[:count]
            for column, value in zip(parts, _split(entry.on(_rows(part, torch.arange(count))).double, known)):
                if value is not None:
                    column[i, :count] = value.cpu().numpy()
        seconds, memory = _cost_of(entry.on(_rows(part, torch.arange(min(block, num_data)))).own)
        columns["coverage"].append(_coverage(entry.on(part).own, simulated) if simulated else math.nan)
        columns["seconds"].append(seconds)
        columns["memory"].append(memory)
    found: dict[str, Any] = {key: (("guide",), np.array(values)) for key, values in columns.items()}
    split_in = zip(("approximation", "amortisation"), parts, strict=True)
    return found | {key: (("guide", "datum"), column) for key, column in split_in}


def _split(call: Call, known: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(call.guide, SupportsLocal):
        return None, None
    found = refit_columns(call, restarts=0, seed=0, progress=False)
    return torch.as_tensor(known).to(found["elbo"]) - found["elbo"], found["improvement"]


def _cost_of(call: Call) -> Cost:
    with torch.no_grad(), random_state(0):
        return cost(lambda: call.run().elbo_terms)


def _coverage(call: Call, simulated: int) -> float:
    simulation = _simulated(call, simulated, 99)
    return float(coverage(sbc(simulation, seed=0), (0.9,)).value[0, : len(simulation.names)].mean())


def _simulated(call: Call, num_simulations: int, num_samples: int) -> Simulation:
    if not call.whole and (call.row_arguments is not None or len(call.args) + len(call.kwargs) == 1):
        call = call.rows(torch.arange(num_simulations) % _num_data(call))
    assert call.guide is not None
    return simulate(
        call.model,
        call.guide,
        *call.args,
        num_simulations=num_simulations,
        num_samples=num_samples,
        plate=call.plate,
        whole=call.whole,
        missing=call.missing,
        seed=0,
        progress=False,
        **call.kwargs,
    )


def _per_datum(weights: WeightSummary, truth: Evidence, contradicted: Tensor) -> dict[str, Tensor]:
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
        "contradicted": contradicted,
        "gap": truth.value - elbo.value,
        "pareto_k": weights.pareto_k.value,
        "ess": weights.effective_sample_size.value,
    }


def _offsets(log_det: Tensor | float | None, num_data: int, name: str) -> Tensor:
    """Log-determinants per data point, (N,)."""
    offsets = torch.as_tensor(0.0 if log_det is None else log_det, dtype=torch.float64).cpu()
    if offsets.shape not in ((), (num_data,)):
        raise ValueError(f"expected {name} as a number or of shape ({num_data},), got {tuple(offsets.shape)}")
    check_finite(offsets.reshape(-1), name)
    return offsets.expand(num_data)


def _with_data(dataset: xr.Dataset, call: Call, offsets: Tensor) -> xr.Dataset:
    data = _first(call)
    dataset = dataset.assign_attrs(dtype=str(data[:1].dtype).removeprefix("torch."))
    own = offsets if offsets.stride() == (0,) else offsets.clone()
    return dataset.assign(log_det=(("datum",), own.numpy()))
