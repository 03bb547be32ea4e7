r"""Factor analysis: a linear decoder with a noise variance of its own for each coordinate of the data.

.. math::
    z \sim N(0, I_K), \quad x \mid z \sim N(W z + \mu, \Psi), \quad \Psi = \operatorname{diag} \sigma_d^2
    \quad\Longrightarrow\quad x \sim N(\mu, W W^T + \Psi)

In units of the noise, y = (x - mu) / sigma, it is a probabilistic PCA with loadings W / sigma and unit noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from inference.core.checks import check_count, check_finite, check_layout, check_positive
from inference.distributions.gaussian import DiagNormal, FullNormal
from zoo.linear.gaussian_algebra import LinearGaussian
from zoo.linear.models import ExactLinearModel

# Share of a coordinate's variance that its noise keeps where the likelihood would let it vanish (a Heywood case).
_LEAST_SHARE = 1e-9


class FactorAnalysis(ExactLinearModel):
    r"""Factor analysis (FA), with exact evidence and posterior.

    .. math:: z \sim N(0, I_K), \quad x \mid z \sim N(W z + \mu, \operatorname{diag} \sigma_d^2)

    Unlike :class:`zoo.PPCA` it does not depend on the units of the single coordinates.

    References:
        Rubin, Thayer, "EM Algorithms for ML Factor Analysis", 1982, Psychometrika 47.
        Barber, "Bayesian Reasoning and Machine Learning", 2012, section 21.1 (the fixed-point iteration).

    Args:
        data_dim: D.
        latent_dim: K.
        sigma: Initial standard deviation of the noise of every coordinate.

    Attributes:
        W: Loadings, (D, K).
        mu: Mean, (D,).
        log_sigma: Log standard deviations of the noise, (D,).

    Raises:
        ValueError: If sigma is not positive and finite.

    Example:
        >>> model = FactorAnalysis(5, 2)
        >>> model.log_evidence(model(n=3)).shape
        torch.Size([3])
    """

    def __init__(self, data_dim: int, latent_dim: int, *, sigma: float = 1.0) -> None:
        super().__init__(data_dim, latent_dim)
        check_positive(sigma, "sigma")
        self.W = nn.Parameter(torch.randn(data_dim, latent_dim) / math.sqrt(data_dim))
        self.mu = nn.Parameter(torch.zeros(data_dim))
        self.log_sigma = nn.Parameter(torch.full((data_dim,), math.log(sigma)))

    @property
    def sigma(self) -> Tensor:
        """Standard deviations of the noise, (D,)."""
        return self.log_sigma.exp()

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] for z (..., K): (..., D)."""
        return nn.functional.linear(z, self.W, self.mu)

    def likelihood(self, z: Tensor) -> DiagNormal:
        """Distribution of x given z (..., K): batch (...), event (D,)."""
        return DiagNormal(self.decode(z), self.sigma)

    def _log_prob(self, x: Tensor) -> Tensor:
        whitened, y = self._in_units_of_noise(x.double())
        return whitened.log_prob(y) - self.log_sigma.double().sum()

    def posterior(self, x: Tensor) -> FullNormal:
        """The exact p(z | x_n): batch (N,), event (K,)."""
        whitened, y = self._in_units_of_noise(x.double())
        loc, scale_tril = whitened.posterior(y)
        return FullNormal(loc.to(self.W.dtype), scale_tril.to(self.W.dtype))

    def _expected(self, x: Tensor, mean: Tensor, **spread: Tensor) -> Tensor:
        whitened, y = self._in_units_of_noise(x)
        return whitened.expected_log_likelihood(y, mean, **spread) - self.log_sigma.sum()

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"data_dim": self.data_dim, "latent_dim": self.latent_dim}

    @classmethod
    @torch.no_grad()
    def from_data(
        cls, x: Tensor, latent_dim: int, *, tolerance: float = 1e-9, max_steps: int = 10_000
    ) -> FactorAnalysis:
        r"""A stationary point of the likelihood, by a fixed-point iteration from the data's variances, in float64.

        .. math:: W \leftarrow \Psi^{1/2} U_K (\Lambda_K - I)_+^{1/2}, \quad
            \Psi \leftarrow \operatorname{diag}(C - W W^T)

        with the leading eigenpairs of the covariance C of the data in units of the noise.

        Warning:
            The likelihood may have several maxima, or one where the noise of a coordinate vanishes (a Heywood case);
            that noise is kept at 1e-9 of the coordinate's variance.

        Args:
            x: (N, D).
            latent_dim: K, below D.
            tolerance: Largest change of a log variance at which the iteration stops.
            max_steps: Steps at most.

        Raises:
            TypeError: If ``x`` is not a floating tensor.
            ValueError: If ``x`` is not (N, D), not finite, or constant in a coordinate, or K is not below D.
            RuntimeError: If the variances have not converged after ``max_steps``.
        """
        check_layout(x)
        check_finite(x)
        check_count(latent_dim, "latent_dim")
        if latent_dim >= x.shape[1]:
            raise ValueError(f"expected latent_dim below the data's {x.shape[1]} dimensions, got {latent_dim}")
        x = x.double()
        mean = x.mean(0)
        covariance = (x - mean).mT @ (x - mean) / len(x)
        W, variances = _fixed_point(covariance, latent_dim, tolerance, max_steps)
        model = cls(x.shape[1], latent_dim).to(x)
        for parameter, value in ((model.W, W), (model.mu, mean), (model.log_sigma, 0.5 * variances.log())):
            parameter.copy_(value)
        return model

    def _in_units_of_noise(self, x: Tensor) -> tuple[LinearGaussian, Tensor]:
        """The model of y = (x - mu) / sigma, whose noise is one, and y, in the dtype of ``x``."""
        sigma = self.sigma.to(x.dtype)
        loadings = self.W.to(x.dtype) / sigma.unsqueeze(-1)
        return LinearGaussian(loadings, torch.zeros_like(sigma), sigma.new_ones(())), (x - self.mu.to(x.dtype)) / sigma


def _fixed_point(covariance: Tensor, latent_dim: int, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Loadings (D, K) and noise variances (D,)."""
    total = covariance.diagonal()
    if not bool((total > 0).all()):
        raise ValueError(f"expected data that vary in every coordinate, got variances from {float(total.min()):.3g}")
    variances, change = total, math.inf
    for _ in range(max_steps):
        W = _best_loadings(covariance, variances, latent_dim)
        updated = torch.maximum(total - W.square().sum(-1), _LEAST_SHARE * total)
        change = float((updated / variances).log().abs().max())
        variances = updated
        if change <= tolerance:
            return W, variances
    raise RuntimeError(f"expected variances that converge within {max_steps} steps, got a last change of {change:.3g}")


def _best_loadings(covariance: Tensor, variances: Tensor, latent_dim: int) -> Tensor:
    """The loadings of greatest likelihood at given variances of the noise, (D, K)."""
    sigma = variances.sqrt()
    eigenvalues, axes = torch.linalg.eigh(covariance / torch.outer(sigma, sigma))
    kept = (eigenvalues[-latent_dim:] - 1).clamp(min=0).sqrt()
    return sigma.unsqueeze(-1) * axes[:, -latent_dim:] * kept
