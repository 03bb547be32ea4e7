"""Doors that go through blocks of rows: each block is measured as by itself, and none sees more rows than it has."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import MeanField
from inference import information_bounds, posterior_error, predictive
from inference.core.seeding import block_seed
from inference.pair.call import Call
from inference.pair.rows import blocks_of_draws, row_blocks
from zoo import DeepGaussianVAE, LinearVAE

N, D, K = 11, 5, 2
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).double()
torch.manual_seed(0)
LINEAR, DEEP = LinearVAE(D, K).double(), DeepGaussianVAE(D, K, hidden=(8,)).double()
GUIDE = MeanField(D, K, hidden=(8,)).double()
REFERENCE = {"z": torch.randn(30, N, K).double()}
CUTS = [slice(0, 4), slice(4, 8), slice(8, N)]


def error(rows=slice(None), *, model=LINEAR, reference=None, **options):
    reference = None if reference is None else {"z": reference["z"][:, rows]}
    known = None if reference is None else LINEAR.log_evidence(X[rows])
    found = posterior_error(model, GUIDE, X[rows], reference=reference, log_evidence=known, num_samples=20, **options)
    return [*found.kl, *found.reverse_kl, found.wasserstein, found.mean_error, found.log_variance_ratio]


def draws(rows=slice(None), *, num_samples=3, **options):
    found = predictive(DEEP, GUIDE, X[rows], num_samples=num_samples, **options)
    return [found[name].transpose(0, 1) for name in ("z", "x")]


DOORS = {
    "closed form": error,
    "reference": lambda *a, **o: error(*a, reference=REFERENCE, **o),
    "one prediction": lambda *a, **o: draws(*a, num_samples=1, **o),
    "predictions": draws,
}


@pytest.mark.parametrize("door", DOORS)
def test_each_block_is_measured_as_by_itself(door):
    found = DOORS[door](seed=3, block=4)
    parts = [DOORS[door](cut, seed=block_seed(3, i)) for i, cut in enumerate(CUTS)]
    for whole, *blocks in zip(found, *parts, strict=True):
        torch.testing.assert_close(whole, torch.cat(blocks), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("door", DOORS)
def test_a_block_of_all_rows_changes_nothing(door):
    for ours, theirs in zip(DOORS[door](seed=3, block=N), DOORS[door](seed=3), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("block", [1, 4])
def test_no_run_sees_more_rows_than_a_block_has(block, monkeypatch):
    seen, forward = [], type(GUIDE).forward
    monkeypatch.setattr(type(GUIDE), "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    for call in (error, draws, lambda **o: information_bounds(DEEP, GUIDE, X, progress=False, **o)):
        seen.clear()
        call(block=block)
        alone = [n for n in seen if n > max(2, block)]  # rows that are found by a comparison of six with the whole run
        assert set(alone) <= {6, N}
        assert alone.count(N) <= 3


@pytest.mark.parametrize("bad", [0, -1, 2.0])
@pytest.mark.parametrize("door", [posterior_error, predictive, information_bounds])
def test_a_block_of_no_rows_is_refused(door, bad):
    with pytest.raises((TypeError, ValueError), match="expected block"):
        door(LINEAR, GUIDE, X, block=bad)


class Known(dist.Normal):
    """A normal distribution whose draws follow from its mean, so that they are the same in any block."""

    def rsample(self, sample_shape=()):
        return (self.loc + self.scale * torch.sin(37 * self.loc)).expand(self._extended_shape(sample_shape))


def known(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", Known(0.4 * x[:, :K], 0.3 + x[:, 2:3].square()).to_event(1))


@pytest.mark.parametrize(("block", "chunk"), [(N, 64), (4, 3), (3, 4), (1, 1), (5, 64)])
def test_information_does_not_depend_on_the_blocks(block, chunk):
    """By all N^2 densities written out."""
    mean, sigma = 0.4 * X[:, :K], 0.3 + X[:, 2:3].square()
    z = mean + sigma * torch.sin(37 * mean)
    log_q = dist.Normal(mean, sigma).log_prob(z[:, None]).sum(-1)
    low = log_q.diagonal() - log_q.logsumexp(-1) + math.log(N)
    rest = log_q.clone().fill_diagonal_(-math.inf).logsumexp(-1)
    high = log_q.diagonal() - rest + math.log(N - 1)
    found = information_bounds(LINEAR, known, X, block=block, chunk=chunk, progress=False)
    torch.testing.assert_close(found.per_datum, (low + high) / 2, rtol=1e-10, atol=1e-10)


def test_a_pair_that_subsamples_is_one_block():
    def model(x):
        with pyro.plate("data", N, subsample_size=6) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) * x.new_ones(D), 1.0).to_event(1), obs=x[index])

    def guide(x):
        with pyro.plate("data", N, subsample_size=6):
            pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))

    assert len(row_blocks(Call(model, guide, (X,)), 4)) == 1
    assert predictive(model, guide, X, num_samples=2, block=4)["z"].shape == (2, 6, K)


def test_values_without_rows_are_predicted_as_one_block():
    def model(x):
        pyro.deterministic("constant", x.new_ones(3))
        DEEP(x)

    found = predictive(model, GUIDE, X, num_samples=2, block=4, seed=0)
    assert found["z"].shape == (2, N, K)
    assert found["constant"].shape[-1] == 3


@pytest.mark.parametrize(("samples", "rows"), [(1, 2**23 // 5), (1000, 1677), (2**24, 1)])
def test_a_block_is_chosen_by_what_its_draws_take(samples, rows):
    x = torch.zeros(1, D, dtype=torch.float64).expand(2**21, D)
    assert blocks_of_draws(Call(LINEAR, GUIDE, (x,)), None, samples).place(0) == slice(0, rows)
