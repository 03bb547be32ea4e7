r"""Annealed importance sampling chains from a Gaussian to the posterior and back, and the tuning of their path.

.. math::
    \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log \frac{p(x, u_{t-1})}{q(u_{t-1})}, \quad u_0 \sim q,
    \quad u_t \sim K_t(\cdot \mid u_{t-1})

K_t leaves q^{1 - beta_t} p(x, .)^{beta_t} invariant, and E w = p(x) whatever the temperatures and steps, so long as
they do not depend on these chains: they are tuned on pilot chains and then frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.checks import check_log_weights
from inference.core.memory import at_once
from inference.distributions.batched_gaussian import Gaussian
from inference.posterior.hmc import Chains, Target, Transitions, tuned, whitened
from inference.posterior.log_joint import LogJoint

# Chains times data that move side by side.
_ROWS = 2**16
_PILOT_CHAINS = 16

# A pilot step advances beta so far that the log weight's standard deviation over the chains is this. The number of its
# steps is bounded; at the least it is such a share of the path's, within bounds of its own.
_PILOT_SPREAD, _PILOT_STEPS = 0.25, 600
_PILOT_SHARE, _PILOT_LEAST = 1 / 10, (16, 40)

# Share of the temperatures that are spaced evenly, lest the pilot's spread mislead.
_EVEN = 0.2


class Schedule(NamedTuple):
    """Frozen temperatures and leapfrog steps of each data point.

    Attributes:
        betas: Inverse temperatures from 0 to 1, (T + 1, N).
        steps: Leapfrog steps at each of them, (T + 1, N).
    """

    betas: Tensor
    steps: Tensor

    @property
    def reversed(self) -> Schedule:
        """From 1 to 0."""
        return Schedule(self.betas.flip(0), self.steps.flip(0))


class Annealer:
    """Chains on a path from a Gaussian to the posterior of each data point, forwards and backwards.

    Args:
        log_joint: Of the model.
        start: The Gaussian.
        num_leapfrog: Leapfrog steps at each temperature.
        progress: Show progress bars.

    Attributes:
        evaluations: Gradients of the joint density per data point so far.
    """

    def __init__(self, log_joint: LogJoint, start: Gaussian, num_leapfrog: int, progress: bool = False) -> None:
        self.log_joint, self.start, self.num_leapfrog = log_joint, start, num_leapfrog
        self.evaluations = 0.0
        self.schedule: Schedule | None = None
        self._progress = progress
        self._targets, self._transitions = dict[int, Target](), dict[int, Transitions]()

    def tune(self, num_temperatures: int) -> None:
        """Choose temperatures and steps by pilot chains, which are then forgotten."""
        low, high = _PILOT_LEAST
        least = min(max(low, round(_PILOT_SHARE * num_temperatures)), high)
        pilot = self._pilot(self.chains(self.draw(_PILOT_CHAINS)), 1 / least)
        self.schedule = schedule_of(*pilot, num_temperatures)

    def draw(self, num_chains: int) -> Tensor:
        """Draws of the Gaussian in whitened coordinates, (S, N, d)."""
        loc = self.start.loc
        return torch.randn(num_chains, *loc.shape, dtype=loc.dtype, device=loc.device)

    def chains(self, v: Tensor) -> Chains:
        """Chains that begin at whitened positions v (S, N, d)."""
        self.evaluations += len(v)
        with pyro.validation_enabled(False):
            return Chains(v, *self._target(len(v))(v))

    def log_weights(self, num_chains: int) -> Iterator[Tensor]:
        """Log weights of chains that begin at the Gaussian, blocks of (S', N) in nats: unbiased for p(x).

        Raises:
            FloatingPointError: If one is NaN or plus infinity.
        """
        side = min(num_chains, at_once(_ROWS, self.log_joint.num_data))
        for first in range(0, num_chains, side):
            yield self.forward(min(side, num_chains - first))[1]

    def forward(self, num_chains: int) -> tuple[Chains, Tensor]:
        """Chains from the Gaussian to the posterior, with their log weights (S, N): E w = p(x).

        Raises:
            FloatingPointError: If a weight is NaN or plus infinity.
        """
        return self._run_path(self.chains(self.draw(num_chains)), self._frozen)

    def backward(self, v: Tensor) -> Tensor:
        """Log inverse weights, (S, N), of chains from exact posterior draws to the Gaussian: E exp = 1 / p(x).

        Args:
            v: Whitened draws of the posterior, (S, N, d). Temperatures and steps must not depend on them.

        Raises:
            FloatingPointError: If a weight is NaN or infinite.
        """
        return self._run_path(self.chains(v), self._frozen.reversed)[1]

    def run_at_posterior(self, chains: Chains, num_steps: int) -> Iterator[Chains]:
        """The chains after each of many steps at the posterior."""
        beta, step = self._frozen.betas[-1], self._frozen.steps[-1]
        for _ in tqdm(range(num_steps), disable=not self._progress, leave=False, desc="posterior"):
            chains, _ = self.transition(chains, beta, step)
            yield chains

    def transition(self, chains: Chains, beta: Tensor, step: Tensor) -> tuple[Chains, Tensor]:
        """One transition at inverse temperatures (N,), with its acceptance (S, N)."""
        num = len(chains.v)
        self.evaluations += num * self.num_leapfrog
        with pyro.validation_enabled(False):
            if num not in self._transitions:
                self._transitions[num] = Transitions(self._target(num), self.num_leapfrog)
            return self._transitions[num](chains, beta, step)

    @property
    def _frozen(self) -> Schedule:
        assert self.schedule is not None
        return self.schedule

    def _target(self, num_chains: int) -> Target:
        if num_chains not in self._targets:
            with pyro.validation_enabled(False):
                self._targets[num_chains] = whitened(self.log_joint, self.start, num_chains)
        return self._targets[num_chains]

    def _run_path(self, chains: Chains, schedule: Schedule) -> tuple[Chains, Tensor]:
        betas, steps = schedule
        total = torch.zeros_like(chains.value, dtype=torch.float64)
        for t in tqdm(range(1, len(betas)), disable=not self._progress, leave=False, desc="annealing"):
            total += (betas[t] - betas[t - 1]) * chains.log_ratio
            chains, _ = self.transition(chains, betas[t], steps[t])
        check_log_weights(total)
        return chains, total

    def _pilot(self, chains: Chains, farthest: float) -> tuple[Tensor, Tensor, Tensor]:
        """Betas, steps and spreads along a path whose temperatures and steps follow the chains, each (P + 1, N).

        Args:
            chains: At the Gaussian.
            farthest: Between two betas.
        """
        num_data, dim = chains.v.shape[1:]
        beta = chains.value.new_zeros(num_data)
        step = torch.full_like(beta, dim**-0.25)
        nodes = [(beta, step, torch.zeros_like(beta))]
        for k in tqdm(range(1, _PILOT_STEPS + 1), disable=not self._progress, leave=False, desc="pilot"):
            spread = _spread(chains.log_ratio)
            rest = 1 - beta
            advance = rest if k == _PILOT_STEPS else (_PILOT_SPREAD / spread).clamp(max=farthest).minimum(rest)
            beta = beta + advance
            chains, acceptance = self.transition(chains, beta, step)
            step = tuned(step, acceptance)
            nodes.append((beta, step, spread * advance))
            # Asking makes a device wait.
            if (k % 16 == 0 or not beta.is_cuda) and bool((beta >= 1).all()):
                break
        betas, steps, spreads = map(torch.stack, zip(*nodes))
        return betas, steps, spreads


def _spread(log_ratio: Tensor) -> Tensor:
    """Standard deviation over chains (S, N) of what is finite, (N,), at least a tiny number."""
    finite = log_ratio.isfinite()
    num = finite.sum(0).clamp(min=2)
    kept = torch.where(finite, log_ratio, 0.0)
    residual = torch.where(finite, log_ratio - kept.sum(0) / num, 0.0)
    return (residual.square().sum(0) / (num - 1)).sqrt().clamp(min=1e-6)


def schedule_of(betas: Tensor, steps: Tensor, spreads: Tensor, num_temperatures: int) -> Schedule:
    """Temperatures between which the log weight's spread is the same everywhere, but for a share that is even.

    Args:
        betas: Of the pilot, (P + 1, N), from 0 to 1.
        steps: Its steps, (P + 1, N).
        spreads: Standard deviations of its log weights at each step, (P + 1, N).
        num_temperatures: T.
    """
    length = spreads.cumsum(0)
    length = ((1 - _EVEN) * length / length[-1:] + _EVEN * betas).mT.contiguous()
    at = torch.linspace(0, 1, num_temperatures + 1, dtype=betas.dtype, device=betas.device)
    right = torch.searchsorted(length, at.expand(len(length), -1).contiguous()).clamp(1, len(betas) - 1)
    left = length.gather(1, right - 1)
    share = ((at - left) / (length.gather(1, right) - left).clamp(min=1e-12)).clamp(0, 1)

    def read(nodes: Tensor) -> Tensor:
        low, high = nodes.mT.gather(1, right - 1), nodes.mT.gather(1, right)
        return (low + share * (high - low)).mT.contiguous()

    chosen = read(betas)
    chosen[0], chosen[-1] = 0.0, 1.0
    return Schedule(chosen, read(steps.log()).exp())
