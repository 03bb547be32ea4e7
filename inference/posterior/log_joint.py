r"""The log joint density of any Pyro model as a function of its latents, per data point.

.. math:: u_n \mapsto \log p(x_n, T(u_n)) + \log |\det T'(u_n)|, \quad u_n \in R^d

T takes unconstrained numbers to the support of each latent site, in trace order. Every sampler, integrator and
optimiser over a posterior is written against this one function.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor
from torch.distributions import Distribution

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.call import Call
from inference.core.checks import check_count
from inference.core.draw import Draw, Layout, layout_of
from inference.core.handlers import Site, isolated
from inference.core.improper import is_periodic, on_circle, refuse_improper, refuse_mask, support_of
from inference.core.manners import FAILURES, candidates, check_equal, warn_once
from inference.core.memory import at_once
from inference.core.rows import RowsNotFollowed, with_known_rows
from inference.core.run import Program
from inference.core.samples import AsRows, Manner, Mapped, SideBySide, Single
from inference.core.seeding import random_state
from inference.posterior.coordinates import coordinates_of, unrounded

# Elements of the largest site in one mapped run: 16 MB in float64.
_MAPPED = 2**21


class LogDensity(NamedTuple):
    """The two parts of a log joint density, each (S, N) or (N,) in nats.

    Attributes:
        prior: log p(z) + log |det T'|, the density of the prior in unconstrained coordinates.
        likelihood: log p(x | z).
    """

    prior: Tensor
    likelihood: Tensor


class LogJoint:
    r"""Log joint density log p(x_n, z) of a Pyro model in unconstrained coordinates, one value per data point.

    Transforms are built inside each run, so that the support of a site may depend on the sites before it. Indices of
    subsampling plates are drawn once and kept. The model's own parameters are used, never those of Pyro's store.

    Args:
        model: Pyro model whose sites all stand in one vectorised plate over the data, unless they are taken as a whole.
        *args: Its positional arguments.
        plate: Name of the plate over the data, ``"data"`` if None.
        broadcast: Evaluate samples side by side where the model can, else as further rows of the data; False evaluates
            them one by one.
        whole: Take all data as one data point, whatever the plates.
        missing: NaN in the data stands for a missing value that the model itself masks.
        **kwargs: Its keyword arguments.

    Attributes:
        dim: d, unconstrained coordinates per data point.
        num_data: N.
        evaluations: Evaluations of the joint density so far, counted per sample and data point.

    Raises:
        TypeError: If data are of the wrong type.
        ValueError: If the data are not finite or have the wrong shape, a site stands outside the plate, carries a
            scale, is masked though latent, or is discrete; the message names the site.

    Example:
        >>> from zoo import PPCA
        >>> log_joint = LogJoint(PPCA(5, 2).double(), torch.zeros(4, 5).double())
        >>> log_joint(torch.zeros(7, 4, 2).double()).shape
        torch.Size([7, 4])
    """

    def __init__(
        self,
        model: Program,
        *args: Any,
        plate: str | None = None,
        broadcast: bool = True,
        whole: bool = False,
        missing: bool = False,
        **kwargs: Any,
    ) -> None:
        self._prepare(Call(model, None, args, kwargs, plate, broadcast, whole, missing))

    @classmethod
    def of(cls, call: Call) -> LogJoint:
        """The log joint density of a call's model."""
        made = cls.__new__(cls)
        made._prepare(replace(call, guide=None))
        return made

    def _prepare(self, call: Call) -> None:
        self._call, self._cost = call, [0]
        self._chosen: Tensor | None = None
        self._known_manner: Manner | None = None
        self._follows: bool | None = None
        call.check()
        with refuse_batch_dependence(call.model), isolated(), random_state(None), torch.no_grad():
            run = Single().run(call, call.model, None, 1)
        self._subsamples = run.subsamples
        self._layout = layout_of(run.sites, {}, call.plate, whole=call.whole)
        latents = {name: site for name, site in run.sites.items() if not site.is_observed}
        with random_state(None):
            self._places = _places(latents, self._layout)
        draw = self._draw({**run.sites}, 1)
        draw.refuse_scales()
        like = next(iter(latents.values())).value
        self._like = like.new_empty(0, dtype=like.dtype)
        if call.missing and bool(draw.log_joint.isnan().any()):
            raise ValueError("expected a model that masks missing values, got a log joint density of NaN")

    @property
    def dim(self) -> int:
        """Unconstrained coordinates per data point, d."""
        return sum(place.numel for place in self._places)

    @property
    def coordinates(self) -> dict[str, slice]:
        """Where each latent site stands in u, by name in trace order."""
        return {place.name: slice(place.start, place.start + place.numel) for place in self._places}

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latent sites, in trace order."""
        return tuple(place.name for place in self._places)

    @property
    def subsamples_data(self) -> bool:
        """Whether the model takes only some of its data."""
        return self._layout.plate_scale != 1

    @property
    def num_data(self) -> int:
        """Number of data points, N."""
        return self._layout.num_data if self._chosen is None else len(self._chosen)

    @property
    def evaluations(self) -> int:
        """Evaluations of the joint density so far, one for each sample and data point."""
        return self._cost[0]

    @property
    def dtype(self) -> torch.dtype:
        """The latents' dtype."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """The latents' device."""
        return self._like.device

    def __call__(self, u: Tensor) -> Tensor:
        """Log joint density at u, unconstrained and with the log-determinant of the transform, in nats.

        Args:
            u: (S, N, d) or (N, d).

        Returns:
            (S, N) or (N,), with gradient where ``u`` has one; finite or minus infinity for a proper model.

        Raises:
            ValueError: If ``u`` is of another shape.
        """
        terms = self.terms(u)
        return terms.prior + terms.likelihood

    def terms(self, u: Tensor) -> LogDensity:
        """The prior's and the likelihood's parts of the log joint density at u, (S, N, d) or (N, d).

        Raises:
            ValueError: If ``u`` is of another shape.
        """
        if u.dim() not in (2, 3) or u.shape[-2:] != (self.num_data, self.dim):
            raise ValueError(f"expected u of shape (S, {self.num_data}, {self.dim}), got {tuple(u.shape)}")
        samples = u.unsqueeze(0) if u.dim() == 2 else u
        parts = self._terms(samples) if self._chosen is None else self._terms_of_chosen(self._chosen, samples)
        return LogDensity(*((part[0] if u.dim() == 2 else part) for part in parts))

    def _terms_of_chosen(self, index: Tensor, u: Tensor) -> LogDensity:
        """The terms of chosen data points (S, M) at u (S, M, d): of all, so often as one of them is chosen."""
        table = _Table(index, self._layout.num_data)
        return LogDensity(*(table.gather(part, len(u)) for part in self._terms(table.scatter(u))))

    def _terms(self, u: Tensor) -> LogDensity:
        """The terms of all data points (S, N) at u (S, N, d)."""
        return self._terms_by(Single() if len(u) == 1 else self._manner, u)

    def _terms_by(self, manner: Manner, u: Tensor) -> LogDensity:
        if isinstance(manner, Single | SideBySide):
            draw, coordinates = self._run(u)
            latent = draw.total(draw.model_sites, observed=False) + coordinates.log_det
            return LogDensity(latent, draw.total(draw.model_sites, observed=True))
        if isinstance(manner, AsRows):
            terms = self._repeated(len(u))._terms(u.flatten(0, 1).unsqueeze(0))
            return LogDensity(*(part.view(len(u), -1) for part in terms))
        if isinstance(manner, Mapped):
            with pyro.validation_enabled(False):  # which reads values
                return LogDensity(*torch.func.vmap(self._of_one, chunk_size=at_once(_MAPPED, self._layout.numel))(u))
        each = [self._terms(sample) for sample in u.split(1)]
        return LogDensity(*(torch.cat(parts) for parts in zip(*each, strict=True)))

    def _of_one(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The terms of one sample (N, d), (N,)."""
        prior, likelihood = self._terms_by(Single(), u.unsqueeze(0))
        return prior[0], likelihood[0]

    @property
    def _manner(self) -> Manner:
        """How several samples are evaluated, found by trial once for each model and form of arguments."""
        if self._known_manner is None:
            self._known_manner = self._tried()
        return self._known_manner

    @torch.no_grad()
    def _tried(self) -> Manner:
        """The fastest manner at which two samples have the densities that they have by themselves."""
        spent = self._cost[0]
        with random_state(None):
            u = torch.cat([self._draw_prior(1) for _ in range(2)])
            manner, told, error = self._first_equal(u)
        if told and self._call.broadcast:
            warn_once(self._call.model, error, told)
        self._cost[0] = spent
        return manner

    def _first_equal(self, u: Tensor) -> tuple[Manner, str, Exception | None]:
        """The first manner with the densities of samples u (S, N, d) by themselves, and why it is not the very first."""
        alone, reason = torch.cat([sum(self._terms_by(Single(), sample)) for sample in u.split(1)]), None
        for manner, told in candidates(self._call, self.probe()):
            try:
                check_equal(sum(self._terms_by(manner, u)), alone)
            except FAILURES as error:
                reason = reason or error
                continue
            return manner, told, reason
        assert reason is not None
        raise reason

    def _row_arguments(self) -> frozenset[int | str] | None:
        """The arguments that are rows of data; None where the data points cannot be run by themselves.

        Raises:
            ValueError: If they can, to another density: it depends on the rest of the batch.
        """
        try:
            return with_known_rows(self._call, self.probe()).row_arguments
        except RowsNotFollowed:
            return None

    def _repeated(self, times: int) -> LogJoint:
        return self._by_arguments(torch.arange(self._layout.num_data).repeat(times))

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites at u (S, N, d) or (N, d), by name in trace order, as the model sees them."""
        if u.dim() == 3 and len(u) > 1 and not isinstance(self._manner, SideBySide):
            each = [self.constrain(sample) for sample in u]
            depth = self._layout.depth
            return {p.name: torch.stack([p.padded(one[p.name], depth) for one in each]) for p in self._places}
        draw, _ = self._run(u)
        return {place.name: draw.model_sites[place.name].value for place in self._places}

    def unconstrain(self, values: Mapping[str, Tensor], num_samples: int) -> tuple[Tensor, Tensor]:
        """Coordinates of given latents, and the log-determinant of the transform at them.

        Args:
            values: Values by site name, with samples left of all plates where there are several.
            num_samples: S.

        Returns:
            u (S, N, d), and log |det T'(u)| (S, N) in nats.
        """
        manner = Single() if num_samples == 1 else self._manner
        if isinstance(manner, AsRows):
            joined = {name: manner.join(value) for name, value in values.items()}
            u, log_det = self._repeated(num_samples).unconstrain(joined, 1)
            return u.view(num_samples, -1, self.dim), log_det.view(num_samples, -1)
        if not isinstance(manner, Single | SideBySide):
            each = [self.unconstrain({n: v[s] for n, v in values.items()}, 1) for s in range(num_samples)]
            return torch.cat([u for u, _ in each]), torch.cat([log_det for _, log_det in each])
        coordinates = _Coordinates(self._places, self._layout, num_samples, None)
        self._run_with(coordinates, {**self._subsamples, **values}, num_samples)
        return coordinates.concatenated(), coordinates.log_det

    @torch.no_grad()
    def sample_prior(self, num_samples: int) -> Tensor:
        """Draws from the prior, u (S, N, d)."""
        check_count(num_samples, "num_samples")
        if self._chosen is None:
            return self._prior_of_all(num_samples)
        table = _Table(self._chosen, self._layout.num_data)
        return table.gather(self._prior_of_all(num_samples * table.times), num_samples)

    def _prior_of_all(self, num_samples: int) -> Tensor:
        if num_samples > 1 and isinstance(self._manner, AsRows):
            return self._repeated(num_samples)._prior_of_all(1).view(num_samples, -1, self.dim)
        counts = [num_samples] if num_samples == 1 or isinstance(self._manner, SideBySide) else [1] * num_samples
        return torch.cat([self._draw_prior(count) for count in counts])

    def _draw_prior(self, num_samples: int) -> Tensor:
        coordinates = _Coordinates(self._places, self._layout, num_samples, None)
        self._run_with(coordinates, self._subsamples, num_samples)
        return coordinates.concatenated()

    @torch.no_grad()
    def probe(self) -> Draw:
        """One run of the model at latents of the prior, which leaves the random state as it was."""
        with random_state(None):
            return self._run_with(_Coordinates(self._places, self._layout, 1, None), self._subsamples, 1)

    @torch.no_grad()
    def sample_guide(self, guide: Program, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws from a guide of the same arguments.

        Args:
            guide: Pyro guide.
            num_samples: S.

        Returns:
            u (S, N, d), and the guide's log-density of it in these coordinates, (S, N) in nats.

        Raises:
            ValueError: If model and guide are not a valid pair, see :meth:`inference.core.call.Call.run`.
        """
        check_count(num_samples, "num_samples")
        draw = self._draw_guide(guide, num_samples)
        u, log_det = self.unconstrain(draw.latents, num_samples)
        draw.check_latents()
        return u, draw.log_guide + log_det

    @torch.no_grad()
    def draw_guide(self, guide: Program, num_samples: int) -> Tensor:
        """Draws from a guide of the same arguments, which need not have a density, u (S, N, d).

        Raises:
            ValueError: If model and guide are not a valid pair, see :meth:`inference.core.call.Call.run`.
        """
        check_count(num_samples, "num_samples")
        return self.unconstrain(self._draw_guide(guide, num_samples).latents, num_samples)[0]

    def _draw_guide(self, guide: Program, num_samples: int) -> Draw:
        return replace(self._call, guide=guide).run(num_samples, values=self._subsamples)

    def rows(self, index: Tensor) -> LogJoint:
        """The log joint of chosen data points, which may repeat; its evaluations count here.

        Where arguments are rows of data, those of the chosen data points are run. Elsewhere (all data as one data
        point, plates of constant size) all data points are run, with the chosen ones' points along the samples.

        Args:
            index: Integers in 0..N-1, (M,).

        Raises:
            ValueError: If the model subsamples its data, or the density of a data point depends on another's latents.
        """
        if self._layout.plate_scale != 1:
            raise ValueError(
                f"expected a model that takes all its data, got a subsampling plate {self._layout.plate!r}"
            )
        if self._chosen is not None:
            return self._among_all(self._chosen[index])
        if self._follows is None:
            self._follows = not self._layout.whole and self._row_arguments() is not None
            if not self._follows:
                self._check_independent()
        return self._by_arguments(index) if self._follows else self._among_all(index)

    def _among_all(self, index: Tensor) -> LogJoint:
        chosen = copy.copy(self)
        chosen._chosen = index
        return chosen

    def _by_arguments(self, index: Tensor) -> LogJoint:
        if self._call.row_arguments is None:
            self._call = with_known_rows(self._call, self.probe())
        chosen = copy.copy(self)
        chosen._call = self._call.rows(index, self._layout.num_data)
        chosen._layout = replace(self._layout, num_data=len(index))
        chosen._subsamples = {name: i for name, i in self._subsamples.items() if name != self._layout.plate}
        return chosen

    @torch.no_grad()
    def _check_independent(self) -> None:
        """Check that the density of each data point is that of its own latents, whatever the others are.

        Raises:
            ValueError: If it is not.
        """
        if self._layout.num_data == 1:
            return
        with random_state(None):
            first, second = (self._prior_of_all(1)[0] for _ in range(2))
        even = torch.arange(len(first), device=first.device) % 2 == 0
        own = torch.where(even, self(first), self(second))
        try:
            check_equal(self(torch.where(even.unsqueeze(-1), first, second)), own)
        except ValueError:
            raise ValueError(
                f"expected the density of each of {len(first)} data points to depend on its own latents alone, got "
                "another where those of the others change"
            ) from None

    def _run(self, u: Tensor) -> tuple[Draw, _Coordinates]:
        samples = u.unsqueeze(0) if u.dim() == 2 else u
        self._cost[0] += len(samples) * self._layout.num_data
        coordinates = _Coordinates(self._places, self._layout, len(samples), samples)
        try:
            return self._run_with(coordinates, self._subsamples, len(samples)), coordinates
        except RuntimeError as error:
            if samples.dtype == self.dtype:
                raise
            raise ValueError(
                f"expected a model in {samples.dtype}, got one with latents of {self.dtype} that takes no other: call "
                ".double() on its networks and data (a function's networks cannot be converted from outside)"
            ) from error

    def _run_with(self, coordinates: _Coordinates, values: Mapping[str, Tensor], num_samples: int) -> Draw:
        manner = Single() if num_samples == 1 else SideBySide(self._layout.depth)
        with isolated(), coordinates:
            run = manner.run(self._call, self._call.model, values, num_samples)
        return self._draw(run.sites, num_samples)

    def _draw(self, sites: Mapping[str, Site], num_samples: int) -> Draw:
        return Draw(self._layout, num_samples, sites, {}, self._subsamples, self._call)


@dataclass(frozen=True)
class _Place:
    """The place of a latent site in a data point's vector, and the shape of its value.

    Attributes:
        name: The site.
        start: First coordinate.
        plates: Sizes of the plates around it from the outside in, the data plate as None: the first where all data are
            one data point.
        event: Shape of one unconstrained value.
    """

    name: str
    start: int
    plates: tuple[int | None, ...]
    event: Size

    @property
    def numel(self) -> int:
        return Size(p for p in self.plates if p is not None).numel() * self.event.numel()

    def padded(self, value: Tensor, depth: int) -> Tensor:
        """A value as the model sees it, with all batch dimensions of the pair."""
        return value.reshape((1,) * (depth + len(self.event) - value.dim()) + value.shape)

    def unpack(self, u: Tensor, layout: Layout) -> Tensor:
        """A piece (S, N, numel) as the site's batch + event; without the sample dimension where S = 1."""
        others = [p for p in self.plates if p is not None]
        value = u.reshape(*u.shape[:2], *others, *self.event)
        value = value.movedim(1, 1 + self.plates.index(None))
        if len(u) == 1:
            return value[0, 0] if layout.whole else value[0]
        missing = layout.depth - len(self.plates)
        return value.reshape(len(u), *(1,) * missing, *value.shape[1:])

    def pack(self, value: Tensor, layout: Layout, num_samples: int) -> Tensor:
        """The inverse of :meth:`unpack`, for values that may lack plates on the left."""
        shape = [layout.num_data if p is None else p for p in self.plates]
        value = value.reshape(-1, *shape, *self.event).expand(num_samples, *shape, *self.event)
        return value.movedim(1 + self.plates.index(None), 1).reshape(num_samples, layout.num_data, self.numel)


def _places(latents: Mapping[str, Site], layout: Layout) -> list[_Place]:
    if not latents:
        raise ValueError("expected a model with a latent site, got only observed ones")
    places: list[_Place] = []
    for name, site in latents.items():
        refuse_mask(name, site)
        batch = site.value.shape[: site.value.dim() - len(site.fn.event_shape)]
        raw = _transform(name, site.fn).inv(site.value)
        plates: list[int | None] = list(batch)
        if layout.whole:
            plates.insert(0, None)
        else:
            plates[layout.dim] = None
        start = places[-1].start + places[-1].numel if places else 0
        places.append(_Place(name, start, tuple(plates), raw.shape[len(batch) :]))
    return places


def _transform(name: str, fn: Distribution) -> Any:
    try:
        support = support_of(fn)
        if support is None or support.is_discrete:
            raise NotImplementedError
        transform = coordinates_of(support)
    except NotImplementedError:
        raise ValueError(
            f"expected a continuous distribution with a known support at latent site {name!r}, got {type(fn).__name__}"
        ) from None
    refuse_improper(name, fn)
    if not on_circle(fn) and is_periodic(fn):
        raise ValueError(
            f"expected a proper density on the support of latent site {name!r}, the real line, got a "
            f"{type(fn).__name__} that does not fall off there"
        )
    return transform


class _Table:
    """Chosen data points as a table of all data points, so often as the most frequent one is chosen.

    Args:
        index: The chosen data points, (M,).
        num_data: N.

    Attributes:
        times: R, rows of the table.
    """

    def __init__(self, index: Tensor, num_data: int) -> None:
        self.index, self.num_data = index, num_data
        order = index.argsort(stable=True)
        ranked = index[order]
        place = torch.empty_like(index)
        place[order] = torch.arange(len(index), device=index.device) - torch.searchsorted(ranked, ranked)
        self.place, self.times = place, int(place.max()) + 1 if len(index) else 1

    def scatter(self, u: Tensor) -> Tensor:
        """Points (S, M, d) as (S R, N, d); where the table is empty, the first point of each sample."""
        table = u.detach()[:, None, :1].expand(-1, self.times, self.num_data, -1).clone()
        table[:, self.place, self.index] = u
        return table.flatten(0, 1)

    def gather(self, values: Tensor, num_samples: int) -> Tensor:
        """Of values (S R, N, ...) those of the chosen data points, (S, M, ...)."""
        return values.view(num_samples, self.times, *values.shape[1:])[:, self.place, self.index]


class _Coordinates(Messenger):
    """Sets latents from pieces of u, or records the coordinates of those that a run has; sums log-determinants.

    Entered outside the particle plate, where a site's distribution is expanded already.
    """

    def __init__(self, places: list[_Place], layout: Layout, num_samples: int, u: Tensor | None) -> None:
        super().__init__()
        self._places, self._layout, self._num_samples = {p.name: p for p in places}, layout, num_samples
        self._u = u
        self._pieces: dict[str, Tensor] = {}
        self.log_det: Any = 0.0

    def concatenated(self) -> Tensor:
        """The recorded coordinates, (S, N, d)."""
        return torch.cat([self._pieces[name] for name in self._places], dim=-1)

    def _pyro_sample(self, msg: Any) -> None:
        place = None if msg["is_observed"] else self._places.get(msg["name"])
        if place is None or self._u is None:
            return
        raw = place.unpack(self._u[..., place.start : place.start + place.numel], self._layout)
        transform = coordinates_of(support_of(msg["fn"]))
        msg["value"], msg["done"] = transform(raw), True
        self._account(transform, raw, msg["value"], msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        place = None if msg["is_observed"] else self._places.get(msg["name"])
        if place is None or self._u is not None:
            return
        transform = coordinates_of(support_of(msg["fn"]))
        raw = transform.inv(msg["value"])
        self._pieces[place.name] = place.pack(raw, self._layout, self._num_samples)
        self._account(transform, raw, msg["value"], msg["fn"])

    def _account(self, transform: Any, raw: Tensor, value: Tensor, fn: Any) -> None:
        self._add(transform.log_abs_det_jacobian(raw, value), value.dim() - len(fn.event_shape))
        lacking = None if self._u is None else unrounded(fn, raw, value)
        if lacking is not None:
            self._add(lacking, value.dim() - len(fn.event_shape))

    def _add(self, term: Tensor, batch_dim: int) -> None:
        summed = term.flatten(batch_dim).sum(-1) if term.dim() > batch_dim else term
        self.log_det = self.log_det + self._layout.per_datum(summed, self._num_samples)
