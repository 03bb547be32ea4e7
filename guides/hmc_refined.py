r"""A guide whose draws are moved towards the posterior by a few steps of Hamiltonian Monte Carlo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from guides.base import Guide
from guides.sampled import LatentModel, SampledGuide
from inference.core.checks import check_count
from inference.distributions.gaussian import gaussian_marginals
from inference.distributions.transformed import Transformed
from inference.posterior.hmc import Chains, Target, transition


class HMCRefined(SampledGuide):
    r"""HMC-refined guide: draws of another guide, refined by steps of Hamiltonian Monte Carlo (HMC).

    .. math:: z_0 \sim q(z \mid x), \quad z_{t+1} \sim T(z \mid z_t), \; \int p(z \mid x) T(w \mid z) dz = p(w \mid x)

    Every step brings the distribution of the draws closer to the posterior in Kullback-Leibler divergence, or leaves
    it. Chains move in unconstrained coordinates, in units of the standard deviations of the guide underneath where it
    is Gaussian.

    Warning:
        The density of the draws is not known. A step that is too long is rejected, and then nothing is refined: see
        that the draws move.

    References:
        Hoffman, "Learning Deep Latent Gaussian Models with Markov Chain Monte Carlo", 2017, ICML.
        Salimans, Kingma, Welling, "Markov Chain Monte Carlo and Variational Inference", 2015, arXiv 1410.6460.

    Args:
        model: Model with ``prior()`` and ``likelihood(z)``.
        base: The guide whose draws are refined.
        num_steps: Steps, each with a rejection.
        num_leapfrog: Leapfrog steps in each.
        step: Length of a leapfrog step, in standard deviations of the guide underneath.

    Raises:
        TypeError: If model or guide is of another kind.
        ValueError: If a number is below one, or ``step`` not positive.
    """

    def __init__(
        self, model: LatentModel, base: Guide, *, num_steps: int = 10, num_leapfrog: int = 5, step: float = 0.3
    ) -> None:
        check_count(num_steps, "num_steps")
        check_count(num_leapfrog, "num_leapfrog")
        if not step > 0:
            raise ValueError(f"expected a positive step, got {step}")
        super().__init__(model, base)
        self.num_steps, self.num_leapfrog, self.step = num_steps, num_leapfrog, step

    def draw(self, x: Tensor, num_samples: int) -> Tensor:
        """Draws of z for data x (N, D): (S, N, K), without gradient."""
        distribution = self.base.posterior(x)
        free: Any = distribution.base_dist if isinstance(distribution, Transformed) else distribution
        marginals = gaussian_marginals(free)
        u = free.sample(torch.Size((num_samples,)))
        loc, sigma = (torch.zeros_like(u[0]), torch.ones_like(u[0])) if marginals is None else marginals
        target = self._target(x, loc, sigma)
        v = (u - loc) / sigma
        chains = Chains(v, *target(v))
        beta, step = torch.ones_like(v[0, :, 0]), torch.full_like(v[0, :, 0], self.step)
        for _ in range(self.num_steps):
            chains, _ = transition(target, chains, beta, step, self.num_leapfrog)
        return biject_to(distribution.support)(loc + sigma * chains.v)

    def _target(self, x: Tensor, loc: Tensor, sigma: Tensor) -> Target:
        """The log joint density of v, up to a constant, and its gradient: z = T(loc + sigma v)."""
        prior = self.model.prior()
        transform = biject_to(prior.support)

        def target(v: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                v = v.detach().requires_grad_()
                u = loc + sigma * v
                z = transform(u)
                latent = prior.log_prob(z) + transform.log_abs_det_jacobian(u, z)
                value = latent + self.model.likelihood(z).log_prob(x)
                (gradient,) = torch.autograd.grad(value.sum(), v)
            return value.detach(), gradient

        return target
