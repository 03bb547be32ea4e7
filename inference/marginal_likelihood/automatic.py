"""The choice of a method for the evidence of a model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.core.protocols import SupportsLogEvidence, SupportsPosterior
from inference.marginal_likelihood.analytic.exact import Exact
from inference.marginal_likelihood.annealing.annealed_importance_sampling import Annealed
from inference.marginal_likelihood.base.intervals import combine
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence, replace_rows, take_rows
from inference.marginal_likelihood.importance.adaptive_mixture import Adaptive
from inference.marginal_likelihood.quadrature.adaptive_quadrature import Quadrature
from inference.pair.rows import RowsNotFollowed
from inference.posterior.log_joint import LogJoint
from inference.weights.pareto_smoothing import FEWEST_FITTED

_logger = logging.getLogger(__name__)

_CHECKED = 3

# The tolerated error of a closed form, relative to its size and in nats.
_ROUNDING = 1e-6
_MAX_QUADRATURE_DIM = 3
_MAX_ONE_BY_ONE_DIM = 1  # of models that take one sample at a time: more points than can be waited for

_DOUBTFUL = "; k-hat alone denies an upper end, and so few annealed chains would have none"


@dataclass(frozen=True)
class Automatic(Method):
    """Automatic choice of a method: a closed form, quadrature up to three latent dimensions, or sampling beyond.

    A closed form is checked on three data points against its own posterior. Of models that take one sample at a time
    only one dimension is integrated by quadrature. Beyond those dimensions, and of data points for which its cells are
    too few (three dimensions and a decoder with kinks, say), adaptive importance sampling comes first. Data points for
    which it has no upper end are annealed (AIS) as well, unless k-hat alone denies it and the chains are fewer than
    show one; the intervals of both are combined by their ends, at half the risk each, and their ``spread`` is the least
    that is uncertain. What was tried for a data point, and why, is in ``notes``.

    Args:
        adaptive: Settings of adaptive importance sampling.
        annealed: Settings of annealing.
        quadrature: Settings of quadrature.
    """

    adaptive: Adaptive = Adaptive()  # noqa: RUF009
    annealed: Annealed = Annealed()  # noqa: RUF009
    quadrature: Quadrature = Quadrature(max_cells=250_000)  # noqa: RUF009
    name: ClassVar[str] = "auto"

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,), by the method chosen.

        Raises:
            ValueError: If a closed form disagrees with the model's own density, the data are not finite or have the
                wrong shape, or model and guide are not a valid pair.
            FloatingPointError: If the joint density is NaN or infinite where a chain begins.
        """
        if (
            isinstance(problem.call.model, SupportsLogEvidence)
            and len(problem.call.args) == 1
            and not problem.call.kwargs
        ):
            result = Exact().estimate(problem)
            _check_closed_form(problem, result)
            return result
        if problem.density.dim == 0:  # all latents are discrete
            return Exact().estimate(problem)
        most = _MAX_QUADRATURE_DIM if problem.log_joint.broadcasts else _MAX_ONE_BY_ONE_DIM
        if problem.log_joint.dim <= most:
            return self._integrate(problem)
        _logger.info("%d latent dimensions: sampled", problem.log_joint.dim)
        return self._sample(problem)

    def _integrate(self, problem: Problem) -> Evidence:
        """Quadrature, and sampling of the data points that would need more cells than it may have."""
        found, short = self.quadrature.attempt(problem)
        index = short.nonzero()[:, 0]
        if len(index) == 0:
            return found
        cells = f"{self.quadrature.max_cells} cells of quadrature were too few"
        _logger.info("%s for %d of %d data points: sampled", cells, len(index), len(short))
        part = self._sample_rows(problem, index)
        whole = replace_rows(found, index, replace(part, notes=tuple(f"{cells}; {note}" for note in part.notes)))
        return replace(whole, method=f"{found.method} and {part.method}")

    def _sample_rows(self, problem: Problem, index: Tensor) -> Evidence:
        try:
            part = problem.rows(index)
        except RowsNotFollowed:  # no run takes some of them alone
            return take_rows(self._sample(problem), index)
        return self._sample(part)

    def _sample(self, problem: Problem) -> Evidence:
        """Adaptive importance sampling, and annealing of the data points that it gives no upper end."""
        try:
            first = self.adaptive.estimate(problem)
        except FloatingPointError as error:
            result = self.annealed.estimate(problem)
            notes = (f"annealed, as adaptive sampling failed ({error}): {note}" for note in result.notes)
            return replace(result, notes=tuple(notes))
        doubtful = self._not_annealed(problem, first)
        notes = (f"adaptive: {n}{_DOUBTFUL if one else ''}" for n, one in zip(first.notes, doubtful.tolist()))
        kept = replace(first, notes=tuple(notes), spread=torch.zeros_like(first.value))
        index = (~first.upper.isfinite() & ~doubtful).nonzero()[:, 0]
        if len(index) == 0:
            return replace(kept, spread=None)
        _logger.info(
            "%d of %d data points have no upper end by %r: annealed", len(index), len(kept.value), self.adaptive
        )
        both = _combined(take_rows(first, index), self.annealed.estimate_rows(problem, index))
        return replace(replace_rows(kept, index, both), method=both.method)

    def _not_annealed(self, problem: Problem, found: Evidence) -> Tensor:
        """Data points without an upper end to whose interval annealing adds nothing, (N,).

        Draws that are worth enough leave the lower end to Markov's inequality alone, which annealing has to pay as
        well; and of a few chains no k-hat is known.
        """
        if self.annealed.num_chains >= FEWEST_FITTED:
            return torch.zeros_like(found.upper, dtype=torch.bool)
        return self.adaptive.tail_in_doubt(problem, found)

    def refined(self) -> Automatic:
        """With every method refined, whichever is chosen."""
        finer = {name: getattr(self, name).refined() for name in ("adaptive", "annealed", "quadrature")}
        return replace(self, **finer)


def _combined(adaptive: Evidence, annealed: Evidence) -> Evidence:
    """The two of the same data points as one, with notes of both."""
    both, contradicted = combine([adaptive, annealed])
    notes = []
    for first, second, against in zip(adaptive.notes, annealed.notes, contradicted.tolist()):
        text = f"adaptive without an upper end: {first}; annealed: {second}"
        notes.append(text + ("; the two contradict each other" if against else ""))
    return replace(both, notes=tuple(notes), evaluations=annealed.evaluations)


@torch.no_grad()
def _check_closed_form(problem: Problem, result: Evidence) -> None:
    """Compare the closed form of three data points with log p(x, z) - log p(z | x) at posterior draws."""
    model = problem.call.model
    if not isinstance(model, SupportsPosterior):
        return
    x = problem.call.args[0][:_CHECKED].to(torch.float64)
    try:
        log_joint = LogJoint(model, x, plate=problem.call.plate)
    except TypeError:  # a model in another dtype than the closed form's; functions are not converted
        return
    if len(log_joint.sites) > 1:
        return
    posterior = model.posterior(x)
    z = posterior.sample()
    u, log_det = log_joint.unconstrain({log_joint.sites[0]: z}, 1)
    found = (log_joint(u) - log_det)[0] - posterior.log_prob(z)
    off = (found - result.value[:_CHECKED]).abs()
    if not bool((off <= _ROUNDING * (1 + found.abs())).all()):
        n = int(off.argmax())
        raise ValueError(
            f"expected log_evidence of {type(model).__name__} to agree with log p(x, z) - log p(z | x), got "
            f"{float(result.value[n]):.6f} against {float(found[n]):.6f} at data point {n}"
        )
