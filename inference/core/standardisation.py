"""Standardisation by the data's mean and one global scale, carried as buffers."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inference.core.checks import check_finite, check_layout
from inference.core.sources import as_tensors, blocks_of

Self = TypeVar("Self", bound="StandardisesData")


class Standardise(nn.Module):
    r"""The map x -> (x - shift) / scale, with the data's mean as shift and *one* scale for all dimensions.

    One scale, because scaling each dimension by itself would change the model: principal components and IMA
    contrasts are not invariant to it. The default is the identity.

    Args:
        data_dim: D.

    Attributes:
        shift: (D,) buffer.
        scale: () buffer.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, data_dim: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(data_dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, x: Any) -> None:
        """Take shift and scale from data (N, D): the mean, and the root mean variance over dimensions.

        Args:
            x: A tensor, an array (memory-mapped or not) or a data frame, read block by block.

        Raises:
            ValueError: If the data are constant, not finite or of the wrong shape.
        """
        x = as_tensors(x)
        check_layout(x, data_dim=len(self.shift))
        check_finite(x)
        blocks = blocks_of(x)
        mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(x)
        scale = (torch.stack([(block.double() - mean).square().sum() for block in blocks]).sum() / x.numel()).sqrt()
        if not scale > math.sqrt(torch.finfo(self.scale.dtype).tiny):
            raise ValueError(f"expected data that vary, got a standard deviation of {float(scale)}")
        self.shift.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """(x - shift) / scale."""
        return (x - self.shift) / self.scale

    def inverse(self, y: Tensor) -> Tensor:
        """The x (..., D) of standardised values (..., D)."""
        return torch.addcmul(self.shift, y, self.scale)  # in one pass over the memory


# Beyond this ratio of the data's scale, or distance from the origin, to the network's unit, training is slow or fails.
_FAR = 10.0
_LOOKED_AT = 4096  # rows


@torch.no_grad()
def far_from_unit(module: nn.Module, x: Any) -> str:
    """What is wrong with data (N, D) for a module that sees them through a :class:`Standardise`; empty if nothing."""
    own = getattr(module, "standardise", None)
    matrix = isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 2 and len(x) > 1
    if not matrix or not isinstance(own, Standardise) or x.shape[1] != len(own.shift):
        return ""
    y = own(x[:_LOOKED_AT]).double()
    size = float((y - y.mean(0)).square().mean().sqrt())
    off = float(y.mean(0).abs().max())
    if 1 / _FAR < size < _FAR and off <= _FAR:
        return ""
    return (
        f"expected data near the unit of {type(module).__name__}, got a standard deviation of {size:.3g} and "
        f"means up to {off:.3g} in that unit"
    )


class StandardisesData:
    """Mixin of models and guides that see their data through a :class:`Standardise`, ``standardise``."""

    standardise: Standardise

    def standardise_by(self: Self, x: Any) -> Self:
        """Let network and noise work in units of ``x`` (N, D), its mean and one global scale; returns the instance.

        Raises:
            ValueError: If ``x`` is not (N, D), not finite or constant.
        """
        self.standardise.fit(x)
        return self
