"""What a method of estimating the evidence is given, and what it must be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from inference.core.run import Program
from inference.marginal_likelihood.base.result import Evidence
from inference.posterior.log_joint import LogJoint


@dataclass(frozen=True)
class Problem:
    """A model with the data whose evidence is asked for; the random state is the caller's business.

    Attributes:
        model: Pyro model.
        args: Positional arguments of model and guide, data first.
        kwargs: Keyword arguments of both.
        guide: Pyro guide; None where there is none.
        plate: Name of the plate over the data, ``"data"`` if None.
        broadcast: Evaluate samples side by side; False for models that cannot broadcast.
        level: Confidence level of the intervals.
        progress: Show a progress bar.
    """

    model: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    guide: Program | None = None
    plate: str | None = None
    broadcast: bool = True
    level: float = 0.95
    progress: bool = True

    @cached_property
    def log_joint(self) -> LogJoint:
        """The model's log joint density of these data."""
        return LogJoint(self.model, *self.args, plate=self.plate, broadcast=self.broadcast, **self.kwargs)

    def require_guide(self, method: str) -> Program:
        """The guide.

        Raises:
            ValueError: If there is none.
        """
        if self.guide is None:
            raise ValueError(f"expected a guide for method={method!r}, got none")
        return self.guide


class Method(ABC):
    """A way to estimate the evidence: a frozen dataclass of its settings.

    Attributes:
        name: What :func:`inference.marginal_likelihood.estimate` calls it.
    """

    name: ClassVar[str]

    @abstractmethod
    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            TypeError: If the method does not go with the model.
            ValueError: If problem or settings are unfit.
        """

    def refined(self) -> Method | None:
        """The same method at about four times the cost, or None where more work does not help."""
        return None
