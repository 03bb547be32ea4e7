r"""Priors that are mixtures: of Gaussians, or of a guide's posteriors of learnt pseudo-inputs.

.. math:: p(z) = \sum_{c=1}^C w_c \, p_c(z), \quad w = \operatorname{softmax}(a)
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from inference.core.checks import check_count, check_layout
from inference.core.memory import at_once
from inference.core.protocols import SupportsPosterior
from inference.distributions.gaussian import DiagNormal
from zoo.priors.factorised import Prior

_MAX_ELEMENTS = 2**22


class Mixture(TorchDistribution):
    r"""Mixture of C distributions of one family.

    .. math:: p(z) = \sum_c w_c \, p_c(z)

    Args:
        logits: Logarithms of the weights up to a constant, (C,).
        components: Their distributions: batch (C,), event (K,).
        batch_shape: Shape of independent copies.

    Example:
        >>> components = DiagNormal(torch.tensor([[-1.0], [1.0]]), torch.ones(1))
        >>> Mixture(torch.zeros(2), components).variance
        tensor([2.])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(self, logits: Tensor, components: Distribution, batch_shape: Size = Size()) -> None:  # noqa: B008
        self.log_weights = logits.log_softmax(-1)
        self.components = components
        super().__init__(Size(batch_shape), components.event_shape, validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Mixture:
        """The same distribution over a larger batch; the components are not copied."""
        return Mixture(self.log_weights, self.components, batch_shape)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:
        """Where the density is positive: that of the components."""
        return self.components.support

    @property
    def mean(self) -> Tensor:
        """Mean, batch + (K,)."""
        return self._average(self.components.mean).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Variances, batch + (K,): the mean of the variances and the variance of the means."""
        spread = (self.components.mean - self._average(self.components.mean)).square()
        return self._average(self.components.variance + spread).expand(self.batch_shape + self.event_shape)

    def _average(self, values: Tensor) -> Tensor:
        return self.log_weights.exp() @ values

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, one per batch member."""
        terms = self.log_weights + self.components.log_prob(value.unsqueeze(-2))
        return terms.logsumexp(-1).expand(torch.broadcast_shapes(self.batch_shape, value.shape[:-1]))

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws, ``sample_shape`` + batch + (K,), without gradient."""
        shape = self._extended_shape(Size(sample_shape))
        with torch.no_grad():
            num, size = shape[:-1].numel(), len(self.log_weights) * shape[-1]
            chunks = torch.empty(num).split(at_once(_MAX_ELEMENTS, size))
            return torch.cat([self._draw(len(chunk)) for chunk in chunks]).reshape(shape)

    def _draw(self, num: int) -> Tensor:
        """Draws (num, K): one from every component, of which one is kept."""
        every = self.components.sample(Size((num,)))
        bounds = self.log_weights.exp().cumsum(-1)[:-1]
        chosen = (torch.rand(num, 1, dtype=bounds.dtype, device=bounds.device) > bounds).sum(-1)
        return every.gather(1, chosen[:, None, None].expand(-1, 1, every.shape[-1])).squeeze(1)


class MixtureOfGaussians(Prior):
    r"""Mixture-of-Gaussians prior, learnt, of components with independent coordinates.

    .. math:: p(z) = \sum_c w_c \prod_k N(z_k; m_{ck}, \sigma_{ck}^2)

    It begins with equal weights, unit variances and standard normal means.

    Args:
        latent_dim: K.
        num_components: C.
    """

    def __init__(self, latent_dim: int, num_components: int) -> None:
        super().__init__(latent_dim)
        check_count(num_components, "num_components")
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, latent_dim))
        self.log_sigma = nn.Parameter(torch.zeros(num_components, latent_dim))

    def forward(self) -> Mixture:
        """The distribution: batch (), event (K,)."""
        return Mixture(self.logits, DiagNormal(self.loc, self.log_sigma.exp()))


class VampPrior(Prior):
    r"""VampPrior, the variational mixture of posteriors: the guide's posteriors of learnt pseudo-inputs.

    .. math:: p(z) = \sum_c w_c \, q(z \mid u_c)

    The prior owns the pseudo-inputs and the weights; the guide belongs to the other half of the pair, whose parameters
    the prior's gradient reaches. Copy, move and save the two halves together.

    Warning:
        Prior and guide share parameters: :class:`inference.StickingTheLanding` with more than one particle is biased
        here; :class:`inference.DReG` is not; wake-sleep refuses the pair.

    References:
        Tomczak, Welling, "VAE with a VampPrior", 2018, arXiv 1705.07120.

    Args:
        latent_dim: K.
        num_components: C.
        guide: A guide with ``posterior(x)``.
        data_init: Data (N, D) of which C rows, drawn at random, are the first pseudo-inputs.

    Raises:
        TypeError: If the guide has no posterior, or the data are not a floating tensor.
        ValueError: If the data have fewer than C rows, or the posterior has another event than (K,).

    Example:
        >>> from guides import MeanField
        >>> from zoo import DeepGaussianVAE
        >>> x, guide = torch.randn(20, 5), MeanField(5, 2)
        >>> model = DeepGaussianVAE(5, 2, prior=VampPrior(2, 10, guide, x))
        >>> model(n=3).shape
        torch.Size([3, 5])
    """

    def __init__(self, latent_dim: int, num_components: int, guide: nn.Module, data_init: Tensor) -> None:
        super().__init__(latent_dim)
        check_count(num_components, "num_components")
        if not isinstance(guide, SupportsPosterior):
            raise TypeError(f"expected a guide with posterior(x), got {type(guide).__name__}")
        check_layout(data_init)
        if len(data_init) < num_components:
            raise ValueError(f"expected data_init of at least {num_components} rows, got {tuple(data_init.shape)}")
        self._guide = (guide,)
        rows = torch.randperm(len(data_init))[:num_components].to(data_init.device)
        self.pseudo_inputs = nn.Parameter(data_init[rows].detach().clone())
        self.logits = nn.Parameter(data_init.new_zeros(num_components))

    def forward(self) -> Mixture:
        """The distribution: batch (), event (K,)."""
        return Mixture(self.logits, self._guide[0].posterior(self.pseudo_inputs))
