r"""A guide by a conditional normalising flow; it needs zuko, an optional dependency.

.. math:: z = T(m(x) + \sigma(x) \, f_{c(x)}(\epsilon)), \quad \epsilon \sim N(0, I)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from guides.gaussian import NetworkGuide
from guides.networks import hidden_widths
from guides.supports import Bounds
from inference.core.checks import check_count
from inference.distributions.gaussian import LOG_2PI


class Flow(NetworkGuide):
    r"""Amortised normalising flow: a neural spline flow (NSF) with coupling layers, conditioned on the data point.

    .. math:: z = m(x) + \sigma(x) \, f_{c(x)}(\epsilon), \quad \log q(z \mid x) = \log N(\epsilon; 0, I)
        - \log |\det f_{c(x)}'(\epsilon)| - \sum_k \log \sigma_k(x)

    A guide is drawn from far more often than its density is asked for at points that are no draws, so each layer leads
    from the noise, where it takes one pass, and its inverse takes two.

    A spline is the identity outside a box around the origin: alone it would have to move there whatever the posterior's
    place and width. The encoder's location and scale do that, and leave the shape to the spline.

    Warning:
        There is no closed-form KL: train with an objective that samples, such as :class:`inference.ELBO`.

    References:
        Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019, arXiv 1906.04032.

    Args:
        data_dim: D.
        latent_dim: K.
        context_dim: Numbers by which the encoder conditions the flow on the data point.
        num_transforms: Spline layers.
        flow_hidden: Widths of the hidden layers of each spline's network.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to (N, 2 K + context_dim): means, log standard deviations, context.
        support: Of the latent, see :class:`guides.EncoderGuide`.

    Raises:
        ImportError: If zuko is not installed.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        context_dim: int = 16,
        num_transforms: int = 2,
        flow_hidden: Sequence[int] = (64, 64),
        hidden: Sequence[int] = (128, 128),
        encoder: nn.Module | None = None,
        support: Constraint | Bounds = constraints.real_vector,
    ) -> None:
        check_count(context_dim, "context_dim")
        check_count(num_transforms, "num_transforms")
        super().__init__(data_dim, latent_dim, 2 * latent_dim + context_dim, hidden, encoder, support)
        self.context_dim, self.num_transforms = context_dim, num_transforms
        self._flow_hidden = hidden_widths(flow_hidden)
        self.flow = import_flows().NSF(
            latent_dim,
            context_dim,
            transforms=num_transforms,
            passes=2,
            hidden_features=self._flow_hidden,
        )

    def family(self, parameters: Tensor) -> ConditionalFlowDistribution:
        """The distribution with mean, log standard deviation and context side by side in (N, 2 K + context_dim)."""
        k = self.latent_dim
        mean, log_sigma, context = parameters.split([k, k, self.context_dim], dim=-1)
        return ConditionalFlowDistribution(mean, log_sigma.exp(), context, self.flow.transform)

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        flow = {"num_transforms": self.num_transforms, "flow_hidden": self._flow_hidden}
        return super().config() | flow | {"context_dim": self.context_dim}


class ConditionalFlowDistribution(TorchDistribution):
    """The distribution of loc + sigma f(noise) for a conditional transform f of zuko's and standard normal noise.

    The density of a draw comes with it, and costs nothing when it is asked for.

    Args:
        loc: (..., K).
        sigma: (..., K).
        context: (..., C).
        transform: From a context to the transform, with ``call_and_ladj`` and ``inv``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, sigma: Tensor, context: Tensor, transform: Any) -> None:
        self.loc, self.sigma, self.context, self._transform = loc, sigma, context, transform
        self._drawn: tuple[Tensor, Tensor, bool] | None = None
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> ConditionalFlowDistribution:
        """The same distribution over a larger batch."""
        batch_shape = Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        loc, sigma, context = (t.expand(batch_shape + t.shape[-1:]) for t in (self.loc, self.sigma, self.context))
        return ConditionalFlowDistribution(loc, sigma, context, self._transform)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, ``sample_shape`` + batch + (K,)."""
        shape = self._extended_shape(Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        standardised, log_det = self._at(shape).call_and_ladj(noise)
        value = torch.addcmul(self.loc, self.sigma, standardised)
        self._drawn = value, self._log_prob(noise, log_det), torch.is_grad_enabled()
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, one per batch member."""
        if self._drawn is not None and value is self._drawn[0] and torch.is_grad_enabled() == self._drawn[2]:
            return self._drawn[1]
        standardised = (value - self.loc) / self.sigma
        noise, log_det = self._at(standardised.shape).inv.call_and_ladj(standardised)
        return self._log_prob(noise, -log_det)

    def _log_prob(self, noise: Tensor, log_det: Tensor) -> Tensor:
        normal = -0.5 * (noise.square() + LOG_2PI).sum(-1)
        return normal - log_det - self.sigma.log().sum(-1)

    def _at(self, shape: Size) -> Any:
        return self._transform(self.context.expand(*shape[:-1], self.context.shape[-1]))


def import_flows() -> Any:
    """The module zuko.flows, imported without its side effect of switching off distribution validation globally.

    Raises:
        ImportError: If zuko is not installed.
    """
    validate = Distribution._validate_args
    try:
        import zuko.flows
    except ImportError as error:
        raise ImportError("expected zuko for a flow, found none: pip install elbozoo[flows]") from error
    finally:
        Distribution.set_default_validate_args(validate)
    return zuko.flows
