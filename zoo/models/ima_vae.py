r"""A near-deterministic variational autoencoder, whose ELBO favours decoders with orthogonal columns.

.. math:: z \sim \prod_k p(z_k), \quad x \mid z \sim N(f(z), \gamma^{-2} I_D)

As gamma grows, the gap between evidence and ELBO of a guide with independent coordinates tends to the independent
mechanism analysis contrast of the decoder, and so the ELBO becomes a regularised likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from inference.core.checks import check_positive
from inference.distributions.gaussian import DiagNormal
from zoo.models.standardised_vae import StandardisedVAE
from zoo.priors.factorised import StandardNormal

# Nats of a log-density that rounding may cost before data are refused.
_ROUNDING = 0.01


class IMAVAE(StandardisedVAE):
    r"""Near-deterministic VAE of independent mechanism analysis (IMA): Gaussian noise of a given high precision.

    .. math:: x = s \, (f(z) + \gamma^{-1} \epsilon) + m

    with shift m and scale s of the data (buffers, identity unless :meth:`standardise_by` is called). What the methods
    return is in the units of x; gamma^2 is in standardised units. Train it with
    :class:`inference.AnnealedPrecision`: from a high precision at once it does not learn.

    Warning:
        At high precision a log-density is a difference of large numbers. Data whose rounding would cost more than
        a hundredth of a nat are refused: float32 then fails around gamma^2 = 1e7, float64 nowhere near.

    References:
        Reizinger, Gresele, Brady, von Kügelgen, Zietlow, Schölkopf, Martius, Brendel, Besserve, "Embrace the Gap: VAEs
        Perform Independent Mechanism Analysis", 2022, arXiv 2206.02416.

    Args:
        data_dim: D.
        latent_dim: K, at most D.
        gamma2: Precision of the noise.
        hidden: Widths of the hidden layers of the default decoder, with SiLU activations.
        network: Any smooth decoder from (M, K) to (M, D).
        prior: One of the zoo's priors, with independent coordinates; standard normal by default.

    Raises:
        ValueError: If K exceeds D, or gamma2 is not positive and finite.

    Example:
        >>> IMAVAE(3, 2, gamma2=1e6)(n=4).shape
        torch.Size([4, 3])
    """

    gamma2: Tensor

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        gamma2: float = 1e4,
        hidden: Sequence[int] = (64, 64),
        network: nn.Module | None = None,
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__(data_dim, latent_dim, hidden=hidden, network=network, prior=prior)
        if latent_dim > data_dim:
            raise ValueError(f"expected latent_dim of at most data_dim = {data_dim}, got {latent_dim}")
        check_positive(gamma2, "gamma2")
        self._gamma2 = gamma2  # as first given; the buffer may move
        self.register_buffer("gamma2", torch.tensor(float(gamma2)))

    @torch.no_grad()
    def set_precision(self, gamma2: Tensor | float) -> None:
        """Set the precision of the noise, in standardised units; its value is not checked."""
        self.gamma2.copy_(torch.as_tensor(gamma2))

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise in units of x, (1,)."""
        return (self.gamma2.rsqrt() * self.standardise.scale).reshape(1)

    def likelihood(self, z: Tensor) -> Distribution:
        """Distribution of x given z (..., K): batch (...), event (D,)."""
        return DiagNormal(self.decode(z), self.sigma)

    def check_data(self, x: Any) -> None:
        """Check that ``x`` are data for this model, and that their dtype resolves the noise.

        Raises:
            TypeError: See :func:`inference.core.checks.check_layout`.
            ValueError: See :func:`inference.core.checks.check_layout` and :func:`inference.core.checks.check_finite`;
                and if rounding costs more than a hundredth of a nat.
        """
        super().check_data(x)
        # Residuals of sigma, off by the spacing of numbers of the size of x, each by chance.
        spacing = torch.finfo(x.dtype).eps * float((x - self.standardise.shift).detach().abs().max())
        error = 3 * math.sqrt(self.data_dim) * spacing / float(self.sigma)
        if error > _ROUNDING:
            raise ValueError(
                f"expected data of a dtype that resolves sigma = {float(self.sigma):.3g}, got {x.dtype}, whose "
                f"rounding costs about {error:.2g} nats: use model.double() and x.double()"
            )

    def config(self) -> dict[str, Any]:
        """Constructor arguments, unless network or prior are not the default."""
        if self._hidden is None or type(self.prior_module) is not StandardNormal:
            return super().config()
        sizes = {"data_dim": self.data_dim, "latent_dim": self.latent_dim, "hidden": self._hidden}
        return sizes | {"gamma2": self._gamma2}
