"""Prior predictive draws, posterior predictive draws and reconstructions of any pair."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from inference.core.checks import check_count
from inference.core.memory import joined
from inference.core.protocols import SupportsDecoder
from inference.core.row_noise import axes_of_rows
from inference.core.seeding import random_state, seeded
from inference.core.sources import opened
from inference.pair.call import Call, check_same_call
from inference.pair.draw import PARTICLES, Draw
from inference.pair.handlers import isolated
from inference.pair.rows import RowBlocks, blocks_of_draws
from inference.pair.run import Program
from inference.pair.simulated import simulated_values


@torch.no_grad()
def sample(model: Program, *args: Any, seed: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Prior predictive draw: one run of the model in which every site is sampled and none observed.

    Args:
        model: Pyro model.
        *args: Its arguments; observations among them give the number of data points and are not conditioned on.
        seed: Seed; leaves the global random state as it was.
        **kwargs: Its keyword arguments; ``n=10`` for ten data points of a model of the zoo.

    Returns:
        Values by site name, each with batch (N,).
    """
    with seeded(seed):
        return simulated_values(Call(model, None, args, kwargs))


@torch.no_grad()
def predictive(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1,
    block: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Posterior predictive draws: latents from the guide given the data, new observations from the model given those.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        *args: Arguments of both, the data first.
        num_samples: S.
        block: Rows in one run of the pair; None chooses.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        seed: Seed; leaves the global random state as it was.
        **kwargs: Keyword arguments of both.

    Returns:
        Values by site name, (S, N, ...), latents and observations; with samples left of the sites' own dimensions where
        all data are taken as a whole. Discrete latents that the guide leaves out are drawn from their posterior given
        the others.

    Raises:
        ValueError: If the data are not finite or model and guide are not a valid pair.
    """
    check_count(num_samples, "num_samples")
    call = Call(model, guide, opened(args), kwargs, plate, whole=whole, missing=missing)
    call.check()
    check_same_call(call, (num_samples, seed))
    blocks, dim = blocks_of_draws(call, block, num_samples), 0
    if len(blocks) > 1:
        blocks, dim = _rows_of_values(blocks, num_samples)
    return joined(blocks.in_turn(lambda i: _predicted(blocks[i], num_samples), seed), blocks.number, dim)


def _predicted(call: Call, num_samples: int) -> dict[str, Tensor]:
    """Values by site name, (S, N, ...)."""
    draw = call.run(num_samples)
    latents = {**draw.latents, **draw.subsamples, **_discrete_latents(draw)}
    values = simulated_values(call, latents, num_samples)
    values = {name: _without_thought_of(value, draw) for name, value in values.items()} if call.whole else values
    return values if num_samples > 1 else {name: value.unsqueeze(0) for name, value in values.items()}


def _rows_of_values(blocks: RowBlocks, num_samples: int) -> tuple[RowBlocks, int]:
    """The dimension of the rows in all values; all rows as one block where values have not one such dimension."""
    with random_state(None):
        few = [_predicted(blocks.call.rows(slice(0, count)), num_samples) for count in (1, 2)]
    shapes = ([tuple(value.shape) for value in values.values()] for values in few)
    dims = set(axes_of_rows(*shapes))
    dim = dims.pop()
    return (RowBlocks(blocks.call, None), 0) if dims or dim is None else (blocks, dim)


def _without_thought_of(value: Tensor, draw: Draw) -> Tensor:
    """A value without the dimension of the plate that is thought of around all data, which no program sees."""
    return value.squeeze(1) if draw.num_samples > 1 and value.dim() > draw.layout.depth else value


@torch.no_grad()
def reconstruct(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    num_samples: int = 1,
    plate: str | None = None,
    missing: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Reconstruction: the mean of the data given latents that the guide infers from them, E_q[E[x' | z]].

    Args:
        model: A model that can decode.
        guide: Pyro guide of the one latent that it decodes.
        x: Data, (N, D), the first argument of both.
        *args: Further arguments of both.
        num_samples: Latents per data point to average over.
        plate: Name of the plate over the data, ``"data"`` if None.
        missing: See :func:`inference.iter_log_weights`.
        seed: Seed; leaves the global random state as it was.
        **kwargs: Keyword arguments of both.

    Returns:
        (N, D).

    Raises:
        TypeError: If the model has no ``decode``.
        ValueError: If the pair has several latents, or the data are not finite or have the wrong shape.
    """
    if not isinstance(model, SupportsDecoder):
        raise TypeError(f"expected a model with decode(z), got {type(model).__name__}")
    check_count(num_samples, "num_samples")
    call = Call(model, guide, (x, *args), kwargs, plate, missing=missing)
    call.check()
    with seeded(seed):
        draw = call.run(num_samples)
    if len(draw.latents) != 1:
        raise ValueError(f"expected one latent to decode, got {list(draw.latents)}")
    (z,) = draw.latents.values()
    mean = model.decode(z)
    return mean if num_samples == 1 else mean.mean(0)


def _discrete_latents(draw: Draw) -> dict[str, Tensor]:
    """Posterior draws of the discrete latents that a guide leaves out, given those that it drew."""
    names = [name for name, site in draw.model_sites.items() if site.is_summed]
    if not names:
        return {}
    call, layout = draw.call, draw.layout
    given = poutine.condition(call.model, data={**draw.latents})
    marked = poutine.infer_config(given, lambda msg: {"enumerate": "parallel"} if msg["name"] in names else {})

    def particles(*args: Any, **kwargs: Any) -> None:
        plate = pyro.plate(PARTICLES, draw.num_samples, dim=-layout.depth - 1)
        with plate if draw.num_samples > 1 else nullcontext():
            marked(*args, **kwargs)

    with isolated():
        sampled = infer_discrete(particles, first_available_dim=-layout.depth - 2)
        nodes = poutine.trace(sampled).get_trace(*call.args, **call.kwargs).nodes
    return {name: nodes[name]["value"] for name in names}
