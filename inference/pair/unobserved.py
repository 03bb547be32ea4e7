"""Latents that may count for nothing: observations that were not made, and what ``poutine.do`` intervenes upon.

Pyro draws what ``pyro.sample(..., obs=x, obs_mask=seen)`` did not see as a latent site; ``poutine.do`` draws the site
that it intervenes upon, and hands another value on. Where no other site depends on it, such a latent integrates to one
and is left out. Where one does, as on a covariate that is missing, it is a latent like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.pair.handlers import Site, masked_log_prob
from inference.pair.improper import is_delta

if TYPE_CHECKING:
    from inference.pair.call import Call

_SEEN, _UNSEEN = "_observed", "_unobserved"


def unobserved(sites: Mapping[str, Site]) -> set[str]:
    """Names of the latent sites of a model that stand for observations not made, or that are intervened upon."""
    latents = {name for name, site in sites.items() if not site.is_observed}
    unseen = {name for name in latents if name.endswith(_UNSEEN) and name.removesuffix(_UNSEEN) + _SEEN in sites}
    return unseen | {name for name in latents if sites[name].is_intervened}


@torch.no_grad()
def without_children(
    names: Iterable[str], sites: Mapping[str, Site], call: Call, subsamples: Mapping[str, Tensor]
) -> frozenset[str]:
    """The sites of these names on whose value no other site depends, by trial of another draw.

    Args:
        names: Latent sites.
        sites: Sites of a run.
        call: What was run.
        subsamples: The indices that each plate chose.
    """
    names = set(names)
    latents = {name: s.value for name, s in sites.items() if not (s.is_observed or is_delta(s.fn))}
    found = set()
    for name in names:
        others = {other: value for other, value in latents.items() if other != name}
        again = call.sites_at({**subsamples, **others})
        pairs = [
            (masked_log_prob(site), masked_log_prob(again[other])) for other, site in sites.items() if other != name
        ]
        if all(torch.equal(first, second) for first, second in pairs):
            found.add(name)
    return frozenset(found)
