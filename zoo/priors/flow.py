"""A masked autoregressive flow as a prior; it needs zuko, an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from guides.flow import import_flows
from inference.core.checks import check_count
from inference.distributions.gaussian import DiagNormal
from zoo.priors.factorised import Prior


class AutoregressiveFlow(Prior):
    r"""Masked autoregressive flow (MAF) prior.

    .. math:: \log p(z) = \log N(f(z); 0, I_K) + \log |\det f'(z)|

    The density takes one pass, a draw K passes for each transform.

    References:
        Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation", 2017, arXiv 1705.07057.
        Alemi et al., "Fixing a Broken ELBO", 2018, arXiv 1711.00464 (as the prior of an autoencoder).

    Args:
        latent_dim: K.
        num_transforms: Affine autoregressive layers, the order of the coordinates reversed between them.
        hidden: Widths of the hidden layers of each.

    Raises:
        ImportError: If zuko is not installed.
    """

    def __init__(self, latent_dim: int, *, num_transforms: int = 4, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__(latent_dim)
        check_count(num_transforms, "num_transforms")
        self.flow = import_flows().MAF(latent_dim, transforms=num_transforms, hidden_features=list(hidden))

    def forward(self) -> FlowDistribution:
        """The distribution: batch (), event (K,)."""
        like = next(self.flow.parameters())
        return FlowDistribution(self.flow.transform(), DiagNormal(like.new_zeros(self.latent_dim), like.new_ones(1)))


class FlowDistribution(TorchDistribution):
    """The distribution of f^{-1}(u), where u follows a base distribution and f is an invertible transform of zuko's.

    Args:
        transform: f, with ``call_and_ladj`` and ``inv``.
        base: Distribution of u: event (K,).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, transform: Any, base: DiagNormal) -> None:
        self.transform, self.base = transform, base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> FlowDistribution:
        """The same distribution over a larger batch."""
        return FlowDistribution(self.transform, self.base.expand(batch_shape))

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, ``sample_shape`` + batch + (K,)."""
        return self.transform.inv(self.base.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, one per batch member."""
        u, log_det = self.transform.call_and_ladj(value)
        return self.base.log_prob(u) + log_det
