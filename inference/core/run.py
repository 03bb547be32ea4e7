"""Running one half of a pair, and the check that two halves are a valid pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro.distributions import Delta
from torch import Tensor, nn

from inference.core.draw import _PARTICLES, DATA_PLATE, Layout, layout_of
from inference.core.handlers import RecordSites, Site

Program = Callable[..., Any]


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
        values: Values to set, see :class:`inference.core.handlers.RecordSites`.
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


def check_pair(model: Mapping[str, Site], guide: Mapping[str, Site], plate: str | None) -> Layout:
    """The layout of the recorded sites of a pair.

    Raises:
        ValueError: If model and guide are not a valid pair; the message names the site.
    """
    latents = [name for name, site in model.items() if not site.is_observed]
    drawn = [name for name, site in guide.items() if not site.is_observed]
    if not any(site.is_observed for site in model.values()):
        seen = [name for name, site in guide.items() if site.is_observed]
        hint = f", while the guide observes {seen}: are model and guide swapped?" if seen else ""
        raise ValueError(f"expected a model that observes data, got one of latent sites alone {list(model)}{hint}")
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
