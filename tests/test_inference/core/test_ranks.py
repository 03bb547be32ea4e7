"""Ranks: they share work and get one result, whose numbers do not depend on how many there are."""

import pytest
import torch
from several_ranks import on_ranks

from guides import MeanField
from inference import (
    Adaptive,
    Annealed,
    Importance,
    compare,
    evidence,
    gap,
    mutual_information,
    posterior_error,
    predictive,
    rate_distortion,
    sbc,
    simulate,
)
from inference.core.ranks import Ranks, alone, ranks
from zoo import DeepGaussianVAE

N, D, K = 11, 4, 2
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def pair():
    torch.manual_seed(0)
    return DeepGaussianVAE(D, K, hidden=(8,)), MeanField(D, K, hidden=(8,))


METHODS = {
    "importance": Importance(num_samples=100),
    "adaptive": Adaptive(num_samples=100),
    "annealed": Annealed(num_temperatures=10, num_chains=2),
}
QUIET = {"seed": 5, "progress": False}


def estimates(folder):
    """By name what several doors give, in blocks of few rows."""
    model, guide = pair()
    found = {}
    for name, method in METHODS.items():
        with_guide = None if name == "annealed" else guide
        for which in (name, f"{name}, read"):
            options = {"method": method, "guide": with_guide, "block": 5, "checkpoint": f"{folder}/{name}"}
            result = evidence(model, X, **options, **QUIET)
            found[which] = torch.stack([result.value, result.lower, result.upper])
    few = {"known": result, "num_samples": 1024, "restarts": 0, "max_steps": 5}
    parts = gap(model, guide, X, checkpoint=f"{folder}/gap", **few, **QUIET)
    found["gap"] = torch.stack([parts.elbo, parts.total, parts.approximation, parts.amortisation])
    other = MeanField(D, K, hidden=(3,))
    for which, file in (("compare", None), ("compare, in a file", f"{folder}/compare")):
        options = {"num_samples": 60, "block": 6, "checkpoint": file}
        table = compare(model, {"a": guide, "b": other}, X, **options, **QUIET)["train"]
        found[which] = torch.as_tensor(table["evidence"].values)
    found["predictive"] = predictive(model, guide, X, num_samples=3, block=5, seed=5)["x"]
    found["error"] = error_by_blocks(model, guide)
    return found


def error_by_blocks(model, guide):
    reference = {"z": torch.randn(9, N, K, generator=torch.Generator().manual_seed(1))}
    options = {"reference": reference, "log_evidence": torch.zeros(N), "num_samples": 20, "block": 5, "seed": 5}
    error = posterior_error(model, guide, X, **options)
    return torch.stack([error.kl.value, error.reverse_kl.value, error.wasserstein])


def check_equal(found, expected):
    for name, want in expected.items():
        torch.testing.assert_close(
            found[name], want, rtol=0, atol=1e-10, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_ranks_measure_what_one_measures(tmp_path):
    (tmp_path / "alone").mkdir()
    expected = estimates(tmp_path / "alone")
    for found in on_ranks(estimates, 2, tmp_path, tmp_path):
        check_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_ranks_measures_the_same(size, tmp_path):
    (tmp_path / "alone").mkdir()
    expected = estimates(tmp_path / "alone")
    for found in on_ranks(estimates, size, tmp_path, tmp_path):
        check_equal(found, expected)


class Own(ValueError):
    """An error that cannot be sent: it holds a function."""

    def __init__(self, first, second):
        super().__init__(first)
        self.second = second


def raise_own(i):
    raise Own(f"piece {i} failed", lambda: i)


def failing():
    """What ranks make of errors, other calls, and work that is theirs alone."""
    group, texts = ranks(), []
    for call in (
        lambda: list(group.in_turn(5, lambda i: 1 / (i - 3))),
        lambda: list(group.in_turn(3, raise_own)),
        lambda: evidence(pair()[0], X, method="importance", guide=pair()[1], seed=group.rank, progress=False),
        lambda: evidence(pair()[0], X[group.rank :], method="annealed", seed=1, progress=False),
        lambda: evidence(DeepGaussianVAE(D, K, hidden=(8 + group.rank,)), X, method="annealed", **QUIET),
    ):
        try:
            call()
        except (ArithmeticError, ValueError) as error:
            texts.append(str(error))
    with alone():
        texts.append(ranks() == Ranks())
    return texts


def calibrated(_):
    """What calibration and diagnostics give without a seed."""
    model, guide = pair()
    simulation = simulate(model, guide, X, num_simulations=100, num_samples=19, progress=False)
    rates = rate_distortion(model, guide, X, num_samples=4, progress=False).totals.value
    information = mutual_information(model, guide, X, progress=False).per_datum
    return simulation.draws, sbc(simulation, num_bins=5).uniform, rates, information


def test_each_rank_calibrates_in_full_and_to_the_same_numbers(tmp_path):
    first, second = on_ranks(calibrated, 2, tmp_path, None)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_errors_and_other_calls_are_told_on_all_ranks(tmp_path):
    for zero, own, seed, rows, model, by_itself in on_ranks(failing, 2, tmp_path):
        assert zero == "division by zero"
        assert own == "piece 0 failed"
        assert seed.startswith("expected the same settings on all 2 ranks")
        assert rows.startswith("expected the same number of rows on all 2 ranks, got [11, 10]")
        assert model.startswith("expected the same parameters on all 2 ranks")
        assert by_itself


def test_work_is_done_in_order_and_shares_differ_by_one_row_at_most():
    assert list(Ranks().in_turn(4, lambda i: i * i, 1)) == [1, 4, 9]
    shares = [Ranks(rank, 3).share(8) for rank in range(3)]
    assert [range(8)[share] for share in shares] == [range(0, 2), range(2, 5), range(5, 8)]
