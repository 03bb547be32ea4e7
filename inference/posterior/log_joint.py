r"""The log joint density of any Pyro model as a function of its latents, per data point.

.. math:: u_n \mapsto \log p(x_n, T(u_n)) + \log |\det T'(u_n)|, \quad u_n \in R^d

T takes unconstrained numbers to the support of each latent site, in trace order. Every sampler, integrator and
optimiser over a posterior is written against this one function.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.call import Call
from inference.core.checks import check_count
from inference.core.draw import DATA_PLATE, Draw, layout_of
from inference.core.enumeration import Enumeration, is_summable, summed_out
from inference.core.handlers import Site, isolated, masked_log_prob
from inference.core.improper import latent_mask
from inference.core.rows import with_known_rows
from inference.core.run import Program, run_program
from inference.core.seeding import random_state
from inference.core.unobserved import unobserved, without_children
from inference.posterior.placing import Coordinates, places_of


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
            scale, depends on a masked latent, or is discrete of infinite support; the message names the site.

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
            self._dropped = without_children(
                unobserved(run.sites), run.sites, lambda values: run_program(model, args, kwargs, values, 1, None).sites
            )
        self._subsamples = run.subsamples
        self._layout = layout_of(run.sites, {}, DATA_PLATE if plate is None else plate)
        latents = {name: site for name, site in run.sites.items() if not site.is_observed}
        if not latents:
            raise ValueError("expected a model with a latent site, got only observed ones")
        latents = {name: site for name, site in latents.items() if name not in self._dropped}
        self._summed = frozenset(name for name, site in latents.items() if is_summable(site))
        kept = {name: site for name, site in latents.items() if name not in self._summed}
        with random_state(None):
            self._places = places_of(kept, self._layout)
        self._draw({**run.sites}, 1).refuse_scales()
        values = [site.value for site in [*kept.values(), *run.sites.values()] if site.value.is_floating_point()]
        self._like = next(iter(values), torch.zeros(())).new_empty(0)
        if any(site.mask is not None or latent_mask(site.fn, site.mask) is not None for site in kept.values()):
            self._check_masked()

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
        parts = self._parts(draw, coordinates)
        return LogDensity(*((part[0] if u.dim() == 2 else part) for part in parts))

    def _parts(self, draw: Draw, coordinates: Coordinates) -> tuple[Tensor, Tensor]:
        """The prior in coordinates, and the likelihood."""
        if not self._summed:
            prior = draw.total(draw.model_sites, observed=False) + coordinates.log_det
            return prior, draw.total(draw.model_sites, observed=True)
        sites = draw.model_sites
        terms = [(sites[name], term) for name, term in coordinates.terms.items()]
        latent = terms + draw.factors(site for site in sites.values() if not site.is_observed)
        every = terms + draw.factors(sites.values())
        prior, joint = (summed_out(self._layout, draw.num_samples, factors) for factors in (latent, every))
        return prior, joint - prior

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites at u (S, N, d) or (N, d), by name in trace order, as the model sees them.

        Discrete sites, which are summed out, have none.
        """
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
        coordinates = Coordinates(self._places, self._layout, num_samples, None)
        self._run_with(coordinates, {**self._subsamples, **values}, num_samples)
        return coordinates.concatenated(), coordinates.log_det

    @torch.no_grad()
    def sample_prior(self, num_samples: int) -> Tensor:
        """Draws from the prior, u (S, N, d)."""
        check_count(num_samples, "num_samples")
        return torch.cat([self._draw_prior(count) for count in self._counts(num_samples)])

    @torch.no_grad()
    def _check_masked(self) -> None:
        """Check that nothing depends on what is masked, by trial at draws of the prior.

        Raises:
            ValueError: If the density of a site changes with latents that are masked.
        """
        with random_state(None):
            first, second = (Coordinates(self._places, self._layout, 1, None) for _ in range(2))
            for coordinates in (first, second):
                self._run_with(coordinates, self._subsamples, 1)
            masked = first.masked()
            if masked is None:
                return
            u = first.concatenated()
            draws = [self._at(at) for at in (u, torch.where(masked, second.concatenated(), u))]
        for name, site in draws[0].items():
            if not torch.allclose(site, draws[1][name], equal_nan=True):
                raise ValueError(
                    f"expected no site that depends on a masked latent, got a density of {name!r} that changes with one"
                )

    def _at(self, u: Tensor) -> dict[str, Tensor]:
        with random_state(0):  # discrete sites are drawn, and drawn the same
            draw = self._run_with(Coordinates(self._places, self._layout, 1, u), self._subsamples, 1)
        return {name: masked_log_prob(site) for name, site in draw.model_sites.items()}

    def _draw_prior(self, num_samples: int) -> Tensor:
        coordinates = Coordinates(self._places, self._layout, num_samples, None)
        self._run_with(coordinates, self._subsamples, num_samples)
        return coordinates.concatenated()

    @torch.no_grad()
    def probe(self) -> Draw:
        """One run of the model at latents of the prior, which leaves the random state as it was."""
        with random_state(None):
            return self._run_with(Coordinates(self._places, self._layout, 1, None), self._subsamples, 1)

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

    def _run(self, u: Tensor) -> tuple[Draw, Coordinates]:
        if u.dim() not in (2, 3) or u.shape[-2:] != (self.num_data, self.dim):
            raise ValueError(f"expected u of shape (S, {self.num_data}, {self.dim}), got {tuple(u.shape)}")
        samples = u.unsqueeze(0) if u.dim() == 2 else u
        self._cost[0] += len(samples) * self.num_data
        coordinates = Coordinates(self._places, self._layout, len(samples), samples)
        try:
            return self._run_with(coordinates, self._subsamples, len(samples), summed=True), coordinates
        except RuntimeError as error:
            if samples.dtype == self.dtype:
                raise
            raise ValueError(
                f"expected a model in {samples.dtype}, got one with latents of {self.dtype} that takes no other: call "
                ".double() on its networks and data (a function's networks cannot be converted from outside)"
            ) from error

    def _run_with(
        self, coordinates: Coordinates, values: Mapping[str, Tensor], num_samples: int, *, summed: bool = False
    ) -> Draw:
        """A run of the model, with its discrete sites summed out, or drawn where coordinates are recorded."""
        depth, call = self._layout.depth if num_samples > 1 else None, self._call
        enumeration = Enumeration(self._summed, -self._layout.depth - 2) if summed and self._summed else None
        with isolated(), coordinates:
            run = run_program(call.model, call.args, call.kwargs, values, num_samples, depth, enumeration)
        return self._draw(run.sites, num_samples)

    def _draw(self, sites: Mapping[str, Site], num_samples: int) -> Draw:
        kept = {name: site for name, site in sites.items() if name not in self._dropped}
        return Draw(self._layout, num_samples, kept, {}, self._subsamples, self._call)
