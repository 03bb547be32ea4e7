"""The base of every objective: from a bound per data point to a loss that Pyro and torch can train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from inference.core.checks import check_count
from inference.core.draw import Draw
from inference.core.handlers import Site
from inference.core.run import Program, run_guide, run_pair
from inference.objectives.schedules import Schedule


@dataclass
class Pair:
    """A pair with its arguments, as an objective sees it.

    Attributes:
        model: Pyro model.
        guide: Pyro guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plate: Name of the plate over the data, ``"data"`` if None.
        plate_scale: Full size of that plate over its size in this call, as the last run found it.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plate: str | None = None
    plate_scale: float = 1.0

    def draw(self, num_samples: int) -> Draw:
        """Run the pair once with ``num_samples`` reparameterised samples per datum, with gradient.

        Raises:
            ValueError: If the pair is none (see :func:`inference.core.run.run_pair`) or a latent is not reparameterised.
        """
        draw = run_pair(
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            num_samples=num_samples,
            plate=self.plate,
            expose_params=True,
        )
        for name in draw.latents:
            if not draw.guide_sites[name].fn.has_rsample:
                raise ValueError(
                    f"expected a reparameterised law at guide site {name!r}, got "
                    f"{type(draw.guide_sites[name].fn).__name__} without rsample"
                )
        self.plate_scale = draw.layout.plate_scale
        return draw

    def run_guide(self) -> dict[str, Site]:
        """Latent sites of one run of the guide alone."""
        return run_guide(self.guide, self.args, self.kwargs, expose_params=True)


class Objective(pyro.infer.ELBO):
    """Base of all objectives: a subclass gives :meth:`bound`, this class makes losses and gradients of it.

    The loss is minus the *sum* of the bound over the data, times the plate's scale where the pair subsamples.

    Args:
        num_particles: Samples per datum, drawn side by side.
        plate: Name of the plate over the data, ``"data"`` if None.

    Attributes:
        step: Training steps so far, (); part of a checkpoint.
    """

    def __init__(self, num_particles: int = 1, *, plate: str | None = None) -> None:
        check_count(num_particles, "num_particles")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.plate = plate
        self.step = torch.zeros((), dtype=torch.int64)

    def advance(self) -> None:
        """Count one training step; :func:`inference.training.fitting.fit` and ``SVI`` do so by themselves."""
        self.step = self.step + 1

    def bound(self, pair: Pair) -> Tensor:
        """The objective per datum, to be maximised: (N,) in nats, unscaled, with gradient."""
        raise NotImplementedError

    def per_datum(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The objective of a pair per datum, (N,) in nats, with gradient."""
        return self.bound(Pair(model, guide, args, kwargs, self.plate))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the sum of the bound over the data, a scalar with gradient."""
        pair = Pair(model, guide, args, kwargs, self.plate)
        total = self.bound(pair).sum()
        return -total if pair.plate_scale == 1.0 else -pair.plate_scale * total

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, detached, after adding its gradient to that of the parameters; what ``SVI`` calls."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
            self.advance()
        return loss.detach()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} runs pairs by inference.core.run, without traces")


def check_weight(weight: float | Schedule, name: str) -> Schedule:
    """A weight or a schedule as a schedule.

    Raises:
        ValueError: If a number is negative or not finite.
    """
    if callable(weight):
        return weight
    if not 0 <= weight < math.inf:
        raise ValueError(f"expected {name} to be a finite number of at least zero or a schedule, got {weight}")
    constant = torch.tensor(float(weight), dtype=torch.float64)
    return lambda _: constant
