"""Ground-truth mixings drawn at random, each from its own seed; torch's random state is neither used nor changed."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from inference.core.checks import check_count
from zoo.mixings.base import Composition, LinearMixing, Mixing
from zoo.mixings.conformal import Moebius
from zoo.mixings.elementwise import AffineCoupling, SmoothLeakyReLU


def orthogonal(dim: int, *, seed: int = 0) -> LinearMixing:
    """A Haar-distributed orthogonal matrix, (K, K).

    Args:
        dim: K = D.
        seed: Of the matrix.
    """
    return LinearMixing(_haar(dim, dim, _generator(seed)))


def column_orthogonal(data_dim: int, latent_dim: int, *, longest: float = 2.0, seed: int = 0) -> LinearMixing:
    """A matrix (D, K) with orthogonal columns of lengths uniform on (1, longest): its IMA contrast is zero.

    Args:
        data_dim: D.
        latent_dim: K, from 1 to D.
        longest: Bound of the lengths.
        seed: Of the matrix.
    """
    generator = _generator(seed)
    columns = _haar(data_dim, latent_dim, generator)
    return LinearMixing(columns * (1 + (longest - 1) * _uniform(latent_dim, generator=generator)))


def shear(strength: float = 1.0) -> LinearMixing:
    r"""The shear [[1, k], [0, 1]], of IMA contrast one half of log(1 + k^2).

    Args:
        strength: k.

    Example:
        >>> shear(2.0).matrix
        tensor([[1., 2.],
                [0., 1.]], dtype=torch.float64)
    """
    return LinearMixing([[1.0, strength], [0.0, 1.0]])


def unit_determinant(dim: int, *, seed: int = 0) -> LinearMixing:
    """A matrix with entries uniform on (0, 1), divided by one number so that its determinant is 1 or -1.

    Args:
        dim: K = D.
        seed: Of the matrix.
    """
    matrix = _uniform(dim, dim, generator=_generator(seed))
    return LinearMixing(matrix / torch.linalg.det(matrix).abs() ** (1 / dim))


def moebius(dim: int, *, minimum: float = 0.5, alpha: float = 1.0, seed: int = 0) -> Moebius:
    """A Moebius transformation with a Haar-orthogonal matrix and a normal pole whose coordinates exceed a minimum.

    For sources in the cube [-1/2, 1/2]^K a minimum of .5 keeps the pole outside, and one of .7 away from it.

    References:
        Reizinger et al., "Embrace the gap: VAEs perform independent mechanism analysis", 2022, arXiv 2206.02416.

    Args:
        dim: K = D.
        minimum: What the absolute value of every coordinate of the pole exceeds.
        alpha: Enlargement.
        seed: Of matrix and pole.

    Example:
        >>> bool((moebius(3, minimum=0.7).pole.abs() > 0.7).all())
        True
    """
    generator = _generator(seed)
    rotation = _haar(dim, dim, generator)
    # The distribution of a normal variable above the minimum, by its distribution function: no draw is thrown away.
    tail = torch.special.ndtr(torch.tensor(-minimum, dtype=torch.float64))
    size = -torch.special.ndtri(tail * _uniform(dim, generator=generator))
    sign = torch.where(_uniform(dim, generator=generator) < 0.5, -1.0, 1.0)
    return Moebius(sign * size, rotation, alpha=alpha)


def orthogonal_mlp(dim: int, *, layers: int = 3, slope: float = 0.2, seed: int = 0) -> Composition:
    """Orthogonal matrices with a smooth leaky ReLU between each two.

    References:
        Reizinger et al., 2022, arXiv 2206.02416.

    Args:
        dim: K = D.
        layers: Matrices.
        slope: Of :class:`zoo.SmoothLeakyReLU`.
        seed: Of the matrices.
    """
    check_count(layers, "layers")
    generator = _generator(seed)
    return _mlp([LinearMixing(_haar(dim, dim, generator)) for _ in range(layers)], slope)


def triangular_mlp(dim: int, *, layers: int = 3, slope: float = 0.2, seed: int = 0) -> Composition:
    """Lower triangular matrices with a smooth leaky ReLU between each two: increasing, coordinate after coordinate.

    Below the diagonal the entries are standard normal, on it uniform on (.5, 1.5).

    References:
        Reizinger et al., 2022, arXiv 2206.02416 (the architecture; the distribution of the entries is ours).

    Args:
        dim: K = D.
        layers: Matrices.
        slope: Of :class:`zoo.SmoothLeakyReLU`.
        seed: Of the matrices.
    """
    check_count(layers, "layers")
    generator = _generator(seed)
    return _mlp([LinearMixing(_triangular(dim, generator)) for _ in range(layers)], slope)


def affine_coupling_flow(dim: int, *, layers: int = 4, hidden: int = 16, seed: int = 0) -> Composition:
    """Affine coupling layers with the coordinates reversed between each two.

    Args:
        dim: K = D, at least 2.
        layers: Couplings.
        hidden: Hidden units of each.
        seed: Of the weights, normal with variances one over the number of inputs.

    Raises:
        ValueError: If a number is too small.
    """
    check_count(dim, "dim", 2)
    check_count(layers, "layers")
    check_count(hidden, "hidden")
    generator = _generator(seed)
    flip = LinearMixing(torch.eye(dim, dtype=torch.float64).flip(0))
    couplings = [_coupling(dim, hidden, generator) for _ in range(layers)]
    return Composition([couplings[0], *(m for coupling in couplings[1:] for m in (flip, coupling))])


def _coupling(dim: int, hidden: int, generator: torch.Generator) -> AffineCoupling:
    kept = dim // 2
    widths = [kept, hidden, 2 * (dim - kept)]
    weights = [_normal(b, a, generator=generator) / a**0.5 for a, b in pairwise(widths)]
    biases = [_normal(b, generator=generator) for b in widths[1:]]
    return AffineCoupling(weights[0], biases[0], weights[1], biases[1])


def _mlp(matrices: list[LinearMixing], slope: float) -> Composition:
    maps: list[Mixing] = [matrices[0]]
    for matrix in matrices[1:]:
        maps += [SmoothLeakyReLU(matrix.latent_dim, slope), matrix]
    return Composition(maps)


def _triangular(dim: int, generator: torch.Generator) -> Tensor:
    below = _normal(dim, dim, generator=generator).tril(-1)
    return below + torch.diag(0.5 + _uniform(dim, generator=generator))


def _haar(data_dim: int, latent_dim: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, uniformly distributed: QR of normal entries with the signs of R's diagonal fixed."""
    check_count(latent_dim, "latent_dim")
    check_count(data_dim, "data_dim", latent_dim)
    q, r = torch.linalg.qr(_normal(data_dim, latent_dim, generator=generator))
    return q * r.diagonal().sign()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)
