"""Gradient noise: mean, variance and signal-to-noise ratio of a training gradient over repeated draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.infer
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.checks import check_arguments, check_count
from inference.core.display import Result
from inference.core.seeding import random_state, seeded
from inference.objectives.base import check_objective
from inference.pair.call import Call
from inference.pair.handlers import LocalParams, local_params
from inference.pair.run import Program, modules_of


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientNoise(Result):
    """Gradient noise of one group of P parameters: moments of their gradient, in float64.

    Attributes:
        mean: Mean gradient of the loss, (P,).
        variance: Unbiased variance of one gradient, (P,).
        num_repeats: R, the number of gradients.
    """

    mean: Tensor
    variance: Tensor
    num_repeats: int

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean, (P,)."""
        return (self.variance / self.num_repeats).sqrt()

    @property
    def per_parameter(self) -> Tensor:
        """Signal-to-noise ratio of each parameter, ``|mean| / standard deviation``, (P,); NaN where both are zero."""
        return self.mean.abs() / self.variance.sqrt()

    @property
    def signal_to_noise(self) -> float:
        r"""Signal-to-noise ratio of the group, corrected for the noise of the estimated mean.

        .. math:: \sqrt{\|E g\|^2 / \operatorname{tr} \operatorname{Var} g}
        """
        noise = self.variance.sum()
        signal = (self.mean.square().sum() - noise / self.num_repeats).clamp(min=0)
        return float((signal / noise).sqrt())


def gradient_noise(
    objective: pyro.infer.ELBO,
    model: Program,
    guide: Program,
    *args: Any,
    num_repeats: int = 100,
    groups: Mapping[str, Sequence[Tensor]] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> dict[str, GradientNoise]:
    """Gradient noise of an objective: mean and variance of its gradient over repeated draws, in constant memory.

    The parameters and their ``.grad`` stay as they are, and so does the objective's step.

    References:
        Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh, "Tighter Variational Bounds are Not Necessarily Better",
        2018, arXiv 1802.04537.

    Args:
        objective: Anything with a differentiable loss; the gradient is that of the loss, a sum over the data.
        model: Pyro model.
        guide: Pyro guide.
        *args: Positional arguments of both.
        num_repeats: R, at least 2.
        groups: Parameters by the name of their group; by default the guide's as ``"encoder"`` and what the model has
            beyond those as ``"decoder"``, where there are any.
        seed: Seed of the draws; leaves the global random state as it was.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of both.

    Raises:
        ValueError: If the data are not finite or have the wrong shape, there is nothing to train, or R is below 2.

    Example:
        >>> from guides import Linear
        >>> from inference import ELBO
        >>> from zoo import LinearVAE
        >>> x, pair = torch.zeros(4, 5), (LinearVAE(5, 2), Linear(5, 2))
        >>> noise = gradient_noise(ELBO(), *pair, x, num_repeats=10, progress=False)
        >>> {name: group.mean.shape for name, group in noise.items()}
        {'decoder': torch.Size([16]), 'encoder': torch.Size([14])}
    """
    check_count(num_repeats, "num_repeats", minimum=2)
    check_objective(objective)
    check_arguments((model, guide), args, kwargs)
    with seeded(seed), local_params():
        chosen = _groups(objective, model, guide, args, kwargs) if groups is None else groups
        parameters = [p for group in chosen.values() for p in group]
        mean = torch.cat([torch.zeros_like(p, dtype=torch.float64).flatten() for p in parameters])
        squares = torch.zeros_like(mean)
        for i in tqdm(range(num_repeats), disable=not progress, desc="gradient noise", unit="gradient"):
            gradient = _gradient(objective.differentiable_loss(model, guide, *args, **kwargs), parameters)
            delta = gradient - mean
            mean += delta / (i + 1)
            squares += delta * (gradient - mean)
    variance = squares / (num_repeats - 1)
    sizes = [sum(p.numel() for p in group) for group in chosen.values()]
    parts = zip(chosen, mean.split(sizes), variance.split(sizes), strict=True)
    return {name: GradientNoise(mean=m, variance=v, num_repeats=num_repeats) for name, m, v in parts}


def _gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().double().flatten() for g, p in pairs])


def _groups(
    objective: pyro.infer.ELBO, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, list[Tensor]]:
    with random_state(None), torch.no_grad():
        with LocalParams() as of_guide:
            Call(model, guide, args, kwargs).run_guide(expose_params=True)
        with LocalParams() as of_both:
            objective.differentiable_loss(model, guide, *args, **kwargs)
    encoder = _trainable(guide, of_guide.seen)
    decoder = {p: None for p in _trainable(model, of_both.seen) if p not in encoder}
    groups = {"decoder": list(decoder), "encoder": list(encoder)}
    if not decoder and not encoder:
        raise ValueError("expected a pair with at least one trainable parameter, got none")
    return {name: group for name, group in groups.items() if group}


def _trainable(program: Program, seen: list[Tensor]) -> dict[Tensor, None]:
    """Parameters of a program's module and of its param statements, each once and in order."""
    own = [p for module in modules_of(program) for p in module.parameters()]
    return {p: None for p in [*own, *seen] if p.requires_grad}
