"""Training objectives: each one a ``pyro.infer.ELBO`` that states its bound per datum.

They serve in ``pyro.infer.SVI``, as ``objective(model, guide)(x)`` with any torch optimiser, and in
:func:`inference.svi.fit`. All that one keeps between calls is the number of training steps, for schedules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.infer
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from inference.core.checks import check_count
from inference.core.draw import Draw
from inference.core.handlers import Site, apply_mask
from inference.core.module import Module
from inference.core.protocols import SupportsExpectedLogLikelihood
from inference.core.run import Program, run_guide, run_pair
from inference.distributions.gaussian import coordinate_kl
from inference.schedules import Schedule


@dataclass
class Pair:
    """A pair with its arguments, as an objective sees it.

    Attributes:
        model: Pyro model.
        guide: Pyro guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plate: Name of the plate over the data, ``"data"`` if None.
        plate_scale: Full size of that plate over its size in this call, as the last run found it.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plate: str | None = None
    plate_scale: float = 1.0

    def draw(self, num_samples: int) -> Draw:
        """Run the pair once with ``num_samples`` reparameterised samples per datum, with gradient.

        Raises:
            ValueError: If the pair is none (see :func:`inference.core.run.run_pair`) or a latent is not reparameterised.
        """
        draw = run_pair(
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            num_samples=num_samples,
            plate=self.plate,
            expose_params=True,
        )
        for name in draw.latents:
            if not draw.guide_sites[name].fn.has_rsample:
                raise ValueError(
                    f"expected a reparameterised law at guide site {name!r}, got "
                    f"{type(draw.guide_sites[name].fn).__name__} without rsample"
                )
        self.plate_scale = draw.layout.plate_scale
        return draw

    def run_guide(self) -> dict[str, Site]:
        """Latent sites of one run of the guide alone."""
        return run_guide(self.guide, self.args, self.kwargs, expose_params=True)


class Objective(pyro.infer.ELBO):
    """Base of all objectives: a subclass gives :meth:`bound`, this class makes losses and gradients of it.

    The loss is minus the *sum* of the bound over the data, times the plate's scale where the pair subsamples.

    Args:
        num_particles: Samples per datum, drawn side by side.
        plate: Name of the plate over the data, ``"data"`` if None.

    Attributes:
        step: Training steps so far, (); part of a checkpoint.
    """

    def __init__(self, num_particles: int = 1, *, plate: str | None = None) -> None:
        check_count(num_particles, "num_particles")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.plate = plate
        self.step = torch.zeros((), dtype=torch.int64)

    def advance(self) -> None:
        """Count one training step; :func:`inference.svi.fit` and ``SVI`` do so by themselves."""
        self.step = self.step + 1

    def bound(self, pair: Pair) -> Tensor:
        """The objective per datum, to be maximised: (N,) in nats, unscaled, with gradient."""
        raise NotImplementedError

    def per_datum(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The objective of a pair per datum, (N,) in nats, with gradient."""
        return self.bound(Pair(model, guide, args, kwargs, self.plate))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the sum of the bound over the data, a scalar with gradient."""
        pair = Pair(model, guide, args, kwargs, self.plate)
        total = self.bound(pair).sum()
        return -total if pair.plate_scale == 1.0 else -pair.plate_scale * total

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, detached, after adding its gradient to that of the parameters; what ``SVI`` calls."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
            self.advance()
        return loss.detach()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} runs pairs by inference.core.run, without traces")


class ELBO(Objective):
    r"""Evidence lower bound by Monte Carlo, any guide.

    .. math:: E_q[\log p(x_n, z) - \log q(z \mid x_n)]

    ``poutine.scale`` and ``poutine.mask`` inside model and guide are honoured; around the loss they have no effect.

    Args:
        num_particles: S, samples per datum.
        plate: Name of the plate over the data, ``"data"`` if None.

    Example:
        >>> from zoo import LinearVAE
        >>> from guides import MeanField
        >>> model, guide = LinearVAE(5, 2), MeanField(5, 2)
        >>> ELBO(num_particles=3)(model, guide)(torch.zeros(4, 5)).shape
        torch.Size([])
    """

    def bound(self, pair: Pair) -> Tensor:
        """ELBO per datum, (N,)."""
        return pair.draw(self.num_particles).elbo_terms.mean(0)


class AnalyticKLELBO(Objective):
    r"""Evidence lower bound with the Kullback-Leibler term in closed form, the reconstruction by Monte Carlo.

    .. math:: E_q[\log p(x_n \mid z)] - KL(q(z \mid x_n) \,\|\, p(z))

    Several latent sites are summed; each KL is conditional on the sites before it, so model and guide must sample
    them in the same order.

    Args:
        num_particles: S, samples per datum.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    def bound(self, pair: Pair) -> Tensor:
        """ELBO per datum, (N,); raises what :func:`reconstruction_and_rate` does."""
        reconstruction, rate = reconstruction_and_rate(pair.draw(self.num_particles))
        return (reconstruction - rate).mean(0)


class BetaELBO(Objective):
    r"""The ELBO with its Kullback-Leibler term weighted, by a number or by a schedule over the steps; any guide.

    .. math:: E_q[\log p(x_n \mid z) + \beta_t \, (\log p(z) - \log q(z \mid x_n))]

    Warning:
        For beta below one this is no bound on the evidence. Report :class:`ELBO`, where beta is one.

    References:
        Higgins et al., "beta-VAE", 2017, ICLR. Bowman et al., 2016, arXiv 1511.06349 (annealing).

    Args:
        beta: The weight, or what makes it from the step (:class:`inference.schedules.LinearAnnealing`,
            :class:`inference.schedules.CyclicalAnnealing`, or any function of a scalar tensor).
        num_particles: S, samples per datum.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If beta is negative or not finite.
    """

    def __init__(self, beta: float | Schedule, num_particles: int = 1, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        self._schedule = check_weight(beta, "beta")

    @property
    def beta(self) -> Tensor:
        """The weight at the present step, ()."""
        return torch.as_tensor(self._schedule(self.step))

    def bound(self, pair: Pair) -> Tensor:
        """Weighted ELBO per datum, (N,)."""
        draw = pair.draw(self.num_particles)
        rate = draw.total(draw.guide_sites) - draw.total(draw.model_sites, observed=False)
        return (draw.total(draw.model_sites, observed=True) - self.beta.to(rate) * rate).mean(0)


class FreeBitsELBO(Objective):
    r"""The ELBO in which each latent coordinate may cost some nats for free, against posterior collapse.

    .. math:: E_q[\log p(x_n \mid z)] - \sum_k \max\left(\lambda, \frac1N \sum_m KL(q(z_k \mid x_m) \| p(z_k))\right)

    Warning:
        The maximum is taken of the batch's mean, so this is an objective and no bound per datum. Report :class:`ELBO`.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving Variational Inference with Inverse
        Autoregressive Flow", 2016, arXiv 1606.04934.

    Args:
        free_nats: lambda, nats per latent coordinate.
        num_particles: S, samples per datum.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If lambda is negative or not finite.
    """

    def __init__(self, free_nats: float, num_particles: int = 1, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        check_weight(free_nats, "free_nats")
        self.free_nats = free_nats

    def bound(self, pair: Pair) -> Tensor:
        """Free-bits objective per datum, (N,).

        Raises:
            TypeError: If a latent is not Gaussian with independent coordinates in guide and model.
        """
        draw = pair.draw(self.num_particles)
        bound = draw.total(draw.model_sites, observed=True).mean(0)
        for name in draw.latents:
            rates = coordinate_kl(draw.guide_sites[name].fn, draw.model_sites[name].fn)
            bound = bound - rates.flatten(0, -2).mean(0).clamp(min=self.free_nats).sum()
        return bound


class AnalyticELBO(Objective):
    r"""Evidence lower bound wholly in closed form: linear-Gaussian decoder, Gaussian guide, no noise at all.

    .. math::
        -\frac{1}{2\sigma^2}\left[\|x_n - \mu - W m_n\|^2 + \operatorname{tr} W^T W \Sigma_n\right]
        - \frac D2 \log 2\pi\sigma^2 - KL(N(m_n, \Sigma_n) \,\|\, N(0, I))

    Being deterministic it can be minimised by LBFGS, to machine precision.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469.
    """

    def __init__(self) -> None:
        super().__init__()

    def bound(self, pair: Pair) -> Tensor:
        """ELBO per datum, (N,).

        Raises:
            TypeError: If the model cannot integrate its log-likelihood over a Gaussian.
            ValueError: If the guide has not exactly one latent site.
        """
        if not isinstance(pair.model, SupportsExpectedLogLikelihood):
            raise TypeError(
                "expected a model with expected_log_likelihood(x, posterior) and prior() (PPCA or LinearVAE), got "
                f"{type(pair.model).__name__}"
            )
        if isinstance(pair.model, Module):
            pair.model.issue_params()  # the model itself does not run, yet SVI must learn what to train
        sites = pair.run_guide()
        if len(sites) != 1:
            raise ValueError(f"expected a guide with one latent site, got {list(sites)}")
        (site,) = sites.values()
        if site.mask is not None or site.scale != 1.0:
            raise ValueError("expected a guide under no mask, scale or subsampling for the closed form: use ELBO")
        posterior = site.fn
        x = pair.args[0] if pair.args else pair.kwargs["x"]
        return pair.model.expected_log_likelihood(x, posterior) - kl_divergence(posterior, pair.model.prior())


def check_weight(weight: float | Schedule, name: str) -> Schedule:
    """A weight or a schedule as a schedule.

    Raises:
        ValueError: If a number is negative or not finite.
    """
    if callable(weight):
        return weight
    if not 0 <= weight < math.inf:
        raise ValueError(f"expected {name} to be a finite number of at least zero or a schedule, got {weight}")
    constant = torch.tensor(float(weight), dtype=torch.float64)
    return lambda _: constant


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


def _kl(draw: Draw, name: str) -> Tensor:
    q, p = draw.guide_sites[name], draw.model_sites[name]
    if q.mask is not p.mask or (q.scale is not p.scale and q.scale != p.scale):
        raise ValueError(
            f"expected site {name!r} under the same mask and scale in model and guide for a closed-form KL, "
            f"got mask {p.mask} and scale {p.scale} in the model, {q.mask} and {q.scale} in the guide"
        )
    try:
        divergence = kl_divergence(q.fn, p.fn)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"no closed-form KL at site {name!r} between {type(q.fn).__name__} and {type(p.fn).__name__}: "
            "use the objective ELBO"
        ) from error
    return draw.term(q, apply_mask(divergence, q.mask))
