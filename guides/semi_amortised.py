r"""Semi-amortised guide: the encoder's output, refined by a few gradient steps on the ELBO of each data point.

.. math:: q(z \mid x) = \text{family}(\phi_T(x)), \quad \phi_0(x) = \text{encode}(x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import grad
from torch.overrides import TorchFunctionMode

from guides.base import EncoderGuide, Guide, Local
from guides.sampled import LatentModel
from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count, check_positive
from inference.core.seeding import random_state
from inference.distributions.transformed import push_forward
from inference.numerics.whitened_noise import WhitenedNoise

_SEED = 0
_GROW, _SHRINK = 1.5, 0.5


class SemiAmortised(Guide):
    r"""Semi-amortised guide: another guide, refined for each data point by gradient steps on the ELBO of a model.

    .. math:: \phi_t = \phi_{t-1} + r_t \, s \odot \frac{g}{\|g\|}, \quad
        g = s \odot \nabla_\phi \frac1S \sum_{i=1}^S \log \frac{p(x, z_i(\phi))}{q_\phi(z_i(\phi))}

    with s the natural units of the parameters (a mean's is its standard deviation) and z_i made from noise that is
    drawn once, whitened, and the same for every data point: so the distribution is a function of x alone, with a
    density. A step that would lower the data point's ELBO on this noise is not taken and the next is half as long;
    after one that is, half as long again.

    In training the steps count as constants, phi_T(x) = encode(x) + const: the gradient at the refined parameters
    goes straight through to the encoder, and nothing is differentiated through the steps.

    Warning:
        That gradient is not the ELBO's: where the steps reach the optimum it does not depend on where they start. Train
        the guide underneath by itself first, and through the steps, if at all, at a low learning rate; at a high one
        the ELBO may fall. Every call takes the steps anew. A batch-dependent model is refused.

    References:
        Kim, Wiseman, Miller, Sontag, Rush, "Semi-Amortized Variational Autoencoders", 2018, arXiv 1802.02550.
        Marino, Yue, Mandt, "Iterative Amortized Inference", 2018, arXiv 1807.09356.

    Args:
        model: Model with ``prior()`` and ``likelihood(z)``.
        base: The guide to start from.
        steps: T; with none the distribution is that of ``base``.
        num_samples: S, for each data point and step; twice the latent's dimension or more whiten the noise.
        rate: r_1, the length of the first step in natural units.

    Attributes:
        base: The guide underneath; its parameters are this guide's.
        noise: Standard normal noise of one data point, (S, K) buffer.
        uniform: Uniform noise of one data point, for mixtures, which choose a component, (S,) buffer.

    Raises:
        TypeError: If model or guide is of another kind.
        ValueError: If a number is out of range.

    Example:
        >>> from guides import MeanField
        >>> from zoo import LinearVAE
        >>> model = LinearVAE(5, 2)
        >>> SemiAmortised(model, MeanField(5, 2), steps=3).posterior(torch.zeros(4, 5)).event_shape
        torch.Size([2])
    """

    noise: Tensor
    uniform: Tensor

    def __init__(
        self, model: LatentModel, base: EncoderGuide, *, steps: int = 10, num_samples: int = 16, rate: float = 1.0
    ) -> None:
        super().__init__()
        if not isinstance(model, LatentModel):
            raise TypeError(f"expected a model with prior() and likelihood(z), got {type(model).__name__}")
        if not isinstance(base, EncoderGuide):
            raise TypeError(f"expected a guide with encode(x) and family(parameters), got {type(base).__name__}")
        check_count(steps, "steps", minimum=0)
        check_count(num_samples, "num_samples", minimum=2)
        check_positive(rate, "rate")
        # In a tuple: as an attribute the model would become part of the guide, parameters and all.
        self._model, self.base = (model,), base
        self.steps, self.num_samples, self.rate = steps, num_samples, rate
        with random_state(_SEED), WhitenedNoise():
            noise, uniform = torch.randn((num_samples, 1, base.latent_dim)), torch.randperm(num_samples) + 0.5
        like = base.standardise.shift
        self.register_buffer("noise", noise.squeeze(1).to(like))
        self.register_buffer("uniform", (uniform / num_samples).to(like))

    @property
    def model(self) -> LatentModel:
        """The model whose ELBO the steps go up."""
        return self._model[0]

    def posterior(self, x: Tensor) -> Distribution:
        """Distribution of z given x (N, D): batch (N,), event (K,), on the support."""
        parameters = self.base.encode(x)
        return self._distribution(parameters + self._refinement(x, parameters.detach()))

    @torch.no_grad()
    def local(self, x: Tensor) -> Local:
        """The guide of these data (N, D), with free parameters for each data point, started where the steps end.

        Args:
            x: Data, (N, D).
        """
        local = self.base.local(x)
        start = local.start + self._refinement(x, local.start)
        return Local(x, start, local.scales, family=self.base.family, support=self.base.support)

    def config(self) -> dict[str, Any]:
        """Constructor arguments: the model is the other half of the pair."""
        kind = type(self.base)
        base = {"class": f"{kind.__module__}.{kind.__qualname__}", "config": self.base.config()}
        numbers = {"steps": self.steps, "num_samples": self.num_samples, "rate": self.rate}
        return {"model": "<model>", "base": base} | numbers

    def _distribution(self, parameters: Tensor) -> Distribution:
        return push_forward(self.base.family(parameters), self.base.support)

    @torch.no_grad()
    def _refinement(self, x: Tensor, start: Tensor) -> Tensor:
        """What the steps add to the parameters (N, P), without gradient."""
        scales, offset = self.base.natural_units(start), torch.zeros_like(start)
        if not self.steps:
            return offset

        def negative_elbo(offset: Tensor) -> tuple[Tensor, Tensor]:
            loss = -self._elbo(x, start + scales * offset)
            return loss.sum(), loss.detach()

        rate = torch.full_like(start[:, :1], self.rate)
        gradient_and_loss = grad(negative_elbo, has_aux=True)
        with refuse_batch_dependence(*(part for part in self._model if isinstance(part, nn.Module))):
            gradient, loss = gradient_and_loss(offset)
            for _ in range(self.steps):
                length = gradient.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rate.dtype).tiny)
                trial = offset - rate * gradient / length
                new_gradient, new_loss = gradient_and_loss(trial)
                lower = (new_loss < loss).unsqueeze(-1)
                offset, gradient = torch.where(lower, trial, offset), torch.where(lower, new_gradient, gradient)
                loss = torch.where(lower.squeeze(-1), new_loss, loss)
                rate = rate * torch.where(lower, _GROW, _SHRINK).to(rate)
        return scales * offset

    def _elbo(self, x: Tensor, parameters: Tensor) -> Tensor:
        """The ELBO of each data point on the guide's own noise, (N,)."""
        distribution = self._distribution(parameters)
        with _OneNoise(self.noise, self.uniform):
            z = distribution.rsample(torch.Size((self.num_samples,)))
        log_joint = self.model.prior().log_prob(z) + self.model.likelihood(z).log_prob(x)
        return (log_joint - distribution.log_prob(z)).mean(0)

    def _check_layout(self, x: Any) -> None:
        self.base._check_layout(x)


class _OneNoise(TorchFunctionMode):
    """While active, ``torch.randn`` of (S, N, K) and ``torch.rand`` of (S, N) give every data point the same noise."""

    def __init__(self, noise: Tensor, uniform: Tensor) -> None:
        super().__init__()
        self.noise, self.uniform = noise, uniform

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer the two, and leave everything else as it is."""
        if func is torch.randn:
            return self.noise.unsqueeze(1).expand(*args)
        if func is torch.rand:
            return self.uniform.unsqueeze(1).expand(*args)
        return func(*args, **(kwargs or {}))
