r"""Reweighted wake-sleep (RWS): model and guide each maximise a log-density of their own at weighted samples.

.. math::
    \text{model:} \; \sum_k \bar w_k \nabla \log p(x, z_k), \qquad
    \text{guide, wake:} \; \sum_k \bar w_k \nabla \log q(z_k \mid x), \qquad
    \text{guide, sleep:} \; \nabla \log q(z' \mid x'), \; (z', x') \sim p

No gradient flows through samples, so latents may be of any distribution, discrete ones too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference.core.checks import check_count
from inference.core.estimates import log_mean_exp
from inference.objectives.base import Objective
from inference.objectives.gradients import at_fixed_latents, normalised, with_gradient_of
from inference.pair.call import Call
from inference.pair.draw import Draw
from inference.pair.handlers import isolated, masked_log_prob
from inference.pair.run import modules_of, run_program
from inference.pair.simulated import simulated_values, with_simulated_data


class WakeWake(Objective):
    r"""Reweighted wake-sleep (RWS), wake-wake: the guide minimises the divergence from the posterior at the data.

    .. math:: \sum_k \bar w_k \left[\nabla \log p(x, z_k) + \nabla \log q(z_k \mid x)\right]

    The value is the importance-weighted bound, of which the gradient is the model's alone; with K particles both
    directions have a bias that falls like 1 / K.

    Warning:
        Model and guide maximise two functions: a pair in which they share parameters is refused, and so are batch
        normalisation and dropout in train mode. One particle does not train the guide: its score has mean zero.

    References:
        Bornschein, Bengio, "Reweighted Wake-Sleep", 2015, arXiv 1406.2751.

    Args:
        num_particles: K, samples per data point, at least 2.
        plate: Name of the plate over the data, ``"data"`` if None.

    Raises:
        ValueError: If K is below 2.
    """

    reparameterised = False

    def __init__(self, num_particles: int = 10, *, plate: str | None = None) -> None:
        super().__init__(num_particles, plate=plate)
        check_count(num_particles, "num_particles", minimum=2)

    def bound(self, draw: Draw) -> Tensor:
        """Importance-weighted bound per data point, (N,).

        Raises:
            ValueError: If model and guide share parameters; the message names them.
        """
        log_joint, log_guide = _scores(draw)
        weights = normalised(draw.log_weights)
        return with_gradient_of(log_mean_exp(draw.log_weights), (weights * (log_joint + log_guide)).sum(0))


class WakeSleep(Objective):
    r"""Reweighted wake-sleep (RWS), wake-sleep: the guide is trained on latents and data sampled from the model.

    .. math:: \sum_k \bar w_k \nabla \log p(x, z_k) + \nabla \log q(z' \mid x'), \quad (z', x') \sim p

    The value is the importance-weighted bound. One simulated data point is drawn for each data point.

    Warning:
        As :class:`WakeWake`. The guide learns the posterior where the simulated data are, not where the data are.

    References:
        Bornschein, Bengio, "Reweighted Wake-Sleep", 2015, arXiv 1406.2751. Hinton, Dayan, Frey, Neal, "The Wake-Sleep
        Algorithm for Unsupervised Neural Networks", 1995, Science 268.

    Args:
        num_particles: K, samples per data point of the wake phase.
        plate: Name of the plate over the data, ``"data"`` if None.
    """

    reparameterised = False

    def bound(self, draw: Draw) -> Tensor:
        """Importance-weighted bound per data point, (N,).

        Raises:
            ValueError: If model and guide share parameters, or an observed value is not one of the pair's arguments.
        """
        log_joint, _ = _scores(draw)
        surrogate = (normalised(draw.log_weights) * log_joint).sum(0) + _sleep_score(draw)
        return with_gradient_of(log_mean_exp(draw.log_weights), surrogate)


def _scores(draw: Draw) -> tuple[Tensor, Tensor]:
    """log p(x, z) and log q(z | x) at the latents of a draw, with gradient, (S, N)."""
    fixed = at_fixed_latents(draw)
    log_joint, log_guide = fixed.log_joint, fixed.log_guide
    _refuse_shared(draw.call, log_joint, log_guide)
    return log_joint, log_guide


def _sleep_score(draw: Draw) -> Tensor:
    """log q of simulated latents given the simulated data, (N,)."""
    call, guide = draw.call, draw.call.guide
    assert guide is not None
    with torch.no_grad():
        dream = simulated_values(call, draw.subsamples)
    dreamt = with_simulated_data(call, draw.model_sites, dream)
    values = dict(draw.subsamples) | {name: dream[name] for name in draw.latents}
    with isolated(expose_params=True):
        run = run_program(guide, dreamt.args, dreamt.kwargs, values, 1, None)
    return torch.stack([draw.layout.per_datum(masked_log_prob(site), 1) for site in run.drawn.values()]).sum((0, 1))


def _refuse_shared(call: Call, log_joint: Tensor, log_guide: Tensor) -> None:
    shared = _leaves(log_joint) & _leaves(log_guide)
    if not shared:
        return
    names: dict[Tensor, str] = {
        p: name for module in modules_of(*call.programs) for name, p in module.named_parameters()
    }
    found = [names.get(p, f"a tensor of shape {tuple(p.shape)}") for p in shared]
    raise ValueError(
        f"expected model and guide without common parameters for wake-sleep, got {sorted(found)} in both: use DReG"
    )


def _leaves(value: Tensor) -> set[Tensor]:
    """The tensors that a backward pass from a value would reach."""
    seen, pending = set(), [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}
