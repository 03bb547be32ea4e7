r"""A guide that draws several proposals and keeps one, by its importance weight: what the IWAE bound trains.

.. math:: z_1 \dots z_S \sim q(z \mid x), \quad z = z_s \text{ with probability} \propto p(x, z_s) / q(z_s \mid x)
"""

from __future__ import annotations

import torch
from torch import Tensor

from guides.base import Guide
from guides.sampled import LatentModel, SampledGuide
from inference.core.checks import check_count
from inference.core.memory import at_once

_ELEMENTS = 2**22  # of the proposals that are looked at side by side


class Resampled(SampledGuide):
    r"""Importance-resampled guide (SIR): one of S proposals of another guide, chosen by its importance weight.

    With S = 1 this is the guide underneath; as S grows it goes to the posterior. Its density has no closed form: that
    of the proposals, averaged over the other S - 1.

    References:
        Cremer, Morris, Duvenaud, "Reinterpreting Importance-Weighted Autoencoders", 2017, arXiv 1704.02916.

    Args:
        model: Model with ``prior()`` and ``likelihood(z)``.
        base: The guide that makes proposals.
        num_proposals: S.

    Raises:
        TypeError: If model or guide is of another kind.
        ValueError: If S is below one.

    Example:
        >>> from guides import MeanField
        >>> from zoo import LinearVAE
        >>> model, x = LinearVAE(5, 2), torch.zeros(4, 5)
        >>> Resampled(model, MeanField(5, 2), num_proposals=10)(x).shape
        torch.Size([4, 2])
    """

    def __init__(self, model: LatentModel, base: Guide, *, num_proposals: int = 50) -> None:
        check_count(num_proposals, "num_proposals")
        super().__init__(model, base)
        self.num_proposals = num_proposals

    def draw(self, x: Tensor, num_samples: int) -> Tensor:
        """Draws of z for data x (N, D): (S, N, K), without gradient."""
        distribution = self.base.posterior(x)
        rows = at_once(_ELEMENTS, self.num_proposals * x.numel())
        blocks = [min(rows, num_samples - start) for start in range(0, num_samples, rows)]
        draws = []
        for size in blocks:
            z = distribution.sample(torch.Size((self.num_proposals, size)))
            log_weights = (
                self.model.prior().log_prob(z) + self.model.likelihood(z).log_prob(x) - distribution.log_prob(z)
            )
            # The largest of the log weights with Gumbel noise is a draw by the weights.
            index = (log_weights - torch.rand_like(log_weights).log().neg().log()).argmax(0)
            draws.append(z.gather(0, index[None, ..., None].expand(1, *z.shape[1:])).squeeze(0))
        return torch.cat(draws)
