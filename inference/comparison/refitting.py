"""Refit of a guide: the best member of its family for each data point, as far as it can be found."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from tqdm.auto import tqdm

from inference.comparison.local_problem import LocalProblem, blocks_of_refits, write_rows
from inference.comparison.mixture_elbo import Mixed, mixed, mixture_elbo
from inference.comparison.named_parameters import OwnParameters, named_parameters
from inference.comparison.refit_starts import Starts, starts_at_modes
from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.core.display import Result
from inference.core.memory import joined
from inference.core.protocols import SupportsLocal
from inference.core.ranks import ranks
from inference.core.seeding import random_state, seeded
from inference.numerics.lbfgs import Minimum, minimise
from inference.numerics.whitened_noise import WhitenedNoise
from inference.pair.call import Call
from inference.pair.rows import RowBlocks, as_stated
from inference.pair.run import Program, modules_of

# Independent sets of noise on which an ELBO is evaluated.
EVALUATIONS = 8
_RESTART_SPREAD = 1.0

# From all starts the optimiser takes a quarter of its steps at most, to a rough gradient norm; then the best few go on,
# in the end to a finer one: what long ways gain on few samples are their accidents.
_ROUGH, _FINE, _POLISHED = 1e-2, 3e-3, 2

# The point that is chosen goes on with so many times the samples, to the first gradient norm, in the end to the second.
_MORE, _SETTLED, _SMALL = 8, 1e-5, 8e-4

# A standard error of an ELBO, in nats, above which more samples are drawn.
_NOISY = 1e-2

# What a point is worth that is never taken, in nats.
_NEVER = -1e300

# Nats in ten steps below which no further step is made.
_NO_GAIN = 1e-8

# The gradient norm below which a point is called stationary.
_STATIONARY = 1e-3

# Standard errors and nats by which one point must be better than another to be called so.
_CLEARLY, _TIE = 3.0, 1e-6


@dataclass(frozen=True, kw_only=True, repr=False)
class Refit(Result):
    """Refit of a guide: the best member of its family for each data point, as far as it was found.

    Attributes:
        elbo: Its ELBO, (N,) in nats, on noise that neither the optimiser nor the choice between its points has seen.
        standard_error: Of that, (N,).
        own_elbo: The guide's ELBO on the same noise, (N,).
        own_standard_error: Of that, (N,).
        improvement: ``elbo - own_elbo``, (N,).
        improvement_error: Its standard error over common noise, (N,).
        gradient_norm: Of the ELBO at the point returned, on the optimiser's last noise, in nats per natural unit of the
            parameters, (N,). Near zero it says that the point is stationary, not that it is the best.
        steps: Steps of the optimiser on the longest way to one of the points between which was chosen, (N,).
        converged: Whether the gradient's norm is below 1e-3, (N,): the point is stationary, no more.
        guide: The guide of these data that was refitted, a module.
    """

    elbo: Tensor
    standard_error: Tensor
    own_elbo: Tensor
    own_standard_error: Tensor
    improvement: Tensor
    improvement_error: Tensor
    gradient_norm: Tensor
    steps: Tensor
    converged: Tensor
    guide: nn.Module


def refit(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 128,
    restarts: int = 2,
    max_steps: int = 200,
    tolerance: float = 1e-6,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    rows: Iterable[int | str] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Refit:
    """Refit a guide: find the best member of its family for each data point.

    The parameters of an AutoGuide are refitted as a whole; so are, where all data are one data point, those of any
    module, such as an EasyGuide, and those that a function names by ``pyro.param``.

    Data side by side in blocks, by L-BFGS on whitened antithetic noise that stays the same and, for latents of eight
    coordinates at most, is spread evenly: from the guide's own output, from the members of its family that are most
    like Laplace's approximation and like the best Gaussian with independent coordinates at each mode of the posterior
    that is found (three at most), and from random starts. A mixture of Gaussians starts with components at different
    modes, or with the best such Gaussian in two parts, and its ELBO is taken component by component, which at given
    noise is smooth in the weights, too. A quarter of the steps are made from each start, and then all of them from the
    two best. Of the points found, that one is taken whose ELBO is surely highest, by its errors on fresh noise that all
    share. It goes on from there on eight times the samples, whose accidents it can use less; the values come from
    further noise.

    Warning:
        The point is stationary as far as ``gradient_norm`` is near zero. That no better member of the family exists is
        not known, so ``elbo`` is a lower bound of the family's best.

    Args:
        model: Pyro model.
        guide: Guide that can be freed for each data point.
        *args: Arguments of both.
        num_samples: Samples per data point; of a mixture, of each component.
        restarts: Random starts around the guide's own output, besides the others.
        max_steps: Steps of the optimiser.
        tolerance: Gradient norm at which it stops, in nats per natural unit; after thirty steps 8e-4 is enough.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        rows: Which arguments have one row per data point, see :func:`inference.evidence`.
        seed: Seed of all noise.
        progress: Show a progress bar over the blocks.
        **kwargs: Keyword arguments of both.

    Raises:
        TypeError: If the guide cannot be freed for each data point.
        ValueError: If model and guide are not a valid pair, or a parameter of the freed guide has not one row for each
            data point, or an argument that ``rows`` names is no row of data.
    """
    stated = as_stated(rows)
    own = Call(model, guide, args, kwargs, plate, whole=whole, missing=missing, stated_rows=stated).double()
    columns = refit_columns(
        own,
        num_samples=num_samples,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        seed=seed,
        progress=progress,
        with_point=True,
    )
    with refuse_batch_dependence(*own.programs):
        local, _ = _freed(own.settled())
    write_rows(local, columns.pop("point"))
    return Refit(guide=local, **columns)


def refit_columns(
    own: Call,
    *,
    num_samples: int = 128,
    restarts: int = 2,
    max_steps: int = 200,
    tolerance: float = 1e-6,
    seed: int | None = None,
    progress: bool = True,
    with_point: bool = False,
) -> dict[str, Tensor]:
    """What a :class:`Refit` says of each data point by name, block by block, and its free parameters ``point``."""
    blocks, compute = refit_blocks(own, num_samples, restarts, max_steps, tolerance, with_point=with_point)
    hidden = not (progress and ranks().first)
    parts = tqdm(blocks.in_turn(compute, seed), total=len(blocks), disable=hidden, desc="refit")
    return joined(parts, blocks.number)


def refit_blocks(
    own: Call,
    num_samples: int,
    restarts: int,
    max_steps: int,
    tolerance: float = 1e-6,
    *,
    with_point: bool = False,
) -> tuple[RowBlocks, Callable[[int], dict[str, Tensor]]]:
    """The blocks of rows that are refitted together, and what refits one: see :func:`refit_columns`."""
    if not can_be_refitted(own):
        raise TypeError(
            "expected a guide with local(x), an AutoGuide, or one of all data (whole=True) with parameters of its own, "
            f"got {type(own.guide).__name__}"
        )
    check_count(num_samples, "num_samples", 2)
    check_count(restarts, "restarts", 0)
    own.check()
    with refuse_batch_dependence(*own.programs):
        shared = not isinstance(own.guide, SupportsLocal)
        blocks = RowBlocks(own, None) if shared else blocks_of_refits(own, _MORE * num_samples)

    def compute(i: int) -> dict[str, Tensor]:
        with refuse_batch_dependence(*own.programs):
            part = _refit_block(blocks[i], num_samples, restarts, max_steps, tolerance)
        return {name: column for name, column in part.items() if with_point or name != "point"}

    return blocks, compute


def _refit_block(own: Call, num_samples: int, restarts: int, max_steps: int, tolerance: float) -> dict[str, Tensor]:
    """A block of rows: the refitted guide's free parameters ``point``, and what a :class:`Refit` says of them."""
    local, shared = _freed(own)
    freed = replace(own, guide=local)
    problem = LocalProblem(freed, local, num_samples, shared=shared)
    best = _best_point(problem, restarts, max_steps, tolerance)
    best = _settled(_larger(problem), best, max_steps, tolerance)
    problem.set(best["point"])
    enough, fresh = _enough(freed, num_samples), int(torch.randint(2**31, ()))
    ours, refitted = (evaluations(call, enough, fresh) for call in (own, freed))
    names = ("elbo", "standard_error", "own_elbo", "own_standard_error", "improvement", "improvement_error")
    columns = [column for values in (refitted, ours, refitted - ours) for column in mean_and_error(values)]
    best |= {name: best[name].expand_as(columns[0]) for name in ("steps", "gradient_norm", "converged")}
    return best | dict(zip(names, columns, strict=True))


def _freed(own: Call) -> tuple[nn.Module, bool]:
    """A guide with free parameters, and whether all data share them."""
    if isinstance(own.guide, SupportsLocal):
        return own.guide.local(*own.args, **own.kwargs), False
    named = {} if isinstance(own.guide, AutoGuide) else named_parameters(own)
    guide = copy.deepcopy(own.guide)
    if named:
        return OwnParameters(guide, named), True  # type: ignore[arg-type]
    assert isinstance(guide, nn.Module)
    return guide, True


def can_be_refitted(call: Call) -> bool:
    """Whether a guide's parameters can be freed, for each data point or for all at once."""
    return isinstance(call.guide, SupportsLocal) or has_global_parameters(call)


def has_global_parameters(call: Call) -> bool:
    """Whether a guide's parameters belong to all its data: then they are refitted as one."""
    if isinstance(call.guide, AutoGuide) or not call.whole:
        return isinstance(call.guide, AutoGuide)
    owned = any(p.requires_grad for module in modules_of(call.guide) for p in module.parameters())  # type: ignore[arg-type]
    return (owned and isinstance(call.guide, nn.Module)) or bool(named_parameters(call))


def _larger(problem: LocalProblem) -> LocalProblem:
    """A problem on new noise of more samples."""
    problem.set(problem.start)
    local = problem.call.guide
    assert isinstance(local, nn.Module)
    return LocalProblem(problem.call, local, _MORE * problem.num_samples, shared=problem.shared)


def _best_point(problem: LocalProblem, restarts: int, max_steps: int, tolerance: float) -> dict[str, Tensor]:
    """Of the optimiser's points and their starts the best by fresh noise that all share, and how it was reached.

    The noise on which points were optimised flatters those that use its accidents, so it decides ties alone; and a
    point where it ended on a slope, beside the nats that it won, is not taken: a part of the guide may stand where no
    draw is.
    """
    starts = _starts(problem, restarts, max_steps)
    rough = minimise(
        lambda point, index: problem.minus_elbo(point, starts.rows[index]),
        starts.point,
        max_steps=math.ceil(max_steps / 4),
        tolerance=max(_ROUGH, tolerance),
        least_gain=_TIE,
    )
    value = _less_flattered(_larger(problem), rough, starts.rows) if problem.mixed is not None else rough.value
    few = torch.stack([_places(value, starts.rows, rank) for rank in range(_POLISHED)])  # (2, N)
    num_data, everything = few.shape[1], torch.arange(few.shape[1], device=few.device)
    fine = minimise(
        lambda point, index: problem.minus_elbo(point, index % num_data),
        rough.point[few.flatten()],
        max_steps=max_steps,
        tolerance=tolerance,
        least_gain=_TIE,
        in_the_end=_FINE,
    )
    # Steps that lead from one steep place to another exploit what the noise does not see.
    before, _ = problem.minus_elbo(problem.start, everything)
    scale = 1 + (before - fine.value.unflatten(0, few.shape).amin(0)).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    wild = fine.gradient_norm.unflatten(0, few.shape) > _ROUGH * scale
    own = problem.start.unsqueeze(0)
    candidates = torch.cat([fine.point.unflatten(0, few.shape), rough.point[few], starts.point[few], own])
    lowest = torch.where(wild, math.inf, fine.value.unflatten(0, few.shape)).argmin(0)
    point = candidates[_taken(problem, problem.num_samples, candidates, lowest, wild), everything]
    steps = rough.steps[few] + fine.steps.unflatten(0, few.shape)
    return {"point": point, "steps": steps.amax(0), "scale": scale}


def _settled(problem: LocalProblem, best: dict[str, Tensor], max_steps: int, tolerance: float) -> dict[str, Tensor]:
    """The point that is stationary on the noise of a problem of more samples, which flatters less, and its gradient.

    It is not taken where it is worse on fresh noise: a small component of a mixture may have gone where no draw is.
    """
    found = minimise(
        problem.minus_elbo,
        best["point"],
        max_steps=max_steps,
        tolerance=max(_SETTLED, tolerance),
        least_gain=_NO_GAIN,
        in_the_end=_SMALL,
    )
    everything = torch.arange(len(found.point), device=found.point.device)
    wild = found.gradient_norm > _ROUGH * best["scale"]
    candidates = torch.stack([found.point, best["point"]])
    few = problem.num_samples // _MORE
    taken = _taken(problem, few, candidates, torch.zeros_like(everything), wild.unsqueeze(0), _NOISY)
    before = problem.minus_elbo(best["point"], everything)[1].norm(dim=-1) if bool(taken.any()) else found.gradient_norm
    norm = torch.where(taken == 0, found.gradient_norm, before)
    steps = best["steps"] + found.steps
    return {
        "point": candidates[taken, everything],
        "steps": steps,
        "gradient_norm": norm,
        "converged": norm <= _STATIONARY,
    }


def _taken(
    problem: LocalProblem,
    num_samples: int,
    candidates: Tensor,
    lowest: Tensor,
    wild: Tensor,
    tie: float = _TIE,
) -> Tensor:
    """Which of the candidates (C, N, P) to take, (N,), by fresh noise that all share.

    Args:
        problem: The refit.
        num_samples: Samples of an evaluation, of which there are eight; more where they are noisy.
        candidates: Points, of which those that the optimiser left come first.
        lowest: The candidate that is lowest on the optimiser's noise, (N,).
        wild: Whether each of the first candidates stands on a slope beside what it won, (W, N); those are not taken.
        tie: See :func:`_chosen`.
    """
    problem.set(candidates[0])
    enough, fresh, values = _enough(problem.call, num_samples, even=True), int(torch.randint(2**31, ())), []
    for candidate in candidates:
        problem.set(candidate)
        values.append(problem.combined(evaluations(problem.call, enough, fresh, even=True)))
    values[: len(wild)] = [torch.where(w, _NEVER, value) for w, value in zip(wild, values, strict=False)]
    return _chosen(torch.stack(values), lowest, tie)


def _starts(problem: LocalProblem, restarts: int, max_steps: int) -> Starts:
    """The guide's own parameters, those like Gaussians at the posterior's modes, and random ones around its own."""
    everything = torch.arange(len(problem.start), device=problem.start.device)
    similar = None if problem.shared else starts_at_modes(problem, max_steps)
    around = [problem.start + _RESTART_SPREAD * torch.randn_like(problem.start) for _ in range(restarts)]
    point, rows = [problem.start, *around], [everything] * (1 + restarts)
    if similar is not None:
        point, rows = [*point, similar.point], [*rows, similar.rows]
    return Starts(torch.cat(point), torch.cat(rows))


def _less_flattered(larger: LocalProblem, found: Minimum, rows: Tensor) -> Tensor:
    """Values of points on more samples, between which a narrow component cannot hide, (M,)."""
    places = torch.arange(len(rows), device=rows.device).split(len(larger.start))
    return torch.cat([larger.minus_elbo(found.point[part], rows[part])[0] for part in places])


def _places(value: Tensor, rows: Tensor, rank: int) -> Tensor:
    """The place (N,), among values (M,) of some rows each, of each row's lowest, next to lowest, and so on."""
    order = value.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    count = torch.bincount(rows)
    return order[count.cumsum(0) - count + (count - 1).clamp(max=rank)]


def _chosen(values: Tensor, lowest: Tensor, tie: float = _TIE) -> Tensor:
    """Which candidate to take, (N,), by values (C, E, N) on common noise: the optimiser's lowest in case of a tie.

    Another is taken if it is surely higher than halfway between the lowest's value and its lower end, which is so where
    that is uncertain, or if it is clearly better by the error of the paired difference.
    """
    columns = torch.arange(len(lowest), device=lowest.device)
    sure = _surely(values)
    sure[lowest, columns] = (sure + values.mean(1))[lowest, columns] / 2 + tie
    safe = sure.argmax(0)
    gain, other = _surely(values - values[safe, :, columns].mT).max(0)
    return torch.where(gain > tie, other, safe)


def _surely(values: Tensor) -> Tensor:
    """Lower end of the mean of values (C, E, N) over the evaluations, (C, N)."""
    lower = values.mean(1) - _CLEARLY * values.std(1) / math.sqrt(values.shape[1])
    return lower.nan_to_num(nan=-math.inf)


def _enough(call: Call, num_samples: int, *, even: bool = False) -> int:
    """Samples of an evaluation: more where whitening gains little, as in families that do not move noise linearly."""
    with random_state(None):
        _, error = mean_and_error(evaluations(call, num_samples, even=even))
    return _MORE * num_samples if bool((error > _NOISY).any()) else num_samples


@torch.no_grad()
def evaluations(call: Call, num_samples: int, seed: int | None = None, *, even: bool = False) -> Tensor:
    """The ELBO on several independent sets of whitened noise, (8, N), each spread evenly if so asked.

    Whitened noise is normal up to second moments only: terms of the log joint beyond a quadratic have a bias in 1 / S.
    A second set of half the size estimates that bias, which is subtracted; other noise has no such bias.
    """
    values = []
    mixture = mixed(call)
    with seeded(seed):
        for _ in range(EVALUATIONS):
            value, white = _evaluate(call, num_samples, mixture, even)
            values.append(2 * value - _evaluate(call, num_samples // 2, mixture, even)[0] if white else value)
    return torch.stack(values)


def _evaluate(call: Call, num_samples: int, mixture: Mixed | None, even: bool) -> tuple[Tensor, bool]:
    """The ELBO on one set of noise, (N,), and whether the noise was whitened and half as much could be."""
    if mixture is not None:
        with WhitenedNoise(even=even):
            return mixture_elbo(call, mixture, num_samples).double(), num_samples >= 4 * mixture.latent_dim
    with WhitenedNoise(even=even) as noise:
        draw = call.run(num_samples, enumerate_guide=True)
    return draw.trained_elbo.mean(0).double(), noise.used and num_samples >= 4 * draw.layout.numel


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the evaluations (E, N), and its standard error."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))
