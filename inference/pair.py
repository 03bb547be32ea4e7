"""One run of a model/guide pair: the guide draws, the model scores, and every term is reduced to one per datum.

A pair is a Pyro model and a Pyro guide, functions or modules of one call signature, in which every sample site of
both halves stands in one common vectorised plate over the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from inference.messengers import RecordSites, Site, isolated, masked_log_prob
from inference.protocols import SupportsFreeze
from inference.seeding import random_state

Program = Callable[..., Any]

DATA_PLATE = "data"
_PARTICLES = "_particles"


@dataclass(frozen=True)
class Layout:
    """Where a pair keeps its data: plate name, dimension and sizes, and how deep its plates go.

    Attributes:
        plate: Name of the plate over the data.
        dim: Its dimension, negative.
        num_data: Data in this call, N.
        plate_scale: Full size of the plate over its size here; 1 unless the pair subsamples.
        depth: Number of batch dimensions that the pair uses.
        numel: Elements per datum of the largest site: what one more particle costs.
    """

    plate: str
    dim: int
    num_data: int
    plate_scale: float
    depth: int
    numel: int

    def particles(self, num_samples: int) -> Any:
        """The plate that draws samples side by side, left of all of the pair's own."""
        return pyro.plate(_PARTICLES, num_samples, dim=-self.depth - 1)

    def per_datum(self, term: Tensor, num_samples: int) -> Tensor:
        """Sum a term of a site's batch shape over everything but samples and data: shape (S, N)."""
        missing = self.depth + 1 - term.dim()
        if missing:
            term = term.reshape((1,) * missing + term.shape)
        others = [d for d in range(-self.depth, 0) if d != self.dim]
        if others:
            term = term.sum(others)
        return term.expand(num_samples, self.num_data)


@dataclass(frozen=True)
class Draw:
    """Samples of a guide and what both halves of the pair say of them.

    Attributes:
        layout: The pair's plates.
        num_samples: S.
        model_sites: Sites of the model in trace order, the latent ones first drawn by the guide.
        guide_sites: Sites of the guide in trace order.
        subsamples: The indices that each plate chose; those of a further run may be fixed to them.
    """

    layout: Layout
    num_samples: int
    model_sites: Mapping[str, Site]
    guide_sites: Mapping[str, Site]
    subsamples: Mapping[str, Tensor]

    def term(self, site: Site, value: Tensor) -> Tensor:
        """A per-site quantity as (S, N), times the site's own ``poutine.scale`` without the data plate's."""
        scale = self.extra_scale(site)
        if isinstance(scale, Tensor) or scale != 1.0:
            value = value * scale
        return self.layout.per_datum(value, self.num_samples)

    def extra_scale(self, site: Site) -> float | Tensor:
        """The site's scale beyond the data plate's."""
        return site.scale / self.layout.plate_scale

    def total(self, sites: Mapping[str, Site], *, observed: bool | None = None) -> Tensor:
        """Sum of the log-probabilities of sites, (S, N) in nats: all of them, the observed or the latent ones."""
        chosen = [s for s in sites.values() if observed is None or s.is_observed == observed]
        terms = [self.term(site, masked_log_prob(site)) for site in chosen]
        if not terms:
            like = next(iter(sites.values())).value
            return like.new_zeros(self.num_samples, self.layout.num_data)
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    @property
    def elbo_terms(self) -> Tensor:
        """log p(x, z) - log q(z | x) with every ``poutine.scale`` honoured, (S, N) in nats."""
        return self.total(self.model_sites) - self.total(self.guide_sites)

    @cached_property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), (S, N) in nats.

        Raises:
            ValueError: If a site is scaled beyond the data plate: exp of a scaled term is no importance weight.
        """
        self.refuse_scales()
        return self.elbo_terms

    def refuse_scales(self) -> None:
        """Refuse sites that are scaled beyond the data plate.

        Raises:
            ValueError: With the site's name and factor.
        """
        for name, site in [*self.model_sites.items(), *self.guide_sites.items()]:
            if not _is_one(self.extra_scale(site)):
                raise ValueError(
                    f"expected site {name!r} to carry no scale but the plate's for a log-density, "
                    f"got poutine.scale or a subsampled inner plate with factor {self.extra_scale(site)}"
                )

    @property
    def latents(self) -> dict[str, Tensor]:
        """Values of the latent sites, in trace order of the guide."""
        return {name: site.value for name, site in self.guide_sites.items() if not site.is_observed}


def run_pair(
    model: Program,
    guide: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 1,
    plate: str | None = None,
    subsamples: Mapping[str, Tensor] | None = None,
    expose_params: bool = False,
) -> Draw:
    """Draw latents from the guide and replay the model on them.

    One sample runs without a particle plate, so that a pair which cannot broadcast still runs.

    Args:
        model: Pyro model.
        guide: Pyro guide of the same call signature.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_samples: S, samples per datum, drawn side by side.
        plate: Name of the plate over the data; ``"data"`` if None.
        subsamples: Indices of subsampling plates from another run, to keep; None lets them choose. Values of latent
            sites may stand among them: the guide then scores those instead of drawing its own.
        expose_params: Let param statements through to an enclosing handler.

    Raises:
        ValueError: If the two halves are no pair in the sense of this module; the message names the site.
    """
    kwargs = {} if kwargs is None else kwargs
    depth = None
    if num_samples > 1:
        depth = _particle_depth(model, guide, args, kwargs, plate)
    with isolated(expose_params=expose_params):
        guide_run = run_program(guide, args, kwargs, subsamples, num_samples, depth)
        values = (
            dict(subsamples or {})
            | {n: s.value for n, s in guide_run.sites.items() if not s.is_observed}
            | guide_run.subsamples
        )
        model_run = run_program(model, args, kwargs, values, num_samples, depth)
    layout = _check_pair(model_run.sites, guide_run.sites, plate)
    return Draw(layout, num_samples, model_run.sites, guide_run.sites, guide_run.subsamples | model_run.subsamples)


def run_guide(
    guide: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    expose_params: bool = False,
) -> dict[str, Site]:
    """Latent sites of one run of a guide alone, in trace order."""
    with isolated(expose_params=expose_params):
        run = run_program(guide, args, {} if kwargs is None else kwargs, None, 1, None)
    return {name: site for name, site in run.sites.items() if not site.is_observed}


def _batch_law(module: nn.Module) -> str:
    """Why a module is not yet what it was trained to be for one datum by itself, with the cure; empty where it is."""
    if isinstance(module, SupportsFreeze) and not module.frozen:
        return "not frozen: call .freeze() first"
    if isinstance(module, SupportsFreeze | _BatchNorm | _DropoutNd) and module.training:
        return "in train mode: call .eval() first"
    return ""


@contextmanager
def refuse_batch_laws(*programs: Program) -> Iterator[None]:
    """Refuse, while the block runs, modules that depend on the rest of the batch, and dropout in train mode.

    Args:
        *programs: Where to look for the module's name.

    Raises:
        ValueError: When batch normalisation or dropout in train mode, or an unfrozen law of the batch, runs.
    """

    def refuse(module: nn.Module, _: Any) -> None:
        if state := _batch_law(module):
            owners = [
                f"{type(program).__name__}, {name!r}"
                for program in programs
                if isinstance(program, nn.Module)
                for name, part in program.named_modules()
                if part is module
            ]
            kind = "batch normalisation" if isinstance(module, _BatchNorm) else type(module).__name__
            raise ValueError(
                f"expected modules as they are after training, got {kind} in {owners[0] if owners else module} {state}"
            )

    # A hook on every module that runs, because a network may hide inside a function.
    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def run_program(
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None,
    num_samples: int,
    depth: int | None,
) -> RecordSites:
    """Run one half of a pair and record its sites; call it inside :func:`inference.messengers.isolated`.

    Args:
        program: Pyro model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values to dictate, see :class:`inference.messengers.RecordSites`.
        num_samples: S, samples side by side.
        depth: Batch dimensions of the pair, left of which the samples go; None runs without a particle plate.
    """
    with RecordSites(values) as run:
        if depth is None:
            program(*args, **kwargs)
        else:
            with pyro.plate(_PARTICLES, num_samples, dim=-depth - 1):
                program(*args, **kwargs)
    run.subsamples.pop(_PARTICLES, None)
    return run


# How deep a pair's plates go is a property of the two programs and the form of their arguments: found once, by one
# run, and kept while both programs live.
_depths: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, int]]] = WeakKeyDictionary()


def _particle_depth(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], plate: str | None
) -> int:
    try:
        form = (plate, *map(_form, args), *((name, _form(value)) for name, value in kwargs.items()))
        known = _depths.setdefault(model, WeakKeyDictionary()).setdefault(guide, {})
        if form in known:
            return known[form]
    except TypeError:  # no weak references to it, or no hash: then it is found each time
        form, known = None, {}
    known[form] = probe(model, guide, args, kwargs, plate=plate).layout.depth
    return known[form]


def _form(value: Any) -> Any:
    return (value.dim(),) if isinstance(value, Tensor) else (type(value), value)


def probe(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    plate: str | None = None,
) -> Draw:
    """One run of one sample without gradient that leaves the random state as it was.

    Raises:
        ValueError: As :func:`run_pair`.
    """
    # A probe is no part of the computation, so it must not enter the graph of a make_fx trace either.
    with random_state(None), torch.no_grad(), disable_proxy_modes_tracing():
        return run_pair(model, guide, args, kwargs, plate=plate)


def _check_pair(model: Mapping[str, Site], guide: Mapping[str, Site], plate: str | None) -> Layout:
    latents = [name for name, site in model.items() if not site.is_observed]
    drawn = [name for name, site in guide.items() if not site.is_observed]
    if not latents:
        raise ValueError(f"expected a model with a latent site, got only observed sites {list(model)}")
    if set(latents) != set(drawn):
        extra = [name for name in drawn if name not in latents]
        cause = f" (an AutoGuide's auxiliary {extra}? train it by pyro.infer.SVI)" if extra else ""
        raise ValueError(
            f"expected the guide to sample the model's latent sites {sorted(latents)}, got {sorted(drawn)}{cause}"
        )
    for name in drawn:
        if _is_delta(guide[name].fn):
            raise ValueError(f"expected a density at guide site {name!r}, got a Delta")
    return layout_of(model, guide, DATA_PLATE if plate is None else plate)


def layout_of(model: Mapping[str, Site], guide: Mapping[str, Site], plate: str) -> Layout:
    """The layout of the recorded sites of a pair, or of a model alone where the guide has none.

    Raises:
        ValueError: If a site stands outside the data plate, or the plate differs between sites.
    """
    found: set[tuple[int | None, int, float]] = set()
    depth, numel, num_data = 0, 1, 1
    for half, sites in (("model", model), ("guide", guide)):
        for name, site in sites.items():
            frames = [f for f in site.frames if f.name != _PARTICLES]
            data = next((f for f in frames if f.name == plate), None)
            if data is None or data.dim is None or data.size < 1:
                raise ValueError(
                    f"expected every sample site inside one vectorised plate {plate!r} over the data (another name "
                    f"goes by plate=...), got {half} site {name!r} in plates {[f.name for f in frames]}"
                )
            full = data.size if data.full_size is None else data.full_size
            found.add((data.dim, data.size, full / data.size))
            depth = max(depth, *(-f.dim for f in frames if f.dim is not None))
            particles = math.prod(f.size for f in site.frames if f.name == _PARTICLES)
            numel, num_data = max(numel, site.value.numel() // (data.size * particles)), data.size
    if len(found) != 1:
        raise ValueError(
            f"expected plate {plate!r} to have one dimension and size in model and guide, got (dim, size, scale) "
            f"{sorted(found, key=str)}"
        )
    dim, size, scale = found.pop()
    assert dim is not None
    assert size == num_data
    return Layout(plate, dim, size, scale, depth, numel)


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _is_one(scale: float | Tensor) -> bool:
    return bool(torch.all(scale == 1)) if isinstance(scale, Tensor) else math.isclose(scale, 1.0)
