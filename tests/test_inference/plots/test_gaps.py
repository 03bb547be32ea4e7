"""Tests of the figure of gaps and their parts."""

import math
from dataclasses import replace

import pytest
import torch

from guides import FullRank, MeanField
from inference import gap
from inference.plots import gap_parts_figure
from zoo import LinearVAE


@pytest.fixture(scope="module")
def gaps():
    torch.manual_seed(0)
    model = LinearVAE(5, 2).double().requires_grad_(False)
    x = model(n=3)
    return {
        family.__name__: gap(model, family(5, 2, hidden=(4,)).double(), x, restarts=0, seed=0, progress=False)
        for family in (MeanField, FullRank)
    }


def test_bars_are_the_parts_and_the_whisker_the_interval(gaps):
    (ax,) = gap_parts_figure({"linear": gaps}, {"linear": {"MeanField": 0.25}}).axes
    for place, found in enumerate(gaps.values()):
        total, approximation, amortisation = found.mean.values()
        bars = [bar for bar in ax.patches if round(bar.get_y() + bar.get_height() / 2) == place]
        widths = [bar.get_width() for bar in bars]
        assert widths == pytest.approx([max(approximation.value, 0), max(amortisation.value, 0)])
        assert bars[1].get_x() == pytest.approx(widths[0])
        whisker = next(lines for lines in ax.collections if lines.get_segments()[0][0][1] == place)
        assert list(whisker.get_segments()[0][:, 0]) == pytest.approx([total.lower, total.upper], abs=1e-9)
    ticks = [line for line in ax.lines if line.get_label() == "predicted approximation"]
    assert [list(tick.get_xdata()) for tick in ticks] == [[0.25, 0.25]]


def test_a_gap_without_upper_end_has_an_arrow(gaps):
    found = gaps["MeanField"]
    evidence = replace(found.evidence, upper=found.evidence.upper + math.inf, guarantee=("asymptotic",) * 3)
    (ax,) = gap_parts_figure({"linear": {"MeanField": replace(found, evidence=evidence)}}).axes
    assert [line.get_marker() for line in ax.lines if line.get_label() == "no upper end"] == [">"]


def test_no_gap_is_refused():
    with pytest.raises(ValueError, match="expected at least one gap of each model, got none"):
        gap_parts_figure({})
