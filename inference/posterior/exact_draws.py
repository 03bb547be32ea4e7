"""Exact draws of posteriors: of simulated data, or of a model with an exact posterior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inference.core.checks import check_arguments, check_count, check_programs
from inference.core.display import Result
from inference.core.protocols import SupportsPosterior
from inference.core.seeding import random_state, seeded
from inference.pair.call import Call
from inference.pair.handlers import RecordSites, Site, isolated
from inference.pair.improper import is_delta
from inference.pair.run import Program, run_program
from inference.pair.simulated import observed_arguments, simulated_values, with_simulated_data


@dataclass(frozen=True, kw_only=True, repr=False)
class ExactDraws(Result):
    """Exact draws of the posterior, with the data that they are given.

    Attributes:
        x: Data, (N, D).
        latents: Values by site name; with S samples left of the data, (S, N, ...), or (N, ...) if S = 1.
        num_samples: S.
        args: Further arguments of the model, simulated ones among them; those that a door is given if there are none.
    """

    x: Tensor
    latents: Mapping[str, Tensor] = field(repr=False)
    num_samples: int = 1
    args: tuple[Any, ...] = field(default=(), repr=False)

    def arguments(self, further: tuple[Any, ...]) -> tuple[Any, ...]:
        """Positional arguments of a call with these data: the own ones, or further ones where there are none."""
        return (self.x, *(self.args or further))


def simulated_draws(
    model: Program, like: Any, *args: Any, missing: bool = False, seed: int | None = None, **kwargs: Any
) -> ExactDraws:
    """Simulated data with their true latents: one exact draw of each data point's posterior.

    Args:
        model: Pyro model.
        like: Number of data points, for a model that is a :class:`inference.core.protocols.Simulates`; or data (N, D),
            the first argument.
        *args: Further arguments of the model. What it observes of all these, ``obs=y`` or ``obs=y.reshape(...)``, is
            replaced by simulated data, but for what is masked.
        missing: See :func:`inference.iter_log_weights`; values that are missing are so in the simulated data.
        seed: Seed; leaves the global random state as it was.
        **kwargs: Keyword arguments of the model.

    Raises:
        TypeError: If a number is given and the model returns no tensor.
        ValueError: If data are given and the model observes anything else.
    """
    if not isinstance(like, int | float):
        call = Call(model, None, (like, *args), kwargs, missing=missing)
        call.check()
        sites = _sites(model, call.args, kwargs)
        observed_arguments(sites, call.args, missing=missing)  # keyword arguments stay as they are
        with seeded(seed), torch.no_grad():
            values = simulated_values(call)
        new = with_simulated_data(call, sites, values)
        latents = {name: values[name] for name, site in sites.items() if not (site.is_observed or is_delta(site.fn))}
        return ExactDraws(x=new.args[0], latents=latents, args=new.args[1:])
    check_count(like, "the number of data points to simulate")
    with seeded(seed), torch.no_grad(), isolated(), RecordSites() as run:
        x = model(*args, n=like, **kwargs)
    if not isinstance(x, Tensor):
        raise TypeError(f"expected model(n={like}) to return the simulated data, got {type(x).__name__}: give data")
    return ExactDraws(x=x, latents={name: site.value for name, site in run.sites.items() if site.value is not x})


def posterior_draws(model: Program, x: Tensor, *, num_samples: int = 16, seed: int | None = None) -> ExactDraws:
    """Exact draws of the posterior, of a model with ``posterior(x)``.

    Args:
        model: Pyro model with one latent and ``posterior(x)``.
        x: Data, (N, D).
        num_samples: S, draws per data point.
        seed: Seed; leaves the global random state as it was.

    Raises:
        TypeError: If the model has no ``posterior(x)``.
    """
    check_count(num_samples, "num_samples")
    check_programs(model)
    if not isinstance(model, SupportsPosterior):
        raise TypeError(
            f"expected a model with posterior(x), got {type(model).__name__}: exact draws exist for data that it "
            "simulates, see inference.posterior.exact_draws.simulated_draws"
        )
    check_arguments((model,), (x,), {})
    latents = [name for name, site in _sites(model, (x,), {}).items() if not site.is_observed]
    with seeded(seed), torch.no_grad():
        z = model.posterior(x).sample(torch.Size([num_samples]))
    return ExactDraws(x=x, latents={_only(latents, "latent"): z if num_samples > 1 else z[0]}, num_samples=num_samples)


def _sites(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Site]:
    with random_state(None), torch.no_grad(), isolated():
        return run_program(model, args, kwargs, None, 1, None).sites


def _only(names: Iterable[str], kind: str) -> str:
    found = list(names)
    if len(found) != 1:
        raise ValueError(f"expected a model with one {kind} site, got {found}")
    return found[0]
