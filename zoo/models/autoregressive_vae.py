r"""Autoregressive VAE: each dimension of x depends on the latent and on the dimensions before it.

.. math:: z \sim p(z), \quad x \mid z \sim \prod_d p(x_d \mid x_{<d}, z)

So powerful a decoder can model the data without the latent, and then ignores it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from guides.networks import hidden_widths
from zoo.base import LatentVariableModel
from zoo.models.likelihoods import BernoulliLikelihood, Likelihood
from zoo.priors.factorised import StandardNormal


class MaskedLinear(nn.Module):
    r"""A linear layer with some of its weights held at zero, and a context added.

    .. math:: h = (M \odot W) x + V z + b

    Args:
        mask: M, zeros and ones, (out, in).
        context_dim: Width of z.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, context_dim: int) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        bound = 1 / math.sqrt(mask.shape[1])
        self.weight = nn.Parameter(torch.empty(mask.shape).uniform_(-bound, bound))
        self.context = nn.Linear(context_dim, len(mask))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Features (..., out) from features (..., in) and context (..., context_dim), whose batches broadcast."""
        return nn.functional.linear(x, self.weight * self.mask) + self.context(z)


class MaskedDecoder(nn.Module):
    r"""Masked network (MADE): the P outputs of dimension d depend on x_1, ..., x_{d-1} and on z alone.

    Each unit of a hidden layer has a degree from 1 to D - 1 and sees units of no higher degree; output d sees units of
    degree below d. The latent is added at every layer.

    References:
        Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution Estimation", 2015,
        arXiv 1502.03509.

    Args:
        data_dim: D.
        latent_dim: K.
        num_parameters: P.
        hidden: Widths of the hidden layers.
    """

    def __init__(self, data_dim: int, latent_dim: int, num_parameters: int, hidden: Sequence[int]) -> None:
        super().__init__()
        inputs, outputs = torch.arange(1, data_dim + 1), torch.arange(data_dim).repeat_interleave(num_parameters)
        between = [torch.arange(width) % max(1, data_dim - 1) + 1 for width in hidden]
        # An output's degree is that of the last input it may see, so that one rule serves every layer.
        masks = [after[:, None] >= before for before, after in pairwise([inputs, *between, outputs])]
        self.num_parameters = num_parameters
        self.layers = nn.ModuleList(MaskedLinear(mask.to(torch.get_default_dtype()), latent_dim) for mask in masks)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Parameters (..., D, P) of the distribution of each dimension, from x (..., D) and z (..., K)."""
        h = self.layers[0](x, z)
        for layer in self.layers[1:]:
            h = layer(nn.functional.silu(h), z)
        return h.unflatten(-1, (-1, self.num_parameters))


class AutoregressiveDistribution(TorchDistribution):
    r"""Autoregressive distribution of x given z by a masked network: its density takes one pass, a draw D passes.

    .. math:: p(x \mid z) = \prod_d p(x_d \mid x_{<d}, z)

    Args:
        decoder: From x (..., D) and z to the parameters (..., D, P), dimension d a function of those before it.
        likelihood: From the parameters to a distribution that factorises.
        z: Latents, (..., K).
        data_dim: D.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(self, decoder: nn.Module, likelihood: Likelihood, z: Tensor, data_dim: int) -> None:
        self.decoder, self.likelihood, self.z = decoder, likelihood, z
        super().__init__(z.shape[:-1], Size((data_dim,)), validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> AutoregressiveDistribution:
        """The same distribution over a larger batch."""
        z = self.z.expand(Size(batch_shape) + self.z.shape[-1:])
        return AutoregressiveDistribution(self.decoder, self.likelihood, z, *self.event_shape)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> Any:
        """The support of one data point."""
        return self.likelihood.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability or density in nats, one per batch member."""
        return self.likelihood(self.decoder(value, self.z)).log_prob(value)

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws, ``sample_shape`` + batch + (D,): one dimension after the other, the batch side by side."""
        x = self.z.new_zeros(self._extended_shape(Size(sample_shape)))
        places = torch.arange(x.shape[-1], device=x.device)
        for place in range(len(places)):
            x = torch.where(places == place, self.likelihood(self.decoder(x, self.z)).sample(), x)
        return x


class AutoregressiveVAE(LatentVariableModel):
    r"""Variational autoencoder (VAE) whose decoder is a masked autoregressive network.

    .. math:: z \sim p(z), \quad x \mid z \sim \prod_d p(x_d \mid x_{<d}, z)

    The network sees x as it is; standardise Gaussian data. There is no ``decode``: given z, the dimensions are not
    independent.

    References:
        Germain, Gregor, Murray, Larochelle, "MADE", 2015, arXiv 1502.03509. Alemi et al., "Fixing a Broken ELBO", 2018,
        arXiv 1711.00464 (powerful decoders and the latent).

    Args:
        data_dim: D.
        latent_dim: K.
        likelihood: Distribution of one dimension given those before it: one of :class:`zoo.BernoulliLikelihood` (the
            default), :class:`zoo.CategoricalLikelihood` and :class:`zoo.GaussianLikelihood`.
        hidden: Widths of the masked hidden layers.
        prior: One of :mod:`zoo.priors.factorised` with the same K; standard normal by default.

    Attributes:
        network: The masked network.
        observation: The likelihood as a module.

    Example:
        >>> AutoregressiveVAE(5, 2)(n=3).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        likelihood: Likelihood | None = None,
        hidden: Sequence[int] = (256, 256),
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__(data_dim, latent_dim, prior=prior)
        self.observation = BernoulliLikelihood() if likelihood is None else likelihood
        self._hidden = hidden_widths(hidden)
        self.network = MaskedDecoder(data_dim, latent_dim, self.observation.num_parameters, self._hidden)

    def likelihood(self, z: Tensor) -> AutoregressiveDistribution:
        """Distribution of x given z (..., K): batch (...), event (D,)."""
        return AutoregressiveDistribution(self.network, self.observation, z, self.data_dim)

    def check_data(self, x: Any) -> None:
        """Check that ``x`` are data for this model.

        Raises:
            TypeError: If ``x`` is not a floating tensor of the parameters' dtype.
            ValueError: If ``x`` is not (N, D), not finite or outside the likelihood's support.
        """
        super().check_data(x)
        self.observation.check_data(x)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, unless likelihood or prior are not the default."""
        if type(self.observation) is not BernoulliLikelihood or type(self.prior_module) is not StandardNormal:
            return super().config()
        return {"data_dim": self.data_dim, "latent_dim": self.latent_dim, "hidden": self._hidden}
