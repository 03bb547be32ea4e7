r"""Data that the modes found do not explain: where a narrow peak that no search has met may hold the posterior.

A likelihood that is flat but for a needle gives a search nothing to climb. What shows is that the data are unlike what
the model makes at the modes found: with L(u) = log p(x | u) and x' drawn at u,

.. math:: L(u; x) < E L(u; x') - \max(10, 6 \operatorname{sd} L(u; x'))

References:
    Rubin, "Bayesianly justifiable and relevant frequency calculations for the applied statistician", 1984: checks by
    replicated data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference.posterior.log_joint import LogJoint
from inference.posterior.modes import Modes, find_modes, likeliest, together

# Replications of the data, and by how many nats and standard deviations the data have to be less likely than those.
_REPLICATIONS, _LEAST, _DEVIATIONS = 64, 10.0, 6.0

# Curvature, in that of the prior, which a mode has at least where the data have taught something.
_NARROWER = 2.0

# Draws of the further look, half of them from the prior and half from one of twice its width. A peak that attracts less
# than the inverse of it, of the prior's mass, may still be missed.
_DRAWS = 2**18


@torch.no_grad()
def unexplained(log_joint: LogJoint, modes: Modes) -> Tensor:
    """Whether data are much less likely at their best mode than those that the model makes there, (N,)."""
    best = modes.location[0]
    seen, made = log_joint.terms(best).likelihood, log_joint.replicated(best.expand(_REPLICATIONS, -1, -1))
    if made is None:
        return torch.zeros_like(seen, dtype=torch.bool)
    return seen < made.mean(0) - torch.clamp(_DEVIATIONS * made.std(0), min=_LEAST)


def search_unexplained(log_joint: LogJoint, modes: Modes, location: Tensor, scale: Tensor) -> tuple[Modes, Tensor]:
    """The modes, with those of a further look at data that they do not explain, and which of them may hide more, (N,).

    That is so where the data remain unexplained and have taught nothing: the posterior is as wide as the prior. Where
    they have, as of an outlier of a linear model, the look has to do. On a line it leaves out only peaks narrower than
    a ten-thousandth of the prior.

    Args:
        log_joint: Log joint density of a model.
        modes: Its modes.
        location: Origin of the prior's unit, (N, d), see :func:`inference.posterior.modes.prior_scale`.
        scale: The prior's unit, (N, d).
    """
    odd = unexplained(log_joint, modes)
    index = odd.nonzero()[:, 0]
    if len(index) == 0:
        return modes, odd
    rows, starts = log_joint.rows(index), []
    for width in (1.0, 2.0):
        likely = likeliest(rows, _DRAWS // 2, location[index], width)
        starts.append(location.new_full((len(likely), *location.shape), torch.nan).index_copy(1, index, likely))
    found = together(log_joint, modes, find_modes(log_joint, torch.cat(starts), location, scale), location, scale)
    hidden = odd & unexplained(log_joint, found) & _as_wide_as_the_prior(found, scale)
    return found, hidden & (log_joint.dim > 1)


def _as_wide_as_the_prior(modes: Modes, scale: Tensor) -> Tensor:
    """Whether the best mode is hardly narrower than the prior in any direction, (N,)."""
    hessian = modes.hessian[0] * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return torch.linalg.eigvalsh(-hessian)[:, -1] < _NARROWER
