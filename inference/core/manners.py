"""Which manner of running several samples suits a pair: found by trial, checked against single runs, kept."""

from __future__ import annotations

import types
import warnings
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._pytree import tree_flatten

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.draw import Draw
from inference.core.rows import with_known_rows
from inference.core.samples import AsRows, Manner, OneByOne, SideBySide
from inference.core.seeding import random_state

if TYPE_CHECKING:
    from inference.core.call import Call

# What a program may raise on samples that it cannot take.
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AssertionError)

# Kept while both programs live.
_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Hashable, Manner]]] = WeakKeyDictionary()
_warned: WeakSet[Any] = WeakSet()


def manner_of(call: Call) -> Manner:
    """How a pair is run on several samples: a property of the programs and the form of their arguments, found once."""
    owners = _owner(call.model), _owner(call.guide)
    try:
        form = _form(call)
        known = _known.setdefault(owners[0], WeakKeyDictionary()).setdefault(owners[1], {})
        if form in known:
            return known[form]
    except TypeError:  # no weak references to it, or no hash: then it is found each time
        form, known = None, {}
    known[form] = _found(call)
    return known[form]


def warn_once(program: Any, error: Exception | None, manner: str) -> None:
    """Warn, once for each program, that samples cannot be drawn side by side."""
    owner = _owner(program)
    try:
        if owner in _warned:
            return
        _warned.add(owner)
    except TypeError:
        pass
    reason = "" if error is None else f" ({str(error).splitlines()[0][:200]})"
    warnings.warn(
        f"the pair does not run on several samples side by side{reason}: they are evaluated {manner}, which is slower. "
        "A decoder that reshapes by view(-1, ...) or mixes batch dimensions can be written for any leading dimensions",
        stacklevel=2,
    )


def _found(call: Call) -> Manner:
    error: Exception | None = None
    # A trial is no part of the computation, so it must not enter the graph of a make_fx trace either.
    with random_state(None), torch.no_grad(), disable_proxy_modes_tracing():
        first = call.run()
        for manner, told in _candidates(call, first):
            try:
                _try(manner, call, first)
            except FAILURES as failure:
                error = error or failure
                continue
            if told and call.broadcast:
                warn_once(call.model, error, told)
            return manner
    assert error is not None
    raise error


def _candidates(call: Call, first: Draw) -> Iterator[tuple[Manner, str]]:
    """The manners from the fastest to the safest, each with how it is told of."""
    depth, plates = first.layout.depth, frozenset(first.subsamples)
    if call.broadcast:
        yield SideBySide(depth), ""
        if not call.whole:
            try:
                rows = with_known_rows(call, first).row_arguments
            except FAILURES:
                rows = None
            if rows is not None:
                yield AsRows(depth, first.layout.dim, rows, plates), "as further rows of the data"
    yield OneByOne(depth, plates), "one by one"


def _try(manner: Manner, call: Call, first: Draw) -> None:
    """Run two samples, and where that is determined compare each with a run by itself.

    Raises:
        ValueError: If they differ; or what the programs raise.
    """
    pair = call.run(2, values=first.subsamples, manner=manner)
    if isinstance(manner, OneByOne) or is_batchedtensor(pair.elbo_terms):
        return
    try:
        with refuse_batch_dependence(*call.programs):
            single = [_alone(call, pair, s) for s in range(2)]
    except ValueError:  # in training a batch, or dropout, decides
        return
    check_equal(pair.log_joint, torch.cat([run.log_joint for run in single]))
    check_equal(pair.log_guide, torch.cat([run.log_guide for run in single]))


def _alone(call: Call, pair: Draw, sample: int) -> Draw:
    values = {name: value[sample] for name, value in pair.guide_values.items()}
    return call.run(values=values | dict(pair.subsamples))


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
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    functions = [getattr(program, "__func__", None) for program in call.programs]
    options = (call.plate, call.whole, call.broadcast, *functions)
    return (options, str(spec), *((leaf.dim(),) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves))


