"""The loss of a training step, by whichever of its methods an objective has it: ours, Pyro's and a user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.infer
import torch
from torch import Tensor

from inference.objectives.base import Objective
from inference.pair.run import Program, modules_of
from inference.training.mixed_precision import Precision, in_precision


class PairLoss:
    """An objective's loss of a pair per data point, with and without its gradient.

    ``RenyiELBO``, ``TraceGraph_ELBO`` and ``ReweightedWakeSleep`` have only ``loss_and_grads``, which looks for param
    statements: there each parameter of the pair's modules is named in one.

    Args:
        objective: Any that ``pyro.infer.SVI`` takes.
        model: Pyro model.
        guide: Pyro guide.
        count: The number of data points of a batch.
        precision: In what the layers compute where there is a gradient.

    Attributes:
        count: By what the loss of a batch is divided.
    """

    def __init__(
        self,
        objective: Any,
        model: Program,
        guide: Program,
        count: Callable[[tuple[Any, ...]], int],
        precision: Precision,
    ) -> None:
        self._objective, self._pair, self.count, self._precision = objective, (model, guide), count, precision
        self._by_steps = _defines(objective, "loss_and_grads") < _defines(objective, "differentiable_loss")
        self._announced = (_announced(model), _announced(guide)) if self._by_steps else self._pair

    def find_parameters(self, batch: tuple[Any, ...]) -> None:
        """Run the pair once, so that a handler outside sees its param statements."""
        if isinstance(self._objective, Objective):
            with torch.no_grad():
                self._objective.differentiable_loss(*self._pair, *batch)
        else:  # some of Pyro's need a gradient
            self._gradients(batch)

    @property
    def is_differentiable(self) -> bool:
        """Whether the loss is a tensor with gradient; else its gradient is added by the objective itself."""
        return not self._by_steps

    def with_gradient(self, batch: tuple[Any, ...]) -> Tensor:
        """The loss of a batch in nats per data point, with gradient."""
        with in_precision(self._precision):
            return self._objective.differentiable_loss(*self._pair, *batch) / self.count(batch)

    def backward(self, batch: tuple[Any, ...], parameters: list[Tensor]) -> Tensor:
        """The loss of a batch in nats per data point, detached, after its gradient has been added to the parameters'.

        Raises:
            ValueError: If no parameter has got one.
        """
        if not self._by_steps:
            loss = self.with_gradient(batch)
            loss.backward()
            return loss.detach()
        with in_precision(self._precision):
            loss = self._gradients(batch)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise ValueError(f"expected {type(self._objective).__name__} to give a gradient, got none")
        for gradient in gradients:
            gradient.div_(self.count(batch))
        return loss / self.count(batch)

    def value(self, batch: tuple[Any, ...]) -> float:
        """The loss of a batch in nats per data point, without gradient."""
        objective = self._objective
        if isinstance(objective, Objective) or not hasattr(objective, "loss"):
            return float(objective.differentiable_loss(*self._pair, *batch)) / self.count(batch)
        return float(objective.loss(*self._pair, *batch)) / self.count(batch)

    def _gradients(self, batch: tuple[Any, ...]) -> Tensor:
        if not self._by_steps:
            return self._objective.differentiable_loss(*self._pair, *batch).detach()
        loss = self._objective.loss_and_grads(*self._announced, *batch)
        parts = loss if isinstance(loss, tuple) else (loss,)  # wake-sleep has one of each half
        return torch.stack([torch.as_tensor(part, dtype=torch.float64).detach().cpu() for part in parts]).sum()


def _defines(objective: Any, method: str) -> int:
    """How far up its ancestry an objective's method is defined: what is nearest is what its author meant."""
    ancestry = type(objective).__mro__
    return next((i for i, kind in enumerate(ancestry) if method in vars(kind)), len(ancestry))


def _announced(program: Program) -> Callable[..., Any]:
    """A program that names each parameter of its module in a param statement first."""

    def run(*args: Any, **kwargs: Any) -> Any:
        for module in modules_of(program):
            for name, parameter in module.named_parameters():
                pyro.param(f"{id(module)}.{name}", parameter)
        return program(*args, **kwargs)

    return run
