"""The two effect handlers under which every pair is run, and their order.

Order, from the outside in: ``block`` (nothing leaks), :class:`LocalParams`, :class:`RecordSites`, the particle
plate, the model or guide.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution, MaskedDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import constraints

from inference.core.threads import one_at_a_time
from inference.pair.improper import is_delta, is_masked_out, refuse_improper


class LocalParams(Messenger):
    """Answers every param statement that carries an ``nn.Parameter`` with that very parameter.

    ``pyro.module("decoder", net)`` looks the name up in a global store, where an earlier network of that name may
    sit: the second one then never trains. Under this handler a network's parameters are its own.

    """

    _depth = 0

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, Tensor] = {}

    @property
    def seen(self) -> list[Tensor]:
        """The unconstrained tensor of every param statement so far, once each."""
        return list(self._seen.values())

    @classmethod
    def active(cls) -> bool:
        """Whether such a handler is on the stack."""
        return LocalParams._depth > 0

    def __enter__(self) -> LocalParams:
        super().__enter__()
        LocalParams._depth += 1
        return self

    def __exit__(self, *exc: Any) -> None:
        LocalParams._depth -= 1
        super().__exit__(*exc)

    def _pyro_param(self, msg: Any) -> None:
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        # A constrained parameter is another tensor than the network's, which only the store can keep.
        if isinstance(given, nn.Parameter) and msg["kwargs"].get("constraint", constraints.real) is constraints.real:
            msg["value"], msg["done"] = given, True

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        value = value.unconstrained() if hasattr(value, "unconstrained") else value
        self._seen[id(value)] = value


@contextmanager
def local_params() -> Iterator[LocalParams]:
    """Run pairs on their own parameters, whatever Pyro's store holds under their names.

    Param statements are answered by :class:`LocalParams`. A PyroParam of a PyroModule reads the store behind every
    handler's back, so what modules left there is hidden for the while; what functions name by ``pyro.param`` is shared.
    """
    with one_at_a_time():
        yield from _local_params()


def _local_params() -> Iterator[LocalParams]:
    store = pyro.get_param_store()
    state = store.get_state()
    inner = _without_modules(state)
    try:
        with store.scope(inner), LocalParams() as handler:
            yield handler
    finally:
        store.set_state({key: _new(_without_modules(inner)[key], state[key]) for key in inner})
        for value in state["params"].values():  # reading the store's state took away what SVI goes by
            value.unconstrained = weakref.ref(value)


def _without_modules(state: Any) -> dict[str, dict[str, Any]]:
    """A state of Pyro's store without what modules put there, which are nn.Parameters."""
    names = [name for name, value in state["params"].items() if not isinstance(value, nn.Parameter)]
    return {key: {name: value[name] for name in names} for key, value in state.items()}


def _new(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if name not in before}


@contextmanager
def isolated(*, expose_params: bool = False) -> Iterator[None]:
    """Run a pair so that none of its sites reaches a handler outside.

    With ``expose_params``, and only inside an enclosing handler, param statements pass through: that is how
    :class:`pyro.infer.SVI` finds the parameters to train. Everywhere else parameters are local.
    """
    with one_at_a_time():
        if expose_params and am_i_wrapped():
            with poutine.block(expose_types=["param"]):
                yield
        else:
            with poutine.block(), local_params():
                yield


class Site(NamedTuple):
    """Record of one sample statement of a run.

    Attributes:
        fn: The distribution, expanded to the plates around it.
        value: The value, of shape batch + event.
        frames: The plates around the site, outermost first.
        scale: Product of all scales, the plates' and ``poutine.scale``'s.
        mask: ``poutine.mask``'s, or None.
        is_observed: Whether the value was given.
        is_auxiliary: Whether a guide drew it to make a latent of it, as AutoGuides do.
        enumerated: Dimensions left of all plates that run over the values of discrete sites, with a number for each.
        is_summed: Whether it has all its values side by side, to be summed over.
        is_marked: Whether its program asks for that.
        name: Its name.
        is_intervened: Whether ``poutine.do`` hands another value on, so that nothing depends on this one.
    """

    fn: Distribution
    value: Tensor
    frames: tuple[CondIndepStackFrame, ...]
    scale: float | Tensor
    mask: bool | Tensor | None
    is_observed: bool
    is_auxiliary: bool = False
    enumerated: Mapping[int, int] = MappingProxyType({})
    is_summed: bool = False
    is_marked: bool = False
    name: str = ""
    is_intervened: bool = False


class RecordSites(Messenger):
    """Records every sample site of a run in order, and sets the values of those that are given.

    Args:
        values: Values by site name; a subsampling plate's indices count as the value at the plate's name.
        given: Sites of the run that the values come from, where discrete ones are enumerated.
        double: Turn what is drawn into float64, also from distributions that were made in float32.

    Attributes:
        sites: Sample sites in trace order.
        subsamples: The indices that each plate chose.
        deterministic: Values that the program records by ``pyro.deterministic``, which have no density.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor] | None = None,
        given: Mapping[str, Site] = MappingProxyType({}),
        *,
        double: bool = False,
    ) -> None:
        super().__init__()
        self.double = double
        self.values, self.given = {} if values is None else values, given
        self.sites: dict[str, Site] = {}
        self.subsamples: dict[str, Tensor] = {}
        self.deterministic: dict[str, Tensor] = {}

    @property
    def drawn(self) -> dict[str, Site]:
        """The sites whose values were not given by the program."""
        return {name: site for name, site in self.sites.items() if not site.is_observed}

    def _pyro_sample(self, msg: Any) -> None:
        _refuse_set(msg)
        if _is_deterministic(msg) and not msg["is_observed"]:
            msg["value"], msg["done"] = msg["infer"]["obs"], True  # what poutine.uncondition took away
        elif not msg["is_observed"] and msg["name"] in self.values:
            if is_delta(msg["fn"]):
                raise ValueError(
                    f"expected a density at any value of site {msg['name']!r}, got a Delta at its own draw"
                )
            value, event = self.values[msg["name"]], getattr(msg["fn"], "event_shape", ())
            value = stripped(value, len(getattr(msg["fn"], "batch_shape", value.shape)) + len(event))
            if event and value.shape[value.dim() - len(event) :] != event:
                raise ValueError(
                    f"expected a value of event shape {tuple(event)} at the model's site {msg['name']!r}, got the "
                    f"guide's of shape {tuple(value.shape)}"
                )
            msg["value"], msg["done"] = value, True
            if msg["name"] in self.given:
                msg["infer"]["_dim_to_id"] = dict(self.given[msg["name"]].enumerated)
        elif not msg["is_observed"]:
            _refuse_torch(msg)
            refuse_improper(msg["name"], msg["fn"])  # which cannot be drawn from

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            self.subsamples[name] = msg["value"]
            return
        if _is_deterministic(msg):
            self.deterministic[name] = msg["value"]
            return
        if self.double and not msg["is_observed"] and msg["value"].is_floating_point():
            msg["value"] = msg["value"].double()
        if name in self.sites:
            raise ValueError(f"expected every sample site to have a name of its own, got {name!r} twice")
        infer, frames, source = msg["infer"], msg["cond_indep_stack"], self.given.get(name)
        summed = "_enumerate_dim" in infer or (source is not None and source.is_summed)
        self.sites[name] = Site(
            fn,
            msg["value"],
            frames,
            msg["scale"],
            msg["mask"],
            msg["is_observed"],
            bool(infer.get("is_auxiliary")),
            infer.get("_dim_to_id", {}),
            summed,
            infer.get("enumerate") == "parallel",
            name,
            msg.get("_intervener_id") is not None,
        )


def _is_deterministic(msg: Any) -> bool:
    """Whether a statement records a value without a density: by ``pyro.deterministic``, or as a Reparam's old site."""
    given = msg["is_observed"] or msg["infer"].get("was_observed", False)
    return bool(msg["infer"].get("_deterministic")) or (given and is_delta(msg["fn"]) and is_masked_out(msg["fn"]))


def _refuse_torch(msg: Any) -> None:
    """Refuse to draw from a distribution of torch's own, which is no Pyro distribution.

    Raises:
        TypeError: If it is one; the message names the site.
    """
    if isinstance(msg["fn"], torch.distributions.Distribution) and not callable(msg["fn"]):
        raise TypeError(
            f"expected a distribution of pyro.distributions at site {msg['name']!r}, got torch's own "
            f"{type(msg['fn']).__name__}"
        )


def _refuse_set(msg: Any) -> None:
    """Refuse a latent whose value a handler around its program sets, so that neither prior nor guide draws it.

    Raises:
        ValueError: If so; the message names the site.
    """
    free = msg["is_observed"] or isinstance(msg["fn"], _Subsample) or "_enumerate_dim" in msg["infer"]
    if msg["done"] and not free:
        raise ValueError(
            f"expected site {msg['name']!r} to be drawn or observed, got a value that a handler around the program "
            "sets, such as poutine.replay or infer_discrete: use pyro.condition for a value that is known"
        )


def check_same_sites(first: Collection[str], others: Collection[str]) -> None:
    """Refuse a program whose runs have different sites, by name.

    Raises:
        ValueError: If they have; the message names one.
    """
    if first == others:
        return
    name = min(set(first) ^ set(others))
    raise ValueError(
        f"expected the same sample sites in every run, got {name!r} in some alone: a site in a branch on a latent has "
        "no density where it is not made; sample it always, and use it in the branch"
    )


def stripped(value: Tensor, dims: int) -> Tensor:
    """A value of so many dimensions: without those of size one on the left by which it has more."""
    excess = value.dim() - dims
    return value.reshape(value.shape[excess:]) if excess > 0 and value.shape[:excess].numel() == 1 else value


def masked_log_prob(site: Site) -> Tensor:
    """Log-probability of a site's value, unscaled, with the mask applied; shape of the site's batch.

    Of a discrete site that is summed over, the mask is left out: so it counts for nothing, as its sum is one, where a
    density of one at each value would count their number.
    """
    if site.is_summed:
        fn = site.fn
        while isinstance(fn, MaskedDistribution):
            fn = fn.base_dist
        return _log_prob(fn, site.value)
    try:
        return apply_mask(_log_prob(site.fn, site.value), site.mask)
    except ValueError as error:  # torch's, which knows no site
        what = "data" if site.is_observed else "a latent"
        raise ValueError(f"expected {what} at site {site.name!r} in its distribution's support: {error}") from error


def _log_prob(fn: Any, value: Tensor) -> Tensor:
    """Log-probability of a value, in the precision of the distribution's parameters.

    Of integers torch computes the log-gamma function in its default dtype, whatever that of the parameters: a count of
    three million would be wrong by a nat.
    """
    term: Tensor = fn.log_prob(value)
    if term.dtype != torch.float64 or value.is_floating_point() or not _is_of_libraries(fn):
        return term
    exact: Tensor = fn.log_prob(value.double())
    return exact


def _is_of_libraries(fn: Any) -> bool:
    """Whether a distribution is torch's or Pyro's, which take counts as floating-point numbers, too."""
    while fn is not None:
        if not type(fn).__module__.startswith(("torch.distributions.", "pyro.distributions.")):
            return False
        fn = getattr(fn, "base_dist", None)
    return True


def apply_mask(term: Tensor, mask: bool | Tensor | None) -> Tensor:
    """``term`` where ``mask`` holds, zero elsewhere."""
    if mask is None or mask is True:
        return term
    if mask is False:
        return torch.zeros_like(term)
    return torch.where(mask, term, term.new_zeros(()))
