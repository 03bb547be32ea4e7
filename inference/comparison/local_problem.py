"""A freed guide's ELBO as a function of each data point's own parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro
import torch
from torch import Tensor, nn

from inference.core.call import Call
from inference.core.draw import Layout
from inference.core.seeding import random_state
from inference.numerics.lbfgs import Evaluate
from inference.numerics.whitened_noise import WhitenedNoise


class LocalProblem:
    """Minus the ELBO of each data point as a function of its own free parameters, or of all of those that they share.

    Args:
        call: The pair, with the freed guide.
        local: That guide.
        num_samples: S, samples per data point, of noise that stays the same.
        shared: Whether all data share the guide's parameters: then there is one problem, R = 1, else R = N.

    Attributes:
        start: The guide's parameters as they came, (R, P).
        layout: Layout of the pair.

    Raises:
        ValueError: If a parameter has not one row for each data point, or the pair subsamples its data.
    """

    def __init__(self, call: Call, local: nn.Module, num_samples: int, *, shared: bool = False) -> None:
        self.shared = shared
        self.parameters = [p for p in local.parameters() if p.requires_grad]
        self.call, self.num_samples = call, num_samples
        self.noise, self.seed = WhitenedNoise(), int(torch.randint(2**31, ()))
        sizes = {p.shape[0] if p.dim() else 0 for p in self.parameters}
        if len(sizes) != 1 and not shared:
            raise ValueError(
                f"expected the freed guide's parameters to have one row for each data point, got shapes "
                f"{[tuple(p.shape) for p in self.parameters]}"
            )
        self.start = self._table([p.detach() for p in self.parameters]).double()
        with torch.no_grad():
            self.layout = call.run(num_samples).layout  # which finds the depth of the plates, outside the noise
            check_takes_all(self.layout)
            if not shared and len(self.start) != self.layout.num_data:
                raise ValueError(
                    f"expected the freed guide's parameters to have one row for each of {self.layout.num_data} data "
                    f"points, got {len(self.start)}"
                )
            with random_state(self.seed), self.noise:  # drawn once here, so that each evaluation finds it drawn
                call.run(num_samples)

    def combined(self, values: Tensor) -> Tensor:
        """Values of all data points (..., N) as those of the problems, (..., R)."""
        return values.sum(-1, keepdim=True) if self.shared else values

    def _table(self, parameters: Sequence[Tensor]) -> Tensor:
        rows = [1 if self.shared else len(p) for p in parameters]
        return torch.cat([p.reshape(r, -1) for p, r in zip(parameters, rows, strict=True)], -1)

    def set(self, point: Tensor) -> None:
        """Write free parameters (R, P) into the guide."""
        pieces = point.split([p.numel() // len(self.start) for p in self.parameters], -1)
        with torch.no_grad():
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.copy_(piece.reshape(parameter.shape))

    def objective(self, loss: Callable[[], Tensor]) -> Evaluate:
        """A loss (N,) as a function of the free parameters, with its gradient, of chosen problems; all are run."""

        def evaluate(point: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            whole = self.start.clone()
            whole[index] = point.to(whole)
            self.set(whole)
            # Far-out trial points make values that Pyro's validation refuses; here they are worth plus infinity.
            with torch.enable_grad(), pyro.validation_enabled(False):
                value = self.combined(loss())
                gradients = torch.autograd.grad(value.sum(), self.parameters)
            gradient = self._table(gradients)
            value = torch.where(value.detach().isnan(), math.inf, value.detach())
            return value[index].double(), gradient[index].double()

        return evaluate

    @property
    def minus_elbo(self) -> Evaluate:
        """Minus the ELBO of chosen data points, on the same noise at each call, whoever draws it."""
        return self.objective(self._minus_elbo)

    def _minus_elbo(self) -> Tensor:
        with random_state(self.seed), self.noise:
            return -self.call.run(self.num_samples, enumerate_guide=True).trained_elbo.mean(0)


def check_takes_all(layout: Layout) -> None:
    """Refuse a pair that subsamples its data.

    Raises:
        ValueError: If it does.
    """
    if layout.plate_scale != 1:
        raise ValueError(f"expected a pair that takes all its data, got a subsampling plate {layout.plate!r}")
