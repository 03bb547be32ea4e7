"""The doors of the library as a table calls them: each runs one on a pair, and checks the numbers that it gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide

from inference import ELBO, Adaptive, compare, evidence, fit, gap, iwae, log_weights, sbc, simulate
from pyro_pairs.pairs import Pair

QUIET: dict[str, Any] = {"seed": 0, "progress": False}


def _adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=0.03)


def _trained(pair: Pair, steps: int = 150) -> list[float]:
    return fit(
        pair.model, pair.guide, pair.args, steps=steps, objective=ELBO(2), optimizer=_adam, **QUIET, **pair.options
    ).loss


def _fit(pair: Pair) -> None:
    loss = torch.tensor(_trained(pair, 60))
    assert loss[-20:].mean() < loss[:20].mean()


def _log_weights(pair: Pair) -> None:
    _trained(pair)
    found = log_weights(pair.model, pair.guide, *pair.args, num_samples=400, **QUIET, **pair.options)
    value, error = iwae(found)
    assert value.isfinite().all()
    if pair.truth is not None:  # a mean weight is below the truth by Markov's inequality, but for its own error
        assert (value - pair.truth < 4 * error + math.log(100)).all()
        assert (pair.truth - value < 4 * error + 1.0).all()


def _evidence(method: Any) -> Callable[[Pair], None]:
    def door(pair: Pair) -> None:
        _trained(pair)
        found = evidence(pair.model, *pair.args, guide=pair.guide, method=method, **QUIET, **pair.options)
        assert found.value.isfinite().all()
        if pair.truth is not None:
            slack = 4 * found.standard_error.nan_to_num(posinf=0.0) + 1e-3
            assert (found.lower <= pair.truth + slack).all()
            assert (pair.truth <= found.upper + slack).all()

    return door


def _gap(pair: Pair) -> None:
    settings = {"method": Adaptive(1000, 200, 3), "num_samples": 32, "restarts": 0, "max_steps": 20}
    found = gap(pair.model, pair.guide, *pair.args, **settings, **QUIET, **pair.options)
    assert (found.total_lower >= 0).all()
    assert (found.elbo <= found.evidence.value + 4 * found.total_error + 0.5).all()
    if isinstance(pair.guide, AutoGuide):
        assert found.second == "optimisation"
        assert found.amortisation is not None


def _compare(pair: Pair) -> None:
    tree = compare(pair.model, {"own": pair.guide}, *pair.args, num_samples=100, **QUIET, **pair.options)
    columns = tree["train"]
    assert (columns["elbo"].values <= columns["iwae"].values + 1e-9).all()
    if pair.truth is not None:
        lower = torch.from_numpy(columns["evidence_lower"].values)[0, 0]
        assert (lower <= pair.truth + 4 * torch.from_numpy(columns["evidence_se"].values)[0, 0] + 1e-3).all()


def _sbc(pair: Pair) -> None:
    options = dict(pair.options)
    if isinstance(pair.guide, AutoGuide):  # one that is fitted to no data, so that its calibration is known to be bad
        options["refit"] = lambda *_: pair.guide
    simulation = simulate(pair.model, pair.guide, *pair.args, num_simulations=100, num_samples=19, **QUIET, **options)
    result = sbc(simulation, seed=0)
    assert result.ranks.shape == (100, len(result.names))
    assert int(result.ranks.min()) >= 0
    assert int(result.ranks.max()) <= 19


DOORS: dict[str, Callable[[Pair], None]] = {
    "fit": _fit,
    "log_weights": _log_weights,
    "evidence": _evidence("auto"),
    "adaptive": _evidence("adaptive"),
    "gap": _gap,
    "compare": _compare,
    "sbc": _sbc,
}

# Cells that are refused, with what the refusal says.
REFUSED: dict[tuple[str, str], str] = {}
