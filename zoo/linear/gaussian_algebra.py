r"""Linear-Gaussian algebra, exact to rounding at every noise level.

.. math:: z \sim N(0, I_K), \qquad x = W z + \mu + \sigma \varepsilon, \qquad \varepsilon \sim N(0, I_D)

The evidence is :math:`N(x; \mu, W W^\top + \sigma^2 I)` and the posterior
:math:`N(z; m, \sigma^2 M^{-1})` with :math:`M = W^\top W + \sigma^2 I` and :math:`m = M^{-1} W^\top (x - \mu)`.

Forming :math:`M` squares the condition number, and Woodbury then subtracts two large numbers: at
:math:`\sigma = 10^{-6}` nothing is left. Two identities avoid both. The thin QR of the stacked matrix
:math:`[W; \sigma I]` has a factor with :math:`R^\top R = M`, which is never formed, and non-singular also where
columns of :math:`W` vanish or repeat, so that it can be differentiated there. And the quadratic form is a minimum,

.. math:: (x-\mu)^\top C^{-1} (x-\mu) = \min_z |x - \mu - W z|^2 / \sigma^2 + |z|^2, \quad \text{reached at } z = m,

a sum of two squares, in which an error of :math:`m` enters squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    r"""Linear-Gaussian model x = W z + mu + sigma eps, with z ~ N(0, I_K) and eps ~ N(0, I_D), in closed form.

    .. math:: p(x) = N(\mu, W W^\top + \sigma^2 I), \qquad
              p(z \mid x) = N(M^{-1} W^\top (x - \mu), \sigma^2 M^{-1}), \qquad M = W^\top W + \sigma^2 I

    Every method is differentiable to any order in x, W, mu and sigma, also where columns of W vanish or repeat, and
    works under ``torch.func``. Any K >= 1 is allowed, K >= D included.

    Warning:
        ``sigma`` must be positive; this is not checked, so that no value has to be read back from a device.

    References:
        Tipping and Bishop, "Probabilistic Principal Component Analysis", 1999.
        Björck, "Numerical Methods for Least Squares Problems", 1996 (QR of the stacked matrix, one refinement).

    Args:
        W: Loadings, (D, K).
        mu: Mean of x, (D,).
        sigma: Standard deviation of the noise, a scalar tensor ().

    Raises:
        ValueError: If the three shapes do not fit together.

    Example:
        >>> distribution = LinearGaussian(torch.tensor([[3.0], [4.0]]), torch.zeros(2), torch.tensor(1.0))
        >>> distribution.log_prob(torch.zeros(2))  # - log(2 pi) - log(26) / 2
        tensor(-3.4669, dtype=torch.float64)
    """

    W: Tensor
    mu: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        if self.W.ndim != 2 or self.W.shape[1] < 1:
            raise ValueError(f"expected W of shape (D, K) with K >= 1, got {tuple(self.W.shape)}")
        if self.mu.shape != self.W.shape[:1]:
            raise ValueError(f"expected mu of shape ({self.W.shape[0]},), got {tuple(self.mu.shape)}")
        if self.sigma.shape != ():
            raise ValueError(f"expected sigma of shape (), got {tuple(self.sigma.shape)}")

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Log-evidence of each data point in nats, computed and returned in float64, in O(N D K).

        .. math:: -\tfrac12 \left[ D \log 2\pi + (D - K) \log \sigma^2 + \log\det M
                  + |x - \mu - W m|^2 / \sigma^2 + |m|^2 \right]

        Warning:
            The error grows as eps \|W\| / sigma, the effect of rounding x itself: below 1e-7 relative up to
            \|W\| / sigma = 1e9. A component of the gradient can in addition carry eps (\|W\| / sigma)^2 of its
            own size where it is far below the others: d sigma for K > D, d W at x = mu with repeated columns.

        Args:
            x: Data, (..., D).

        Returns:
            (...), float64.

        Raises:
            ValueError: If the last dimension of x is not D.
        """
        self._check(x)
        W, mu, sigma = self.W.double(), self.mu.double(), self.sigma.double()
        basis, root = _factors(W, sigma)
        residual = x.double() - mu
        loc = _posterior_mean(residual, W, sigma, basis, root)
        quadratic = ((residual - loc @ W.mT) / sigma).square().sum(-1) + loc.square().sum(-1)
        log_det = 2 * (W.shape[0] - W.shape[1]) * sigma.log() - 2 * root.diagonal().log().sum()
        return -0.5 * (W.shape[0] * math.log(2 * math.pi) + log_det + quadratic)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and Cholesky factor of the exact posterior p(z | x), computed in float64.

        .. math:: m = M^{-1} W^\top (x - \mu), \qquad L L^\top = \sigma^2 M^{-1}

        Args:
            x: Data, (..., D).

        Returns:
            loc (..., K) and scale_tril (K, K), the same for every data point; both in the dtype of W.

        Raises:
            ValueError: If the last dimension of x is not D.
        """
        self._check(x)
        W, mu, sigma = self.W.double(), self.mu.double(), self.sigma.double()
        basis, root = _factors(W, sigma)
        loc = _posterior_mean(x.double() - mu, W, sigma, basis, root)
        return loc.to(self.W.dtype), (sigma * root).to(self.W.dtype)

    def expected_log_likelihood(
        self, x: Tensor, loc: Tensor, *, var: Tensor | None = None, scale_tril: Tensor | None = None
    ) -> Tensor:
        r"""Expectation of log N(x; W z + mu, sigma^2 I) under q(z) = N(loc, Cov), in nats per data point.

        .. math:: -\tfrac{D}{2} \log 2\pi\sigma^2 - \frac{|x - \mu - W\,\mathrm{loc}|^2
                  + \operatorname{tr}(W^\top W\,\mathrm{Cov})}{2\sigma^2}

        Computed in the dtype of the arguments. Cov is given in one of two ways, and broadcasts against x and loc.

        Args:
            x: Data, (..., D).
            loc: Mean of q, (..., K).
            var: Variances of a diagonal Cov, (..., K).
            scale_tril: Cholesky factor of Cov, (..., K, K).

        Returns:
            (...), the common batch shape.

        Raises:
            ValueError: If x or loc has a wrong last dimension, or not exactly one of var and scale_tril is given.
        """
        self._check(x)
        if loc.shape[-1] != self.W.shape[1]:
            raise ValueError(f"expected loc of shape (..., {self.W.shape[1]}), got {tuple(loc.shape)}")
        error = (x - self.mu - loc @ self.W.mT).square().sum(-1) + _trace(self.W, var, scale_tril)
        return -x.shape[-1] * (self.sigma.log() + 0.5 * math.log(2 * math.pi)) - 0.5 * error / self.sigma**2

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.W.shape[0]:
            raise ValueError(f"expected x of shape (..., {self.W.shape[0]}), got {tuple(x.shape)}")


def _factors(W: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Q1 (D, K) and the lower-triangular L (K, K) with L L' = M^-1 and L Q1' = M^-1 W'.

    From the QR of [W; sigma I] with the columns in reverse order: the inverse of its upper factor, turned round in
    both directions, is lower triangular.
    """
    eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    Q, R = torch.linalg.qr(torch.cat([W, sigma * eye]).flip(-1))
    sign = R.diagonal().detach().sign()
    root = torch.linalg.solve_triangular(sign[:, None] * R, eye, upper=True)
    return (Q[: W.shape[0]] * sign).flip(-1), root.flip(-1, -2)


def _posterior_mean(residual: Tensor, W: Tensor, sigma: Tensor, basis: Tensor, root: Tensor) -> Tensor:
    """M^-1 W' residual, (..., K), by least squares and one step of refinement.

    In exact arithmetic the step leads to the solution from any start, so the start carries no gradient.
    """
    start = (residual @ basis @ root.mT).detach()
    step = (residual - start @ W.mT) @ W - sigma**2 * start
    return start + step @ root @ root.mT


def _trace(W: Tensor, var: Tensor | None, scale_tril: Tensor | None) -> Tensor:
    """tr(W' W Cov), (...)."""
    if var is not None and scale_tril is None:
        return var @ W.square().sum(0)
    if scale_tril is not None and var is None:
        return ((W.mT @ W @ scale_tril) * scale_tril).sum((-2, -1))
    raise ValueError(f"expected one of var and scale_tril, got {'none' if var is None else 'both'}")
