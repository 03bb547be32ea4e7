"""Noise of the rows of a batch that does not depend on how many ranks share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from inference.core.seeding import depth

# What draws numbers of a given shape, of the shape of a tensor, or in its place.
_OF_SHAPE = {torch.randn, torch.rand}
_LIKE = {torch.randn_like, torch.rand_like}
_IN_PLACE = {
    getattr(Tensor, name)
    for name in ("normal_", "uniform_", "exponential_", "cauchy_", "geometric_", "log_normal_", "random_")
}
# What draws by parameters, which another rank does not have.
_BY_VALUE = {
    torch.bernoulli,
    torch.multinomial,
    torch.poisson,
    torch.binomial,
    torch._standard_gamma,
    torch._sample_dirichlet,
    torch.nn.functional.dropout,
    torch.dropout,
    Tensor.bernoulli_,
    Tensor.bernoulli,
    Tensor.multinomial,
}


class DrawsSeen(TorchFunctionMode):
    """Records the shape of every draw of the present random state while it is active.

    Attributes:
        shapes: In the order of the draws; None of those by parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depth = depth()
        self.shapes: list[tuple[int, ...] | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything happen, and look at what is drawn."""
        result = func(*args, **(kwargs or {}))
        if depth() != self._depth:
            return result
        if func in _BY_VALUE:
            self.shapes.append(None)
        elif func in _OF_SHAPE or func in _LIKE or func in _IN_PLACE or func is torch.normal:
            self.shapes.append(tuple(result.shape))
        return result


def axes_of_rows(fewer: Sequence[tuple[int, ...] | None], more: Sequence[tuple[int, ...] | None]) -> list[int | None]:
    """The dimension of the rows in each draw, by the shapes for two numbers of rows; None where there is none.

    Raises:
        ValueError: If the draws are not the same ones.
    """
    if [shape and len(shape) for shape in fewer] != [shape and len(shape) for shape in more]:
        raise ValueError(f"expected the same draws for any number of rows, got shapes {list(fewer)} and {list(more)}")
    pairs = zip(fewer, more, strict=True)
    return [None if a is None or b is None else next((i for i, n in enumerate(a) if n != b[i]), None) for a, b in pairs]


class RowNoise(TorchFunctionMode):
    """While active, every draw for a share of some rows is that part of the draw for all of them.

    So each row has the noise that it has where one process has all rows, and all ranks' generators go on alike. What is
    drawn by parameters, as discrete values, gamma variables and dropout are, is other noise for each rank.

    Args:
        axes: The dimension of the rows in each draw, from :func:`axes_of_rows`.
        share: The rows of this rank.
        number: Of so many.
        rank: Of this process.
    """

    def __init__(self, axes: Sequence[int | None], share: slice, number: int, rank: int) -> None:
        super().__init__()
        self._axes, self._share, self._number, self._rank = axes, share, number, rank
        self._next, self._depth = 0, depth()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer draws, and leave everything else as it is."""
        kwargs = {} if kwargs is None else kwargs
        if depth() != self._depth:
            return func(*args, **kwargs)
        if func in _BY_VALUE:
            self._axis(None)
            with _other_noise(self._rank):
                return func(*args, **kwargs)
        if func in _OF_SHAPE:
            shape = tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else args
            shape = tuple(kwargs.pop("size")) if "size" in kwargs else shape
            return self._part(func(self._wide(shape, axis := self._axis(shape)), **kwargs), axis)
        if func is torch.normal:
            mean, sigma = (torch.as_tensor(value) for value in _moments(*args, **kwargs))
            shape = tuple(kwargs.get("size", torch.broadcast_shapes(mean.shape, sigma.shape)))
            whole = mean.new_empty(self._wide(shape, axis := self._axis(shape))).normal_()
            return self._part(whole, axis) * sigma + mean
        if func in _LIKE:
            axis = self._axis(tuple(args[0].shape))
            return self._part(func(args[0].new_empty(self._wide(args[0].shape, axis)), *args[1:], **kwargs), axis)
        if func in _IN_PLACE:
            axis = self._axis(tuple(args[0].shape))
            whole = func(args[0].new_empty(self._wide(args[0].shape, axis)), *args[1:], **kwargs)
            return args[0].copy_(self._part(whole, axis))
        return func(*args, **kwargs)

    def _axis(self, shape: tuple[int, ...] | None) -> int | None:
        axis = self._axes[self._next] if self._next < len(self._axes) else None
        rows = self._share.stop - self._share.start
        if self._next >= len(self._axes) or (axis is not None and (shape is None or shape[axis] != rows)):
            raise ValueError(
                f"expected the same draws in every step where ranks share the rows, got shape {shape} at number "
                f"{self._next}: a pair whose draws change cannot be trained on several ranks"
            )
        self._next += 1
        return axis

    def _wide(self, shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
        return tuple(self._number if i == axis else n for i, n in enumerate(shape))

    def _part(self, whole: Tensor, axis: int | None) -> Tensor:
        return whole if axis is None else whole.narrow(axis, self._share.start, self._share.stop - self._share.start)


def _moments(mean: Any = 0.0, std: Any = 1.0, *_: Any, **__: Any) -> tuple[Any, Any]:
    """What ``torch.normal`` is called with."""
    return mean, std


@contextmanager
def _other_noise(rank: int) -> Iterator[None]:
    """A stream of this rank's own, from a seed that all ranks draw alike."""
    seed = int(torch.randint(2**31, ()))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + rank)
        yield
