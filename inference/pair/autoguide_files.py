"""What a file says of one of Pyro's AutoGuides, so that it can be built again around its model."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import nn

from inference.core.seeding import random_state
from inference.pair.fingerprint import name_of
from inference.pair.handlers import isolated

_KINDS = (
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
)
AUTOGUIDES: dict[str, type[Any]] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _KINDS}


def autoguide_config(guide: nn.Module, model: nn.Module) -> dict[str, Any] | None:
    """Its arguments, the data of its first call, and the model's sites that it leaves out; None if it is another kind.

    An AutoGuide takes the shapes of its parameters from a run of its model on data, so the data are kept.
    """
    first = getattr(guide, "prototype_trace", None)
    if name_of(guide) not in AUTOGUIDES or first is None:
        return None
    args = first.nodes["_INPUT"]["args"]
    if first.nodes["_INPUT"]["kwargs"] or not all(isinstance(value, torch.Tensor) for value in args):
        return None
    with isolated(), random_state(0):
        sites = poutine.trace(model).get_trace(*args).stochastic_nodes
    hidden = sorted(set(sites) - set(first.stochastic_nodes))
    rank = getattr(guide, "rank", None)
    return {"args": list(args), "hidden": hidden} | ({} if rank is None else {"rank": int(rank)})


def build_autoguide(name: str, config: dict[str, Any], model: nn.Module) -> nn.Module:
    """The AutoGuide of that class around a model, with parameters of the right shapes."""
    options = {key: value for key, value in config.items() if key not in ("args", "hidden")}
    with isolated(), random_state(0):
        guide: nn.Module = AUTOGUIDES[name](poutine.block(model, hide=config["hidden"]), **options)
        guide(*config["args"])
    return guide
