"""The gap of the best guide with independent coordinates, read off the decoder's Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.core.protocols import SupportsGaussianDecoder
from inference.identifiability.ima_contrasts import column_contrast
from inference.numerics.jacobian import decoder_jacobian


@torch.no_grad()
def predicted_gap(model: SupportsGaussianDecoder, z: Tensor) -> Tensor:
    r"""What the decoder's Jacobian says of the gap of the best guide with independent coordinates.

    .. math:: \tfrac12 \left[\log\det\operatorname{diag} M - \log\det M\right], \quad M = J^\top J / \sigma^2 + I

    Exact for a linear decoder and a standard normal prior. As sigma goes to zero it tends to the contrast of
    independent mechanism analysis, whatever the prior.

    Warning:
        It takes the posterior for Gaussian with the decoder's own curvature, and knows nothing of residuals.

    References:
        Reizinger et al., "Embrace the Gap: VAEs Perform Independent Mechanism Analysis", 2022, arXiv 2206.02416.

    Args:
        model: Model with a decoder and Gaussian noise.
        z: Where the posteriors are, (N, K): the means of a guide, say.

    Returns:
        (N,) in nats.
    """
    jacobian = decoder_jacobian(model.decode, z) / model.sigma.unsqueeze(-1)
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
    return column_contrast(torch.cat([jacobian, identity], -2))
