r"""Models with discrete latents, which are summed out, or with counts: mixture, hidden Markov model, multinomial.

.. math:: m_k \sim N(0, 3^2), \; c_n \sim \mathrm{Cat}(.3, .7), \; y_n \sim N(m_{c_n}, 1)

.. math:: s \sim \mathrm{Beta}(2, 2), \; P(c_t = c_{t-1}) = s, \; y_t \sim N(\mu_{c_t}, 1)

.. math:: p \sim \mathrm{Dirichlet}(1), \quad y \sim \mathrm{Multinomial}(p)
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import Dirichlet, Multinomial, Normal

from zoo.classics.reference import Classic, grid_moments, log_integral

_SHARES, _LEVELS = (0.3, 0.7), (-1.0, 1.0)


def mixture_model(y: Tensor) -> None:
    """A mixture of two components of unknown means; y (N,)."""
    means = pyro.sample("means", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        component = pyro.sample("component", dist.Categorical(y.new_tensor(_SHARES)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(Vindex(means)[..., component], 1.0), obs=y)


def gaussian_mixture(num_data: int = 15) -> Classic:
    """A Gaussian mixture, by a grid over the two means."""
    shares = torch.tensor(_SHARES, dtype=torch.float64)
    means = torch.tensor([-2.0, 1.5], dtype=torch.float64)
    y = means[torch.multinomial(shares, num_data, replacement=True)] + torch.randn(num_data, dtype=torch.float64)
    line = torch.arange(-20.0, 20.0, 0.1, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    parts = Normal(points.unsqueeze(1), 1.0).log_prob(y.unsqueeze(-1)) + shares.log()
    values = parts.logsumexp(-1).sum(-1) + Normal(points.new_zeros(()), 3.0).log_prob(points).sum(-1)
    evidence, moments = log_integral(values, 0.01), {"means": grid_moments(values, points)}
    return Classic(name="Gaussian mixture", model=mixture_model, args=(y,), log_evidence=evidence, moments=moments)


def markov_model(y: Tensor) -> None:
    """A chain of two states that it leaves with an unknown probability; y (T,)."""
    stay = pyro.sample("stay", dist.Beta(y.new_tensor(2.0), 2.0))
    rows = torch.stack([torch.stack([stay, 1 - stay], -1), torch.stack([1 - stay, stay], -1)], -2)
    levels, probs = y.new_tensor(_LEVELS), y.new_full((2,), 0.5)
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(levels[state], 1.0), obs=y[t])
        probs = Vindex(rows)[..., state, :]


def hidden_markov(length: int = 12) -> Classic:
    """A hidden Markov model: the forward algorithm at each point of a grid over the probability to stay."""
    state = (torch.rand(length) < 0.2).cumsum(0) % 2
    levels = torch.tensor(_LEVELS, dtype=torch.float64)
    y = levels[state] + torch.randn(length, dtype=torch.float64)
    logit = torch.arange(-40.0, 40.0, 0.02, dtype=torch.float64)
    stay = logit.sigmoid()
    alpha = stay.new_full((len(stay), 2), 0.5).log()
    for value in y:
        alpha = alpha + Normal(levels, 1.0).log_prob(value)
        total = alpha.logsumexp(-1)
        kept, left = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
        alpha = torch.logaddexp(alpha + kept.unsqueeze(-1), alpha.flip(-1) + left.unsqueeze(-1))
    values = total + 2 * (kept + left) + math.log(6)  # Beta(2, 2), by the logit
    evidence, moments = log_integral(values, 0.02), {"stay": grid_moments(values, stay)}
    return Classic(name="hidden Markov", model=markov_model, args=(y,), log_evidence=evidence, moments=moments)


def counts_model(y: Tensor) -> None:
    """Counts y (K,) of unknown probabilities."""
    p = pyro.sample("p", dist.Dirichlet(torch.ones_like(y)))
    pyro.sample("y", dist.Multinomial(total_count=int(y.sum()), probs=p), obs=y)


def dirichlet_multinomial(num_counts: int = 30, num_classes: int = 5) -> Classic:
    """Dirichlet-multinomial counts, in closed form."""
    prior = Dirichlet(torch.ones(num_classes, dtype=torch.float64))
    y = Multinomial(num_counts, prior.sample()).sample()
    after, total = y + 1, num_counts + num_classes
    orders = math.lgamma(num_counts + 1) - (y + 1).lgamma().sum()
    evidence = orders + math.lgamma(num_classes) - math.lgamma(total) + after.lgamma().sum()
    mean = after / total
    moments = {"p": (mean, (mean * (1 - mean) / (total + 1)).sqrt())}
    return Classic(
        name="Dirichlet multinomial", model=counts_model, args=(y,), log_evidence=float(evidence), moments=moments
    )
