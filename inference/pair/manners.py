"""Which manner of running several samples suits a pair: found by trial, checked against single runs, kept."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._pytree import tree_flatten

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.display import first_line
from inference.core.seeding import random_state
from inference.pair.draw import Draw
from inference.pair.enumeration import is_summable
from inference.pair.handlers import RecordSites, isolated
from inference.pair.improper import is_delta
from inference.pair.rows import with_known_rows
from inference.pair.run import Program
from inference.pair.samples import AsRows, Manner, Mapped, OneByOne, SideBySide, Single
from inference.pair.unobserved import unobserved, without_children

if TYPE_CHECKING:
    from inference.pair.call import Call

# What a program may raise on samples that it cannot take.
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AssertionError)

# Samples up to which a trial is of as many as are asked for; else of two.
_FEW = 8

# Kept while both programs live.
_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Hashable, Any]]] = WeakKeyDictionary()
_warned: WeakSet[Any] = WeakSet()


class Manners(NamedTuple):
    """How each half of a pair is run on several samples, and what is known of its discrete sites.

    Attributes:
        guide: How the guide is run.
        model: How the model is run.
        summed: Sites that the guide leaves out, to be summed over.
        marked: Sites that the guide marks to be enumerated.
        dropped: Observations that were not made and of which nothing depends.
        plates: Names of the plates, whose values are indices.
    """

    guide: Manner
    model: Manner
    summed: frozenset[str] = frozenset()
    marked: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    plates: frozenset[str] = frozenset()

    def enumerates(self, guide: bool) -> bool:
        """Whether a run differs from one in which every site is drawn and counted."""
        return bool(self.summed or self.dropped or (guide and self.marked))

    @property
    def side_by_side(self) -> bool:
        """Whether both halves run on several samples in a plate."""
        return all(isinstance(manner, SideBySide) for manner in (self.guide, self.model))


def manners_of(call: Call, num_samples: int = 2) -> Manners:
    """How a pair is run on several samples: a property of the programs and the form of their arguments, found once."""
    kept, form = _kept(call)
    if form not in kept:
        kept[form] = _found(call, num_samples if num_samples <= _FEW else 2)
    return kept[form]


def remembered(call: Call) -> Manners | None:
    """How a pair is run on several samples, where that has been found before."""
    kept, form = _kept(call)
    return kept.get(form)


def remember_as(part: Call, whole: Call) -> None:
    """Take over what is known of a pair for one whose guide differs from its in the rows alone."""
    with suppress(TypeError):
        _known.setdefault(_owner(part.model), WeakKeyDictionary())[_owner(part.guide)] = _kept(whole)[0]


def _kept(call: Call) -> tuple[dict[Hashable, Any], Hashable]:
    owners = _owner(call.model), _owner(call.guide)
    try:
        form = _form(call)
        hash(form)
        guides = _known.get(owners[0])
        if guides is None:
            guides = _known[owners[0]] = WeakKeyDictionary()
        return guides.setdefault(owners[1], {}), form
    except TypeError:  # no weak references to it, or no hash: then it is found each time
        return {}, None


def check_once(call: Call, check: Callable[[], None]) -> None:
    """Run a check of a pair and the form of its arguments unless it has passed before."""
    kept, form = _kept(call)
    if (check.__name__, form) not in kept:
        check()
        kept[check.__name__, form] = True


def warn_once(program: Any, error: Exception | None, manner: str) -> None:
    """Warn, once for each program, that samples cannot be drawn side by side."""
    owner = _owner(program)
    try:
        if owner in _warned:
            return
        _warned.add(owner)
    except TypeError:
        pass
    reason = "" if error is None else f" ({first_line(error, named=False)})"
    warnings.warn(
        f"{getattr(program, '__qualname__', type(program).__name__)} does not run on several samples side by side"
        f"{reason}: they are evaluated {manner}, which is slower; a program written for any leading dimensions is not",
        stacklevel=2,
    )


def _found(call: Call, num_samples: int) -> Manners:
    # A trial is no part of the computation, so it must not enter the graph of a make_fx trace either.
    with random_state(None), torch.no_grad(), disable_proxy_modes_tracing():
        first = call.run_drawn()
        assert call.guide is not None
        guide, drawn = _fastest(call, call.guide, first, dict(first.subsamples), num_samples)
        latents = {name: site.value for name, site in drawn.drawn.items()}
        model, _ = _fastest(call, call.model, first, latents | dict(first.subsamples), num_samples)
        dropped = _dropped(call, first)
        return Manners(guide, model, first.left_out - dropped, first.marked, dropped, frozenset(first.subsamples))


def _dropped(call: Call, first: Draw) -> frozenset[str]:
    """The observations that were not made and of which nothing depends.

    Raises:
        ValueError: If something depends on one that the guide leaves out.
    """
    sites, left_out = first.model_sites, first.left_out
    dropped = without_children(unobserved(sites) & left_out, sites, call, first.subsamples)
    if rest := {name for name in left_out - dropped if not is_summable(sites[name])}:
        raise ValueError(f"expected the guide to sample {sorted(rest)}, on which other sites of the model depend")
    return dropped


def _fastest(
    call: Call, program: Program, first: Draw, values: dict[str, Tensor], num_samples: int
) -> tuple[Manner, RecordSites]:
    """The fastest manner that suits one half, with a run in it."""
    error: Exception | None = None
    for manner, told in candidates(call, first):
        try:
            with isolated():
                run = manner.run(call, program, values, num_samples)
                if not isinstance(manner, OneByOne):
                    # At values as they are: a transform that has just made one knows its inverse better.
                    drawn = {name: site.value.clone() for name, site in run.drawn.items() if not is_delta(site.fn)}
                    scored = manner.run(call, program, values | drawn, num_samples) if drawn else run
                    _compare(call, program, first, scored, values, num_samples)
        except FAILURES as failure:
            error = error or failure
            continue
        if told and call.broadcast:
            warn_once(call.model, error, told)
        return manner, run
    assert error is not None
    raise error


def candidates(call: Call, first: Draw) -> Iterator[tuple[Manner, str]]:
    """The manners from the fastest to the safest, each with how it is told of."""
    depth, plates = first.layout.depth, frozenset(first.subsamples)
    if call.broadcast:
        yield SideBySide(depth), ""
        rows = None if call.whole else _row_arguments(call, first)
        if rows is not None:
            yield AsRows(depth, first.layout.dim, rows, plates, first.layout.plate), "as further rows of the data"
        yield Mapped(depth, plates), "by torch.func.vmap, or one by one where they are drawn"
    yield OneByOne(depth, plates), "one by one"


def _row_arguments(call: Call, first: Draw) -> frozenset[int | str] | None:
    try:
        return with_known_rows(call, first).row_arguments
    except FAILURES:
        return None


def _compare(
    call: Call, program: Program, first: Draw, run: RecordSites, values: dict[str, Tensor], num_samples: int
) -> None:
    """Compare samples with a run of each by itself, where that is determined.

    Raises:
        ValueError: If they differ.
    """
    if maybe_current_level() is not None:  # inside vmap, where no value can be read
        return
    drawn = {name: site.value for name, site in run.drawn.items() if not is_delta(site.fn)}
    given = {n: v for n, v in values.items() if n in first.subsamples} | run.subsamples
    try:
        with refuse_batch_dependence(*call.programs):
            alone = _alone(call, program, first, given, drawn, num_samples)
    except (ValueError, NotImplementedError):  # in training a batch, or dropout, decides; or there is no density
        return
    try:
        check_equal(_total(first, run, num_samples), alone)
    except ValueError:
        again = _alone(call, program, first, given, drawn, num_samples)
        if torch.equal(alone.nan_to_num(), again.nan_to_num()):  # else it is random beyond its sites
            raise


def _alone(
    call: Call, program: Program, first: Draw, given: dict[str, Tensor], drawn: dict[str, Tensor], num_samples: int
) -> Tensor:
    """The sum of all terms of a half at each of several samples by itself, (S, N)."""
    samples = [{name: value[s] for name, value in drawn.items()} for s in range(num_samples)]
    singles = [Single().run(call, program, given | sample, 1) for sample in samples]
    return torch.cat([_total(first, single, 1) for single in singles])


def _total(first: Draw, run: RecordSites, num_samples: int) -> Tensor:
    """The sum of all terms of a half, (S, N)."""
    return Draw(first.layout, num_samples, run.sites, {}, run.subsamples, first.call).log_joint


def check_equal(together: Tensor, alone: Tensor) -> None:
    """Refuse densities of samples together that are not those of each sample by itself.

    Raises:
        ValueError: If so.
    """
    tolerance = 1e-6 if together.dtype == torch.float64 else 1e-3
    if not torch.allclose(together, alone, tolerance, tolerance, equal_nan=True):
        raise ValueError("a sample's density depends on the samples beside it")


def _owner(program: Any) -> Any:
    """What lives as long as a program: a bound method is a new object at each look-up."""
    return program.__self__ if isinstance(program, types.MethodType) else program


def _form(call: Call) -> Hashable:
    functions = [p.__func__ if isinstance(p, types.MethodType) else None for p in call.programs]
    options = (call.plate, call.whole, call.broadcast, *functions)
    if not call.kwargs and all(type(argument) is Tensor for argument in call.args):  # the common case
        return (options, *[argument.dim() for argument in call.args])
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    return (options, str(spec), *((leaf.dim(),) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves))
