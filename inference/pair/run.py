"""Running one half of a pair, and the check that two halves are a valid pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from inference.core.seeding import random_state
from inference.pair.draw import PARTICLES, Layout, layout_of
from inference.pair.enumeration import Enumeration, is_summable
from inference.pair.handlers import RecordSites, Site, isolated
from inference.pair.improper import is_delta, support_of
from inference.pair.unobserved import unobserved

Program = Callable[..., Any]

NO_SITES = "a program without a sample site, as a plain torch module is"

# Marks modules that have been converted to float64 from another dtype.
CONVERTED = "_converted_to_float64"


def run_program(
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None,
    num_samples: int,
    depth: int | None,
    enumeration: Enumeration | None = None,
) -> RecordSites:
    """Run one half of a pair and record its sites; call it inside :func:`inference.pair.handlers.isolated`.

    Args:
        program: Pyro model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values to set, see :class:`inference.pair.handlers.RecordSites`.
        num_samples: S, samples side by side.
        depth: Batch dimensions of the pair, left of which the samples go; None runs without a particle plate.
        enumeration: Discrete sites that get all their values side by side.
    """
    given = {} if enumeration is None else enumeration.given
    enumerated = nullcontext() if enumeration is None else enumeration.active()
    converted = any(getattr(module, CONVERTED, False) for module in modules_of(program))
    with RecordSites(values, given, double=converted) as run, enumerated, _InDouble() if converted else nullcontext():
        if depth is None:
            program(*args, **kwargs)
        else:
            with pyro.plate(PARTICLES, num_samples, dim=-depth - 1):
                program(*args, **kwargs)
    run.subsamples.pop(PARTICLES, None)
    return run


# Functions that make a tensor of torch's default dtype where none is said.
_MAKERS = {getattr(torch, name) for name in ("zeros", "ones", "full", "empty", "eye", "linspace", "arange", "tensor")}
_MAKERS |= {torch.rand, torch.randn}


class _InDouble(TorchFunctionMode):
    """While it is active, what a program makes without saying its dtype is float64 where it would be float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        unsaid = func in _MAKERS and (kwargs or {}).get("dtype") is None
        return made.double() if unsaid and made.dtype == torch.float32 else made


def check_pair(
    model: Mapping[str, Site], guide: Mapping[str, Site], plate: str | None = None, *, whole: bool = False
) -> Layout:
    """The layout of the recorded sites of a pair.

    Raises:
        ValueError: If model and guide are not a valid pair; the message names the site.
    """
    latents = [name for name, site in model.items() if not site.is_observed]
    drawn = [name for name, site in guide.items() if not site.is_observed and not site.is_auxiliary]
    check_observes(model, guide)
    if not latents:
        raise ValueError(f"expected a model with a latent site, got only observed sites {list(model)}")
    if set(latents) != set(drawn):
        _check_left_out(model, latents, drawn)
    _check_deltas(model, guide, [name for name in drawn if is_delta(guide[name].fn)])
    return layout_of(model, guide, plate, whole=whole)


def _check_left_out(model: Mapping[str, Site], latents: list[str], drawn: list[str]) -> None:
    """Check that a guide samples all latents but those that can be summed out, were not made, or are point masses.

    Raises:
        ValueError: If not; the message names the sites.
    """
    free = {name for name in latents if is_summable(model[name]) or is_delta(model[name].fn)} | unobserved(model)
    needed = {name for name in latents if name in drawn or name not in free}
    if needed != set(drawn):
        got = (
            sorted(drawn) if drawn else f"{NO_SITES}: a guide has the same pyro.sample('z', ...) inside the same plate"
        )
        raise ValueError(f"expected the guide to sample the model's latent sites {sorted(needed)}, got {got}")


def check_observes(model: Mapping[str, Site], guide: Mapping[str, Site]) -> None:
    """Check that a model has an observed site, without which it has no evidence; a guide may have some.

    Raises:
        ValueError: If it has none; the message says whether model and guide look swapped.
    """
    if not any(site.is_observed for site in model.values()):
        seen = [name for name, site in guide.items() if site.is_observed]
        hint = f", while the guide observes {seen}: are model and guide swapped?" if seen else ""
        got = f"one of latent sites alone {list(model)}" if model else NO_SITES
        raise ValueError(f"expected a model that observes data, got {got}{hint}")


@torch.no_grad()
def refuse_swapped(model: Program, guide: Program, args: tuple[Any, ...]) -> None:
    """Refuse a model without an observed site, by a run of each half; for losses that do not check their pair.

    Raises:
        ValueError: See :func:`check_observes`.
    """
    with isolated(), random_state(None):
        runs = [run_program(program, args, {}, None, 1, None).sites for program in (guide, model)]
    check_observes(runs[1], runs[0])


def _check_deltas(model: Mapping[str, Site], guide: Mapping[str, Site], deltas: list[str]) -> None:
    """Check that each point mass of a guide carries the Jacobian of auxiliary sites, as in AutoGuides.

    The sum of the guide's terms is a density only if as many numbers are drawn as the latents have coordinates.

    Raises:
        ValueError: If not; the message names the sites.
    """
    auxiliary = [
        name for name, site in guide.items() if site.is_auxiliary and not (site.is_observed or is_delta(site.fn))
    ]
    drawn = sum(guide[name].value.numel() for name in auxiliary)
    needed = sum(_coordinates(model[name].fn, guide[name].value) for name in deltas)
    if not auxiliary and deltas:
        raise ValueError(
            f"expected a density at guide site {deltas[0]!r}, got a Delta, which objective=pyro.infer.Trace_ELBO() fits"
        )
    if drawn != needed:
        raise ValueError(
            f"expected the auxiliary guide sites {auxiliary} to have a number for each coordinate of the latents "
            f"{deltas} that are Deltas, got {drawn} numbers for {needed} coordinates"
        )


def _coordinates(fn: Any, value: Tensor) -> int:
    try:
        return biject_to(support_of(fn)).inverse_shape(value.shape).numel()
    except NotImplementedError:
        return value.numel()


def modules_of(*programs: Program) -> list[nn.Module]:
    """The modules behind programs: themselves, or what a bound method belongs to; each once."""
    owners = [getattr(program, "__self__", program) for program in programs]
    return list({id(owner): owner for owner in owners if isinstance(owner, nn.Module)}.values())
