"""The gap of the best guide with independent coordinates, predicted from the decoder's Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.core.protocols import SupportsGaussianDecoder
from inference.identifiability.ima_contrasts import column_contrast
from inference.numerics.jacobian import decoder_jacobian


@torch.no_grad()
def predicted_gap(model: SupportsGaussianDecoder, z: Tensor) -> Tensor:
    r"""Predicted gap of the best guide with independent coordinates, from the decoder's Jacobian.

    .. math:: \tfrac12 \left[\log\det\operatorname{diag} M - \log\det M\right], \quad M = J^\top J / \sigma^2 + I

    Exact for a linear decoder and a standard normal prior. As sigma goes to zero it tends to the contrast of
    independent mechanism analysis, whatever the prior.

    Warning:
        The posterior is taken as Gaussian with the decoder's curvature; residuals are neglected.

    References:
        Reizinger et al., "Embrace the Gap: VAEs Perform Independent Mechanism Analysis", 2022, arXiv 2206.02416.

    Args:
        model: Model with a decoder and Gaussian noise.
        z: Where the posteriors are, (N, K), for example the means of a guide.

    Returns:
        (N,) in nats.
    """
    jacobian = decoder_jacobian(model.decode, z) / model.sigma.unsqueeze(-1)
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
    return column_contrast(torch.cat([jacobian, identity], -2))
