r"""Images of a soft coloured triangle whose factors are known: position, size, hue and, if wanted, angle.

.. math:: x_c(p) = \operatorname{rgb}_c(h) \prod_{i=1}^3 \operatorname{sigmoid}
    \bigl(\tfrac1\tau [\tfrac r2 - n_i(\phi)^\top (p - m)]\bigr)

at pixel centre p in the unit square, for an equilateral triangle of centre m, circumradius r and outward normals n_i.

References:
    Reizinger et al., "Embrace the gap: VAEs perform independent mechanism analysis", 2022, arXiv 2206.02416 (the
    experiment; the renderer is ours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from guides.gaussian import MeanField
from guides.networks import ConvEncoder, mlp
from inference.core.checks import check_count
from inference.core.memory import at_once
from inference.core.seeding import random_state
from zoo.data.datasets import Dataset
from zoo.models.ima_vae import IMAVAE
from zoo.models.networks import ConvDecoder
from zoo.priors.factorised import Beta

# The range of each factor, which a source from 0 to 1 runs through: x, y, circumradius, hue, angle. Hues stop short
# of a full turn and angles of a third of one, where the images would begin again.
RANGES = ((0.25, 0.75), (0.25, 0.75), (0.12, 0.28), (0.0, 0.65), (-0.8, 0.8))
_BLOCK = 512


def render_sprites(factors: Tensor, *, size: int = 64, softness: float = 0.02) -> Tensor:
    """Draw triangles on black; differentiable in the factors, save where two of the colours are equal.

    Args:
        factors: (..., 4) or (..., 5): x from the left, y from the top and circumradius, in sides of the image; hue in
            turns; angle in radians, clockwise, zero for a triangle that points up.
        size: Pixels of a side.
        softness: tau, the width of the edges in sides of the image.

    Returns:
        Images in [0, 1], flattened from (3, size, size): (..., 3 size^2).

    Raises:
        ValueError: If the factors have another shape, or the softness is not positive.

    Example:
        >>> red = render_sprites(torch.tensor([[0.5, 0.5, 0.2, 0.0]]), size=32).reshape(3, 32, 32)
        >>> red[:, 16, 16].round(decimals=2)
        tensor([0.9700, 0.0000, 0.0000])
    """
    if factors.dim() == 0 or factors.shape[-1] not in (4, 5):
        raise ValueError(f"expected factors of shape (..., 4) or (..., 5), got {tuple(factors.shape)}")
    check_count(size, "size")
    if not softness > 0:
        raise ValueError(f"expected a positive softness, got {softness}")
    x, y, radius, hue, *rest = factors.unsqueeze(-1).unsqueeze(-1).unbind(-3)
    angle = rest[0] if rest else torch.zeros_like(hue)
    centres = (torch.arange(size, dtype=factors.dtype, device=factors.device) + 0.5) / size
    right, down = centres - x, centres.unsqueeze(-1) - y
    cover = torch.ones_like(right + down)
    for third in (1, 3, 5):  # sixths of a turn between the upward corner and the normals of the sides
        normal = angle + third * math.pi / 3
        cover = cover * torch.sigmoid((radius / 2 - normal.sin() * right + normal.cos() * down) / softness)
    return (_colour(hue.squeeze(-1))[..., None, None] * cover.unsqueeze(-3)).flatten(-3)


def draw_sources(sources: Tensor, *, size: int = 64, softness: float = 0.02) -> Tensor:
    """Draw triangles of factors that are linear in sources from 0 to 1; the mixing of :func:`sprites`.

    Args:
        sources: (..., 4) or (..., 5), each from 0 to 1 for the range of its factor in ``RANGES``.
        size: See :func:`render_sprites`.
        softness: See :func:`render_sprites`.

    Returns:
        (..., 3 size^2).

    Raises:
        ValueError: See :func:`render_sprites`.
    """
    low, high = sources.new_tensor(RANGES[: sources.shape[-1]]).unbind(-1)
    return render_sprites(low + (high - low) * sources, size=size, softness=softness)


def sprites(
    num: int,
    *,
    size: int = 64,
    num_factors: int = 4,
    a: float = 2.0,
    b: float = 2.0,
    softness: float = 0.02,
    test_size: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    r"""Images of triangles with independent beta sources, :math:`s_k \sim \operatorname{Beta}(a, b)`.

    Args:
        num: Images, those of the test set included.
        size: Pixels of a side.
        num_factors: 4, or 5 for triangles that turn.
        a: First parameter of the sources' distribution.
        b: Second parameter.
        softness: Width of the edges in sides of the image.
        test_size: The last images, held out.
        seed: Of the sources.
        dtype: Of the result.

    Returns:
        A :class:`zoo.Dataset` whose ``truth`` holds the sources ``z`` (N, K) and ``z_test`` (M, K).

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> data = sprites(100, size=16, test_size=20)
        >>> data, data.image_shape, data.truth["z"].shape
        (Dataset('sprites', train (80, 768), test (20, 768), torch.float32), (3, 16, 16), torch.Size([80, 4]))
    """
    check_count(num, "num")
    check_count(test_size, "test_size", 0)
    if test_size >= num or num_factors not in (4, 5):
        raise ValueError(f"expected test_size below num and 4 or 5 factors, got {test_size}, {num} and {num_factors}")
    with random_state(seed):
        s = Beta(num_factors, a, b)().sample((num,)).to(dtype)
    blocks = [draw_sources(block, size=size, softness=softness) for block in s.split(at_once(_BLOCK))]
    x, n = torch.cat(blocks), num - test_size
    zeros = x.new_zeros(num)
    truth = {"z": s[:n], "z_test": s[n:]}
    return Dataset("sprites", x[:n], x[n:], zeros[:n], zeros[n:], image_shape=(3, size, size), truth=truth)


def sprite_pair(
    x: Tensor,
    *,
    size: int = 64,
    latent_dim: int = 4,
    gamma2: float = 1.0,
    a: float = 2.0,
    b: float = 2.0,
    channels: Sequence[int] = (16, 32, 32),
    width: int = 128,
) -> tuple[IMAVAE, MeanField]:
    """A convolutional model with beta latents, and its guide, for coloured images.

    Between latents and feature maps either network has two fully connected layers; the decoder sees the latents
    centred and scaled to variance one.

    Args:
        x: Training images, (N, 3 size^2), by which both standardise.
        size: Pixels of a side.
        latent_dim: K.
        gamma2: Precision of the noise, in standardised units.
        a: First parameter of the latents' distribution.
        b: Second parameter.
        channels: Channels of the feature maps, from the image's side inwards.
        width: Of the fully connected layers.

    Raises:
        ValueError: If the images are not of that size.
    """
    shape = (3, size, size)
    encoder = nn.Sequential(ConvEncoder(shape, width, channels), nn.SiLU(), mlp(width, 2 * latent_dim, (width,)))
    dense = nn.Sequential(_Spread(a, b), mlp(latent_dim, width, (width,)), nn.SiLU())
    decoder = nn.Sequential(*dense, ConvDecoder(width, shape, channels))
    data_dim = math.prod(shape)
    model = IMAVAE(data_dim, latent_dim, gamma2=gamma2, network=decoder, prior=Beta(latent_dim, a, b))
    guide = MeanField(data_dim, latent_dim, encoder=encoder, support=constraints.unit_interval)
    return model.standardise_by(x), guide.standardise_by(x)


class _Spread(nn.Module):
    """Beta latents, centred and scaled to variance one."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.mean, self.sigma = a / (a + b), math.sqrt(a * b / (a + b + 1)) / (a + b)

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.sigma


def _colour(hue: Tensor) -> Tensor:
    """Red, green and blue (..., 3) of full saturation and brightness, from hues (..., 1) in turns."""
    turns = hue + hue.new_tensor([0.0, 2 / 3, 1 / 3])
    return ((6 * (turns - turns.floor()) - 3).abs() - 1).clamp(0, 1)
