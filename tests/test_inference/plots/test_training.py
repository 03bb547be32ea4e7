"""The figure of evidence, ELBO and gap along training."""

import pytest
import torch

from guides import MeanField
from inference import Importance, Snapshots, fit, gap
from inference.plots import training_gap_figure
from zoo import LinearVAE

QUICK = {"restarts": 0, "max_steps": 20, "num_samples": 16, "seed": 0, "progress": False}


@pytest.fixture
def gaps():
    torch.manual_seed(0)
    model, guide = LinearVAE(5, 2).double(), MeanField(5, 2, hidden=(4,)).double()
    x, snapshots = torch.randn(40, 5).double(), Snapshots(10)
    fit(model, guide, x, steps=30, callbacks=[snapshots], seed=0, progress=False)
    return {step: gap(*pair, x[:6], **QUICK) for step, pair in reversed(snapshots.pairs.items())}


def drawn(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines}


def test_log_p_and_elbo_are_the_means_in_the_order_of_steps(gaps):
    lines = drawn(training_gap_figure(gaps).axes[0])
    for name, value in {r"$\log p(x)$": lambda g: g.evidence.mean.value, "ELBO": lambda g: g.elbo.mean()}.items():
        assert lines[name].tolist() == [[step, float(value(gaps[step]))] for step in (10, 20, 30)]
    assert "no upper end" not in lines


def test_the_parts_fill_what_is_between_elbo_and_log_p(gaps):
    areas = {area.get_label(): area.get_paths()[0].vertices for area in training_gap_figure(gaps).axes[0].collections}
    last = gaps[30]
    at_end = {name: sorted({float(y) for x, y in path if x == 30}) for name, path in areas.items()}
    best = float((last.elbo + last.amortisation).mean())
    assert at_end["amortisation gap"] == pytest.approx([float(last.elbo.mean()), best])
    assert at_end["approximation gap"] == pytest.approx([best, last.evidence.mean.value])


def test_a_lower_bound_alone_has_an_arrow():
    torch.manual_seed(0)
    model, guide = LinearVAE(4, 2).double(), MeanField(4, 2, hidden=(3,)).double()
    few = gap(model, guide, torch.randn(3, 4).double(), method=Importance(16), **QUICK)
    assert few.evidence.mean.upper == float("inf")
    figure = training_gap_figure({5: few})
    assert drawn(figure.axes[0])["no upper end"].tolist() == [[5.0, few.evidence.mean.value]]


def test_no_gap_is_refused():
    with pytest.raises(ValueError, match="expected the gap at one step at least, got none"):
        training_gap_figure({})
