r"""Result of an estimate of the evidence log p(x): its value, an interval, and the kind of guarantee."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inference.core.display import as_html, data_frame
from inference.core.estimates import Interval, normal_quantile

EXACT = "exact"
NUMERICAL = "numerical"
PROBABILISTIC = "probabilistic"
ASYMPTOTIC = "asymptotic"

# Rows that are summed up together.
_ROWS = 2**16

_STRONGEST_FIRST = (EXACT, NUMERICAL, PROBABILISTIC, ASYMPTOTIC)


def weakest(kinds: Iterable[str]) -> str:
    """The weakest of some kinds of guarantee."""
    return max(kinds, key=_STRONGEST_FIRST.index)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    r"""Evidence log p(x_n) in nats, per data point, with an interval and its kind of guarantee.

    The guarantee, one string per data point, states what an interval means:

    - ``"exact"``: a closed form.
    - ``"numerical"``: quadrature or a limit, within the error that the method estimates of itself.
    - ``"probabilistic"``: by Markov's inequality, whatever the guide. exp(lower) comes from an unbiased estimate of
      p(x), exp(-upper) from one of 1 / p(x); each end that is finite is right with the stated probability, both
      together with probability at least ``level``.
    - ``"asymptotic"``: two-sided at the stated level, by the normal approximation of a mean of weights whose variance
      exists, or of a bridge between draws. Laplace's approximation, a limit in the number of observations, claims no
      interval: its ends and its error are infinite.

    Attributes:
        value: The estimate, (N,) float64.
        lower: Lower end of the interval, (N,).
        upper: Upper end, (N,); infinite where nothing bounds it.
        standard_error: Standard error of the value, (N,); zero where it is not random.
        guarantee: One of the four strings for each data point; a tuple, or a sequence that is read from a file.
        level: Confidence level of the intervals that are not exact.
        method: The method that made it.
        pareto_k: Tail shape of the importance weights, (N,); None where there are none.
        effective_sample_size: (N,); None where there are no weights.
        raw_lower: Log of an unbiased estimate of p(x_n), (N,): a lower bound of log p(x_n) in expectation; None where
            there is none.
        raw_upper: Minus the log of an unbiased estimate of 1 / p(x_n), (N,): an upper bound in expectation.
        spread: How far the estimates of several methods lie apart, (N,) in nats, where several were made: a lower bound
            of the uncertainty, even where the interval is narrower.
        notes: What the guarantee rests on, one sentence for each data point, where the method says so: what was looked
            at, what was tried and why it was chosen. Empty otherwise.
        num_samples: Samples per data point; 0 where there are none.
        evaluations: Evaluations of the joint density per data point, on average; gradients count like values.
        seconds: Wall time of the whole estimate.
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    standard_error: Tensor
    guarantee: Sequence[str]
    level: float
    method: str
    pareto_k: Tensor | None = None
    effective_sample_size: Tensor | None = None
    raw_lower: Tensor | None = None
    raw_upper: Tensor | None = None
    spread: Tensor | None = None
    notes: Sequence[str] = ()
    num_samples: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0

    @property
    def mean(self) -> Interval:
        r"""The data set's mean log-evidence, in nats per data point, with an interval of its own.

        The errors of the data are independent, so the mean's is small; what each logarithm is low by is not, and at
        second order is half its variance. Standard error and asymptotic interval hold that bias, too.

        .. math:: \log p - E \log \hat p \approx \tfrac12 \operatorname{Var} \log \hat p

        Markov's inequality holds for the product of all unbiased estimates too, so that it costs the mean
        log(1 / delta) / N nats only. Where one data point has no upper end, neither has the mean: see
        :attr:`bounded_mean`.
        """
        return _mean(rows_in_blocks(self))

    @property
    def bounded(self) -> Tensor:
        """Which data points have an upper end, (N,)."""
        return self.upper.isfinite()

    @property
    def bounded_mean(self) -> Interval:
        """The mean over the data points that have an upper end alone; NaN where none has.

        It is not the data set's: those that have none are left out, which are the hard ones.
        """
        return _mean(take_rows(part, part.bounded.nonzero()[:, 0]) for part in rows_in_blocks(self))

    @property
    def num_bounded(self) -> int:
        """How many data points have an upper end."""
        return sum(int(part.bounded.sum()) for part in rows_in_blocks(self))

    def __str__(self) -> str:
        """Two lines at most: the mean with its interval, and how far several methods disagree, if they do."""
        mean, kinds = self.mean, sorted(set(self.guarantee))
        text = f"mean log p {mean.value:.4f} nats over {len(self.value)} data points"
        text += f" by {self.method}, {' and '.join(kinds)}"
        if mean.lower < mean.upper:
            text += f", [{mean.lower:.4f}, {'inf' if math.isinf(mean.upper) else f'{mean.upper:.4f}'}]"
        unknown = self.value.new_zeros(()) if self.spread is None else self.spread.max()
        if float(unknown) > mean.upper - mean.lower or math.isinf(mean.upper):
            text += "\nno upper end"
            text += f": not known to better than {float(unknown):.2g} nats" if self.spread is not None else ""
        if 0 < self.num_bounded < len(self.value):
            part = self.bounded_mean
            text += f"; the {self.num_bounded} data points that have one: mean {part.value:.4f}"
            text += f", [{part.lower:.4f}, {part.upper:.4f}]"
        return text

    def __repr__(self) -> str:
        """The text of :meth:`__str__`, in brackets."""
        return f"<Evidence: {self}>"

    def _repr_html_(self) -> str:
        return as_html(str(self), data_frame(self))


def rows_in_blocks(whole: Evidence) -> Iterator[Evidence]:
    """Evidence in blocks of rows, of which no more is in memory than one."""
    for start in range(0, len(whole.value), _ROWS):
        yield take_rows(whole, slice(start, start + _ROWS))


def _mean(parts: Iterable[Evidence]) -> Interval:
    """See :attr:`Evidence.mean`, of rows in blocks; NaN where there are none."""
    sums, number, kinds, bounded, level = torch.zeros(6, dtype=torch.float64), 0, set[str](), True, 0.0
    for part in parts:
        raw = [part.value if part.raw_lower is None else part.raw_lower, part.raw_upper]
        bounded &= bool(part.bounded.all())
        terms = [part.value, part.standard_error.square(), part.lower, part.upper, *raw]
        sums += torch.tensor([math.inf if t is None else float(t.sum()) for t in terms], dtype=torch.float64)
        number, kinds, level = number + len(part.value), kinds | set(part.guarantee), part.level
    if number == 0:
        return Interval(*[math.nan] * 4)
    value, squares, lower, upper, raw_lower, raw_upper = (sums / number).tolist()
    spread, bias = math.sqrt(squares / number), 0.5 * squares
    error = math.hypot(spread, bias)
    if kinds <= {EXACT, NUMERICAL}:
        return Interval(value, lower, upper, 0.0)
    if PROBABILISTIC in kinds:
        both = bounded and not math.isinf(raw_upper)
        price = math.log((2 if both else 1) / (1 - level)) / number
        return Interval(value, raw_lower - price, raw_upper + price if both else math.inf, error)
    width = normal_quantile(level) * spread + bias
    return Interval(value, value - width, value + width if bounded else math.inf, error)


def replace_rows(whole: Evidence, index: Tensor, part: Evidence) -> Evidence:
    """Evidence with that of chosen data points by another: each of the two is valid by itself.

    Args:
        whole: Of all data points.
        index: The chosen ones, (M,) integers.
        part: Of the chosen ones.
    """
    changed: dict[str, Any] = {}
    for name, value in vars(whole).items():
        if isinstance(value, Tensor):
            changed[name] = value.clone()
            changed[name][index] = getattr(part, name)
    for name in ("guarantee", "notes"):
        texts = list(getattr(whole, name)) or [""] * len(whole.value)
        for i, text in zip(index.tolist(), getattr(part, name)):
            texts[i] = text
        changed[name] = tuple(texts)
    evaluations = whole.evaluations + part.evaluations * len(index) / len(whole.value)
    return replace(whole, evaluations=evaluations, num_samples=max(whole.num_samples, part.num_samples), **changed)


def take_rows(whole: Evidence, index: Tensor | slice) -> Evidence:
    """The evidence of chosen data points: (M,) integers, or a slice."""
    changed: dict[str, Any] = {name: v[index] for name, v in vars(whole).items() if isinstance(v, Tensor)}
    for name in ("guarantee", "notes"):
        texts = getattr(whole, name)
        some = texts[index] if isinstance(index, slice) else (texts[i] for i in index.tolist() if texts)
        changed[name] = tuple(some)
    return replace(whole, **changed)
