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

import torch
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor
from torch.distributions import Distribution

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.call import Call
from inference.core.checks import check_count
from inference.core.draw import DATA_PLATE, Draw, Layout, layout_of
from inference.core.handlers import Site, isolated
from inference.core.improper import is_periodic, on_circle, refuse_improper, refuse_mask, support_of
from inference.core.rows import with_known_rows
from inference.core.run import Program, run_program
from inference.core.seeding import random_state
from inference.posterior.coordinates import coordinates_of, unrounded


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
        model: Pyro model whose sites all stand in one vectorised plate over the data.
        *args: Its positional arguments.
        plate: Name of the plate over the data, ``"data"`` if None.
        broadcast: Evaluate samples side by side; False evaluates them one by one, for models that cannot broadcast
            (:meth:`constrain` and :meth:`unconstrain` then take one sample).
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
        self, model: Program, *args: Any, plate: str | None = None, broadcast: bool = True, **kwargs: Any
    ) -> None:
        self._call = Call(model, None, args, kwargs, plate, broadcast)
        self._call.check()
        self._cost = [0]
        with refuse_batch_dependence(model), isolated(), random_state(None), torch.no_grad():
            run = run_program(model, args, kwargs, None, 1, None)
        self._subsamples = run.subsamples
        self._layout = layout_of(run.sites, {}, DATA_PLATE if plate is None else plate)
        latents = {name: site for name, site in run.sites.items() if not site.is_observed}
        with random_state(None):
            self._places = _places(latents, self._layout)
        self._draw({**run.sites}, 1).refuse_scales()
        like = next(iter(latents.values())).value
        self._like = like.new_empty(0, dtype=like.dtype)

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
        return self._layout.num_data

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
        if u.dim() == 3 and not self._call.broadcast:
            each = [self.terms(sample) for sample in u]
            return LogDensity(*(torch.stack([getattr(part, name) for part in each]) for name in LogDensity._fields))
        draw, coordinates = self._run(u)
        latent = draw.total(draw.model_sites, observed=False) + coordinates.log_det
        parts = (latent, draw.total(draw.model_sites, observed=True))
        return LogDensity(*((part[0] if u.dim() == 2 else part) for part in parts))

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites at u (S, N, d) or (N, d), by name in trace order, as the model sees them."""
        draw, _ = self._run(u)
        return {place.name: draw.model_sites[place.name].value for place in self._places}

    def unconstrain(self, values: Mapping[str, Tensor], num_samples: int) -> tuple[Tensor, Tensor]:
        """Coordinates of given latents, and the log-determinant of the transform at them.

        Args:
            values: Values by site name, with samples left of all plates where there are several.
            num_samples: S.

        Returns:
            u (S, N, d), and ``log |det T'(u)|`` (S, N) in nats.
        """
        coordinates = _Coordinates(self._places, self._layout, num_samples, None)
        self._run_with(coordinates, {**self._subsamples, **values}, num_samples)
        return coordinates.concatenated(), coordinates.log_det

    @torch.no_grad()
    def sample_prior(self, num_samples: int) -> Tensor:
        """Draws from the prior, u (S, N, d)."""
        check_count(num_samples, "num_samples")
        return torch.cat([self._draw_prior(count) for count in self._counts(num_samples)])

    def _draw_prior(self, num_samples: int) -> Tensor:
        coordinates = _Coordinates(self._places, self._layout, num_samples, None)
        self._run_with(coordinates, self._subsamples, num_samples)
        return coordinates.concatenated()

    @torch.no_grad()
    def probe(self) -> Draw:
        """One run of the model at latents of the prior, which leaves the random state as it was."""
        with random_state(None):
            return self._run_with(_Coordinates(self._places, self._layout, 1, None), self._subsamples, 1)

    def _counts(self, num_samples: int) -> list[int]:
        """Samples that are drawn side by side."""
        return [num_samples] if self._call.broadcast else [1] * num_samples

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
        parts = []
        for count in self._counts(num_samples):
            draw = self._draw_guide(guide, count)
            u, log_det = self.unconstrain(draw.latents, count)
            draw.check_latents()
            parts.append((u, draw.log_guide + log_det))
        return torch.cat([u for u, _ in parts]), torch.cat([q for _, q in parts])

    @torch.no_grad()
    def draw_guide(self, guide: Program, num_samples: int) -> Tensor:
        """Draws from a guide of the same arguments, which need not have a density, u (S, N, d).

        Raises:
            ValueError: If model and guide are not a valid pair, see :meth:`inference.core.call.Call.run`.
        """
        check_count(num_samples, "num_samples")
        counts = self._counts(num_samples)
        return torch.cat([self.unconstrain(self._draw_guide(guide, count).latents, count)[0] for count in counts])

    def _draw_guide(self, guide: Program, num_samples: int) -> Draw:
        return replace(self._call, guide=guide).run(num_samples, values=self._subsamples)

    def rows(self, index: Tensor) -> LogJoint:
        """The log joint of chosen data points, which may repeat; its evaluations count here.

        Args:
            index: Integers in 0..N-1, (M,).

        Raises:
            ValueError: If the model subsamples its data, or its density at chosen rows is not that of the whole run
                whichever arguments are taken for data, see :func:`inference.core.rows.with_known_rows`.
        """
        if self._layout.plate_scale != 1:
            raise ValueError(
                f"expected a model that takes all its data, got a subsampling plate {self._layout.plate!r}"
            )
        if self._call.row_arguments is None:
            self._call = with_known_rows(self._call, self.probe())
        chosen = copy.copy(self)
        chosen._call = self._call.rows(index, self.num_data)
        chosen._layout = replace(self._layout, num_data=len(index))
        chosen._subsamples = {name: i for name, i in self._subsamples.items() if name != self._layout.plate}
        return chosen

    def _run(self, u: Tensor) -> tuple[Draw, _Coordinates]:
        if u.dim() not in (2, 3) or u.shape[-2:] != (self.num_data, self.dim):
            raise ValueError(f"expected u of shape (S, {self.num_data}, {self.dim}), got {tuple(u.shape)}")
        samples = u.unsqueeze(0) if u.dim() == 2 else u
        self._cost[0] += len(samples) * self.num_data
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
        depth = self._layout.depth if num_samples > 1 else None
        with isolated(), coordinates:
            run = run_program(self._call.model, self._call.args, self._call.kwargs, values, num_samples, depth)
        return self._draw(run.sites, num_samples)

    def _draw(self, sites: Mapping[str, Site], num_samples: int) -> Draw:
        return Draw(self._layout, num_samples, sites, {}, self._subsamples, self._call)


@dataclass(frozen=True)
class _Place:
    """The place of a latent site in a data point's vector, and the shape of its value.

    Attributes:
        name: The site.
        start: First coordinate.
        plates: Sizes of the plates around it from the outside in, the data plate as None.
        event: Shape of one unconstrained value.
    """

    name: str
    start: int
    plates: tuple[int | None, ...]
    event: Size

    @property
    def numel(self) -> int:
        return Size(p for p in self.plates if p is not None).numel() * self.event.numel()

    def unpack(self, u: Tensor, layout: Layout) -> Tensor:
        """A piece (S, N, numel) as the site's batch + event; without the sample dimension where S = 1."""
        others = [p for p in self.plates if p is not None]
        value = u.reshape(*u.shape[:2], *others, *self.event)
        value = value.movedim(1, 1 + self.plates.index(None))
        if len(u) == 1:
            return value[0]
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
