r"""Hamiltonian Monte Carlo (HMC) on the geometric path from a Gaussian to a model's joint density, for all data.

.. math:: \pi_\beta(v) \propto N(v; 0, I)^{1 - \beta} \, p(x, m + L v)^\beta

Chains move in coordinates v that the Gaussian N(m, L L') whitens. Only :func:`tuned` adapts to them, for warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inference.core.seeding import random_states, set_random_states
from inference.distributions.batched_gaussian import Gaussian
from inference.numerics.graphs import Replay, flat_graph, folded, scripted
from inference.posterior.log_joint import LogJoint

Tensors = Sequence[Tensor]
Function = Callable[..., Tensors]
# The log-density (S, N) of v (S, N, d), and its gradient.
Target = Callable[[Tensor], Tensors]

# A trajectory of fixed length can return to where it began, so each chain's steps are shorter by up to this share.
_JITTER = 0.4

# Transitions until one is recorded, which takes about as long as so many.
_WAIT = 20

# The acceptance that steps are tuned to, and how fast.
_ACCEPTANCE, _RATE = 0.8, 0.6


class Chains(NamedTuple):
    """State of the chains: positions, and the joint density there.

    Attributes:
        v: Whitened positions, (S, N, d).
        value: Log joint density of v, (S, N) in nats.
        gradient: Its gradient, (S, N, d).
    """

    v: Tensor
    value: Tensor
    gradient: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """Log joint density less the log-density of the Gaussian, (S, N) in nats: what the path integrates."""
        return self.value + 0.5 * (self.v.square().sum(-1) + self.v.shape[-1] * math.log(2 * math.pi))


def whitened(log_joint: LogJoint, start: Gaussian, num_chains: int) -> Target:
    """The log joint density of whitened coordinates with its gradient, traced to a flat graph where that succeeds.

    Args:
        log_joint: The log joint density that chains sample.
        start: The Gaussian that whitens.
        num_chains: S; the function takes v of shape (S, N, d) alone.

    Returns:
        A function of v that returns the log-density (S, N) in nats and its gradient (S, N, d).
    """
    log_det = start.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def target(v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            value = log_joint(start.colour(v)) + log_det
            (gradient,) = torch.autograd.grad(value.sum(), v)
        return value.detach(), gradient

    v = torch.randn(num_chains, *start.loc.shape, dtype=start.loc.dtype, device=start.loc.device)
    return traced(target, [v], [-0.5 * v])


def traced(function: Function, examples: Sequence[Tensor], others: Sequence[Tensor]) -> Function:
    """A function replayed from a flat graph of tensor operations, without Python; itself where it has no such graph.

    Where a branch, or a check of arguments, would go another way than in the graph, the function itself is run. Noise
    is drawn as the function draws it. Tracing leaves the random state as it was.

    Args:
        function: Of tensors, to tensors; nothing else may change between its calls.
        examples: Where to trace it.
        others: Where to compare the graph with the function, of the same shapes.
    """
    states = random_states()
    try:
        function(*examples)  # a first call may try out how a model can be run, which is no part of the computation
        flat = folded(flat_graph(lambda: function(*examples), examples))
        replay = scripted(flat)
        set_random_states(states)
        expected = function(*others)
        set_random_states(states)
        same = all(torch.equal(a, b) for a, b in zip(replay(others), expected))
    except Exception:  # a user's model may fail to trace in any way
        return function
    finally:
        set_random_states(states)
    return _guarded(function, replay, len(expected), flat.assumes) if same else function


def _guarded(function: Function, replay: Replay, number: int, assumes: bool) -> Function:
    """The first results of a replay; those of the function itself where what it assumes does not hold."""

    def run(*inputs: Tensor) -> Tensors:
        states = random_states() if assumes else []
        results = replay(inputs)
        if not assumes or bool(results[number]):
            return results[:number]
        set_random_states(states)
        return function(*inputs)

    return run


class Transitions:
    """Transitions of one target, see :func:`transition`, which are replayed without Python once there are many.

    Args:
        target: See :func:`whitened`.
        num_leapfrog: Leapfrog steps.
    """

    def __init__(self, target: Target, num_leapfrog: int) -> None:
        self._target, self._num_leapfrog = target, num_leapfrog
        self._taken = 0
        self._take: Function = self._by_python

    def __call__(self, chains: Chains, beta: Tensor, step: Tensor) -> tuple[Chains, Tensor]:
        """One transition from where the chains are, with its acceptance probabilities, (S, N)."""
        inputs, self._taken = [*chains, beta, step], self._taken + 1
        if self._taken == _WAIT:
            self._take = traced(self._by_python, inputs, [*chains, 0.5 * beta, 0.5 * step])
        v, value, gradient, acceptance = self._take(*inputs)
        return Chains(v, value, gradient), acceptance

    def _by_python(self, v: Tensor, value: Tensor, gradient: Tensor, beta: Tensor, step: Tensor) -> Tensors:
        chains, acceptance = transition(self._target, Chains(v, value, gradient), beta, step, self._num_leapfrog)
        return [*chains, acceptance]


def transition(target: Target, chains: Chains, beta: Tensor, step: Tensor, num_leapfrog: int) -> tuple[Chains, Tensor]:
    r"""One transition of Hamiltonian Monte Carlo (HMC), which leaves :math:`\pi_\beta` invariant and is reversible.

    Args:
        target: See :func:`whitened`.
        chains: Where they are.
        beta: Inverse temperature of each data point, (N,).
        step: Leapfrog step of each data point, (N,); neither may depend on where the chains are.
        num_leapfrog: Leapfrog steps.

    Returns:
        The chains after the step, and its acceptance probabilities, (S, N).

    References:
        Neal, "MCMC using Hamiltonian dynamics", 2011, arXiv 1206.1901.
    """
    beta, heat = beta.unsqueeze(-1), 1 - beta.unsqueeze(-1)
    length = (step * (1 - _JITTER * torch.rand_like(chains.value))).unsqueeze(-1)

    def force(at: Chains) -> Tensor:
        return beta * at.gradient - heat * at.v

    def energy(at: Chains, momentum: Tensor) -> Tensor:
        kinetic = heat * at.v.square() + momentum.square()
        return 0.5 * kinetic.sum(-1) - beta.squeeze(-1) * at.value

    first = torch.randn_like(chains.v)
    new, momentum = chains, first + 0.5 * length * force(chains)
    for i in range(num_leapfrog):
        v = new.v + length * momentum
        new = Chains(v, *target(v))
        momentum = momentum + (1.0 if i < num_leapfrog - 1 else 0.5) * length * force(new)
    acceptance = acceptance_probability(energy(chains, first), energy(new, momentum))
    accepted = torch.rand_like(acceptance) < acceptance
    wide = accepted.unsqueeze(-1)
    moved = Chains(
        torch.where(wide, new.v, chains.v),
        torch.where(accepted, new.value, chains.value),
        torch.where(wide, new.gradient, chains.gradient),
    )
    return moved, acceptance


def tuned(step: Tensor, acceptance: Tensor) -> Tensor:
    """The leapfrog steps (N,), adapted towards the target acceptance from the acceptance of a transition (S, N)."""
    return step * torch.exp(_RATE * (acceptance.mean(0) - _ACCEPTANCE))


def acceptance_probability(before: Tensor, after: Tensor) -> Tensor:
    """Metropolis acceptance probability of a change of energy; zero where the trajectory diverged."""
    return (before - after).clamp(max=0).exp().nan_to_num(0.0)
