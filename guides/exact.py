"""Guides computed from the model's exact posterior: nothing to train, and no amortisation gap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from guides.base import Guide, Local
from guides.local import local_gaussian
from inference.core.checks import ChecksData, check_programs
from inference.core.protocols import SupportsPosterior
from inference.distributions.gaussian import DiagNormal, as_full_normal


class _PosteriorGuide(Guide):
    """Holds the model in a tuple: as an attribute it would become part of the guide, parameters and all."""

    def __init__(self, model: SupportsPosterior) -> None:
        super().__init__()
        check_programs(model)
        if not isinstance(model, SupportsPosterior):
            raise TypeError(
                f"expected a model with an exact posterior(x) (PPCA or LinearVAE), got {type(model).__name__}"
            )
        self._model = (model,)

    @property
    def model(self) -> SupportsPosterior:
        """The model whose posterior this is."""
        return self._model[0]

    @torch.no_grad()
    def local(self, x: Tensor) -> Local:
        """The guide of these data (N, D), with a Gaussian of this kind free for each data point.

        Raises:
            TypeError: If the posterior is not Gaussian.
        """
        return local_gaussian(x, self.posterior(x))

    def check_data(self, x: Any) -> None:
        """Check that ``x`` are data for the model.

        Raises:
            TypeError: See :func:`inference.core.checks.check_layout`.
            ValueError: See :func:`inference.core.checks.check_layout` and :func:`inference.core.checks.check_finite`.
        """
        if isinstance(self.model, ChecksData):
            self.model.check_data(x)
        else:
            super().check_data(x)

    def config(self) -> dict[str, Any]:
        """Constructor arguments: the model is the other half of the pair."""
        return {"model": "<model>"}


class Exact(_PosteriorGuide):
    r"""The model's exact posterior as a guide: every importance weight equals the evidence.

    .. math:: q(z \mid x) = p(z \mid x)

    Args:
        model: A model with ``posterior(x)``.

    Raises:
        TypeError: If the model has none.

    Example:
        >>> import torch
        >>> from zoo import PPCA
        >>> from inference import log_weights
        >>> model, x = PPCA(5, 2).double(), torch.zeros(4, 5).double()
        >>> weights = log_weights(model, Exact(model), x, num_samples=3)
        >>> bool((weights - model.log_evidence(x)).abs().max() < 1e-9)
        True
    """

    def posterior(self, x: Tensor) -> Distribution:
        """Distribution of z given x (N, D): batch (N,), event (K,)."""
        return self.model.posterior(x)


class TiedMeanField(_PosteriorGuide):
    r"""Tied mean-field guide: the best Gaussian with independent coordinates for a Gaussian posterior N(m, S).

    .. math:: q(z \mid x) = N(m(x), \operatorname{diag}(1 / (S^{-1})_{kk}))

    For a linear decoder this is V = M^-1 W', D = sigma^2 / diag M with M = W'W + sigma^2 I: the optimum of the linear
    VAE's guide, tied to the weights of the model, so that only the model remains to be trained.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469.

    Args:
        model: A model whose ``posterior(x)`` is Gaussian.

    Raises:
        TypeError: If the model has none.
    """

    def posterior(self, x: Tensor) -> DiagNormal:
        """Distribution of z given x (N, D): batch (N,), event (K,)."""
        distribution = as_full_normal(self.model.posterior(x))
        if distribution is None:
            raise TypeError(f"expected {type(self.model).__name__}.posterior(x) to be Gaussian")
        factor = distribution._unbroadcasted_scale_tril
        inverse = factor.inverse()
        return DiagNormal(distribution.loc, inverse.square().sum(-2).rsqrt())
