r"""BILBO: the ELBO under a zero-mean Gaussian prior that follows the codes of the batch.

.. math:: p(z) = N(z; 0, \operatorname{diag} s), \quad s_k = \frac1N \sum_n (\mu_{nk}^2 + \sigma_{nk}^2)

A law that depends on the batch is no model: :class:`BILBO` trains it, :class:`FittedPrior` makes it one afterwards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from inference.core.call import Call
from inference.core.checks import ChecksData, check_arguments
from inference.core.draw import Draw
from inference.core.handlers import apply_mask
from inference.core.module import Module
from inference.core.run import Program
from inference.distributions.gaussian import DiagNormal
from inference.objectives.base import Objective

_BATCH = 1024


class BILBO(Objective):
    r"""The ELBO under the floating prior, with its rate in closed form and the reconstruction by Monte Carlo.

    .. math:: E_q[\log p(x_n \mid z)] - KL(q(z \mid x_n) \,\|\, N(0, \operatorname{diag} s))

    For a guide whose variances v do not depend on x the mean rate is, with m the mean square of the means,

    .. math:: \tfrac12 \sum_k \log(1 + m_k / v_k).

    The model's own prior plays no part; being the best zero-mean Gaussian for the batch, the floating one only raises
    the bound.

    Warning:
        Of a batch of B data the rate is too small by about m^2 / (2 B (m + v)^2) per coordinate. Train with large
        batches, and report the :class:`inference.objectives.evidence_lower_bound.ELBO` of the frozen model.

    References:
        Fyffe, 2019, arXiv 1912.10309. Barron, "A General and Adaptive Robust Loss Function", 2019, arXiv 1701.03077.

    Args:
        num_particles: S, samples per datum.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, draw: Draw) -> Tensor:
        """ELBO under the floating prior per datum, (N,).

        Raises:
            TypeError: If nothing in the model can be frozen: trained so, it would keep a prior that is not its own.
            NotImplementedError: If the guide's law has no closed-form KL to a Gaussian.
        """
        model = draw.call.model
        if not (isinstance(model, nn.Module) and any(map(_can_be_frozen, model.modules()))):
            raise TypeError(
                "expected a model whose prior is fitted and frozen after training, FittedPrior(model) say, got "
                f"{type(model).__name__}"
            )
        bound = draw.total(draw.model_sites, observed=True).mean(0)
        for name in draw.latents:
            site = draw.guide_sites[name]
            moments = _second_moments(site.fn)
            sigma = moments.flatten(0, -2).mean(0).sqrt()
            divergence = kl_divergence(site.fn, DiagNormal(torch.zeros_like(sigma), sigma))
            bound = bound - draw.term(site, apply_mask(divergence, site.mask)).mean(0)
        return bound


class FittedPrior(Module):
    r"""A model whose prior is fitted to the codes of the training data, once :meth:`freeze` is called.

    .. math:: z \sim N(0, \operatorname{diag} s)

    Until then, and in train mode, it runs with its own prior, and evidence and comparison refuse it by name.

    Args:
        model: Pyro model; a module's parameters are trained as part of this one.
        latent_dim: K.
        site: The latent site, of event (K,).

    Attributes:
        second_moment: s, (K,) buffer, NaN until frozen.

    Example:
        >>> from guides import Linear
        >>> from zoo import LinearVAE
        >>> x, model, guide = torch.randn(20, 5), FittedPrior(LinearVAE(5, 2), 2), Linear(5, 2)
        >>> value = BILBO().per_datum(model, guide, x)  # train with it here
        >>> model.freeze(guide, x)
        >>> model(n=3).shape
        torch.Size([3, 5])
    """

    second_moment: Tensor

    def __init__(self, model: Program, latent_dim: int, *, site: str = "z") -> None:
        super().__init__()
        self.model, self.site = model, site
        self.register_buffer("second_moment", torch.full((latent_dim,), math.nan))

    @property
    def frozen(self) -> bool:
        """Whether the variances are set."""
        return not bool(self.second_moment.isnan().any())

    def check_data(self, x: Any) -> None:
        """As the model's own check, where it has one."""
        if isinstance(self.model, ChecksData):
            self.model.check_data(x)

    @torch.no_grad()
    def freeze(self, guide: Program, x: Tensor) -> None:
        """Set the prior's variances to the second moments of the codes, and switch to eval mode.

        Args:
            guide: The guide that the model was trained with; its law at the site has a mean and a variance.
            x: Training data, (N, ...): all of them, never a test batch.

        Raises:
            ValueError: If the data are unfit, or the law is not of K coordinates.
        """
        check_arguments((self, guide), (x,), {})
        total = torch.zeros_like(self.second_moment)
        for part in x.split(_BATCH):
            moments = _second_moments(Call(self.model, guide, (part,)).run_guide()[self.site].fn)
            if moments.shape[-1:] != total.shape:
                raise ValueError(f"expected codes of event {tuple(total.shape)}, got {tuple(moments.shape[-1:])}")
            total += moments.flatten(0, -2).sum(0)
        self.second_moment.copy_(total / len(x))
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with the fitted prior once it is frozen."""
        if self.training or not self.frozen:
            return self.model(*args, **kwargs)
        law = DiagNormal(torch.zeros_like(self.second_moment), self.second_moment.sqrt())
        with _Replace(self.site, law):
            return self.model(*args, **kwargs)


class _Replace(Messenger):
    """Gives one sample site another law."""

    def __init__(self, site: str, law: DiagNormal) -> None:
        super().__init__()
        self.site, self.law = site, law

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            msg["fn"] = self.law.expand(msg["fn"].batch_shape)


def _can_be_frozen(module: nn.Module) -> bool:
    return hasattr(type(module), "freeze") and hasattr(type(module), "frozen")  # by class: no tensor is read


def _second_moments(law: Distribution) -> Tensor:
    return law.mean.square() + law.variance
