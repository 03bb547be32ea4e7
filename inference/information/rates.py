r"""Rate and distortion of any pair on any data: where it lies in the plane of "Fixing a Broken ELBO".

.. math::
    D = -E \log p(x \mid z), \quad R = E\, KL(q(z \mid x) \,\|\, p(z)), \quad
    H - D \le I_q(x; z) \le R, \quad D + R = -ELBO \ge H

with H the entropy of the data and expectations over data and guide. The left side needs H, which discrete data have
(:func:`empirical_entropy`) and a finite set of real vectors has not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.core.display import Result
from inference.core.estimates import Estimate, Interval, check_level
from inference.core.memory import at_once, joined
from inference.core.protocols import SupportsExpectedLogLikelihood
from inference.core.ranks import ranks
from inference.core.seeding import seeded
from inference.core.sources import opened
from inference.distributions.gaussian import as_full_normal
from inference.objectives.analytic import AnalyticELBO
from inference.objectives.evidence_lower_bound import closed_form_kl
from inference.pair.call import Call
from inference.pair.draw import Draw
from inference.pair.handlers import apply_mask
from inference.pair.rows import row_blocks
from inference.pair.run import Program
from inference.weights.importance_weights import samples_at_once

# Rows that are run at once where there are more.
_ROWS = 4096


@dataclass(frozen=True, kw_only=True, repr=False)
class RateDistortion(Result):
    """Rate and distortion per data point, in nats, with their Monte Carlo errors.

    Attributes:
        rates: KL(q(z | x_n) || p(z)), (N,) float64 each; standard error zero where it is in closed form.
        distortions: -E_q log p(x_n | z), (N,).
        totals: Their sum, minus the ELBO, (N,), with the standard error of the sum.
        level: Confidence level of the intervals.
    """

    rates: Estimate
    distortions: Estimate
    totals: Estimate
    level: float

    @property
    def rate(self) -> Interval:
        """R, the mean over these data; its interval is for the Monte Carlo error alone."""
        return _mean(self.rates, self.level)

    @property
    def distortion(self) -> Interval:
        """D, the mean over these data; its interval is for the Monte Carlo error alone."""
        return _mean(self.distortions, self.level)

    @property
    def total(self) -> Interval:
        """R + D, minus the ELBO: at least H."""
        return _mean(self.totals, self.level)

    def sandwich(self, entropy: float) -> tuple[float, float]:
        """H - D and R, between which the mutual information of data and latent lies.

        Args:
            entropy: H of the data in nats per data point, for example from :func:`empirical_entropy`.
        """
        return entropy - self.distortion.value, self.rate.value


@torch.no_grad()
def rate_distortion(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 32,
    chunk: int | None = None,
    seed: int | None = None,
    level: float = 0.95,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> RateDistortion:
    """Rate and distortion of a pair on data.

    The rate is in closed form where torch knows the KL of every latent site and there is but one, else a mean over
    draws; the distortion where the model integrates its log-likelihood over a Gaussian guide, else a mean over draws.

    Warning:
        Both depend on the parametrisation of the observations: only for discrete x is D at least zero.

    References:
        Alemi, Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018, arXiv 1711.00464.

    Args:
        model: Pyro model.
        guide: Pyro guide of the same signature.
        *args: Arguments of both.
        num_samples: S, draws per data point, at least 2.
        chunk: Draws side by side; None chooses by size, 1 runs without a particle plate (for models that cannot
            broadcast).
        seed: Seed of the draws; leaves the global random state as it was.
        level: Confidence level of the intervals.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        progress: Show a progress bar where there are several chunks.
        **kwargs: Keyword arguments of both.

    Returns:
        Terms per data point; their means are ``.rate``, ``.distortion`` and ``.total``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is not finite or has the wrong shape, model and guide are not a valid pair (see
            :meth:`inference.pair.call.Call.run`), or a site is scaled.

    Example:
        >>> from guides import TiedMeanField
        >>> from zoo import LinearVAE
        >>> model, x = LinearVAE(5, 2).double(), torch.randn(9, 5).double()
        >>> result = rate_distortion(model, TiedMeanField(model), x)
        >>> bool(-result.total.value <= model.log_evidence(x).mean())
        True
    """
    check_count(num_samples, "num_samples", minimum=2)
    if chunk is not None:
        check_count(chunk, "chunk")
    check_level(level)
    call = Call(model, guide, opened(args), kwargs, plate, whole=whole, missing=missing)
    call.check()
    with refuse_batch_dependence(model, guide):
        blocks = row_blocks(call, at_once(_ROWS))
    with seeded(ranks().agreed(seed)):
        parts = (_of_block(block, num_samples, chunk, progress and len(blocks) == 1) for block in blocks)
        rates, distortions, totals = joined(parts, blocks.number)
    return RateDistortion(rates=rates, distortions=distortions, totals=totals, level=level)


def _of_block(call: Call, num_samples: int, chunk: int | None, progress: bool) -> tuple[Estimate, Estimate, Estimate]:
    """Rates, distortions and their sums of some rows."""
    assert call.guide is not None
    with refuse_batch_dependence(*call.programs):
        first = call.probe_density()
    if _is_exact(call.model, first):
        total = -AnalyticELBO().per_datum(call.model, call.guide, *call.args, **call.kwargs).double()
        rate = _rates(first)[0]
        return tuple(Estimate(t, torch.zeros_like(t)) for t in (rate, total - rate, total))  # type: ignore[return-value]
    chunk = samples_at_once(first) if chunk is None else chunk
    starts = range(0, num_samples, chunk)
    terms = []
    for start in tqdm(starts, disable=not progress or len(starts) == 1, desc="rate, distortion", unit="chunk"):
        size = min(chunk, num_samples - start)
        draw = call.run(size, values=first.subsamples)
        terms.append(torch.stack([_rates(draw), -draw.total(draw.model_sites, observed=True).double()]))
    rate, distortion = torch.cat(terms, 1)
    return _estimate(rate), _estimate(distortion), _estimate(rate + distortion)


def empirical_entropy(x: Tensor) -> float:
    r"""Entropy of the empirical distribution of the rows of discrete data, in nats; equal rows count as one outcome.

    .. math:: H = -\sum_r \frac{c_r}{N} \log \frac{c_r}{N} \le \log N

    Warning:
        It is that of the N data points themselves, the distribution that training minimises over; the entropy of the
        distribution they come from is larger, and for real-valued data it means nothing.

    Args:
        x: Data, (N, D).

    Raises:
        ValueError: If there is no row.

    Example:
        >>> math.isclose(empirical_entropy(torch.tensor([[0.0, 1.0], [1.0, 1.0]])), math.log(2))
        True
    """
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"expected at least one row of data (N, D), got shape {tuple(x.shape)}")
    share = torch.unique(x, dim=0, return_counts=True)[1].double() / len(x)
    return float(-(share * share.log()).sum())


def _is_exact(model: Program, draw: Draw) -> bool:
    distributions = [draw.guide_sites[name].fn for name in draw.latents]
    return (
        isinstance(model, SupportsExpectedLogLikelihood)
        and len(distributions) == 1
        and as_full_normal(distributions[0]) is not None
        and all(site.mask is None for site in draw.model_sites.values())
    )


def _rates(draw: Draw) -> Tensor:
    """KL of the one latent site where torch knows it, else log q(z | x) - log p(z) of each draw, (S, N)."""
    names = list(draw.latents)
    q, p = draw.guide_sites[names[0]], draw.model_sites[names[0]]
    if len(names) == 1 and q.mask is p.mask:
        try:
            return draw.term(q, apply_mask(closed_form_kl(q.fn, p.fn), q.mask)).double()
        except NotImplementedError:
            pass
    return (draw.log_guide - draw.total(draw.model_sites, observed=False)).double()


def _estimate(terms: Tensor) -> Estimate:
    return Estimate(terms.mean(0), terms.std(0) / math.sqrt(len(terms)))


def _mean(estimate: Estimate, level: float) -> Interval:
    value, error = float(estimate.value.mean()), float(estimate.standard_error.square().sum().sqrt())
    error = error / len(estimate.value)
    width = error * float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    return Interval(value, value - width, value + width, error)
