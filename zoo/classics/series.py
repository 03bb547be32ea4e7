r"""A linear state space model: a walk that is seen through noise.

.. math:: z_t \sim N(.9 z_{t-1}, 1), \quad y_t \sim N(z_t, .5^2)
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal

from zoo.classics.reference import Classic

_KEPT, _NOISE = 0.9, 0.5


def walk_model(y: Tensor) -> None:
    """States that follow each other, one for each of y (T,)."""
    z = y.new_zeros(())
    for t, value in enumerate(y):
        z = pyro.sample(f"z_{t}", dist.Normal(_KEPT * z, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(z, _NOISE), obs=value)


def state_space(length: int = 6) -> Classic:
    """A linear state space model, by the Kalman filter; the last state's moments are the filter's."""
    z, values = torch.zeros((), dtype=torch.float64), []
    for noise in torch.randn(length, 2, dtype=torch.float64):
        z = _KEPT * z + noise[0]
        values.append(z + _NOISE * noise[1])
    mean, variance, evidence = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)
    for value in values:
        mean, variance = _KEPT * mean, _KEPT**2 * variance + 1
        seen = variance + _NOISE**2
        evidence = evidence + Normal(mean, seen.sqrt()).log_prob(value)
        mean, variance = mean + variance / seen * (value - mean), variance * _NOISE**2 / seen
    moments = {f"z_{length - 1}": (mean, variance.sqrt())}
    args = (torch.stack(values),)
    return Classic(name="state space", model=walk_model, args=args, log_evidence=float(evidence), moments=moments)
