"""Runs at given values: simulated data in place of the observed ones, latents in place of draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pyro import poutine
from torch import Tensor

from inference.core.call import Call
from inference.core.draw import Draw, Layout
from inference.core.handlers import Site, isolated
from inference.core.run import run_program


def simulated_values(
    call: Call, values: Mapping[str, Tensor] | None = None, num_samples: int = 1, layout: Layout | None = None
) -> dict[str, Tensor]:
    """Values by site name of one run of the model in which nothing is observed, deterministic ones among them.

    Args:
        call: What to run; its guide plays no part.
        values: Values to keep by name, latents and indices of subsampling plates.
        num_samples: S, side by side.
        layout: The pair's, needed where S is above one.
    """
    depth = layout.depth if layout is not None and num_samples > 1 else None
    with isolated():
        run = run_program(poutine.uncondition(call.model), call.args, call.kwargs, values, num_samples, depth)
    return {name: site.value for name, site in run.sites.items()} | run.deterministic


def observed_arguments(sites: Mapping[str, Site], arguments: Iterable[Any]) -> list[str]:
    """Names of the observed sites of a run, each of which observes an argument as it is.

    Raises:
        ValueError: If one does not; the message names it.
    """
    observed, given = {name: site.value for name, site in sites.items() if site.is_observed}, list(arguments)
    for name, value in observed.items():
        if not any(value is argument for argument in given):
            raise ValueError(
                "expected every observed value to be an argument itself, obs=x, to put simulated data in its place, "
                f"got a value of shape {tuple(value.shape)} at site {name!r} that is not an argument"
            )
    return list(observed)


def with_simulated_data(call: Call, sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> Call:
    """The call with simulated values in place of the arguments that the model observes.

    Args:
        call: What was run.
        sites: Sites of its model.
        values: Simulated values by site name.

    Raises:
        ValueError: If an observed value is not an argument.
    """
    observed = observed_arguments(sites, [*call.args, *call.kwargs.values()])

    def simulated(argument: Any) -> Any:
        return next((values[name] for name in observed if sites[name].value is argument), argument)

    kwargs = {name: simulated(argument) for name, argument in call.kwargs.items()}
    return replace(call, args=tuple(map(simulated, call.args)), kwargs=kwargs)


def replay(call: Call, layout: Layout, values: Mapping[str, Tensor], num_samples: int = 1) -> Draw:
    """Model and guide, where there is one, at given latents.

    Args:
        call: What to run.
        layout: Its layout.
        values: Latents by name, with S to the left of the pair's batch where S is above one.
        num_samples: S.
    """
    depth = layout.depth if num_samples > 1 else None
    with isolated():
        runs = [run_program(p, call.args, call.kwargs, values, num_samples, depth) for p in call.programs]
    return Draw(layout, num_samples, runs[0].sites, runs[1].sites if len(runs) > 1 else {}, {}, call)
