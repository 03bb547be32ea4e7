"""TARP against an independent implementation."""

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
from calibrated_pairs import (
    ACCEPT,
    DETECT,
    NUM,
    simulation,
)

from inference import (
    tarp,
)

# --- TARP ------------------------------------------------------------------------------------------------


def test_tarp_is_an_independent_implementations():
    source, random = simulation(1.3), np.random.default_rng(3)
    truth, draws = source.truth.numpy(), source.draws.numpy()
    references = random.normal(size=truth.shape)
    scale = draws.reshape(-1, 2).std(0, ddof=1)
    fractions = np.empty(NUM)
    for n in range(NUM):
        nearer = np.linalg.norm((draws[:, n] - references[n]) / scale, axis=1)
        fractions[n] = np.mean(nearer < np.linalg.norm((truth[n] - references[n]) / scale))
    result = tarp(source, references=torch.from_numpy(references))
    assert (result.ranks.numpy() == np.round(99 * fractions)).all()
    # Lemos et al. count f < alpha; between two possible fractions, j - 1 and j of 99, their curve is constant.
    for j in range(1, 101):
        assert result.coverage[j].item() == pytest.approx(np.mean(fractions < (j - 0.5) / 99), abs=1e-12)
    assert (result.coverage[0].item(), result.coverage[-1].item()) == (0.0, 1.0)


def test_tarp_accepts_the_exact_guide_and_tells_which_way_others_err():
    exact, wide, narrow = (tarp(simulation(f)) for f in (1.0, 1.3, 1 / 1.3))
    assert min(exact.p_value, exact.area_p_value) > ACCEPT
    assert bool(((exact.coverage >= exact.lower) & (exact.coverage <= exact.upper)).all())
    for bad in (wide, narrow):
        assert max(bad.p_value, bad.area_p_value) < DETECT
        assert not bool(((bad.coverage >= bad.lower) & (bad.coverage <= bad.upper)).all())
    assert narrow.area < 0 < wide.area


def test_the_area_is_the_curves():
    result = tarp(simulation(1.3))
    levels, excess = result.levels.numpy(), (result.coverage - result.levels).numpy()
    upper = levels >= 0.5
    assert result.area == pytest.approx(scipy.integrate.trapezoid(excess[upper], levels[upper]), abs=2e-4)
    assert result.deviation == np.abs(excess).max()
