r"""Whether encoder and decoder of a pair are each other's inverse, and the encoder's variances what that implies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad
from tqdm.auto import tqdm

from inference.core.checks import check_count, check_finite
from inference.core.deprecation import renamed_keywords
from inference.core.display import Result
from inference.core.memory import at_once
from inference.core.protocols import SupportsGaussianDecoder, SupportsPosterior, supports_gaussian_decoder
from inference.core.seeding import seeded
from inference.core.sources import as_tensors
from inference.numerics.jacobian import Decode, decoder_jacobian, directional_derivative

# Rows at once by default.
_BLOCK = 1024
_NUM_DRAWS = 1000


@dataclass(frozen=True, kw_only=True, repr=False)
class SelfConsistency(Result):
    r"""Self-consistency of a pair: how far encoder and decoder are from being each other's inverse, per data point.

    Attributes:
        reconstruction: ||f(mu(x)) - x||, (N,).
        inversion: ||mu(x) - g(x)||, (N,); None where no inverse was given.
        var: The encoder's variances, (N, K).
        predicted_var: The variances that the decoder's Jacobian predicts, (N, K).
    """

    reconstruction: Tensor
    inversion: Tensor | None
    var: Tensor
    predicted_var: Tensor

    @property
    def ratio(self) -> Tensor:
        """Variances of the encoder over the predicted ones, (N, K); one at the optimum of little noise."""
        return self.var / self.predicted_var


@renamed_keywords(batch_size="block")
def self_consistency(
    model: SupportsGaussianDecoder,
    guide: SupportsPosterior,
    x: Tensor,
    *,
    inverse: Decode | None = None,
    block: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> SelfConsistency:
    r"""Self-consistency: compare an encoder with the inverse of its decoder, and its variances with the Jacobian's.

    .. math:: \sigma_k^2(x) \approx \Bigl(-\partial_k^2 \log p(z) + \sum_d J_{dk}^2 / \sigma_d^2\Bigr)^{-1}

    with J at g(x), at mu(x) where no inverse is given.

    Warning:
        Holds in the limit of little noise, for a Gaussian guide with independent coordinates and a prior with
        independent ones, with relative error of the order of the noise's variance. Where the guide's distribution
        states no mean or variance, both are those of 1000 draws.

    References:
        Reizinger, Gresele, Brady, von Kügelgen, Zietlow, Schölkopf, Martius, Brendel, Besserve, "Embrace the gap:
        VAEs perform independent mechanism analysis", 2022, arXiv 2206.02416.

    Args:
        model: Model with a decoder and Gaussian noise.
        guide: Guide with ``posterior(x)``.
        x: Data, (N, D).
        inverse: g, the inverse of the decoder, from (M, D) to (M, K).
        block: Rows at once; None chooses.
        seed: Of the draws; leaves the global random state as it was.
        progress: Show a progress bar where there are several blocks.

    Returns:
        A :class:`SelfConsistency`, float64.

    Raises:
        TypeError: If the model is of another kind.
        ValueError: If ``x`` is not finite, or the noise not yet frozen.
    """
    if not supports_gaussian_decoder(model):
        raise TypeError(f"expected a model with decode(z), sigma and prior(), got {type(model).__name__}")
    block = at_once(_BLOCK) if block is None else block
    check_count(block, "block")
    x = as_tensors(x)
    check_finite(x)
    check_finite(model.sigma.detach(), "sigma")
    with torch.no_grad(), seeded(seed):
        blocks = x.split(block)
        bar = tqdm(blocks, disable=not progress or len(blocks) == 1, desc="self-consistency", unit="block")
        parts = [_compare(model, guide, rows, inverse) for rows in bar]
    reconstruction, inversion, var, predicted = (torch.cat(p).double() for p in zip(*parts, strict=True))
    return SelfConsistency(
        reconstruction=reconstruction,
        inversion=None if inverse is None else inversion,
        var=var,
        predicted_var=predicted,
    )


def _compare(
    model: SupportsGaussianDecoder, guide: SupportsPosterior, x: Tensor, inverse: Decode | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = _moments(guide.posterior(x))
    z = mean if inverse is None else inverse(x)
    information = (decoder_jacobian(model.decode, z) / model.sigma.unsqueeze(-1)).square().sum(-2)
    residual = (model.decode(mean) - x).norm(dim=-1)
    return residual, (mean - z).norm(dim=-1), var, (information + _curvature(model.prior(), z)).reciprocal()


def _curvature(prior: Distribution, z: Tensor) -> Tensor:
    """Minus the second derivatives of a factorised log-density, (N, K): the rows of its Hessian have one entry each."""

    def slope(points: Tensor) -> Tensor:
        # The zero ties in distributions that do not depend on the point, the uniform one.
        return grad(lambda v: prior.log_prob(v).sum() + 0 * v.sum())(points)

    return -directional_derivative(slope, z, torch.ones_like(z))[1]


def _moments(distribution: Distribution) -> tuple[Tensor, Tensor]:
    try:
        return distribution.mean, distribution.variance
    except NotImplementedError:
        draws = distribution.sample((_NUM_DRAWS,))
        return draws.mean(0), draws.var(0)
