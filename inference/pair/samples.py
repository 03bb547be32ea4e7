"""How a program is run on several samples at once: side by side, as further rows, mapped over them, or one by one.

Whatever the manner, the recorded sites look as if samples had been drawn side by side: values, distributions, masks
and scales have the samples left of all plates. So nothing that reads a run needs to know how it came about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyro
import torch
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import constraints, kl_divergence, register_kl

from inference.pair.draw import DATA_PLATE, PARTICLES
from inference.pair.handlers import RecordSites, Site, check_same_sites, masked_log_prob, stripped
from inference.pair.improper import layers
from inference.pair.run import Program, run_program

if TYPE_CHECKING:
    from inference.pair.call import Call

Values = Mapping[str, Tensor]


class Manner(Protocol):
    """A way of running one half of a call on several samples; called inside ``isolated``."""

    @property
    def depth(self) -> int:
        """Batch dimensions of the pair, of which one sample alone need not know."""
        ...

    def run(self, call: Call, program: Program, values: Values | None, num_samples: int) -> RecordSites:
        """The sites of one half, with samples left of all plates where there are several."""
        ...


@dataclass(frozen=True)
class Single:
    """One sample, without a plate for it: the program sees what its author saw."""

    depth: int = 0

    def run(self, call: Call, program: Program, values: Values | None, num_samples: int) -> RecordSites:
        """See :class:`Manner`."""
        assert num_samples == 1
        return run_program(program, call.args, call.kwargs, values, 1, None)


@dataclass(frozen=True)
class SideBySide:
    """Samples in a plate of their own, left of all of the pair's.

    Attributes:
        depth: Batch dimensions of the pair.
    """

    depth: int

    def run(self, call: Call, program: Program, values: Values | None, num_samples: int) -> RecordSites:
        """See :class:`Manner`."""
        return run_program(program, call.args, call.kwargs, values, num_samples, self.depth)


@dataclass(frozen=True)
class AsRows:
    """Samples as further rows of the data: for programs that know no batch dimension but that of their rows.

    Attributes:
        depth: Batch dimensions of the pair.
        dim: Dimension of the plate over the data.
        row_arguments: Which arguments are rows, see :func:`inference.pair.rows.with_known_rows`.
        plates: Names of the plates, whose values are indices.
        plate: Name of the plate over the data, whose indices are those of other rows then.
    """

    depth: int
    dim: int
    row_arguments: frozenset[int | str]
    plates: frozenset[str]
    plate: str = DATA_PLATE

    def run(self, call: Call, program: Program, values: Values | None, num_samples: int) -> RecordSites:
        """See :class:`Manner`."""
        number = call.count_rows(self.row_arguments)
        repeated = call.with_rows(self.row_arguments).rows(torch.arange(number).repeat(num_samples), number)
        half = repeated.guide if program is call.guide else program
        assert half is not None
        kept = {n: v for n, v in (values or {}).items() if n != self.plate}
        given = {n: v if n in self.plates else self.join(v) for n, v in kept.items()}
        run = run_program(half, repeated.args, repeated.kwargs, given, 1, None)
        result, frame = RecordSites(), _particle_frame(self.depth, num_samples)
        for name, site in run.sites.items():
            result.sites[name] = self._site(site, num_samples, number, frame)
        result.subsamples.update({n: i for n, i in run.subsamples.items() if n != self.plate})
        for name, value in run.deterministic.items():
            fits = value.dim() > 0 and value.shape[0] == num_samples * number
            result.deterministic[name] = value.unflatten(0, (num_samples, number)) if fits else value
        return result

    def join(self, value: Tensor) -> Tensor:
        """A value with S samples on the left as one of S N rows."""
        at = self.depth + self.dim
        return value.movedim(0, at).flatten(at, at + 1) if value.dim() > self.depth else value

    def split(self, value: Tensor, batch: int, num_samples: int) -> Tensor:
        """A value of S N rows, with so many batch dimensions, as one with S samples on the left."""
        value, at = _padded(value, batch, self.depth), self.depth + self.dim
        if value.shape[at] == 1:
            return value.unsqueeze(0)
        return value.unflatten(at, (num_samples, -1)).movedim(at, 0)

    def _site(self, site: Site, num_samples: int, number: int, particles: CondIndepStackFrame) -> Site:
        batch = len(site.fn.batch_shape)

        def split(value: Any) -> Any:
            return self.split(value, value.dim(), num_samples) if isinstance(value, Tensor) else value

        frames = tuple(
            frame._replace(size=number, full_size=number) if frame.dim == self.dim else frame for frame in site.frames
        )
        fn = _Rearranged([site.fn], lambda v: [self.join(v)], lambda terms: self.split(terms[0], batch, num_samples))
        return site._replace(
            fn=fn,
            value=self.split(site.value, batch, num_samples),
            frames=(particles, *frames),
            scale=split(site.scale),
            mask=split(site.mask),
        )


@dataclass(frozen=True)
class Mapped:
    """One run mapped over the samples by ``torch.func.vmap``: the program sees one sample, at given values alone.

    What has to be drawn is drawn one by one.

    Attributes:
        depth: Batch dimensions of the pair.
        plates: Names of the plates, whose values are indices.
    """

    depth: int
    plates: frozenset[str]

    def run(self, call: Call, program: Program, values: Values | None, num_samples: int) -> RecordSites:
        """See :class:`Manner`."""
        latents = {n: v for n, v in (values or {}).items() if n not in self.plates}
        given = {n: v for n, v in (values or {}).items() if n in self.plates}
        runs: list[RecordSites] = []

        def one(sample: dict[str, Tensor]) -> Any:
            runs.append(run := run_program(program, call.args, call.kwargs, given | sample, 1, None))
            terms = {n: (s.value, masked_log_prob(s), torch.as_tensor(s.scale)) for n, s in run.sites.items()}
            return terms, run.deterministic

        try:
            with pyro.validation_enabled(False):  # which reads values
                terms, deterministic = torch.func.vmap(one)(latents)
        except (RuntimeError, ValueError):  # something has to be drawn, or read
            return OneByOne(self.depth, self.plates).run(call, program, values, num_samples)
        result, frame = RecordSites(), _particle_frame(self.depth, num_samples)
        for name, (value, log_prob, scale) in terms.items():
            result.sites[name] = self._site(runs[0].sites[name], value, log_prob, scale, frame)
        result.subsamples.update(runs[0].subsamples)
        result.deterministic.update(deterministic)
        return result

    def _site(self, site: Site, value: Tensor, log_prob: Tensor, scale: Tensor, particles: CondIndepStackFrame) -> Site:
        def padded(term: Tensor, event: int = 0) -> Tensor:
            missing = self.depth + 1 + event - term.dim()
            return term.reshape(term.shape[:1] + (1,) * missing + term.shape[1:])

        value = padded(value, len(site.fn.event_shape))
        factor = padded(scale) if isinstance(site.scale, Tensor) else site.scale
        fn = _Recorded(site.fn, value, padded(log_prob))
        return site._replace(fn=fn, value=value, frames=(particles, *site.frames), scale=factor, mask=None)


@dataclass(frozen=True)
class OneByOne:
    """A run for each sample: for programs that do as their author called them and no more.

    Attributes:
        depth: Batch dimensions of the pair.
        plates: Names of the plates, whose values are indices.
    """

    depth: int
    plates: frozenset[str]

    def run(self, call: Call, program: Program, values: Values | None, num_samples: int) -> RecordSites:
        """See :class:`Manner`."""
        runs: list[RecordSites] = []
        for s in range(num_samples):
            given = {n: v if n in self.plates else v[s] for n, v in (values or {}).items()}
            given |= runs[0].subsamples if runs else {}  # the indices of a subsampling plate are drawn once
            runs.append(run_program(program, call.args, call.kwargs, given, 1, None))
        result = RecordSites()
        result.sites.update(beside([run.sites for run in runs], self.depth))
        result.subsamples.update(runs[0].subsamples)
        result.deterministic.update({n: torch.stack([r.deterministic[n] for r in runs]) for n in runs[0].deterministic})
        return result


def beside(runs: Sequence[Mapping[str, Site]], depth: int) -> dict[str, Site]:
    """The sites of a run for each sample as those of one run, with samples left of all plates.

    Args:
        runs: Sites by name of each run.
        depth: Batch dimensions of the pair.
    """
    for sites in runs:
        check_same_sites(runs[0].keys(), sites.keys())
    return {name: _beside([sites[name] for sites in runs], depth) for name in runs[0]}


def _beside(sites: Sequence[Site], depth: int) -> Site:
    first, event = sites[0], len(sites[0].fn.event_shape)

    def join(values: Sequence[Any], event: int = 0) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        padded = [_padded(v, v.dim() - event, depth + 1) for v in values]
        return torch.cat(padded, padded[0].dim() - event - depth - 1)

    def take(value: Tensor) -> list[Tensor]:
        return list(value.split(1, value.dim() - event - depth - 1))

    return first._replace(
        fn=_Rearranged([site.fn for site in sites], take, join),
        value=join([site.value for site in sites], event),
        frames=(_particle_frame(depth, len(sites)), *first.frames),
        scale=join([site.scale for site in sites]),
        mask=join([site.mask for site in sites]),
    )


def _particle_frame(depth: int, num_samples: int) -> CondIndepStackFrame:
    return CondIndepStackFrame(PARTICLES, -depth - 1, num_samples, 0)


def _padded(value: Tensor, batch: int, depth: int) -> Tensor:
    """A value with so many batch dimensions as one with all of the pair's."""
    return value.reshape((1,) * (depth - batch) + value.shape) if batch < depth else value


class _Rearranged(TorchDistribution):
    """Distributions of several runs, or of further rows, shown as one with samples on the left.

    Args:
        parts: The distributions as they were run.
        take: A value with samples on the left as one value for each part.
        show: A term of each part's batch as one term with samples on the left.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(
        self,
        parts: Sequence[Any],
        take: Callable[[Tensor], list[Tensor]],
        show: Callable[[list[Tensor]], Tensor],
    ) -> None:
        self.parts, self.take, self.show = list(parts), take, show
        self.base_dist = self.parts[0]  # by which point masses and masks are found
        batch = show([torch.empty(part.batch_shape, device="meta") for part in self.parts]).shape
        super().__init__(batch, self.base_dist.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the parts' samples have a gradient."""
        return self.base_dist.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """The support of the first part."""
        return self.base_dist.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of a value with samples on the left."""
        event = len(self.event_shape)
        parts = zip(self.parts, self.take(value), strict=True)
        return self.show([fn.log_prob(stripped(v, len(fn.batch_shape) + event)) for fn, v in parts])


class _Recorded(TorchDistribution):
    """A distribution of which the log-density of one value is kept, masked, and nothing else.

    Args:
        fn: The distribution inside the mapped run, whose tensors are gone.
        value: The value.
        log_prob: Its log-density.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, fn: Any, value: Tensor, log_prob: Tensor) -> None:
        self.base_dist = next(layer for layer in layers(fn) if not isinstance(layer, MaskedDistribution))
        self.value, self.kept, self.has_rsample = value, log_prob, fn.has_rsample
        super().__init__(log_prob.shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support, where it is no tensor's."""
        return self.base_dist.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the value that is kept."""
        if value is not self.value:
            raise NotImplementedError("expected the value at which a mapped run was made, got another")
        return self.kept


@register_kl(_Rearranged, _Rearranged)
def _kl(q: _Rearranged, p: _Rearranged) -> Tensor:
    return q.show([kl_divergence(*pair) for pair in zip(q.parts, p.parts, strict=True)])
