r"""Training to a given rate: distortion plus the distance of the rate from its target.

.. math:: D + \lambda \, |R - R^*|, \quad
    D = -\frac1N \sum_n E_q \log p(x_n \mid z), \quad R = \frac1N \sum_n KL(q(z \mid x_n) \,\|\, p(z))
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from inference.core.ranks import batch_mean
from inference.objectives.base import Objective, check_nonnegative
from inference.objectives.evidence_lower_bound import reconstruction_and_rate, sampled_reconstruction_and_rate
from inference.pair.draw import Draw


class _AtRate(Objective):
    """Base of the objectives that hold the rate of a batch at a target; a subclass says how the rate is computed."""

    _reconstruction_and_rate: Callable[[Draw], tuple[Tensor, Tensor]]

    def __init__(self, rate: float, weight: float = 1.0, num_particles: int = 1, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        self.rate, self.weight = check_nonnegative(rate, "rate"), check_nonnegative(weight, "weight")

    def bound(self, draw: Draw) -> Tensor:
        """Minus distortion and penalty per data point, (N,); the penalty is the same for all."""
        reconstruction, rate = self._reconstruction_and_rate(draw)
        return reconstruction.mean(0) - self.weight * (batch_mean(rate) - self.rate).abs()


class TargetRate(_AtRate):
    r"""Target-rate objective: least distortion at a given rate, the rate in closed form.

    .. math:: -D_n - \lambda \, |R - R^*|

    Warning:
        Not a bound on the evidence: report :class:`inference.ELBO`. Above its target the rate costs lambda nats per
        nat: with weight 1 that is the ELBO, so a target below the rate of the ELBO's optimum is reached only with a
        weight above the slope -dD/dR of the frontier there. The rate is the mini-batch's.

    References:
        Alemi, Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018, arXiv 1711.00464.

    Args:
        rate: R*, nats per data point.
        weight: lambda.
        num_particles: S, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If rate or weight is negative or not finite; when called, see
            :func:`inference.objectives.evidence_lower_bound.reconstruction_and_rate`.
        NotImplementedError: When called, if a site has no closed-form KL. Use :class:`SampledTargetRate` there.
    """

    _reconstruction_and_rate = staticmethod(reconstruction_and_rate)


class SampledTargetRate(_AtRate):
    r"""Target-rate objective with the rate by Monte Carlo: for flows, mixtures and learnt priors.

    .. math:: -D_n - \lambda \, |\hat R - R^*|, \quad \hat R = \frac1N \sum_n [\log q(z_n \mid x_n) - \log p(z_n)]

    Warning:
        As :class:`TargetRate`. The noise of the estimated rate blunts the corner: the rate settles a fraction of its
        standard error from the target. Take large batches or more particles.

    References:
        Alemi, Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018, arXiv 1711.00464.

    Args:
        rate: R*, nats per data point.
        weight: lambda.
        num_particles: S, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If rate or weight is negative or not finite.
    """

    _reconstruction_and_rate = staticmethod(sampled_reconstruction_and_rate)
