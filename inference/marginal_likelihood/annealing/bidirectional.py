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

from inference.core.checks import check_count
from inference.core.display import Result
from inference.core.estimates import check_level, log_mean_exp
from inference.core.seeding import seeded
from inference.marginal_likelihood.annealing.annealed_importance_sampling import Annealed
from inference.marginal_likelihood.base.method import Problem
from inference.marginal_likelihood.base.result import PROBABILISTIC, Evidence
from inference.pair.call import Call
from inference.pair.run import Program
from inference.posterior.exact_draws import ExactDraws, simulated_draws
from inference.posterior.log_joint import LogJoint
from inference.posterior.modes import mode_masses, prior_scale, search_modes
from inference.weights.summary import WeightSummary, summarise

# A lower end above the upper one by so many standard errors of both, or by so many nats (probability e^-7 at most, by
# Markov's inequality), disproves the assumption of the upper one.
_MOST_ERRORS, _MOST_EXCESS = 4.0, 7.0

# Modes are sought in so many dimensions at most, from so many draws of the prior; those of a greater share of the
# Laplace mass have to be visited: a chain has to come as near as so many standard deviations.
_SEARCHED_DIM, _STARTS, _LEAST_SHARE, _FAR = 3, 16, 0.05, 5.0


@dataclass(frozen=True, kw_only=True, repr=False)
class Bracket(Result):
    """Bracket of the evidence by bidirectional Monte Carlo (BDMC), with bounds that hold in expectation for any guide.

    Attributes:
        evidence: ``raw_lower`` and ``raw_upper`` in expectation, ``lower`` and ``upper`` with probability ``level``.
        draws: The data, and the exact posterior draws that the upper bound began from.
    """

    evidence: Evidence
    draws: ExactDraws


@dataclass(frozen=True, kw_only=True, repr=False)
class ConvergedBracket(Result):
    """Bracket of the evidence of real data: a lower bound in expectation, and an upper one under an assumption.

    The two ends are compared: the lower needs no assumption, so an upper one that lies below it by more than their
    errors disproves its own. So does a mode of the posterior that no chain visits.

    Attributes:
        raw_lower: Lower bound in expectation, whatever the guide, (N,) in nats.
        raw_upper: What the chains give as upper end, (N,), which may lie below the lower one.
        upper_if_converged: Upper bound in expectation if the assumption holds, (N,): ``raw_upper``, but never below
            ``raw_lower``, and infinite where the assumption is disproved.
        upside_down: Where the ends as the chains give them lie upside down, (N,) bool, by chance or beyond it.
        disproved: Where the assumption does not hold, (N,) bool.
        r_hat: Gelman-Rubin R-hat over the last half of the chains' steps at the posterior, the largest of coordinates
            and log joint density, (N,): near one where there is no evidence against the assumption.
        seconds: Wall time.
        assumption: The assumption of the upper end, which a computation may disprove but none has verified.
    """

    raw_lower: Tensor
    raw_upper: Tensor
    upper_if_converged: Tensor
    upside_down: Tensor
    disproved: Tensor
    r_hat: Tensor
    seconds: float
    assumption: ClassVar[str] = "chains have converged to the posterior"

    def __str__(self) -> str:
        """One line: the mean of both ends, and for how many data points the assumption is disproved."""
        lower, upper = float(self.raw_lower.mean()), float(self.upper_if_converged.mean())
        text = f"mean log p in [{lower:.4f}, {upper:.4f}] if {self.assumption}"
        wrong = int(self.disproved.sum())
        return text + (f", which {wrong} of {len(self.disproved)} data points disprove" if wrong else "")


def bdmc(
    model: Program,
    data: int | ExactDraws,
    *args: Any,
    guide: Program | None = None,
    method: Annealed | None = None,
    plate: str | None = None,
    broadcast: bool = True,
    whole: bool = False,
    missing: bool = False,
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
        *args: Further arguments of model and guide; those of the draws come first, where they have some.
        guide: Pyro guide; the chains begin at the prior's Gaussian where there is none.
        method: Settings of the chains, ``Annealed()`` by default.
        plate: Name of the plate over the data, ``"data"`` if None.
        broadcast: Evaluate samples side by side; False for models that cannot broadcast.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        level: Confidence level.
        seed: Seed; leaves the global random state as it was.
        progress: Show progress bars.
        **kwargs: Keyword arguments of model and guide.

    Raises:
        TypeError: If the method is not :class:`Annealed`.
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
    method = _annealed(method)
    with seeded(seed), torch.no_grad():
        draws = simulated_draws(model, data, *args, **kwargs) if isinstance(data, int) else data
        call = Call(model, guide, draws.arguments(args), kwargs, plate, broadcast, whole, missing)
        problem = Problem(call, level, progress)
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
    whole: bool = False,
    missing: bool = False,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> ConvergedBracket:
    """Bidirectional Monte Carlo (BDMC) on real data, with long Hamiltonian chains in place of exact posterior draws.

    The chains begin where annealing ended and stay at the posterior for many steps before they walk back.

    Warning:
        The upper end assumes that the chains have converged. Chains that all miss a mode agree with each other: then
        it may lie below log p(x) by the mode's share. Up to three dimensions modes are sought, and one of more than a
        twentieth of the mass that no chain comes to disproves the assumption; beyond, only an upper end below the
        lower one does.

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
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        seed: See :func:`bdmc`.
        progress: Show progress bars.
        **kwargs: Keyword arguments of model and guide.

    Raises:
        TypeError: If the method is not :class:`Annealed`.
        ValueError: If the data are not finite or have the wrong shape, model and guide are not a valid pair, or a
            setting is out of range.
        FloatingPointError: If a density breaks down.
    """
    method = _annealed(method)
    check_count(num_steps, "num_steps", minimum=4)
    check_count(method.num_chains, "num_chains", minimum=2)
    begin = time.perf_counter()
    with seeded(seed), torch.no_grad():
        call = Call(model, guide, (x, *args), kwargs, plate, broadcast, whole, missing)
        problem = Problem(call, progress=progress)
        annealer = method.prepare(problem)
        chains, log_weights = annealer.forward(method.num_chains)
        moments, visits = _Moments(), _Visits(annealer.log_joint)
        for k, now in enumerate(annealer.run_at_posterior(chains, num_steps)):
            chains = now
            if k >= num_steps // 2:
                moments.add(torch.cat([chains.v, chains.value.unsqueeze(-1)], -1))
                visits.add(annealer.start.colour(chains.v))
        back = -annealer.backward(chains.v)
    found = _ends(summarise([log_weights], len(log_weights)), summarise([-back], len(back)), visits.missed)
    return ConvergedBracket(**found, r_hat=moments.r_hat, seconds=time.perf_counter() - begin)


def _ends(forward: WeightSummary, backward: WeightSummary, missed: Tensor) -> dict[str, Tensor]:
    """Both ends of a bracket, compared with each other, from weights for p(x) and for 1 / p(x)."""
    lower, lower_error = forward.iwae
    inverse, upper_error = backward.iwae
    excess = lower + inverse
    chance = _MOST_ERRORS * (lower_error.square() + upper_error.square()).sqrt()
    disproved = missed | (excess > chance) | (excess > _MOST_EXCESS)
    upper = torch.where(disproved, math.inf, torch.maximum(-inverse, lower))
    return {
        "raw_lower": lower,
        "raw_upper": -inverse,
        "upper_if_converged": upper,
        "upside_down": excess > 0,
        "disproved": disproved,
    }


def _annealed(method: Any) -> Annealed:
    if method is not None and not isinstance(method, Annealed):
        raise TypeError(f"expected method as Annealed(...) or None, got {method!r}")
    return Annealed() if method is None else method


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


class _Visits:
    """Which of the modes that matter chains come to, up to three dimensions."""

    def __init__(self, log_joint: LogJoint) -> None:
        num_data = log_joint.num_data
        self._modes, self._near = None, torch.zeros(0, num_data, dtype=torch.bool, device=log_joint.device)
        self._mass = torch.zeros(0, num_data, dtype=torch.float64, device=log_joint.device)
        if log_joint.dim <= _SEARCHED_DIM and not log_joint.subsamples_data:
            location, scale = prior_scale(log_joint)
            self._modes = search_modes(log_joint, [log_joint.sample_prior(_STARTS).double()], location, scale)
            self._mass = mode_masses(self._modes, scale).softmax(0)
            self._near = torch.zeros_like(self._mass, dtype=torch.bool)
            curvature, axes = torch.linalg.eigh(-self._modes.hessian * scale.unsqueeze(-1) * scale.unsqueeze(-2))
            self._factor = axes / scale.unsqueeze(-1) * curvature.clamp(min=1.0).sqrt().unsqueeze(-2)

    def add(self, u: Tensor) -> None:
        """Where the chains are, (S, N, d)."""
        if self._modes is None:
            return
        away = (u.unsqueeze(0) - self._modes.location.unsqueeze(1)).unsqueeze(-2)
        distance = (away @ self._factor.unsqueeze(1)).squeeze(-2).norm(dim=-1)
        self._near |= (distance < _FAR).any(1)

    @property
    def missed(self) -> Tensor:
        """Whether a mode that matters has not been visited, (N,)."""
        return ((self._mass > _LEAST_SHARE) & ~self._near).any(0)


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
