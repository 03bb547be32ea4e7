"""Gradients of importance-weighted objectives, taken apart by what they flow through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_laws
from inference.core.draw import Draw
from inference.core.run import run_pair
from inference.objectives.base import Pair


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


def gradient_parts(pair: Pair, num_samples: int) -> GradientParts:
    """Draw from a pair, run it again at the values drawn, and so split the gradient of its log weights.

    The difference of the two runs is the path: what both have in common cancels. Without gradient one run is enough.

    Args:
        pair: The pair with its arguments.
        num_samples: S.

    Raises:
        ValueError: If the two runs would differ by more than the path (batch normalisation or dropout in train mode),
            a site carries a scale beyond the plate's, or as :meth:`Pair.draw`.
    """
    draw = pair.draw(num_samples)
    fixed = at_fixed_latents(pair, draw) if torch.is_grad_enabled() else draw
    return GradientParts(draw.log_weights, fixed.total(fixed.model_sites), fixed.total(fixed.guide_sites))


def draw_without_gradient(pair: Pair, num_samples: int) -> Draw:
    """Samples of any law, reparameterised or not, through which nothing learns."""
    with torch.no_grad():
        draw = run_pair(pair.model, pair.guide, pair.args, pair.kwargs, num_samples=num_samples, plate=pair.plate)
    pair.plate_scale = draw.layout.plate_scale
    return draw


def at_fixed_latents(pair: Pair, draw: Draw) -> Draw:
    """Both halves of a pair run again at the latents of a draw, through which no gradient flows.

    Raises:
        ValueError: If a module's output is not settled by its input: batch normalisation or dropout in train mode.
    """
    values = dict(draw.subsamples) | {name: z.detach() for name, z in draw.latents.items()}
    with refuse_batch_laws(pair.model, pair.guide):
        return run_pair(
            pair.model,
            pair.guide,
            pair.args,
            pair.kwargs,
            num_samples=draw.num_samples,
            plate=pair.plate,
            subsamples=values,
            expose_params=True,
        )


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one over the first dimension, without gradient."""
    return log_weights.detach().softmax(0)


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another of the same shape."""
    return value.detach() + (surrogate - surrogate.detach())
