r"""Importance weights of several guides of one model: each guide's own, and those of all as draws of their mixture.

.. math:: \log \hat p(x_n) = \log \frac1{GS} \sum_g \sum_s
    \frac{p(x_n, z_{gsn})}{\frac1G \sum_h q_h(z_{gsn} \mid x_n)}, \quad z_{gsn} \sim q_g(z \mid x_n)

The balance heuristic (Veach, Guibas, 1995): a guide that misses the posterior costs draws, but spoils no weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from inference.comparison.guide_density import guide_log_prob
from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_log_weights
from inference.core.seeding import random_state
from inference.marginal_likelihood.base.intervals import evidence_from_weights, from_narrow_guide, replace_estimate
from inference.marginal_likelihood.base.result import Evidence
from inference.marginal_likelihood.importance.defensive_mixture import check_same
from inference.pair.call import Call
from inference.pair.draw import Draw
from inference.weights.importance_weights import samples_at_once
from inference.weights.summary import WeightSummary, merge, stratified, summarise

BALANCED = "balance heuristic"

# Draws at which a guide's density is compared with itself.
_COMPARED = 8


class Pooled(NamedTuple):
    """Weights of several guides of one model, by the guide's name.

    Attributes:
        own: Summary of each guide's own weights.
        balanced: Summary of its draws' weights as draws of the mixture; empty unless there are two guides in it.
        left_out: Guides whose density cannot be evaluated at other draws than their own.
        narrow: Of guides that have no density on part of the support of some latents, these.
    """

    own: dict[str, WeightSummary]
    balanced: dict[str, WeightSummary]
    left_out: tuple[str, ...]
    narrow: dict[str, list[str]]

    @property
    def best(self) -> str:
        """The guide with the highest ELBO over the data."""
        return max(self.own, key=lambda name: float(self.own[name].elbo.value.mean().nan_to_num(nan=-math.inf)))

    @property
    def mixed(self) -> list[str]:
        """The guides whose weights give the evidence."""
        return list(self.balanced) or [self.best]

    def evidence(self, level: float) -> Evidence:
        """Evidence from the mixture's weights, or from those of the best guide where there is no mixture."""
        if not self.balanced:
            method = f"importance from {self.best!r}" if self.left_out else "importance"
            found = evidence_from_weights(self.own[self.best], level, method=method)
            return from_narrow_guide(found, self.narrow[self.best])
        method = BALANCED + (f" without {', '.join(map(repr, self.left_out))}" if self.left_out else "")
        strata = list(self.balanced.values())
        whole = strata[0]
        for other in strata[1:]:
            whole = merge(whole, other)
        least = min((self.narrow[name] for name in self.balanced), key=len)  # a mixture has the widest one's support
        plain = from_narrow_guide(evidence_from_weights(whole, level), least)
        return replace_estimate(plain, *stratified(*strata), method=method)


@torch.no_grad()
def pooled_weights(calls: Mapping[str, Call], num_samples: int, chunk: int | None) -> Pooled:
    """Draw from each guide of one model, and weight each draw by that guide and by the mixture of all.

    A guide that is given under several names is one guide: it is measured once, and counts once in the mixture.

    Args:
        calls: Guide's name to its call; the model and the arguments are the same in all.
        num_samples: S, samples per data point and guide.
        chunk: See :func:`inference.iter_log_weights`.

    Raises:
        ValueError: If model and guide are not a valid pair.
        FloatingPointError: If a weight is NaN or plus infinity.
    """
    names = {id(call.guide): name for name, call in reversed(list(calls.items()))}
    distinct = {name: call for name, call in calls.items() if names[id(call.guide)] == name}
    found = _of_distinct(distinct, num_samples, chunk)
    same = {name: names[id(call.guide)] for name, call in calls.items()}
    own = {name: found.own[first] for name, first in same.items()}
    return found._replace(own=own, narrow={name: found.narrow[first] for name, first in same.items()})


def _of_distinct(calls: Mapping[str, Call], num_samples: int, chunk: int | None) -> Pooled:
    """:func:`pooled_weights` of guides of which no two are the same object."""
    with refuse_batch_dependence(*(program for call in calls.values() for program in call.programs)):
        first = {name: call.probe_density() for name, call in calls.items()}
    for draw in first.values():
        draw.layout.refuse_subsampling()
    mixed = _mixable(calls, first) if len(calls) > 1 else {}
    own, balanced = {}, {}
    for name, call in calls.items():
        parts = _columns(call, first[name], list(mixed.values()) if name in mixed else [], num_samples, chunk)
        summary = summarise(parts, num_samples)
        own[name] = _part(summary, slice(None, first[name].layout.num_data))
        if name in mixed:
            balanced[name] = _part(summary, slice(first[name].layout.num_data, None))
    left_out = tuple(name for name in calls if name not in mixed) if len(calls) > 1 else ()
    return Pooled(own, balanced, left_out, {name: draw.narrow for name, draw in first.items()})


def _mixable(calls: Mapping[str, Call], first: Mapping[str, Draw]) -> dict[str, Call]:
    """The guides whose density is known at any draw, and whose latents and plates are laid out like the first's."""
    found = {name: call for name, call in calls.items() if _has_density(call, first[name])}
    forms = {name: _form(first[name]) for name in found}
    found = {name: call for name, call in found.items() if forms[name] == next(iter(forms.values()))}
    return found if len(found) > 1 else {}


def _form(draw: Draw) -> object:
    return draw.layout.dim, draw.layout.depth, draw.layout.plate_scale, set(draw.latents)


def _has_density(call: Call, first: Draw) -> bool:
    """Whether the guide's density at given latents is that with which it drew them."""
    with random_state(None):
        draw = call.run(min(_COMPARED, samples_at_once(first)), values=first.subsamples)
        try:
            check_same(draw.total(draw.guide_sites, observed=False), _log_density(call, draw))
        except (ValueError, NotImplementedError):
            return False
    return True


def _log_density(call: Call, draw: Draw) -> Tensor:
    """Log-density of a call's guide at the latents of a draw, (S, N) in nats."""
    return guide_log_prob(call, draw.layout, {**draw.latents, **draw.subsamples}, draw.num_samples)


def _columns(call: Call, first: Draw, mixed: list[Call], num_samples: int, chunk: int | None) -> Iterator[Tensor]:
    """Chunks of a guide's own log weights (S', N), and beside them those in the mixture where it is part of one."""
    chunk = samples_at_once(first) if chunk is None else chunk
    for start in range(0, num_samples, chunk):
        draw = call.run(min(chunk, num_samples - start), values=first.subsamples)
        columns = [draw.log_weights]
        if mixed:
            densities = torch.stack([_log_density(other, draw) for other in mixed])
            columns.append(draw.total(draw.model_sites) - densities.logsumexp(0) + math.log(len(mixed)))
        for column in columns:
            check_log_weights(column)
        yield torch.cat(columns, -1)


def _part(summary: WeightSummary, columns: slice) -> WeightSummary:
    """The summary of some of the data points."""
    kept = {name: getattr(summary, name)[..., columns] for name in ("mean", "squares", "log_sums", "top")}
    return replace(summary, **kept)
