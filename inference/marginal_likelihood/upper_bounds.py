"""Upper bounds of the evidence from samples of a pair, each with its assumption."""

from __future__ import annotations

import math
from typing import Any

import torch

from inference.core.estimates import Estimate
from inference.core.seeding import random_state
from inference.pair.call import Call
from inference.pair.run import Program
from inference.posterior.exact_draws import ExactDraws
from inference.weights.summary import WeightSummary, summarise


def eubo(
    model: Program,
    guide: Program,
    draws: ExactDraws,
    *args: Any,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    **kwargs: Any,
) -> Estimate:
    r"""Evidence upper bound (EUBO) per data point: the mean log weight of exact posterior draws, with standard error.

    .. math:: E_{p(z \mid x)} [\log p(x, z) - \log q(z \mid x)] = \log p(x) + KL(p(z \mid x) \| q(z \mid x))

    Args:
        model: Pyro model.
        guide: Pyro guide with a density.
        draws: What :func:`simulated_draws` or :func:`posterior_draws` returned; nothing else makes this an upper bound.
        *args: Further arguments of both; those of the draws come first, where they have some.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        **kwargs: Keyword arguments of both.

    Returns:
        (N,) in nats; with one draw per data point the error is infinite, and only the mean over the data is of use.

    Raises:
        ValueError: If model and guide are not a valid pair.
    """
    with random_state(None), torch.no_grad():
        call = Call(model, guide, draws.arguments(args), kwargs, plate, whole=whole, missing=missing)
        draw = call.run(draws.num_samples, values=draws.latents)
        return summarise([draw.log_weights], draws.num_samples).elbo


def cubo(summary: WeightSummary) -> Estimate:
    r"""Chi upper bound (CUBO) of order two from a guide's importance weights, with its standard error; asymptotic.

    .. math:: \tfrac12 \log E_q w^2 \ge \log p(x)

    Warning:
        Only the limit of infinitely many samples lies above log p(x), and only if w^2 has a mean (Pareto k below 1/2;
        the standard error needs k below 1/4). From samples the figure is biased downwards, and may lie below log p(x).

    References:
        Dieng, Tran, Ranganath, Paisley, Blei, "Variational Inference via chi Upper Bound Minimization", 2017,
        arXiv 1611.00328.

    Args:
        summary: Of the weights, from :func:`inference.summarise`.

    Example:
        >>> round(float(cubo(summarise([torch.tensor([[1.0], [3.0]]).log()], 2)).value.exp().square()), 6)
        5.0
    """
    log_s, second, fourth = math.log(summary.num_samples), summary.log_sums[1], summary.log_sums[3]
    excess = torch.expm1(log_s + fourth - 2 * second).clamp(min=0)
    spread = 0.5 * (excess / max(summary.num_samples - 1, 1)).sqrt()
    return Estimate(0.5 * (second - log_s), spread if summary.num_samples > 1 else spread + math.inf)
