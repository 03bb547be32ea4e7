"""The base of every objective: from a bound per data point to a loss that Pyro and torch can train."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import pyro.infer
import torch
from torch import Tensor

from inference.core.checks import check_count, check_number
from inference.core.display import as_html, described, settings
from inference.objectives.gradients import at_fixed_latents
from inference.objectives.schedules import Schedule
from inference.pair.call import Call
from inference.pair.draw import Draw
from inference.pair.run import Program


class Terms(NamedTuple):
    """An objective per data point, and what its sum over the data is multiplied by.

    Attributes:
        bound: (N,) in nats, to be maximised, with gradient.
        plate_scale: Full size of the data plate over its size in this call; 1 unless the pair subsamples.
    """

    bound: Tensor
    plate_scale: float = 1.0


class Objective(pyro.infer.ELBO):
    """Base of all objectives: a subclass gives a bound of a draw, this class makes losses and gradients of it.

    The loss is minus the *sum* of the bound over the data, times the plate's scale where the pair subsamples: the
    base applies the scale, whatever the subclass does, and subtracts what the guide observes or adds by
    ``pyro.factor``: it trains, but is no part of the bound. A subclass gives :meth:`bound`, or :meth:`bound_at` where
    the bound changes along training, or :meth:`terms` where it needs other runs of the pair than one draw.

    Args:
        num_particles: Samples per data point, drawn side by side.
        plate: Name of the plate over the data, ``"data"`` if None.

    Attributes:
        whole: Whether all data are one data point, whatever the plates; :func:`inference.fit` sets it.
        step: Training steps so far, (); part of a checkpoint.
        reparameterised: Whether the gradient flows through the samples; False draws without gradient.
    """

    reparameterised: ClassVar[bool] = True

    def __init__(self, num_particles: int = 1, *, plate: str | None = None) -> None:
        check_count(num_particles, "num_particles")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.plate, self.whole = plate, False
        self.step = torch.zeros((), dtype=torch.int64)

    def __repr__(self) -> str:
        """The call that makes it: ``IWELBO(num_particles=5)``."""
        return f"{type(self).__name__}({described(self._settings())})"

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._settings())

    def _settings(self) -> dict[str, Any]:
        return settings(self)

    @property
    def num_samples(self) -> int:
        """Samples per data point of one draw."""
        return self.num_particles

    def advance(self) -> None:
        """Count one training step; :func:`inference.fit` and ``SVI`` do so by themselves."""
        self.step = self.step + 1

    def bound(self, draw: Draw) -> Tensor:
        """The objective of a draw per data point, to be maximised: (N,) in nats, unscaled, with gradient."""
        raise NotImplementedError

    def bound_at(self, draw: Draw, step: Tensor) -> Tensor:  # noqa: ARG002
        """The objective of a draw at a training step, (); :meth:`bound` where it is the same at all steps."""
        return self.bound(draw)

    def terms(self, call: Call, step: Tensor) -> Terms:
        """The objective of a call per data point, at a training step.

        Raises:
            ValueError: If model and guide are not a valid pair (see :meth:`inference.pair.call.Call.run`), or a
                latent is not reparameterised.
        """
        draw = self._draw(call)
        bound, extra = self.bound_at(draw, step), draw.training_terms
        if extra is None:
            return Terms(bound, draw.layout.plate_scale)
        if not self.reparameterised:  # then the draw has no gradient
            extra = at_fixed_latents(draw).training_terms
        assert extra is not None
        return Terms(bound - extra.mean(0), draw.layout.plate_scale)

    def _draw(self, call: Call) -> Draw:
        if not self.reparameterised:
            with torch.no_grad():
                return call.run(self.num_samples, enumerate_guide=True)
        draw = call.run(self.num_samples, expose_params=True, enumerate_guide=True)
        for name in draw.latents:
            if not draw.guide_sites[name].fn.has_rsample:
                raise ValueError(
                    f"expected a reparameterised distribution at guide site {name!r}, got "
                    f"{type(draw.guide_sites[name].fn).__name__} without rsample"
                )
        return draw

    def per_datum(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The objective of a pair per data point, (N,) in nats, with gradient."""
        return self.terms(Call(model, guide, args, kwargs, self.plate, whole=self.whole), self.step).bound

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the sum of the bound over the data, a scalar with gradient."""
        bound, scale = self.terms(Call(model, guide, args, kwargs, self.plate, whole=self.whole), self.step)
        total = bound.sum()
        return -total if scale == 1.0 else -scale * total

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
        raise NotImplementedError(f"{type(self).__name__} runs pairs by inference.pair.call, without traces")


def check_objective(objective: Any) -> None:
    """Refuse what is no objective: a name, or the class of one.

    Raises:
        TypeError: With what would be one.
    """
    if isinstance(objective, type):
        raise TypeError(f"expected an objective, got a class of them: did you mean objective={objective.__name__}()?")
    if not any(callable(getattr(objective, name, None)) for name in ("differentiable_loss", "loss_and_grads")):
        raise TypeError(
            f"expected an objective, such as AnalyticKLELBO() or any pyro.infer.ELBO, got {type(objective).__name__}"
        )


def check_weight(weight: float | Schedule, name: str) -> Schedule:
    """A weight or a schedule as a schedule.

    Raises:
        ValueError: If a number is negative or not finite.
    """
    if callable(weight):
        return weight
    constant = torch.tensor(check_nonnegative(weight, name), dtype=torch.float64)
    return lambda _: constant


def check_nonnegative(value: float, name: str) -> float:
    """A number of nats or a weight.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    check_number(value, name)
    if not 0 <= value < math.inf:
        raise ValueError(f"expected {name} to be a finite number of at least zero, got {value}")
    return float(value)
