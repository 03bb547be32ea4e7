r"""BILBO: the ELBO under a zero-mean Gaussian prior that follows the codes of the batch.

.. math:: p(z) = N(z; 0, \operatorname{diag} s), \quad s_k = \frac1N \sum_n (\mu_{nk}^2 + \sigma_{nk}^2)

A batch-dependent distribution is not a model. It serves training: by :class:`BILBO` for any Pyro model, or as the
:class:`FloatingPrior` of a model that takes its prior as a module. To freeze it afterwards makes it a model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

from inference.core.checks import ChecksData, check_arguments, check_count
from inference.core.memory import at_once
from inference.core.protocols import supports_freeze
from inference.core.seeding import random_state
from inference.distributions.floating import FloatingNormal, second_moments
from inference.distributions.gaussian import DiagNormal
from inference.objectives.base import Objective
from inference.objectives.evidence_lower_bound import closed_form_kl
from inference.pair.call import Call
from inference.pair.draw import Draw
from inference.pair.handlers import apply_mask
from inference.pair.module import Module
from inference.pair.run import Program

_BATCH = 1024


class FloatingPrior(nn.Module):
    r"""Floating prior: a zero-mean Gaussian whose variances are, in every batch, the best fit to the codes.

    .. math:: s_k = \frac1N \sum_n \left(\mu_{nk}^2 + \sigma_{nk}^2\right)

    With a guide of constant variance and the objective :class:`inference.AnalyticKLELBO` this is the BILBO, whose rate
    is, with m the mean square of the means and v the variance,

    .. math:: \tfrac12 \sum_k \log(1 + m_k / v_k)

    With an objective that samples the codes, the squares of the samples take the place of the moments.

    Warning:
        A batch-dependent distribution is not a model. It serves training; :meth:`freeze` then turns it into one, and
        evidence and comparison refuse it before.

    References:
        Fyffe, 2019, arXiv 1912.10309.

    Args:
        latent_dim: K.

    Attributes:
        second_moment: s, (K,) buffer, NaN until frozen.

    Example:
        >>> from guides import MeanField
        >>> from zoo import DeepGaussianVAE
        >>> x, guide, prior = torch.randn(20, 5), MeanField(5, 2), FloatingPrior(2)
        >>> model = DeepGaussianVAE(5, 2, prior=prior)  # train it here
        >>> prior.freeze(guide, x)
        >>> model(n=3).shape
        torch.Size([3, 5])
    """

    second_moment: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_count(latent_dim, "latent_dim")
        self.latent_dim = latent_dim
        self.register_buffer("second_moment", torch.full((latent_dim,), math.nan))

    @property
    def frozen(self) -> bool:
        """Whether the variances are set."""
        return not bool(self.second_moment.isnan().any())

    def freeze(self, guide: Program, x: Tensor) -> None:
        """Set the variances for good, to the second moments of the codes, and switch to eval mode.

        Args:
            guide: The guide that the model was trained with; its distribution of z has a mean and a variance.
            x: Training data, (N, ...): all of them, never a test batch.

        Raises:
            ValueError: If the guide has no site ``"z"`` of event (K,), or the data are not finite.
        """
        with random_state(None):
            self._fit(guide, x, "z")

    @torch.no_grad()
    def _fit(self, guide: Program, x: Tensor, site: str) -> None:
        check_arguments((guide,), (x,), {})
        total = torch.zeros_like(self.second_moment)
        for part in x.split(at_once(_BATCH)):
            moments = second_moments(_distribution(guide, part, site))
            if moments.shape[-1:] != total.shape:
                raise ValueError(f"expected codes of event {tuple(total.shape)}, got {tuple(moments.shape[-1:])}")
            total += moments.flatten(0, -2).sum(0)
        self.second_moment.copy_(total / len(x))
        self.eval()

    def forward(self) -> Distribution:
        """The distribution: fitted to what it scores in train mode and until frozen; batch (), event (K,)."""
        zero = torch.zeros_like(self.second_moment)
        if self.training or not self.frozen:
            return FloatingNormal(zero)
        return DiagNormal(zero, self.second_moment.sqrt())


def _distribution(guide: Program, x: Tensor, site: str) -> Distribution:
    sites = Call(guide, guide, (x,)).run_guide()
    if site not in sites:
        raise ValueError(
            f"expected a guide with the latent site {site!r}, got {type(guide).__name__} with {list(sites)}"
        )
    return sites[site].fn


class BILBO(Objective):
    r"""Batch information lower bound (BILBO): the ELBO under the floating prior, with its rate in closed form.

    .. math:: E_q[\log p(x_n \mid z)] - KL(q(z \mid x_n) \,\|\, N(0, \operatorname{diag} s))

    The model's own prior plays no part; being the best zero-mean Gaussian for the batch, the floating one only raises
    the bound.

    Warning:
        In a batch of B data points the rate is too small by about m^2 (kappa - 1) / (4 B (m + v)^2) per coordinate,
        with kappa the kurtosis of the means: m^2 / (2 B (m + v)^2) where they are Gaussian. Train with large batches,
        and report the :class:`inference.ELBO` of the frozen model.

    References:
        Fyffe, 2019, arXiv 1912.10309. Barron, "A General and Adaptive Robust Loss Function", 2019, arXiv 1701.03077.

    Args:
        num_particles: S, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, draw: Draw) -> Tensor:
        """ELBO under the floating prior per data point, (N,).

        Raises:
            TypeError: If nothing in the model can be frozen: after training its prior would not be the fitted one.
            NotImplementedError: If the guide's distribution has no closed-form KL to a Gaussian.
        """
        model = draw.call.model
        if not (isinstance(model, nn.Module) and any(map(supports_freeze, model.modules()))):
            raise TypeError(
                "expected a model whose prior is fitted and frozen after training, such as FittedPrior(model), got "
                f"{type(model).__name__}"
            )
        bound = draw.total(draw.model_sites, observed=True).mean(0)
        for name in draw.latents:
            site = draw.guide_sites[name]
            divergence = closed_form_kl(site.fn, FloatingNormal(site.value.new_zeros(site.fn.event_shape)))
            bound = bound - draw.term(site, apply_mask(divergence, site.mask)).mean(0)
        return bound


class FittedPrior(Module):
    r"""Fitted prior: a model one of whose latents gets a :class:`FloatingPrior`, once :meth:`freeze` is called.

    .. math:: z \sim N(0, \operatorname{diag} s)

    Until then, and in train mode, it runs with its own prior, and evidence and comparison refuse it by name.

    Args:
        model: Pyro model; a module's parameters are trained as part of this one.
        latent_dim: K.
        site: The latent site, of event (K,).

    Example:
        >>> from guides import Linear
        >>> from zoo import LinearVAE
        >>> x, model, guide = torch.randn(20, 5), FittedPrior(LinearVAE(5, 2), 2), Linear(5, 2)
        >>> value = BILBO().per_datum(model, guide, x)  # train with it here
        >>> model.freeze(guide, x)
        >>> model(n=3).shape
        torch.Size([3, 5])
    """

    def __init__(self, model: Program, latent_dim: int, *, site: str = "z") -> None:
        super().__init__()
        self.model, self.site, self.prior = model, site, FloatingPrior(latent_dim)

    @property
    def second_moment(self) -> Tensor:
        """The prior's variances s, (K,); NaN until frozen."""
        return self.prior.second_moment

    @property
    def frozen(self) -> bool:
        """Whether the variances are set."""
        return self.prior.frozen

    def check_data(self, x: Any) -> None:
        """As the model's own check, where it has one."""
        if isinstance(self.model, ChecksData):
            self.model.check_data(x)

    def freeze(self, guide: Program, x: Tensor) -> None:
        """Set the prior's variances, see :meth:`FloatingPrior.freeze`, and switch to eval mode.

        Args:
            guide: The guide that the model was trained with.
            x: Training data, (N, ...): all of them, never a test batch.

        Raises:
            TypeError: If the data are not of the model's type.
            ValueError: If the data are not of the model's shape, or as :meth:`FloatingPrior.freeze`.
        """
        check_arguments((self,), (x,), {})
        self.prior._fit(guide, x, self.site)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with the fitted prior once it is frozen."""
        if self.training or not self.frozen:
            return self.model(*args, **kwargs)
        with _Replace(self.site, self.prior()):
            return self.model(*args, **kwargs)


class _Replace(Messenger):
    """Gives one sample site another distribution."""

    def __init__(self, site: str, distribution: Distribution) -> None:
        super().__init__()
        self.site, self.distribution = site, distribution

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            msg["fn"] = self.distribution.expand(msg["fn"].batch_shape)
