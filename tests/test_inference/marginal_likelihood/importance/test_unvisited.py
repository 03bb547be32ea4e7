"""Guides that leave out a mode: their weights look sound, and the interval must not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import inference.marginal_likelihood.importance.unvisited as unvisited
from inference import Annealed, Defensive, Importance, SmoothedImportance, evidence
from inference.marginal_likelihood.base.intervals import evidence_from_weights
from inference.marginal_likelihood.importance.unvisited import _share_beyond
from inference.weights.summary import summarise

X = torch.tensor([2.25, 4.0, 6.25], dtype=torch.float64)
SIGMA = 0.2
METHODS = {
    "importance": Importance(2000),
    "smoothed": SmoothedImportance(2000),
    "defensive": Defensive(2000, guide_share=0.99),
    "annealed": Annealed(num_temperatures=200, num_chains=100),
}


def squares(x):
    """Two mirrored modes, each with half of the posterior."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z.square(), SIGMA), obs=x)


def one_sheet(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.sqrt(), 1.3 * SIGMA / (2 * x.sqrt())))


def both_sheets(x):
    with pyro.plate("data", len(x)):
        means = torch.stack([x.sqrt(), -x.sqrt()], -1)
        scales = (1.3 * SIGMA / (2 * x.sqrt())).unsqueeze(-1).expand_as(means)
        parts = dist.Normal(means, scales)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros_like(means)), parts))


def truth():
    """On a grid: the integrand falls off within it, and the trapezoidal rule's error with it."""
    z = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    prior, likelihood = dist.Normal(z.new_tensor(0.0), 1.0), dist.Normal(z.square(), SIGMA)
    return (prior.log_prob(z) + likelihood.log_prob(X.unsqueeze(-1))).logsumexp(-1) + (z[1] - z[0]).log()


def measured(guide, method, seed=0):
    return evidence(squares, X, guide=guide, method=method, seed=seed, progress=False)


@pytest.mark.parametrize("name", METHODS)
def test_a_guide_of_one_of_two_modes_gets_no_upper_end(name):
    found = measured(one_sheet, METHODS[name])
    assert (found.lower <= truth()).all()
    assert not bool((found.upper < truth()).any())


@pytest.mark.parametrize("make", [Importance, SmoothedImportance])
def test_without_the_search_half_of_the_evidence_is_lost(make):
    """The control: nothing in the weights shows the other mode."""
    found = measured(one_sheet, make(2000, search=False))
    assert found.upper.isfinite().any()
    torch.testing.assert_close(found.value, truth() - math.log(2), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["importance", "smoothed", "defensive"])
def test_a_guide_of_both_modes_stays_two_sided(name):
    found = measured(both_sheets, METHODS[name])
    assert found.upper.isfinite().all()
    assert ((found.value - truth()).abs() < 4 * found.standard_error).all()
    assert all("independent starts" in note for note in found.notes)


def test_the_note_says_how_much_is_hardly_visited():
    notes = measured(one_sheet, METHODS["importance"]).notes
    shares = [float(note.split("hardly visit ")[1].split()[0]) for note in notes if "hardly visit" in note]
    assert shares
    assert all(abs(share - 0.5) < 0.1 for share in shares)


def test_a_quarter_of_the_error_is_what_may_be_left_unvisited(monkeypatch):
    parts = torch.tensor([0.24, 0.26, 1.2])
    monkeypatch.setattr(unvisited, "_share_unvisited", lambda *args: parts * args[-1].standard_error)
    found = measured(both_sheets, METHODS["importance"])
    assert found.upper.isfinite().tolist() == [True, False, False]
    assert ["hardly visit" in note for note in found.notes] == [False, True, True]


def test_an_estimate_far_above_counts_whatever_its_own_error():
    plain = evidence_from_weights(summarise([torch.zeros(200, 1, dtype=torch.float64)], 200))
    needle = torch.full((4000, 1), -50.0, dtype=torch.float64)
    needle[0] = 20.0
    assert float(_share_beyond(needle, plain)) > 0.99
    near = torch.full((4000, 1), -50.0, dtype=torch.float64)
    near[0] = math.log(4000) + 1  # one nat above, by one draw
    assert float(_share_beyond(near, plain)) == 0


def test_the_search_is_counted():
    plain, searched = (measured(both_sheets, Importance(2000, search=search)) for search in (False, True))
    assert plain.evaluations == 2000
    assert searched.evaluations > 4000
    torch.testing.assert_close(searched.value, plain.value, rtol=0, atol=0)


def test_many_coordinates_are_not_searched_and_the_note_says_so():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(60), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        covariance = torch.eye(60, dtype=x.dtype) - 1 / 61
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal((x / 61).unsqueeze(-1).expand(-1, 60), covariance))

    found = evidence(model, X, guide=guide, method="importance", seed=0, progress=False)
    expected = dist.Normal(X.new_tensor(0.0), math.sqrt(61)).log_prob(X)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-6)
    assert all("not looked for: there are more than 50" in note for note in found.notes)
