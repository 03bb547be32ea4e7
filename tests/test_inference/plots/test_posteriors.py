"""The figure of a posterior beside guides."""

import math

import pytest
import torch
from matplotlib.patches import Patch

from guides import Exact, TiedMeanField
from inference import posterior_error
from inference.plots import posterior_figure
from inference.plots.posteriors import _MASSES, _levels, _log_mass
from zoo import PPCA, LinearVAE


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = LinearVAE(5, 2, sigma=0.7).double().requires_grad_(False)
    return model, model(n=1)


def outline(ax, place):
    """Ends of the widest contour of the guide at a place, (2, 2): coordinate by end."""
    lines = ax.collections[place].get_paths()[0].vertices
    return torch.from_numpy(lines).aminmax(dim=0)


def test_contours_hold_the_stated_mass_of_a_gaussian(pair):
    model, x = pair
    q = TiedMeanField(model).posterior(x)
    (ax,) = posterior_figure(model, {"tied": TiedMeanField(model)}, x).axes
    radius = math.sqrt(-2 * math.log(1 - _MASSES[0]))  # of a plane normal, chi of 2
    low, high = outline(ax, 1)
    sd = q.stddev[0] if hasattr(q, "stddev") else q.base_dist.stddev[0]
    assert torch.allclose((high - low) / 2, radius * sd, rtol=0.03)
    assert torch.allclose((high + low) / 2, q.mean[0], atol=0.03 * float(sd.max()))


def test_an_exact_guide_lies_on_the_posterior(pair):
    model, x = pair
    (ax,) = posterior_figure(model, {"exact": Exact(model)}, x).axes
    shaded, drawn = (ax.collections[i].get_paths()[0].vertices for i in (0, 1))
    assert abs(shaded.max(0) - drawn.max(0)).max() < 1e-9
    assert posterior_error(model, Exact(model), x).wasserstein < 1e-6


def test_levels_enclose_their_shares():
    axis = torch.linspace(-6, 6, 241).double()
    normal = torch.distributions.Normal(0.0, 1.0)
    mass = _log_mass(lambda z: normal.log_prob(z).sum(-1), [axis, axis])
    for level, share in zip(_levels(mass), _MASSES):
        assert float(mass[mass >= level].exp().sum()) == pytest.approx(share, abs=2e-3)


def test_the_legend_names_posterior_and_guides(pair):
    model, x = pair
    (ax,) = posterior_figure(model, {"tied": TiedMeanField(model), "exact": Exact(model)}, x).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["posterior", "tied", "exact"]
    assert isinstance(ax.get_legend().legend_handles[0], Patch)


@pytest.mark.parametrize(("latents", "rows", "guides"), [(3, 1, True), (2, 2, True), (2, 1, False)])
def test_what_cannot_be_drawn_is_said(latents, rows, guides):
    model = PPCA(5, latents).double()
    given = {"exact": Exact(model)} if guides else {}
    with pytest.raises(ValueError, match="one data point and two latent dimensions"):
        posterior_figure(model, given, torch.zeros(rows, 5, dtype=torch.float64))
