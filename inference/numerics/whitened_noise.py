"""Standard normal noise with exact mean and covariance, for expectations under nearly Gaussian distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WhitenedNoise(TorchFunctionMode):
    r"""While active, ``torch.randn`` of (S, ..., N, d) draws antithetic pairs, whitened over the samples.

    .. math:: \frac1S \sum_s \epsilon_s = 0, \quad \frac1S \sum_s \epsilon_s \epsilon_s^T = I_d

    The mean of a quadratic function of a location-scale distribution over such noise is exact; only terms beyond the
    quadratic have an error. Entered again, it gives the same noise again. The distributions of this package draw their
    noise by ``torch.randn``; draws of other distributions are left alone, and so are requests of two dimensions or one
    sample.

    Warning:
        With fewer than 2 d samples there is no such noise: then the pairs are only antithetic. Beyond second moments
        the noise is not normal: the mean of a function is biased by a term in 1 / S of what it has beyond a quadratic.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: list[Tensor] = []
        self._next = 0

    @property
    def used(self) -> bool:
        """Whether anything was drawn from it."""
        return bool(self._drawn)

    def rows(self, index: Tensor, dim: int) -> WhitenedNoise:
        """The noise of chosen rows, (M,) integers, of the dimension ``dim`` of all that was drawn."""
        chosen = WhitenedNoise()
        chosen._drawn = [noise.index_select(dim, index.to(noise.device)) for noise in self._drawn]
        return chosen

    def __enter__(self) -> WhitenedNoise:
        self._next = 0
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer ``torch.randn``, and leave everything else as it is."""
        kwargs = {} if kwargs is None else kwargs
        if func is not torch.randn:
            return func(*args, **kwargs)
        shape = tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else args
        if len(shape) < 3 or shape[0] < 2:
            return func(*args, **kwargs)
        if self._next == len(self._drawn):
            self._drawn.append(_draw(func, shape, kwargs))
        noise = self._drawn[self._next]
        self._next += 1
        if noise.shape != shape:
            raise RuntimeError(f"expected the same draws at each entry, got shape {shape} after {tuple(noise.shape)}")
        return noise


def _draw(randn: Any, shape: tuple[int, ...], kwargs: Any) -> Tensor:
    half = randn((shape[0] // 2, *shape[1:]), **kwargs)
    pairs = _whiten(torch.cat([half, -half]))
    # An odd sample out lies at the mean, and the others lie farther out.
    odd = shape[0] - len(pairs)
    return torch.cat([pairs * (shape[0] / len(pairs)) ** 0.5, pairs.new_zeros(odd, *shape[1:])])


def _whiten(noise: Tensor) -> Tensor:
    """Make the columns of (S, ..., d) orthogonal, with norm sqrt S, where S suffices."""
    if len(noise) < 2 * noise.shape[-1]:
        return noise
    columns = noise.movedim(0, -2)
    basis = torch.linalg.qr(columns).Q
    sign = torch.sign((basis * columns).sum(-2, keepdim=True))
    return (basis * sign * len(noise) ** 0.5).movedim(-2, 0)
