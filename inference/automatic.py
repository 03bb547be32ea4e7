"""The choice of a method for the evidence of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inference.estimates import Evidence
from inference.exact_evidence import Exact
from inference.importance_evidence import Importance
from inference.methods import Method, Problem
from inference.protocols import SupportsLogEvidence


@dataclass(frozen=True)
class Automatic(Method):
    """The closed form where the model has one, importance sampling from the guide elsewhere."""

    name: ClassVar[str] = "auto"

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,), by the method chosen.

        Raises:
            ValueError: If there is neither a closed form nor a guide.
        """
        closed_form = isinstance(problem.model, SupportsLogEvidence) and len(problem.args) == 1 and not problem.kwargs
        return (Exact() if closed_form else Importance()).estimate(problem)
