r"""Gaussian guides whose covariance is the decoder's own, by its Jacobian: no network for variances.

.. math:: \Sigma(x)^{-1} = \frac{1}{\sigma^2} J^T J - n''(m), \quad J = \frac{d f(T(u))}{du} \Big|_{u = m(x)}

with f the decoder, sigma its noise, and n the log prior density of unconstrained coordinates u, z = T(u), which holds
the log-determinant of T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.func import grad, vmap

from guides.gaussian import NetworkGuide
from inference.core.protocols import SupportsGaussianDecoder, supports_gaussian_decoder
from inference.distributions.gaussian import DiagNormal, FullNormal
from inference.numerics.jacobian import directional_derivative
from inference.numerics.linalg import cholesky_of_sum

# The least curvature of a coordinate: one on which neither decoder nor prior depends has a sigma of a thousand.
_FLOOR = 1e-6


class _GaussNewton(NetworkGuide):
    """Holds the model in a tuple: as an attribute it would become part of the guide, parameters and all."""

    def __init__(
        self, model: SupportsGaussianDecoder, *, hidden: Sequence[int] = (128, 128), encoder: nn.Module | None = None
    ) -> None:
        if not supports_gaussian_decoder(model):
            raise TypeError(f"expected a model with decode(z), sigma and prior(), got {type(model).__name__}")
        support = model.prior().support
        assert support is not None
        super().__init__(model.data_dim, model.latent_dim, model.latent_dim, hidden, encoder, support)
        self._model = (model,)

    @property
    def model(self) -> SupportsGaussianDecoder:
        """The model whose decoder this follows."""
        return self._model[0]

    def curvatures(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Curvature of the log joint at unconstrained latents, (..., K), in two parts.

        Returns:
            The decoder's Jacobian by its noise, (..., D, K), and the prior's -n'', (..., K), at least 1e-6.
        """
        prior, transform = self.model.prior(), biject_to(self.support)

        def decode(u: Tensor) -> Tensor:
            return self.model.decode(transform(u))

        def log_prior(u: Tensor) -> Tensor:
            z = transform(u)
            return (prior.log_prob(z) + transform.log_abs_det_jacobian(u, z)).sum()

        bend = -_derivatives(grad(log_prior), u).diagonal(dim1=-2, dim2=-1)
        return _derivatives(decode, u) / self.model.sigma.unsqueeze(-1), bend.clamp(min=_FLOOR)

    def config(self) -> dict[str, Any]:
        """Constructor arguments: the model is the other half of the pair."""
        config = super().config()
        return {"model": "<model>", "hidden": config["hidden"]}


def _derivatives(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Jacobian (..., M, K) of a map from (..., K) to (..., M) that acts on each point by itself, in K passes."""
    directions = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    # Moved here, because vmap's own out_dims=-1 fails on a derivative that is constant.
    return vmap(lambda e: directional_derivative(function, u, e.expand_as(u))[1])(directions).movedim(0, -1)


class GaussNewtonDiagonal(_GaussNewton):
    r"""Amortised Gauss-Newton guide: a Gaussian with independent coordinates and variances from the decoder's Jacobian.

    .. math:: q(u \mid x) = \prod_k N(u_k; m_k(x), \sigma_k^2), \quad
        \sigma_k^{-2} = \frac{1}{\sigma^2} \|J_{:k}\|^2 - n_k''(m_k)

    This is where a diagonal guide ends up by itself as sigma goes to zero, with a relative error of order sigma^2.

    Warning:
        The prior counts as if its coordinates were independent, and where it bends upwards (not log-concave in
        unconstrained coordinates) as if it were flat.

    References:
        Reizinger et al., "Embrace the Gap: VAEs Perform Independent Mechanism Analysis", 2022, arXiv 2206.02416.

    Args:
        model: Model with ``decode(z)``, ``sigma`` and ``prior()``; its prior's support is the guide's.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: Any network from (N, D) to the mean in unconstrained coordinates, (N, K).

    Raises:
        TypeError: If the model is of another kind.

    Example:
        >>> from zoo import LinearVAE
        >>> GaussNewtonDiagonal(LinearVAE(5, 2)).posterior(torch.zeros(4, 5)).event_shape
        torch.Size([2])
    """

    def family(self, parameters: Tensor) -> DiagNormal:
        """The Gaussian with the given mean (N, K) and the variances that belong there."""
        jacobian, bend = self.curvatures(parameters)
        return DiagNormal(parameters, (jacobian.square().sum(-2) + bend).rsqrt())


class GaussNewtonFull(_GaussNewton):
    r"""Amortised Gauss-Newton guide: a Gaussian with the full covariance that the decoder's Jacobian gives.

    .. math:: q(u \mid x) = N(u; m(x), \Sigma), \quad \Sigma^{-1} = \frac{1}{\sigma^2} J^T J - \operatorname{diag} n''

    Exact for a linear decoder and a Gaussian prior, once the mean is.

    Warning:
        As for :class:`GaussNewtonDiagonal`.

    Args:
        model: See :class:`GaussNewtonDiagonal`.
        hidden: Widths of the hidden layers of the default encoder.
        encoder: See :class:`GaussNewtonDiagonal`.

    Raises:
        TypeError: If the model is of another kind.
    """

    def family(self, parameters: Tensor) -> FullNormal:
        """The Gaussian with the given mean (N, K) and the covariance that belongs there."""
        jacobian, bend = self.curvatures(parameters)
        # With both axes reversed the Cholesky factor of the precision is the inverse of the covariance's.
        factors = (jacobian.mT.flip(-2), torch.diag_embed(bend.sqrt()).flip(-2))
        inverse = cholesky_of_sum(*factors).flip((-2, -1)).mT
        identity = torch.eye(self.latent_dim, dtype=inverse.dtype, device=inverse.device)
        return FullNormal(parameters, torch.linalg.solve_triangular(inverse, identity, upper=False))
