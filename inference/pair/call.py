"""A call of a model/guide pair: the two programs with what both are called with, as one immutable value.

A pair is a Pyro model and a Pyro guide, functions or modules of one call signature. A call knows how its data are laid
out, as the rows of one common vectorised plate or as one data point, and how several samples are evaluated: side by
side, as further rows, or one by one. Every door of the library gets both from here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._pytree import tree_leaves, tree_map

from inference.core.checks import check_arguments
from inference.core.memory import at_once
from inference.core.protocols import SupportsRows
from inference.core.ranks import ranks
from inference.core.seeding import random_state
from inference.core.sources import Column, as_arguments
from inference.core.storage import tensor_digest
from inference.pair.draw import Draw
from inference.pair.enumeration import Enumeration
from inference.pair.handlers import RecordSites, Site, isolated
from inference.pair.manners import Manners, check_once, manners_of, remember_as, remembered
from inference.pair.rows import RowBlocks
from inference.pair.run import CONVERTED, Program, check_pair, modules_of, run_program
from inference.pair.samples import Single, beside

_SINGLE = Manners(Single(), Single())

# Seed of a run that shall not draw the numbers of the one before it.
_SECOND_SEED = 748_291

# Rows that are converted at once to be checked.
_CHECKED = 4096


@dataclass(frozen=True)
class Call:
    """A model and a guide with the arguments, and the plate, that both are called with.

    Attributes:
        model: Pyro model.
        guide: Pyro guide of the same call signature; None where there is none.
        args: Positional arguments of both, data first.
        kwargs: Keyword arguments of both.
        plate: Name of the plate over the data, ``"data"`` if None.
        broadcast: Evaluate samples side by side where the pair can, see :mod:`inference.pair.manners`; False evaluates
            them one by one.
        whole: Take all data as one data point, whatever the plates: for latents that all data share.
        missing: NaN in the data stands for a missing value that the model itself masks.
        row_arguments: Positions and names of the arguments with one row per data point; None where that is not known
            yet, see :func:`inference.pair.rows.with_known_rows`.
        stated_rows: Those that the caller says are, which is checked before it is believed; None where nothing is said.
        doubles: Whether rows are converted to float64 as they are taken, see :meth:`double_by_rows`.
    """

    model: Program
    guide: Program | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plate: str | None = None
    broadcast: bool = True
    whole: bool = False
    missing: bool = False
    row_arguments: frozenset[int | str] | None = None
    stated_rows: frozenset[int | str] | None = None
    doubles: bool = False

    def __post_init__(self) -> None:
        args, kwargs = as_arguments(self.args, self.kwargs)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)
        if self.whole and self.plate is not None:
            raise ValueError(f"expected whole=True or a plate over the data, got both, plate={self.plate!r}")

    @property
    def programs(self) -> tuple[Program, ...]:
        """Model and, where there is one, guide."""
        return (self.model,) if self.guide is None else (self.model, self.guide)

    @property
    def num_rows(self) -> int | None:
        """Rows of the first tensor among the arguments; None where it has no rows."""
        first = next((leaf for leaf in tree_leaves(self.args) if isinstance(leaf, Tensor | Column)), None)
        return len(first) if first is not None and len(first.shape) > 0 else None

    def check(self) -> None:
        """Check the arguments, see :func:`inference.core.checks.check_arguments`.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument is not finite, or does not have the shape that a program declares.
        """
        if self.num_rows == 0 and not self.whole:
            raise ValueError("expected at least one data point, got none")
        lazy = any(isinstance(leaf, Column) for leaf in tree_leaves((self.args, dict(self.kwargs))))
        if not (lazy or self.doubles) or self.num_rows is None:
            check_arguments(self.programs, self.args, self.kwargs, missing=self.missing)
            return
        check_arguments((), self.args, self.kwargs, missing=self.missing)
        blocks = RowBlocks(self, None if self.whole else at_once(_CHECKED))
        for i in range(1 if lazy else len(blocks)):  # what is read later is checked then
            part = blocks[i]
            check_arguments(part.programs, part.args, part.kwargs, missing=self.missing)

    def double(self) -> Call:
        """The call with modules and data in float64: at little noise a float32 density is lost in rounding.

        Modules are copied, as one, so that a guide which holds its model holds the copy. The call itself is returned
        where a half is neither a module nor a module's method, or all is float64 already. What a converted program
        makes without saying its dtype, as by ``torch.zeros(3)``, is float64, too.
        """
        return self.double_by_rows().settled()

    def double_by_rows(self) -> Call:
        """:meth:`double` whose data are converted when some of their rows are taken, and not before."""
        owned = all(modules_of(program) for program in self.programs)
        numbers = [t for module in modules_of(*self.programs) for t in _floating(module)]
        numbers = numbers or [leaf for leaf in tree_leaves(self.args) if _is_floating(leaf)]
        if not owned or all(t.dtype == torch.float64 for t in numbers):
            return self
        model, guide = copy.deepcopy((self.model, self.guide))
        for module in modules_of(*(program for program in (model, guide) if program is not None)):
            module.double()
            setattr(module, CONVERTED, True)
        return replace(self, model=model, guide=guide, doubles=True)

    def settled(self) -> Call:
        """The call as it is run: on all its rows, read, and converted where they are to be."""
        if any(isinstance(leaf, Column) for leaf in tree_leaves((self.args, dict(self.kwargs)))):
            args, kwargs = tree_map(_read, (self.args, dict(self.kwargs)))
            return replace(self, args=args, kwargs=kwargs).settled()
        return self.with_double_arguments() if self.doubles else self

    def rows(self, index: Tensor | slice, num_rows: int | None = None) -> Call:
        """The call of chosen rows, which may repeat: of the arguments that are rows of data, and of the guide.

        Args:
            index: Integers from 0 to the number of rows less one, (M,); or a slice, which copies nothing.
            num_rows: N. The first argument's rows if None.

        Raises:
            ValueError: If no argument has one row per data point.
        """
        names = self.candidates(num_rows) if self.row_arguments is None else self.row_arguments
        number = self.num_rows if num_rows is None else num_rows

        args = tuple(rows_of(value, index, number) if i in names else value for i, value in enumerate(self.args))
        kwargs = {n: rows_of(value, index, number) if n in names else value for n, value in self.kwargs.items()}
        guide = self.guide
        if isinstance(guide, SupportsRows):
            guide = guide.rows(torch.arange(number or 0)[index])
        part = replace(self, guide=guide, args=args, kwargs=kwargs).settled()
        if guide is not self.guide:
            remember_as(part, self)
        return part

    def with_rows(self, row_arguments: frozenset[int | str]) -> Call:
        """The call with the names of the arguments that are rows of data."""
        return replace(self, row_arguments=row_arguments)

    def count_rows(self, row_arguments: frozenset[int | str]) -> int:
        """N, the rows of the arguments that are rows of data."""
        named: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return num_rows([value for name, value in named if name in row_arguments])

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
            num_samples: S, samples per data point.
            values: Values to keep, by name: indices of subsampling plates from another run, and latents, which the
                guide then scores instead of drawing its own.
            expose_params: Let param statements through to an enclosing handler.
            enumerate_guide: Take all values of the sites that the guide marks by ``infer={"enumerate": "parallel"}``;
                False draws them.

        Raises:
            ValueError: If model and guide are not a valid pair in the sense of this module; the message names the
                site.
        """
        known = manners_of(self, num_samples) if num_samples > 1 else remembered(self)
        if known is None:
            draw = self.run_drawn(values=values, expose_params=expose_params)
            if not (draw.left_out or (enumerate_guide and draw.marked)):
                return draw
            known = manners_of(self)
        if not known.enumerates(enumerate_guide):
            return self._run(known, num_samples, values, expose_params)
        return self._run_enumerated(known, num_samples, values, expose_params, enumerate_guide)

    def run_drawn(self, *, values: Mapping[str, Tensor] | None = None, expose_params: bool = False) -> Draw:
        """:meth:`run` of one sample with every discrete site drawn: in the model, where the guide leaves it out."""
        return self._run(_SINGLE, 1, values, expose_params)

    def _run(
        self, manners: Manners, num_samples: int, values: Mapping[str, Tensor] | None, expose_params: bool
    ) -> Draw:
        guide, given = self._guide(), dict(values or {})
        if num_samples == 1:
            manners = _SINGLE
        with isolated(expose_params=expose_params):
            guide_run = manners.guide.run(self, guide, given, num_samples)
            given = given | _latents(guide_run) | guide_run.subsamples
            model_run = manners.model.run(self, self.model, given, num_samples)
        return self._as_draw(model_run, guide_run, num_samples)

    def _run_enumerated(
        self,
        known: Manners,
        num_samples: int,
        values: Mapping[str, Tensor] | None,
        expose_params: bool,
        enumerate_guide: bool,
    ) -> Draw:
        if num_samples > 1 and not known.side_by_side:
            return self._run_enumerated_one_by_one(known, num_samples, values, expose_params, enumerate_guide)
        guide, given, depth = self._guide(), dict(values or {}), known.model.depth
        first = Enumeration(known.marked if enumerate_guide else frozenset(), -depth - 2)
        plates = depth if num_samples > 1 else None
        with isolated(expose_params=expose_params):
            guide_run = run_program(guide, self.args, self.kwargs, given, num_samples, plates, first)
            given = given | _latents(guide_run) | guide_run.subsamples
            second = Enumeration(known.summed, None, guide_run.sites)
            model_run = run_program(self.model, self.args, self.kwargs, given, num_samples, plates, second)
        for name in known.dropped:
            del model_run.sites[name]
        return self._as_draw(model_run, guide_run, num_samples)

    def _run_enumerated_one_by_one(
        self,
        known: Manners,
        num_samples: int,
        values: Mapping[str, Tensor] | None,
        expose_params: bool,
        enumerate_guide: bool,
    ) -> Draw:
        given, draws = dict(values or {}), list[Draw]()
        for s in range(num_samples):
            sample = {n: v if n in known.plates else v[s] for n, v in given.items()}
            sample |= dict(draws[0].subsamples) if draws else {}
            draws.append(self._run_enumerated(known, 1, sample, expose_params, enumerate_guide))
        model, guide = ([getattr(d, half) for d in draws] for half in ("model_sites", "guide_sites"))
        sites = beside(model, known.model.depth), beside(guide, known.model.depth)
        return Draw(draws[0].layout, num_samples, *sites, draws[0].subsamples, self)

    def _as_draw(self, model_run: RecordSites, guide_run: RecordSites, num_samples: int) -> Draw:
        layout = check_pair(model_run.sites, guide_run.sites, self.plate, whole=self.whole)
        subsamples = guide_run.subsamples | model_run.subsamples
        return Draw(layout, num_samples, model_run.sites, guide_run.sites, subsamples, self)

    def manners(self, num_samples: int) -> Manners:
        """How each half is run on so many samples, see :func:`inference.pair.manners.manners_of`."""
        return _SINGLE if num_samples == 1 else manners_of(self, num_samples)

    def run_guide(self, *, expose_params: bool = False) -> dict[str, Site]:
        """Latent sites of one run of the guide alone, in trace order."""
        with isolated(expose_params=expose_params):
            run = Single().run(self, self._guide(), None, 1)
        return run.drawn

    def probe(self) -> Draw:
        """One run of one sample without gradient that leaves the random state as it was, its discrete sites drawn.

        Raises:
            ValueError: As :meth:`run`.
        """
        # A probe is no part of the computation, so it must not enter the graph of a make_fx trace either.
        with random_state(None), torch.no_grad(), disable_proxy_modes_tracing():
            draw = self.run_drawn()
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
        check_once(self, draw.check_angles)
        check_once(self, draw.check_determined)
        return draw

    def sites_at(self, values: Mapping[str, Tensor]) -> Mapping[str, Site]:
        """Sites of a second run of the model at given values of latents and indices; the others are drawn anew."""
        with isolated(), random_state(_SECOND_SEED), torch.no_grad(), disable_proxy_modes_tracing():
            return Single().run(self, self.model, values, 1).sites

    def _guide(self) -> Program:
        if self.guide is None:
            raise ValueError("expected a guide, got none")
        return self.guide

    def with_double_arguments(self) -> Call:
        """The call with its data in float64."""
        args, kwargs = tree_map(_convert, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, doubles=False)


def check_same_call(call: Call, settings: Any) -> None:
    """Check that all ranks make one call: with the same settings, halves and, as far as the first rows tell, data.

    Raises:
        ValueError: On all ranks, if not.
    """
    group = ranks()
    if group.size == 1:
        return
    rows = call if call.whole or call.num_rows is None else call.rows(slice(0, 1))
    halves = {name: tensor_digest(t) for m in modules_of(*call.programs) for name, t in m.state_dict().items()}
    data = [tensor_digest(leaf) for leaf in tree_leaves((rows.args, dict(rows.kwargs))) if isinstance(leaf, Tensor)]
    for what, value in (("settings", repr(settings)), ("number of rows", call.num_rows), ("first row", data)):
        group.check_same(value, what)
    group.check_same(halves, "parameters")


def num_rows(values: list[Any]) -> int:
    """Rows of the first tensor among arguments that has some."""
    return len(next(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor | Column) and len(leaf.shape) > 0))


def rows_of(value: Any, index: Tensor | slice, number: int | None) -> Any:
    """An argument of a call with those of its tensors that have so many rows restricted to chosen ones."""

    def chosen(leaf: Any) -> Any:
        if not _is_rows(leaf, number):
            return leaf
        if isinstance(index, Tensor) and isinstance(leaf, Tensor):
            return leaf.index_select(0, index.to(leaf.device))  # a fraction of the time of leaf[index]
        return leaf[index]

    return chosen(value) if isinstance(value, Tensor) else tree_map(chosen, value)


def _latents(run: RecordSites) -> dict[str, Tensor]:
    return {name: site.value for name, site in run.drawn.items()}


def _has_rows(value: Any, number: int) -> bool:
    return any(_is_rows(leaf, number) for leaf in tree_leaves(value))


def _is_rows(value: Any, number: int | None) -> bool:
    return isinstance(value, Tensor | Column) and len(value.shape) > 0 and len(value) == number


def _read(value: Any) -> Any:
    return value[:] if isinstance(value, Column) else value


def _convert(value: Any) -> Any:
    return value.double() if _is_floating(value) else value


def _floating(module: Any) -> list[Tensor]:
    """Parameters and buffers of a module that are no integers."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
