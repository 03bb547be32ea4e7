r"""Bounds from powers of the importance weights: the variational Renyi bound and the chi upper bound (CUBO).

.. math:: L_\alpha = \frac{1}{1 - \alpha} \log E_q \, w^{1 - \alpha}, \quad w = \frac{p(x, z)}{q(z \mid x)}

It falls with alpha: the log-evidence at 0, the ELBO at 1. CUBO of order n is the same at alpha = 1 - n.
"""

from __future__ import annotations

import math

from torch import Tensor

from inference.core.checks import check_count
from inference.core.estimates import log_mean_exp
from inference.objectives.base import Objective
from inference.objectives.gradients import at_fixed_latents, normalised, with_gradient_of
from inference.pair.draw import Draw


def renyi_bound(log_weights: Tensor, alpha: float) -> Tensor:
    r"""Variational Renyi (VR) bound, estimated from log weights, (N,) in nats.

    .. math:: \hat L_\alpha = \frac{1}{1 - \alpha} \log \frac1S \sum_s w_s^{1 - \alpha}

    It is the log of a power mean, hence never above the importance-weighted estimate for alpha >= 0 and never below
    it for alpha <= 0, sample by sample.

    Args:
        log_weights: (S, N).
        alpha: Order, not 1.

    Raises:
        ValueError: If alpha is 1, where the bound is the ELBO, or not finite.

    Example:
        >>> import torch
        >>> renyi_bound(torch.tensor([[1.0], [3.0]]).log(), -1.0).exp().square()
        tensor([5.])
    """
    _check_alpha(alpha)
    return log_mean_exp((1 - alpha) * log_weights) / (1 - alpha)


def _check_alpha(alpha: float) -> None:
    if not math.isfinite(alpha) or alpha == 1:
        raise ValueError(f"expected a finite alpha other than 1, where the bound is the objective ELBO, got {alpha}")


class VRBound(Objective):
    r"""Variational Renyi (VR) bound by Monte Carlo.

    .. math:: \hat L_\alpha = \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha}

    Warning:
        For alpha >= 0 the estimate is on average a lower bound on the log-evidence, for any K. For alpha < 0 only the
        limit of infinitely many particles is an upper bound: one particle gives the ELBO on average, and any finite
        K something between the ELBO and that limit. The gradient's bias falls like 1 / K.

    References:
        Li, Turner, "Renyi Divergence Variational Inference", 2016, arXiv 1602.02311.

    Args:
        alpha: Order, not 1; 0 is the importance-weighted bound.
        num_particles: K, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If alpha is 1 or not finite.
    """

    def __init__(self, alpha: float, num_particles: int = 2, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        _check_alpha(alpha)
        self.alpha = alpha

    def bound(self, draw: Draw) -> Tensor:
        """Renyi bound per data point, (N,).

        Raises:
            ValueError: If a site is scaled beyond the data plate.
        """
        return renyi_bound(draw.log_weights, self.alpha)


class CUBO(Objective):
    r"""Chi upper bound (CUBO) on the log-evidence, minimised by the guide; the model is not trained by it.

    .. math::
        U_n = \frac1n \log E_q \, w^n \ge \log p(x), \quad
        \nabla U_n = -\frac{n-1}{n} \, E_{\pi_n} \nabla \log q(z \mid x), \quad
        \pi_n \propto p(x, z)^n q(z \mid x)^{1 - n}

    The mean over pi_n is taken by weights w^n that are normalised over the K particles. :meth:`bound`, which
    objectives maximise, is *minus* the estimate of U_n: the loss is the upper bound.

    Warning:
        E w^n must exist, and the estimate of the n-th power is unbiased, not its logarithm: with K particles the value
        is on average below U_n, and may lie below log p(x). It does not see modes that the guide never visits.
        Take many particles. Descending the estimate along its reparameterised gradient would drive the guide away
        from the posterior, where the estimate is smallest; hence the gradient at fixed z.

    References:
        Dieng, Tran, Ranganath, Paisley, Blei, "Variational Inference via chi Upper Bound Minimization", 2017,
        arXiv 1611.00328.

    Args:
        order: n, at least 2.
        num_particles: K, samples per data point, at least 2.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If n or K is below 2.
    """

    reparameterised = False

    def __init__(self, order: int = 2, num_particles: int = 16, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        check_count(order, "order", minimum=2)
        check_count(num_particles, "num_particles", minimum=2)
        self.order = order

    def bound(self, draw: Draw) -> Tensor:
        """Minus the upper bound per data point, (N,).

        Raises:
            ValueError: If a site is scaled beyond the data plate, or see
                :func:`inference.objectives.gradients.at_fixed_latents`.
        """
        fixed = at_fixed_latents(draw)
        score = normalised(self.order * draw.log_weights) * fixed.log_guide
        value = -renyi_bound(draw.log_weights, 1 - self.order)
        return with_gradient_of(value, (1 - 1 / self.order) * score.sum(0))
