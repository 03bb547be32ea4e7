r"""Simulation of data with known latents, and of a guide's draws given them, for calibration tests.

.. math:: z^*_n \sim p(z), \quad x^*_n \sim p(x \mid z^*_n), \quad z_{sn} \sim q(z \mid x^*_n)

Where the guide is the posterior, truth and draws are exchangeable given the data. :func:`inference.sbc`,
:func:`inference.tarp` and :func:`inference.c2st_joint` each look for a way in which they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm.auto import tqdm

from inference.calibration.simulation import Simulation, join
from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.core.memory import at_once
from inference.core.ranks import ranks
from inference.core.seeding import seeded
from inference.pair.call import Call
from inference.pair.draw import Draw, Layout, flatten, labels
from inference.pair.handlers import Site
from inference.pair.improper import latent_mask
from inference.pair.run import Program
from inference.pair.simulated import observed_arguments, replay, where_seen, with_simulated_data
from inference.posterior.log_joint import LogJoint
from inference.posterior.prediction import sample

Quantity = Callable[[Mapping[str, Tensor]], Tensor]
LOG_LIKELIHOOD = "log_likelihood"

# Elements of the largest site in one run of the pair: 32 MB in float64.
_CHUNK_ELEMENTS = 2**22


@torch.no_grad()
def simulate(
    model: Program,
    guide: Program,
    *args: Any,
    num_simulations: int = 4000,
    num_samples: int = 99,
    quantities: Mapping[str, Quantity] | None = None,
    chunk: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    refit: Callable[..., Program] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Simulation:
    r"""Simulate data from a model, and draw latents from its guide given those data.

    .. math:: z^*_n \sim p(z), \quad x^*_n \sim p(x \mid z^*_n), \quad z_{sn} \sim q(z \mid x^*_n)

    Next to every latent coordinate, the log-likelihood log p(x*_n | z) is kept as a test quantity: coordinates alone
    cannot show whether a guide's correlations are right, and the log-likelihood detects a guide that ignores the data.

    What is masked, as beyond the end of a short sequence, counts for nothing: observations keep their values there, and
    latents are zero in truth and draws, so that their ranks are uniform whatever the guide.

    Warning:
        The guide is tested on data as the *model* makes them. On data that the model does not describe it may be
        worse. The distribution of an observation may depend on the argument that it replaces by its shape alone, and by
        where it is masked. The result holds S N P numbers.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman, "Validating Bayesian Inference Algorithms with Simulation-Based
        Calibration", 2018, arXiv 1804.06788.
        Yao, Vehtari, Simpson, Gelman, "Yes, but Did It Work?: Evaluating Variational Inference", 2018, arXiv
        1802.02538.
        Modrak, Moon, Kim, Buerkner, Huurre, Faltejskova, Gelman, Vehtari, "Simulation-Based Calibration Checking for
        Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity", 2022, arXiv 2211.02383.

    Args:
        model: Pyro model; what it observes must be arguments or views of them, ``obs=x`` or ``obs=x.reshape(...)``.
        guide: Pyro guide.
        *args: Arguments of both, such as data (B, D). Those that the model observes are replaced by simulated ones of
            their shape, again and again, B data points at a time; all others, such as covariates, stay the same.
        num_simulations: N.
        num_samples: S, draws per data point. One less than a multiple of 20, such as 99, makes for even histograms.
        quantities: Further test quantities by name: functions of the values of all sites by name, each (..., B) and
            its event, that return one number per data point, (..., B).
        chunk: Draws made side by side; None chooses by size, 1 runs without a particle plate.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: Take all data as one data point, whatever the plates: each simulation is then a whole data set.
        missing: See :func:`inference.iter_log_weights`; values that are missing are so in the simulated data.
        refit: Called with the arguments that hold a round's simulated data; returns the guide that has been fitted to
            them, of which the draws are taken: for guides without an encoder, such as AutoGuides (Yao et al. 2018).
        seed: Seed; leaves the global random state as it was.
        progress: Whether to show a progress bar.
        **kwargs: Keyword arguments of both.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If model and guide are not a valid pair (see :meth:`inference.pair.call.Call.run`), the model
            observes nothing or what is not an argument, a site is scaled, a latent is masked in one half alone, or
            something depends on one that is masked; or if an AutoGuide, which knows nothing of other data, is not
            refitted.

    Example:
        >>> from guides import Exact
        >>> from zoo import LinearVAE
        >>> model = LinearVAE(5, 2)
        >>> simulation = simulate(model, Exact(model), torch.zeros(50, 5), num_simulations=100, progress=False)
        >>> simulation.names, tuple(simulation.draws.shape)
        (('z[0]', 'z[1]'), (99, 100, 2))
    """
    check_count(num_simulations, "num_simulations")
    check_count(num_samples, "num_samples")
    if chunk is not None:
        check_count(chunk, "chunk")
    call = Call(model, guide, args, kwargs, plate, whole=whole, missing=missing)
    call.check()
    if isinstance(guide, AutoGuide) and refit is None:
        raise ValueError(f"expected refit= to fit {type(guide).__name__} to each simulated data set, got none")
    extra = {} if quantities is None else dict(quantities)
    if LOG_LIKELIHOOD in extra:
        raise ValueError(f"expected quantities of other names than {LOG_LIKELIHOOD!r}, got {list(extra)}")
    with seeded(ranks().agreed(seed)):
        with refuse_batch_dependence(model, guide):
            first = call.probe()
        _check_sites(first)
        layout = first.layout
        chunk = at_once(_CHUNK_ELEMENTS, layout.numel * layout.num_data) if chunk is None else chunk
        sizes = [min(chunk, num_samples - start) for start in range(0, num_samples, chunk)]
        rounds = tqdm(range(-(-num_simulations // layout.num_data)), desc="simulate", disable=not progress)
        parts: list[Simulation] = []
        for _ in rounds:
            values = sample(model, *args, **kwargs)
            new = with_simulated_data(call, first.model_sites, values)
            if refit is not None:
                with torch.enable_grad():
                    new = replace(new, guide=refit(*new.args, **new.kwargs))
            latents = {name: values[name] for name in first.latents}
            with refuse_batch_dependence(*new.programs):
                truth = replay(replace(new, guide=None), layout, latents)
                runs = [new.run(s) for s in sizes]
            if not parts:
                _check_observes(first, truth, values)
            parts.append(_read(first, truth, runs, extra))
    return join(parts, num_simulations)


def _check_sites(first: Draw) -> None:
    """Check that the pair can be simulated: observed data are arguments, no term is scaled, masked latents are idle."""
    call = first.call
    for half, sites in (
        ("model", first.model_sites),
        ("guide", {name: first.guide_sites[name] for name in first.latents}),
    ):
        for name, site in sites.items():
            if not bool((torch.as_tensor(site.scale) == 1).all()):
                raise ValueError(f"expected {half} site {name!r} under no scale or subsampling, got {site.scale}")
    observed_arguments(first.model_sites, [*call.args, *call.kwargs.values()], missing=call.missing)
    first.check_latents()
    first.check_determined()
    latents = [first.model_sites[name] for name in first.latents]
    if any(latent_mask(site.fn, site.mask) is not None for site in latents):
        LogJoint.of(call)  # which checks that nothing depends on them


def _check_observes(first: Draw, truth: Draw, values: Mapping[str, Tensor]) -> None:
    """Check that the model observes what was simulated, and not the data that it was first called with.

    Raises:
        ValueError: If not; the message names the site.
    """
    for name, site in first.model_sites.items():
        old, new = site.value, truth.model_sites[name].value
        same = site.is_observed and torch.equal(old.nan_to_num(), new.nan_to_num())
        if same and not torch.equal(old, where_seen(site, values[name])):
            raise ValueError(
                f"expected a model that observes its argument at site {name!r}, got one that holds other data, by "
                "pyro.condition or obs= of an enclosing variable: give it obs=x of its own argument x"
            )


def _read(first: Draw, truth: Draw, runs: Sequence[Draw], extra: Mapping[str, Quantity]) -> Simulation:
    """One round of simulated data as a result."""
    names, layout = list(first.latents), first.layout
    latents = [torch.cat([flatten(layout, r.model_sites[n], r.num_samples) for r in runs]) for n in names]
    truths = [flatten(layout, truth.model_sites[n], 1)[0] for n in names]
    kept = [_kept(layout, truth.model_sites[n]) for n in names]
    latents, truths = ([torch.where(k, v, 0.0) for k, v in zip(kept, values)] for values in (latents, truths))
    observed = [site for site in truth.model_sites.values() if site.is_observed]
    data = torch.cat([flatten(layout, site, 1)[0] for site in observed], -1)
    terms: dict[str, Callable[[Draw], Tensor]] = {LOG_LIKELIHOOD: lambda run: run.total(run.model_sites, observed=True)}
    terms |= {name: partial(_evaluate, name, f) for name, f in extra.items()}
    quantities = {name: (f(truth)[0], torch.cat([f(r) for r in runs])) for name, f in terms.items()}
    return Simulation(
        names=labels(first), truth=torch.cat(truths, -1), draws=torch.cat(latents, -1), data=data, quantities=quantities
    )


def _kept(layout: Layout, site: Site) -> Tensor:
    """Where the coordinates of a site are not masked, (N, coordinates)."""
    mask = latent_mask(site.fn, site.mask)
    everywhere = torch.ones_like(site.value, dtype=torch.bool)
    return flatten(layout, site._replace(value=everywhere if mask is None else everywhere & mask), 1)[0]


def _evaluate(name: str, quantity: Quantity, run: Draw) -> Tensor:
    """A test quantity per draw and data point, (S, N)."""
    value, layout = quantity({n: site.value for n, site in run.model_sites.items()}), run.layout
    if not isinstance(value, Tensor) or not -layout.dim <= value.dim() <= layout.depth + 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"expected quantity {name!r} of shape (..., {layout.num_data}), one number per data point, got {got}"
        )
    return layout.per_datum(value, run.num_samples)
