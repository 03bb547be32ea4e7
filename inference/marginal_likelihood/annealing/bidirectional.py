"""Bidirectional Monte Carlo (BDMC): brackets of the evidence by annealing from both sides.

An upper bound that holds in expectation needs exact draws of the posterior. On real data long chains may stand in for
them, on the assumption that they have converged.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from inference.core.call import Call
from inference.core.checks import check_count
from inference.core.estimates import check_level, log_mean_exp
from inference.core.run import Program
from inference.core.seeding import seeded
from inference.marginal_likelihood.annealing.annealed_importance_sampling import Annealed
from inference.marginal_likelihood.base.method import Problem
from inference.marginal_likelihood.base.result import PROBABILISTIC, Evidence
from inference.posterior.exact_draws import ExactDraws, simulated_draws
from inference.weights.summary import WeightSummary, summarise


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """Bracket of the evidence by bidirectional Monte Carlo (BDMC), with bounds that hold in expectation for any guide.

    Attributes:
        evidence: ``raw_lower`` and ``raw_upper`` in expectation, ``lower`` and ``upper`` with probability ``level``.
        draws: The data, and the exact posterior draws that the upper bound began from.
    """

    evidence: Evidence
    draws: ExactDraws


@dataclass(frozen=True, kw_only=True)
class ConvergedBracket:
    """Bracket of the evidence of real data: a lower bound in expectation, and an upper one under an assumption.

    Attributes:
        raw_lower: Lower bound in expectation, whatever the guide, (N,) in nats.
        upper_if_converged: Upper bound in expectation if the assumption holds, (N,).
        r_hat: Gelman-Rubin R-hat over the last half of the chains' steps at the posterior, the largest of coordinates
            and log joint density, (N,): near one where there is no evidence against the assumption.
        seconds: Wall time.
        assumption: The assumption of the upper end, which no computation has verified.
    """

    raw_lower: Tensor
    upper_if_converged: Tensor
    r_hat: Tensor
    seconds: float
    assumption: ClassVar[str] = "chains have converged to the posterior"


def bdmc(
    model: Program,
    data: int | ExactDraws,
    *args: Any,
    guide: Program | None = None,
    method: Annealed | None = None,
    plate: str | None = None,
    broadcast: bool = True,
    level: float = 0.95,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Bracket:
    r"""Bidirectional Monte Carlo (BDMC): the evidence of simulated data from both sides.

    .. math:: E \log \frac1S \sum_s w_s \le \log p(x) \le E \Big[ -\log \frac1S \sum_s w'_s \Big],
        \quad E w = p(x), \quad E w' = 1 / p(x)

    Chains run from the Gaussian of the guide to the posterior, and from exact draws of the posterior back, through the
    same frozen transitions. All tuning is on chains that do not depend on the exact draws.

    Warning:
        Both bounds hold in expectation (``raw_lower``, ``raw_upper``). What holds with probability ``level`` is wider
        by log(2 / (1 - level)) for one data point, and by that over N for the mean of all, ``evidence.mean``.

    References:
        Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015, arXiv
        1511.02543. Grosse, Ancha, Roy, "Measuring the reliability of MCMC inference with bidirectional Monte Carlo",
        2016, arXiv 1606.02275.

    Args:
        model: Pyro model.
        data: Number of data points to simulate, or what :func:`simulated_draws` or :func:`posterior_draws` returned.
        *args: Further arguments of model and guide.
        guide: Pyro guide; the chains begin at the prior's Gaussian where there is none.
        method: Settings of the chains, ``Annealed()`` by default.
        plate: Name of the plate over the data, ``"data"`` if None.
        broadcast: Evaluate samples side by side; False for models that cannot broadcast.
        level: Confidence level.
        seed: Seed; leaves the global random state as it was.
        progress: Show progress bars.
        **kwargs: Keyword arguments of model and guide.

    Raises:
        ValueError: If model and guide are not a valid pair, or a setting is out of range.
        FloatingPointError: If a density breaks down.

    Example:
        >>> from zoo import PPCA
        >>> found = bdmc(PPCA(5, 2).double(), 20, method=Annealed(50), seed=0, progress=False)
        >>> found.evidence.raw_lower.shape, bool(torch.isfinite(found.evidence.upper).all())
        (torch.Size([20]), True)
    """
    check_level(level)
    begin = time.perf_counter()
    method = Annealed() if method is None else method
    with seeded(seed), torch.no_grad():
        draws = simulated_draws(model, data, *args, **kwargs) if isinstance(data, int) else data
        problem = Problem(Call(model, guide, (draws.x, *args), kwargs, plate, broadcast), level, progress)
        annealer = method.prepare(problem)
        forward = summarise(annealer.log_weights(method.num_chains), method.num_chains)
        u, _ = annealer.log_joint.unconstrain(draws.latents, draws.num_samples)
        repeats = -(-method.num_chains // draws.num_samples)
        chains = annealer.start.whiten(u).repeat(repeats, 1, 1)[: method.num_chains]
        upper = -log_mean_exp(annealer.backward(chains))
    found = _bracket(forward, upper, level, annealer.evaluations)
    return Bracket(evidence=replace(found, seconds=time.perf_counter() - begin), draws=draws)


def converged_bracket(
    model: Program,
    x: Tensor,
    *args: Any,
    guide: Program | None = None,
    method: Annealed | None = None,
    num_steps: int = 1000,
    plate: str | None = None,
    broadcast: bool = True,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> ConvergedBracket:
    """Bidirectional Monte Carlo (BDMC) on real data, with long Hamiltonian chains in place of exact posterior draws.

    The chains begin where annealing ended and stay at the posterior for many steps before they walk back.

    Warning:
        The upper end assumes that the chains have converged. Chains that all miss a mode agree with each other: then
        it may lie below log p(x) by the mode's share.

    References:
        Grosse, Ancha, Roy, "Measuring the reliability of MCMC inference with bidirectional Monte Carlo", 2016, arXiv
        1606.02275. Gelman, Rubin, "Inference from iterative simulation using multiple sequences", 1992.

    Args:
        model: Pyro model.
        x: Data, (N, D).
        *args: Further arguments of model and guide.
        guide: See :func:`bdmc`.
        method: See :func:`bdmc`; at least two chains.
        num_steps: Steps at the posterior, at least four.
        plate: See :func:`bdmc`.
        broadcast: See :func:`bdmc`.
        seed: See :func:`bdmc`.
        progress: Show progress bars.
        **kwargs: Keyword arguments of model and guide.

    Raises:
        ValueError: If the data are not finite or have the wrong shape, model and guide are not a valid pair, or a
            setting is out of range.
        FloatingPointError: If a density breaks down.
    """
    method = Annealed() if method is None else method
    check_count(num_steps, "num_steps", minimum=4)
    check_count(method.num_chains, "num_chains", minimum=2)
    begin = time.perf_counter()
    with seeded(seed), torch.no_grad():
        problem = Problem(Call(model, guide, (x, *args), kwargs, plate, broadcast), progress=progress)
        annealer = method.prepare(problem)
        chains, log_weights = annealer.forward(method.num_chains)
        moments = _Moments()
        for k, now in enumerate(annealer.run_at_posterior(chains, num_steps)):
            chains = now
            if k >= num_steps // 2:
                moments.add(torch.cat([chains.v, chains.value.unsqueeze(-1)], -1))
        upper = -log_mean_exp(annealer.backward(chains.v))
    return ConvergedBracket(
        raw_lower=log_mean_exp(log_weights),
        upper_if_converged=upper,
        r_hat=moments.r_hat,
        seconds=time.perf_counter() - begin,
    )


def _bracket(forward: WeightSummary, upper: Tensor, level: float, evaluations: float) -> Evidence:
    """Markov's inequality at both ends, half of the error probability each."""
    value, error = forward.iwae
    price = math.log(2 / (1 - level))
    return Evidence(
        value=value,
        lower=value - price,
        upper=upper + price,
        standard_error=error,
        guarantee=(PROBABILISTIC,) * len(value),
        level=level,
        method="bdmc",
        pareto_k=forward.pareto_k.value,
        effective_sample_size=forward.effective_sample_size.value,
        raw_lower=value,
        raw_upper=upper,
        num_samples=forward.num_samples,
        evaluations=evaluations,
    )


class _Moments:
    """Mean and variance of each chain along its steps, and R-hat from them."""

    def __init__(self) -> None:
        self._num, self._shift = 0, torch.empty(0)
        self._first, self._second = torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """One step of the chains, (S, N, F)."""
        if self._num == 0:
            self._shift = values
        residual = (values - self._shift).double()
        self._num, self._first, self._second = self._num + 1, self._first + residual, self._second + residual.square()

    @property
    def r_hat(self) -> Tensor:
        """The largest over the F features, (N,); infinite where chains stand still."""
        mean = self._first / self._num
        within = ((self._second / self._num - mean.square()) * self._num / (self._num - 1)).mean(0)
        between = (self._shift + mean).var(0)
        ratio = ((self._num - 1) / self._num + between / within).sqrt()
        return ratio.nan_to_num(math.inf, posinf=math.inf).amax(-1)
