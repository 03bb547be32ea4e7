"""The entry point to the evidence log p(x) of any model: ``evidence(model, x, method=...)``."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from inference.core.call import Call
from inference.core.checks import check_arguments, check_count
from inference.core.deprecation import renamed_keywords
from inference.core.estimates import check_level
from inference.core.memory import at_once
from inference.core.protocols import SupportsLogEvidence
from inference.core.rows import RowsNotFollowed
from inference.core.run import Program
from inference.core.seeding import seeded
from inference.core.storage import load_tree, save_tree, tensor_digest
from inference.marginal_likelihood.analytic.exact import Exact
from inference.marginal_likelihood.analytic.laplace import Laplace
from inference.marginal_likelihood.analytic.near_deterministic import Limit
from inference.marginal_likelihood.annealing.annealed_importance_sampling import Annealed
from inference.marginal_likelihood.automatic import Automatic
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence, concatenate, replace_rows, take_rows
from inference.marginal_likelihood.importance.adaptive_mixture import Adaptive
from inference.marginal_likelihood.importance.bridge_sampling import Bridge
from inference.marginal_likelihood.importance.defensive_mixture import Defensive
from inference.marginal_likelihood.importance.importance_sampling import Importance
from inference.marginal_likelihood.importance.pareto_smoothed import SmoothedImportance
from inference.marginal_likelihood.quadrature.adaptive_quadrature import Quadrature

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Automatic,
        Exact,
        Importance,
        Limit,
        Annealed,
        Adaptive,
        Defensive,
        Bridge,
        Laplace,
        Quadrature,
        SmoothedImportance,
    )
}

# Rows estimated together by default: a bound on memory, and on what an interruption can lose.
_BLOCK = 2048

# How often a method is refined, at four times the cost each, in pursuit of a tolerance.
_MAX_REFINEMENTS = 3


@renamed_keywords(tol="tolerance")
def evidence(
    model: Program,
    x: Any,
    *args: Any,
    method: str | Method = Automatic.name,
    guide: Program | None = None,
    plate: str | None = None,
    broadcast: bool = True,
    whole: bool = False,
    missing: bool = False,
    level: float = 0.95,
    tolerance: float | None = None,
    budget: float | None = None,
    block: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Evidence:
    """Evidence log p(x) of a model, per data point, with an interval and its kind of guarantee.

    Modules are evaluated in float64, as copies where they are of another dtype; functions as they are.

    Args:
        model: Pyro model.
        x: Data, (N, D): the model's first argument.
        *args: Further arguments of the model and the guide.
        method: A method of this package, such as ``Importance(num_samples=1000)``, or the name of one for its default
            settings; ``"auto"`` chooses, see :class:`inference.marginal_likelihood.automatic.Automatic`.
        guide: The guide to sample from, for methods that use one.
        plate: Name of the plate over the data, ``"data"`` if None.
        broadcast: Evaluate samples side by side where the pair can, else as further rows of the data or one by one, of
            which a warning tells; False evaluates them one by one.
        whole: Take all data as one data point, whatever the plates: for latents that all data share.
        missing: NaN in the data stands for a missing value that the model itself masks.
        level: Confidence level of the intervals.
        tolerance: Half-width of the interval, in nats, that each data point is refined to (at up to 64 times the
            method's cost); None takes what the method gives. Where the tolerance is not met, the interval is wider.
        budget: Seconds after which no refinement begins.
        block: Rows estimated together; None chooses. Where there are several blocks, or a tolerance, each argument that
            is a tensor of as many rows as ``x`` counts as rows of data, and is split with them.
        checkpoint: File that holds the finished blocks: called again with the same arguments, an interrupted estimate
            goes on from there, to the same numbers. Needs a seed. Functions are distinguished by their name alone.
        seed: Seed of the samples; leaves the global random state as it was.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of the model and the guide.

    Returns:
        One estimate per data point, float64.

    Raises:
        TypeError: If the data are of the wrong type, a setting is given outside of its method, or the method does not
            apply to the model.
        ValueError: If the method is unknown, a guide is missing or not wanted, the data are not finite or have the
            wrong shape, or the checkpoint belongs to another estimate; before anything runs.

    Example:
        >>> from zoo import PPCA
        >>> evidence(PPCA(5, 2).double(), torch.zeros(4, 5).double()).guarantee
        ('exact', 'exact', 'exact', 'exact')
    """
    chosen = as_method(method)
    if misplaced := kwargs.keys() & {"num_samples", "chunk"}:
        raise TypeError(f"expected {sorted(misplaced)} in the method, as in method=Importance(num_samples=1000)")
    check_level(level)
    block = at_once(_BLOCK) if block is None else block
    check_count(block, "block")
    for name, limit in (("tolerance", tolerance), ("budget", budget)):
        if limit is not None and not 0 < limit < math.inf:
            raise ValueError(f"expected a positive finite {name}, got {limit}")
    if checkpoint is not None and seed is None:
        raise ValueError("expected a seed for an estimate with a checkpoint, got none")
    if guide is not None and isinstance(chosen, Exact):
        raise ValueError("expected no guide for method='exact', got one: did you mean method='importance'?")
    call = Call(model, guide, (x, *args), kwargs, plate, broadcast, whole, missing).double()
    check_arguments((), call.args, kwargs, missing=missing)
    problem = Problem(call, level, progress)
    deadline = math.inf if budget is None else time.perf_counter() + budget
    blocks = _blocks(problem, block)
    parts = _Parts(None if checkpoint is None else Path(checkpoint), problem, chosen, seed, (block, tolerance))
    for i in tqdm(range(len(blocks)), disable=not progress or len(blocks) == 1, desc="evidence", unit="block"):
        if i < len(parts.done):
            continue
        with seeded(seed if len(blocks) == 1 else _block_seed(seed, i)):
            parts.add(_estimate(chosen, blocks[i], tolerance, deadline))
    return concatenate(parts.done)


def as_method(method: str | Method) -> Method:
    """A method, from itself or by name.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is none of that name.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"expected a method or the name of one, got {method!r}")
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {sorted(METHODS)}, got {method!r}")
    return METHODS[method]()


def _blocks(problem: Problem, block: int) -> list[Problem]:
    """The problem in blocks of rows; as one where its arguments are not rows of data."""
    rows = problem.call.num_rows
    if problem.call.whole or rows is None or rows <= block:
        return [problem]
    return [_select(problem, torch.arange(start, min(start + block, rows))) for start in range(0, rows, block)]


def _select(problem: Problem, index: Tensor) -> Problem:
    """The problem of chosen rows: of the data, and of all arguments that have as many; of a guide bound to its data.

    Raises:
        ValueError: If the first argument has not one row for each data point, or the model subsamples.
    """
    if problem.call.num_rows is None or not _takes_all_rows(problem):
        raise ValueError("expected a model of all rows of its first argument, to estimate some of them by themselves")
    return replace(problem, call=problem.call_of_rows.rows(index))


def _takes_all_rows(problem: Problem) -> bool:
    """Whether the plate over the data has one place for each row; closed forms take rows by definition."""
    if isinstance(problem.call.model, SupportsLogEvidence):
        return True
    return problem.density.num_data == problem.call.num_rows and not problem.density.subsamples_data


def _block_seed(seed: int | None, index: int) -> int | None:
    """A stream of its own for each block: neighbouring seeds must not share the noise of neighbouring blocks."""
    return None if seed is None else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _estimate(method: Method, problem: Problem, tolerance: float | None, deadline: float) -> Evidence:
    """One block's estimate, refined where its intervals are wider than the tolerance."""
    start = time.perf_counter()
    result = method.estimate(problem)
    for _ in range(_MAX_REFINEMENTS):
        finer = method.refined()
        if tolerance is None or finer is None or time.perf_counter() > deadline:
            break
        wide = ~(result.upper - result.lower <= 2 * tolerance)
        if not bool(wide.any()):
            break
        method = finer
        index = wide.nonzero()[:, 0]
        result = replace_rows(result, index, _estimate_rows(method, problem, index))
    return replace(result, seconds=time.perf_counter() - start)


def _estimate_rows(method: Method, problem: Problem, index: Tensor) -> Evidence:
    """The estimate of chosen data points: by themselves where they can be run so."""
    if len(index) == problem.log_joint.num_data:
        return method.estimate(problem)
    try:
        return method.estimate(_select(problem, index))
    except RowsNotFollowed:
        return take_rows(method.estimate(problem), index)


class _Parts:
    """The finished blocks, kept in a file where one is given."""

    def __init__(self, path: Path | None, problem: Problem, method: Method, seed: int | None, options: Any) -> None:
        self.path, self.done = path, list[Evidence]()
        if path is None:
            return
        call = problem.call
        self.fingerprint = {
            "method": repr(method),
            "options": list(options),
            "level": problem.level,
            "seed": seed,
            "call": [call.plate, call.broadcast, call.whole, call.missing],
            "data": [[str(key), _described(a)] for key, a in (*enumerate(call.args), *call.kwargs.items())],
            "programs": [_name(program) for program in (call.model, call.guide)],
            "parameters": [_state_digest(program) for program in (call.model, call.guide)],
        }
        if path.exists():
            tree = load_tree(path)
            got = tree.get("fingerprint") if isinstance(tree, dict) else None
            if got != self.fingerprint:
                raise ValueError(f"expected a checkpoint of this estimate, {self.fingerprint}, got {got} in {path}")
            self.done = [Evidence(**part) for part in tree["parts"]]

    def add(self, part: Evidence) -> None:
        self.done.append(part)
        if self.path is not None:
            save_tree(self.path, {"fingerprint": self.fingerprint, "parts": [_plain(part) for part in self.done]})


def _plain(part: Evidence) -> Mapping[str, Any]:
    return {name: getattr(part, name) for name in asdict(part)}


def _described(value: Any) -> Any:
    return [list(value.shape), str(value.dtype), tensor_digest(value)] if isinstance(value, Tensor) else repr(value)


def _name(program: Any) -> str:
    named = program if hasattr(program, "__qualname__") else type(program)
    return f"{named.__module__}.{named.__qualname__}"


def _state_digest(program: Any) -> list[str]:
    return [tensor_digest(value) for value in program.state_dict().values()] if isinstance(program, nn.Module) else []
