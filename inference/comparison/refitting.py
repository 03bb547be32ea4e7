"""Refit of a guide: the best member of its family for each data point, as far as it can be found."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from tqdm.auto import tqdm

from inference.comparison.local_problem import LocalProblem
from inference.comparison.refit_starts import starts_at_modes
from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.call import Call
from inference.core.checks import check_count
from inference.core.protocols import SupportsLocal
from inference.core.run import Program
from inference.core.seeding import seeded
from inference.numerics.lbfgs import minimise
from inference.numerics.whitened_noise import WhitenedNoise

# Independent sets of noise on which an ELBO is evaluated.
EVALUATIONS = 8
_RESTART_SPREAD = 1.0

# Standard errors and nats by which one point must be better than another to be called so.
_CLEARLY, _TIE = 3.0, 1e-6


@dataclass(frozen=True, kw_only=True)
class Refit:
    """Refit of a guide: the best member of its family for each data point, as far as it was found.

    Attributes:
        elbo: Its ELBO, (N,) in nats, on noise that neither the optimiser nor the choice between its points has seen.
        standard_error: Of that, (N,).
        own_elbo: The guide's ELBO on the same noise, (N,).
        own_standard_error: Of that, (N,).
        improvement: ``elbo - own_elbo``, (N,).
        improvement_error: Its standard error over common noise, (N,).
        gradient_norm: Of the ELBO at the point returned, on the optimiser's noise, in nats per natural unit of the
            parameters, (N,). Near zero it says that the point is stationary, not that it is the best.
        guide: The guide of these data that was refitted, a module.
    """

    elbo: Tensor
    standard_error: Tensor
    own_elbo: Tensor
    own_standard_error: Tensor
    improvement: Tensor
    improvement_error: Tensor
    gradient_norm: Tensor
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
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Refit:
    """Refit a guide: find the best member of its family for each data point.

    The parameters of an AutoGuide, and of any module where all data are one data point, are refitted as a whole.

    All data side by side, by L-BFGS on whitened antithetic noise that stays the same: from the guide's own output, from
    the members of its family that are most like Laplace's approximation and like the best Gaussian with independent
    coordinates at each mode of the posterior that is found (three at most), and from random starts. Of the points
    found, that one is taken whose ELBO is surely highest, by its errors on fresh noise that all share; the values come
    from further noise.

    Warning:
        The point is stationary as far as ``gradient_norm`` is near zero. That no better member of the family exists is
        not known, so ``elbo`` is a lower bound of the family's best.

    Args:
        model: Pyro model.
        guide: Guide that can be freed for each data point.
        *args: Arguments of both.
        num_samples: Samples per data point.
        restarts: Random starts around the guide's own output, besides the others.
        max_steps: Steps of the optimiser.
        tolerance: Gradient norm at which it stops, in nats per natural unit.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        seed: Seed of all noise.
        progress: Show a progress bar over the starts.
        **kwargs: Keyword arguments of both.

    Raises:
        TypeError: If the guide cannot be freed for each data point.
        ValueError: If model and guide are not a valid pair, or a parameter of the freed guide has not one row for each
            data point.
    """
    return refit_call(
        Call(model, guide, args, kwargs, plate, whole=whole, missing=missing).double(),
        num_samples=num_samples,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        seed=seed,
        progress=progress,
    )


def refit_call(
    own: Call,
    *,
    num_samples: int = 128,
    restarts: int = 2,
    max_steps: int = 200,
    tolerance: float = 1e-6,
    seed: int | None = None,
    progress: bool = True,
) -> Refit:
    """:func:`refit` of a call that is in float64 already."""
    if not isinstance(own.guide, SupportsLocal) and not has_global_parameters(own):
        raise TypeError(f"expected a guide with local(x), or an AutoGuide, got {type(own.guide).__name__}")
    check_count(num_samples, "num_samples", 2)
    check_count(restarts, "restarts", 0)
    own.check()
    with refuse_batch_dependence(*own.programs), seeded(seed):
        local, shared = _freed(own)
        freed = replace(own, guide=local)
        problem = LocalProblem(freed, local, num_samples, shared=shared)
        point = _best_point(problem, restarts, max_steps, tolerance, progress)
        norm = problem.minus_elbo(point, torch.arange(len(point), device=point.device))[1].norm(dim=-1)
        problem.set(point)
        fresh = int(torch.randint(2**31, ()))
        ours, refitted = (evaluations(call, num_samples, fresh) for call in (own, freed))
    elbo, error = mean_and_error(refitted)
    own_elbo, own_error = mean_and_error(ours)
    improvement, improvement_error = mean_and_error(refitted - ours)
    return Refit(
        elbo=elbo,
        standard_error=error,
        own_elbo=own_elbo,
        own_standard_error=own_error,
        improvement=improvement,
        improvement_error=improvement_error,
        gradient_norm=norm.expand_as(elbo),
        guide=local,
    )


def _freed(own: Call) -> tuple[nn.Module, bool]:
    """A guide with free parameters, and whether all data share them."""
    if isinstance(own.guide, SupportsLocal):
        return own.guide.local(*own.args, **own.kwargs), False
    assert isinstance(own.guide, nn.Module)
    return copy.deepcopy(own.guide), True


def has_global_parameters(call: Call) -> bool:
    """Whether a guide's parameters belong to all its data: then they are refitted as one."""
    return isinstance(call.guide, AutoGuide) or (call.whole and isinstance(call.guide, nn.Module))


def _best_point(problem: LocalProblem, restarts: int, max_steps: int, tolerance: float, progress: bool) -> Tensor:
    """Free parameters (N, P): of the optimiser's points and their starts the best by fresh noise that all share.

    The noise on which points were optimised flatters those that use its accidents, so it decides ties alone.
    """
    similar = starts_at_modes(problem, max_steps) if len(problem.start) == problem.layout.num_data else []
    around = [problem.start + _RESTART_SPREAD * torch.randn_like(problem.start) for _ in range(restarts)]
    starts = [problem.start, *similar, *around]
    bar = tqdm(starts, disable=not progress, desc="refit", unit="start")
    found = [minimise(problem.minus_elbo, start, max_steps=max_steps, tolerance=tolerance) for start in bar]
    lowest = torch.stack([each.value for each in found]).argmin(0)
    candidates = torch.stack([*(each.point for each in found), problem.start, *similar])
    fresh, values = int(torch.randint(2**31, ())), []
    for candidate in candidates:
        problem.set(candidate)
        values.append(problem.combined(evaluations(problem.call, problem.num_samples, fresh)))
    taken = _chosen(torch.stack(values), lowest)
    return candidates[taken, torch.arange(len(lowest), device=lowest.device)]


def _chosen(values: Tensor, lowest: Tensor) -> Tensor:
    """Which candidate to take, (N,), by values (C, E, N) on common noise: the optimiser's lowest in case of a tie.

    Another is taken if it is surely higher than halfway between the lowest's value and its lower end, which is so where
    that is uncertain, or if it is clearly better by the error of the paired difference.
    """
    columns = torch.arange(len(lowest), device=lowest.device)
    sure = _surely(values)
    sure[lowest, columns] = (sure + values.mean(1))[lowest, columns] / 2 + _TIE
    safe = sure.argmax(0)
    gain, other = _surely(values - values[safe, :, columns].mT).max(0)
    return torch.where(gain > _TIE, other, safe)


def _surely(values: Tensor) -> Tensor:
    """Lower end of the mean of values (C, E, N) over the evaluations, (C, N)."""
    lower = values.mean(1) - _CLEARLY * values.std(1) / math.sqrt(values.shape[1])
    return lower.nan_to_num(nan=-math.inf)


@torch.no_grad()
def evaluations(call: Call, num_samples: int, seed: int | None = None) -> Tensor:
    """The ELBO on several independent sets of whitened noise, (8, N).

    Whitened noise is normal up to second moments only: terms of the log joint beyond a quadratic have a bias in 1 / S.
    A second set of half the size estimates that bias, which is subtracted; other noise has no such bias.
    """
    values = []
    with seeded(seed):
        for _ in range(EVALUATIONS):
            value, white = _evaluate(call, num_samples)
            values.append(2 * value - _evaluate(call, num_samples // 2)[0] if white else value)
    return torch.stack(values)


def _evaluate(call: Call, num_samples: int) -> tuple[Tensor, bool]:
    """The ELBO on one set of noise, (N,), and whether the noise was whitened and half as much could be."""
    with WhitenedNoise() as noise:
        draw = call.run(num_samples, enumerate_guide=True)
    return draw.trained_elbo.mean(0).double(), noise.used and num_samples >= 4 * draw.layout.numel


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the evaluations (E, N), and its standard error."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))
