r"""Bridge sampling of the evidence, between an adapted mixture t and draws of the posterior.

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

from inference.core.checks import check_count
from inference.core.estimates import Estimate
from inference.distributions.batched_gaussian import Gaussian
from inference.marginal_likelihood.base.intervals import evidence_from_weights, replace_estimate
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.importance.adaptive_mixture import Adaptive, widened
from inference.marginal_likelihood.importance.proposal import Proposal
from inference.posterior.hmc import Chains, Transitions, tuned, whitened
from inference.weights.summary import summarise

# Draws from which the chains' starts are resampled.
_STARTS = 1000


@dataclass(frozen=True)
class Bridge(Method):
    r"""Bridge sampling between the mixture that :class:`inference.Adaptive` adapts and chains on the posterior.

    The chains begin at weighted draws of the mixture, resampled, which divides them between the modes that guide or
    adapted distributions cover; from there they move by Hamiltonian Monte Carlo, and need not cross. The error adds the
    spread of fresh draws of the mixture and the spread between the chains.

    Warning:
        Asymptotic only, in the number of draws and the length of the chains; the estimate is not a bound, not even in
        expectation. Two-sided where k-hat of the fresh draws shows a variance, though every term of the estimate is
        bounded, and they are worth a quarter of their number; elsewhere the interval is Markov's, of the plain mean
        weight. Modes are looked for as :class:`inference.Adaptive` does, with its notes; one that the mixture does not
        reach is seen by neither half: the value then is log p(x) less the log of the mode's share, with a narrow
        interval. So it is, more rarely, at the far ends of thin bent ridges.

    References:
        Meng, Wong, "Simulating ratios of normalizing constants via a simple identity", 1996. Gronau et al., "A tutorial
        on bridge sampling", 2017, arXiv 1703.05984. Frühwirth-Schnatter, "Estimating marginal likelihoods for mixture
        and Markov switching models using bridge sampling techniques", 2004.

    Args:
        num_samples: S, fresh draws of the mixture per data point.
        num_chains: Chains on the posterior of each data point, at least two.
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
            ValueError: If the data are not finite or have the wrong shape, model and guide are not a valid pair, or no
                data argument has a row for each data point.
            FloatingPointError: If the joint density is NaN or plus infinity at a draw of the mixture.
        """
        proposal, _, within, starts = Adaptive(self.num_samples).adapted(problem)
        drawn = torch.cat([block for blocks, _ in proposal.log_weights(self.num_samples) for block in blocks])
        plain = widened(evidence_from_weights(summarise([drawn], self.num_samples), problem.level), starts)
        ours = bridge_estimate(self._chain_log_weights(proposal, within), drawn)
        result = replace_estimate(plain, *ours, method=self.name)
        log_joint = problem.log_joint
        gradients = self.num_chains * (self.num_warmup + self.num_steps) * self.num_leapfrog
        return replace(result, evaluations=log_joint.evaluations / log_joint.num_data + gradients)

    def refined(self) -> Bridge:
        """With four times the draws on both sides."""
        return replace(self, num_samples=4 * self.num_samples, num_steps=4 * self.num_steps)

    def _chain_log_weights(self, proposal: Proposal, scale: Gaussian) -> Tensor:
        """Log joint density less that of the proposal, at draws of the posterior: (steps, chains, N) in nats."""
        kept = []
        log_det = scale.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        with pyro.validation_enabled(False):
            target = whitened(proposal.log_joint, scale, self.num_chains)
            v = scale.whiten(_resampled(proposal, self.num_chains)).contiguous()  # as the graph's
            chains = Chains(v, *target(v))
            beta = torch.ones_like(chains.value[0])
            step = beta * v.shape[-1] ** -0.25
            move = Transitions(target, self.num_leapfrog)
            for i in range(self.num_warmup + self.num_steps):
                chains, acceptance = move(chains, beta, step)
                if i < self.num_warmup:
                    step = tuned(step, acceptance)
                else:
                    kept.append(chains.value - log_det - proposal.log_prob(scale.colour(chains.v)))
        return torch.stack(kept)


def _resampled(proposal: Proposal, num_chains: int) -> Tensor:
    """Draws of the proposal, (C, N, d), chosen by their weights."""
    u = torch.cat([block for blocks, _ in proposal.draws(_STARTS) for block in blocks])
    weights = torch.softmax((proposal.log_joint(u) - proposal.log_prob(u)).nan_to_num(nan=-math.inf), 0).nan_to_num(1.0)
    chosen = torch.multinomial(weights.mT, num_chains, replacement=True).mT
    return u.gather(0, chosen.unsqueeze(-1).expand(-1, -1, u.shape[-1]))


def bridge_estimate(posterior: Tensor, proposal: Tensor) -> Estimate:
    r"""Bridge-sampling estimate of a normalising constant by Meng and Wong, with its error.

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
