"""Importance weights of a pair.

The matrix of log weights, log p(x_n, z_sn) - log q(z_sn | x_n), is the one primitive. Everything else is a pure
function of it, or of a stream of its chunks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count, check_log_weights
from inference.core.memory import at_once, joined
from inference.core.seeding import RandomStream
from inference.core.sources import opened
from inference.numerics.graphs import Level, check_capture
from inference.pair.call import Call
from inference.pair.draw import Draw, Layout
from inference.pair.rows import RowBlocks, row_blocks
from inference.pair.run import Program
from inference.weights.replayed_chunks import chunks_in_groups

# Elements of the largest site in one chunk: 4 MB in float64 on a CPU, 64 MB on other devices.
_CHUNK_ELEMENTS_CPU, _CHUNK_ELEMENTS = 2**19, 2**23

# Log weights that are drawn at once, beyond one chunk; and elements of a chunk that is recorded unasked, whose every
# tensor is held meanwhile. Python takes little of the time of a larger one.
_HELD, _RECORDED = 2**20, 2**20

# Rows that are run at once where there are more.
_ROWS = 4096


def iter_log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int,
    chunk: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    seed: int | None = None,
    progress: bool = True,
    capture: Level = "auto",
    **kwargs: Any,
) -> Iterator[Tensor]:
    """Log importance weights in chunks of samples and blocks of rows, so that memory grows with neither number.

    Where some dozens of chunks are to come, one is recorded, and the next ones are replayed without the pair's Python,
    see :mod:`inference.weights.replayed_chunks`. They are drawn in groups, ahead of their turn.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        *args: Arguments of both.
        num_samples: S, samples per data point.
        chunk: Samples drawn at once; None chooses by size, 1 runs the pair for each sample by itself.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: Take all data as one data point, whatever the plates: for latents that all data share.
        missing: NaN in the data stands for a missing value that the model itself masks.
        seed: Seed of the samples; leaves the global random state as it was, between two chunks, too.
        progress: Show a progress bar where there are several chunks.
        capture: How chunks run. ``"off"``: the pair's own Python. ``"graph"``: where there are more than two, recorded
            once and replayed, to the same bits. ``"compile"``: the record compiled by inductor, once for all calls of
            the same sizes, which takes seconds and agrees within rounding. ``"auto"``: as a graph where that is worth
            it. What cannot be recorded runs as the pair's own Python, with a line of log that says why.
        **kwargs: Keyword arguments of both.

    Returns:
        An iterator over log p(x_n, z_sn) - log q(z_sn | x_n) in nats, (chunk, N), unscaled and without gradient.

    Raises:
        TypeError: If an argument is of the wrong type; before anything runs.
        ValueError: If an argument is not finite or has the wrong shape, or model and guide are not a valid pair (see
            :meth:`inference.pair.call.Call.run`).
        FloatingPointError: If a weight is NaN or plus infinity.
    """
    call = Call(model, guide, opened(args), kwargs, plate, whole=whole, missing=missing)
    return log_weights_of(call, num_samples, chunk=chunk, seed=seed, progress=progress, capture=capture)


def log_weights_of(
    call: Call,
    num_samples: int,
    *,
    chunk: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    capture: Level = "auto",
) -> Iterator[Tensor]:
    """:func:`iter_log_weights` of a call."""
    check_count(num_samples, "num_samples")
    if chunk is not None:
        check_count(chunk, "chunk")
    check_capture(capture)
    call.check()
    return _chunks(call, num_samples, chunk, RandomStream(seed), progress, capture)


@torch.no_grad()
def _chunks(
    call: Call, num_samples: int, chunk: int | None, stream: RandomStream, progress: bool, capture: Level
) -> Iterator[Tensor]:
    with refuse_batch_dependence(*call.programs):
        blocks = row_blocks(call, at_once(_ROWS))
        first = blocks[0].probe_density()
    # The indices of a subsampling plate, once drawn, hold for all chunks; those of the data are each block's own.
    own = {first.layout.plate} if len(blocks) > 1 else set()
    indices = {name: index for name, index in first.subsamples.items() if name not in own}
    chunk = samples_at_once(first) if chunk is None else chunk
    groups = _groups(blocks, first.layout, indices, num_samples, chunk, capture)
    ready, number = deque[Tensor](), math.ceil(num_samples / chunk)
    for _ in tqdm(range(number), disable=not progress or number == 1, desc="log weights", unit="chunk"):
        if not ready:
            with stream.resumed():
                ready.extend(next(groups))
        log_weights = ready.popleft()
        check_log_weights(log_weights)
        yield log_weights


def _groups(
    blocks: RowBlocks, layout: Layout, indices: dict[str, Tensor], num_samples: int, chunk: int, capture: Level
) -> Iterator[list[Tensor]]:
    """Log weights of chunks of samples, in groups that are drawn at once."""
    is_small = len(blocks) == 1 and chunk * layout.numel * layout.num_data <= at_once(_RECORDED)
    if capture == "auto" and not is_small:
        capture = "off"

    def run(count: int) -> Tensor:
        draws = (block.run(count, values=indices, enumerate_guide=True) for block in blocks)
        return joined((draw.log_weights for draw in draws), blocks.number, dim=1)

    number, rest = divmod(num_samples, chunk)
    held = at_once(_HELD, chunk * layout.num_data)
    yield from chunks_in_groups(lambda: run(chunk), blocks.call.programs, number, held, capture)
    if rest:
        yield [run(rest)]


def samples_at_once(first: Draw) -> int:
    """Samples that are drawn side by side by default."""
    is_cpu = all(z.device.type == "cpu" for z in first.latents.values())
    return at_once(_CHUNK_ELEMENTS_CPU if is_cpu else _CHUNK_ELEMENTS, first.layout.numel * first.layout.num_data)


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int,
    chunk: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    seed: int | None = None,
    progress: bool = True,
    capture: Level = "auto",
    **kwargs: Any,
) -> Tensor:
    r"""Log importance weights of a pair, per sample and data point.

    .. math:: \log w_{sn} = \log p(x_n, z_{sn}) - \log q(z_{sn} \mid x_n), \quad z_{sn} \sim q(z \mid x_n)

    Args:
        model: Pyro model.
        guide: Pyro guide.
        *args: Arguments of both.
        num_samples: S.
        chunk: See :func:`iter_log_weights`.
        plate: See :func:`iter_log_weights`.
        whole: See :func:`iter_log_weights`.
        missing: See :func:`iter_log_weights`.
        seed: See :func:`iter_log_weights`.
        progress: See :func:`iter_log_weights`.
        capture: See :func:`iter_log_weights`.
        **kwargs: Keyword arguments of both.

    Returns:
        (S, N), nats, unscaled, without gradient.

    Raises:
        TypeError: See :func:`iter_log_weights`.
        ValueError: See :func:`iter_log_weights`.
        FloatingPointError: See :func:`iter_log_weights`.
    """
    chunks = iter_log_weights(
        model,
        guide,
        *args,
        num_samples=num_samples,
        chunk=chunk,
        plate=plate,
        whole=whole,
        missing=missing,
        seed=seed,
        progress=progress,
        capture=capture,
        **kwargs,
    )
    return joined(chunks, num_samples)
