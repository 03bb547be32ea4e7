r"""A guide with several modes: a mixture of Gaussians, reparameterised.

.. math:: q(z \mid x) = \sum_c \pi_c(x) \prod_k N(z_k; m_{ck}(x), \sigma_{ck}^2(x))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from guides.gaussian import NetworkGuide
from guides.supports import Bounds
from inference.core.checks import check_count
from inference.distributions.gaussian import LOG_2PI


class Mixture(NetworkGuide):
    r"""Mixture guide: an amortised mixture of Gaussians with independent coordinates.

    .. math:: q(z \mid x) = \sum_{c=1}^C \pi_c(x) \prod_k N(z_k; m_{ck}(x), \sigma_{ck}^2(x))

    Warning:
        There is no closed-form KL: train with an objective that samples, such as :class:`inference.ELBO`.

    References:
        Figurnov, Mohamed, Mnih, "Implicit Reparameterization Gradients", 2018, arXiv 1805.08498.

    Args:
        data_dim: D.
        latent_dim: K.
        num_components: C.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to (N, C (1 + 2 K)): logits, then means and log standard deviations, each
            component by component.
        support: Of the latent, see :class:`guides.EncoderGuide`.

    Example:
        >>> Mixture(5, 2).posterior(torch.zeros(4, 5)).rsample((3,)).shape
        torch.Size([3, 4, 2])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        num_components: int = 2,
        hidden: Sequence[int] = (128, 128),
        encoder: nn.Module | None = None,
        support: Constraint | Bounds = constraints.real_vector,
    ) -> None:
        check_count(num_components, "num_components")
        super().__init__(data_dim, latent_dim, num_components * (1 + 2 * latent_dim), hidden, encoder, support)
        self.num_components = num_components

    def family(self, parameters: Tensor) -> MixtureNormal:
        """The mixture with logits, means and log standard deviations side by side in (N, C (1 + 2 K))."""
        c, k = self.num_components, self.latent_dim
        logits, means, log_sigmas = parameters.split([c, c * k, c * k], dim=-1)
        return MixtureNormal(logits, means.unflatten(-1, (c, k)), log_sigmas.unflatten(-1, (c, k)).exp())

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return super().config() | {"num_components": self.num_components}


class MixtureNormal(TorchDistribution):
    r"""Mixture of Gaussians with independent coordinates and implicitly reparameterised draws.

    A draw z carries, coordinate by coordinate, the gradient that keeps the value of the conditional distribution
    function F_k(z_k | z_1 .. z_{k-1}), so that which component it came from plays no part:

    .. math:: dz_k = -\frac{dF_k}{p(z_k \mid z_1 \dots z_{k-1})}

    Args:
        logits: Unnormalised log weights, (..., C).
        locs: Means, (..., C, K).
        sigmas: Standard deviations, (..., C, K).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, locs: Tensor, sigmas: Tensor) -> None:
        self.log_weights = logits.log_softmax(-1)
        self.locs, self.sigmas = locs, sigmas
        super().__init__(logits.shape[:-1], locs.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> MixtureNormal:
        """The same distribution over a larger batch."""
        batch_shape = Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        shapes = (batch_shape + self.log_weights.shape[-1:], *[batch_shape + self.locs.shape[-2:]] * 2)
        return MixtureNormal(*(t.expand(s) for t, s in zip((self.log_weights, self.locs, self.sigmas), shapes)))

    @property
    def mean(self) -> Tensor:
        """Mean, (..., K)."""
        return self._average(self.locs)

    @property
    def variance(self) -> Tensor:
        """Variances, (..., K)."""
        return self._average(self.sigmas.square() + (self.locs - self.mean.unsqueeze(-2)).square())

    def _average(self, values: Tensor) -> Tensor:
        return (self.log_weights.exp().unsqueeze(-1) * values).sum(-2)

    def _log_components(self, value: Tensor) -> Tensor:
        """Log-density of each coordinate in each component, (..., C, K)."""
        squares = ((value.unsqueeze(-2) - self.locs) / self.sigmas).square()
        return -0.5 * (squares + LOG_2PI) - self.sigmas.log()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, one per batch member."""
        return (self.log_weights + self._log_components(value).sum(-1)).logsumexp(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws without gradient, ``sample_shape`` + batch + (K,)."""
        shape = Size(sample_shape) + self.batch_shape
        uniform = torch.rand(shape, dtype=self.locs.dtype, device=self.locs.device)
        below = self.log_weights.exp().cumsum(-1)[..., :-1] < uniform.unsqueeze(-1)
        index = below.sum(-1)[..., None, None].expand(*shape, 1, *self.event_shape)
        noise = torch.randn(shape + self.event_shape, dtype=self.locs.dtype, device=self.locs.device)
        loc, sigma = (t.expand(shape + t.shape[-2:]).gather(-2, index).squeeze(-2) for t in (self.locs, self.sigmas))
        return torch.addcmul(loc, sigma, noise)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Implicitly reparameterised draws, ``sample_shape`` + batch + (K,)."""
        draw = self.sample(sample_shape)
        coordinates: list[Tensor] = []
        log_weights = self.log_weights
        for k, z in enumerate(draw.unbind(-1)):
            loc, sigma = self.locs[..., k], self.sigmas[..., k]
            standardised = (z.unsqueeze(-1) - loc) / sigma
            below = (log_weights.softmax(-1) * torch.special.ndtr(standardised)).sum(-1)
            density = (log_weights.log_softmax(-1) - 0.5 * (standardised.square() + LOG_2PI) - sigma.log()).logsumexp(
                -1
            )
            coordinates.append(z - (below - below.detach()) / density.exp().detach())
            # The components' probabilities given this coordinate, through whose own gradient the next ones see it.
            moved = (coordinates[-1].unsqueeze(-1) - loc) / sigma
            log_weights = log_weights - 0.5 * moved.square() - sigma.log()
        return torch.stack(coordinates, -1)
