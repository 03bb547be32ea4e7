r"""Mutual information of data and latent under a guide, with its error and its ceiling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.checks import check_count
from inference.core.deprecation import renamed_keywords
from inference.core.display import Result
from inference.core.estimates import Interval, check_level
from inference.core.memory import at_once
from inference.core.ranks import ranks
from inference.core.seeding import seeded
from inference.core.sources import opened
from inference.distributions.batched_gaussian import Gaussians
from inference.distributions.gaussian import LOG_2PI
from inference.pair.call import Call
from inference.pair.run import Program
from inference.posterior.latent_gaussians import read_gaussians

# A point value of the mutual information must stay so far below its ceiling log N, in nats.
CEILING_MARGIN = 2.0

# Pairs (draw, component) in one block: 2 MB in float64, what a CPU's cache holds, and 128 MB on other devices.
_BLOCK_CPU, _BLOCK = 2**18, 2**24


@dataclass(frozen=True, kw_only=True, repr=False)
class MutualInformation(Result):
    """Mutual information of data and latent under a guide, and the aggregate posterior's divergence from the prior.

    Attributes:
        information: I_q(x; z) in nats for the distribution that the data were drawn from. The value is NaN where it
            would be above ``ceiling - 2``: there N data points give only the bound ``lower``.
        aggregate_kl: KL(q(z) || p(z)) for the same distribution, the mean divergence less the information; NaN where
            that is. Close to zero its noise can make the value negative; the interval is cut there.
        empirical: I_q in nats where the N data points are all there is, an exact sum but for Monte Carlo error: the
            information that z has of the number n. It cannot exceed ``ceiling``.
        mean_kl: Mean over the data of KL(q(z | x_n) || p(z)), closed form.
        per_datum: KL(q(z | x_n) || q(z)) per data point, (N,) float64, whose mean is the estimate of the information.
        bias_bound: Half the distance between the two estimates that bracket the information, in nats; it bounds the
            bias of the value and is part of its standard error.
        ceiling: log N.
        level: Confidence level of the intervals.
        num_samples: Draws per data point.
    """

    information: Interval
    aggregate_kl: Interval
    empirical: Interval
    mean_kl: float
    per_datum: Tensor
    bias_bound: float
    ceiling: float
    level: float
    num_samples: int

    @property
    def statement(self) -> str:
        """The finding in one sentence."""
        value, lower, _, error = self.information
        if math.isnan(value):
            return (
                f"I_q(x; z) is at least {lower:.4f} nats; N = {len(self.per_datum)} data points cannot tell how much "
                f"more: they show at most log N = {self.ceiling:.4f}, and no value above log N - {CEILING_MARGIN:g} is "
                "stated"
            )
        return f"I_q(x; z) = {round(value, 4) + 0.0:.4f} +- {error:.4f} nats (ceiling log N = {self.ceiling:.4f})"


@torch.no_grad()
@renamed_keywords(batch_size="block")
def mutual_information(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    num_samples: int = 2,
    seed: int | None = None,
    level: float = 0.95,
    block: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> MutualInformation:
    r"""Mutual information of data and latent under the guide, by Monte Carlo over all pairs of data.

    .. math::
        \hat I_- = \frac1N \sum_n E_{q(z \mid x_n)} \log \frac{q(z \mid x_n)}{\frac1N \sum_m q(z \mid x_m)}, \quad
        \hat I_+ = \frac1N \sum_n E_{q(z \mid x_n)} \log \frac{q(z \mid x_n)}{\frac1{N-1} \sum_{m \ne n} q(z \mid x_m)}

    The first is the information for the empirical distribution of the data. Averaged over data sets, both bracket the
    information for the distribution they come from, whatever the guide. Expanding the logarithm of the mean about q(z)
    gives

    .. math:: E \hat I_\mp = I \mp \frac{\chi^2}{2N} + o(N^{-1}),
        \quad \chi^2 = E_x \int \frac{q(z \mid x)^2}{q(z)} dz - 1

    (the own component adds chi2 / N to the logarithm, the spread of the others takes chi2 / 2N away), so that the value
    is the mean of both, and half their distance bounds what bias is left. For jointly Gaussian x and z,
    chi2 = exp(2 I) - 1; where a canonical correlation is above 1/2 the next moment of the ratio is infinite and the
    rest falls more slowly than N^-2 (at I = 1.5 and N = 1000 half the distance is 0.006, the first order 0.0095). The
    noise of the draws is reduced by two control variates of mean zero given x_n: log q(z | x_n) and the log-density of
    the Gaussian with the moments of the aggregate.

    The standard error is that of the mean over data, which are the clusters, with the bias bound added in quadrature.
    That is all to first order: as a component of others' mixtures, a data point moves the mean by nothing on average.

    Warning:
        N data points show at most log N nats. Where the empirical information is above log N - 2, no value is stated,
        but a lower bound, at half of one minus ``level``; the aggregate's divergence then has an upper one. Below that
        the bracket can still be wide, as chi2 grows like exp(2 I): read ``bias_bound``. The cost is S N^2, the memory
        O(N K), or O(N K^2) for full-rank guides; densities are off by 1e-16 times the squared ratio of
        the aggregate's spread to the guide's.

    References:
        Hoffman, Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound", 2016,
        NIPS Workshop on Advances in Approximate Bayesian Inference.
        Poole, Ozair, van den Oord, Alemi, Tucker, "On Variational Bounds of Mutual Information", 2019,
        arXiv 1905.06922 (the bracket).

    Args:
        model: See :func:`latent_kl`; here its prior must be the same for all data.
        guide: See :func:`latent_kl`.
        x: Data, (N, D), the first argument of both.
        *args: Further arguments of both.
        num_samples: S, draws per data point, at least 2.
        seed: Seed of the draws; leaves the global random state as it was.
        level: Confidence level of the intervals.
        block: Rows in one run of the pair; None chooses.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: Refused: all data as one data point have no information that tells data points apart.
        missing: See :func:`inference.iter_log_weights`.
        progress: Show a progress bar over the draws.

    Raises:
        TypeError: See :func:`latent_kl`.
        ValueError: See :func:`latent_kl`; and if the prior differs between data, or S is below 2.

    Example:
        >>> from guides import Linear
        >>> from zoo import LinearVAE
        >>> result = mutual_information(LinearVAE(5, 2), Linear(5, 2), torch.randn(99, 5), seed=0)
        >>> result.empirical.value < result.ceiling == math.log(99)
        True
    """
    check_count(num_samples, "num_samples", minimum=2)
    check_level(level)
    refuse_whole(whole)
    call = Call(model, guide, opened((x, *args)), kwargs, plate, missing=missing)
    found = read_gaussians(call, block=block, progress=progress)
    posteriors, prior_mean, prior_sigma = found
    if bool((prior_mean != prior_mean[0]).any() | (prior_sigma != prior_sigma[0]).any()):
        raise ValueError("expected one prior for all data, got one that differs between them")
    kl = _joint_kl(posteriors, prior_mean, prior_sigma)
    centred = Gaussians(posteriors.mean - posteriors.mean.mean(0), posteriors.factor)
    with seeded(ranks().agreed(seed)):
        rounds = tqdm(range(num_samples), disable=not progress, desc="mutual information", unit="draw")
        draws = [_draw(centred) for _ in rounds]
    terms, controls = torch.stack([d[0] for d in draws]), torch.stack([d[1] for d in draws])
    own, others = (_reduce_variance(term, controls) for term in terms.unbind(-1))
    return information_report(own, others, kl, level)


def refuse_whole(whole: bool) -> None:
    """Refuse all data as one data point.

    Raises:
        ValueError: With the reason.
    """
    if whole:
        raise ValueError(
            "expected several data points, of which a latent may tell one from the others, got whole=True: one data "
            "point leaves nothing to tell, its mutual information is at most log 1 = 0"
        )


def _draw(posteriors: Gaussians) -> tuple[Tensor, Tensor]:
    """One draw per row: log ratios to the mixture with and without its own component, and controls, (N, 2) each."""
    noise = torch.randn_like(posteriors.mean)
    z = posteriors.transform(noise)
    own = -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[1] * LOG_2PI - posteriors.log_det_factor
    num_data = len(z)
    others = _log_sum_of_others(posteriors, z)
    ratios = own - torch.logaddexp(others, own) + math.log(num_data)
    without = own - others + math.log(max(num_data - 1, 1))
    controls = torch.stack([-0.5 * (noise.square() - 1).sum(-1), _aggregate_control(posteriors, z)], -1)
    return torch.stack([ratios, without], -1), controls


def _log_sum_of_others(posteriors: Gaussians, z: Tensor) -> Tensor:
    """log sum_{m != n} q(z_n | x_m), (N,), in blocks of rows."""
    weights, constants = posteriors.coefficients()
    rows = at_once(_BLOCK_CPU if z.device.type == "cpu" else _BLOCK, len(z))
    found = []
    for start in range(0, len(z), rows):
        log_q = torch.addmm(constants, posteriors.features(z[start : start + rows]), weights.mT)
        log_q.diagonal(start).fill_(-math.inf)
        top = log_q.amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
        found.append(log_q.sub_(top).exp_().sum(-1).log() + top.squeeze(-1))
    return torch.cat(found)


def _aggregate_control(posteriors: Gaussians, z: Tensor) -> Tensor:
    """log G(z_n) less its mean under q(z | x_n), (N,), for the Gaussian G with the moments of the aggregate."""
    mean = posteriors.mean.mean(0)
    residual = posteriors.mean - mean
    root = torch.linalg.cholesky(posteriors.mean_covariance + residual.mT @ residual / len(z))

    def squares(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, rows.mT, upper=False).square().sum(0)

    if posteriors.is_diagonal:
        trace = posteriors.factor.square() @ torch.cholesky_inverse(root).diagonal()
    else:
        wide = root.expand_as(posteriors.factor)
        trace = torch.linalg.solve_triangular(wide, posteriors.factor, upper=False).square().sum((-2, -1))
    return -0.5 * (squares(z - mean) - squares(residual) - trace)


def _reduce_variance(terms: Tensor, controls: Tensor) -> Tensor:
    """Terms (S, N) less what controls (S, N, 2) of mean zero explain of them; as they are where nothing is to fit."""
    if not bool(terms.isfinite().all()):
        return terms
    # The spread within a data point fits the coefficients: that between data is no noise of the draws.
    u, y = controls - controls.mean(0), terms - terms.mean(0)
    covariance = torch.einsum("sni,snj->ij", u, u)
    coefficients = torch.linalg.pinv(covariance, hermitian=True) @ torch.einsum("sni,sn->i", u, y)
    return terms - controls @ coefficients


def information_report(own: Tensor, others: Tensor, kl: Tensor, level: float) -> MutualInformation:
    """The result from log ratios (S, N) to the mixture with and without the own component."""
    num_samples, num_data = own.shape
    quantile = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
    ceiling, width = math.log(num_data), float(quantile)
    low, high = own.mean(0), others.mean(0)
    # The two coefficients of the controls are fitted within the data, too.
    freedom = max(num_data * (num_samples - 1) - 2, 1)
    noise = math.sqrt(float((own - low).square().sum()) / freedom / (num_samples * num_data))
    empirical = float(low.mean())
    bias = max(float((high - low).mean()), 0.0) / 2
    refused = empirical > ceiling - CEILING_MARGIN
    return MutualInformation(
        information=_bracket(low, high, bias, width, refused),
        aggregate_kl=_bracket(kl - high, kl - low, bias, width, refused),
        empirical=Interval(
            empirical, max(empirical - width * noise, 0.0), min(empirical + width * noise, ceiling), noise
        ),
        mean_kl=float(kl.mean()),
        per_datum=(low + high) / 2,
        bias_bound=bias,
        ceiling=ceiling,
        level=level,
        num_samples=num_samples,
    )


def _bracket(low: Tensor, high: Tensor, bias: float, width: float, refused: bool) -> Interval:
    """Interval of a mean over data between two estimates of it, (N,) each."""
    error = math.hypot(_standard_error((low + high) / 2), bias)
    value = math.nan if refused else float((low + high).mean()) / 2
    ends = (float(t.mean()) + sign * width * _standard_error(t) for t, sign in ((low, -1), (high, 1)))
    lower, upper = sorted(ends)  # by chance the own component may lie below the mean of the others
    return Interval(value, max(lower, 0.0), max(upper, 0.0), error)


def _standard_error(clusters: Tensor) -> float:
    if len(clusters) == 1:
        return math.inf
    return float(clusters.std()) / math.sqrt(len(clusters))


def _joint_kl(posteriors: Gaussians, prior_mean: Tensor, prior_sigma: Tensor) -> Tensor:
    """KL(q(z | x_n) || p(z)) of the joint distribution of all coordinates, (N,)."""
    squares = (posteriors.var + (posteriors.mean - prior_mean).square()) / prior_sigma.square()
    return 0.5 * (squares - 1).sum(-1) + prior_sigma.log().sum(-1) - posteriors.log_det_factor
