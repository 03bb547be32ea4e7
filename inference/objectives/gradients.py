"""Gradients of importance-weighted objectives, split into the path derivative and the score terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_dependence
from inference.pair.draw import Draw


@dataclass(frozen=True)
class GradientParts:
    """The log weights of a draw, and the parts that their gradient is made of; each (S, N) in nats.

    Attributes:
        log_weights: log p(x, z) - log q(z | x), with its whole gradient.
        log_joint: log p(x, z) at fixed z: the gradient of the model alone.
        log_guide: log q(z | x) at fixed z: the gradient of the guide's density alone.
    """

    log_weights: Tensor
    log_joint: Tensor
    log_guide: Tensor

    @property
    def path(self) -> Tensor:
        """Zero, with the gradient of the log weights that goes through z alone."""
        return self.log_weights - self.log_joint + self.log_guide


def gradient_parts(draw: Draw) -> GradientParts:
    """Run a pair again at the values of a draw, and so split the gradient of its log weights.

    The difference of the two runs is the path: what both have in common cancels. Without gradient one run is enough.

    Raises:
        ValueError: If the two runs would differ by more than the path (batch normalisation or dropout in train mode),
            or a site carries a scale beyond the plate's.
    """
    fixed = at_fixed_latents(draw) if torch.is_grad_enabled() else draw
    return GradientParts(draw.log_weights, fixed.log_joint, fixed.log_guide)


def at_fixed_latents(draw: Draw) -> Draw:
    """Both halves of a pair run again at the latents of a draw, through which no gradient flows.

    Raises:
        ValueError: If a module's output is not determined by its input: batch normalisation or dropout in train mode.
    """
    values = dict(draw.subsamples) | {name: z.detach() for name, z in draw.guide_values.items()}
    with refuse_batch_dependence(*draw.call.programs):
        return draw.call.run(draw.num_samples, values=values, expose_params=True)


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one over the first dimension, without gradient."""
    return log_weights.detach().softmax(0)


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another of the same shape."""
    return value.detach() + (surrogate - surrogate.detach())
