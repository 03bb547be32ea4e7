"""Runs at given values: simulated data in place of the observed ones, latents in place of draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves, tree_map

from inference.pair.draw import Draw, Layout
from inference.pair.handlers import Site, isolated
from inference.pair.improper import latent_mask

if TYPE_CHECKING:
    from inference.pair.call import Call


def simulated_values(call: Call, values: Mapping[str, Tensor] | None = None, num_samples: int = 1) -> dict[str, Tensor]:
    """Values by site name of one run of the model in which nothing is observed, deterministic ones among them.

    Args:
        call: What to run; its guide plays no part.
        values: Values to keep by name, latents and indices of subsampling plates.
        num_samples: S; above one the call must have a guide.
    """
    manner = call.manners(num_samples).model
    with isolated():
        run = manner.run(call, poutine.uncondition(call.model), values, num_samples)
    return {name: site.value for name, site in run.sites.items()} | run.deterministic


def observed_arguments(sites: Mapping[str, Site], arguments: Iterable[Any], *, missing: bool = False) -> list[str]:
    """Names of the observed sites of a run, each of which observes an argument, or a view of a part of one.

    Args:
        sites: Sites of a run of the model.
        arguments: What it was called with.
        missing: Take an argument whose NaN have been replaced, ``obs=x.nan_to_num()``, for the argument.

    Raises:
        ValueError: If one does not, or two observe the same memory; the message names them.
    """
    if factors := [name for name, site in sites.items() if site.is_observed and isinstance(site.fn, Unit)]:
        raise ValueError(f"expected a model from which data can be drawn, got pyro.factor at {factors}, which has none")
    observed, given = (
        {name: site.value for name, site in sites.items() if site.is_observed},
        tree_leaves(list(arguments)),
    )
    for name, value in observed.items():
        if not any(_is_part(value, argument) or (missing and _fills(value, argument)) for argument in given):
            raise ValueError(
                "expected every observed value to be an argument or a view of one, obs=x or obs=x.reshape(...), to put "
                f"simulated data in its place, got a value of shape {tuple(value.shape)} at site {name!r} that is none"
            )
    names = list(observed)
    twice = [n for i, n in enumerate(names) if any(_overlap(observed[n], observed[m]) for m in names[:i])]
    if twice:
        raise ValueError(f"expected every observed site to have data of its own, got {twice} that observe others' data")
    return names


def with_simulated_data(call: Call, sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> Call:
    """The call with simulated values in place of what the model observes of its arguments unmasked.

    Args:
        call: What was run.
        sites: Sites of its model.
        values: Simulated values by site name.

    Raises:
        ValueError: If an observed value is not an argument or a view of one.
    """
    observed = observed_arguments(sites, [*call.args, *call.kwargs.values()], missing=call.missing)
    values = {name: where_seen(sites[name], values[name]) for name in observed}

    def simulated(argument: Any) -> Any:
        for name in observed:
            if sites[name].value is argument:
                return values[name]
            if call.missing and _fills(sites[name].value, argument):
                return torch.where(argument.isnan(), argument, values[name])
        parts = [name for name in observed if _is_part(sites[name].value, argument)]
        if not parts:
            return argument
        memory = argument.untyped_storage().clone()
        for name in parts:
            _view(memory, sites[name].value).copy_(values[name])
        return _view(memory, argument)

    args, kwargs = tree_map(simulated, (call.args, dict(call.kwargs)))
    return replace(call, args=args, kwargs=kwargs)


def where_seen(site: Site, value: Tensor) -> Tensor:
    """A simulated value in the dtype of the data, where the site is not masked, and what it observes elsewhere.

    Raises:
        ValueError: If the site draws values of another shape than it observes.
    """
    if value.shape != site.value.shape:
        raise ValueError(
            f"expected a model that draws data of the shape that it observes, {tuple(site.value.shape)}, got a "
            f"{type(site.fn).__name__} that draws {tuple(value.shape)}: expand its parameters to the data's shape"
        )
    value, mask = value.to(site.value.dtype), latent_mask(site.fn, site.mask)
    return value if mask is None else torch.where(mask, value, site.value)


def _is_part(value: Tensor, argument: Any) -> bool:
    """Whether a value is an argument, or another view of its memory."""
    if value is argument:
        return True
    same = isinstance(argument, Tensor) and value.numel() > 0 and value.dtype == argument.dtype
    return same and value.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()


def _fills(value: Tensor, argument: Any) -> bool:
    """Whether a value is an argument with something else in the place of NaN."""
    if not isinstance(argument, Tensor) or argument.shape != value.shape or argument.dtype != value.dtype:
        return False
    return bool(((argument == value) | argument.isnan()).all())


def _view(memory: UntypedStorage, like: Tensor) -> Tensor:
    """The part of a memory that a tensor views of its own."""
    return like.new_empty(0).set_(memory, like.storage_offset(), like.size(), like.stride())


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two values share an element."""
    if first is second or not _is_part(first, second):
        return first is second
    places = [_view_of_places(value) for value in (first, second)]
    return bool(torch.isin(*places).any())


def _view_of_places(value: Tensor) -> Tensor:
    size = value.untyped_storage().nbytes() // value.element_size()
    return torch.arange(size).as_strided(value.size(), value.stride(), value.storage_offset())


def replay(call: Call, layout: Layout, values: Mapping[str, Tensor], num_samples: int = 1) -> Draw:
    """Model and guide, where there is one, at given latents.

    Args:
        call: What to run.
        layout: Its layout.
        values: Latents by name, with S to the left of the pair's batch where S is above one.
        num_samples: S.
    """
    manners = call.manners(num_samples)
    with isolated():
        model = manners.model.run(call, call.model, values, num_samples).sites
        guide = {} if call.guide is None else manners.guide.run(call, call.guide, values, num_samples).sites
    return Draw(layout, num_samples, model, guide, {}, call)
