"""Training at a noise precision that rises with the step."""

from __future__ import annotations

from torch import Tensor

from inference.core.protocols import SupportsPrecision
from inference.objectives.base import Objective, Terms
from inference.objectives.schedules import Schedule
from inference.pair.call import Call


class AnnealedPrecision(Objective):
    r"""Annealed precision: another objective, with the precision of the model's noise set by a schedule at each step.

    .. math:: \gamma^2_t = s(t)

    A near-deterministic model does not learn from its final precision at once: a random encoder's codes cost
    gamma^2 times the squared error. The model keeps the last precision that was set.

    Args:
        objective: What to optimise at each step.
        schedule: Precision by step, such as :class:`inference.GeometricAnnealing`.

    Raises:
        TypeError: When called, if the model's precision cannot be set.

    Example:
        >>> from guides import MeanField
        >>> from inference import AnalyticKLELBO, GeometricAnnealing
        >>> from zoo import IMAVAE
        >>> import torch
        >>> model, guide = IMAVAE(3, 2), MeanField(3, 2)
        >>> objective = AnnealedPrecision(AnalyticKLELBO(), GeometricAnnealing(100, 10.0, 1e4))
        >>> loss = objective(model, guide)(torch.zeros(4, 3))
        >>> model.gamma2
        tensor(10.)
    """

    def __init__(self, objective: Objective, schedule: Schedule) -> None:
        super().__init__(objective.num_particles, plate=objective.plate)
        self.objective, self.schedule = objective, schedule

    def terms(self, call: Call, step: Tensor) -> Terms:
        """The other objective's terms at the step's precision.

        Raises:
            TypeError: If the model's precision cannot be set.
        """
        if not isinstance(call.model, SupportsPrecision):
            raise TypeError(f"expected a model with set_precision, got {type(call.model).__name__}")
        call.model.set_precision(self.schedule(step))
        return self.objective.terms(call, step)
