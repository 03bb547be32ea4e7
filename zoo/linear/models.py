r"""Probabilistic PCA (pPCA) and the linear VAE, whose evidence is known in closed form.

.. math::
    z \sim N(0, I_K), \quad x \mid z \sim N(W z + \mu, \sigma^2 I_D)
    \quad\Longrightarrow\quad x \sim N(\mu, W W^T + \sigma^2 I_D)

They are the same distribution. :class:`PPCA` is fitted in closed form, :class:`LinearVAE` by gradients.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from inference.core.checks import check_count, check_finite, check_layout, check_positive
from inference.core.standardisation import Standardise
from inference.distributions.gaussian import DiagNormal, FullNormal, as_full_normal, diagonal_moments
from inference.pair.module import Module
from zoo.base import LatentVariableModel
from zoo.linear.estimation import Data, maximum_at_fixed_sigma, maximum_likelihood
from zoo.linear.gaussian_algebra import LinearGaussian

Self = TypeVar("Self", bound="LinearGaussianModel")


class ExactLinearModel(LatentVariableModel):
    """Base of the models whose evidence and expected log-likelihood follow from linear algebra.

    A subclass gives ``_log_prob(x)``, (N,) in float64, and ``_expected(x, mean, var=)`` or ``scale_tril=``, (N,).
    """

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x_n) in closed form, float64.

        Args:
            x: (N, D) of any floating dtype.

        Returns:
            (N,) in nats.

        Raises:
            TypeError: If ``x`` is not a floating tensor.
            ValueError: If ``x`` is not (N, D), not finite or on another device.
        """
        check_layout(x, data_dim=self.data_dim, device=self._like.device)
        check_finite(x)
        return self._log_prob(x)

    def expected_log_likelihood(self, x: Tensor, posterior: Any) -> Tensor:
        """E_q[log p(x_n | z)] in closed form for a Gaussian q.

        Args:
            x: (N, D).
            posterior: Gaussian with batch (N,), event (K,).

        Returns:
            (N,) in nats, with gradient.

        Raises:
            TypeError: If ``posterior`` is not Gaussian, or ``x`` is not a floating tensor of the parameters' dtype.
            ValueError: If ``x`` is not (N, D).
        """
        self._check_layout(x)
        diagonal, full = diagonal_moments(posterior), as_full_normal(posterior)
        if full is None:
            raise TypeError(f"expected a Gaussian posterior for the closed form, got {type(posterior).__name__}")
        if diagonal is not None:
            return self._expected(x, diagonal[0], var=diagonal[1].square())
        return self._expected(x, full.loc, scale_tril=full._unbroadcasted_scale_tril)

    def _log_prob(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _expected(self, x: Tensor, mean: Tensor, **spread: Tensor) -> Tensor:
        raise NotImplementedError


class LinearGaussianModel(ExactLinearModel):
    r"""Base of pPCA and linear VAE: linear decoder, spherical Gaussian noise, exact evidence and posterior.

    .. math:: x = s \, (W z + \mu + \sigma \epsilon) + m

    with shift m and one scale s of the data (buffers, identity unless :meth:`standardise_by` is called). What
    the methods return is in the units of x.

    Args:
        data_dim: D.
        latent_dim: K.
        sigma: Initial standard deviation of the noise, in standardised units: after :meth:`standardise_by` it is this
            many times the data's scale.
        learn_sigma: Whether sigma is trained or stays as given.

    Attributes:
        W: (D, K), in standardised units.
        mu: (D,), in standardised units.
        log_sigma: (), in standardised units.

    Raises:
        ValueError: If sigma is not positive.
    """

    def __init__(self, data_dim: int, latent_dim: int, *, sigma: float = 1.0, learn_sigma: bool = True) -> None:
        super().__init__(data_dim, latent_dim)
        check_positive(sigma, "sigma")
        self.W = nn.Parameter(torch.randn(data_dim, latent_dim) / math.sqrt(data_dim))
        self.mu = nn.Parameter(torch.zeros(data_dim))
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)), requires_grad=learn_sigma)
        self.standardise = Standardise(data_dim)
        self._in_closed_form = False

    def standardise_by(self: Self, x: Tensor) -> Self:
        """Express the parameters in units of the data ``x`` (N, D): its mean and one global scale; returns the model.

        Raises:
            ValueError: If ``x`` is not (N, D), not finite or constant, or the model was made in closed form.
        """
        if self._in_closed_form:
            raise ValueError(
                "expected parameters still to be trained, got those of the maximum in closed form: they are in the "
                "units of the data already"
            )
        self.standardise.fit(x)
        return self

    @property
    def linear_gaussian(self) -> LinearGaussian:
        """The parameters in units of x, W (D, K), mu (D,) and sigma (), with the closed forms that follow from them."""
        shift, scale = self.standardise.shift, self.standardise.scale
        return LinearGaussian(self.W * scale, self.mu * scale + shift, self.log_sigma.exp() * scale)

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise in units of x, ()."""
        return self.log_sigma.exp() * self.standardise.scale

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] for z (..., K), in units of x: (..., D)."""
        y = nn.functional.linear(z, self.W, self.mu)
        return self.standardise.inverse(y)

    def likelihood(self, z: Tensor) -> DiagNormal:
        """Distribution of x given z (..., K): batch (...), event (D,)."""
        return DiagNormal(self.decode(z), self.sigma.unsqueeze(-1))

    def _log_prob(self, x: Tensor) -> Tensor:
        return self.linear_gaussian.log_prob(x)

    def posterior(self, x: Tensor) -> FullNormal:
        """The exact p(z | x_n): batch (N,), event (K,)."""
        return FullNormal(*self.linear_gaussian.posterior(x))

    def _expected(self, x: Tensor, mean: Tensor, **spread: Tensor) -> Tensor:
        return self.linear_gaussian.expected_log_likelihood(x, mean, **spread)

    def marginal(self) -> Marginal:
        """The same distribution with z integrated out, as a Pyro model with the one site ``"x"``."""
        return Marginal(self)

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "data_dim": self.data_dim,
            "latent_dim": self.latent_dim,
            "learn_sigma": self.log_sigma.requires_grad,
        }

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"sigma": float(f"{float(self.sigma.detach()):.4g}")}

    @classmethod
    def _at_maximum(cls: type[Self], x: Data, latent_dim: int, sigma: float | None) -> Self:
        fitted = maximum_likelihood(x, latent_dim) if sigma is None else maximum_at_fixed_sigma(x, latent_dim, sigma)
        model = cls(fitted.W.shape[0], latent_dim, learn_sigma=sigma is None).double()
        model._in_closed_form = True
        with torch.no_grad():
            model.W.copy_(fitted.W)
            model.mu.copy_(fitted.mu)
            model.log_sigma.copy_(fitted.sigma.log())
        return model


class PPCA(LinearGaussianModel):
    r"""Probabilistic principal component analysis (pPCA).

    .. math:: z \sim N(0, I_K), \quad x \mid z \sim N(W z + \mu, \sigma^2 I_D)

    References:
        Tipping, Bishop, "Probabilistic Principal Component Analysis", 1999, J. R. Stat. Soc. B 61.

    Args:
        data_dim: D.
        latent_dim: K.
        sigma: Initial standard deviation of the noise, in standardised units.
        learn_sigma: Whether sigma is trained or stays as given.

    Example:
        >>> from zoo import digits
        >>> x = digits(test_size=0).train
        >>> print(f"{PPCA.from_data(x, 8).log_evidence(x).mean().item():.8f}")
        -163.23588991
    """

    @classmethod
    def from_data(cls, x: Data, latent_dim: int, *, sigma: float | None = None) -> PPCA:
        r"""The maximum of the likelihood, in closed form and one pass over the data, in float64.

        .. math:: \sigma^2 = \frac{1}{D - K} \sum_{i > K} \lambda_i, \quad W = U_K (\Lambda_K - \sigma^2)^{1/2}

        Args:
            x: (N, D), or an iterable of such batches where the data are larger than memory.
            latent_dim: K.
            sigma: The standard deviation of the noise, to keep it fixed: the maximum is then over W and mu alone, W
                has a zero column for each eigenvalue below sigma^2, and any K up to D is allowed.

        Raises:
            TypeError: If the data are not floating.
            ValueError: If the data are empty, not finite or not (N, D), or K is not below their rank.
        """
        return cls._at_maximum(x, latent_dim, sigma)


class LinearVAE(LinearGaussianModel):
    r"""Linear variational autoencoder (linear VAE): the model of :class:`PPCA`, trained by variational inference.

    .. math:: z \sim N(0, I_K), \quad x \mid z \sim N(W z + \mu, \sigma^2 I_D)

    Its ELBO has the same maximum as the evidence, but prefers orthogonal columns of W.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse",
        2019, arXiv 1911.02469.

    Args:
        data_dim: D.
        latent_dim: K.
        sigma: Initial standard deviation of the noise, in standardised units.
        learn_sigma: Whether sigma is trained or stays as given.

    Example:
        >>> LinearVAE(5, 2)(n=3).shape
        torch.Size([3, 5])
    """

    @classmethod
    def optimum(cls, x: Data, latent_dim: int, *, sigma: float | None = None) -> LinearVAE:
        """The global maximum of the ELBO: that of the likelihood, with the principal components as columns of W.

        Args:
            x: (N, D), or an iterable of such batches.
            latent_dim: K.
            sigma: See :meth:`PPCA.from_data`.

        Raises:
            TypeError: See :meth:`PPCA.from_data`.
            ValueError: See :meth:`PPCA.from_data`.
        """
        return cls._at_maximum(x, latent_dim, sigma)


class LowRankNormal(TorchDistribution):
    r"""The marginal distribution of a linear-Gaussian model, N(mu, W W' + sigma^2 I), with density and draws in O(D K).

    Args:
        linear_gaussian: The model's parameters in units of x.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, linear_gaussian: LinearGaussian, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.linear_gaussian = linear_gaussian
        super().__init__(batch_shape, linear_gaussian.mu.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> LowRankNormal:
        """The same distribution over a larger batch."""
        return LowRankNormal(self.linear_gaussian, torch.Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        """Mean, batch + (D,)."""
        return self.linear_gaussian.mu.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Variances, batch + (D,)."""
        variance = self.linear_gaussian.W.square().sum(-1) + self.linear_gaussian.sigma.square()
        return variance.expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, ``sample_shape`` + batch + (D,)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        like, (data_dim, latent_dim) = self.linear_gaussian.mu, self.linear_gaussian.W.shape
        z = torch.randn((*shape, latent_dim), dtype=like.dtype, device=like.device)
        noise = torch.randn((*shape, data_dim), dtype=like.dtype, device=like.device)
        return like + z @ self.linear_gaussian.W.mT + self.linear_gaussian.sigma * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats and float64, one per batch member."""
        return self.linear_gaussian.log_prob(value).expand(torch.broadcast_shapes(self.batch_shape, value.shape[:-1]))


class Marginal(Module):
    r"""A linear-Gaussian model with its latent integrated out.

    .. math:: x_n \sim N(\mu, W W^T + \sigma^2 I_D)

    Args:
        model: The model; its parameters are shared.
    """

    def __init__(self, model: LinearGaussianModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor | None = None, n: int | None = None) -> Tensor:
        """Sample or observe ``"x"`` in the plate ``"data"``.

        Args:
            x: Observations, (N, D); None samples them.
            n: Number of data points to sample where ``x`` is None.

        Raises:
            TypeError: If ``x`` is not a floating tensor of the parameters' dtype.
            ValueError: If ``x`` is not (N, D), or neither ``x`` nor ``n`` is given.
        """
        if x is not None:
            self.model._check_layout(x)
            n = len(x)
        check_count(n, "n, the number of data points to sample where x is None,")
        with pyro.plate("data", n, dim=-1):
            return pyro.sample("x", LowRankNormal(self.model.linear_gaussian), obs=x)
