"""Training objectives: each one a ``pyro.infer.ELBO`` that states its bound per data point.

They serve in ``pyro.infer.SVI``, as ``objective(model, guide)(x)`` with any torch optimiser, and in
:func:`inference.fit`. All that one keeps between calls is the number of training steps, for schedules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from inference.core.ranks import batch_mean
from inference.distributions.gaussian import coordinate_kl
from inference.objectives.base import Objective, check_nonnegative, check_weight
from inference.objectives.schedules import Schedule
from inference.pair.draw import Draw, flatten
from inference.pair.handlers import Site, apply_mask
from inference.pair.improper import is_delta


class ELBO(Objective):
    r"""Evidence lower bound (ELBO) by Monte Carlo, for any guide.

    .. math:: E_q[\log p(x_n, z) - \log q(z \mid x_n)]

    ``poutine.scale`` and ``poutine.mask`` inside model and guide are honoured; around the loss they have no effect.

    Args:
        num_particles: S, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.

    Example:
        >>> from zoo import LinearVAE
        >>> from guides import MeanField
        >>> model, guide = LinearVAE(5, 2), MeanField(5, 2)
        >>> ELBO(num_particles=3)(model, guide)(torch.zeros(4, 5)).shape
        torch.Size([])
    """

    def bound(self, draw: Draw) -> Tensor:
        """ELBO per data point, (N,)."""
        return draw.elbo_terms.mean(0)


class AnalyticKLELBO(Objective):
    r"""Evidence lower bound (ELBO) with the Kullback-Leibler (KL) term in closed form, the rest by Monte Carlo.

    .. math:: E_q[\log p(x_n \mid z)] - KL(q(z \mid x_n) \,\|\, p(z))

    Several latent sites are summed; each KL is conditional on the sites before it, so model and guide must sample
    them in the same order.

    Args:
        num_particles: S, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, draw: Draw) -> Tensor:
        """ELBO per data point, (N,); raises what :func:`reconstruction_and_rate` does."""
        reconstruction, rate = reconstruction_and_rate(draw)
        return (reconstruction - rate).mean(0)


class BetaELBO(Objective):
    r"""Beta-ELBO: the ELBO with its Kullback-Leibler (KL) term weighted by a number or a schedule, for any guide.

    .. math:: E_q[\log p(x_n \mid z) + \beta_t \, (\log p(z) - \log q(z \mid x_n))]

    Warning:
        For beta below one this is not a bound on the evidence. Report :class:`ELBO`, where beta is one.

    References:
        Higgins et al., "beta-VAE", 2017, ICLR. Bowman et al., 2016, arXiv 1511.06349 (annealing).

    Args:
        beta: The weight, or a schedule that makes it from the step (:class:`inference.LinearAnnealing`,
            :class:`inference.CyclicalAnnealing`, or any function of a scalar tensor).
        num_particles: S, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If beta is negative or not finite.
    """

    def __init__(self, beta: float | Schedule, num_particles: int = 1, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        self._schedule, self._given = check_weight(beta, "beta"), beta

    def _settings(self) -> dict[str, Any]:
        return {"beta": self._given} | super()._settings()

    @property
    def beta(self) -> Tensor:
        """The weight at the present step, ()."""
        return self._weight(self.step)

    def _weight(self, step: Tensor) -> Tensor:
        return torch.as_tensor(self._schedule(step))

    def bound_at(self, draw: Draw, step: Tensor) -> Tensor:
        """Weighted ELBO per data point at a training step, (N,)."""
        reconstruction, rate = sampled_reconstruction_and_rate(draw)
        return (reconstruction - self._weight(step).to(rate) * rate).mean(0)


class FreeBitsELBO(Objective):
    r"""Free-bits ELBO: each latent coordinate may cost some nats for free, against posterior collapse.

    .. math:: E_q[\log p(x_n \mid z)] - \sum_k \max\left(\lambda, \frac1N \sum_m KL(q(z_k \mid x_m) \| p(z_k))\right)

    Masks and scales of a latent apply to its KL; a latent in further plates has a coordinate for each place in them.

    Warning:
        The maximum is taken of the batch's mean, so this is an objective but not a bound per data point. Report
        :class:`ELBO`.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving Variational Inference with Inverse
        Autoregressive Flow", 2016, arXiv 1606.04934.

    Args:
        free_nats: lambda, nats per latent coordinate.
        num_particles: S, samples per data point.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If lambda is negative or not finite.
    """

    def __init__(self, free_nats: float, num_particles: int = 1, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        self.free_nats = check_nonnegative(free_nats, "free_nats")

    def bound(self, draw: Draw) -> Tensor:
        """Free-bits objective per data point, (N,).

        Raises:
            TypeError: If a latent is not Gaussian with independent coordinates in guide and model.
            ValueError: If a latent stands under another mask or scale in the guide than in the model.
        """
        bound = draw.total(draw.model_sites, observed=True).mean(0)
        for name in draw.latents:
            bound = bound - batch_mean(_coordinate_rates(draw, name), (0, 1)).clamp(min=self.free_nats).sum()
        return bound


def reconstruction_and_rate(draw: Draw) -> tuple[Tensor, Tensor]:
    """The log-likelihood of a draw and the closed-form KL of its latents, each (S, N) in nats with gradient.

    Raises:
        NotImplementedError: If a site has no closed-form KL; the message names it. Use :class:`ELBO` there.
        ValueError: If model and guide sample the latents in different orders, or treat one differently.
    """
    latents = list(draw.latents)
    order = [name for name, site in draw.model_sites.items() if not site.is_observed]
    if order != latents:
        raise ValueError(
            f"expected model and guide to sample the latents in one order for a closed-form KL, got {order} "
            f"in the model and {latents} in the guide"
        )
    return draw.total(draw.model_sites, observed=True), torch.stack([_kl(draw, name) for name in latents]).sum(0)


def sampled_reconstruction_and_rate(draw: Draw) -> tuple[Tensor, Tensor]:
    """The log-likelihood of a draw and log q(z | x) - log p(z), each (S, N) in nats with gradient."""
    rate = draw.log_guide - draw.total(draw.model_sites, observed=False)
    return draw.total(draw.model_sites, observed=True), rate


def _coordinate_rates(draw: Draw, name: str) -> Tensor:
    """KL of each coordinate of a latent, (S, N, coordinates) in nats, with its mask and scale."""
    q, p = _latent(draw, name)
    mask, scale = (_per_coordinate(v) for v in (q.mask, draw.extra_scale(q)))
    rates = apply_mask(coordinate_kl(q.fn, p.fn), mask) * scale
    return flatten(draw.layout, q._replace(value=rates), draw.num_samples)


def _per_coordinate(value: Any) -> Any:
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def _latent(draw: Draw, name: str) -> tuple[Site, Site]:
    """A latent's site in guide and model.

    Raises:
        ValueError: If they stand under different masks or scales.
    """
    q, p = draw.guide_sites[name], draw.model_sites[name]
    if q.mask is not p.mask or (q.scale is not p.scale and q.scale != p.scale):
        raise ValueError(
            f"expected site {name!r} under the same mask and scale in model and guide for a closed-form KL, "
            f"got mask {p.mask} and scale {p.scale} in the model, {q.mask} and {q.scale} in the guide"
        )
    return q, p


def _kl(draw: Draw, name: str) -> Tensor:
    q, p = _latent(draw, name)
    try:
        divergence = closed_form_kl(q.fn, p.fn)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"no closed-form KL at site {name!r} between {type(q.fn).__name__} and {type(p.fn).__name__}: "
            "use the objective ELBO"
        ) from error
    return draw.term(q, apply_mask(divergence, q.mask))


def closed_form_kl(q: Any, p: Any) -> Tensor:
    """KL(q || p) of the site's batch, in nats.

    Raises:
        NotImplementedError: If torch knows none, or q is a Delta, whose "divergence" leaves out the auxiliary sites.
    """
    if is_delta(q):
        raise NotImplementedError
    return kl_divergence(q, p)
