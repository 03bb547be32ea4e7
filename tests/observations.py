"""Likelihoods written out by hand: what the conformance tests know of the models of the registry, and of no more."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """A kind of data given latents, from a model's parameters or decoder alone.

    Attributes:
        data: From standard normal numbers (N, D) to data away from the origin, that no model was made with.
        draw: Data (N, D) from a model, latents (N, K) and standard normal noise (N, D).
        log_prob: log p(x | z), (...), from a model, data (..., D) and latents (..., K).
        variance: Variances of the data given one latent (K,), (D,).
        marginal: The distribution of the data as a dense Gaussian, None where it is not Gaussian.
    """

    data: Callable[[Tensor], Tensor]
    draw: Callable[[Any, Tensor, Tensor], Tensor]
    log_prob: Callable[[Any, Tensor, Tensor], Tensor]
    variance: Callable[[Any, Tensor], Tensor]
    marginal: Callable[[Any], torch.distributions.MultivariateNormal] | None = None


def normal_log_prob(value, loc, sigma):
    return torch.distributions.Normal(loc, sigma).log_prob(value).sum(-1)


# --- Gaussian noise around a decoder ---------------------------------------------------------------

GAUSSIAN = Observation(
    data=lambda noise: 1 + 1.5 * noise,
    draw=lambda model, z, noise: model.decode(z) + model.sigma * noise,
    log_prob=lambda model, x, z: normal_log_prob(x, model.decode(z), model.sigma),
    variance=lambda model, z: model.sigma.square().expand(model.data_dim),  # noqa: ARG005
)


def _linear(model):
    """Loadings, mean and standard deviations of the noise, in units of x."""
    s = model.standardise
    return model.W * s.scale, model.mu * s.scale + s.shift, model.log_sigma.exp() * s.scale


def _factors(model):
    return model.W, model.mu, model.log_sigma.exp()


def _linear_log_prob(parameters):
    def log_prob(model, x, z):
        W, mu, sigma = parameters(model)
        return normal_log_prob(x, z @ W.T + mu, sigma)

    return log_prob


def _dense(parameters):
    def marginal(model):
        W, mu, sigma = parameters(model)
        return torch.distributions.MultivariateNormal(mu, W @ W.T + torch.diag_embed((sigma**2).expand(len(W))))

    return marginal


LINEAR = replace(GAUSSIAN, log_prob=_linear_log_prob(_linear), marginal=_dense(_linear))
FACTORS = replace(GAUSSIAN, log_prob=_linear_log_prob(_factors), marginal=_dense(_factors))


# --- binary data, categories -----------------------------------------------------------------------


def _bernoulli_log_prob(model, x, z):
    p = model.decode(z)
    return (x.xlogy(p) + (1 - x).xlogy(1 - p)).sum(-1)


BERNOULLI = Observation(
    data=lambda noise: (1 + 1.5 * noise > 0).to(noise),
    draw=lambda model, z, noise: (torch.special.ndtr(noise) < model.decode(z)).to(z),
    log_prob=_bernoulli_log_prob,
    variance=lambda model, z: model.decode(z) * (1 - model.decode(z)),
)


def _shares(model, z):
    """Probabilities of the categories, (..., D, C)."""
    return model.network(z.reshape(-1, z.shape[-1])).reshape(*z.shape[:-1], model.data_dim, -1).softmax(-1)


def _category_log_prob(model, x, z):
    log_shares = _shares(model, z).log()
    chosen = (x.unsqueeze(-1) == torch.arange(log_shares.shape[-1])).to(log_shares)
    return (chosen * log_shares).sum((-1, -2))


def _category(model, z, noise):
    below = _shares(model, z).cumsum(-1)[..., :-1] < torch.special.ndtr(noise).unsqueeze(-1)
    return below.sum(-1).to(z)


def _category_variance(model, z):
    p = _shares(model, z)
    number = torch.arange(p.shape[-1], dtype=p.dtype)
    return (p * number**2).sum(-1) - (p * number).sum(-1).square()


CATEGORIES = Observation(
    data=lambda noise: (1 + 1.5 * noise).round().clamp(0, 2),
    draw=_category,
    log_prob=_category_log_prob,
    variance=_category_variance,
)
