"""Guides whose parameters ``pyro.param`` names, as those of functions and of EasyGuide: copies to be refitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from inference.core.seeding import random_state
from inference.pair.call import Call
from inference.pair.handlers import isolated
from inference.pair.run import Program, run_program

# A parameter in unconstrained coordinates, and its constraint.
Named = tuple[Tensor, constraints.Constraint]


def named_parameters(call: Call) -> dict[str, Named]:
    """The parameters that a call's guide names by ``pyro.param``; none where it trains others, outside of a module."""
    assert call.guide is not None
    settled = call.settled()
    with isolated(), random_state(None), torch.no_grad(), _Seen() as seen:
        run_program(call.guide, settled.args, settled.kwargs, None, 1, None)
    foreign = seen.modules - ({id(p) for p in call.guide.parameters()} if isinstance(call.guide, nn.Module) else set())
    return {} if foreign else seen.found


class OwnParameters(nn.Module):
    """A guide with parameters of its own in the place of those that it names.

    Args:
        guide: Pyro guide.
        named: Its parameters by name, from :func:`named_parameters`; they are copied.
    """

    def __init__(self, guide: Program, named: Mapping[str, Named]) -> None:
        super().__init__()
        self.guide = guide  # a module's own parameters are free, too
        self._constraints = {name: constraint for name, (_, constraint) in named.items()}
        self.values = nn.ParameterList([nn.Parameter(value.detach().clone()) for value, _ in named.values()])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide."""
        pairs = zip(self._constraints.items(), self.values, strict=True)
        with _Answers({name: transform_to(constraint)(value) for (name, constraint), value in pairs}):
            return self.guide(*args, **kwargs)


class _Seen(Messenger):
    """Records the parameters that stand in Pyro's store under a name, and which others are a module's."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Named] = {}
        self.modules: set[int] = set()

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        free = value.unconstrained() if hasattr(value, "unconstrained") else value
        if isinstance(free, nn.Parameter):
            self.modules.add(id(free))
        elif free.requires_grad:
            self.found[msg["name"]] = free, msg["kwargs"].get("constraint", constraints.real)


class _Answers(Messenger):
    """Answers param statements of some names by given values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self._values:
            msg["value"], msg["done"], msg["stop"] = self._values[msg["name"]], True, True
