"""One run of a model/guide pair: the guide draws, the model scores, and every term is reduced to one per datum.

A pair is a Pyro model and a Pyro guide, functions or modules of one call signature, in which every sample site of
both halves stands in one common vectorised plate over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import pyro.infer
import torch
from pyro.distributions import Delta
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from inference.core.draw import _PARTICLES, DATA_PLATE, Draw, Layout, layout_of
from inference.core.handlers import RecordSites, Site, isolated
from inference.core.seeding import random_state

Program = Callable[..., Any]


def run_pair(
    model: Program,
    guide: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 1,
    plate: str | None = None,
    subsamples: Mapping[str, Tensor] | None = None,
    expose_params: bool = False,
) -> Draw:
    """Draw latents from the guide and replay the model on them.

    One sample runs without a particle plate, so that a pair which cannot broadcast still runs.

    Args:
        model: Pyro model.
        guide: Pyro guide of the same call signature.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_samples: S, samples per datum, drawn side by side.
        plate: Name of the plate over the data; ``"data"`` if None.
        subsamples: Indices of subsampling plates from another run, to keep; None lets them choose. Values of latent
            sites may stand among them: the guide then scores those instead of drawing its own.
        expose_params: Let param statements through to an enclosing handler.

    Raises:
        ValueError: If the two halves are no pair in the sense of this module; the message names the site.
    """
    kwargs = {} if kwargs is None else kwargs
    depth = None
    if num_samples > 1:
        depth = _particle_depth(model, guide, args, kwargs, plate)
    with isolated(expose_params=expose_params):
        guide_run = run_program(guide, args, kwargs, subsamples, num_samples, depth)
        values = (
            dict(subsamples or {})
            | {n: s.value for n, s in guide_run.sites.items() if not s.is_observed}
            | guide_run.subsamples
        )
        model_run = run_program(model, args, kwargs, values, num_samples, depth)
    layout = _check_pair(model_run.sites, guide_run.sites, plate)
    return Draw(layout, num_samples, model_run.sites, guide_run.sites, guide_run.subsamples | model_run.subsamples)


def run_guide(
    guide: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    expose_params: bool = False,
) -> dict[str, Site]:
    """Latent sites of one run of a guide alone, in trace order."""
    with isolated(expose_params=expose_params):
        run = run_program(guide, args, {} if kwargs is None else kwargs, None, 1, None)
    return {name: site for name, site in run.sites.items() if not site.is_observed}


def run_program(
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None,
    num_samples: int,
    depth: int | None,
) -> RecordSites:
    """Run one half of a pair and record its sites; call it inside :func:`inference.core.handlers.isolated`.

    Args:
        program: Pyro model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values to dictate, see :class:`inference.core.handlers.RecordSites`.
        num_samples: S, samples side by side.
        depth: Batch dimensions of the pair, left of which the samples go; None runs without a particle plate.
    """
    with RecordSites(values) as run:
        if depth is None:
            program(*args, **kwargs)
        else:
            with pyro.plate(_PARTICLES, num_samples, dim=-depth - 1):
                program(*args, **kwargs)
    run.subsamples.pop(_PARTICLES, None)
    return run


# How deep a pair's plates go is a property of the two programs and the form of their arguments: found once, by one
# run, and kept while both programs live.
_depths: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, int]]] = WeakKeyDictionary()


def _particle_depth(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], plate: str | None
) -> int:
    try:
        form = (plate, *map(_form, args), *((name, _form(value)) for name, value in kwargs.items()))
        known = _depths.setdefault(model, WeakKeyDictionary()).setdefault(guide, {})
        if form in known:
            return known[form]
    except TypeError:  # no weak references to it, or no hash: then it is found each time
        form, known = None, {}
    known[form] = probe(model, guide, args, kwargs, plate=plate).layout.depth
    return known[form]


def _form(value: Any) -> Any:
    return (value.dim(),) if isinstance(value, Tensor) else (type(value), value)


def probe(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    plate: str | None = None,
) -> Draw:
    """One run of one sample without gradient that leaves the random state as it was.

    Raises:
        ValueError: As :func:`run_pair`.
    """
    # A probe is no part of the computation, so it must not enter the graph of a make_fx trace either.
    with random_state(None), torch.no_grad(), disable_proxy_modes_tracing():
        return run_pair(model, guide, args, kwargs, plate=plate)


def _check_pair(model: Mapping[str, Site], guide: Mapping[str, Site], plate: str | None) -> Layout:
    latents = [name for name, site in model.items() if not site.is_observed]
    drawn = [name for name, site in guide.items() if not site.is_observed]
    if not latents:
        raise ValueError(f"expected a model with a latent site, got only observed sites {list(model)}")
    if set(latents) != set(drawn):
        extra = [name for name in drawn if name not in latents]
        cause = f" (an AutoGuide's auxiliary {extra}? train it by pyro.infer.SVI)" if extra else ""
        raise ValueError(
            f"expected the guide to sample the model's latent sites {sorted(latents)}, got {sorted(drawn)}{cause}"
        )
    for name in drawn:
        if _is_delta(guide[name].fn):
            raise ValueError(f"expected a density at guide site {name!r}, got a Delta")
    return layout_of(model, guide, DATA_PLATE if plate is None else plate)


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def modules_of(*programs: Program) -> list[nn.Module]:
    """The modules behind programs: themselves, or what a bound method belongs to; each once."""
    owners = [getattr(program, "__self__", program) for program in programs]
    return list({id(owner): owner for owner in owners if isinstance(owner, nn.Module)}.values())
