r"""Importance-weighted ELBO (IWAE) objectives: one bound, three estimators of its gradient.

.. math:: L_K = E \log \frac1K \sum_{k=1}^K w_k, \quad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}

With normalised weights :math:`\bar w_k` and reparameterised draws the gradient of one estimate is

.. math:: \sum_k \bar w_k \left[\text{path}_k + \nabla \log p(x, z_k) - \nabla \log q(z_k \mid x)\right],

where the path is the derivative through z alone, and both other gradients are at fixed z. The estimators weight the
three terms differently. The terms are separated by the path of the derivative, not by the names of parameters: a guide
that samples its sites one after the other, or that shares parameters with the model, needs no special case.
"""

from __future__ import annotations

from torch import Tensor

from inference.core.estimates import log_mean_exp
from inference.objectives.base import Objective
from inference.objectives.gradients import gradient_parts, normalised, with_gradient_of
from inference.pair.draw import Draw


class IWELBO(Objective):
    r"""Importance-weighted ELBO (IWAE) with its plain gradient.

    .. math:: L_K = E \log \frac1K \sum_k w_k, \quad \text{ELBO} = L_1 \le L_K \le L_{K+1} \le \log p(x)

    A subsampling plate's scale stands outside the logarithm, so that the bound holds there, too.

    Warning:
        The more particles, the less signal the gradient of the guide has, by the square root of K (Rainforth et al.,
        2018, arXiv 1802.04537). Use :class:`DReG` for many.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv 1509.00519.

    Args:
        num_particles: K, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.

    Example:
        >>> import torch
        >>> from guides import MeanField
        >>> from zoo import LinearVAE
        >>> IWELBO(8).per_datum(LinearVAE(5, 2), MeanField(5, 2), torch.zeros(4, 5)).shape
        torch.Size([4])
    """

    def bound(self, draw: Draw) -> Tensor:
        """Importance-weighted bound per data point, (N,).

        Raises:
            ValueError: If a site is scaled beyond the data plate.
        """
        return log_mean_exp(draw.log_weights)


class StickingTheLanding(Objective):
    r"""Sticking the landing (STL): importance-weighted ELBO (IWAE) with a gradient that leaves out the guide's score.

    .. math:: \sum_k \bar w_k \left[\text{path}_k + \nabla \log p(x, z_k)\right]

    For one particle the score has mean zero: the gradient is that of the ELBO, and has no variance at all where the
    guide is the exact posterior.

    Warning:
        For more than one particle the score does not vanish on average and the gradient of the guide is biased. Use
        :class:`DReG` there. Batch normalisation and dropout in train mode are refused.

    References:
        Roeder, Wu, Duvenaud, "Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
        Inference", 2017, arXiv 1703.09194. The bias: Tucker et al., 2018, arXiv 1810.04152.

    Args:
        num_particles: K, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, draw: Draw) -> Tensor:
        """Importance-weighted bound per data point, (N,).

        Raises:
            ValueError: See :func:`gradient_parts`.
        """
        parts = gradient_parts(draw)
        surrogate = normalised(parts.log_weights) * (parts.log_weights + parts.log_guide)
        return with_gradient_of(log_mean_exp(parts.log_weights), surrogate.sum(0))


class DReG(Objective):
    r"""Doubly reparameterised gradient (DReG) of the importance-weighted ELBO (IWAE).

    .. math:: \sum_k \left[\bar w_k^2 \, \text{path}_k + \bar w_k \nabla \log p(x, z_k)\right]

    The guide's score is replaced by what it is on average once it is reparameterised again. The gradient has the
    plain one's mean for any number of particles, with a signal-to-noise ratio that grows with K. This holds for
    parameters that prior and guide share (VampPrior), too.

    Warning:
        A step runs model and guide twice: 1.6 times the plain gradient's time for a small network. Batch
        normalisation and dropout in train mode are refused.

    References:
        Tucker, Lawson, Gu, Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2018,
        arXiv 1810.04152.

    Args:
        num_particles: K, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, draw: Draw) -> Tensor:
        """Importance-weighted bound per data point, (N,).

        Raises:
            ValueError: See :func:`gradient_parts`.
        """
        parts = gradient_parts(draw)
        weights = normalised(parts.log_weights)
        surrogate = weights.square() * parts.path + weights * parts.log_joint
        return with_gradient_of(log_mean_exp(parts.log_weights), surrogate.sum(0))
