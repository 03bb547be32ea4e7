r"""Decomposition of the gap between evidence and ELBO into approximation gap and amortisation gap.

.. math::
    \underbrace{\log p(x_n) - L_n(q)}_{\text{gap}}
    = \underbrace{\log p(x_n) - L_n(q^*)}_{\text{approximation}} + \underbrace{L_n(q^*) - L_n(q)}_{\text{amortisation}}

with q the guide and q* the best of its family for data point n.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import scipy
import torch
from torch import Tensor

from inference.comparison.local_problem import blocks_of_refits
from inference.comparison.refitting import (
    EVALUATIONS,
    can_be_refitted,
    evaluations,
    has_global_parameters,
    mean_and_error,
    refit_blocks,
)
from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.columns import columns_of
from inference.core.display import as_html, data_frame
from inference.core.estimates import Interval
from inference.core.protocols import SupportsRows
from inference.core.sources import opened
from inference.core.storage import tensor_digest, text_digest
from inference.marginal_likelihood.analytic.exact import Exact
from inference.marginal_likelihood.base.checkpoint import Recognised, check_checkpoints, in_blocks
from inference.marginal_likelihood.base.intervals import confronted, joint_level
from inference.marginal_likelihood.base.method import Method
from inference.marginal_likelihood.base.result import Evidence, take_rows
from inference.marginal_likelihood.estimate import as_method, evidence_of_call
from inference.pair.call import Call, check_same_call
from inference.pair.rows import RowBlocks, as_stated
from inference.pair.run import Program


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Gap between evidence and ELBO of a guide, split per data point; all (N,) in nats.

    Of the three numbers the total alone is known from both sides, where log p is. The refit is a member of the family,
    not surely its best one: what it wins is at least lost by the encoder, and what it leaves is at most due to the
    family. For a guide of local parameters, which has no encoder, amortisation means what its own optimiser has left.

    Attributes:
        evidence: log p(x), with its interval and guarantee.
        elbo: The guide's ELBO.
        elbo_error: Its standard error.
        total: ``evidence.value - elbo``.
        total_error: Its standard error, where the evidence has one.
        total_lower: Lower end of its interval; never negative.
        total_upper: Upper end; infinite where nothing bounds the evidence from above.
        approximation: Approximation gap as far as the refit is the family's best; None where the guide cannot be freed
            for each data point. Its lower end is zero.
        approximation_error: Standard error of the refit's ELBO in it.
        approximation_upper: Upper end of its interval: that of log p less the refit's lower end; None likewise.
        amortisation: Amortisation gap, what the refit wins; None likewise. Its upper end is the total's.
        amortisation_error: Its standard error.
        amortisation_lower: Lower end of its interval; never negative.
        gradient_norm: Of the refitted guide's ELBO: near zero where the refit is stationary.
        converged: Whether that is below 1e-3, (N,); None likewise.
        steps: Steps of the refit, (N,); None likewise.
        contradicted: Where the guide's or the refit's ELBO lies above the upper end of log p beyond both errors, (N,)
            bool. There the evidence is not what its method says, and has no upper end.
        level: Confidence level of the intervals of total and parts: the evidence's, unless that is exact.
        second: Name of the second part: amortisation, or optimisation of a guide without an encoder.
    """

    evidence: Evidence
    elbo: Tensor
    elbo_error: Tensor
    total: Tensor
    total_error: Tensor
    total_lower: Tensor
    total_upper: Tensor
    approximation: Tensor | None
    approximation_error: Tensor | None
    approximation_upper: Tensor | None
    amortisation: Tensor | None
    amortisation_error: Tensor | None
    amortisation_lower: Tensor | None
    gradient_norm: Tensor | None
    converged: Tensor | None
    steps: Tensor | None
    contradicted: Tensor
    level: float
    second: str = "amortisation"

    @property
    def mean(self) -> dict[str, Interval]:
        """The data set's mean of total, approximation and second part by name, with an interval of its own each."""
        truth, width = self.evidence.mean, _half_width(self.level)
        below, above = truth.lower - truth.value, truth.upper - truth.value
        value, error = float(self.total.mean()), _of_mean(self.elbo_error)
        lower, upper = max(0.0, value + below - width * error), value + above + width * error
        upper = max(lower, upper)
        total = Interval(value, lower, upper, math.hypot(error, truth.standard_error))
        if self.approximation is None or self.amortisation is None:
            return {"gap": total}
        assert self.approximation_error is not None
        assert self.amortisation_error is not None
        left, left_error = float(self.approximation.mean()), _of_mean(self.approximation_error)
        most = max(0.0, left + above + width * left_error)
        won, won_error = float(self.amortisation.mean()), _of_mean(self.amortisation_error)
        least = max(0.0, won - width * won_error)
        if math.isinf(upper):  # the refit's ELBO bounds the evidence from below, too
            total = total._replace(lower=max(lower, least))
        return {
            "gap": total,
            "approximation": Interval(left, 0.0, most, math.hypot(left_error, truth.standard_error)),
            self.second: Interval(won, min(upper, least), upper, won_error),
        }

    def __str__(self) -> str:
        """One line: the data set's mean of each part with its interval."""
        parts = [f"{name} {_bracket(part)}" for name, part in self.mean.items()]
        wrong = int(self.contradicted.sum())
        said = f"; an ELBO contradicts the upper end of log p of {wrong} data points" if wrong else ""
        rough = 0 if self.converged is None else int((~self.converged).sum())
        said += f"; the refit of {rough} data points is not stationary" if rough else ""
        if len(parts) == 1:
            return f"{parts[0]} nats, approximation: unknown, amortisation: unknown{said}"
        return f"{parts[0]} nats = {parts[1]} + {parts[2]}{said}"

    def __repr__(self) -> str:
        """The line of :meth:`__str__`, and what it is of."""
        return f"<Gap of {len(self.elbo)} data points: {self}>"

    def _repr_html_(self) -> str:
        return as_html(repr(self), data_frame(self))


def _bracket(part: Interval) -> str:
    if math.isinf(part.upper):
        return f">= {part.lower:.4f}"
    value, lower, upper = (round(number, 4) + 0.0 for number in part[:3])  # no minus zero
    return f"{value:.4f} [{lower:.4f}, {upper:.4f}]"


def _of_mean(errors: Tensor) -> float:
    """Standard error of the mean of data points with independent errors (N,)."""
    return float(torch.linalg.vector_norm(errors)) / len(errors)


def _half_width(level: float) -> float:
    """Half-width in standard errors of an interval for the mean of the few evaluations of an ELBO."""
    return float(scipy.stats.t.ppf((1 + level) / 2, EVALUATIONS - 1))


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
    rows: Iterable[int | str] | None = None,
    whole: bool = False,
    missing: bool = False,
    level: float = 0.95,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Gap:
    """Gap between evidence and ELBO per data point, split into approximation gap and amortisation gap.

    A guide that offers ``local`` (see :class:`inference.core.protocols.SupportsLocal`) is refitted to each data point
    by itself, as a whole; the parameters of an AutoGuide all together. Of others the gap is known, but not its parts.

    Warning:
        Where nothing bounds the evidence from above, nothing bounds gap and approximation. Amortisation is what the
        optimiser found: a better optimum moves nats from approximation to amortisation, so that only the sum is known
        from both sides.

        The error of an ELBO is that of a normal limit, from eight evaluations. It is too small where few draws carry
        most of the mean: where log p(x, z) falls so fast that draws of a wide guide meet its depths hardly ever, as
        exp(z) does. Beside a Gaussian of standard deviation 3 in such a z, half of the intervals miss the gap.

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
        restarts: Random starts per data point besides the others, see :func:`inference.refit`.
        max_steps: Steps of the refit from each start at most.
        plate: Name of the plate over the data, ``"data"`` if None.
        rows: Which arguments have one row per data point, see :func:`inference.evidence`.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        level: Confidence level of the intervals; that of ``known`` where it is given and not exact.
        checkpoint: File that says which blocks of rows are finished, see :func:`inference.evidence`; that of the
            evidence has the same name and ``.evidence``. An interrupted call goes on from there; the result is a view
            of files and takes no memory. Needs a seed.
        seed: Seed of all noise; leaves the global random state as it was.
        progress: Show progress bars.
        **kwargs: Keyword arguments of both.

    Raises:
        TypeError: As :func:`inference.evidence`.
        ValueError: As :func:`inference.evidence`, or if the known evidence has another number of data points.
        OSError: As :func:`inference.evidence`.
    """
    stated = as_stated(rows)
    given = opened((x, *args))
    call = Call(model, guide, given, kwargs, plate, whole=whole, missing=missing, stated_rows=stated).double_by_rows()
    call.check()
    check_checkpoints(seed, checkpoint)
    check_same_call(call, (num_samples, restarts, max_steps, level, seed))
    settings: dict[str, Any] = {"num_samples": num_samples, "restarts": restarts, "max_steps": max_steps, "seed": seed}
    if can_be_refitted(call):
        blocks, compute = refit_blocks(call, num_samples, restarts, max_steps)
    else:
        blocks = blocks_of_refits(call, num_samples)
        compute = partial(_own_elbo, blocks, num_samples)
    first = blocks[0]
    layout = first.probe_density().layout
    layout.refuse_subsampling()
    num_data = layout.num_data if len(blocks) == 1 else call.num_rows
    assert num_data is not None
    if known is None:
        own = replace(call, guide=None) if isinstance(as_method(method), Exact) else call
        kept = None if checkpoint is None else f"{os.fspath(checkpoint)}.evidence"
        known = evidence_of_call(own, as_method(method), level=level, checkpoint=kept, seed=seed, progress=progress)
    if not isinstance(known, Evidence):
        raise TypeError(f"expected known= as what inference.evidence returns, got {type(known).__name__}")
    if len(known.value) != num_data:
        raise ValueError(f"expected the evidence of {num_data} data points, got that of {len(known.value)}")
    truth, level = known, known.level if known.level < 1 else level
    settings |= {"block": blocks.size, "level": level}

    def split(i: int) -> dict[str, Any]:
        return _split(compute(i), take_rows(truth, blocks.place(i)), level, num_data)

    columns = in_blocks(
        columns_of(num_data, None if checkpoint is None else f"{os.fspath(checkpoint)}.rows"),
        blocks,
        split,
        seed=seed,
        recognised=lambda: Recognised(call, [call], [first.probe], settings | _digests(truth)),
        checkpoint=checkpoint,
        progress=progress,
        name="gap",
    )
    changed = {name: columns.pop(f"evidence {name}") for name in _CHANGED}
    unknown: dict[str, Any] = dict.fromkeys(_PARTS)
    return Gap(
        evidence=replace(known, **changed) if bool(columns["contradicted"].any()) else known,
        level=level,
        second="amortisation" if not can_be_refitted(call) or _amortised(call) else "optimisation",
        **unknown | columns,
    )


# What a contradiction changes of the evidence.
_CHANGED = ("lower", "upper", "standard_error", "guarantee", "notes")

_PARTS = (
    "approximation",
    "approximation_error",
    "approximation_upper",
    "amortisation",
    "amortisation_error",
    "amortisation_lower",
    "gradient_norm",
    "converged",
    "steps",
)


def _split(found: Mapping[str, Tensor], known: Evidence, level: float, num_data: int) -> dict[str, Any]:
    """The gap of some of so many rows by name: from what a refit says of them, or the guide's ELBO, and the evidence.

    The evidence stands beside the ELBOs of the same data points, each a lower bound with an error; what it says then is
    under :data:`_CHANGED`.
    """
    elbo, error, width = found["own_elbo"], found["own_standard_error"], _half_width(level)
    values = torch.stack([elbo, found["elbo"]] if "elbo" in found else [elbo])
    errors = torch.stack([error, found["standard_error"]] if "elbo" in found else [error])
    each = joint_level(level, len(values) * num_data)
    known, contradicted = confronted(known, (values - _half_width(each) * errors).to(known.value), each)
    lower = (known.lower - elbo - width * error).clamp(min=0)
    columns: dict[str, Any] = {
        "elbo": elbo,
        "elbo_error": error,
        "total": known.value - elbo,
        "total_error": (known.standard_error.square() + error.square()).sqrt(),
        "total_lower": lower,
        "total_upper": torch.maximum(lower, known.upper - elbo + width * error),
        "contradicted": contradicted,
    }
    columns |= {f"evidence {name}": getattr(known, name) for name in _CHANGED}
    columns["evidence notes"] = known.notes or ("",) * len(elbo)
    if "elbo" not in found:
        return columns
    columns |= _parts(found, known, width)
    # The refit's ELBO bounds the evidence from below, too: what it wins is lost, whatever draws of the guide have met.
    least = torch.maximum(lower, columns["amortisation_lower"])
    return columns | {"total_lower": torch.where(columns["total_upper"].isinf(), least, lower)}


def _parts(found: Mapping[str, Tensor], known: Evidence, width: float) -> dict[str, Tensor]:
    """The two parts with their intervals, by name, and how far the refit came."""
    values = (
        known.value - found["elbo"],
        found["standard_error"],
        (known.upper - found["elbo"] + width * found["standard_error"]).clamp(min=0),
        found["improvement"],
        found["improvement_error"],
        (found["improvement"] - width * found["improvement_error"]).clamp(min=0),
        found["gradient_norm"],
        found["converged"],
        found["steps"],
    )
    return dict(zip(_PARTS, values, strict=True))


def _own_elbo(blocks: RowBlocks, num_samples: int, i: int) -> dict[str, Tensor]:
    """The ELBO of a guide that cannot be freed, of one block, and its standard error."""
    with refuse_batch_dependence(*blocks.call.programs):
        elbo, error = mean_and_error(evaluations(blocks[i], num_samples))
    return {"own_elbo": elbo, "own_standard_error": error}


def _digests(known: Evidence) -> dict[str, Any]:
    """By what an evidence is recognised."""
    numbers = ("value", "lower", "upper", "standard_error")
    digests = {name: tensor_digest(getattr(known, name)) for name in numbers}
    digests |= {name: text_digest(getattr(known, name)) for name in ("guarantee", "notes")}
    return digests | {"method": known.method}


def _amortised(call: Call) -> bool:
    """Whether an encoder gives the guide's parameters, rather than an optimiser."""
    return not isinstance(call.guide, SupportsRows) and not has_global_parameters(call)
