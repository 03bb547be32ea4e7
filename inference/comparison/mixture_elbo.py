r"""The ELBO of a mixture of Gaussians on noise of each of its components: smooth in all parameters at given noise.

.. math:: \sum_c \pi_c \, E_{N(u; m_c, \sigma_c)} [\log p(x, u) - \log q(u)]

A draw of the whole mixture jumps from one component to another as their weights move, over where the density is nearly
zero: at given noise its ELBO has steps, and the weight of a component far from the others no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from inference.core.protocols import SupportsComponents
from inference.core.seeding import random_state
from inference.distributions.transformed import Transformed
from inference.pair.call import Call
from inference.pair.handlers import isolated
from inference.pair.manners import Single


class Mixed(NamedTuple):
    """A guide whose one latent is a mixture of Gaussians for each data point, perhaps carried to a bounded support.

    Attributes:
        name: Of the latent.
        latent_dim: K.
        num_components: C.
        depth: Batch dimensions of the pair.
    """

    name: str
    latent_dim: int
    num_components: int
    depth: int


def mixed(call: Call) -> Mixed | None:
    """What is known of a guide whose ELBO can be taken component by component; None of others."""
    with random_state(None), torch.no_grad():
        sites = list(call.run_guide().items())
    if len(sites) != 1 or (isinstance(sites[0][1].fn, Transformed) and sites[0][1].mask is not None):
        return None
    base = _unbounded(sites[0][1].fn)
    if not isinstance(base, SupportsComponents):
        return None
    locs, layout = base.locs, call.probe().layout
    if locs.dim() != 3 or locs.shape[1] == 1 or layout.whole or layout.dim != -1:
        return None
    return Mixed(sites[0][0], locs.shape[2], locs.shape[1], layout.depth)


def mixture_of(call: Call, known: Mixed) -> SupportsComponents:
    """The mixture of that latent's unconstrained coordinates, without a draw from it."""
    mixture = _unbounded(_distribution(call, known))
    assert isinstance(mixture, SupportsComponents)
    return mixture


def _distribution(call: Call, known: Mixed) -> Any:
    assert call.guide is not None
    with isolated(), pyro.validation_enabled(False):
        value = torch.zeros(known.latent_dim, dtype=torch.float64)
        return Single().run(call, call.guide, {known.name: value}, 1).sites[known.name].fn


def _unbounded(fn: Any) -> Any:
    """The distribution of unconstrained coordinates behind one that may be bounded."""
    return fn.base_dist if isinstance(fn, Transformed) else fn


def mixture_elbo(call: Call, known: Mixed, num_samples: int) -> Tensor:
    """The ELBO of a guide that is a mixture, (N,) in nats, on so many samples of each component."""
    fn = _distribution(call, known)
    mixture = _unbounded(fn)
    locs, sigmas = mixture.locs.movedim(-2, 0), mixture.sigmas.movedim(-2, 0)  # (C, N, K)
    noise = torch.randn((num_samples, *locs.shape), dtype=locs.dtype, device=locs.device)
    z, log_q = (locs + sigmas * noise).flatten(0, 1), None
    if isinstance(fn, Transformed):
        # Near the end of a support a run cannot find the coordinates again; the transform knows its last value's.
        z = fn.transform(z)
        log_q = fn.log_prob(z)
    draw = call.run(len(z), values={known.name: z.reshape(len(z), *(1,) * (known.depth - 1), *z.shape[1:])})
    terms = draw.trained_elbo if log_q is None else draw.log_joint - log_q
    weights = mixture.log_weights.exp().mT
    return torch.where(weights > 0, weights * terms.unflatten(0, (num_samples, -1)).mean(0), 0.0).sum(0)  # of (C, N)
