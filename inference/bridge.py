r"""The evidence by bridge sampling between a Student-t law and draws of the posterior.

.. math:: \hat p(x_n) = \frac{\frac1{S} \sum_{u_s \sim t} h(u_s) \, p(x_n, u_s)}
    {\frac1{M} \sum_{u_m \sim p(\cdot \mid x_n)} h(u_m) \, t(u_m)},
    \quad h = \frac{1}{M p(x_n, \cdot) / \hat p(x_n) + S t}
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pyro
import torch
from torch import Tensor

from inference.adaptive import Adaptive, fresh_log_weights
from inference.checks import check_count
from inference.estimates import Evidence, concatenate
from inference.hmc import Chains, transition, whitened
from inference.importance import Estimate, summarise
from inference.importance_evidence import from_weights, with_value
from inference.log_joint import LogJoint
from inference.methods import Method, Problem
from inference.student import Student

# The acceptance that the chains' steps are tuned to in the first transitions, and how fast.
_ACCEPTANCE, _RATE = 0.8, 0.6
# Draws from which the chains' starts are resampled.
_STARTS = 1000


@dataclass(frozen=True)
class Bridge(Method):
    r"""Bridge sampling between the law that :class:`inference.Adaptive` adapts and chains on the posterior.

    The chains begin at weighted draws of the law, resampled, and move by Hamiltonian Monte Carlo. The error adds the
    spread of fresh draws of the law and the spread between the chains.

    Warning:
        Asymptotic only, in the number of draws and the length of the chains; the estimate is no bound, not even in
        expectation. Two-sided where k-hat of the fresh draws shows a variance, though every term of the estimate is
        bounded; elsewhere the interval is Markov's, of the plain mean weight. A mode of the posterior that the law
        does not reach is seen by neither half: the value then is log p(x) less the log of the mode's share, with a
        narrow interval.

    References:
        Meng, Wong, "Simulating ratios of normalizing constants via a simple identity", 1996. Gronau et al., "A tutorial
        on bridge sampling", 2017, arXiv 1703.05984. Frühwirth-Schnatter, "Estimating marginal likelihoods for mixture
        and Markov switching models using bridge sampling techniques", 2004.

    Args:
        num_samples: S, fresh draws of the law per datum.
        num_chains: Chains on the posterior of each datum, at least two.
        num_steps: Draws kept of each chain.
        num_warmup: Transitions before, in which steps are tuned.
        num_leapfrog: Leapfrog steps of a transition.
    """

    num_samples: int = 10_000
    num_chains: int = 50
    num_steps: int = 20
    num_warmup: int = 20
    num_leapfrog: int = 4
    name: ClassVar[str] = "bridge"

    def __post_init__(self) -> None:
        check_count(self.num_chains, "num_chains", 2)
        for name in ("num_samples", "num_steps", "num_warmup", "num_leapfrog"):
            check_count(getattr(self, name), name)

    @torch.no_grad()
    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If model, guide or data are unfit, or no data argument has a row for each datum.
            FloatingPointError: If the joint density is NaN or plus infinity at a draw of the law.
        """
        parts = []
        for log_joint, law in Adaptive(self.num_samples).adapted(problem):
            drawn = torch.cat(list(fresh_log_weights(log_joint, law, self.num_samples)))
            plain = from_weights(summarise([drawn], self.num_samples), problem.level)
            estimate = bridge_estimate(self._chain_log_weights(log_joint, law), drawn)
            parts.append(with_value(plain, *estimate, method=self.name))
        log_joint = problem.log_joint
        gradients = self.num_chains * (self.num_warmup + self.num_steps) * self.num_leapfrog
        return replace(concatenate(parts), evaluations=log_joint.evaluations / log_joint.num_data + gradients)

    def refined(self) -> Bridge:
        """With four times the draws on both sides."""
        return replace(self, num_samples=4 * self.num_samples, num_steps=4 * self.num_steps)

    def _chain_log_weights(self, log_joint: LogJoint, law: Student) -> Tensor:
        """Log joint density less that of the law, at draws of the posterior: (steps, chains, N) in nats."""
        kept = []
        with pyro.validation_enabled(False):
            target = whitened(log_joint, law.gaussian, self.num_chains)
            v = law.gaussian.whiten(_resampled(log_joint, law, self.num_chains)).contiguous()  # as the graph's
            chains = Chains(v, *target(v))
            beta = torch.ones_like(chains.value[0])
            step = beta * v.shape[-1] ** -0.25
            for i in range(self.num_warmup + self.num_steps):
                chains, acceptance = transition(target, chains, beta, step, self.num_leapfrog)
                if i < self.num_warmup:
                    step = step * torch.exp(_RATE * (acceptance.mean(0) - _ACCEPTANCE))
                else:
                    kept.append(chains.value - law.log_det - law.log_prob_whitened(chains.v))
        return torch.stack(kept)


def _resampled(log_joint: LogJoint, law: Student, num_chains: int) -> Tensor:
    """Draws of the law, (C, N, d), chosen by their weights."""
    u, log_density = law.draw(_STARTS)
    weights = torch.softmax((log_joint(u) - log_density).nan_to_num(nan=-math.inf), 0).nan_to_num(1.0)
    chosen = torch.multinomial(weights.mT, num_chains, replacement=True).mT
    return u.gather(0, chosen.unsqueeze(-1).expand(-1, -1, u.shape[-1]))


def bridge_estimate(posterior: Tensor, proposal: Tensor) -> Estimate:
    r"""Meng and Wong's estimate of a normalising constant, with its error.

    .. math:: \sum_{s} \operatorname{logit}^{-1}(\ell_s - c + \log \tfrac MS)
        = \sum_{m} \operatorname{logit}^{-1}(c - \ell_m - \log \tfrac MS)

    is solved for c = log p(x) by bisection; both sides are monotone in c.

    Args:
        posterior: Log joint density less the proposal's at draws of the posterior, (T, C, N): T in each of C chains
            that are independent of one another; M = T C.
        proposal: The same at independent draws of the proposal, (S, N).

    Returns:
        log p(x_n), (N,) in nats, with the standard error by the delta method.
    """
    num_chains, ratio = posterior.shape[1], math.log(posterior[..., 0].numel() / len(proposal))
    flat = posterior.flatten(0, 1)
    finite = torch.cat([flat, proposal]).nan_to_num(neginf=math.inf).amin(0)
    # Here one side outweighs the other for certain.
    low = finite + ratio - abs(ratio) - 50
    high = torch.maximum(flat.amax(0), proposal.amax(0)) + ratio + abs(ratio) + 50
    for _ in range(80):
        value = (low + high) / 2
        above = torch.sigmoid(proposal - value + ratio).sum(0) < torch.sigmoid(value - flat - ratio).sum(0)
        low, high = torch.where(above, low, value), torch.where(above, value, high)
    theirs = torch.sigmoid(proposal - value + ratio)
    means = torch.sigmoid(value - posterior - ratio).mean(0)  # of each chain, (C, N)
    variance = theirs.var(0) / len(proposal) / theirs.mean(0).square()
    variance = variance + means.var(0) / num_chains / means.mean(0).square()
    return Estimate(value, variance.sqrt().nan_to_num(nan=math.inf))
