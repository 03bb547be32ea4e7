"""Gaussian distributions from the flat parameters that a network or an optimiser gives."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.distributions.gaussian import DiagNormal, FullNormal


def diagonal_normal(parameters: Tensor) -> DiagNormal:
    """The Gaussian with means and log standard deviations side by side in (..., 2 K)."""
    mean, log_sigma = parameters.chunk(2, dim=-1)
    return DiagNormal(mean, log_sigma.exp())


def full_normal(parameters: Tensor, places: Tensor) -> FullNormal:
    """The Gaussian with mean, log diagonal and lower triangle of L side by side in (..., K + K (K + 1) / 2).

    Args:
        parameters: See above.
        places: What :func:`triangle_places` gives for K.
    """
    k = len(places)
    mean, log_diagonal, below = parameters.split([k, k, k * (k - 1) // 2], dim=-1)
    entries = torch.cat([torch.zeros_like(mean[..., :1]), log_diagonal.exp(), below], dim=-1)
    return FullNormal(mean, entries[..., places])


def triangle_places(latent_dim: int) -> Tensor:
    """Where each entry of L (K, K) stands in [0, diagonal, below]; a gather, as function transforms refuse writes."""
    places = torch.diag(torch.arange(1, latent_dim + 1))
    rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
    places[rows, columns] = torch.arange(latent_dim + 1, latent_dim + 1 + len(rows))
    return places
