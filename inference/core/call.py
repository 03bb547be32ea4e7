"""A call of a model/guide pair: the two programs with what both are called with, as one immutable value.

A pair is a Pyro model and a Pyro guide, functions or modules of one call signature, in which every sample site of
both halves stands in one common vectorised plate over the data.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from inference.core.checks import check_arguments
from inference.core.draw import Draw
from inference.core.handlers import Site, isolated
from inference.core.improper import check_angles, is_periodic
from inference.core.protocols import SupportsRows
from inference.core.run import Program, check_pair, modules_of, run_program
from inference.core.seeding import random_state


@dataclass(frozen=True)
class Call:
    """A model and a guide with the arguments, and the plate, that both are called with.

    Attributes:
        model: Pyro model.
        guide: Pyro guide of the same call signature; None where there is none.
        args: Positional arguments of both, data first.
        kwargs: Keyword arguments of both.
        plate: Name of the plate over the data, ``"data"`` if None.
        broadcast: Evaluate samples side by side; False for programs that cannot broadcast.
        row_arguments: Positions and names of the arguments with one row per data point; None where that is not known
            yet, see :func:`inference.core.rows.with_known_rows`.
    """

    model: Program
    guide: Program | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plate: str | None = None
    broadcast: bool = True
    row_arguments: frozenset[int | str] | None = None

    @property
    def programs(self) -> tuple[Program, ...]:
        """Model and, where there is one, guide."""
        return (self.model,) if self.guide is None else (self.model, self.guide)

    @property
    def num_rows(self) -> int | None:
        """Rows of the first argument; None where it is not a tensor with rows."""
        first = next(iter(self.args), None)
        return len(first) if isinstance(first, Tensor) and first.dim() > 0 else None

    def check(self) -> None:
        """Check the arguments, see :func:`inference.core.checks.check_arguments`.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument is not finite, or does not have the shape that a program declares.
        """
        check_arguments(self.programs, self.args, self.kwargs)

    def double(self) -> Call:
        """The call with modules and data in float64: at little noise a float32 density is lost in rounding.

        Modules are copied, as one, so that a guide which holds its model holds the copy. The call itself is returned
        where a half is neither a module nor a module's method, or all is float64 already.
        """
        owned = all(modules_of(program) for program in self.programs)
        if not owned or all(map(_is_double, modules_of(*self.programs))):
            return self
        model, guide = copy.deepcopy((self.model, self.guide))
        for module in modules_of(*(program for program in (model, guide) if program is not None)):
            module.double()
        return replace(self, model=model, guide=guide)._with_arguments(_convert)

    def rows(self, index: Tensor, num_rows: int | None = None) -> Call:
        """The call of chosen rows, which may repeat: of the arguments that are rows of data, and of the guide.

        Args:
            index: Integers from 0 to the number of rows less one, (M,).
            num_rows: N. The first argument's rows if None.

        Raises:
            ValueError: If no argument has one row per data point.
        """
        names = self.candidates(num_rows) if self.row_arguments is None else self.row_arguments
        args = tuple(value[index] if i in names else value for i, value in enumerate(self.args))
        kwargs = {name: value[index] if name in names else value for name, value in self.kwargs.items()}
        guide = self.guide.rows(index) if isinstance(self.guide, SupportsRows) else self.guide
        chosen = replace(self, guide=guide, args=args, kwargs=kwargs)
        if guide is not self.guide:
            chosen._share_depth(self)
        return chosen

    def candidates(self, num_rows: int | None = None) -> list[int | str]:
        """Positions and names of the arguments that may be data: tensors of N rows, the first argument's if None.

        Raises:
            ValueError: If there is none.
        """
        number = self.num_rows if num_rows is None else num_rows
        named: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        found = [name for name, value in named if number is not None and _has_rows(value, number)]
        if not found:
            raise ValueError(f"expected an argument with one row for each of {number} data points, got none")
        return found

    def run(
        self, num_samples: int = 1, *, values: Mapping[str, Tensor] | None = None, expose_params: bool = False
    ) -> Draw:
        """Draw latents from the guide and replay the model on them.

        One sample runs without a particle plate, so that a pair which cannot broadcast still runs.

        Args:
            num_samples: S, samples per data point, drawn side by side.
            values: Values to keep, by name: indices of subsampling plates from another run, and latents, which the
                guide then scores instead of drawing its own.
            expose_params: Let param statements through to an enclosing handler.

        Raises:
            ValueError: If model and guide are not a valid pair in the sense of this module; the message names the
                site.
        """
        guide, given = self._guide(), dict(values or {})
        depth = self._particle_depth() if num_samples > 1 else None
        with isolated(expose_params=expose_params):
            guide_run = run_program(guide, self.args, self.kwargs, given, num_samples, depth)
            latents = {name: site.value for name, site in guide_run.drawn.items()}
            given = given | latents | guide_run.subsamples
            model_run = run_program(self.model, self.args, self.kwargs, given, num_samples, depth)
        layout = check_pair(model_run.sites, guide_run.sites, self.plate)
        subsamples = guide_run.subsamples | model_run.subsamples
        return Draw(layout, num_samples, model_run.sites, guide_run.sites, subsamples, self)

    def run_guide(self, *, expose_params: bool = False) -> dict[str, Site]:
        """Latent sites of one run of the guide alone, in trace order."""
        with isolated(expose_params=expose_params):
            run = run_program(self._guide(), self.args, self.kwargs, None, 1, None)
        return run.drawn

    def probe(self) -> Draw:
        """One run of one sample without gradient that leaves the random state as it was.

        Raises:
            ValueError: As :meth:`run`.
        """
        # A probe is no part of the computation, so it must not enter the graph of a make_fx trace either.
        with random_state(None), torch.no_grad(), disable_proxy_modes_tracing():
            return self.run()

    def probe_density(self) -> Draw:
        """A probe of a pair whose log weights are wanted.

        Raises:
            ValueError: As :meth:`run`, if a site is scaled beyond the data plate, or the two densities of a latent are
                not with respect to one measure.
        """
        draw = self.probe()
        draw.refuse_scales()
        draw.check_latents()
        with random_state(None):
            for name in draw.latents:
                halves = draw.model_sites[name].fn, draw.guide_sites[name].fn
                check_angles(name, *halves, *map(is_periodic, halves))
        return draw

    def _guide(self) -> Program:
        if self.guide is None:
            raise ValueError("expected a guide, got none")
        return self.guide

    def _with_arguments(self, change: Any) -> Call:
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return replace(self, args=tuple(map(change, self.args)), kwargs=kwargs)

    def _particle_depth(self) -> int:
        """Batch dimensions of the pair: a property of the programs and the form of their arguments, found once."""
        try:
            arguments = (*map(_form, self.args), *((name, _form(value)) for name, value in self.kwargs.items()))
            form = (self.plate, *arguments)
            known = self._known_depths()
            if form in known:
                return known[form]
        except TypeError:  # no weak references to it, or no hash: then it is found each time
            form, known = None, {}
        known[form] = self.probe().layout.depth
        return known[form]

    def _known_depths(self) -> dict[Any, int]:
        return _depths.setdefault(self.model, WeakKeyDictionary()).setdefault(self.guide, {})

    def _share_depth(self, other: Call) -> None:
        """Take over what is known of a pair whose guide differs in its rows alone."""
        with suppress(TypeError):
            _depths.setdefault(self.model, WeakKeyDictionary())[self.guide] = other._known_depths()


# Kept while both programs live.
_depths: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, int]]] = WeakKeyDictionary()


def _form(value: Any) -> Any:
    return (value.dim(),) if isinstance(value, Tensor) else (type(value), value)


def _has_rows(value: Any, number: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == number


def _convert(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_double(module: Any) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())
