r"""The floating prior: a Gaussian that follows the codes of the batch.

.. math:: p(z) = N(z; 0, \operatorname{diag} s), \quad s_k = \frac1N \sum_n E_{q(z \mid x_n)} z_k^2
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints, kl_divergence, register_kl
from torch.distributions import MultivariateNormal as TorchMultivariateNormal

from inference.core.checks import check_arguments
from inference.core.protocols import SupportsPosterior
from inference.distributions.gaussian import DiagNormal
from zoo.priors.factorised import Prior

_BATCH = 1024


class FloatingPrior(Prior):
    r"""A zero-mean Gaussian whose variances are, in every batch, those that fit the codes best.

    .. math:: s_k = \frac1N \sum_n \left(\mu_{nk}^2 + \sigma_{nk}^2\right)

    With a guide of constant variance and the objective :class:`inference.AnalyticKLELBO` this is the BILBO, whose rate
    is, with m the mean square of the means and v the variance,

    .. math:: \tfrac12 \sum_k \log(1 + m_k / v_k)

    With an objective that knows the codes only by sampling, the squares of the samples take the place of the moments.

    Warning:
        A law that depends on the batch is no model. It serves training; :meth:`freeze` then turns it into one, and
        evidence and comparison refuse it before.

    References:
        Fyffe, 2019, arXiv 1912.10309.

    Args:
        latent_dim: K.

    Attributes:
        second_moment: s, (K,) buffer, NaN until frozen.

    Example:
        >>> from guides import MeanField
        >>> from zoo import DeepGaussianVAE
        >>> x, guide, prior = torch.randn(20, 5), MeanField(5, 2), FloatingPrior(2)
        >>> model = DeepGaussianVAE(5, 2, prior=prior)  # train it here
        >>> prior.freeze(guide, x)
        >>> model(n=3).shape
        torch.Size([3, 5])
    """

    second_moment: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.register_buffer("second_moment", torch.full((latent_dim,), math.nan))

    @property
    def frozen(self) -> bool:
        """Whether the variances are set."""
        return not bool(self.second_moment.isnan().any())

    @torch.no_grad()
    def freeze(self, guide: nn.Module, x: Tensor) -> None:
        """Set the variances for good, to those of the training data, and switch to eval mode.

        Args:
            guide: The guide that the model was trained with; its posterior's mean and variance are known.
            x: Training data, (N, D).

        Raises:
            TypeError: If the guide has no posterior, or ``x`` is no floating tensor.
            ValueError: If ``x`` is not (N, D) or not finite.
        """
        if not isinstance(guide, SupportsPosterior):
            raise TypeError(f"expected a guide with posterior(x), got {type(guide).__name__}")
        check_arguments((guide,), (x,), {})
        total = torch.stack([_second_moments(guide.posterior(part)).sum(0) for part in x.split(_BATCH)]).sum(0)
        self.second_moment.copy_(total / len(x))
        self.eval()

    def forward(self) -> Distribution:
        """The law: fitted to what it scores in train mode and until frozen; batch (), event (K,)."""
        zero = torch.zeros_like(self.second_moment)
        if self.training or not self.frozen:
            return FloatingNormal(zero)
        return DiagNormal(zero, self.second_moment.sqrt())


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
        """The same law over a larger batch."""
        return FloatingNormal(self.zero, batch_shape)

    def fitted(self, second_moments: Tensor) -> DiagNormal:
        """The Gaussian that fits codes with second moments (..., K) best."""
        return DiagNormal(self.zero, second_moments.flatten(0, -2).mean(0).sqrt())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats at the variances that fit this very batch (..., K) best."""
        return self.fitted(value.square()).log_prob(value)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: ARG002, B008
        """Refuse: without codes there is no variance.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("expected a frozen prior to sample from, got FloatingPrior in training: call freeze first")


def _second_moments(q: Distribution) -> Tensor:
    return q.mean.square() + q.variance


@register_kl(DiagNormal, FloatingNormal)
@register_kl(TorchMultivariateNormal, FloatingNormal)
def _kl_to_floating(q: Distribution, p: FloatingNormal) -> Tensor:
    return kl_divergence(q, p.fitted(_second_moments(q)))
