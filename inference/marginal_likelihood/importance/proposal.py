"""Proposal of adaptive importance sampling: adapted Student-t distributions mixed with the guide, per data point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from inference.core.checks import check_log_weights
from inference.core.memory import at_once
from inference.distributions.student_t import Students
from inference.marginal_likelihood.base.method import Problem
from inference.marginal_likelihood.importance.defensive_mixture import check_same, guide_density
from inference.pair.run import Program
from inference.posterior.log_joint import LogJoint

# Coordinates of draws, of all components, side by side.
_ELEMENTS = 2**21

# Share of the draws that are the guide's.
_GUIDE_SHARE = 0.2

# Draws at which the guide's density is compared with itself.
_COMPARED = 8


@dataclass(frozen=True)
class Proposal:
    """A mixture of adapted Student-t distributions with the guide, so that regions which the guide covers are kept.

    Attributes:
        log_joint: Log joint density of the data that it is for.
        mixture: The adapted Student-t distributions.
        guide: Pyro guide whose density is known; None where there is none.
        density: Its log-density of u (S, N, d), (S, N) in nats.
    """

    log_joint: LogJoint
    mixture: Students
    guide: Program | None = None
    density: Callable[[Tensor], Tensor] | None = None

    def log_prob(self, u: Tensor, share: float = _GUIDE_SHARE) -> Tensor:
        """Log-density at u (S, N, d), (S, N) in nats, where the guide has a share of the draws."""
        log_mixture = self.mixture.log_prob(u)
        if self.density is None or share == 0:
            return log_mixture
        # Outside the guide's support its coordinates are NaN, and its density is zero.
        with pyro.validation_enabled(False):
            log_guide = self.density(u).nan_to_num(nan=-math.inf)
        return torch.logaddexp(math.log(share) + log_guide, math.log1p(-share) + log_mixture)

    def draws(self, num_samples: int) -> list[tuple[Iterator[Tensor], int]]:
        """Draws of the guide and of the mixture, in blocks u (S', N, d), and how many of each."""
        guides = 0 if self.guide is None else round(_GUIDE_SHARE * num_samples)
        strata = [(self._of_mixture(num_samples - guides), num_samples - guides)]
        return [(self._of_guide(guides), guides), *strata] if guides else strata

    def log_weights(self, num_samples: int) -> list[tuple[Iterator[Tensor], int]]:
        """Log weights of new draws of each stratum, in blocks (S', N) in nats, and how many of each.

        Raises:
            FloatingPointError: If one is NaN or plus infinity.
        """
        strata = self.draws(num_samples)
        share = 1 - strata[-1][1] / num_samples
        return [(self._weighed(blocks, share), size) for blocks, size in strata]

    def _weighed(self, blocks: Iterator[Tensor], share: float) -> Iterator[Tensor]:
        for u in blocks:
            log_weights = unvalidated_log_joint(self.log_joint, u) - self.log_prob(u, share)
            # A guide's draw outside of the model's support, where it has no coordinates, has weight zero.
            log_weights = torch.where(u.isnan().any(-1), -math.inf, log_weights)
            check_log_weights(log_weights)
            yield log_weights

    def _of_mixture(self, num_samples: int) -> Iterator[Tensor]:
        return (self.mixture.draw(size)[0] for size in self._sizes(num_samples))

    def _of_guide(self, num_samples: int) -> Iterator[Tensor]:
        guide = self.guide
        assert guide is not None
        return (self.log_joint.draw_guide(guide, size) for size in self._sizes(num_samples))

    def _sizes(self, total: int) -> list[int]:
        side = at_once(_ELEMENTS, len(self.mixture.components) * self.log_joint.num_data * self.log_joint.width)
        return [min(side, total - first) for first in range(0, total, side)]


def guide_with_density(problem: Problem) -> tuple[Program, Callable[[Tensor], Tensor]] | tuple[None, None]:
    """The guide with its density, or nothing where it has none in the model's coordinates."""
    if problem.call.guide is None:
        return None, None
    try:
        density = guide_density(problem)
        u, log_guide = problem.log_joint.sample_guide(problem.call.guide, _COMPARED)
        check_same(log_guide, density(u))
    except (ValueError, NotImplementedError):
        return None, None
    return problem.call.guide, density


def unvalidated_log_joint(log_joint: LogJoint, u: Tensor) -> Tensor:
    """The log joint density at u, without Pyro's validation, which refuses values far out."""
    with pyro.validation_enabled(False):
        return log_joint(u)
