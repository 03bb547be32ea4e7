"""Replays on a GPU as CUDA graphs: all kernels of a replay are launched at once, on memory that stays where it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inference.core.display import first_line
from inference.core.seeding import random_states, set_random_states
from inference.numerics.graphs import Replay

_logger = logging.getLogger(__name__)

# Runs before a capture, in which libraries choose their algorithms and reserve memory.
_WARM_UP = 3


class DeviceReplay:
    """A replay that becomes a CUDA graph at its first call on a GPU; itself elsewhere, and where it cannot become one.

    Noise is drawn by the device's generator as the replay draws it. Results are copies, which later calls leave alone.

    Args:
        replay: Of tensors of the same forms in every call.
        fixed: How many of the first tensors are the same memory in every call; what the replay changes in place is
            among them. The others are copied into memory of the graph's own.
    """

    def __init__(self, replay: Replay, fixed: int) -> None:
        self._replay, self._fixed = replay, fixed
        self._launch: Callable[[], None] | None = None
        self._inputs, self._results, self._addresses = list[Tensor](), list[Tensor](), list[int]()
        self._fails = False

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results of the replay."""
        if self._fails or not _on_one_gpu(tensors):
            return self._replay(tensors)
        addresses = [tensor.data_ptr() for tensor in tensors[: self._fixed]]
        if self._launch is None or addresses != self._addresses:
            try:
                self._capture(tensors)
            except RuntimeError as error:  # a copy from the CPU, or a library that waits for the device
                self._fails, self._launch = True, None
                _logger.info("kernels are launched one by one: %s", first_line(error, named=False))
                return self._replay(tensors)
            self._addresses = addresses
        for own, given in zip(self._inputs[self._fixed :], tensors[self._fixed :], strict=True):
            own.copy_(given)
        assert self._launch is not None
        self._launch()
        return [result.clone() for result in self._results]

    def _capture(self, tensors: Sequence[Tensor]) -> None:
        """Capture the graph; neither tensors nor the random state change."""
        states = random_states()
        try:
            self._inputs = [*tensors[: self._fixed], *(t.clone() for t in tensors[self._fixed :])]
            self._launch, self._results = captured(self._replay, self._inputs)
        finally:
            set_random_states(states)


def captured(replay: Replay, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """A function that launches a replay on the present values of its inputs, and where it leaves the results.

    Raises:
        RuntimeError: If the replay does what no CUDA graph can hold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            replay([tensor.clone() for tensor in inputs])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = list(replay(inputs))
    return graph.replay, results


def _on_one_gpu(tensors: Sequence[Tensor]) -> bool:
    return bool(tensors) and tensors[0].is_cuda and all(t.device == tensors[0].device for t in tensors)
