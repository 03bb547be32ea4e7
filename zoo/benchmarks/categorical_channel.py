r"""Encoder, decoder and marginal over finitely many symbols: every term of the rate-distortion plane is an exact sum.

.. math:: p(x) \text{ data}, \quad e(z \mid x) \text{ encoder}, \quad d(x \mid z) \text{ decoder}, \quad
          m(z) \text{ marginal}, \quad e(z) = \sum_x p(x) \, e(z \mid x)

All distributions are given by their logarithms, so that a probability of zero is minus infinity and adds nothing to a
sum.

References:
    Alemi, Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018, arXiv 1711.00464.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChannelTerms(NamedTuple):
    """The terms of the rate-distortion plane, in nats, each of the batch shape of the distributions.

    Attributes:
        entropy: H = -E log p(x).
        distortion: D = -E log d(x | z).
        rate: R = E KL(e(z | x) || m(z)).
        information: I(x; z) under p(x) e(z | x).
    """

    entropy: Tensor
    distortion: Tensor
    rate: Tensor
    information: Tensor


def channel_terms(log_p: Tensor, log_encoder: Tensor, log_decoder: Tensor, log_marginal: Tensor) -> ChannelTerms:
    r"""Entropy, distortion, rate and information, by exact sums and differentiable.

    .. math:: H - D \le I(x; z) \le R, \qquad D + R = -ELBO \ge H

    with equality where decoder and marginal are :func:`optimal_decoder` and :func:`optimal_marginal`.

    Args:
        log_p: log p(x), (X,).
        log_encoder: log e(z | x), (..., X, Z).
        log_decoder: log d(x | z), (..., Z, X).
        log_marginal: log m(z), (..., Z).

    Raises:
        ValueError: If the shapes do not fit together.
    """
    _check_shapes(log_p, log_encoder, log_decoder, log_marginal)
    log_joint = log_p[:, None] + log_encoder
    aggregate = log_joint.logsumexp(-2)
    return ChannelTerms(
        -_expectation(log_p, log_p).sum().expand(log_encoder.shape[:-2]),
        -_expectation(log_joint, log_decoder.mT).sum((-2, -1)),
        _expectation(log_joint, log_encoder - log_marginal.unsqueeze(-2)).sum((-2, -1)),
        _expectation(log_joint, log_encoder - aggregate.unsqueeze(-2)).sum((-2, -1)),
    )


def optimal_decoder(log_p: Tensor, log_encoder: Tensor) -> Tensor:
    r"""log d*(x | z), (..., Z, X): Bayes' rule, for which H - D = I.

    .. math:: d^*(x \mid z) = p(x) \, e(z \mid x) / e(z)

    Args:
        log_p: log p(x), (X,).
        log_encoder: log e(z | x), (..., X, Z).
    """
    return (log_p[:, None] + log_encoder).mT.log_softmax(-1)


def optimal_marginal(log_p: Tensor, log_encoder: Tensor) -> Tensor:
    r"""log m*(z), (..., Z): the aggregated posterior e(z), for which R = I. Arguments as :func:`optimal_decoder`."""
    return (log_p[:, None] + log_encoder).logsumexp(-2)


def generated(log_decoder: Tensor, log_marginal: Tensor) -> Tensor:
    r"""log g(x) = log sum_z m(z) d(x | z), (..., X): the model's exact evidence of every symbol."""
    return (log_marginal.unsqueeze(-1) + log_decoder).logsumexp(-2)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension."""
    return _expectation(log_p, log_p - log_q).sum(-1)


def mutual_information_of(log_joint: Tensor) -> Tensor:
    """I in nats of a joint distribution (..., A, B)."""
    independent = log_joint.logsumexp(-1, keepdim=True) + log_joint.logsumexp(-2, keepdim=True)
    return _expectation(log_joint, log_joint - independent).sum((-2, -1))


def _expectation(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) * value, zero where the weight is, whatever the value there."""
    weight = log_weight.exp()
    return weight * torch.where(weight > 0, value, 0.0)


def _check_shapes(log_p: Tensor, log_encoder: Tensor, log_decoder: Tensor, log_marginal: Tensor) -> None:
    symbols, codes = log_encoder.shape[-2:]
    expected = (symbols,), (codes, symbols), (codes,)
    found = tuple(log_p.shape), tuple(log_decoder.shape[-2:]), tuple(log_marginal.shape[-1:])
    if found != expected:
        raise ValueError(
            f"expected p, decoder and marginal of trailing shapes {expected} for an encoder of shape "
            f"{tuple(log_encoder.shape)}, got {found}"
        )
