"""Evidence in closed form: by the model's own ``log_evidence``, or where all latents are discrete by their sum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.protocols import SupportsLogEvidence
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import EXACT, NUMERICAL, PROBABILISTIC, Evidence
from inference.pair.handlers import masked_log_prob

# How many times the rounding of a sum of all its terms, without their signs, its error may be.
_SUMMED = 4.0


@dataclass(frozen=True)
class Exact(Method):
    """Closed form: the model's own ``log_evidence``, in float64, or the sum over latents that are all discrete.

    A function whose tensors are float32, which nothing can convert, gives the sum in float32: that has an interval of
    its rounding, and the guarantee ``"numerical"``.
    """

    name: ClassVar[str] = "exact"

    @torch.no_grad()
    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            TypeError: If the model has no closed form, or there are arguments beyond the data.
            ValueError: If the data are not finite or have the wrong shape.
        """
        if not isinstance(problem.call.model, SupportsLogEvidence):
            return self._summed(problem)
        if len(problem.call.args) > 1 or problem.call.kwargs:
            further = f"{problem.call.args[1:]} and {problem.call.kwargs}"
            raise TypeError(f"expected no arguments beyond the data for method='exact', got {further}")
        with refuse_batch_dependence(problem.call.model):
            value = problem.call.model.log_evidence(problem.call.args[0])
        return self._evidence(value)

    def _summed(self, problem: Problem) -> Evidence:
        try:
            log_joint = problem.density
        except ValueError as error:
            raise self._refusal(problem) from error
        if log_joint.dim > 0:
            raise self._refusal(problem)
        prior, likelihood = (part[0] for part in log_joint.terms(log_joint.sample_prior(1)))
        found = self._evidence((prior + likelihood).double())
        if likelihood.dtype == torch.float64:
            return found
        draw = log_joint.probe()
        terms = torch.stack([draw.term(s, masked_log_prob(s).abs())[0] for s in draw.model_sites.values()]).sum(0)
        size = torch.maximum(prior.abs() + likelihood.abs(), terms) + log_joint.width  # the terms may cancel
        off = _SUMMED * torch.finfo(likelihood.dtype).eps * size.double()
        sound = off.isfinite()
        return replace(
            found,
            lower=torch.where(sound, found.value - off, -math.inf),
            upper=torch.where(sound, found.value + off, math.inf),
            guarantee=tuple(NUMERICAL if one else PROBABILISTIC for one in sound.tolist()),
        )

    def _refusal(self, problem: Problem) -> TypeError:
        return TypeError(
            f"expected a model with log_evidence(x) or discrete latents alone for method='exact', got "
            f"{type(problem.call.model).__name__}: use method='auto' or another"
        )

    def _evidence(self, value: Tensor) -> Evidence:
        return Evidence(
            value=value,
            lower=value,
            upper=value,
            standard_error=torch.zeros_like(value),
            guarantee=(EXACT,) * len(value),
            level=1.0,
            method=self.name,
        )
