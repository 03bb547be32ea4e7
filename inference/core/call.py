"""A call of a model/guide pair: the two programs with what both are called with, as one immutable value.

A pair is a Pyro model and a Pyro guide, functions or modules of one call signature, in which every sample site of
both halves stands in one common vectorised plate over the data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from inference.core.checks import check_arguments
from inference.core.draw import Draw
from inference.core.enumeration import Enumeration, is_summable
from inference.core.handlers import RecordSites, Site, isolated
from inference.core.improper import check_angles, is_periodic
from inference.core.protocols import SupportsRows
from inference.core.run import Program, check_pair, modules_of, run_program
from inference.core.seeding import random_state
from inference.core.unobserved import unobserved, without_children


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
        return replace(self, guide=guide, args=args, kwargs=kwargs)

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
        self,
        num_samples: int = 1,
        *,
        values: Mapping[str, Tensor] | None = None,
        expose_params: bool = False,
        enumerate_guide: bool = False,
    ) -> Draw:
        """Draw latents from the guide and replay the model on them; discrete latents that it leaves out are summed out.

        One sample runs without a particle plate, so that a pair which cannot broadcast still runs.

        Args:
            num_samples: S, samples per data point, drawn side by side.
            values: Values to keep, by name: indices of subsampling plates from another run, and latents, which the
                guide then scores instead of drawing its own.
            expose_params: Let param statements through to an enclosing handler.
            enumerate_guide: Take all values of the sites that the guide marks by ``infer={"enumerate": "parallel"}``;
                False draws them.

        Raises:
            ValueError: If model and guide are not a valid pair in the sense of this module; the message names the
                site.
        """
        known = self._known() if num_samples > 1 else self._remembered()
        if known is None:
            draw = self._run(1, values, expose_params, None)
            if not (draw.left_out or (enumerate_guide and draw.marked)):
                return draw
            known = self._known()
        if known.enumerates(enumerate_guide):
            return self._run_enumerated(num_samples, values, expose_params, known, enumerate_guide)
        return self._run(num_samples, values, expose_params, known.depth if num_samples > 1 else None)

    def _run(
        self, num_samples: int, values: Mapping[str, Tensor] | None, expose_params: bool, depth: int | None
    ) -> Draw:
        guide, given = self._guide(), dict(values or {})
        with isolated(expose_params=expose_params):
            guide_run = run_program(guide, self.args, self.kwargs, given, num_samples, depth)
            given = given | _latents(guide_run) | guide_run.subsamples
            model_run = run_program(self.model, self.args, self.kwargs, given, num_samples, depth)
        return self._as_draw(model_run, guide_run, num_samples)

    def _run_enumerated(
        self,
        num_samples: int,
        values: Mapping[str, Tensor] | None,
        expose_params: bool,
        known: _Form,
        enumerate_guide: bool,
    ) -> Draw:
        guide, given = self._guide(), dict(values or {})
        depth = known.depth if num_samples > 1 else None
        first = Enumeration(known.marked if enumerate_guide else frozenset(), -known.depth - 2)
        with isolated(expose_params=expose_params):
            guide_run = run_program(guide, self.args, self.kwargs, given, num_samples, depth, first)
            given = given | _latents(guide_run) | guide_run.subsamples
            second = Enumeration(known.summed, None, guide_run.sites)
            model_run = run_program(self.model, self.args, self.kwargs, given, num_samples, depth, second)
        for name in known.dropped:
            del model_run.sites[name]
        return self._as_draw(model_run, guide_run, num_samples)

    def _as_draw(self, model_run: RecordSites, guide_run: RecordSites, num_samples: int) -> Draw:
        layout = check_pair(model_run.sites, guide_run.sites, self.plate)
        subsamples = guide_run.subsamples | model_run.subsamples
        return Draw(layout, num_samples, model_run.sites, guide_run.sites, subsamples, self)

    def run_guide(self, *, expose_params: bool = False) -> dict[str, Site]:
        """Latent sites of one run of the guide alone, in trace order."""
        with isolated(expose_params=expose_params):
            run = run_program(self._guide(), self.args, self.kwargs, None, 1, None)
        return run.drawn

    def probe(self) -> Draw:
        """One run of one sample without gradient that leaves the random state as it was, its discrete sites drawn.

        Raises:
            ValueError: As :meth:`run`.
        """
        # A probe is no part of the computation, so it must not enter the graph of a make_fx trace either.
        with random_state(None), torch.no_grad(), disable_proxy_modes_tracing():
            draw = self._run(1, None, False, None)
            if not (draw.left_out or draw.marked):
                return draw
            numel = self.run(enumerate_guide=True).layout.numel
            return replace(draw, layout=replace(draw.layout, numel=numel))

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

    def _remembered(self) -> _Form | None:
        """What an earlier run of these programs found."""
        return self._kept()[0]

    def _known(self) -> _Form:
        """Batch dimensions and discrete sites of the pair: found once for the programs and their arguments' form."""
        found, keep = self._kept()
        if found is None:
            with random_state(None), torch.no_grad(), disable_proxy_modes_tracing():
                found = self._find()
            keep(found)
        return found

    def _find(self) -> _Form:
        draw = self._run(1, None, False, None)
        sites, left_out = draw.model_sites, draw.left_out
        dropped = without_children(unobserved(sites) & left_out, sites, lambda values: self._model_sites(values, draw))
        if rest := {name for name in left_out - dropped if not is_summable(sites[name])}:
            raise ValueError(f"expected the guide to sample {sorted(rest)}, on which other sites of the model depend")
        return _Form(draw.layout.depth, left_out - dropped, draw.marked, dropped)

    def _model_sites(self, values: Mapping[str, Tensor], draw: Draw) -> Mapping[str, Site]:
        with isolated():
            run = run_program(self.model, self.args, self.kwargs, {**draw.subsamples, **values}, 1, None)
        return run.sites

    def _kept(self) -> tuple[_Form | None, Callable[[_Form], Any]]:
        try:
            arguments = (*map(_form, self.args), *((name, _form(value)) for name, value in self.kwargs.items()))
            form = (self.plate, *arguments)
            known = _forms.setdefault(self.model, WeakKeyDictionary()).setdefault(self.guide, {})
            return known.get(form), lambda found: known.__setitem__(form, found)
        except TypeError:  # no weak references to it, or no hash: then it is found each time
            return None, lambda _: None


@dataclass(frozen=True)
class _Form:
    """What holds for every run of a pair: its batch dimensions, and its discrete sites that may be summed over.

    Attributes:
        depth: Batch dimensions.
        summed: Sites that the guide leaves out, to be summed over.
        marked: Sites that the guide marks to be enumerated.
        dropped: Observations that were not made and of which nothing depends.
    """

    depth: int
    summed: frozenset[str]
    marked: frozenset[str]
    dropped: frozenset[str]

    def enumerates(self, guide: bool) -> bool:
        """Whether a run differs from one in which every site is drawn and counted."""
        return bool(self.summed or self.dropped or (guide and self.marked))


def _latents(run: RecordSites) -> dict[str, Tensor]:
    return {name: site.value for name, site in run.drawn.items()}


# Kept while both programs live.
_forms: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, _Form]]] = WeakKeyDictionary()


def _form(value: Any) -> Any:
    return (value.dim(),) if isinstance(value, Tensor) else (type(value), value)


def _has_rows(value: Any, number: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == number


def _convert(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_double(module: Any) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())
