"""Recorded graphs: a graph whose constant parts are computed once gives the bits of the function itself."""

import numpy as np
import pytest
import torch

from inference.numerics.graphs import flat_graph, folded, scripted

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def operations(flat):
    return [node.target for node in flat.graph.nodes if node.op == "call_function"]


def all_replayed(flat, inputs=()):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scripted(flat)(inputs)


def replayed(flat, inputs=()):
    return all_replayed(flat, inputs)[0]


def test_what_depends_on_neither_inputs_nor_noise_is_computed_once():
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))

    def function():
        mean, scale = (X @ weight.t()).exp(), weight.square().sum(0).sqrt()
        return [mean + scale * torch.randn(5, 3)]

    flat = flat_graph(function, [])
    small = folded(flat)
    aten = torch.ops.aten
    assert operations(small) == [aten.randn.default, aten.mul.Tensor, aten.add.Tensor]
    assert torch.equal(replayed(small), replayed(flat))


def test_operations_without_effect_are_left_out():
    one, zero, zeros = torch.ones(()), torch.zeros(()), torch.zeros(3)

    def function():
        z = torch.randn(5, 3)
        z = torch.addcmul(zeros, z, one) * one / one + zero - 0.0
        return [(1.0 * z).exp()]

    flat = flat_graph(function, [])
    small = folded(flat)
    assert operations(small) == [torch.ops.aten.randn.default, torch.ops.aten.exp.default]
    assert torch.equal(replayed(small), replayed(flat))


def test_operations_that_have_an_effect_stay():
    ones, zeros = torch.ones(2, 5, 3), torch.zeros(3)

    def function():
        z = torch.randn(5, 3)
        wide = z * ones  # of another shape
        precise = z + zeros.double()  # and another dtype
        return [wide.sum(0) + precise + torch.addcmul(zeros, z, X) + torch.sub(zeros, z) + 1.0 / z]

    flat = flat_graph(function, [])
    small = folded(flat)
    assert torch.equal(replayed(small), replayed(flat))
    targets = operations(small)
    for target, number in ((torch.ops.aten.mul.Tensor, 1), (torch.ops.aten.addcmul.default, 1)):
        assert targets.count(target) == number
    assert targets.count(torch.ops.aten.sub.Tensor) == 1


NUMBERS = [2, 1.1, -0.0, 0.0, float("inf"), 1e-50, 2**53 + 1]


def with_numbers(x):
    """Operations of a tensor and a number."""
    results = [f(x, n) for n in NUMBERS for f in (torch.add, torch.sub, torch.mul, torch.div, torch.rsub)]
    return [*results, torch.add(x, 2, alpha=3), torch.sub(x.double(), 2, alpha=0.3), x[0, 0] * 0.1, x.float() + 1.5j]


def bits(tensor):
    return tensor.nan_to_num(7.0).reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_numbers_beside_tensors_give_the_bits_of_the_operation(dtype):
    x = (4 * X).to(dtype)
    x[0] = 0
    for got, expected in zip(scripted(flat_graph(lambda: with_numbers(x), [x]))([x]), with_numbers(x), strict=True):
        assert got.dtype == expected.dtype
        assert got.isnan().equal(expected.isnan())
        assert torch.equal(bits(got), bits(expected))


def test_the_transpose_of_a_transpose_is_the_tensor_itself():
    def function():
        z = torch.randn(5, 3)
        return [z.t().t().exp(), (z @ X.t()).t().t().t(), X.t().t()]

    flat = flat_graph(function, [X])
    small = folded(flat)
    assert operations(flat).count(torch.ops.aten.t.default) == 8
    assert operations(small).count(torch.ops.aten.t.default) == 2
    assert all(map(torch.equal, all_replayed(small, [X]), all_replayed(flat, [X])))


def test_what_is_computed_twice_is_computed_once_but_noise_is_not():
    def function():
        z, other = torch.randn(5, 3), torch.randn(5, 3)
        return [z.exp() + other.exp() + z.exp().sum(-1, keepdim=True)]

    flat = flat_graph(function, [])
    small = folded(flat)
    assert operations(small).count(torch.ops.aten.exp.default) == 2
    assert operations(small).count(torch.ops.aten.randn.default) == 2
    assert torch.equal(replayed(small), replayed(flat))


def test_results_have_memory_of_their_own():
    x = X.clone()

    def function():
        return [torch.ones_like(x).t(), (x * 1.0)[0], x.exp(), x.exp()]

    replay = scripted(folded(flat_graph(function, [x])))
    for _ in range(2):
        results = replay([X])
        for result, expected in zip(results, [torch.ones(3, 5), X[0], X.exp(), X.exp()], strict=True):
            assert torch.equal(result, expected)
        for result in results:
            result.zero_()


def test_constants_may_change_where_that_is_said():
    weight = torch.ones(3)
    flat = flat_graph(lambda: [X * weight * 1.0 + torch.zeros_like(X)], [])
    small = folded(flat, constants=False)
    assert operations(small) == [torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor]
    replay = scripted(small)
    weight.fill_(3.0)
    assert torch.equal(replay([])[0], 3 * X)


def test_inputs_vary_and_results_are_no_constants():
    x = X.clone()
    small = folded(flat_graph(lambda: [x.exp() * 2, X * 1.0], [x]))
    assert torch.equal(scripted(small)([2 * X])[0], (2 * X).exp() * 2)
    assert scripted(small)([X])[1] is not X


def test_a_graph_that_changes_tensors_in_place_stays_as_it_is():
    total = torch.zeros(3)

    def function():
        view = total[:2]
        view.add_(1.0)
        return [total * torch.randn(3)]

    flat = flat_graph(function, [])
    assert folded(flat) is flat


READINGS = {
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "an array by NumPy": lambda x: np.asarray(x),
    "an array that shares memory": lambda x: np.from_dlpack(x),
    "a text": str,
    "a list of the same memory": lambda x: x.data.tolist(),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_numbers_that_go_to_python_are_refused(read):
    with pytest.raises(RuntimeError, match="reads numbers from tensors"):
        flat_graph(lambda: (read(2 * X), X)[1:], [X])


def test_numbers_that_went_to_python_behind_an_except_are_refused():
    def swallowing():
        try:
            return [X * max(X.tolist())]
        except RuntimeError:
            return [X]

    with pytest.raises(RuntimeError, match="reads numbers from tensors, by tolist"):
        flat_graph(swallowing, [X])


def test_numbers_that_are_the_same_at_each_replay_may_go_to_python():
    places = torch.tensor([2, 0])
    flat = flat_graph(lambda: [X[:, places.tolist()]], [X])
    assert torch.equal(replayed(flat, [X]), X[:, [2, 0]])
