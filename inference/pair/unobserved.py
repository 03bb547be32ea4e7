"""Observations that were not made, ``pyro.sample(..., obs=x, obs_mask=seen)``: Pyro draws them as a latent site.

Where no other site depends on it, such a latent integrates to one and is left out. Where one does, as on a covariate
that is missing, it is a latent like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from inference.pair.handlers import Site, masked_log_prob
from inference.pair.improper import is_delta

_SEEN, _UNSEEN = "_observed", "_unobserved"


def unobserved(sites: Mapping[str, Site]) -> set[str]:
    """Names of the latent sites of a model that stand for observations which were not made."""
    latents = {name for name, site in sites.items() if not site.is_observed and name.endswith(_UNSEEN)}
    return {name for name in latents if name.removesuffix(_UNSEEN) + _SEEN in sites}


@torch.no_grad()
def without_children(
    names: Iterable[str], sites: Mapping[str, Site], run: Callable[[Mapping[str, Tensor]], Mapping[str, Site]]
) -> frozenset[str]:
    """The sites of these names on whose value no other site depends, by trial of another draw; random numbers are used.

    Args:
        names: Latent sites.
        sites: Sites of a run.
        run: Runs the program at given values of its latent sites, by name.
    """
    names = set(names)
    latents = {name: s.value for name, s in sites.items() if not (s.is_observed or is_delta(s.fn))}
    found = set()
    for name in names:
        again = run({other: value for other, value in latents.items() if other != name})
        pairs = [
            (masked_log_prob(site), masked_log_prob(again[other])) for other, site in sites.items() if other != name
        ]
        if all(torch.equal(first, second) for first, second in pairs):
            found.add(name)
    return frozenset(found)
