r"""The optimal decoder for a given encoder, in closed form: no network has a smaller squared error.

.. math:: f^*(z) = \sum_i r_i(z) \, x_i, \qquad r_i(z) = \frac{q(z \mid x_i)}{\sum_j q(z \mid x_j)}

It is the conditional mean of x given z under the joint distribution of training data and encoder, so that for every
decoder f

.. math:: E_i E_{q(z \mid x_i)} \|x_i - f(z)\|^2 = E_i E_{q(z \mid x_i)} \|x_i - f^*(z)\|^2
          + \int q(z) \, \|f(z) - f^*(z)\|^2 \, dz, \qquad q(z) = \frac1N \sum_i q(z \mid x_i).

It is a reference to compare decoders with, not a model: it holds the training data.

References:
    Fyffe, 2019, arXiv 1912.10309.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from inference.core.checks import check_count, check_finite
from inference.core.estimates import Estimate
from inference.core.seeding import seeded
from inference.distributions.batched_gaussian import Gaussians
from inference.distributions.gaussian import as_full_normal, diagonal_moments


class OptimalDecoder(nn.Module):
    r"""Optimal decoder: the conditional mean of the training data given a latent, under a Gaussian encoder.

    It is a network without parameters and can stand wherever a decoder can. In :class:`zoo.DeepGaussianVAE` it gives
    the largest ELBO that this encoder can have with any decoder.

    Warning:
        Made from the training data for one encoder as it is now; it does not follow the encoder, and does not
        generalise. A call costs O(M N (K + D)).

    Args:
        posterior: q(z | x_n) of all training data: Gaussian, batch (N,), event (K,).
        x: The training data, (N, D).

    Raises:
        TypeError: If the posterior is not Gaussian.
        ValueError: If it does not fit the data.

    Example:
        >>> from guides import MeanField
        >>> x = torch.randn(9, 5)
        >>> OptimalDecoder(MeanField(5, 2).posterior(x), x)(torch.zeros(4, 2)).shape
        torch.Size([4, 5])
    """

    mean: Tensor
    factor: Tensor
    x: Tensor

    def __init__(self, posterior: Distribution, x: Tensor) -> None:
        super().__init__()
        moments, full = diagonal_moments(posterior), as_full_normal(posterior)
        if full is None:
            raise TypeError(f"expected a Gaussian posterior, got {type(posterior).__name__}")
        if x.dim() != 2 or full.batch_shape != x.shape[:1]:
            raise ValueError(
                f"expected data (N, D) and a posterior of batch (N,), got {tuple(x.shape)} and "
                f"{tuple(full.batch_shape)}"
            )
        check_finite(x)
        mean, factor = (full.loc, full.scale_tril) if moments is None else moments
        for name, value in (
            ("mean", mean),
            ("factor", factor.expand(mean.shape + factor.shape[mean.dim() :])),
            ("x", x),
        ):
            self.register_buffer(name, value.detach().clone())

    @property
    def _posteriors(self) -> Gaussians:
        return Gaussians(self.mean, self.factor)

    def responsibilities(self, z: Tensor) -> Tensor:
        """r_i(z) for z (..., K): (..., N), summing to one."""
        weights, constants = self._posteriors.coefficients()
        features = self._posteriors.features(z.reshape(-1, z.shape[-1]))
        return (features @ weights.mT + constants).softmax(-1).reshape(*z.shape[:-1], -1)

    def forward(self, z: Tensor) -> Tensor:
        """f*(z) for z (..., K): (..., D)."""
        return self.responsibilities(z) @ self.x

    def jacobian(self, z: Tensor) -> Tensor:
        r"""df*/dz in closed form for z (M, K): (M, D, K).

        .. math:: \frac{\partial f^*}{\partial z} = Cov_r\!\left(x_i, \nabla_z \log q(z \mid x_i)\right)
                  = Cov_r(x_i, \mu_i) / s^2 \text{ for one constant variance } s^2

        Raises:
            TypeError: If the encoder's coordinates are not independent.
        """
        if not self._posteriors.is_diagonal:
            raise TypeError("expected an encoder with independent coordinates, got one with a full covariance")
        r = self.responsibilities(z)
        score = (self.mean - z.unsqueeze(1)) / self.factor.square()  # (M, N, K)
        centred = score - torch.einsum("mn,mnk->mk", r, score).unsqueeze(1)
        return torch.einsum("mn,nd,mnk->mdk", r, self.x, centred)

    @torch.no_grad()
    def likelihood_var(self, *, num_samples: int = 32, seed: int | None = None) -> Estimate:
        r"""The best variances of a Gaussian likelihood around f*, with their Monte Carlo error.

        .. math:: s_d^2 = E_i E_{q(z \mid x_i)} (x_{id} - f^*_d(z))^2

        Args:
            num_samples: Draws of each distribution, at least 2.
            seed: Seed of the draws; leaves the global random state as it was.

        Returns:
            Value and standard error, (D,) each.
        """
        return self._average(lambda z: (self.x - self(z)).square(), num_samples, seed)

    @torch.no_grad()
    def excess_risk(
        self, decode: Callable[[Tensor], Tensor], *, num_samples: int = 32, seed: int | None = None
    ) -> Estimate:
        r"""Excess risk of a decoder: its squared error less the least possible one, with its Monte Carlo error.

        .. math:: \int q(z) \, \|f(z) - f^*(z)\|^2 \, dz

        Args:
            decode: f, from (M, K) to (M, D).
            num_samples: Draws of each distribution, at least 2.
            seed: Seed of the draws; leaves the global random state as it was.

        Returns:
            Value and standard error, () each.
        """
        return self._average(lambda z: (decode(z) - self(z)).square().sum(-1), num_samples, seed)

    def _average(self, term: Callable[[Tensor], Tensor], num_samples: int, seed: int | None) -> Estimate:
        """Mean over data and draws of a term (N, ...) of one draw per data point; the error is that of the draws."""
        check_count(num_samples, "num_samples", minimum=2)
        with seeded(seed):
            draws = (self._posteriors.transform(torch.randn_like(self.mean)) for _ in range(num_samples))
            means = torch.stack([term(z).mean(0) for z in draws])
        return Estimate(means.mean(0), means.std(0) / math.sqrt(num_samples))
