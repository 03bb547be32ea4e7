r"""Curves in the rate-distortion plane: one point per beta or target rate, with bands, hull and phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from inference.core.checks import check_count
from inference.core.display import Result
from inference.core.estimates import Interval, check_level
from inference.core.seeding import seeded
from inference.information.rates import RateDistortion, rate_distortion
from inference.pair.run import Program

AUTO_DECODING = "auto-decoding limit"
SEMANTIC = "semantic encoder"
SYNTACTIC = "syntactic encoder"
AUTO_ENCODING = "auto-encoding limit"

# Shares of H between the phases, chosen so that the models that the paper names get its names (see phase).
_COLLAPSED, _SEMANTIC, _RECONSTRUCTED = 0.01, 0.2, 0.08


@dataclass(frozen=True, kw_only=True, repr=False)
class CurvePoint(Result):
    """One point of a rate-distortion curve, over all its training runs.

    Attributes:
        parameter: The beta or target rate that it was trained at.
        rate: R in nats per data point, mean over runs and data, with a percentile interval of the bootstrap.
        distortion: D, likewise.
        total: R + D, likewise; minus the ELBO.
        runs: What was measured on each run.
    """

    parameter: float
    rate: Interval
    distortion: Interval
    total: Interval
    runs: tuple[RateDistortion, ...]


def curve_point(
    parameter: float,
    runs: Sequence[RateDistortion],
    *,
    level: float = 0.95,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> CurvePoint:
    """One point from the runs of several seeds, with a bootstrap over runs and over data.

    Runs and data are both drawn with replacement, the same data for every run. With one run the interval is that over
    data alone, and does not include the variation between seeds.

    Warning:
        With few runs the bootstrap over them is too narrow, by a factor of about sqrt((S - 1) / S).

    Args:
        parameter: Beta or target rate.
        runs: Measurements of the runs on the same data.
        level: Confidence level.
        num_bootstrap: Resamples.
        seed: Seed of the resampling; leaves the global random state as it was.

    Raises:
        ValueError: If there is no run, or they differ in their number of data points.
    """
    check_level(level)
    check_count(num_bootstrap, "num_bootstrap")
    if not runs or len({len(run.rates.value) for run in runs}) != 1:
        raise ValueError(f"expected runs on the same data, got numbers {[len(run.rates.value) for run in runs]}")
    terms = torch.stack([torch.stack([run.rates.value, run.distortions.value]) for run in runs], 1)  # (2, S, N)
    with seeded(seed):
        draws = torch.stack([_resampled_mean(terms) for _ in range(num_bootstrap)])
    centre = terms.mean((1, 2))
    rate, distortion, total = (
        _percentiles(c, d, level) for c, d in zip(_with_total(centre), _with_total(draws.T), strict=True)
    )
    return CurvePoint(parameter=parameter, rate=rate, distortion=distortion, total=total, runs=tuple(runs))


def rate_distortion_curve(
    train: Callable[[float, int], tuple[Program, Program]],
    parameters: Iterable[float],
    x: Tensor,
    *,
    seeds: Sequence[int] = (0,),
    num_samples: int = 32,
    level: float = 0.95,
    progress: bool = True,
) -> list[CurvePoint]:
    """Rate-distortion curve: train a pair for every parameter and seed, and measure rate and distortion.

    References:
        Alemi, Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018, arXiv 1711.00464.

    Args:
        train: Makes a trained (model, guide) from a parameter and a seed. It decides what the parameter is: the beta
            of :class:`inference.BetaELBO`, for example, or the rate of :class:`inference.TargetRate`.
        parameters: Betas or target rates.
        x: Data to measure on, (N, D).
        seeds: Seeds of the training runs.
        num_samples: Draws per data point where a term is not in closed form.
        level: Confidence level.
        progress: Show a progress bar.

    Returns:
        One point for each parameter, in their order.
    """
    parameters = list(parameters)
    points = []
    with tqdm(total=len(parameters) * len(seeds), disable=not progress, desc="rate-distortion curve") as bar:
        for parameter in parameters:
            runs = []
            for seed in seeds:
                model, guide = train(parameter, seed)
                runs.append(
                    rate_distortion(model, guide, x, num_samples=num_samples, seed=seed, level=level, progress=False)
                )
                bar.update()
            points.append(curve_point(parameter, runs, level=level))
    return points


def lower_hull(rates: Sequence[float], distortions: Sequence[float]) -> list[int]:
    """Indices of the lower left convex hull of points in the plane, by rising rate.

    These are the points that some beta prefers: of the others a mixture of two is better in both.

    Args:
        rates: R of each point.
        distortions: D of each point.

    Raises:
        ValueError: If the lengths differ, there is no point, or one is not finite.

    Example:
        >>> lower_hull([0.0, 1.0, 2.0, 3.0], [4.0, 3.9, 1.0, 2.0])
        [0, 2]
    """
    if len(rates) != len(distortions) or not len(rates) or not all(map(math.isfinite, [*rates, *distortions])):
        raise ValueError(f"expected finite points, got rates {list(rates)} and distortions {list(distortions)}")
    hull: list[int] = []
    for i in sorted(range(len(rates)), key=lambda i: (rates[i], distortions[i])):
        if hull and distortions[i] >= distortions[hull[-1]]:
            continue  # dearer and no better
        while len(hull) > 1 and _turns_right(*((rates[j], distortions[j]) for j in (hull[-2], hull[-1], i))):
            hull.pop()
        hull.append(i)
    return hull


def phase(
    rate: float,
    distortion: float,
    entropy: float,
    *,
    collapsed: float = _COLLAPSED,
    semantic: float = _SEMANTIC,
    reconstructed: float = _RECONSTRUCTED,
) -> str:
    r"""The part of the plane that a point on discrete data lies in, by shares of the entropy H.

    The first that holds: R <= 0.01 H, the auto-decoding limit (the code is ignored); D <= 0.08 H, the auto-encoding
    limit (all is in the code); R <= 0.2 H, a semantic encoder (few nats, what the data are about); else a syntactic
    encoder (the code holds details that the decoder could have drawn).

    Warning:
        The boundaries are a convention of ours: the paper gives names to models, no boundaries. They reproduce its
        names on static MNIST with H = 80.2 nats: R = 6.2 semantic, R from 24 to 120 syntactic, R = 156, D = 4.8
        auto-encoding, R = 0 auto-decoding.

    References:
        Alemi, Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018, arXiv 1711.00464.

    Args:
        rate: R in nats.
        distortion: D in nats.
        entropy: H in nats; where it is unknown, the smallest R + D of any model bounds it from above and serves.
        collapsed: Largest share of the rate in the auto-decoding limit.
        semantic: Largest share of the rate of a semantic encoder.
        reconstructed: Largest share of the distortion in the auto-encoding limit.

    Raises:
        ValueError: If the entropy is not positive: continuous data have no auto-encoding limit.

    Example:
        >>> phase(6.2, 74.1, 80.2)
        'semantic encoder'
    """
    if not 0 < entropy < math.inf:
        raise ValueError(f"expected the positive entropy of discrete data, got {entropy}")
    if rate <= collapsed * entropy:
        return AUTO_DECODING
    if distortion <= reconstructed * entropy:
        return AUTO_ENCODING
    return SEMANTIC if rate <= semantic * entropy else SYNTACTIC


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the segment from a to c."""
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])


def _resampled_mean(terms: Tensor) -> Tensor:
    """Mean of terms (2, S, N) over runs and data drawn with replacement, (2,)."""
    _, num_runs, num_data = terms.shape
    run = torch.randint(num_runs, (num_runs,), device=terms.device)
    datum = torch.randint(num_data, (num_data,), device=terms.device)
    return terms[:, run].mean(1)[:, datum].mean(1)


def _with_total(terms: Tensor) -> Tensor:
    """Rate and distortion (2, ...) with their sum, (3, ...)."""
    return torch.cat([terms, terms.sum(0, keepdim=True)])


def _percentiles(centre: Tensor, draws: Tensor, level: float) -> Interval:
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=draws.dtype, device=draws.device)
    lower, upper = draws.quantile(ends).tolist()
    return Interval(float(centre), lower, upper, float(draws.std(correction=0)))
