r"""Rate and distortion in closed form, for linear-Gaussian decoders under Gaussian guides, without sampling noise.

.. math:: D = -E_{q(z \mid x)} \log p(x \mid z), \qquad R = KL(q(z \mid x) \,\|\, p(z)), \qquad ELBO = -(D + R)

At a fixed sigma^2 the optima lie on the curve of :mod:`inference.information.reverse_water_filling`.

References:
    Alemi, Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018, arXiv 1711.00464.
    Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469 (the closed form).
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import kl_divergence

from inference.core.protocols import SupportsExpectedLogLikelihood
from inference.core.ranks import batch_mean
from inference.objectives.base import Objective, Terms, check_nonnegative
from inference.pair.call import Call
from inference.pair.module import Module


class _ClosedForm(Objective):
    """Base of the objectives made of ELBO and rate in closed form, without samples."""

    def terms(self, call: Call, step: Tensor) -> Terms:  # noqa: ARG002
        """The objective per data point, unscaled: a pair that subsamples is refused."""
        return Terms(self._combine(*_exact_terms(call)))

    def _combine(self, elbo: Tensor, rate: Tensor) -> Tensor:
        """The objective per data point, (N,), from ELBO and rate per data point."""
        raise NotImplementedError


class AnalyticELBO(_ClosedForm):
    r"""Evidence lower bound (ELBO) in closed form, for a linear-Gaussian decoder and a Gaussian guide.

    .. math::
        -\frac{1}{2\sigma^2}\left[\|x_n - \mu - W m_n\|^2 + \operatorname{tr} W^T W \Sigma_n\right]
        - \frac D2 \log 2\pi\sigma^2 - KL(N(m_n, \Sigma_n) \,\|\, N(0, I))

    Being deterministic it can be minimised by LBFGS, to machine precision.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469.

    Raises:
        TypeError: When called, if the model cannot integrate its log-likelihood over a Gaussian.
        ValueError: When called, if the guide has not exactly one latent site, or stands under a mask, scale or
            subsampling.
    """

    def __init__(self) -> None:
        super().__init__()

    def _combine(self, elbo: Tensor, rate: Tensor) -> Tensor:  # noqa: ARG002
        return elbo


class AnalyticBetaELBO(_ClosedForm):
    r"""Beta-ELBO in closed form: the ELBO with a weighted rate.

    .. math:: -D_n - \beta R_n

    Args:
        beta: The weight of the rate.

    Raises:
        ValueError: If beta is negative or not finite.
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = check_nonnegative(beta, "beta")

    def _combine(self, elbo: Tensor, rate: Tensor) -> Tensor:
        return elbo + (1 - self.beta) * rate


class AnalyticTargetRate(_ClosedForm):
    r"""Target-rate objective in closed form: the least distortion at a given rate.

    .. math:: -D_n - w \, \left| \sigma - \frac1N \sum_m R_m \right|

    Warning:
        At weight one the slope is that of the ELBO wherever R exceeds the target, so the target is met only if it is at
        least the rate of the ELBO's optimum; for a smaller one the weight must exceed -dD/dR of the frontier there.
        The corner at the target is not for LBFGS: use Adam with a falling learning rate.

    Args:
        target: sigma, nats per data point.
        weight: w.

    Raises:
        ValueError: If target or weight are negative or not finite.
    """

    def __init__(self, target: float, *, weight: float = 1.0) -> None:
        super().__init__()
        self.target, self.weight = check_nonnegative(target, "target"), check_nonnegative(weight, "weight")

    def _combine(self, elbo: Tensor, rate: Tensor) -> Tensor:
        return elbo + rate - self.weight * (self.target - batch_mean(rate)).abs()


def _exact_terms(call: Call) -> tuple[Tensor, Tensor]:
    """ELBO and rate per data point, (N,) each."""
    model = call.model
    if not isinstance(model, SupportsExpectedLogLikelihood):
        raise TypeError(
            "expected a model with expected_log_likelihood(x, posterior) and prior() (PPCA or LinearVAE), got "
            f"{type(model).__name__}"
        )
    if isinstance(model, Module):
        model.issue_params()  # the model itself does not run, yet SVI must find the parameters to train
    sites = call.run_guide(expose_params=True)
    if len(sites) != 1:
        raise ValueError(f"expected a guide with one latent site, got {list(sites)}")
    (site,) = sites.values()
    if site.mask is not None or site.scale != 1.0:
        raise ValueError("expected a guide under no mask, scale or subsampling for the closed form: use ELBO")
    x = call.args[0] if call.args else call.kwargs["x"]
    likelihood, rate = model.expected_log_likelihood(x, site.fn), kl_divergence(site.fn, model.prior())
    return likelihood - rate, rate
