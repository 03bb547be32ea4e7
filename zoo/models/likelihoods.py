r"""Likelihoods that factorise over the dimensions: a network's output, P numbers per dimension, parametrises them.

.. math:: p(x \mid h) = \prod_d p(x_d \mid h_d), \quad h_d \in R^P

Data are floating, whatever their kind: 0 and 1, or the numbers 0 to C - 1 of categories.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from inference.core.checks import check_count
from inference.distributions.gaussian import DiagNormal


class Likelihood(nn.Module):
    """Base of the likelihoods; a subclass gives :meth:`forward` and its support.

    Args:
        num_parameters: P, parameters of the distribution per dimension.

    Attributes:
        support: The support of one data point.
    """

    support: Any

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        self.num_parameters = num_parameters

    def forward(self, parameters: Tensor) -> Distribution:
        """Distribution of x from parameters (..., D, P): batch (...), event (D,)."""
        raise NotImplementedError

    def check_data(self, x: Tensor) -> None:
        """Check that data are in the support.

        Raises:
            ValueError: With the first such row.
        """
        inside = self.support.check(x)
        if not bool(inside.all()):
            row = int((~inside).nonzero()[0, 0])
            raise ValueError(
                f"expected data in the support of {type(self).__name__}, {self.support}, got row {row}: {x[row]}"
            )


class BernoulliLikelihood(Likelihood):
    r"""Bernoulli likelihood of binary data, by logits.

    .. math:: p(x \mid h) = \prod_d s(h_d)^{x_d} (1 - s(h_d))^{1 - x_d}, \quad s(h) = 1 / (1 + e^{-h})

    Example:
        >>> BernoulliLikelihood()(torch.zeros(4, 3, 1)).mean.shape
        torch.Size([4, 3])
    """

    support = constraints.independent(constraints.boolean, 1)

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, parameters: Tensor) -> Distribution:
        """Distribution of x from logits (..., D, 1): batch (...), event (D,)."""
        return _independent(_Bernoulli(logits=parameters.squeeze(-1), validate_args=False))


class CategoricalLikelihood(Likelihood):
    r"""Categorical likelihood of data of C categories, numbered from zero, by logits.

    .. math:: p(x \mid h) = \prod_d \operatorname{softmax}(h_d)_{x_d}

    Args:
        num_categories: C, also the parameters per dimension.

    Raises:
        ValueError: If C is below two.

    Example:
        >>> CategoricalLikelihood(5)(torch.zeros(4, 3, 5)).mean
        tensor([[2., 2., 2.],
                [2., 2., 2.],
                [2., 2., 2.],
                [2., 2., 2.]])
    """

    def __init__(self, num_categories: int) -> None:
        check_count(num_categories, "num_categories", minimum=2)
        super().__init__(num_categories)
        self.support = constraints.independent(constraints.integer_interval(0, num_categories - 1), 1)

    def forward(self, parameters: Tensor) -> Distribution:
        """Distribution of x from logits (..., D, C): batch (...), event (D,)."""
        return _independent(_Categorical(logits=parameters, validate_args=False))


class GaussianLikelihood(Likelihood):
    r"""Gaussian likelihood by mean and logarithm of the standard deviation, both functions of the latent.

    .. math:: p(x \mid h) = \prod_d N(x_d; h_{d1}, e^{2 h_{d2}})

    Warning:
        Where the mean fits a data point exactly, its sigma can go to zero and the likelihood to infinity.
        :class:`zoo.DeepGaussianVAE` has the noise that does not depend on the latent.
    """

    support = constraints.real_vector

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, parameters: Tensor) -> DiagNormal:
        """Distribution of x from means and log standard deviations (..., D, 2): batch (...), event (D,)."""
        mean, log_sigma = parameters.unbind(-1)
        return DiagNormal(mean, log_sigma.exp())


def _independent(distribution: Distribution) -> Distribution:
    return dist.Independent(distribution, 1, validate_args=False)


class _Bernoulli(dist.Bernoulli):
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        noise = torch.rand(self._extended_shape(Size(sample_shape)), dtype=self.probs.dtype, device=self.probs.device)
        return (noise < self.probs.detach()).to(self.probs.dtype)


class _Categorical(dist.Categorical):
    @property
    def mean(self) -> Tensor:
        return self.probs @ torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)

    @property
    def variance(self) -> Tensor:
        numbers = torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)
        return self.probs @ numbers.square() - self.mean.square()

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        bounds = self.probs.detach().cumsum(-1)[..., :-1]
        shape = (*self._extended_shape(Size(sample_shape)), 1)
        noise = torch.rand(shape, dtype=bounds.dtype, device=bounds.device)
        return (noise > bounds).sum(-1).to(bounds.dtype)
