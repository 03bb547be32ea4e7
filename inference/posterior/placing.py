"""Latent sites in a vector of unconstrained coordinates per data point: where each stands, and how it is set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import IndependentTransform

from inference.distributions.gaussian import LOG_2PI
from inference.pair.draw import Layout
from inference.pair.handlers import Site
from inference.pair.improper import is_periodic, latent_mask, on_circle, refuse_improper, support_of
from inference.posterior.coordinates import coordinates_of, unrounded


@dataclass(frozen=True)
class Place:
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
        """Coordinates of the site."""
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


def places_of(latents: Mapping[str, Site], layout: Layout) -> list[Place]:
    """The places of latent sites, in trace order.

    Raises:
        ValueError: If a site has no density in coordinates; the message names it.
    """
    places: list[Place] = []
    for name, site in latents.items():
        batch = site.value.shape[: site.value.dim() - len(site.fn.event_shape)]
        raw = _transform(name, site.fn).inv(site.value)
        plates: list[int | None] = list(batch)
        if layout.whole:
            plates.insert(0, None)
        else:
            plates[layout.dim] = None
        start = places[-1].start + places[-1].numel if places else 0
        places.append(Place(name, start, tuple(plates), raw.shape[len(batch) :]))
    return places


def _transform(name: str, fn: Distribution) -> Any:
    try:
        support = support_of(fn)
        if support is None or support.is_discrete:
            raise NotImplementedError
        transform = coordinates_of(support)
    except NotImplementedError:
        raise ValueError(
            f"expected a continuous distribution with a known support at latent site {name!r}, got {type(fn).__name__} "
            "(log_weights, compare and Importance need no coordinates of it)"
        ) from None
    refuse_improper(name, fn)
    if not on_circle(fn) and is_periodic(fn):
        raise ValueError(
            f"expected a proper density on the support of latent site {name!r}, the real line, got a "
            f"{type(fn).__name__} that does not fall off there"
        )
    return transform


class Coordinates(Messenger):
    """Sets latents from pieces of u, or records the coordinates of those that a run has, with log-determinants.

    Entered outside the particle plate, where a site's distribution is expanded already. A masked latent, of which
    nothing may depend, has a standard normal density in its coordinates, whatever its program draws: so it counts for
    nothing, where a density of one on the whole line could not be integrated.

    Attributes:
        terms: Log-determinant at each site, and the density of what is masked, of the site's batch.
    """

    def __init__(self, places: list[Place], layout: Layout, num_samples: int, u: Tensor | None) -> None:
        super().__init__()
        self._places, self._layout, self._num_samples = {p.name: p for p in places}, layout, num_samples
        self._u = u
        self._pieces: dict[str, Tensor] = {}
        self._masked: dict[str, Tensor] = {}
        self.terms: dict[str, Tensor] = {}

    @property
    def log_det(self) -> Tensor:
        """Sum of the terms, (S, N) in nats.

        Raises:
            ValueError: If a support or a mask depends on a discrete site that is summed out.
        """
        for name, term in self.terms.items():
            if term.dim() > self._layout.depth + 1:
                raise ValueError(f"expected a support of latent site {name!r} that depends on no discrete site")
        parts = [self._layout.per_datum(term, self._num_samples) for term in self.terms.values()]
        return sum(parts, torch.zeros(()))

    def concatenated(self) -> Tensor:
        """The recorded coordinates, (S, N, d)."""
        return self._together(self._pieces)

    def masked(self) -> Tensor | None:
        """Which of the coordinates are masked, (S, N, d); None where none is."""
        if not self._masked:
            return None
        none = {name: torch.zeros_like(piece, dtype=torch.bool) for name, piece in self._pieces.items()}
        return self._together(none | self._masked)

    def _together(self, pieces: Mapping[str, Tensor]) -> Tensor:
        if not self._places:
            return torch.zeros(self._num_samples, self._layout.num_data, 0)
        return torch.cat([pieces[name] for name in self._places], dim=-1)

    def _pyro_sample(self, msg: Any) -> None:
        place = None if msg["is_observed"] else self._places.get(msg["name"])
        if place is None or self._u is None:
            return
        raw = place.unpack(self._u[..., place.start : place.start + place.numel], self._layout)
        transform = coordinates_of(support_of(msg["fn"]))
        msg["value"], msg["done"] = transform(raw), True
        self._account(place.name, raw, msg, latent_mask(msg["fn"], msg["mask"]))

    def _pyro_post_sample(self, msg: Any) -> None:
        place = None if msg["is_observed"] else self._places.get(msg["name"])
        if place is None or self._u is not None:
            return
        raw = coordinates_of(support_of(msg["fn"])).inv(msg["value"])
        mask = latent_mask(msg["fn"], msg["mask"])
        if mask is not None:
            kept = _aligned(mask, msg["value"], raw).expand_as(raw)
            raw = torch.where(kept, raw, torch.randn_like(raw))
            self._masked[place.name] = place.pack(~kept, self._layout, self._num_samples)
        self._pieces[place.name] = place.pack(raw, self._layout, self._num_samples)
        self._account(place.name, raw, msg, mask)

    def _account(self, name: str, raw: Tensor, msg: Any, mask: Tensor | None) -> None:
        value, fn = msg["value"], msg["fn"]
        transform = coordinates_of(support_of(fn))
        if mask is not None:
            while isinstance(transform, IndependentTransform):  # a mask may be of single numbers
                transform = transform.base_transform
        parts = [transform.log_abs_det_jacobian(raw, value)]
        lacking = None if self._u is None else unrounded(fn, raw, value)
        parts += [] if lacking is None else [lacking]
        if mask is not None:
            parts = [torch.where(_aligned(mask, value, part), part, 0.0) for part in parts]
            parts.append(torch.where(_aligned(mask, value, raw), 0.0, -0.5 * (raw.square() + LOG_2PI)))
        batch = value.dim() - len(fn.event_shape)
        flat = [part.flatten(batch).sum(-1) if part.dim() > batch else part for part in parts]
        self.terms[name] = sum(flat[1:], flat[0])


def _aligned(mask: Tensor, value: Tensor, term: Tensor) -> Tensor:
    """A mask of a value as one of a term or of coordinates, which may have fewer dimensions, or others of an event."""
    for _ in range(value.dim() - term.dim()):
        mask = mask[..., 0]
    return mask if mask.shape[-1:] in ((1,), term.shape[-1:]) else mask[..., :1]
