r"""Unconstrained coordinates that resolve both ends of bounded supports.

A number in (0, 1) as close to one as 1e-16 is rounded to it, and what a density says there depends on the rounding. So
does a simplex by stick-breaking with 1 - x. In coordinates both ends are known exactly, by log-sigmoids:

.. math:: \log p(u) = a \log \sigma(u) + b \log \sigma(-u) - \log B(a, b), \quad x = \sigma(u) \sim \mathrm{Beta}(a, b)
"""

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Beta, Dirichlet, Distribution, Independent, biject_to, constraints
from torch.distributions.transforms import IndependentTransform, StickBreakingTransform, Transform
from torch.nn.functional import logsigmoid, pad


def coordinates_of(support: constraints.Constraint) -> Transform:
    """The transform from unconstrained coordinates to a support.

    Raises:
        NotImplementedError: If there is none.
    """
    if isinstance(support, constraints.independent):
        return IndependentTransform(coordinates_of(support.base_constraint), support.reinterpreted_batch_ndims)
    return StickBreaking() if isinstance(support, type(constraints.simplex)) else biject_to(support)


class StickBreaking(StickBreakingTransform):
    """Stick-breaking in logarithms, so that small parts are as exact as large ones, the last too."""

    def _call(self, x: Tensor) -> Tensor:
        return self.log_parts(x).exp().clamp(min=torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:].clamp(min=torch.finfo(y.dtype).tiny)
        return y[..., :-1].clamp(min=torch.finfo(y.dtype).tiny).log() - rest.log() + _offset(y[..., :-1])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Log of the absolute determinant of the derivatives of all parts but the last, (...)."""
        return (self.log_parts(x)[..., :-1] + logsigmoid(_offset(x) - x)).sum(-1)

    def log_parts(self, x: Tensor) -> Tensor:
        """Logs of the parts, (..., K + 1)."""
        x = x - _offset(x)
        return pad(logsigmoid(x), [0, 1]) + pad(logsigmoid(-x).cumsum(-1), [1, 0])


def _offset(x: Tensor) -> Tensor:
    """The coordinates (..., K) of equal parts."""
    return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()


def unrounded(fn: Distribution, raw: Tensor, value: Tensor) -> Tensor | None:
    """What a Beta or Dirichlet distribution's log-density lacks at a value that has been rounded from coordinates.

    Args:
        fn: Distribution, perhaps of several independent values.
        raw: Coordinates.
        value: Their value.

    Returns:
        In nats, by value or by event; None for other distributions.
    """
    while isinstance(fn, Independent | ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, Dirichlet):
        return ((fn.concentration - 1) * (StickBreaking().log_parts(raw) - value.log())).sum(-1)
    if isinstance(fn, Beta):
        ones, zeros = logsigmoid(raw) - value.log(), logsigmoid(-raw) - (1 - value).log()
        return (fn.concentration1 - 1) * ones + (fn.concentration0 - 1) * zeros
    return None
