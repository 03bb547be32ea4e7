r"""Tests of accuracy with random points (TARP): the expected coverage of a guide's joint credible regions.

.. math:: f_n = \frac1S \#\{s : d(z_{sn}, r_n) < d(z^*_n, r_n)\}
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy
import torch
from torch import Tensor

from inference.calibration.simulation import Simulation
from inference.calibration.simulation_based_calibration import continuous, ecdf_band, rank
from inference.core.checks import check_finite
from inference.core.display import Result
from inference.core.estimates import check_level
from inference.core.ranks import ranks as processes
from inference.core.seeding import seeded

# Variance of max(U, 1/2) for U uniform: that of the area between curve and diagonal above level one half.
_AREA_VARIANCE = 5 / 192


@dataclass(frozen=True, kw_only=True, repr=False)
class TARP(Result):
    """Result of tests of accuracy with random points (TARP): expected coverage of credible regions at every level.

    Attributes:
        ranks: Draws nearer to the reference point than the truth is, (N,) int64, ties broken at random.
        levels: Credibility levels j / (S + 1), j = 0..S + 1, (S + 2,).
        coverage: Share of the data whose region of that level holds the truth, (S + 2,).
        lower: Lower end of the band in which the whole curve of the posterior lies, (S + 2,).
        upper: Upper end.
        band_level: Probability that it does.
        area: Integral of coverage less level over the levels above one half: above zero for regions too large, below
            for regions too small.
        area_p_value: Two-sided p-value of the area, by the normal approximation with its exact variance 5 / (192 N).
        deviation: Largest distance between the curve and the diagonal.
        p_value: Of the deviation, by the Kolmogorov-Smirnov test of the continuous ranks.
    """

    ranks: Tensor
    levels: Tensor
    coverage: Tensor
    lower: Tensor
    upper: Tensor
    band_level: float
    area: float
    area_p_value: float
    deviation: float
    p_value: float


def tarp(
    simulation: Simulation, *, references: Tensor | None = None, level: float = 0.95, seed: int | None = None
) -> TARP:
    r"""Tests of accuracy with random points (TARP): expected coverage of balls around random reference points.

    .. math:: C(\alpha) = P(f < \alpha), \quad
        f_n = \frac1S \#\{s : d(z_{sn}, r_n) < d(z^*_n, r_n)\}, \quad C(\alpha) = \alpha \text{ for the posterior}

    The region of level alpha is the ball around r_n that holds a share alpha of the draws; d is Euclidean, with each
    coordinate in units of its standard deviation over all draws. It sees all coordinates together, correlations
    included.

    Warning:
        C(alpha) = alpha for all reference points that may depend on the data is equivalent to the guide being the
        posterior. With points that ignore the data, as by default, it is necessary only: the prior, as a guide that
        ignores the data, passes. Pass ``references`` that are a function of ``simulation.data`` to see it.

    References:
        Lemos, Coogan, Hezaveh, Perreault-Levasseur, "Sampling-Based Accuracy Testing of Posterior Estimators for
        General Inference", 2023, arXiv 2302.03026.

    Args:
        simulation: From :func:`inference.simulate`.
        references: The points r_n, (N, P), chosen without looking at the truth of data point n; None takes the truth of
            another data point, which is a draw from the prior.
        level: Probability of the band.
        seed: Seed of the points, the ties and the continuous ranks; leaves the global random state as it was.

    Raises:
        ValueError: If the points are of the wrong shape or not finite, or None with a single data point.
    """
    check_level(level)
    truth, draws, num_samples = simulation.truth.double(), simulation.draws.double(), simulation.num_samples
    if references is None and len(truth) < 2:
        raise ValueError("expected at least two data points, or references, got one data point")
    if references is not None:
        if references.shape != truth.shape:
            raise ValueError(f"expected references of shape {tuple(truth.shape)}, got {tuple(references.shape)}")
        check_finite(references, "references")
    with seeded(processes().agreed(seed)):
        points = _other_truths(truth) if references is None else references.to(truth)
        scale = draws.flatten(0, 1).std(0) if draws.shape[0] * draws.shape[1] > 1 else torch.ones_like(truth[0])
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        ranks = rank(_distance(truth, points, scale), torch.stack([_distance(d, points, scale) for d in draws]))
        uniform = continuous(ranks, num_samples)
    return _report(ranks, uniform, num_samples, level)


def _other_truths(truth: Tensor) -> Tensor:
    """The truth of another data point for each data point, by a random cyclic permutation."""
    order = torch.randperm(len(truth), device=truth.device)
    points = torch.empty_like(truth)
    points[order] = truth[order.roll(1)]
    return points


def _distance(z: Tensor, points: Tensor, scale: Tensor) -> Tensor:
    return ((z - points) / scale).square().sum(-1).sqrt()


def _report(ranks: Tensor, uniform: Tensor, num_samples: int, level: float) -> TARP:
    num_data = len(ranks)
    levels = torch.arange(num_samples + 2, dtype=torch.float64, device=ranks.device) / (num_samples + 1)
    counts = torch.bincount(ranks, minlength=num_samples + 1)
    curve = torch.cat([levels.new_zeros(1), counts.cumsum(0).double() / num_data])
    band = ecdf_band(num_data, levels[1:-1].cpu().numpy(), level=level)
    lower, upper = (torch.cat([levels[:1], torch.from_numpy(b).to(levels), levels[-1:]]) for b in band)
    area = 0.625 - float(uniform.clamp(min=0.5).mean())
    area_p = 2 * float(scipy.stats.norm.sf(abs(area) / math.sqrt(_AREA_VARIANCE / num_data)))
    p_value = float(scipy.stats.kstest(uniform.cpu().numpy(), "uniform").pvalue)
    deviation = float((curve - levels).abs().max())
    return TARP(
        ranks=ranks,
        levels=levels,
        coverage=curve,
        lower=lower,
        upper=upper,
        band_level=level,
        area=area,
        area_p_value=area_p,
        deviation=deviation,
        p_value=p_value,
    )
