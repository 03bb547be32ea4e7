r"""Importance-weighted objectives: one bound, three estimators of its gradient.

.. math:: L_K = E \log \frac1K \sum_{k=1}^K w_k, \quad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}

With normalised weights :math:`\bar w_k` and reparameterised draws the gradient of one estimate is

.. math:: \sum_k \bar w_k \left[\text{path}_k + \nabla \log p(x, z_k) - \nabla \log q(z_k \mid x)\right],

where the path is what reaches the parameters through z alone, and both other gradients are at fixed z. The
estimators weigh the three differently. They are told apart by what they go through, not by the name of a parameter:
a guide that samples its sites one after the other, or that shares parameters with the model, needs no special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.core.batch_dependence import refuse_batch_laws
from inference.core.draw import Draw
from inference.core.estimates import log_mean_exp
from inference.core.run import run_pair
from inference.objectives import Objective, Pair


@dataclass(frozen=True)
class GradientParts:
    """The log weights of a draw, and the parts that their gradient is made of; each (S, N) in nats.

    Attributes:
        log_weights: log p(x, z) - log q(z | x), with its whole gradient.
        log_joint: log p(x, z) at fixed z: the gradient of the model alone.
        log_guide: log q(z | x) at fixed z: the gradient of the guide's density alone.
    """

    log_weights: Tensor
    log_joint: Tensor
    log_guide: Tensor

    @property
    def path(self) -> Tensor:
        """Zero, with the gradient of the log weights that goes through z alone."""
        return self.log_weights - self.log_joint + self.log_guide


def gradient_parts(pair: Pair, num_samples: int) -> GradientParts:
    """Draw from a pair, run it again at the values drawn, and so split the gradient of its log weights.

    The difference of the two runs is the path: what both have in common cancels. Without gradient one run is enough.

    Args:
        pair: The pair with its arguments.
        num_samples: S.

    Raises:
        ValueError: If the two runs would differ by more than the path (batch normalisation or dropout in train mode),
            a site carries a scale beyond the plate's, or as :meth:`Pair.draw`.
    """
    draw = pair.draw(num_samples)
    fixed = at_fixed_latents(pair, draw) if torch.is_grad_enabled() else draw
    return GradientParts(draw.log_weights, fixed.total(fixed.model_sites), fixed.total(fixed.guide_sites))


def draw_without_gradient(pair: Pair, num_samples: int) -> Draw:
    """Samples of any law, reparameterised or not, through which nothing learns."""
    with torch.no_grad():
        draw = run_pair(pair.model, pair.guide, pair.args, pair.kwargs, num_samples=num_samples, plate=pair.plate)
    pair.plate_scale = draw.layout.plate_scale
    return draw


def at_fixed_latents(pair: Pair, draw: Draw) -> Draw:
    """Both halves of a pair run again at the latents of a draw, through which no gradient flows.

    Raises:
        ValueError: If a module's output is not settled by its input: batch normalisation or dropout in train mode.
    """
    values = dict(draw.subsamples) | {name: z.detach() for name, z in draw.latents.items()}
    with refuse_batch_laws(pair.model, pair.guide):
        return run_pair(
            pair.model,
            pair.guide,
            pair.args,
            pair.kwargs,
            num_samples=draw.num_samples,
            plate=pair.plate,
            subsamples=values,
            expose_params=True,
        )


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one over the first dimension, without gradient."""
    return log_weights.detach().softmax(0)


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another of the same shape."""
    return value.detach() + (surrogate - surrogate.detach())


class IWELBO(Objective):
    r"""Importance-weighted bound with its plain gradient.

    .. math:: L_K = E \log \frac1K \sum_k w_k, \quad \text{ELBO} = L_1 \le L_K \le L_{K+1} \le \log p(x)

    A subsampling plate's scale stands outside the logarithm, so that the bound holds there, too.

    Warning:
        The more particles, the less signal the gradient of the guide has, by the square root of K (Rainforth et al.,
        2018, arXiv 1802.04537). Use :class:`DReG` for many.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv 1509.00519.

    Args:
        num_particles: K, samples per datum.
        plate: Name of the plate over the data, ``"data"`` if None.

    Example:
        >>> from guides import MeanField
        >>> from zoo import LinearVAE
        >>> IWELBO(8).per_datum(LinearVAE(5, 2), MeanField(5, 2), torch.zeros(4, 5)).shape
        torch.Size([4])
    """

    def bound(self, pair: Pair) -> Tensor:
        """Importance-weighted bound per datum, (N,).

        Raises:
            ValueError: If a site is scaled beyond the data plate.
        """
        return log_mean_exp(pair.draw(self.num_particles).log_weights)


class StickingTheLanding(Objective):
    r"""Importance-weighted bound whose gradient leaves out the guide's score.

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
        num_particles: K, samples per datum.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, pair: Pair) -> Tensor:
        """Importance-weighted bound per datum, (N,).

        Raises:
            ValueError: See :func:`gradient_parts`.
        """
        parts = gradient_parts(pair, self.num_particles)
        surrogate = normalised(parts.log_weights) * (parts.log_weights + parts.log_guide)
        return with_gradient_of(log_mean_exp(parts.log_weights), surrogate.sum(0))


class DReG(Objective):
    r"""Importance-weighted bound with the doubly reparameterised gradient.

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
        num_particles: K, samples per datum.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, pair: Pair) -> Tensor:
        """Importance-weighted bound per datum, (N,).

        Raises:
            ValueError: See :func:`gradient_parts`.
        """
        parts = gradient_parts(pair, self.num_particles)
        weights = normalised(parts.log_weights)
        surrogate = weights.square() * parts.path + weights * parts.log_joint
        return with_gradient_of(log_mean_exp(parts.log_weights), surrogate.sum(0))
