"""Result of a run of a model/guide pair: samples of the guide, and every term reduced to one per data point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from inference.core.seeding import random_state
from inference.pair.enumeration import expected, is_summable, summed_out
from inference.pair.handlers import Site, masked_log_prob
from inference.pair.improper import check_angles, check_latent, is_delta, is_periodic, refuse_mask
from inference.pair.supports import reaches

if TYPE_CHECKING:
    from inference.pair.call import Call

DATA_PLATE = "data"
PARTICLES = "_particles"


def flatten(layout: Layout, site: Site, num_samples: int) -> Tensor:
    """A site's values as (S, N, coordinates): further plates and event dimensions become coordinates."""
    batch = site.value.dim() - len(site.fn.event_shape)
    value = site.value.reshape((1,) * (layout.depth + 1 - batch) + site.value.shape)
    value = value.movedim(layout.depth + 1 + layout.dim, 1)
    return value.expand(num_samples, layout.num_data, *value.shape[2:]).reshape(num_samples, layout.num_data, -1)


def labels(run: Draw) -> tuple[str, ...]:
    """One name per latent coordinate: z[0], z[1], or z where it has but one."""
    sizes = {n: flatten(run.layout, run.guide_sites[n], run.num_samples).shape[-1] for n in run.latents}
    names = [[n] if size == 1 else [f"{n}[{k}]" for k in range(size)] for n, size in sizes.items()]
    return tuple(name for part in names for name in part)


@dataclass(frozen=True)
class Layout:
    """Layout of a pair: name, dimension and sizes of the plate over its data, and the depth of its plates.

    Attributes:
        plate: Name of the plate over the data.
        dim: Its dimension, negative.
        num_data: Data points in this call, N.
        plate_scale: Full size of the plate over its size here; 1 unless the pair subsamples.
        depth: Number of batch dimensions that the pair uses.
        numel: Elements per data point of the largest site: what one more particle costs.
        whole: Whether all data are one data point: the plate is then thought of, left of all others, and of size one.
    """

    plate: str
    dim: int
    num_data: int
    plate_scale: float
    depth: int
    numel: int
    whole: bool = False

    def refuse_subsampling(self) -> None:
        """Refuse a pair that subsamples its data: which data points its numbers are of, nobody knows.

        Raises:
            ValueError: If it does.
        """
        if self.plate_scale != 1:
            raise ValueError(f"expected a pair that takes all its data, got a subsampling plate {self.plate!r}")

    def per_datum(self, term: Tensor, num_samples: int) -> Tensor:
        """Sum a term of a site's batch shape over everything but samples and data: shape (S, N)."""
        missing = self.depth + 1 - term.dim()
        if missing:
            term = term.reshape((1,) * missing + term.shape)
        others = [d for d in range(-self.depth, 0) if d != self.dim]
        if others:
            term = term.sum(others)
        shape = (num_samples, self.num_data)
        return term if term.shape == shape else term.expand(shape)


@dataclass(frozen=True)
class Draw:
    """Samples of a guide, and the sites of both halves of the pair at them.

    Attributes:
        layout: The pair's plates.
        num_samples: S.
        model_sites: Sites of the model in trace order, the latent ones first drawn by the guide.
        guide_sites: Sites of the guide in trace order.
        subsamples: The indices that each plate chose; those of a further run may be fixed to them.
        call: What was run.
    """

    layout: Layout
    num_samples: int
    model_sites: Mapping[str, Site]
    guide_sites: Mapping[str, Site]
    subsamples: Mapping[str, Tensor]
    call: Call

    def term(self, site: Site, value: Tensor) -> Tensor:
        """A per-site quantity as (S, N), times the site's own ``poutine.scale`` without the data plate's."""
        return self.layout.per_datum(self._scaled(site, value), self.num_samples)

    def extra_scale(self, site: Site) -> float | Tensor:
        """The site's scale beyond the data plate's."""
        return site.scale / self.layout.plate_scale

    def total(self, sites: Mapping[str, Site], *, observed: bool | None = None) -> Tensor:
        """Sum of the log-probabilities of sites, (S, N) in nats: all of them, the observed or the latent ones."""
        self._refuse_enumerated_guide()
        chosen = [s for s in sites.values() if observed is None or s.is_observed == observed]
        if any(site.enumerated for site in chosen):
            return summed_out(self.layout, self.num_samples, self.factors(chosen))
        terms = [self.term(site, masked_log_prob(site)) for site in chosen]
        if len(terms) == 2:  # nearly always: what a stack sums to, at half the cost
            return terms[0] + terms[1]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0] if terms else self._zeros()

    def _zeros(self) -> Tensor:
        values = [site.value for half in (self.model_sites, self.guide_sites) for site in half.values()]
        like = next((value for value in values if value.is_floating_point()), torch.zeros(()))
        return like.new_zeros(self.num_samples, self.layout.num_data)

    def factors(self, sites: Iterable[Site]) -> list[tuple[Site, Tensor]]:
        """Sites with the log-probability of each, times its own scale."""
        return [(site, self._scaled(site, masked_log_prob(site))) for site in sites]

    def _scaled(self, site: Site, value: Tensor) -> Tensor:
        scale = self.extra_scale(site)
        return value * scale if isinstance(scale, Tensor) or scale != 1.0 else value

    @property
    def left_out(self) -> frozenset[str]:
        """Latent sites of the model that the guide leaves out; point masses, which others determine, are none."""
        latents = {name: site for name, site in self.model_sites.items() if not site.is_observed}
        return frozenset(name for name, s in latents.items() if name not in self.guide_sites and not is_delta(s.fn))

    @property
    def marked(self) -> frozenset[str]:
        """Sites that the guide asks to be enumerated, and that can be."""
        sites = self.guide_sites.items()
        return frozenset(name for name, site in sites if site.is_marked and is_summable(site))

    @property
    def summed_by_guide(self) -> list[str]:
        """The sites that the guide enumerates, of each of whose values it draws the other latents."""
        return [name for name, site in self.guide_sites.items() if site.is_summed]

    def _refuse_enumerated_guide(self) -> None:
        if self.summed_by_guide:
            raise ValueError(
                f"expected a guide that draws its sites, got {self.summed_by_guide} enumerated: their model's density "
                "and their guide's are known together alone, as by ELBO, IWELBO and log_weights"
            )

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), (S, N) in nats, with every ``poutine.scale`` and mask honoured."""
        return self.total(self.model_sites)

    @property
    def log_guide(self) -> Tensor:
        """log q(z | x), (S, N) in nats: of what the guide draws alone, see :attr:`training_terms`."""
        return self.total(self.guide_sites, observed=False)

    @property
    def training_terms(self) -> Tensor | None:
        """What the guide observes or adds by ``pyro.factor``, (S, N); None where there is nothing.

        A loss subtracts it as Pyro's do; it is no part of the density q.
        """
        observed = [site for site in self.guide_sites.values() if site.is_observed]
        if not observed:
            return None
        return (
            self._expected(self.factors(observed))
            if self.summed_by_guide
            else self.total(self.guide_sites, observed=True)
        )

    @property
    def elbo_terms(self) -> Tensor:
        """log p(x, z) - log q(z | x) with every ``poutine.scale`` honoured, (S, N) in nats.

        Of sites that the guide enumerates, the expectation under their probabilities.
        """
        if self.summed_by_guide:
            return self._expected(self._ratio([site for site in self.guide_sites.values() if not site.is_observed]))
        return self.log_joint - self.log_guide

    def _ratio(self, guide_sites: Iterable[Site]) -> list[tuple[Site, Tensor]]:
        """The factors of the model's density over those of the guide's."""
        return self.factors(self.model_sites.values()) + [(site, -q) for site, q in self.factors(guide_sites)]

    def _expected(self, factors: list[tuple[Site, Tensor]]) -> Tensor:
        weights = [(site, masked_log_prob(site)) for site in self.guide_sites.values() if site.is_summed]
        return expected(self.layout, self.num_samples, factors, weights)

    @property
    def trained_elbo(self) -> Tensor:
        """The terms whose mean is the ELBO that training maximises, (S, N) in nats: a bound, as no site is scaled.

        Raises:
            ValueError: As :attr:`log_weights`.
        """
        self.refuse_scales()
        self.check_latents()
        return self.elbo_terms

    @cached_property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), (S, N) in nats.

        Of sites c that the guide enumerates, log sum_c p(x, z_c, c) / q(z_c | x, c): tighter than what it trains.

        Raises:
            ValueError: If a site is scaled beyond the data plate: exp of a scaled term is not an importance weight; or
                the two densities of a latent are not with respect to one measure.
        """
        if not self.summed_by_guide:
            return self.trained_elbo
        self.refuse_scales()
        self.check_latents()
        drawn = [site for site in self.guide_sites.values() if not site.is_observed and not site.is_summed]
        return summed_out(self.layout, self.num_samples, self._ratio(drawn))

    def refuse_scales(self) -> None:
        """Refuse sites that are scaled beyond the data plate.

        Raises:
            ValueError: With the site's name and factor.
        """
        drawn = [(name, site) for name, site in self.guide_sites.items() if not site.is_observed]
        for name, site in [*self.model_sites.items(), *drawn]:
            if not _is_one(self.extra_scale(site)):
                raise ValueError(
                    f"expected site {name!r} to carry no scale but the plate's for a log-density, "
                    f"got poutine.scale or a subsampled inner plate with factor {self.extra_scale(site)}"
                )

    def check_latents(self) -> None:
        """Check the two densities of each latent, see :func:`inference.pair.improper.check_latent`.

        Raises:
            ValueError: If they are not with respect to one measure, or an auxiliary site that makes latents is a point
                mass, as an AutoLaplaceApproximation's is in training; the message names the site.
        """
        for name, site in self.guide_sites.items():
            if site.is_auxiliary and is_delta(site.fn):
                raise ValueError(
                    f"expected a density at guide site {name!r}, got a Delta: of an AutoLaplaceApproximation use "
                    "what its .laplace_approximation(...) returns"
                )
        for name in self.latents:
            check_latent(name, self.model_sites[name], self.guide_sites[name])

    def check_angles(self) -> None:
        """Check by trial that no latent is an angle in one half alone; leaves the random state as it was.

        Raises:
            ValueError: If one is; the message names the site.
        """
        with random_state(None):
            for name in self.latents:
                halves = self.model_sites[name].fn, self.guide_sites[name].fn
                check_angles(name, *halves, *map(is_periodic, halves))

    def check_determined(self) -> None:
        """Check by a second run that the model's density at given latents is one; random numbers are used.

        Raises:
            ValueError: See :func:`refuse_undetermined`.
        """
        drawn = {name: s.value for name, s in self.model_sites.items() if not (s.is_observed or is_delta(s.fn))}
        refuse_undetermined(self.model_sites, self.call.sites_at({**self.subsamples, **drawn}))

    @property
    def narrow(self) -> list[str]:
        """Latents on part of whose support the guide has no density, by trial; leaves the random state as it was."""
        with random_state(None):
            halves = {name: (self.guide_sites[name].fn, self.model_sites[name].fn) for name in self.latents}
            return [name for name, (q, p) in halves.items() if not (is_delta(q) or reaches(q, p))]

    def refuse_masks(self) -> None:
        """Refuse latents that are masked, in model or guide.

        Raises:
            ValueError: With the site's name.
        """
        for name in self.latents:
            refuse_mask(name, self.model_sites[name])
            refuse_mask(name, self.guide_sites[name])

    @property
    def latents(self) -> dict[str, Tensor]:
        """Values of the latent sites, in trace order of the guide."""
        drawn = {name: site for name, site in self.guide_sites.items() if not (site.is_observed or site.is_summed)}
        return {name: site.value for name, site in drawn.items() if not site.is_auxiliary}

    @property
    def guide_values(self) -> dict[str, Tensor]:
        """The values at which the guide can be run again: of its latents, or of the auxiliary sites that make them."""
        self._refuse_enumerated_guide()
        drawn = {name: site for name, site in self.guide_sites.items() if not site.is_observed}
        return {name: site.value for name, site in drawn.items() if not is_delta(site.fn)}


def refuse_undetermined(first: Mapping[str, Site], again: Mapping[str, Site]) -> None:
    """Refuse a model that gives its sites other densities in a second run at the same latents.

    Raises:
        ValueError: If so; the message names a site.
    """
    for name, site in first.items():
        density, other = (masked_log_prob(s) for s in (site, again.get(name, site)))
        if not torch.allclose(density, other, rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"expected a density of model site {name!r} that the latents and the data determine, got another in a "
                "second run: is a random site hidden by poutine.block, or is there randomness outside of pyro.sample?"
            )


def layout_of(
    model: Mapping[str, Site], guide: Mapping[str, Site], plate: str | None = None, *, whole: bool = False
) -> Layout:
    """The layout of the recorded sites of a pair, or of a model alone where the guide has none.

    Args:
        model: Sites of the model.
        guide: Sites of the guide.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: Whether all data are one data point, whatever the plates.

    Raises:
        ValueError: If a site stands outside the data plate, or the plate differs between sites.
    """
    if whole:
        return _layout_of_whole([*model.values(), *guide.values()])
    plate = DATA_PLATE if plate is None else plate
    found: set[tuple[int | None, int, float]] = set()
    depth, numel, num_data = 0, 1, 1
    for half, sites in (("model", model), ("guide", guide)):
        for name, site in sites.items():
            frames = [f for f in site.frames if f.name != PARTICLES]
            data = next((f for f in frames if f.name == plate), None)
            if data is None or data.dim is None or data.size == 0:
                raise ValueError(
                    f"expected every sample site inside one vectorised plate {plate!r} over the data (another name "
                    f"goes by plate=..., all data as one data point by whole=True), got {half} site {name!r} in plates "
                    f"{[f.name for f in frames]}"
                )
            size = _size(data, site)
            full = data.full_size if data.size > 0 and data.full_size is not None else size
            found.add((data.dim, size, full / size))
            depth = max(depth, *(-f.dim for f in frames if f.dim is not None))
            particles = math.prod(f.size for f in site.frames if f.name == PARTICLES)
            numel, num_data = max(numel, _numel(site) // (size * particles)), size
    if len(found) != 1:
        raise ValueError(
            f"expected plate {plate!r} to have one dimension and size in model and guide, got (dim, size, scale) "
            f"{sorted(found, key=str)}"
        )
    dim, size, scale = found.pop()
    assert dim is not None
    assert size == num_data
    return Layout(plate, dim, size, scale, depth, numel)


def _numel(site: Site) -> int:
    """Elements of a site, those of discrete sites that it depends on among them."""
    if not site.enumerated:
        return site.value.numel()
    event = len(site.fn.event_shape)
    batch = torch.broadcast_shapes(site.fn.batch_shape, site.value.shape[: site.value.dim() - event])
    return batch.numel() * site.fn.event_shape.numel()


def _layout_of_whole(sites: Sequence[Site]) -> Layout:
    """The layout of all data as one data point, in a plate of size one that no program sees."""
    particles = next((f for site in sites for f in site.frames if f.name == PARTICLES), None)
    enumerated = [dim for site in sites for dim in site.enumerated]
    if particles is None and enumerated:  # which begin two left of the plates, where samples would be
        depth = -max(enumerated) - 2
    elif particles is None:
        depth = 1 + max(len(site.fn.batch_shape) for site in sites)
    else:
        assert particles.dim is not None
        depth = -particles.dim - 1
    numel = max(site.value.numel() for site in sites) // (1 if particles is None else particles.size)
    return Layout("the whole data set", -depth, 1, 1.0, depth, max(numel, 1), whole=True)


def _size(frame: CondIndepStackFrame, site: Site) -> int:
    """Size of a vectorised plate around a site; that of the site's batch where the plate was given none."""
    if frame.size > 0:
        return frame.size
    assert frame.dim is not None
    batch = site.fn.batch_shape
    return batch[frame.dim] if len(batch) >= -frame.dim else 1


def _is_one(scale: float | Tensor) -> bool:
    return bool(torch.all(scale == 1)) if isinstance(scale, Tensor) else math.isclose(scale, 1.0)
