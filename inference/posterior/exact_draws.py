"""Exact draws of posteriors: of simulated data, or of a model with an exact posterior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inference.core.checks import check_arguments, check_count
from inference.core.handlers import RecordSites, Site, isolated
from inference.core.protocols import SupportsPosterior
from inference.core.run import Program, run_program
from inference.core.seeding import random_state, seeded
from inference.core.simulated import observed_arguments
from inference.posterior.prediction import sample


@dataclass(frozen=True, kw_only=True)
class ExactDraws:
    """Exact draws of the posterior, with the data that they are given.

    Attributes:
        x: Data, (N, D).
        latents: Values by site name; with S samples left of the data, (S, N, ...), or (N, ...) if S = 1.
        num_samples: S.
    """

    x: Tensor
    latents: Mapping[str, Tensor] = field(repr=False)
    num_samples: int = 1


def simulated_draws(
    model: Program, like: int | Tensor, *args: Any, seed: int | None = None, **kwargs: Any
) -> ExactDraws:
    """Simulated data with their true latents: one exact draw of each data point's posterior.

    Args:
        model: Pyro model.
        like: Number of data points, for a model that is a :class:`inference.core.protocols.Simulates`; or data (N, D),
            which the model observes unchanged and which are replaced by simulated ones.
        *args: Further arguments of the model.
        seed: Seed; leaves the global random state as it was.
        **kwargs: Keyword arguments of the model.

    Raises:
        TypeError: If a number is given and the model returns no tensor.
        ValueError: If data are given and they are not all that the model observes, unchanged.
    """
    if isinstance(like, Tensor):
        check_arguments((model,), (like, *args), kwargs)
        name = _only(observed_arguments(_sites(model, (like, *args), kwargs), [like]), "observed")
        values = sample(model, like, *args, seed=seed, **kwargs)
        return ExactDraws(x=values.pop(name), latents=values)
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
