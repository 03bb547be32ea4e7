"""Brackets and upper bounds of all data as one data point, of missing data, and of data that are a later argument."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import Annealed, bdmc, converged_bracket, eubo, simulated_draws

QUIET = {"seed": 0, "progress": False}
DOUBLE = {"dtype": torch.float64}
NAN = float("nan")
X = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.2], [0.7, 0.7]], **DOUBLE)
Y = torch.tensor([1.0, -0.4, 0.1, 2.0], **DOUBLE)
GAPS = torch.tensor([[0.4, NAN], [2.0, 1.0], [NAN, -1.0], [0.1, -0.2]], **DOUBLE)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 0.5), obs=y)


def _covariance():
    return torch.linalg.inv(torch.eye(2, **DOUBLE) + 4 * X.T @ X)


def wide(x, y):
    pyro.sample("w", dist.MultivariateNormal(4 * _covariance() @ x.T @ y, 1.5 * _covariance()))


def evidence_of(y):
    return dist.MultivariateNormal(0 * y, X @ X.T + 0.25 * torch.eye(len(y), **DOUBLE)).log_prob(y)


@pytest.mark.filterwarnings("ignore:.*several samples side by side")
def test_all_data_as_one_data_point_are_bracketed():
    draws = simulated_draws(regression, X, Y, seed=1)
    assert torch.equal(draws.x, X)
    assert not torch.equal(draws.args[0], Y)
    found = bdmc(regression, draws, guide=wide, whole=True, method=Annealed(200), **QUIET).evidence
    assert float(found.raw_upper - found.raw_lower) < 0.1
    assert float(found.lower) <= float(evidence_of(draws.args[0])) <= float(found.upper)
    real = converged_bracket(regression, X, Y, guide=wide, whole=True, method=Annealed(200), num_steps=50, **QUIET)
    assert real.raw_lower.shape == (1,)
    assert abs(float(real.raw_lower - evidence_of(Y))) < 0.1
    assert abs(float(real.raw_upper - evidence_of(Y))) < 0.1


def test_eubo_of_all_data_is_above_by_the_divergence():
    excess = []
    for seed in range(200):
        draws = simulated_draws(regression, X, Y, seed=seed)
        excess.append(eubo(regression, wide, draws, whole=True).value - evidence_of(draws.args[0]))
    excess = torch.cat(excess)
    posterior, guide = (torch.distributions.MultivariateNormal(Y[:2] * 0, f * _covariance()) for f in (1.0, 1.5))
    expected = torch.distributions.kl_divergence(posterior, guide)
    assert abs(float(excess.mean() - expected)) < 4 * float(excess.std()) / 200**0.5


def gappy(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 0.5).mask(~x.isnan()).to_event(1), obs=x.nan_to_num())


def exact(x):
    variance = 1 / (1 + 4 * (~x.isnan()).sum(-1).double())
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(4 * x.nan_to_num().sum(-1) * variance, variance**0.5))


def _of_rows(x):
    rows = [row[~row.isnan()] for row in x]
    eye = [0.25 * torch.eye(len(row), **DOUBLE) + 1 for row in rows]
    return torch.stack([dist.MultivariateNormal(0 * r, c).log_prob(r) for r, c in zip(rows, eye)])


def test_missing_values_stay_missing_in_brackets():
    draws = simulated_draws(gappy, GAPS, missing=True, seed=0)
    assert torch.equal(draws.x.isnan(), GAPS.isnan())
    torch.testing.assert_close(eubo(gappy, exact, draws, missing=True).value, _of_rows(draws.x))
    found = bdmc(gappy, draws, guide=exact, missing=True, method=Annealed(100), **QUIET).evidence
    assert float((found.raw_lower - _of_rows(draws.x)).abs().max()) < 0.05
    assert float((found.raw_upper - _of_rows(draws.x)).abs().max()) < 0.05
    real = converged_bracket(gappy, GAPS, guide=exact, missing=True, method=Annealed(100), num_steps=50, **QUIET)
    assert float((real.raw_lower - _of_rows(GAPS)).abs().max()) < 0.05
    with pytest.raises(ValueError, match="missing=True"):
        simulated_draws(gappy, GAPS)


def test_what_is_no_argument_cannot_be_simulated():
    def shifted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x + 1)

    with pytest.raises(ValueError, match="argument or a view of one"):
        simulated_draws(shifted, Y)
