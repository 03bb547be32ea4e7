r"""The latent whose decoding is nearest to each data point.

.. math:: g(x_n) = \arg\min_z \|(x_n - f(z)) / \sigma\|^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from inference.core.protocols import SupportsGaussianDecoder
from inference.numerics.jacobian import decoder_jacobian

_STEPS = 200
_FIRST_DAMPING, _MAX_DAMPING = 1e-3, 1e12


@dataclass(frozen=True)
class Nearest:
    """Nearest latents of data.

    Attributes:
        z: (N, K), on the support of the prior.
        residual: (x - f(z)) / sigma, (N, D).
        gradient_norm: Norm of J' residual in units of the residual that noise makes, (N,); zero at a stationary point.
        points: All points that starts led to, the nearest first, (S, N, K).
        apart: Which of them are more than a posterior standard deviation away from those before, (S, N).
        num_starts: Starts per data point, S.
    """

    z: Tensor
    residual: Tensor
    gradient_norm: Tensor
    points: Tensor
    apart: Tensor
    num_starts: int


@torch.no_grad()
def nearest_latents(model: SupportsGaussianDecoder, x: Tensor, starts: Tensor) -> Nearest:
    """Levenberg-Marquardt search in unconstrained coordinates, all data points and starts side by side.

    Warning:
        The global minimum is found if a start lies in its basin.

    References:
        Levenberg, "A method for the solution of certain non-linear problems in least squares", 1944. Marquardt, "An
        algorithm for least-squares estimation of nonlinear parameters", 1963.

    Args:
        model: Model with a decoder and Gaussian noise.
        x: Data, (N, D).
        starts: Latents to start from, (S, N, K), on the support of the prior.
    """
    support = model.prior().support
    assert support is not None
    transform = biject_to(support)
    num_starts, num_data, latent_dim = starts.shape
    targets = x.repeat(num_starts, 1)
    u = _solve(model, transform, targets, transform.inv(starts.reshape(-1, latent_dim)))
    z = transform(u)
    residual = (targets - model.decode(z)) / model.sigma
    costs = residual.square().sum(-1).nan_to_num(nan=torch.inf).reshape(num_starts, num_data)
    order = costs.argsort(0)
    rows = (order * num_data + torch.arange(num_data, device=x.device)).flatten()
    u, z, residual = u[rows], z[rows], residual[rows]
    jacobian = decoder_jacobian(lambda u: model.decode(transform(u)), u) / model.sigma.unsqueeze(-1)
    gradient = (jacobian[:num_data].mT @ residual[:num_data].unsqueeze(-1)).squeeze(-1)
    norms = jacobian[:num_data].norm(dim=-2).clamp(min=torch.finfo(x.dtype).tiny)

    def by_start(values: Tensor) -> Tensor:
        return values.unflatten(0, (num_starts, num_data))

    apart = _apart(by_start(u), by_start(jacobian)) & costs.gather(0, order).isfinite()
    gradient_norm = (gradient / norms).norm(dim=-1)
    return Nearest(z[:num_data], residual[:num_data], gradient_norm, by_start(z), apart, num_starts)


def _apart(u: Tensor, jacobian: Tensor) -> Tensor:
    """Which points (S, N, K) are more than a posterior standard deviation away from each of those before, (S, N)."""
    apart = torch.ones_like(u[..., 0], dtype=torch.bool)
    for i in range(1, len(u)):
        steps = (u[:i] - u[i]).unsqueeze(-1)
        away = torch.minimum(*((j @ steps).squeeze(-1).norm(dim=-1) for j in (jacobian[:i], jacobian[i])))
        apart[i] = ((away > 1) | ~apart[:i]).all(0)
    return apart


def _solve(model: SupportsGaussianDecoder, transform: Transform, x: Tensor, u: Tensor) -> Tensor:
    """Damped Gauss-Newton steps, each data point with a damping of its own."""

    def decode(u: Tensor) -> Tensor:
        return model.decode(transform(u)) / model.sigma

    target = x / model.sigma
    residual = target - decode(u)
    cost, damping = residual.square().sum(-1), torch.full_like(x[:, 0], _FIRST_DAMPING)
    active = torch.arange(len(u), device=u.device)
    for _ in range(_STEPS):
        jacobian = decoder_jacobian(decode, u[active])
        normal = jacobian.mT @ jacobian
        scale = normal.diagonal(dim1=-2, dim2=-1)
        scale = scale + 1e-12 * scale.amax(-1, keepdim=True) + torch.finfo(x.dtype).tiny
        matrix = normal + torch.diag_embed(damping[active].unsqueeze(-1) * scale)
        slope = jacobian.mT @ residual[active].unsqueeze(-1)
        step = torch.linalg.solve_ex(matrix, slope)[0].squeeze(-1).nan_to_num(0.0)
        proposal = u[active] + step
        new_residual = target[active] - decode(proposal)
        new_cost = new_residual.square().sum(-1)
        better = new_cost < cost[active]
        gain = torch.where(better, cost[active] - new_cost, torch.zeros_like(new_cost))
        index = active[better]
        u[index], residual[index], cost[index] = proposal[better], new_residual[better], new_cost[better]
        damping[active] = torch.where(better, damping[active] / 5, damping[active] * 4)
        small = (gain <= 1e-13 * (1 + cost[active])) & better
        active = active[~(small | (damping[active] > _MAX_DAMPING))]
        if len(active) == 0:
            break
    return u
