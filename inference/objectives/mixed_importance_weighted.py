"""Importance-weighted objectives that give the guide a better signal: CIWAE, MIWAE and PIWAE.

More particles tighten the bound, which helps the model, but drown the gradient of the guide in noise. Each of the
three gives the guide a looser bound than the model could have.
"""

from __future__ import annotations

from torch import Tensor

from inference.core.checks import check_count
from inference.core.estimates import log_mean_exp
from inference.objectives.base import Objective
from inference.objectives.gradients import gradient_parts, normalised, with_gradient_of
from inference.pair.draw import Draw


class CIWAE(Objective):
    r"""Combination importance-weighted autoencoder (CIWAE) bound: a convex combination of ELBO and IWAE bound.

    .. math:: \beta \, E \frac1K \sum_k \log w_k + (1 - \beta) \, E \log \frac1K \sum_k w_k

    References:
        Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh, "Tighter Variational Bounds are Not Necessarily Better",
        2018, arXiv 1802.04537.

    Args:
        beta: Share of the ELBO, in [0, 1].
        num_particles: K, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If beta is not in [0, 1].
    """

    def __init__(self, beta: float, num_particles: int = 1, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        if not 0 <= beta <= 1:
            raise ValueError(f"expected beta in [0, 1], got {beta}")
        self.beta = beta

    def bound(self, draw: Draw) -> Tensor:
        """The mixture per data point, (N,)."""
        log_weights = draw.log_weights
        return self.beta * log_weights.mean(0) + (1 - self.beta) * log_mean_exp(log_weights)


class _Grouped(Objective):
    """Base of the objectives with M groups of K particles."""

    def __init__(self, num_groups: int, num_particles: int = 1, *, plate: str | None = None) -> None:
        check_count(num_groups, "num_groups")
        super().__init__(num_particles, plate=plate)
        self.num_groups = num_groups

    @property
    def num_samples(self) -> int:
        """M K, samples per data point of one draw."""
        return self.num_groups * self.num_particles


class MIWAE(_Grouped):
    r"""Multiply importance-weighted autoencoder (MIWAE) bound: mean of M independent IWAE bounds of K particles.

    .. math:: E \frac1M \sum_m \log \frac1K \sum_k w_{mk}

    References:
        Rainforth et al., "Tighter Variational Bounds are Not Necessarily Better", 2018, arXiv 1802.04537.

    Args:
        num_groups: M; a data point takes M K samples.
        num_particles: K, samples per group.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, draw: Draw) -> Tensor:
        """The mean of the groups' bounds per data point, (N,)."""
        return log_mean_exp(draw.log_weights.unflatten(0, (self.num_particles, self.num_groups))).mean(0)


class PIWAE(_Grouped):
    r"""Partially importance-weighted autoencoder (PIWAE) bound: M K particles for the model, MIWAE for the guide.

    A parameter's effect in the model follows the gradient of the first, its effect in the guide that of
    :class:`MIWAE`. The value is the first: a lower bound.

    Warning:
        A step costs two runs of model and guide. Batch normalisation and dropout in train mode are refused.

    References:
        Rainforth et al., "Tighter Variational Bounds are Not Necessarily Better", 2018, arXiv 1802.04537.

    Args:
        num_groups: M; a data point takes M K samples.
        num_particles: K, samples per group.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, draw: Draw) -> Tensor:
        """Importance-weighted bound of all particles per data point, (N,).

        Raises:
            ValueError: See :func:`inference.objectives.gradients.gradient_parts`.
        """
        parts = gradient_parts(draw)
        grouped = parts.log_weights.unflatten(0, (self.num_particles, self.num_groups))
        for_guide = normalised(grouped).flatten(0, 1) / self.num_groups
        for_model = normalised(parts.log_weights)
        surrogate = for_guide * (parts.path - parts.log_guide) + for_model * parts.log_joint
        return with_gradient_of(log_mean_exp(parts.log_weights), surrogate.sum(0))
