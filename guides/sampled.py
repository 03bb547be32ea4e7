"""Guides without a density: an algorithm transforms the draws of another guide.

They serve prediction, reconstruction and calibration; importance weights and objectives refuse them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from guides.base import Guide, sample_latent
from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import MatrixDataMixin
from inference.pair.module import Module


@runtime_checkable
class LatentModel(Protocol):
    """A model of one latent per data point by its two distributions."""

    def prior(self) -> Distribution:
        """Distribution of one latent, event (K,)."""
        ...

    def likelihood(self, z: Tensor) -> Distribution:
        """Distribution of the data given latents (..., K): batch (...), event (D,)."""
        ...


class SampledGuide(MatrixDataMixin, Module):
    """Base of guides that improve the draws of another guide by the model; a subclass gives :meth:`draw`.

    The model is held in a tuple: as an attribute it would become part of the guide, parameters and all.

    Args:
        model: Model with ``prior()`` and ``likelihood(z)``.
        base: The guide whose draws are improved.

    Attributes:
        base: The guide underneath; its parameters are this guide's.
        has_density: False: there are samples only.

    Raises:
        TypeError: If one of the two is of another kind.
    """

    has_density: ClassVar[bool] = False

    def __init__(self, model: LatentModel, base: Guide) -> None:
        super().__init__()
        if not isinstance(model, LatentModel):
            raise TypeError(f"expected a model with prior() and likelihood(z), got {type(model).__name__}")
        if not isinstance(base, Guide):
            raise TypeError(f"expected a guide with posterior(x) to start from, got {type(base).__name__}")
        self._model, self.base = (model,), base

    @property
    def model(self) -> LatentModel:
        """The model that improves the draws."""
        return self._model[0]

    def draw(self, x: Tensor, num_samples: int) -> Tensor:
        """Draws of z for data x (N, D): (S, N, K), without gradient."""
        raise NotImplementedError

    def check_data(self, x: Any) -> None:
        """Check that ``x`` are data for the guide underneath.

        Raises:
            TypeError: See :func:`inference.core.checks.check_layout`.
            ValueError: See :func:`inference.core.checks.check_layout` and :func:`inference.core.checks.check_finite`.
        """
        self.base.check_data(x)

    def forward(self, x: Tensor | None = None, n: int | None = None) -> Tensor:
        """Sample ``"z"`` for each data point.

        Args:
            x: Data, (N, D).
            n: The model's number of data points without observations; unused by a guide.

        Returns:
            z, (N, K).

        Raises:
            ValueError: If there are no data, or the model is batch-dependent.
        """
        return sample_latent(self._distribution, x, n)

    def _distribution(self, x: Tensor) -> SampledDistribution:
        self.base._check_layout(x)
        with torch.no_grad():
            like = self.base.posterior(x)
        return SampledDistribution(partial(self._draw, x), like.batch_shape, like, type(self).__name__)

    @torch.no_grad()
    def _draw(self, x: Tensor, num_samples: int) -> Tensor:
        programs = [part for part in (*self._model, self.base) if isinstance(part, nn.Module)]
        with refuse_batch_dependence(*programs):
            return self.draw(x, num_samples)


class SampledDistribution(TorchDistribution):
    """A distribution that can be sampled but has no known density.

    Args:
        draw: From a number S to draws (S, N, K).
        batch_shape: (..., N).
        like: A distribution of the same event and support.
        owner: Whose distribution this is, for the errors.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(self, draw: Callable[[int], Tensor], batch_shape: Size, like: Distribution, owner: str) -> None:
        self._draw, self._like, self._owner = draw, like, owner
        super().__init__(Size(batch_shape), like.event_shape, validate_args=False)

    @property
    def support(self) -> Constraint | None:
        """The support of the draws."""
        return self._like.support

    def expand(self, batch_shape: Size, _instance: Any = None) -> SampledDistribution:
        """The same distribution over a larger batch, (..., N)."""
        return SampledDistribution(self._draw, batch_shape, self._like, self._owner)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws, ``sample_shape`` + batch + (K,)."""
        shape = self._extended_shape(Size(sample_shape))
        return self._draw(Size(shape[:-2]).numel()).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:  # noqa: ARG002
        """Raise an error: the density is not known.

        Raises:
            ValueError: Always, with the name of the guide.
        """
        raise ValueError(f"expected a guide with a density, got {self._owner}, of which only samples are known")
