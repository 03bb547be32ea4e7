"""Multi-start training: several seeds, of which the best is kept by the ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro.infer
from torch import Tensor, nn

from inference.core.display import Result
from inference.core.seeding import seeded
from inference.core.sources import as_arguments
from inference.training.fitting import fit, one_by_one
from inference.training.trainer import History
from inference.weights.importance_weights import log_weights
from inference.weights.summary import elbo

_SCORE_SEED = 0


@dataclass(frozen=True, kw_only=True, repr=False)
class Restarts(Result):
    """Result of multi-start training: pairs trained from several seeds.

    Attributes:
        model: The best pair's model.
        guide: The best pair's guide.
        seed: The best pair's seed.
        elbo: Mean ELBO of the training data after training, in nats, by seed; minus infinity where training diverged.
        pairs: All pairs, by seed.
        histories: Their training, by seed.
    """

    model: nn.Module
    guide: nn.Module
    seed: int
    elbo: dict[int, float]
    pairs: dict[int, tuple[nn.Module, nn.Module]]
    histories: dict[int, History]

    def __str__(self) -> str:
        """One line per seed, the best one marked."""
        mark = {self.seed: " (best)"}
        return "\n".join(f"seed {s}: ELBO {value:.4f}{mark.get(s, '')}" for s, value in self.elbo.items())

    __repr__ = __str__


def fit_best(
    make: Callable[[], tuple[nn.Module, nn.Module]],
    data: Tensor | tuple[Tensor, ...],
    *args: Tensor,
    seeds: Sequence[int],
    num_samples: int = 10,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Restarts:
    """Multi-start training: fit a pair from each of several seeds, and choose the one with the highest mean ELBO.

    The choice depends on the ELBO of the training data alone, so that later measurements are not selected for.

    Args:
        make: Makes a new pair; called under the seed.
        data: See :func:`inference.fit`.
        *args: See :func:`inference.fit`.
        seeds: Seeds of initialisation, noise and order of the data.
        num_samples: Samples per data point of the ELBO that chooses, under one fixed seed for all.
        checkpoint: Folder of one checkpoint file per seed; an interrupted run goes on from there.
        **options: Further options of :func:`inference.fit`; an ``objective`` is a function that makes one, since each
            counts its own steps.

    Raises:
        TypeError: As :func:`inference.fit`, or if the objective is not a function.
        ValueError: As :func:`inference.fit`, or if there is no seed or one twice.
        FloatingPointError: If training diverged from every seed.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected one seed or more, all different, got {list(seeds)}")
    data = one_by_one(data, args)
    make_objective = options.pop("objective", None)
    if make_objective is not None and (isinstance(make_objective, pyro.infer.ELBO) or not callable(make_objective)):
        raise TypeError(f"expected objective as a function that makes one, got {type(make_objective).__name__}")
    rows, _ = as_arguments(data if isinstance(data, tuple) else (data,), {})
    pairs, histories, scores = {}, {}, {}
    failed: FloatingPointError | None = None
    for seed in seeds:
        with seeded(seed):
            pairs[seed] = make()
        try:
            histories[seed] = fit(
                *pairs[seed],
                data,
                seed=seed,
                objective=None if make_objective is None else make_objective(),
                checkpoint=None if checkpoint is None else Path(checkpoint) / f"seed_{seed}.safetensors",
                **options,
            )
        except FloatingPointError as error:
            scores[seed], failed = -math.inf, error
            continue
        with seeded(_SCORE_SEED):
            device = next(pairs[seed][0].parameters()).device
            weights = log_weights(*pairs[seed], *(r.to(device) for r in rows), num_samples=num_samples)
        scores[seed] = float(elbo(weights).value.mean())
    if not histories and failed is not None:
        raise failed
    best = max(scores, key=lambda seed: scores[seed])
    model, guide = pairs[best]
    return Restarts(model=model, guide=guide, seed=best, elbo=scores, pairs=pairs, histories=histories)
