"""Classic models as modules that hold their data, as a file keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inference.pair.module import Module
from zoo.classics.discrete import counts_model, markov_model, mixture_model
from zoo.classics.hierarchies import funnel_model, schools_model
from zoo.classics.reference import Classic
from zoo.classics.regressions import horseshoe_model, linear_model, logistic_model, process_model
from zoo.classics.series import walk_model

_PROGRAMS: dict[str, Callable[..., Any]] = {
    "eight schools": schools_model,
    "linear regression": linear_model,
    "Gaussian process": process_model,
    "logistic regression": logistic_model,
    "Gaussian mixture": mixture_model,
    "hidden Markov": markov_model,
    "state space": walk_model,
    "Dirichlet multinomial": counts_model,
    "funnel": funnel_model,
    "horseshoe regression": horseshoe_model,
}


class ClassicModel(Module):
    """A classic model with its data, which it observes where it is called without any; to be taken with ``whole=True``.

    Args:
        name: One of the names of :func:`zoo.classic_models`.
        shapes: Shapes of its data, which come from :meth:`of` or from a file.

    Raises:
        ValueError: If there is no classic model of that name.

    Example:
        >>> from zoo import classic_models
        >>> schools = ClassicModel.of(classic_models()[0])
        >>> schools.data[0][:3]
        tensor([28.,  8., -3.], dtype=torch.float64)
    """

    def __init__(self, name: str, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if name not in _PROGRAMS:
            raise ValueError(f"expected a classic model, one of {', '.join(_PROGRAMS)}, got {name!r}")
        self.name, self.shapes = name, [list(shape) for shape in shapes]
        for place, shape in enumerate(self.shapes):
            self.register_buffer(f"data_{place}", torch.zeros(shape, dtype=torch.float64))

    @classmethod
    def of(cls, classic: Classic) -> ClassicModel:
        """The module of a classic model, with its data."""
        model = cls(classic.name, [list(value.shape) for value in classic.args])
        for own, value in zip(model.data, classic.args, strict=True):
            own.copy_(value)
        return model

    @property
    def data(self) -> tuple[Tensor, ...]:
        """The model's arguments."""
        return tuple(self.get_buffer(f"data_{place}") for place in range(len(self.shapes)))

    def forward(self, *args: Tensor) -> Any:
        """Run the program on its own data, or on others."""
        return _PROGRAMS[self.name](*(args or self.data))

    def config(self) -> dict[str, Any]:
        """Name and shapes, from which the instance is built again."""
        return {"name": self.name, "shapes": self.shapes}
