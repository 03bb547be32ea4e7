r"""A batch-dependent Gaussian, fitted to the values that it scores: the distribution of a floating prior.

.. math:: p(z) = N(z; 0, \operatorname{diag} s), \quad s_k = \frac1N \sum_n E_{q(z \mid x_n)} z_k^2
"""

from __future__ import annotations

from typing import Any

from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints, kl_divergence, register_kl

from inference.distributions.gaussian import DiagNormal


def second_moments(distribution: Distribution) -> Tensor:
    """E z_k^2 of a distribution, batch + (K,)."""
    return distribution.mean.square() + distribution.variance


class FloatingNormal(TorchDistribution):
    """Zero-mean Gaussian whose variances are the mean squares of the batch that it scores.

    Args:
        zero: Its mean, (K,).
        batch_shape: Shape of independent copies.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, zero: Tensor, batch_shape: Size = Size()) -> None:  # noqa: B008
        self.zero = zero
        super().__init__(Size(batch_shape), zero.shape, validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> FloatingNormal:
        """The same distribution over a larger batch."""
        return FloatingNormal(self.zero, batch_shape)

    def fitted(self, moments: Tensor) -> DiagNormal:
        """The Gaussian that fits codes with second moments (..., K) best."""
        return DiagNormal(self.zero, moments.flatten(0, -2).mean(0).sqrt())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats at the variances that fit this very batch (..., K) best."""
        return self.fitted(value.square()).log_prob(value)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: ARG002, B008
        """Raise an error: without codes there is no variance.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("expected a frozen prior to sample from, got FloatingPrior in training: call freeze first")


@register_kl(Distribution, FloatingNormal)
def _kl_to_floating(q: Distribution, p: FloatingNormal) -> Tensor:
    return kl_divergence(q, p.fitted(second_moments(q)))
