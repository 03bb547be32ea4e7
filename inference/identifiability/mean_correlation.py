r"""Whether codes are the true sources up to order and scale: mean correlation coefficient and Amari distance."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import scipy
import torch
from torch import Tensor

from inference.core.checks import check_finite
from inference.core.display import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class MCC(Result):
    """Mean correlation coefficient (MCC) between codes and sources, after the best matching.

    Attributes:
        value: Mean over the sources of the matched absolute correlations.
        matching: The code that each source got, (K,).
        correlations: Absolute correlations, (codes, sources), float64.
        constant: Codes that are constant: their correlations count as zero.
    """

    value: float
    matching: Tensor
    correlations: Tensor
    constant: tuple[int, ...]


def mcc(codes: Tensor, sources: Tensor) -> MCC:
    r"""Mean correlation coefficient (MCC) by Pearson's correlation, over all data at once.

    .. math:: \max_\pi \tfrac1K \sum_k |\operatorname{corr}(\hat z_{\pi(k)}, s_k)|

    Warning:
        Take the whole data set: the mean over batches of 64 gives independent codes .15 for K = 3. Where a code is
        constant (collapsed), a warning names it.

    References:
        Hyvärinen, Morioka, "Unsupervised feature extraction by time-contrastive learning and nonlinear ICA", 2016,
        arXiv 1605.06336.

    Args:
        codes: (N, L), L >= K, for example posterior means.
        sources: True sources, (N, K).

    Raises:
        ValueError: If the shapes do not fit, there are fewer than two data points or fewer codes than sources, a value
            is not finite, or a source is constant.

    Example:
        >>> s = torch.randn(100, 2)
        >>> round(mcc(-3 * s.flip(1), s).value, 6)
        1.0
    """
    _check_codes(codes, sources)
    return _match(codes.detach().double(), sources.detach().double(), _constant(codes))


def rank_mcc(codes: Tensor, sources: Tensor) -> MCC:
    """Mean correlation coefficient (MCC) by Spearman's rank correlation, which no monotone map of a code changes.

    Args:
        codes: See :func:`mcc`.
        sources: See :func:`mcc`.

    Raises:
        ValueError: See :func:`mcc`.
    """
    _check_codes(codes, sources)
    ranks = (torch.from_numpy(scipy.stats.rankdata(t.detach().cpu().numpy(), axis=0)) for t in (codes, sources))
    return _match(next(ranks), next(ranks), _constant(codes))


def amari_distance(unmixing: Tensor, mixing: Tensor) -> Tensor:
    r"""Amari distance of P = W A from a permutation with scaling: zero iff W inverts A up to these.

    .. math:: \tfrac1{2K} \Bigl[\sum_i \Bigl(\tfrac{\sum_j p_{ij}^2}{\max_j p_{ij}^2} - 1\Bigr)
        + \sum_j \Bigl(\tfrac{\sum_i p_{ij}^2}{\max_i p_{ij}^2} - 1\Bigr)\Bigr]

    References:
        Amari, Cichocki, Yang, "A new learning algorithm for blind signal separation", 1996, with squares as in
        Gresele et al., 2021, arXiv 2106.05200.

    Args:
        unmixing: W, (K, D), or Jacobians (..., K, D) of an unmixing.
        mixing: A, (D, K), or (..., D, K).

    Returns:
        (...), float64.

    Raises:
        ValueError: If W A is not square.

    Example:
        >>> amari_distance(torch.eye(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    if unmixing.dim() < 2 or mixing.dim() < 2 or unmixing.shape[-2:] != mixing.shape[-2:][::-1]:
        raise ValueError(f"expected (K, D) and (D, K), got {tuple(unmixing.shape)} and {tuple(mixing.shape)}")
    squares = (unmixing.double() @ mixing.double()).square()
    excess = [(squares.sum(d) / squares.amax(d) - 1).sum(-1) for d in (-1, -2)]
    return (excess[0] + excess[1]) / (2 * squares.shape[-1])


def _check_codes(codes: Tensor, sources: Tensor) -> None:
    if codes.dim() != 2 or sources.dim() != 2 or len(codes) != len(sources) or codes.shape[1] < sources.shape[1]:
        raise ValueError(
            f"expected codes (N, L) and sources (N, K) with L >= K, got {tuple(codes.shape)} and {tuple(sources.shape)}"
        )
    if len(codes) < 2 or sources.shape[1] < 1:
        raise ValueError(f"expected at least two data points and one source, got {tuple(sources.shape)}")
    check_finite(codes, "codes")
    check_finite(sources, "sources")
    constant = _constant(sources).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"expected sources that vary, got constant ones: {constant}")


def _constant(columns: Tensor) -> Tensor:
    """Which columns vary by no more than the rounding of their dtype, (K,)."""
    columns = columns.detach()
    spread = columns.amax(0) - columns.amin(0)
    return spread <= 8 * torch.finfo(columns.dtype).eps * columns.abs().amax(0)


def _match(codes: Tensor, sources: Tensor, flat: Tensor) -> MCC:
    constant = tuple(flat.nonzero().flatten().tolist())
    if constant:
        warnings.warn(f"codes {list(constant)} are constant: their correlations count as zero", stacklevel=3)
    z, s = (_standardised(t) for t in (codes, sources))
    correlations = torch.where(flat.to(z.device).unsqueeze(1), 0.0, z.T @ s).abs().clamp(max=1.0)
    rows, columns = scipy.optimize.linear_sum_assignment(correlations.cpu().numpy(), maximize=True)
    matching = torch.empty(len(columns), dtype=torch.long)
    matching[columns] = torch.from_numpy(rows)
    value = float(correlations[rows, columns].mean())
    return MCC(value=value, matching=matching, correlations=correlations, constant=constant)


def _standardised(columns: Tensor) -> Tensor:
    centred = columns - columns.mean(0)
    return centred / centred.norm(dim=0)
