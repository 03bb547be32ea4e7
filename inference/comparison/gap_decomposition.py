r"""Decomposition of the gap between evidence and ELBO into approximation gap and amortisation gap.

.. math::
    \underbrace{\log p(x_n) - L_n(q)}_{\text{gap}}
    = \underbrace{\log p(x_n) - L_n(q^*)}_{\text{approximation}} + \underbrace{L_n(q^*) - L_n(q)}_{\text{amortisation}}

with q the guide and q* the best of its family for data point n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inference.comparison.local_problem import check_takes_all
from inference.comparison.refitting import evaluations, mean_and_error, refit_call
from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.call import Call
from inference.core.protocols import SupportsLocal
from inference.core.run import Program
from inference.core.seeding import seeded
from inference.marginal_likelihood.analytic.exact import Exact
from inference.marginal_likelihood.base.method import Method
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.estimate import as_method, evidence


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
        restarts: Random starts per data point besides the others, see :func:`inference.refit`.
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
    check_takes_all(layout)
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
            elbo, error = mean_and_error(evaluations(call, num_samples))
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
