"""Summaries of log importance weights, as pure functions of the matrix or of a stream of its chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.core.checks import check_count
from inference.core.display import Result
from inference.core.estimates import Estimate
from inference.weights.pareto_smoothing import fit_pareto_k, num_kept, tail_length


def stratified(*strata: WeightSummary) -> Estimate:
    """Log of the mean of all weights, (N,) in nats, with the delta method's error from the spread within each stratum.

    Args:
        *strata: Summaries of the weights of a fixed number of draws each.
    """
    total = torch.stack([s.log_sums[0] for s in strata]).logsumexp(0)
    variance = torch.zeros_like(total)
    for s in strata:
        square = (s.log_sums[1] - 2 * total).exp() - (2 * (s.log_sums[0] - total)).exp() / s.num_samples
        variance = variance + square.clamp(min=0) * (s.num_samples / max(1, s.num_samples - 1))
    error = variance.sqrt().nan_to_num(nan=math.inf)
    if min(s.num_samples for s in strata) == 1:
        error = torch.full_like(error, math.inf)
    return Estimate(total - math.log(sum(s.num_samples for s in strata)), error)


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightSummary(Result):
    """Sufficient statistics of log importance weights, per data point, in memory that grows as sqrt S.

    Attributes:
        num_samples: S.
        mean: Mean log weight, (N,).
        squares: Sum of squared deviations from it, (N,).
        log_sums: log sum_s w^j for j = 1..4, (4, N).
        top: The largest log weights, (T, N).
        tolerance: Relative spread of the weights that is rounding, by the dtype that they came in.
    """

    num_samples: int
    mean: Tensor
    squares: Tensor
    log_sums: Tensor
    top: Tensor
    tolerance: float

    @property
    def elbo(self) -> Estimate:
        """Evidence lower bound (ELBO), the mean log weight, in nats."""
        variance = self.squares / (self.num_samples - 1) if self.num_samples > 1 else self.squares + math.inf
        return Estimate(self.mean, (variance / self.num_samples).sqrt())

    @property
    def iwae(self) -> Estimate:
        """Importance-weighted ELBO (IWAE), log of the mean of all S weights in nats; s.e. by the delta method."""
        excess = torch.expm1(math.log(self.num_samples) + self.log_sums[1] - 2 * self.log_sums[0]).clamp(min=0)
        variance = excess / (self.num_samples - 1) if self.num_samples > 1 else excess + math.inf
        return Estimate(self.log_sums[0] - math.log(self.num_samples), _infinite_if_nan(variance.sqrt()))

    @property
    def effective_sample_size(self) -> Estimate:
        """Effective sample size (ESS), (sum w)^2 / sum w^2, between 1 and S; s.e. by the delta method."""
        log_s, m = math.log(self.num_samples), self.log_sums
        value = (2 * m[0] - m[1]).exp().nan_to_num(0.0)  # zero where all weights are
        second = (log_s + m[1] - 2 * m[0]).exp()
        third = (log_s + m[2] - m[0] - m[1]).exp()
        fourth = (log_s + m[3] - 2 * m[1]).exp()
        influence = (4 * second - 4 * third + fourth - 1).clamp(min=0)
        if self.num_samples == 1:
            influence = influence + math.inf
        return Estimate(value, _infinite_if_nan(value * (influence / self.num_samples).sqrt()))

    @property
    def pareto_k(self) -> Estimate:
        """Pareto k-hat, the tail shape of the weights, with its asymptotic s.e. (1 + k) / sqrt M over M tail draws.

        Minus infinity where all weights are equal up to rounding, infinity where no tail can be fitted.
        """
        k = fit_pareto_k(self.top, self.num_samples, self.tolerance)
        k = torch.where(self._all_equal, -math.inf, k)
        error = (1 + k).clamp(min=0) / math.sqrt(tail_length(self.num_samples))
        return Estimate(k, error)

    @property
    def _all_equal(self) -> Tensor:
        """Whether the weights differ by no more than rounding, (N,)."""
        if self.num_samples == 1:
            return torch.zeros_like(self.mean, dtype=torch.bool)
        rounding = self.tolerance * self.mean.abs().clamp(min=1)
        return self.mean.isfinite() & (self.squares <= self.num_samples * rounding.square())


def summarise(chunks: Iterable[Tensor], num_samples: int) -> WeightSummary:
    """Fold chunks of log weights into a summary, in float64.

    Args:
        chunks: Tensors (chunk, N) in nats.
        num_samples: S, the number of rows in all of them together.

    Raises:
        ValueError: If the rows are not S.
    """
    kept, count, state = num_kept(num_samples), 0, None
    for block in _blocks(chunks, kept):
        count += len(block)
        update = _summarise_block(block, kept)
        state = update if state is None else _merge(state, update, kept)
    if state is None or count != num_samples:
        raise ValueError(f"expected {num_samples} rows of log weights, got {count}")
    return state


def _blocks(chunks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The chunks, concatenated to ``rows`` rows or more, as the cost of a merge does not depend on the new ones."""
    pending: list[Tensor] = []
    for chunk in chunks:
        pending.append(chunk.detach())
        if sum(map(len, pending)) >= rows:
            yield torch.cat(pending)
            pending = []
    if pending:
        yield torch.cat(pending)


def _infinite_if_nan(error: Tensor) -> Tensor:
    """The error of weights that are all zero is infinite."""
    return torch.where(error.isnan(), torch.full_like(error, math.inf), error)


def _summarise_block(block: Tensor, kept: int) -> WeightSummary:
    w, tolerance = block.double(), min(max(1e-10, 8 * torch.finfo(block.dtype).eps), 1e-5)
    mean = w.mean(0)
    # A weight of zero makes the mean minus infinity, and no deviation from that is defined.
    deviations = torch.where(mean.isfinite(), w - mean, torch.full_like(w, math.inf))
    log_sums = torch.stack([torch.logsumexp(j * w, 0) for j in (1, 2, 3, 4)])
    return WeightSummary(
        num_samples=len(w),
        mean=mean,
        squares=deviations.square().sum(0),
        log_sums=log_sums,
        top=_largest(w, kept),
        tolerance=tolerance,
    )


def _largest(log_weights: Tensor, kept: int) -> Tensor:
    return log_weights.topk(min(kept, len(log_weights)), 0)[0]


def merge(a: WeightSummary, b: WeightSummary) -> WeightSummary:
    """The summary of both sets of samples together, of the same data.

    Samples of several guides may be merged: each weight is an unbiased estimate of p(x) by itself, and so is their
    mean.
    """
    return _merge(a, b, num_kept(a.num_samples + b.num_samples))


def _merge(a: WeightSummary, b: WeightSummary, kept: int) -> WeightSummary:
    total = a.num_samples + b.num_samples
    delta = b.mean - a.mean
    mean = torch.where(delta.isfinite(), a.mean + delta * (b.num_samples / total), torch.minimum(a.mean, b.mean))
    squares = a.squares + b.squares + delta.square() * (a.num_samples * b.num_samples / total)
    squares = torch.where(mean.isfinite(), squares, torch.full_like(squares, math.inf))
    log_sums = torch.logaddexp(a.log_sums, b.log_sums)
    return WeightSummary(
        num_samples=total,
        mean=mean,
        squares=squares,
        log_sums=log_sums,
        top=_largest(torch.cat([a.top, b.top]), kept),
        tolerance=max(a.tolerance, b.tolerance),
    )


def _check_matrix(log_weights: Tensor) -> None:
    if not isinstance(log_weights, Tensor) or log_weights.dim() != 2 or len(log_weights) == 0:
        got = tuple(log_weights.shape) if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise ValueError(f"expected log weights of shape (S, N), got {got}")


def _reduce(log_weights: Tensor, read: Callable[[WeightSummary], Estimate]) -> Estimate:
    _check_matrix(log_weights)
    return read(summarise([log_weights], len(log_weights)))


def elbo(log_weights: Tensor) -> Estimate:
    """Evidence lower bound (ELBO) per data point: the mean log weight of (S, N), in nats, with its standard error."""
    return _reduce(log_weights, lambda s: s.elbo)


def iwae(log_weights: Tensor, num_particles: int | None = None) -> Estimate:
    r"""Importance-weighted ELBO (IWAE) per data point, in nats, with its standard error.

    .. math:: L_K = E \log \frac1K \sum_{k=1}^K w_k

    Args:
        log_weights: (S, N).
        num_particles: K; the S samples make S / K independent estimates, whose spread is the error. None takes
            all S at once, with the error by the delta method.

    Raises:
        ValueError: If K does not divide S.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv 1509.00519.
    """
    _check_matrix(log_weights)
    if num_particles is None:
        return _reduce(log_weights, lambda s: s.iwae)
    check_count(num_particles, "num_particles")
    if len(log_weights) % num_particles:
        raise ValueError(f"expected num_particles to divide S = {len(log_weights)}, got {num_particles}")
    groups = log_weights.detach().double().reshape(-1, num_particles, log_weights.shape[1])
    return elbo(groups.logsumexp(1) - math.log(num_particles))


def effective_sample_size(log_weights: Tensor) -> Estimate:
    """Effective sample size (ESS) per data point, by Kish, of log weights (S, N): 1 to S, with its standard error."""
    return _reduce(log_weights, lambda s: s.effective_sample_size)


def pareto_k(log_weights: Tensor) -> Estimate:
    """Pareto k-hat, the tail shape of log weights (S, N), per data point, with its asymptotic standard error.

    Below 0.5 the weights have a variance; above 0.7 an estimate from them is not reliable.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance Sampling", 2015, arXiv 1507.02646.
    """
    return _reduce(log_weights, lambda s: s.pareto_k)
