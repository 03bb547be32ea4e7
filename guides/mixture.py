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

# Steps to a quantile: halvings between components a thousand standard deviations apart, and some of Newton after them.
_NEWTON_STEPS = 24


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

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Implicitly reparameterised draws, ``sample_shape`` + batch + (K,): smooth in the parameters at given noise.

        Each coordinate, given those before it, is the quantile of its one-dimensional mixture at that of the noise.
        """
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.locs.dtype, device=self.locs.device)
        coordinates: list[Tensor] = []
        log_weights = self.log_weights
        for k, level in enumerate(noise.unbind(-1)):
            loc, sigma = self.locs[..., k], self.sigmas[..., k]
            z = _quantile(level, log_weights, loc, sigma)
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


@torch.no_grad()
def _quantile(noise: Tensor, log_weights: Tensor, loc: Tensor, sigma: Tensor) -> Tensor:
    """Where a mixture of normal distributions (..., C) has as much below as a standard one below the noise (...).

    Newton's method within a bracket that shrinks: the quantile lies between the least and the greatest of the
    components'. Tails are compared on the side where they are small, so that none is rounded away.
    """
    weights, of_components = log_weights.softmax(-1), loc + sigma * noise.unsqueeze(-1)
    low, high = of_components.amin(-1), of_components.amax(-1)
    side = torch.where(noise > 0, -1.0, 1.0).to(noise)
    tail, z = torch.special.ndtr(side * noise), (weights * of_components).sum(-1)
    for step in range(_NEWTON_STEPS):
        standardised = (z.unsqueeze(-1) - loc) / sigma
        excess = side * ((weights * torch.special.ndtr(side.unsqueeze(-1) * standardised)).sum(-1) - tail)
        low, high = torch.where(excess > 0, low, z), torch.where(excess > 0, z, high)
        slope = (weights * torch.exp(-0.5 * (standardised.square() + LOG_2PI)) / sigma).sum(-1)
        newton = z - excess / slope
        inside = (newton >= low) & (newton <= high)  # false where it is not a number
        # Every fourth step halves the bracket while Newton's still move it: in a tail they creep.
        creeps = (newton - z).abs() > 0.1 * (high - low) if step % 4 == 3 else torch.zeros_like(inside)
        z = torch.where(inside & ~creeps, newton, (low + high) / 2)
    return z
