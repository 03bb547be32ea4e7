"""Interface of the methods that estimate the evidence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from inference.core.protocols import SupportsLogEvidence
from inference.marginal_likelihood.base.result import Evidence
from inference.pair.call import Call
from inference.pair.draw import Draw
from inference.pair.rows import with_known_rows
from inference.pair.run import Program
from inference.posterior.log_joint import LogJoint


class HasRows(Protocol):
    """What is found of data, some rows of which are what would be found of those."""

    def rows(self, index: Tensor, /) -> Any:
        """What is found of chosen data points, (M,) integers."""


F = TypeVar("F", bound=HasRows)


@dataclass(frozen=True)
class Problem:
    """A call whose model's evidence is to be estimated, with options; the caller seeds the random numbers.

    Attributes:
        call: Model, guide (where there is one) and their arguments, in float64.
        level: Confidence level of the intervals.
        progress: Show a progress bar.
        kept: What methods have found of these data that serves them again when they are refined, by name.
    """

    call: Call
    level: float = 0.95
    progress: bool = True
    kept: dict[str, HasRows] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def log_joint(self) -> LogJoint:
        """The model's log joint density of these data, in coordinates to integrate over.

        Raises:
            ValueError: If all latents are discrete.
        """
        if self.density.dim == 0:
            raise ValueError("expected a continuous latent, got discrete ones alone: use method='exact', their sum")
        return self.density

    @cached_property
    def density(self) -> LogJoint:
        """The model's log joint density of these data; without coordinates where all latents are discrete."""
        density = LogJoint.of(self.call)
        if not density.observes:
            raise ValueError(
                f"expected a model that observes data, got one of latent sites alone {list(density.sites)}: "
                "are model and guide swapped?"
            )
        return density

    @cached_property
    def call_of_rows(self) -> Call:
        """The call, of which chosen rows may be taken.

        Raises:
            ValueError: See :func:`inference.pair.rows.with_known_rows`.
        """
        if isinstance(self.call.model, SupportsLogEvidence):  # closed forms take rows by definition
            return self.call
        return with_known_rows(self.call, probe=lambda part: replace(self, call=part).probe())

    def rows(self, index: Tensor) -> Problem:
        """The problem of chosen data points, (M,) integers.

        Raises:
            ValueError: See :func:`inference.pair.rows.with_known_rows`.
        """
        if self.call.whole:  # one data point
            return self
        part = replace(self, call=self.call_of_rows.rows(index))
        part.kept.update({name: found.rows(index) for name, found in self.kept.items()})
        return part

    def keep(self, name: str, find: Callable[[], F]) -> F:
        """What a method finds of these data the first time, and has kept later."""
        if name not in self.kept:
            self.kept[name] = find()
        found: Any = self.kept[name]
        return found

    def probe(self) -> Draw:
        """One run of the pair, or of the model alone, which leaves the random state as it was."""
        return self.density.probe() if self.call.guide is None else self.call.probe()

    def require_guide(self, method: str) -> Program:
        """The guide.

        Raises:
            ValueError: If there is none.
        """
        if self.call.guide is None:
            raise ValueError(f"expected a guide for method={method!r}, got none")
        return self.call.guide


class Method(ABC):
    """Method of estimating the evidence: a frozen dataclass of its settings.

    Attributes:
        name: Its name in :func:`inference.evidence`.
    """

    name: ClassVar[str]

    @abstractmethod
    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            TypeError: If the method does not apply to the model.
            ValueError: If the data are not finite or have the wrong shape, model and guide are not a valid pair, or a
                setting is out of range.
        """

    def refined(self) -> Method | None:
        """The same method at about four times the cost, or None where more work does not help."""
        return None
