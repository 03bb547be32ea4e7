r"""Simulation-based calibration (SBC): the rank of the truth among a guide's draws, uniform for the posterior.

.. math:: r_{nk} = \#\{s : z_{snk} < z^*_{nk}\} \sim U\{0, \dots, S\}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from inference.calibration.simulation import Simulation
from inference.core.checks import check_count
from inference.core.deprecation import renamed_keywords
from inference.core.display import Result
from inference.core.estimates import check_level
from inference.core.ranks import ranks as processes
from inference.core.seeding import seeded
from inference.numerics.multiple_testing import holm


@dataclass(frozen=True, kw_only=True, repr=False)
class SBC(Result):
    """Result of simulation-based calibration (SBC): ranks of the truth among a guide's draws, and their p-values.

    Attributes:
        names: Latent coordinates, then further test quantities; Q of them.
        ranks: Draws below the truth, (N, Q) int64, ties broken at random.
        uniform: (rank + U) / (S + 1) with U uniform on [0, 1], (N, Q): continuous and exactly uniform where the ranks
            are, so that tests for continuous distributions are exact.
        num_samples: S.
        ks: p-value of the Kolmogorov-Smirnov test of ``uniform``, (Q,).
        chi2: p-value of the chi-squared test of the rank histogram, (Q,).
        symmetry: p-value of Wilcoxon's signed-rank test that ``uniform`` is symmetric about one half, (Q,): the test of
            variational SBC (VSBC). A guide that is only too narrow or too wide passes; one whose centre is off fails.
        ks_adjusted: ``ks`` adjusted by Holm for the Q tests, (Q,): one below alpha is false with probability alpha.
        chi2_adjusted: ``chi2`` likewise.
    """

    names: tuple[str, ...]
    ranks: Tensor
    uniform: Tensor
    num_samples: int
    ks: Tensor
    chi2: Tensor
    symmetry: Tensor
    ks_adjusted: Tensor
    chi2_adjusted: Tensor

    @property
    def p_value(self) -> float:
        """p-value of all tests together, by Bonferroni over both kinds."""
        return min(1.0, 2 * float(torch.minimum(self.ks_adjusted, self.chi2_adjusted).min()))

    @property
    def worst(self) -> str:
        """The coordinate or quantity with the smallest p-value."""
        return self.names[int(torch.minimum(self.ks, self.chi2).argmin())]


def sbc(simulation: Simulation, *, num_bins: int = 20, seed: int | None = None) -> SBC:
    r"""Simulation-based calibration (SBC) of every latent coordinate and test quantity.

    .. math:: r_{nk} = \#\{s : z_{snk} < z^*_{nk}\} \sim U\{0, \dots, S\} \text{ if } q(z \mid x) = p(z \mid x)

    A histogram of ranks that is high in the middle shows a guide too wide, high at both ends one too narrow, a slope
    one that is shifted.

    Warning:
        Uniform ranks are necessary, not sufficient: the prior, as a guide that ignores the data, has uniform ranks in
        every latent coordinate. The log-likelihood's rank, which a simulation includes, detects it.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman, "Validating Bayesian Inference Algorithms with Simulation-Based
        Calibration", 2018, arXiv 1804.06788. Yao, Vehtari, Simpson, Gelman, "Yes, but Did It Work?: Evaluating
        Variational Inference", 2018, arXiv 1802.02538 (symmetry).

    Args:
        simulation: From :func:`inference.simulate`.
        num_bins: Bins of the chi-squared test; each needs at least five data points.
        seed: Seed of the ties and of the continuous ranks; leaves the global random state as it was.

    Raises:
        ValueError: If there are fewer than five data points per bin.

    Example:
        >>> truth, draws = torch.zeros(100, 1), torch.arange(-9.0, 10.0).expand(100, 1, 19).movedim(-1, 0) + 0.5
        >>> sbc(Simulation(names=("z",), truth=truth, draws=draws, data=truth)).ranks.unique()
        tensor([9])
    """
    check_count(num_bins, "num_bins", minimum=2)
    names, num_data = (*simulation.names, *simulation.quantities), len(simulation.truth)
    if num_data < 5 * num_bins:
        raise ValueError(f"expected at least five data points in each of {num_bins} bins, got {num_data} data points")
    with seeded(processes().agreed(seed)):
        ranks = rank(simulation.truth, simulation.draws)
        for truth, draws in simulation.quantities.values():
            ranks = torch.cat([ranks, rank(truth.unsqueeze(-1), draws.unsqueeze(-1))], -1)
        uniform = continuous(ranks, simulation.num_samples)
    columns = uniform.cpu().numpy().T
    ks = uniform.new_tensor([scipy.stats.kstest(u, "uniform").pvalue for u in columns])
    counts = [np.histogram(u, num_bins, (0.0, 1.0))[0] for u in columns]
    chi2 = uniform.new_tensor([scipy.stats.chisquare(c).pvalue for c in counts])
    symmetry = uniform.new_tensor([scipy.stats.wilcoxon(u - 0.5).pvalue for u in columns])
    return SBC(
        names=names,
        ranks=ranks,
        uniform=uniform,
        num_samples=simulation.num_samples,
        ks=ks,
        chi2=chi2,
        symmetry=symmetry,
        ks_adjusted=holm(ks),
        chi2_adjusted=holm(chi2),
    )


def rank(truth: Tensor, draws: Tensor) -> Tensor:
    """Draws (S, N, Q) below the truth (N, Q), ties at random: (N, Q) int64."""
    ties = (draws == truth).sum(0)
    at_random = (torch.rand(truth.shape, dtype=torch.float64, device=truth.device) * (ties + 1)).long()
    return (draws < truth).sum(0) + at_random


def continuous(ranks: Tensor, num_samples: int) -> Tensor:
    """Ranks spread over [0, 1] at random, each within its own 1 / (S + 1)."""
    jitter = torch.rand(ranks.shape, dtype=torch.float64, device=ranks.device)
    return (ranks + jitter) / (num_samples + 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class Coverage(Result):
    """Coverage of central credible intervals: how often they contain the truth.

    Attributes:
        names: Latent coordinates and quantities, Q.
        levels: Nominal levels, (A,).
        value: Share of the data whose interval holds the truth, (A, Q).
        lower: Lower binomial limit of the true coverage (Clopper-Pearson), (A, Q).
        upper: Upper limit, (A, Q).
        level: Confidence level of each pair of limits by itself.
        num_data: N.
    """

    names: tuple[str, ...]
    levels: Tensor
    value: Tensor
    lower: Tensor
    upper: Tensor
    level: float
    num_data: int

    @property
    def consistent(self) -> Tensor:
        """Where the nominal level lies within limits that hold all together at ``level``, by Bonferroni, (A, Q)."""
        hits = (self.value * self.num_data).round().cpu().numpy()
        low, high = _limits(hits, self.num_data, 1 - (1 - self.level) / hits.size)
        nominal = self.levels[:, None].cpu().numpy()
        return torch.from_numpy((low <= nominal) & (nominal <= high)).to(self.levels.device)


def _limits(hits: np.ndarray, num_data: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Binomial limits of a share by Clopper and Pearson."""
    tail = (1 - level) / 2
    lower = np.where(hits == 0, 0.0, scipy.stats.beta.ppf(tail, hits, num_data - hits + 1))
    upper = np.where(hits == num_data, 1.0, scipy.stats.beta.ppf(1 - tail, hits + 1, num_data - hits))
    return lower, upper


@renamed_keywords(confidence="level")
def coverage(result: SBC, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99), *, level: float = 0.95) -> Coverage:
    r"""Coverage of the central credible intervals of each coordinate, with binomial limits.

    .. math:: c_k(\alpha) = \frac1N \#\{n : |u_{nk} - 1/2| \le \alpha / 2\}

    The ends of an interval are order statistics of the draws, of two neighbours one at random, so that a guide that is
    the posterior has exactly the nominal coverage whatever the number of draws.

    References:
        Clopper, Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial", 1934,
        Biometrika 26.

    Args:
        result: From :func:`sbc`.
        levels: Nominal levels, A.
        level: Confidence level of the binomial limits.

    Raises:
        ValueError: If a level is not between 0 and 1.
    """
    for each in (*levels, level):
        check_level(each)
    if not levels:
        raise ValueError("expected at least one level, got none")
    nominal = result.uniform.new_tensor(list(levels))
    hits = ((result.uniform - 0.5).abs() <= nominal[:, None, None] / 2).sum(1)
    num_data = len(result.uniform)
    low, high = (torch.from_numpy(bound).to(nominal) for bound in _limits(hits.cpu().numpy(), num_data, level))
    return Coverage(
        names=result.names,
        levels=nominal,
        value=hits.double() / num_data,
        lower=low,
        upper=high,
        level=level,
        num_data=num_data,
    )


def ecdf_band(
    num_data: int, points: np.ndarray, *, level: float = 0.95, num_repeats: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Band that holds the whole empirical distribution function of uniform data with the given probability.

    Pointwise binomial limits, at the level that makes the band as a whole hold: found by simulating uniform data.

    References:
        Saeilynoja, Buerkner, Vehtari, "Graphical Test for Discrete Uniformity and Its Applications in Goodness of Fit
        Evaluation and Multiple Sample Comparison", 2021, arXiv 2103.10522.

    Args:
        num_data: N.
        points: Where the function is looked at, (P,) ascending in (0, 1).
        level: Probability that it lies inside at all points.
        num_repeats: Simulated data sets.
        seed: Seed of NumPy's generator.

    Returns:
        Lower and upper limits, (P,) each.
    """
    check_count(num_data, "num_data")
    check_level(level)
    random = np.random.default_rng(seed)
    steps = np.diff(points, prepend=0.0, append=1.0)
    counts = random.multinomial(num_data, steps, num_repeats)[:, :-1].cumsum(1)
    below = scipy.stats.binom.cdf(counts, num_data, points)
    above = scipy.stats.binom.sf(counts - 1, num_data, points)
    extreme = 2 * np.minimum(below, above).min(1)
    pointwise = np.quantile(extreme, 1 - level, method="lower")
    lower = scipy.stats.binom.ppf(pointwise / 2, num_data, points)
    upper = scipy.stats.binom.isf(pointwise / 2, num_data, points)
    return lower / num_data, upper / num_data
