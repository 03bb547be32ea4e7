r"""Decomposition of the gap between evidence and ELBO into approximation gap and amortisation gap.

.. math::
    \underbrace{\log p(x_n) - L_n(q)}_{\text{gap}}
    = \underbrace{\log p(x_n) - L_n(q^*)}_{\text{approximation}} + \underbrace{L_n(q^*) - L_n(q)}_{\text{amortisation}}

with q the guide and q* the best of its family for data point n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.call import Call
from inference.core.checks import check_count
from inference.core.draw import Layout
from inference.core.protocols import SupportsLocal
from inference.core.run import Program
from inference.core.seeding import random_state, seeded
from inference.marginal_likelihood.analytic.exact import Exact
from inference.marginal_likelihood.base.method import Method
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.estimate import as_method, evidence
from inference.numerics.lbfgs import minimise
from inference.numerics.whitened_noise import WhitenedNoise

_EVALUATIONS = 8
_RESTART_SPREAD = 1.0


@dataclass(frozen=True, kw_only=True)
class Refit:
    """Refit of a guide: the best member of its family for each data point, as far as it was found.

    Attributes:
        elbo: Its ELBO, (N,) in nats; never below the guide's own on the same noise.
        standard_error: Of that, (N,).
        own_elbo: The guide's ELBO on the same noise, (N,).
        own_standard_error: Of that, (N,).
        improvement: ``elbo - own_elbo``, (N,).
        improvement_error: Its standard error over common noise, (N,).
        gradient_norm: Of the ELBO at the optimum, in nats per natural unit of the parameters, (N,).
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


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Gap between evidence and ELBO of a guide, split per data point; all (N,) in nats.

    Attributes:
        evidence: log p(x), with its interval and guarantee.
        elbo: The guide's ELBO.
        elbo_error: Its standard error.
        total: ``evidence.value - elbo``.
        total_error: Its standard error, where the evidence has one.
        approximation: Approximation gap, that of the family's best member; None where the guide cannot be freed for
            each data point.
        amortisation: Amortisation gap, the encoder's loss beyond that; None likewise.
        amortisation_error: Its standard error.
        gradient_norm: Of the refitted guide's ELBO, which certifies the optimum.
    """

    evidence: Evidence
    elbo: Tensor
    elbo_error: Tensor
    total: Tensor
    total_error: Tensor
    approximation: Tensor | None
    amortisation: Tensor | None
    amortisation_error: Tensor | None
    gradient_norm: Tensor | None

    def __str__(self) -> str:
        """One line: the data set's mean of each part."""
        if self.approximation is None or self.amortisation is None:
            return f"gap {self.total.mean():.4f} nats, approximation: unknown, amortisation: unknown"
        return (
            f"gap {self.total.mean():.4f} nats = approximation {self.approximation.mean():.4f} "
            f"+ amortisation {self.amortisation.mean():.4f}"
        )


def gap(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    method: str | Method = "auto",
    known: Evidence | None = None,
    num_samples: int = 128,
    restarts: int = 2,
    max_steps: int = 200,
    plate: str | None = None,
    level: float = 0.95,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Gap:
    """Gap between evidence and ELBO per data point, split into approximation gap and amortisation gap.

    A guide that offers ``local`` (see :class:`inference.core.protocols.SupportsLocal`) is refitted to each data point
    by itself, as a whole. Of others the gap is known, but not its parts.

    Warning:
        Where the evidence is a lower bound, so are gap and approximation. Amortisation is what the optimiser found:
        a better optimum moves nats from approximation to amortisation.

    References:
        Cremer, Li, Duvenaud, "Inference Suboptimality in Variational Autoencoders", 2018, arXiv 1801.03558.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        x: Data, the first argument of both.
        *args: Further arguments of both.
        method: How to estimate the evidence, see :func:`inference.evidence`.
        known: The evidence, where it is known already.
        num_samples: Samples per data point of the refit, and of each of its eight evaluations.
        restarts: Further starts per data point, one unit around the guide's own output.
        max_steps: Steps of the refit from each start at most.
        plate: Name of the plate over the data, ``"data"`` if None.
        level: Confidence level of the evidence's intervals.
        seed: Seed of all noise; leaves the global random state as it was.
        progress: Show progress bars.
        **kwargs: Keyword arguments of both.

    Raises:
        TypeError: As :func:`inference.evidence`.
        ValueError: As :func:`inference.evidence`, or if the known evidence has another number of data points.
    """
    call = Call(model, guide, (x, *args), kwargs, plate).double()
    call.check()
    layout = call.probe().layout
    _check_takes_all(layout)
    if known is None:
        known = _evidence(call, as_method(method), level, seed, progress)
    if len(known.value) != layout.num_data:
        raise ValueError(f"expected the evidence of {layout.num_data} data points, got that of {len(known.value)}")
    parts: dict[str, Tensor | None]
    if isinstance(call.guide, SupportsLocal):
        found = refit_call(
            call, num_samples=num_samples, restarts=restarts, max_steps=max_steps, seed=seed, progress=progress
        )
        elbo, error = found.own_elbo, found.own_standard_error
        parts = {
            "approximation": known.value - found.elbo,
            "amortisation": found.improvement,
            "amortisation_error": found.improvement_error,
            "gradient_norm": found.gradient_norm,
        }
    else:
        with refuse_batch_dependence(*call.programs), seeded(seed):
            elbo, error = _mean_and_error(_evaluations(call, num_samples))
        parts = dict.fromkeys(("approximation", "amortisation", "amortisation_error", "gradient_norm"))
    total_error = (known.standard_error.square() + error.square()).sqrt()
    return Gap(
        evidence=known,
        elbo=elbo,
        elbo_error=error,
        total=known.value - elbo,
        total_error=total_error,
        **parts,
    )


def _evidence(call: Call, method: Method, level: float, seed: int | None, progress: bool) -> Evidence:
    guide = None if isinstance(method, Exact) else call.guide
    return evidence(
        call.model,
        *call.args,
        method=method,
        guide=guide,
        plate=call.plate,
        level=level,
        seed=seed,
        progress=progress,
        **call.kwargs,
    )


def refit(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 128,
    restarts: int = 2,
    max_steps: int = 200,
    tolerance: float = 1e-6,
    plate: str | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Refit:
    """Refit a guide: find the best member of its family for each data point.

    All data side by side, by L-BFGS on whitened antithetic noise that stays the same; then evaluated on
    fresh noise of the same kind.

    Args:
        model: Pyro model.
        guide: Guide that can be freed for each data point.
        *args: Arguments of both.
        num_samples: Samples per data point.
        restarts: Starts in addition to the guide's own output.
        max_steps: Steps of the optimiser.
        tolerance: Gradient norm at which it stops, in nats per natural unit.
        plate: Name of the plate over the data, ``"data"`` if None.
        seed: Seed of all noise.
        progress: Show a progress bar over the starts.
        **kwargs: Keyword arguments of both.

    Raises:
        TypeError: If the guide cannot be freed for each data point.
        ValueError: If model and guide are not a valid pair, or a parameter of the freed guide has not one row for each
            data point.
    """
    return refit_call(
        Call(model, guide, args, kwargs, plate).double(),
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
    if not isinstance(own.guide, SupportsLocal):
        raise TypeError(f"expected a guide with local(x), got {type(own.guide).__name__}")
    check_count(num_samples, "num_samples", 2)
    check_count(restarts, "restarts", 0)
    own.check()
    with refuse_batch_dependence(*own.programs), seeded(seed):
        local = own.guide.local(*own.args, **own.kwargs)
        freed = replace(own, guide=local)
        problem = _LocalProblem(freed, local, num_samples)
        best = minimise(problem.evaluate, problem.start, max_steps=max_steps, tolerance=tolerance)
        point, value, norm = best.point, best.value, best.gradient_norm
        for _ in tqdm(range(restarts), disable=not progress or not restarts, desc="refit", unit="start"):
            noise = _RESTART_SPREAD * torch.randn_like(problem.start)
            other = minimise(problem.evaluate, problem.start + noise, max_steps=max_steps, tolerance=tolerance)
            better = other.value < value
            point = torch.where(better.unsqueeze(-1), other.point, point)
            value, norm = torch.minimum(value, other.value), torch.where(better, other.gradient_norm, norm)
        problem.set(point)
        fresh = int(torch.randint(2**31, ()))
        ours, refitted = (_evaluations(call, num_samples, fresh) for call in (own, freed))
    worse = refitted.mean(0) < ours.mean(0)
    problem.set(torch.where(worse.unsqueeze(-1), problem.start, point))
    refitted = torch.where(worse, ours, refitted)
    elbo, error = _mean_and_error(refitted)
    own_elbo, own_error = _mean_and_error(ours)
    improvement, improvement_error = _mean_and_error(refitted - ours)
    return Refit(
        elbo=elbo,
        standard_error=error,
        own_elbo=own_elbo,
        own_standard_error=own_error,
        improvement=improvement,
        improvement_error=improvement_error,
        gradient_norm=norm,
        guide=local,
    )


class _LocalProblem:
    """Minus the ELBO of each data point as a function of its own free parameters."""

    def __init__(self, call: Call, local: nn.Module, num_samples: int) -> None:
        self.parameters = [p for p in local.parameters() if p.requires_grad]
        self.call, self.num_samples = call, num_samples
        self.noise, self.seed = WhitenedNoise(), int(torch.randint(2**31, ()))
        sizes = {p.shape[0] if p.dim() else 0 for p in self.parameters}
        if len(sizes) != 1:
            raise ValueError(
                f"expected the freed guide's parameters to have one row for each data point, got shapes "
                f"{[tuple(p.shape) for p in self.parameters]}"
            )
        self.start = torch.cat([p.detach().reshape(len(p), -1) for p in self.parameters], -1).double()
        with torch.no_grad():
            layout = call.run(num_samples).layout  # which finds the depth of the plates, outside the noise
            _check_takes_all(layout)
            if len(self.start) != layout.num_data:
                raise ValueError(
                    f"expected the freed guide's parameters to have one row for each of {layout.num_data} data points, "
                    f"got {len(self.start)}"
                )
            with random_state(self.seed), self.noise:  # drawn once here, so that each evaluation finds it drawn
                call.run(num_samples)

    def set(self, point: Tensor) -> None:
        """Write free parameters (N, P) into the guide."""
        pieces = point.split([p[0].numel() for p in self.parameters], -1)
        with torch.no_grad():
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.copy_(piece.reshape(parameter.shape))

    def evaluate(self, point: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the ELBO, and its gradient, of chosen data points at given values; the others are run along."""
        whole = self.start.clone()
        whole[index] = point.to(whole)
        self.set(whole)
        # The same noise at each call, whoever draws it.
        with torch.enable_grad(), random_state(self.seed), self.noise:
            draw = self.call.run(self.num_samples)
            loss = -draw.log_weights.mean(0)
            gradients = torch.autograd.grad(loss.sum(), self.parameters)
        gradient = torch.cat([g.reshape(len(g), -1) for g in gradients], -1)
        value = torch.where(loss.detach().isnan(), math.inf, loss.detach())
        return value[index].double(), gradient[index].double()


def _check_takes_all(layout: Layout) -> None:
    if layout.plate_scale != 1:
        raise ValueError(f"expected a pair that takes all its data, got a subsampling plate {layout.plate!r}")


@torch.no_grad()
def _evaluations(call: Call, num_samples: int, seed: int | None = None) -> Tensor:
    """The ELBO on several independent sets of whitened noise, (8, N).

    Whitened noise is normal up to second moments only: terms of the log joint beyond a quadratic have a bias in 1 / S.
    A second set of half the size estimates that bias, which is subtracted; other noise has no such bias.
    """
    values = []
    with seeded(seed):
        for _ in range(_EVALUATIONS):
            value, white = _evaluate(call, num_samples)
            values.append(2 * value - _evaluate(call, num_samples // 2)[0] if white else value)
    return torch.stack(values)


def _evaluate(call: Call, num_samples: int) -> tuple[Tensor, bool]:
    """The ELBO on one set of noise, (N,), and whether the noise was whitened and half as much could be."""
    with WhitenedNoise() as noise:
        draw = call.run(num_samples)
    return draw.log_weights.mean(0).double(), noise.used and num_samples >= 4 * draw.layout.numel


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.mean(0), values.std(0) / math.sqrt(len(values))
