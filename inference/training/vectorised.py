r"""Vectorised training: many pairs of one architecture at once, over seeds, data sets or starting points.

.. math:: \max_{\theta_1, \dots, \theta_M} \sum_m \sum_n \mathcal L(x_{mn}; \theta_m)

The parameters are stacked and each step is one step of all, by ``torch.func.vmap``: small networks cost little more
together than one of them by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from inference.core.checks import check_arguments
from inference.core.sources import as_tensors
from inference.objectives.base import Objective, Terms, check_objective
from inference.objectives.evidence_lower_bound import ELBO
from inference.objectives.schedules import Schedule
from inference.pair.call import Call
from inference.pair.fingerprint import described, say_differences
from inference.pair.module import Module
from inference.training.fitting import adam, fit
from inference.training.pair_rates import with_pair_rates
from inference.training.trainer import History

# Attributes of objectives that hold a weight or a schedule, and that which shows what the caller gave for one.
_WEIGHTS, _GIVEN = ("beta", "schedule", "_schedule"), "_given"


def fit_many(
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    data: Tensor | Sequence[Tensor],
    *,
    objective: Objective | Sequence[Objective] | None = None,
    learning_rate: Sequence[float] | None = None,
    **options: Any,
) -> History:
    """Vectorised training of pairs of one architecture, in place; each as :func:`inference.fit` would by itself.

    The pairs do not influence each other: an optimiser that treats every number by itself, as Adam does, makes of each
    what it makes of one alone. Only the noise differs from that of single trainings, and the order of the data is one
    for all.

    What may differ from pair to pair: where it begins, and so the seed under which it was made; every parameter and
    buffer, as a fixed sigma^2 or gamma^2; the data; the learning rate; and the schedules of the objective, as beta.

    Warning:
        An optimiser that mixes parameters, such as LBFGS, or clips the norm of all gradients, couples the pairs.

    Args:
        pairs: M pairs (model, guide) of modules with the same names, shapes and dtypes of parameters and buffers.
        data: One tensor (N, ...) for all pairs, or M of one shape.
        objective: A subclass of :class:`inference.Objective`; :class:`inference.ELBO` by default. Or one for each pair:
            M of one class and the same settings, but for a weight beta or another schedule.
        learning_rate: One for each pair, in place of the optimiser's own; Adam, AdamW, SGD and RMSprop can do so. A
            schedule changes all in the same proportion.
        **options: Further options of :func:`inference.fit` but ``device``; ``steps`` is needed.

    Returns:
        The history; its losses are sums over the pairs. With ``validation``, given as (N', M, ...) for M data sets,
        the sum decides, too.

    Raises:
        TypeError: See :func:`inference.fit`, or if a pair is not of modules, or the optimiser cannot have learning
            rates by pair.
        ValueError: See :func:`inference.fit`, or if there is no pair, or they, their data, objectives or learning rates
            do not fit each other; if more than tensors differs between pairs; if there are several seeds.

    Example:
        >>> from guides import MeanField
        >>> from zoo import LinearVAE
        >>> pairs = [(LinearVAE(5, 2), MeanField(5, 2)) for _ in range(3)]
        >>> fit_many(pairs, torch.randn(20, 5), steps=4, progress=False).steps
        4
    """
    if not pairs:
        raise ValueError("expected one pair or more, got none")
    data = as_tensors(data)
    rows = _rows_of_each(data, len(pairs))
    for half in (half for pair in pairs for half in pair):
        if not isinstance(half, nn.Module):
            raise TypeError(f"expected pairs of modules, got {type(half).__name__}")
    for pair, x in zip(pairs, rows[:1] if isinstance(data, Tensor) else rows):
        check_arguments(pair, (x,), {})  # of pairs of one form, the same data need one check
    if isinstance(options.get("seed"), Sequence):
        raise ValueError(
            f"expected one seed, for the noise of all pairs is drawn at once, got {options['seed']}: pairs that are to "
            "begin from seeds of their own are made under them"
        )
    own = _own_objectives(objective, len(pairs))
    if learning_rate is not None:
        options["optimizer"] = with_pair_rates(options.get("optimizer", adam), learning_rate, len(pairs))
    stack = _Stack([_Both(*pair) for pair in pairs])
    _check_alike(pairs)
    shared = isinstance(data, Tensor)
    sweep = _Sweep(own, shared)
    together = rows[0] if shared else torch.stack(rows, 1)
    stores: list[dict[str, Any]] = [s for m in stack.pairs[0].modules() for s in (m._parameters, m._buffers)]
    held = [dict(store) for store in stores]
    try:
        return fit(stack, stack, together, objective=sweep, **options)
    finally:
        for store, tensors in zip(stores, held, strict=True):  # an interrupt may have left the stack's in their place
            store.update(tensors)
        stack.hand_back()


class _Both(nn.Module):
    """Both halves of a pair as one module, so that one call swaps the tensors of both."""

    def __init__(self, model: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.model, self.guide = model, guide

    def forward(self, objective: Objective, x: Tensor, step: Tensor) -> Terms:
        """The objective per data point, (N,)."""
        return objective.terms(Call(self.model, self.guide, (x,), plate=objective.plate), step)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return dict(self.named_parameters()) | dict(self.named_buffers())


class _Stack(Module):
    """The tensors of several pairs, stacked: parameters and buffers of its own."""

    def __init__(self, pairs: Sequence[_Both]) -> None:
        super().__init__()
        tensors = [pair.tensors() for pair in pairs]
        forms = [{n: (t.shape, t.dtype, t.requires_grad) for n, t in own.items()} for own in tensors]
        for form in forms:
            if form != forms[0]:
                odd = sorted(n for n in form.keys() | forms[0].keys() if form.get(n) != forms[0].get(n))
                raise ValueError(f"expected pairs of one architecture, got ones that differ in {odd}")
        self.pairs = tuple(pairs)  # a tuple: their own parameters are not the stack's
        self.names = tuple(forms[0])
        for name in forms[0]:
            stacked = torch.stack([own[name].detach() for own in tensors])
            if forms[0][name][2]:
                self.register_parameter(_plain(name), nn.Parameter(stacked))
            else:
                self.register_buffer(_plain(name), stacked)

    def train(self, mode: bool = True) -> _Stack:
        """Set the mode of the first pair, too, whose Python is run for all."""
        self.pairs[0].train(mode)
        return super().train(mode)

    def stacked(self) -> dict[str, Tensor]:
        """The stacked tensors by their names in a pair."""
        return {name: getattr(self, _plain(name)) for name in self.names}

    @torch.no_grad()
    def hand_back(self) -> None:
        """Copy every pair's share into its own tensors, and give all of them the mode."""
        own = [pair.tensors() for pair in self.pairs]
        for name, stacked in self.stacked().items():
            for tensors, share in zip(own, stacked, strict=True):
                tensors[name].copy_(share)
        for pair in self.pairs:
            pair.train(self.training)


class _Weight(NamedTuple):
    """A weight or schedule of an objective, which may differ by pair.

    Attributes:
        holder: The objective, a copy of the caller's.
        name: Of the attribute.
        value: What it was: a schedule, or a number.
    """

    holder: Objective
    name: str
    value: Schedule | float

    def at(self, step: Tensor, like: Tensor) -> Tensor:
        """The value at a step, a scalar."""
        return torch.as_tensor(self.value(step)) if callable(self.value) else like.new_tensor(self.value)

    def set(self, now: Tensor | None) -> None:
        """Let the objective have a value of one pair."""
        setattr(self.holder, self.name, (lambda _: now) if callable(self.value) else now)


class _Sweep(Objective):
    """The sum over stacked pairs of an objective per data point.

    Args:
        objectives: One for all pairs, or one for each.
        shared: Whether the data are one tensor for all.

    Raises:
        ValueError: If objectives differ in more than their weights.
    """

    def __init__(self, objectives: Sequence[Objective], shared: bool) -> None:
        super().__init__(objectives[0].num_particles, plate=objectives[0].plate)
        self.objective, self.data_dim = objectives[0], None if shared else 1
        self.weights: list[list[_Weight]] = []
        if len(objectives) > 1:
            split = [_without_weights(objective) for objective in objectives]
            self.objective, self.weights = split[0][0], [weights for _, weights in split]
            for template, _ in split[1:]:
                if text := say_differences(described(self.objective), described(template)):
                    raise ValueError(f"expected objectives that differ in their weights alone, got ones where {text}")

    def _now(self, step: Tensor, like: Tensor) -> list[Tensor]:
        """The weights at a step, (pairs,) each."""
        return [torch.stack([weight.at(step, like) for weight in own]) for own in zip(*self.weights, strict=True)]

    def terms(self, call: Call, step: Tensor) -> Terms:
        """Sum over the pairs, (N,), and the scale that they share."""
        assert isinstance(call.model, _Stack)
        both, scales = call.model.pairs[0], set[float]()

        def one(tensors: dict[str, Tensor], x: Tensor, weights: list[Tensor]) -> Tensor:
            with self._at(weights):
                bound, scale = functional_call(both, tensors, (self.objective, x, step))
            scales.add(scale)
            return bound

        by_pair = vmap(one, in_dims=(0, self.data_dim, 0), randomness="different")
        try:
            bounds = by_pair(call.model.stacked(), call.args[0], self._now(step, call.args[0]))
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise ValueError(
                "expected every distribution to draw its noise by torch.randn or torch.rand, so that several pairs "
                f"can be trained at once, got {_distributions(both, call.args[0], self.data_dim)}: train the pairs one "
                "by one with fit"
            ) from error
        (scale,) = scales
        return Terms(bounds.sum(0), scale)

    @contextmanager
    def _at(self, weights: list[Tensor]) -> Iterator[None]:
        """Give the objective the weights of one pair while it is run."""
        own = self.weights[0] if self.weights else []
        try:
            for weight, now in zip(own, weights, strict=True):
                weight.set(now)
            yield
        finally:
            for weight in own:
                weight.set(None)


def _without_weights(objective: Objective) -> tuple[Objective, list[_Weight]]:
    """A copy of an objective, and of those in it, without its weights and schedules; and these."""
    template, weights = copy.copy(objective), list[_Weight]()
    for name, value in vars(objective).items():
        if isinstance(value, Objective):
            inner, found = _without_weights(value)
            setattr(template, name, inner)
            weights += found
        elif name in _WEIGHTS:
            weights.append(_Weight(template, name, value))
            weights[-1].set(None)
        elif name == _GIVEN:
            setattr(template, name, None)
    return template, weights


def _own_objectives(objective: Objective | Sequence[Objective] | None, num_pairs: int) -> Sequence[Objective]:
    if objective is None:
        return [ELBO()]
    several = isinstance(objective, list | tuple)
    objectives: Sequence[Any] = objective if several else [objective]
    if several and len(objectives) != num_pairs:
        raise ValueError(f"expected one objective, or one for each of {num_pairs} pairs, got {len(objectives)}")
    for one in objectives:
        check_objective(one)
    return objectives


def _check_alike(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Refuse pairs that differ in more than tensors: the Python of the first one is run for all.

    Raises:
        ValueError: With the first differences.
    """
    first = described(list(pairs[0]), values=False)
    bare = _without_buffers(first)
    for i, pair in enumerate(pairs[1:], 1):
        own = described(list(pair), values=False)
        if own != first and (text := say_differences(bare, _without_buffers(own))):
            raise ValueError(
                f"expected pairs that differ in their parameters and buffers alone, got pair {i} where {text}: train "
                "them one by one with fit"
            )


def _distributions(pair: _Both, x: Tensor, data_dim: int | None) -> str:
    """What the guide of a pair draws from, site by site."""
    own = x if data_dim is None else x.select(data_dim, 0)
    sites = Call(pair.model, pair.guide, (own,)).run_guide()
    return ", ".join(f"{_base(site.fn)} at site {name!r}" for name, site in sites.items())


def _base(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


def _rows_of_each(data: Tensor | Sequence[Tensor], num_pairs: int) -> list[Tensor]:
    if isinstance(data, Tensor):
        return [data] * num_pairs
    shapes = {tuple(x.shape) for x in data}
    if len(data) != num_pairs or len(shapes) != 1:
        raise ValueError(
            f"expected one tensor, or {num_pairs} of one shape, got {len(data)} of shapes {sorted(shapes)}"
        )
    return list(data)


def _plain(name: str) -> str:
    return name.replace(".", "/")


def _without_buffers(description: Any) -> Any:
    """A description without buffers, of which those that no file holds stand in it with their values."""
    if isinstance(description, dict):
        return {key: _without_buffers(item) for key, item in description.items() if key != "buffers"}
    return list(map(_without_buffers, description)) if isinstance(description, list) else description
