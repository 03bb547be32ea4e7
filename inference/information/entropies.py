r"""The sum of three entropies that the ELBO equals where it is stationary.

.. math::
    L = E\, H[q(z \mid x)] - H[p(z)] - E\, H[p(x \mid z)]

holds where the ELBO is stationary in the noise's variance and in the scale of the latents, as at the end of training a
Gaussian VAE with learnt noise. It says nothing of the evidence: the gap stays what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.core.checks import check_finite
from inference.core.display import Result
from inference.core.protocols import SupportsGaussianDecoder, SupportsPosterior, supports_gaussian_decoder
from inference.distributions.gaussian import LOG_2PI, as_full_normal


@dataclass(frozen=True, kw_only=True, repr=False)
class ELBOEntropies(Result):
    """Entropies of a Gaussian VAE, in nats.

    Attributes:
        posterior: H[q(z | x_n)], (N,).
        prior: H[p(z)], ().
        noise: H[p(x | z)], the same for all z, ().
    """

    posterior: Tensor
    prior: Tensor
    noise: Tensor

    @property
    def total(self) -> Tensor:
        """The mean entropy of the guide less those of prior and noise, (): the ELBO where that is stationary."""
        return self.posterior.mean() - self.prior - self.noise


@torch.no_grad()
def elbo_entropies(model: SupportsGaussianDecoder, guide: SupportsPosterior, x: Tensor) -> ELBOEntropies:
    r"""Entropies of guide, prior and noise, whose sum the ELBO equals at stationary points with learnt noise.

    .. math:: \sigma^2 = \tfrac1D E \|x - f(z)\|^2, \quad E \|z\|^2 = K \quad\Longrightarrow\quad
        L = E\, H[q(z \mid x)] - \tfrac K2 \log 2 \pi e - \tfrac D2 \log 2 \pi e \sigma^2

    Warning:
        Away from such points the sum is neither the ELBO nor a bound of anything.

    References:
        Damm, Forster, Velychko, Dai, Fischer, Lücke, "The ELBO of Variational Autoencoders Converges to a Sum of Three
        Entropies", 2023, arXiv 2010.14860.

    Args:
        model: Model with a decoder, Gaussian noise and a prior whose entropy is known.
        guide: Guide with a Gaussian ``posterior(x)``.
        x: Data, (N, D).

    Raises:
        TypeError: If the model or the guide is of another kind.
        ValueError: If ``x`` is not finite.

    Example:
        >>> from guides import TiedMeanField
        >>> from zoo import LinearVAE
        >>> x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).double()
        >>> model = LinearVAE.optimum(x, 2)
        >>> entropies = elbo_entropies(model, TiedMeanField(model), x)
        >>> bool((entropies.total - model.log_evidence(x).mean()).abs() < 1e-10)
        True
    """
    if not supports_gaussian_decoder(model):
        raise TypeError(f"expected a model with decode(z), sigma and prior(), got {type(model).__name__}")
    check_finite(x)
    full = as_full_normal(guide.posterior(x))
    if full is None:
        raise TypeError(f"expected a guide with a Gaussian posterior, got {type(guide).__name__}")
    log_sigma = model.sigma.double().log().expand(x.shape[1])
    noise = 0.5 * x.shape[1] * (LOG_2PI + 1) + log_sigma.sum()
    log_diagonal = full.scale_tril.double().diagonal(dim1=-2, dim2=-1).log()
    posterior = 0.5 * log_diagonal.shape[-1] * (LOG_2PI + 1) + log_diagonal.sum(-1)
    return ELBOEntropies(posterior=posterior.expand(len(x)), prior=_entropy(model), noise=noise)


def _entropy(model: SupportsGaussianDecoder) -> Tensor:
    try:
        return model.prior().entropy().double()
    except NotImplementedError:
        kind = type(model.prior()).__name__
        raise TypeError(f"expected a prior whose entropy is known, got {kind}") from None
