"""Draws of a pair in ArviZ's groups, for its plots, summaries and leave-one-out cross-validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.checks import check_count
from inference.core.seeding import random_state, seeded
from inference.marginal_likelihood.base.result import Evidence
from inference.pair.call import Call
from inference.pair.draw import DATA_PLATE, Draw
from inference.pair.handlers import RecordSites, Site, isolated, masked_log_prob
from inference.pair.run import Program, run_program
from inference.pair.simulated import simulated_values
from inference.weights.summary import pareto_k

Group = dict[str, Any]

# Share of a number within which its copies are spread: ArviZ fits no tail to equal ones.
_SPREAD = 1e-9


@torch.no_grad()
def to_arviz(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1000,
    known: Evidence | None = None,
    plate: str | None = None,
    missing: bool = False,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Draws of a trained pair as ArviZ takes them: ``az.summary``, ``az.loo``, ``az.compare``, ``az.plot_...``.

    The groups are ``posterior`` (the guide's draws, with one chain), ``log_likelihood``, ``sample_stats`` with the log
    joint density ``lp``, the guide's log density ``log_q`` and k-hat of their difference, ``pareto_k``, the same
    at all draws; ``posterior_predictive``, ``prior``, ``prior_predictive`` and ``observed_data``.

    Latents are either of all data points (global, outside of the plate over the data): then ``log_likelihood`` is that
    of each data point given them. Or each data point has its own: then the group is there only where the evidence
    is ``known``, whose value log p(x_n) it holds at every draw, spread over a billionth of it. The likelihood given a
    data point's own latent is no density of data left out, and cross-validation with it is wrong, even with the exact
    posterior.

    Warning:
        ``az.loo`` takes the guide's draws for the posterior's. See ``pareto_k`` first, and :func:`inference.evidence`.

    References:
        Vehtari, Gelman, Gabry, "Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC",
        2017, arXiv 1507.04544.

    Args:
        model: Pyro model.
        guide: Pyro guide, also an AutoGuide.
        *args: Arguments of both, the data first.
        num_samples: S, draws of each group.
        known: The evidence of the same data, where each data point has its own latents.
        plate: Name of the plate over the data, ``"data"`` if None.
        missing: See :func:`inference.iter_log_weights`.
        seed: Seed of the draws; leaves the global random state as it was.
        progress: Show a progress bar, where the latents are global.
        **kwargs: Keyword arguments of both.

    Returns:
        ``arviz.InferenceData`` up to ArviZ 0.2x, ``xarray.DataTree`` from 1.0 on.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If some latents are global and others are not, a site is scaled or subsampled, or the known evidence
            has no upper end, is that of other data, or is not asked for.
    """
    check_count(num_samples, "num_samples")
    call = Call(model, guide, args, kwargs, plate, missing=missing)
    call.check()
    with seeded(seed):
        if _is_global(call):
            if known is not None:
                raise ValueError("expected no evidence per data point for global latents, got some")
            return _inference_data(_of_global(call, num_samples, progress))
        return _inference_data(_per_datum(call, num_samples, known))


def _inference_data(groups: Mapping[str, Group]) -> Any:
    """ArviZ's container, on both of its lines."""
    import arviz as az  # here, as it takes a second

    arrays = {name: {k: np.asarray(v.cpu()) for k, v in group.items()} for name, group in groups.items() if group}
    return az.from_dict(arrays) if int(az.__version__.split(".")[0]) >= 1 else az.from_dict(**arrays)


def _is_global(call: Call) -> bool:
    """Whether no latent stands in the plate over the data.

    Raises:
        ValueError: If some do and some do not.
    """
    with random_state(None), isolated():
        sites = run_program(call.model, call.args, call.kwargs, None, 1, None).sites
    plate = DATA_PLATE if call.plate is None else call.plate
    inside = {name: any(f.name == plate for f in s.frames) for name, s in sites.items() if not s.is_observed}
    if len(set(inside.values())) == 2:
        raise ValueError(f"expected all latents inside the plate {plate!r} or all outside, got (name: inside) {inside}")
    return not any(inside.values())


# --- each data point has latents of its own --------------------------------------------------------------------------


def _per_datum(call: Call, num_samples: int, known: Evidence | None) -> dict[str, Group]:
    draw = call.run(num_samples)
    log_weights = draw.log_weights
    if num_samples == 1:
        raise ValueError("expected num_samples above 1 for data points with latents of their own, got 1")
    posterior = simulated_values(call, {**draw.latents, **draw.subsamples}, num_samples)
    prior = simulated_values(call, draw.subsamples, num_samples)
    observed = {name: site.value for name, site in draw.model_sites.items() if site.is_observed}
    stats = {"lp": draw.log_joint, "log_q": draw.log_guide}
    stats["pareto_k"] = pareto_k(log_weights).value.expand(num_samples, -1)
    return _groups(posterior, prior, observed, stats, {} if known is None else _marginal(draw, known))


def _marginal(draw: Draw, known: Evidence) -> Group:
    """log p(x_n) at every draw, within rounding, under the name of what is observed."""
    if len(known.value) != draw.layout.num_data:
        raise ValueError(f"expected the evidence of {draw.layout.num_data} data points, got that of {len(known.value)}")
    if not bool(known.bounded.all()):
        raise ValueError(
            f"expected evidence with upper ends, got {int((~known.bounded).sum())} data points without one"
        )
    (name, *_) = [name for name, site in draw.model_sites.items() if site.is_observed]
    spread = torch.linspace(-_SPREAD, _SPREAD, draw.num_samples, dtype=known.value.dtype)[:, None]
    return {name: known.value + spread * known.value.abs().clamp(min=1.0)}


# --- latents of all data points at once ------------------------------------------------------------------------------


def _of_global(call: Call, num_samples: int, progress: bool) -> dict[str, Group]:
    rows: dict[str, list[Group]] = {"posterior": [], "prior": [], "stats": [], "likelihood": []}
    observed: Group = {}
    for _ in tqdm(range(num_samples), disable=not progress, desc="arviz", unit="draw"):
        with isolated():
            assert call.guide is not None
            drawn = run_program(call.guide, call.args, call.kwargs, None, 1, None)
            latents = {name: site.value for name, site in drawn.drawn.items() if not site.is_auxiliary}
            run = run_program(call.model, call.args, call.kwargs, latents, 1, None)
        _check_sites(run, latents)
        seen = {name: site for name, site in run.sites.items() if site.is_observed}
        observed = {name: site.value for name, site in seen.items()}
        rows["likelihood"].append({name: masked_log_prob(site) for name, site in seen.items()})
        rows["stats"].append({"lp": _total(run.sites), "log_q": _total(drawn.drawn)})
        rows["posterior"].append(simulated_values(call, latents))
        rows["prior"].append(simulated_values(call))
    stacked = {name: _stack(part) for name, part in rows.items()}
    stats = stacked["stats"]
    difference = (stats["lp"] - stats["log_q"]).unsqueeze(-1)
    stats["pareto_k"] = pareto_k(difference).value.expand(num_samples)
    return _groups(stacked["posterior"], stacked["prior"], observed, stats, stacked["likelihood"])


def _check_sites(run: RecordSites, latents: Group) -> None:
    """Refuse what makes one draw's log-likelihood no sum over the data points."""
    for name, site in run.sites.items():
        if bool(torch.as_tensor(site.scale != 1.0).any()):
            raise ValueError(f"expected site {name!r} without poutine.scale and without subsampling, got {site.scale}")
    missing = [name for name, site in run.sites.items() if not site.is_observed and name not in latents]
    if missing:
        raise ValueError(f"expected the guide to sample the model's latent sites, got none of {missing}")


def _total(sites: Mapping[str, Site]) -> Tensor:
    """Sum of all log-probabilities; of an AutoGuide's sites, the log-Jacobians among them, log q."""
    return torch.stack([masked_log_prob(site).sum() for site in sites.values()]).sum()


def _stack(rows: list[Group]) -> Group:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def _groups(posterior: Group, prior: Group, observed: Group, stats: Group, likelihood: Group) -> dict[str, Group]:
    """ArviZ's groups, each with one chain."""
    split = {
        "posterior": {name: v for name, v in posterior.items() if name not in observed},
        "posterior_predictive": {name: v for name, v in posterior.items() if name in observed},
        "prior": {name: v for name, v in prior.items() if name not in observed},
        "prior_predictive": {name: v for name, v in prior.items() if name in observed},
        "sample_stats": stats,
        "log_likelihood": likelihood,
    }
    chained = {group: {name: v.unsqueeze(0) for name, v in values.items()} for group, values in split.items()}
    return chained | {"observed_data": observed}
