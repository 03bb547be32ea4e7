r"""The variances that an optimal Gaussian guide has, from the second derivatives of the log joint.

Where the ELBO is stationary in the covariance of q(z | x) = N(m, Sigma),

.. math::
    \frac1{\sigma_k^2} = E_q\!\left[-\partial_k^2 \log p(x, z)\right] \text{ (diagonal)}, \qquad
    \Sigma^{-1} = E_q\!\left[-\nabla^2 \log p(x, z)\right] \text{ (full)}.

They are identities, not approximations, for any model with two derivatives.

References:
    Opper, Archambeau, "The Variational Gaussian Approximation Revisited", Neural Computation 21, 2009.
    Fyffe, 2019, arXiv 1912.10309 (constant variances).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from inference.core.checks import check_finite
from inference.core.estimates import Estimate
from inference.numerics.jacobian import Decode, directional_derivative


def negative_hessian(log_joint: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    r"""Minus the second derivatives of a log joint density in the latent, at each point.

    .. math:: H_{kl} = -\partial_k \partial_l \log p(x, z)

    Args:
        log_joint: From (..., K) to (...), each point by itself, for example a :class:`inference.LogJoint`.
        z: Points, (..., K).

    Returns:
        (..., K, K), without gradient.

    Raises:
        ValueError: If the log joint does not return one number per point, or a derivative is not finite.
    """
    with torch.enable_grad():
        points = z.detach().requires_grad_()
        value = log_joint(points)
        if value.shape != z.shape[:-1]:
            raise ValueError(f"expected one log density a point, {tuple(z.shape[:-1])}, got {tuple(value.shape)}")
        # The zero ties in what does not depend on z, or only linearly.
        total = value.sum() + 0 * points.square().sum()
        (gradient,) = torch.autograd.grad(total, points, create_graph=True)
        rows = [torch.autograd.grad(gradient[..., k].sum(), points, retain_graph=True)[0] for k in range(z.shape[-1])]
    hessian = -torch.stack(rows, -2)
    check_finite(hessian, "the second derivatives of the log joint")
    return hessian


def expected_hessian(log_joint: Callable[[Tensor], Tensor], draws: Tensor) -> Estimate:
    r"""Expectation of minus the Hessian of the log joint under the guide, with its Monte Carlo error.

    .. math:: E_q[-\nabla^2 \log p(x_n, z)]

    Its diagonal is 1 / sigma^2 of the best diagonal Gaussian guide around its own mean, its inverse the covariance of
    the best full one.

    Args:
        log_joint: From (S, N, K) to (S, N).
        draws: Draws of the guide, (S, N, K) with S at least 2.

    Returns:
        Value and standard error, (N, K, K) each.

    Raises:
        ValueError: As :func:`negative_hessian`, and if the draws are not (S, N, K) with S at least 2.
    """
    if draws.dim() != 3 or len(draws) < 2:
        raise ValueError(f"expected draws of shape (S, N, K) with S >= 2, got {tuple(draws.shape)}")
    hessians = negative_hessian(log_joint, draws)
    return Estimate(hessians.mean(0), hessians.std(0) / math.sqrt(len(draws)))


def likelihood_curvature(decode: Decode, z: Tensor, x: Tensor, sigma: float | Tensor) -> Tensor:
    r"""Diagonal of minus the Hessian of a Gaussian log-likelihood, split as the decoder makes it.

    .. math:: H_k = \frac1{\sigma^2} \left[\|\partial_k f(z)\|^2 + (f(z) - x) \cdot \partial_k^2 f(z)\right]

    For little noise the second part vanishes at the optimum, and 1 / sigma_k^2 is that of
    :func:`inference.self_consistency`. A prior adds minus its own second derivative.

    Args:
        decode: Decoder from (M, K) to (M, D).
        z: Points, (M, K).
        x: Data, (M, D).
        sigma: Standard deviation of the noise.

    Returns:
        (M, K).
    """
    terms = []
    for direction in torch.eye(z.shape[-1], dtype=z.dtype, device=z.device):
        along = direction.expand_as(z)

        def slope(points: Tensor, along: Tensor = along) -> Tensor:
            return directional_derivative(decode, points, along)[1]

        first, second = directional_derivative(slope, z, along)
        terms.append(first.square().sum(-1) + ((decode(z) - x) * second).sum(-1))
    return torch.stack(terms, -1) / sigma**2


def constant_var(curvature: Tensor) -> Tensor:
    r"""The best variances of a guide that has the same ones for all data, (K,).

    .. math:: \sigma_k^2 = 1 / E_x[H_k(x)]

    Args:
        curvature: H_k(x_n) = 1 / sigma_k^2(x_n) of the best guide with variances for each data point, (N, K).

    Raises:
        ValueError: If a curvature is not positive and finite.
    """
    return _checked(curvature).mean(0).reciprocal()


def constant_var_penalty(curvature: Tensor) -> Tensor:
    r"""Penalty of a constant variance: the loss of mean ELBO if all data share the guide's variances, () in nats.

    .. math:: \tfrac12 \sum_k \left(\log E_x H_k - E_x \log H_k\right) \ge 0

    Warning:
        Exact where the log joint is quadratic in z over the width of the guide; for a decoder with little noise up to
        the order of the noise's variance.

    References:
        Fyffe, 2019, arXiv 1912.10309.

    Args:
        curvature: See :func:`constant_var`.

    Raises:
        ValueError: If a curvature is not positive and finite.

    Example:
        >>> constant_var_penalty(torch.tensor([[1.0], [4.0]]))  # log(2.5 / 2) / 2
        tensor(0.1116)
    """
    _checked(curvature)
    return 0.5 * (curvature.mean(0).log() - curvature.log().mean(0)).sum()


def _checked(curvature: Tensor) -> Tensor:
    if curvature.dim() != 2 or not bool(((curvature > 0) & curvature.isfinite()).all()):
        raise ValueError(f"expected curvatures (N, K), positive and finite, got shape {tuple(curvature.shape)}")
    return curvature
