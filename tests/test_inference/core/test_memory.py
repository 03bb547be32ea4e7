"""The memory limit: what it scales, that it is restored, and that results do not depend on it beyond their noise."""

import threading

import pytest
import torch

from guides import MeanField
from inference import decoder_jacobian, evidence, iter_log_weights, log_weights, memory_limit
from inference.comparison.local_problem import blocks_of_refits
from inference.core.memory import at_once, joined
from inference.numerics.newton import points_at_once
from inference.pair.call import Call
from inference.posterior.modes import scan
from zoo import LinearVAE

X = torch.zeros(3, 5)


def pair():
    torch.manual_seed(0)
    return LinearVAE(5, 2), MeanField(5, 2)


@pytest.mark.parametrize("each", [1, 7, 2**19, 2**30])
def test_the_default_limit_leaves_every_block_as_it_is_stated(each):
    for count in (64, 512, 1024, 2048, 2**13, 2**19, 2**24):
        assert at_once(count, each) == max(1, count // each)


def test_blocks_are_in_proportion_to_the_limit_and_then_restored():
    with memory_limit(16):
        assert at_once(2048) == 512
        with memory_limit(128):
            assert at_once(2048) == 4096
            assert at_once(2048, 3) == 4096 // 3
        assert at_once(2048) == 512
    assert at_once(2048) == 2048


def test_a_limit_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), memory_limit(1):
        _ = 1 / 0
    assert at_once(2048) == 2048


def test_without_a_block_the_limit_stays():
    limit = memory_limit(32)
    assert at_once(2048) == 1024
    with limit:
        assert at_once(2048) == 1024
    assert at_once(2048) == 2048


def test_a_limit_holds_in_its_own_thread_alone():
    found = []
    with memory_limit(1):
        thread = threading.Thread(target=lambda: found.append(at_once(2048)))
        thread.start()
        thread.join()
    assert found == [2048]


def test_weights_come_in_smaller_chunks_with_the_same_mean():
    model, guide = pair()
    whole = log_weights(model, guide, X, num_samples=4000)
    with memory_limit(0.01):  # 81 elements in a chunk on a CPU, of blocks of data points of 5 dimensions
        chunks = list(iter_log_weights(model, guide, X, num_samples=4000))
    assert all(5 <= len(chunk) <= 16 for chunk in chunks)
    assert sum(map(len, chunks)) == 4000
    difference = torch.cat(chunks).mean(0) - whole.mean(0)
    assert bool((difference.abs() < 4 * whole.std(0) * (2 / 4000) ** 0.5).all())


def test_an_explicit_chunk_goes_before_the_limit():
    model, guide = pair()
    with memory_limit(0.01):
        chunks = list(iter_log_weights(model, guide, X, num_samples=100, chunk=50))
    assert [len(chunk) for chunk in chunks] == [50, 50]


def test_deterministic_results_do_not_depend_on_the_limit():
    model, _ = pair()
    z = torch.randn(500, 2)
    jacobian, value = decoder_jacobian(model.decode, z), evidence(model, X, method="quadrature", progress=False).value
    with memory_limit(0.1):
        torch.testing.assert_close(decoder_jacobian(model.decode, z), jacobian)
        small = evidence(model, X, method="quadrature", progress=False).value
    torch.testing.assert_close(small, value)


@pytest.mark.parametrize("megabytes", [0, -1, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(megabytes):
    with pytest.raises(ValueError, match="expected a positive finite number of megabytes, got"):
        memory_limit(megabytes)


def test_blocks_are_joined_along_their_rows():
    x, y = torch.arange(22).view(11, 2), torch.arange(33.0).view(3, 11)
    cuts = [slice(0, 4), slice(4, 8), slice(8, 11)]
    both = joined(({"x": x[cut], "none": None, "y": y[0, cut]} for cut in cuts), 11)
    assert torch.equal(both["x"], x)
    assert torch.equal(both["y"], y[0])
    assert both["none"] is None
    assert torch.equal(joined((y[:, cut] for cut in cuts), 11, dim=1), y)
    assert joined([x], None) is x


@pytest.mark.parametrize("count", [0, 2])
def test_blocks_that_are_not_all_rows_are_refused(count):
    with pytest.raises(ValueError, match=rf"expected blocks of 11 rows, got {4 * count}"):
        joined([torch.zeros(4)] * count, 11)


def test_fewer_points_are_scanned_at_once_where_each_takes_more():
    sizes = []

    def density(rows, points):
        sizes.append(len(points))
        return -(points - 0.1 * rows.unsqueeze(-1)).square().sum(-1)

    found = []
    for width in (1, 784):
        sizes.clear()
        found.append(scan(density, 64, 2, 33, width=width, like=torch.zeros(()).double()))
        assert max(sizes) <= max(points_at_once(width), 33**2)
    assert points_at_once(784) < 33**2 < points_at_once(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_gap_takes_fewer_rows_at_once_where_each_has_more_columns():
    rows = {}
    for dim in (4, 512):
        call = Call(
            LinearVAE(dim, 2).double(), MeanField(dim, 2, hidden=(4,)).double(), (torch.zeros(64, dim).double(),)
        )
        rows[dim] = blocks_of_refits(call, 1024)[0].num_rows
    assert rows == {4: 32, 512: 8}
