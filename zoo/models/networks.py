"""Decoder networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from guides.networks import halved


def decode_rows(network: nn.Module, z: Tensor, data_dim: int) -> Tensor:
    """The output (..., D) of a network that takes rows (M, K), for latents z (..., K).

    Raises:
        ValueError: If the network's output is not (M, D).
    """
    flat = z.reshape(-1, z.shape[-1])
    output = network(flat)
    if output.shape != (flat.shape[0], data_dim):
        raise ValueError(f"expected the decoder's output of shape {(len(flat), data_dim)}, got {tuple(output.shape)}")
    return output.reshape(*z.shape[:-1], data_dim)


class ConvDecoder(nn.Module):
    """A convolutional decoder from latents (M, K) to flattened images (M, C H W).

    The mirror image of :class:`guides.ConvEncoder`: a linear layer makes the smallest feature map, which is enlarged
    and convolved step by step.

    Args:
        latent_dim: K.
        image_shape: (H, W) or (C, H, W).
        channels: Channels of the feature maps, from the image's side inwards.

    Example:
        >>> import torch
        >>> ConvDecoder(3, (8, 8))(torch.zeros(5, 3)).shape
        torch.Size([5, 64])
    """

    def __init__(self, latent_dim: int, image_shape: Sequence[int], channels: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        depth, *size = image_shape if len(image_shape) == 3 else (1, *image_shape)
        sizes = [tuple(size)]
        for _ in channels:
            sizes.append(halved(sizes[-1]))
        widths = [depth, *channels]
        (height, width), inner = sizes[-1], widths[-1]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, inner * height * width),
            nn.Unflatten(1, (inner, height, width)),
        ]
        for outer, target in zip(reversed(widths[:-1]), reversed(sizes[:-1]), strict=True):
            layers += [nn.SiLU(), nn.Upsample(size=target), nn.Conv2d(inner, outer, 3, padding=1)]
            inner = outer
        self.layers = nn.Sequential(*layers, nn.Flatten())

    def forward(self, z: Tensor) -> Tensor:
        """Flattened images (M, C H W) of latents (M, K)."""
        return self.layers(z)
