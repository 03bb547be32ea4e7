"""Non-amortised Gaussian guides: free parameters for each data point of a given data set."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import biject_to

from guides.base import Local
from guides.gauss_newton import GaussNewtonDiagonal, GaussNewtonFull
from guides.parametrisation import diagonal_normal, full_normal, triangle_places
from inference.core.checks import check_arguments, check_count
from inference.core.protocols import SupportsGaussianDecoder
from inference.core.seeding import seeded
from inference.distributions.gaussian import as_full_normal, diagonal_moments
from inference.distributions.transformed import Transformed, push_forward
from inference.numerics.levenberg_marquardt import nearest_latents


def local_gaussian(x: Tensor, distribution: Any) -> Local:
    """Non-amortised Gaussian guide, with a full or a diagonal covariance, started at a given Gaussian.

    Args:
        x: Data, (N, D).
        distribution: A Gaussian, or one transformed to a support: batch (N,), event (K,). If its coordinates are
            independent, so are the guide's.

    Raises:
        TypeError: If the distribution is not Gaussian.
    """
    base = distribution.base_dist if isinstance(distribution, Transformed) else distribution
    moments, full = diagonal_moments(base), as_full_normal(base)
    if moments is not None:
        mean, sigma = (part.expand(len(x), -1) for part in moments)
        start, scales = torch.cat([mean, sigma.log()], -1), torch.cat([sigma, torch.ones_like(sigma)], -1)
        return Local(x, start, scales, family=diagonal_normal, support=distribution.support)
    if full is None:
        raise TypeError(f"expected a Gaussian posterior to free for each data point, got {type(base).__name__}")
    latent_dim = full.event_shape[0]
    mean, factor = full.loc.expand(len(x), -1), full.scale_tril.expand(len(x), -1, -1)
    diagonal, sd = factor.diagonal(dim1=-2, dim2=-1), full.variance.expand_as(full.loc.expand(len(x), -1)).sqrt()
    rows, columns = torch.tril_indices(latent_dim, latent_dim, -1, device=x.device)
    start = torch.cat([mean, diagonal.log(), factor[:, rows, columns]], -1)
    scales = torch.cat([sd, torch.ones_like(sd), diagonal[:, rows]], -1)
    family = partial(full_normal, places=triangle_places(latent_dim).to(x.device))
    return Local(x, start, scales, family=family, support=distribution.support)


@torch.no_grad()
def local_gauss_newton(
    model: SupportsGaussianDecoder,
    x: Tensor,
    *,
    family: type[GaussNewtonDiagonal] | type[GaussNewtonFull] = GaussNewtonDiagonal,
    num_starts: int = 16,
    seed: int | None = None,
) -> Local:
    """Non-amortised Gauss-Newton guide: a Gaussian at the latents whose decodings are nearest to the data.

    Its covariance comes from the decoder's Jacobian there. At low noise it is close to the best of its family:
    :func:`inference.refit` goes the rest of the way, and so finds the ELBO without an amortisation gap.

    Args:
        model: Model with a decoder and Gaussian noise.
        x: Data, (N, D).
        family: Independent coordinates, or any covariance.
        num_starts: Draws of the prior that the search for each data point starts from.
        seed: Seed of these draws.

    Raises:
        TypeError: If the model is of another kind, or the data of the wrong type.
        ValueError: If the data are not finite or have the wrong shape.

    Example:
        >>> from inference import refit
        >>> from zoo import IMAVAE
        >>> model = IMAVAE(3, 2).double().requires_grad_(False)
        >>> x = model(n=4)
        >>> refit(model, local_gauss_newton(model, x), x, progress=False).elbo.shape
        torch.Size([4])
    """
    check_count(num_starts, "num_starts")
    check_arguments((model,), (x,), {})
    guide = family(model, encoder=nn.Identity())
    with seeded(seed):
        starts = model.prior().sample(Size((num_starts, len(x))))
    u = biject_to(guide.support).inv(nearest_latents(model, x, starts).z)
    return local_gaussian(x, push_forward(guide.family(u), guide.support))
