"""The density of a guide at latents that it did not draw."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import torch
from torch import Tensor

from inference.core.seeding import random_state
from inference.pair.call import Call
from inference.pair.draw import Draw, Layout
from inference.pair.handlers import Site, isolated


def guide_log_prob(call: Call, layout: Layout, values: Mapping[str, Tensor], num_samples: int) -> Tensor:
    """Log-density of a call's guide at given latents, (S, N) in nats: minus infinity outside of its support.

    Args:
        call: A guide with its arguments.
        layout: Layout of the pair.
        values: Latents by name, with samples left of all plates, and indices of subsampling plates.
        num_samples: S.

    Raises:
        ValueError: If a site is scaled beyond the data plate.
    """
    assert call.guide is not None
    manner = call.manners(num_samples).guide
    with isolated(), pyro.validation_enabled(False), random_state(None):
        run = manner.run(call, call.guide, values, num_samples)
    draw = Draw(layout, num_samples, {}, run.sites, run.subsamples, call)
    draw.refuse_scales()
    density = draw.total(run.sites, observed=False)
    outside = [_outside(site) for site in run.sites.values() if not site.is_observed]
    missed = torch.stack([layout.per_datum(part, num_samples) for part in outside]).sum(0) > 0
    return torch.where(missed | density.isnan(), -math.inf, density)


def _outside(site: Site) -> Tensor:
    """One where a value lies outside the support that its distribution declares, zero elsewhere; the batch's shape."""
    try:
        inside = site.fn.support.check(site.value)
    except NotImplementedError:
        inside = site.value.new_ones(()).bool()
    outside = (~inside).to(site.value)
    extra = outside.dim() - (site.value.dim() - len(site.fn.event_shape))
    return outside.flatten(-extra).sum(-1) if extra > 0 else outside
