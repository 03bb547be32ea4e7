r"""A claim of a paper, what is run for it, and the verdict that follows from the numbers.

A run gives numbers, each with its standard error and the interval in which the claim needs it. A number that lies in
its interval by more than two standard errors holds, one that lies outside by as much fails, any other is open:

* reproduced: every number holds;
* refuted: one fails, and the claim is universal (about all models of a kind), so that one exact case decides it;
* differs: one fails, and the claim is an observation, which may be otherwise on other data or networks;
* not decided: none fails and one is open, or nothing was run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPRODUCED, DIFFERS, REFUTED, UNDECIDED = "reproduced", "differs", "refuted", "not decided"
VERDICTS = (REPRODUCED, DIFFERS, REFUTED, UNDECIDED)
NOT_RECOVERABLE = "not recoverable"

# Standard errors by which a number must clear the ends of its interval.
_CLEAR = 2.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is run.

    Attributes:
        fast: Leave out the slow claims.
        paper_scale: Larger networks, more steps and more runs, as far as the papers' are known.
        mnist: File or folder of MNIST, for the claims that need it.
        seed: Of data, initialisation and noise.
    """

    fast: bool = False
    paper_scale: bool = False
    mnist: Path | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number that a run found, and where the claim needs it.

    Attributes:
        name: What it is, with its unit.
        value: The number.
        error: Its standard error; zero for one that is exact up to rounding.
        lower: Lower end of the interval in which the claim needs it.
        upper: Upper end.
    """

    name: str
    value: float
    error: float = 0.0
    lower: float = -math.inf
    upper: float = math.inf

    @property
    def holds(self) -> bool | None:
        """Whether it is where the claim needs it; None where its error is too large to say, or it is not a number."""
        if not (math.isfinite(self.value) and math.isfinite(self.error)):
            return None
        width = _CLEAR * self.error
        if self.lower <= self.value - width and self.value + width <= self.upper:
            return True
        if self.value + width < self.lower or self.value - width > self.upper:
            return False
        return None


def close(name: str, value: float, expected: float, tolerance: float, *, error: float = 0.0) -> Measured:
    """A number that must be as expected, up to a tolerance."""
    return Measured(name=name, value=value, error=error, lower=expected - tolerance, upper=expected + tolerance)


def at_least(name: str, value: float, lower: float, *, error: float = 0.0) -> Measured:
    """A number that must not be smaller."""
    return Measured(name=name, value=value, error=error, lower=lower)


def at_most(name: str, value: float, upper: float, *, error: float = 0.0) -> Measured:
    """A number that must not be larger."""
    return Measured(name=name, value=value, error=error, upper=upper)


Run = Callable[[Settings], Sequence[Measured]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of a paper.

    Attributes:
        name: By which the command line knows it.
        paper: Authors and year.
        sentence: What is claimed.
        paper_number: The paper's number or figure for it, as text.
        run: What is run; None where nothing here decides it.
        universal: Whether it is about all models of a kind, so that one exact case refutes it.
        slow: Whether it is left out of a fast run.
        needs_mnist: Whether it runs on MNIST, from a file of the user.
        reason: Why nothing is run.
    """

    name: str
    paper: str
    sentence: str
    paper_number: str = NOT_RECOVERABLE
    run: Run | None = None
    universal: bool = False
    slow: bool = False
    needs_mnist: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.run is None) != bool(self.reason):
            raise ValueError(f"expected either a run or a reason for having none, got {self.name}")

    def verdict(self, measured: Sequence[Measured]) -> str:
        """What the numbers of a run say of it."""
        found = [one.holds for one in measured]
        if False in found:
            return REFUTED if self.universal else DIFFERS
        return REPRODUCED if found and None not in found else UNDECIDED

    def excuse(self, settings: Settings) -> str:
        """Why it is not run under these settings; empty where it is."""
        if self.run is None:
            return self.reason
        if self.needs_mnist and settings.mnist is None:
            return "needs MNIST: --mnist PATH"
        if self.slow and settings.fast:
            return "left out by --fast"
        return ""


def claim(
    paper: str,
    sentence: str,
    *,
    paper_number: str = NOT_RECOVERABLE,
    universal: bool = False,
    slow: bool = False,
    needs_mnist: bool = False,
) -> Callable[[Run], Claim]:
    """Make a claim of the function that runs it: its name is that of the first author and of the function."""

    def make(run: Run) -> Claim:
        return Claim(
            name=named(paper, run.__name__),
            paper=paper,
            sentence=sentence,
            paper_number=paper_number,
            run=run,
            universal=universal,
            slow=slow,
            needs_mnist=needs_mnist,
        )

    return make


def undecided(paper: str, name: str, sentence: str, reason: str, *, paper_number: str = NOT_RECOVERABLE) -> Claim:
    """A claim for which nothing here can be run, and why."""
    return Claim(name=named(paper, name), paper=paper, sentence=sentence, paper_number=paper_number, reason=reason)


def named(paper: str, name: str) -> str:
    """Such as lucas-zero-column."""
    return f"{paper.split()[0].lower()}-{name.replace('_', '-')}"
