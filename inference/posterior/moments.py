"""Gaussians from the moments of draws."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from inference.core.memory import at_once
from inference.distributions.batched_gaussian import Gaussian
from inference.pair.run import Program
from inference.posterior.log_joint import LogJoint

# Draws of the guide, or the prior, that the Gaussian is fitted to, at least; and rows of them drawn side by side.
_DRAWS, _DRAWN_ROWS = 1000, 2**13


def gaussian_of_draws(log_joint: LogJoint, guide: Program | None, widening: float) -> Gaussian:
    """The Gaussian with the moments of the guide's draws, or the prior's where there is no guide, widened.

    Args:
        log_joint: Of the model; its coordinates are the Gaussian's.
        guide: Pyro guide.
        widening: Factor on the standard deviations.
    """
    total = max(_DRAWS, 20 * log_joint.dim)
    count = min(total, at_once(_DRAWN_ROWS, log_joint.num_data))
    counts = [count] * -(-total // count)
    draws = (log_joint.sample_prior(c) if guide is None else log_joint.draw_starts(guide, c) for c in counts)
    loc, covariance = _moments(draws)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    rounding = 100 * torch.finfo(loc.dtype).eps * variances.mean(-1, keepdim=True)
    factor = torch.linalg.cholesky(covariance + torch.diag_embed(rounding.expand_as(variances)))
    return Gaussian(loc, widening * factor)


def _moments(draws: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Means (N, d) and covariances (N, d, d) of draws that come in blocks (S', N, d)."""
    num, shift, first, second = 0, None, None, None
    for u in draws:
        shift = u.mean(0) if shift is None else shift
        residual = u - shift
        product = torch.einsum("sni,snj->nij", residual, residual)
        first = residual.sum(0) if first is None else first + residual.sum(0)
        second = product if second is None else second + product
        num += len(u)
    assert shift is not None
    assert first is not None
    assert second is not None
    mean = first / num
    return shift + mean, second / num - mean.unsqueeze(-1) * mean.unsqueeze(-2)
