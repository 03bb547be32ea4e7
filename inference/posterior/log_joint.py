r"""The log joint density of any Pyro model as a function of its latents, per data point.

.. math:: u_n \mapsto \log p(x_n, T(u_n)) + \log |\det T'(u_n)|, \quad u_n \in R^d

T takes unconstrained numbers to the support of each latent site, in trace order. Every sampler, integrator and
optimiser over a posterior is written against this one function.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.core.memory import at_once
from inference.core.seeding import random_state
from inference.pair.call import Call
from inference.pair.draw import Draw, layout_of
from inference.pair.enumeration import Enumeration, is_summable, summed_out
from inference.pair.handlers import Site, check_same_sites, isolated, masked_log_prob
from inference.pair.improper import is_delta, latent_mask
from inference.pair.manners import FAILURES, candidates, check_equal, warn_once
from inference.pair.rows import RowsNotFollowed, as_stated, with_known_rows
from inference.pair.run import NO_SITES, Program, run_program
from inference.pair.samples import AsRows, Manner, Mapped, OneByOne, SideBySide, Single
from inference.pair.unobserved import unobserved, without_children
from inference.posterior.placing import Coordinates, places_of

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
        rows: Positions and names of the arguments with one row per data point, see :func:`inference.evidence`.
        **kwargs: Its keyword arguments.

    Attributes:
        dim: d, unconstrained coordinates per data point.
        num_data: N.
        observes: Whether the model observes anything.
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
        self,
        model: Program,
        *args: Any,
        plate: str | None = None,
        broadcast: bool = True,
        whole: bool = False,
        missing: bool = False,
        rows: Iterable[int | str] | None = None,
        **kwargs: Any,
    ) -> None:
        stated = as_stated(rows)
        self._prepare(Call(model, None, args, kwargs, plate, broadcast, whole, missing, stated_rows=stated))

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
        self._latents = _latent(run.sites)
        self._dropped = without_children(unobserved(run.sites), run.sites, call, run.subsamples)
        self._subsamples = run.subsamples
        self.observes = any(site.is_observed for site in run.sites.values())
        if not run.sites:
            raise ValueError(f"expected a Pyro model, got {NO_SITES}")
        self._layout = layout_of(run.sites, {}, call.plate, whole=call.whole)
        kept = self._sort_latents(run.sites)
        with random_state(None):
            self._places = places_of(kept, self._layout)
        draw = self._draw({**run.sites}, 1)
        draw.refuse_scales()
        draw.check_determined()
        values = [site.value for site in [*kept.values(), *run.sites.values()] if site.value.is_floating_point()]
        self._like = next(iter(values), torch.zeros(())).new_empty(0)
        if any(site.mask is not None or latent_mask(site.fn, site.mask) is not None for site in kept.values()):
            self._check_masked()
        if call.missing and bool(draw.log_joint.isnan().any()):
            raise ValueError("expected a model that masks missing values, got a log joint density of NaN")

    def _sort_latents(self, sites: Mapping[str, Site]) -> dict[str, Site]:
        """The latent sites that have coordinates; those that are summed out are noted, those that are dropped left."""
        latents = {name: s for name, s in sites.items() if not (s.is_observed or is_delta(s.fn))}
        if not latents:
            raise ValueError("expected a model with a latent site, got only observed ones")
        kept = {name: site for name, site in latents.items() if name not in self._dropped}
        self._summed = frozenset(name for name, site in kept.items() if is_summable(site))
        return {name: site for name, site in kept.items() if name not in self._summed}

    @property
    def dim(self) -> int:
        """Unconstrained coordinates per data point, d."""
        return sum(place.numel for place in self._places)

    @property
    def width(self) -> int:
        """Numbers per data point of the largest site, or of u: what one more sample costs."""
        return max(self.dim, self._layout.numel)

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
            return self._parts(*self._run(u))
        if isinstance(manner, AsRows):
            terms = self._repeated(len(u))._terms(u.flatten(0, 1).unsqueeze(0))
            return LogDensity(*(part.view(len(u), -1) for part in terms))
        if isinstance(manner, Mapped):
            spent, chunk = self._cost[0] + len(u) * self._layout.num_data, at_once(_MAPPED, self._layout.numel)
            with pyro.validation_enabled(False):  # which reads values
                terms = LogDensity(*torch.func.vmap(self._of_one, chunk_size=chunk)(u))
            self._cost[0] = spent  # a mapped run counts once by itself
            return terms
        each = [self._terms(sample) for sample in u.split(1)]
        return LogDensity(*(torch.cat(parts) for parts in zip(*each, strict=True)))

    def _parts(self, draw: Draw, coordinates: Coordinates) -> LogDensity:
        if not self._summed:
            prior = draw.total(draw.model_sites, observed=False) + coordinates.log_det
            return LogDensity(prior, draw.total(draw.model_sites, observed=True))
        sites = draw.model_sites
        terms = [(sites[name], term) for name, term in coordinates.terms.items()]
        latent = terms + draw.factors(site for site in sites.values() if not site.is_observed)
        every = terms + draw.factors(sites.values())
        prior, joint = (summed_out(self._layout, draw.num_samples, factors) for factors in (latent, every))
        return LogDensity(prior, joint - prior)

    def _joint_by(self, manner: Manner, u: Tensor) -> Tensor:
        terms = self._terms_by(manner, u)
        return terms.prior + terms.likelihood

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

    @property
    def broadcasts(self) -> bool:
        """Whether the model runs on several samples at once, in whichever manner; found by trial."""
        return not isinstance(self._manner, OneByOne)

    @torch.no_grad()
    def _tried(self) -> Manner:
        """The fastest manner at which two samples have the densities that they have by themselves."""
        spent = self._cost[0]
        # A trial is no part of the computation, so it must not enter the graph of a make_fx trace either.
        with random_state(None), disable_proxy_modes_tracing():
            u = torch.cat([self._draw_prior(1) for _ in range(2)])
            manner, told, error = self._first_equal(u)
        if told and self._call.broadcast:
            warn_once(self._call.model, error, told)
        self._cost[0] = spent
        return manner

    def _first_equal(self, u: Tensor) -> tuple[Manner, str, Exception | None]:
        """The first manner with the densities of samples u (S, N, d) by themselves, and why those before it fail."""
        alone = torch.cat([self._joint_by(Single(), sample) for sample in u.split(1)])
        reason: Exception | None = None
        for manner, told in candidates(self._call, self.probe()):
            try:
                check_equal(self._joint_by(manner, u), alone)
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

    def replicated(self, u: Tensor) -> Tensor | None:
        """Log-likelihoods at u (S, N, d) of observations drawn there in place of those given, (S, N) in nats.

        None where nothing is observed, or its distribution cannot be drawn from, where latents are summed out, and
        where the model does not run side by side. A ``pyro.factor`` stays as it is.
        """
        if self._chosen is not None or self._summed or not isinstance(self._manner, SideBySide):
            return None
        draw, _ = self._run(u)
        observed = {name: site for name, site in draw.model_sites.items() if site.is_observed}
        try:
            anew = {name: site._replace(value=site.fn.sample()) for name, site in observed.items()}
        except NotImplementedError:
            return None
        return draw.total(anew) if anew else None

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites at u (S, N, d) or (N, d), by name in trace order, as the model sees them.

        Discrete sites, which are summed out, have none.
        """
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
            u (S, N, d), and ``log |det T'(u)|`` (S, N) in nats.
        """
        manner = Single() if num_samples == 1 else self._manner
        if isinstance(manner, AsRows):
            joined = {name: manner.join(value) for name, value in values.items()}
            u, log_det = self._repeated(num_samples).unconstrain(joined, 1)
            return u.view(num_samples, -1, self.dim), log_det.view(num_samples, -1)
        if not isinstance(manner, Single | SideBySide):
            each = [self.unconstrain({n: v[s] for n, v in values.items()}, 1) for s in range(num_samples)]
            return torch.cat([u for u, _ in each]), torch.cat([log_det for _, log_det in each])
        coordinates = Coordinates(self._places, self._layout, num_samples, None)
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
        coordinates = Coordinates(self._places, self._layout, num_samples, None)
        self._run_with(coordinates, self._subsamples, num_samples)
        return coordinates.concatenated().to(self.dtype)

    @torch.no_grad()
    def probe(self) -> Draw:
        """One run of the model at latents of the prior, which leaves the random state as it was."""
        with random_state(None):
            return self._run_with(Coordinates(self._places, self._layout, 1, None), self._subsamples, 1)

    @torch.no_grad()
    def sample_guide(self, guide: Program, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws from a guide of the same arguments.

        Args:
            guide: Pyro guide.
            num_samples: S.

        Returns:
            u (S, N, d), and the guide's log-density of it in these coordinates, (S, N) in nats.

        Raises:
            ValueError: If model and guide are not a valid pair, see :meth:`inference.pair.call.Call.run`.
        """
        check_count(num_samples, "num_samples")
        draw = self._draw_guide(guide, num_samples)
        u, log_det = self.unconstrain(draw.latents, num_samples)
        draw.check_latents()
        return u, draw.log_guide + log_det

    @torch.no_grad()
    def draw_guide(self, guide: Program, num_samples: int) -> Tensor:
        """Draws from a guide of the same arguments, which need not have a density, u (S, N, d); NaN outside.

        Raises:
            ValueError: If model and guide are not a valid pair, see :meth:`inference.pair.call.Call.run`.
        """
        check_count(num_samples, "num_samples")
        return self.unconstrain(self._draw_guide(guide, num_samples).latents, num_samples)[0]

    @torch.no_grad()
    def draw_starts(self, guide: Program, num_samples: int) -> Tensor:
        """Draws from a guide, u (S, N, d), and from the prior where they are outside of the model's support."""
        u = self.draw_guide(guide, num_samples)
        outside = u.isnan().any(-1, keepdim=True)
        return torch.where(outside, self.sample_prior(num_samples), u) if bool(outside.any()) else u

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

    def _run(self, u: Tensor) -> tuple[Draw, Coordinates]:
        samples = u.unsqueeze(0) if u.dim() == 2 else u
        self._cost[0] += len(samples) * self._layout.num_data
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
        check_same_sites(self._latents, _latent(run.sites))
        return self._draw(run.sites, num_samples)

    def _draw(self, sites: Mapping[str, Site], num_samples: int) -> Draw:
        kept = {name: site for name, site in sites.items() if name not in self._dropped}
        return Draw(self._layout, num_samples, kept, {}, self._subsamples, self._call)

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
            draws = [self._log_probs(at) for at in (u, torch.where(masked, second.concatenated(), u))]
        for name, site in draws[0].items():
            if not torch.allclose(site, draws[1][name], equal_nan=True):
                raise ValueError(
                    f"expected no site that depends on a masked latent, got a density of {name!r} that changes with one"
                )

    def _log_probs(self, u: Tensor) -> dict[str, Tensor]:
        with random_state(0):  # discrete sites are drawn, and drawn the same
            draw = self._run_with(Coordinates(self._places, self._layout, 1, u), self._subsamples, 1)
        return {name: masked_log_prob(site) for name, site in draw.model_sites.items()}


def _latent(sites: Mapping[str, Site]) -> frozenset[str]:
    return frozenset(name for name, site in sites.items() if not site.is_observed)


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
