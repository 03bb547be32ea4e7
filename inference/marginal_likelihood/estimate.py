"""The entry point to the evidence log p(x) of any model: ``evidence(model, x, method=...)``."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from inference.core.checks import check_arguments, check_count, check_positive, check_programs
from inference.core.deprecation import renamed_keywords
from inference.core.estimates import check_level
from inference.core.memory import at_once
from inference.core.protocols import SupportsLogEvidence
from inference.core.sources import opened
from inference.marginal_likelihood.analytic.exact import Exact
from inference.marginal_likelihood.analytic.laplace import Laplace
from inference.marginal_likelihood.analytic.near_deterministic import Limit
from inference.marginal_likelihood.annealing.annealed_importance_sampling import Annealed
from inference.marginal_likelihood.automatic import Automatic
from inference.marginal_likelihood.base.checkpoint import Recognised, check_checkpoints, in_blocks
from inference.marginal_likelihood.base.joined import Joined
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence, replace_rows, take_rows
from inference.marginal_likelihood.importance.adaptive_mixture import Adaptive
from inference.marginal_likelihood.importance.bridge_sampling import Bridge
from inference.marginal_likelihood.importance.defensive_mixture import Defensive
from inference.marginal_likelihood.importance.importance_sampling import Importance
from inference.marginal_likelihood.importance.pareto_smoothed import SmoothedImportance
from inference.marginal_likelihood.quadrature.adaptive_quadrature import Quadrature
from inference.pair.call import Call, check_same_call
from inference.pair.rows import RowBlocks, RowsNotFollowed, as_stated
from inference.pair.run import Program

_logger = logging.getLogger(__name__)

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
    rows: Iterable[int | str] | None = None,
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
        rows: Which arguments have one row per data point: positions, 0 for ``x``, and names of keyword arguments. None
            finds them, by comparing the density of some rows with the whole run's; what is named is checked likewise.
        whole: Take all data as one data point, whatever the plates: for latents that all data share.
        missing: NaN in the data stands for a missing value that the model itself masks.
        level: Confidence level of the intervals.
        tolerance: Half-width of the interval, in nats, that each data point is refined to (at up to 64 times the
            method's cost); None takes what the method gives. Where the tolerance is not met, the interval is wider.
        budget: Seconds after which no refinement begins.
        block: Rows estimated together; None chooses.
        checkpoint: File that says which blocks are finished; their rows are in a file beside it, of the same name and
            ``.rows``. Called again with the same arguments, an interrupted estimate goes on from there, to the same
            numbers, and a finished one is read. Rows are written as they come, and the result is a view of the file: it
            takes no memory, however many rows there are; several ranks share its folder. Needs a seed. It belongs to
            the estimate of this model and guide with these data and settings; another one is refused.
        seed: Seed of the samples; leaves the global random state as it was.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of the model and the guide.

    Returns:
        One estimate per data point, float64.

    Raises:
        TypeError: If the data are of the wrong type, a setting is given outside of its method, or the method does not
            apply to the model.
        ValueError: If the method is unknown, a guide is missing or not wanted, the data are not finite or have the
            wrong shape, or the checkpoint is damaged, belongs to another estimate or is being written by one; before
            anything runs. If rows by themselves have not the density of the whole run, whichever arguments are taken
            for data, or with the named ones.
        OSError: If the checkpoint cannot be written; before anything runs where that can be known.

    Example:
        >>> import torch
        >>> from zoo import PPCA
        >>> evidence(PPCA(5, 2).double(), torch.zeros(4, 5).double()).guarantee
        ('exact', 'exact', 'exact', 'exact')
    """
    if misplaced := kwargs.keys() & {"num_samples", "chunk"}:
        raise TypeError(f"expected {sorted(misplaced)} in the method, as in method=Importance(num_samples=1000)")
    stated = as_stated(rows)
    given = opened((x, *args))
    call = Call(model, guide, given, kwargs, plate, broadcast, whole, missing, stated_rows=stated).double_by_rows()
    return evidence_of_call(
        call,
        as_method(method),
        level=level,
        tolerance=tolerance,
        budget=budget,
        block=block,
        checkpoint=checkpoint,
        seed=seed,
        progress=progress,
    )


def evidence_of_call(
    call: Call,
    method: Method,
    *,
    level: float = 0.95,
    tolerance: float | None = None,
    budget: float | None = None,
    block: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Evidence:
    """:func:`evidence` of a call whose halves are in float64 already."""
    check_level(level)
    block = at_once(_BLOCK) if block is None else block
    check_count(block, "block")
    for name, limit in (("tolerance", tolerance), ("budget", budget)):
        if limit is not None:
            check_positive(limit, name)
    check_checkpoints(seed, checkpoint)
    if call.guide is not None and isinstance(method, Exact):
        raise ValueError("expected no guide for method='exact', got one: did you mean method='importance'?")
    check_programs(*call.programs)
    check_arguments((), call.args, call.kwargs, missing=call.missing)
    problem = Problem(call, level, progress)
    if call.stated_rows is not None:
        _ = problem.call_of_rows  # checked where it is stated, used or not
    deadline = math.inf if budget is None else time.perf_counter() + budget
    blocks = _row_blocks(problem, block)
    first = replace(problem, call=blocks[0])
    if len(blocks) > 1:
        _check_takes_all(first)
    settings = {"method": method, "seed": seed, "block": block, "tolerance": tolerance}
    check_same_call(call, settings)

    def estimate(i: int) -> Evidence:
        return _estimate(method, replace(problem, call=blocks[i]) if i else first, tolerance, deadline)

    return in_blocks(
        Joined(blocks.number, None if checkpoint is None else f"{os.fspath(checkpoint)}.rows"),
        blocks,
        estimate,
        seed=seed,
        recognised=lambda: Recognised(call, [call], [first.probe], settings | {"level": level}),
        checkpoint=checkpoint,
        progress=progress,
    )


def as_method(method: str | Method) -> Method:
    """A method, from itself or by name.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is none of that name.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"expected a method or the name of one, got its class: did you mean {method.__name__}()?")
    if not isinstance(method, str):
        raise TypeError(f"expected a method or the name of one, got {method!r}")
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {sorted(METHODS)}, got {method!r}")
    return METHODS[method]()


def _row_blocks(problem: Problem, block: int) -> RowBlocks:
    """A problem's call in blocks of rows; as one where it has no more."""
    rows = problem.call.num_rows
    if problem.call.whole or rows is None or rows <= block:
        return RowBlocks(problem.call, None)
    return RowBlocks(_known_rows(problem), block)


def _known_rows(problem: Problem) -> Call:
    """The call whose arguments that are rows are known; a model that takes some of them is refused as one that does."""
    try:
        return problem.call_of_rows
    except RowsNotFollowed:
        _check_takes_all(problem)
        raise


def _select(problem: Problem, index: Tensor) -> Problem:
    """The problem of chosen rows: of the data, and of all arguments that have as many; of a guide bound to its data.

    Raises:
        ValueError: If the first argument has not one row for each data point, or the model subsamples.
    """
    _check_takes_all(problem)
    return problem.rows(index)


def _check_takes_all(problem: Problem) -> None:
    """Check that the plate over the data has one place for each row; closed forms take rows by definition.

    Raises:
        ValueError: If not.
    """
    if isinstance(problem.call.model, SupportsLogEvidence) and problem.call.num_rows is not None:
        return
    if problem.density.num_data != problem.call.num_rows or problem.density.subsamples_data:
        raise ValueError("expected a model of all rows of its first argument, to estimate some of them by themselves")


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
        _logger.info("%d of %d intervals are wider than the tolerance: refined by %r", len(index), len(wide), method)
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
