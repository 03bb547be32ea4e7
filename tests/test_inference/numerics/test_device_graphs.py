"""Replays as CUDA graphs, where the graph is emulated on the CPU: fixed memory in, fixed memory out."""

import logging

import pytest
import torch

from guides import MeanField
from inference import ELBO, BetaELBO, GeometricAnnealing, fit
from inference.core.seeding import random_state
from inference.numerics import device_graphs
from inference.numerics.device_graphs import DeviceReplay
from zoo import DeepGaussianVAE


@pytest.fixture
def launches(monkeypatch):
    """An emulated device: a capture runs nothing for good, and a launch sees the values that its memory has then."""
    count = []

    def captured(replay, inputs):
        results = [torch.full_like(result, float("nan")) for result in replay([t.clone() for t in inputs])]

        def launch():
            count.append(1)
            for result, value in zip(results, replay(inputs), strict=True):
                result.copy_(value)

        return launch, results

    monkeypatch.setattr(device_graphs, "captured", captured)
    monkeypatch.setattr(device_graphs, "_on_one_gpu", lambda tensors: bool(tensors))
    return count


def moved(tensors):
    """Adds the second tensor and noise to the first, in place, and returns both it and the third."""
    first, second, third = tensors
    first += second + torch.randn(())
    return [2 * first, third + 1]


def test_inputs_are_copied_and_fixed_ones_changed_in_place(launches):
    replay, first = DeviceReplay(moved, 1), torch.zeros(3)
    kept = []
    with random_state(0):
        for i in range(4):
            second = torch.full((3,), float(i))
            kept.append([*replay([first, second, -second]), second])
    expected = torch.zeros(3)
    with random_state(0):
        for i, (one, other, second) in enumerate(kept):
            expected += i + torch.randn(())
            assert torch.equal(one, 2 * expected)  # results of earlier calls are as they were
            assert torch.equal(other, torch.full((3,), 1.0 - i))
            assert torch.equal(second, torch.full((3,), float(i)))  # the caller's memory is no graph's
    assert torch.equal(first, expected)
    assert len(launches) == 4


def test_other_fixed_memory_is_captured_anew(launches):
    replay = DeviceReplay(moved, 1)
    tensors = [torch.zeros(3), torch.zeros(3)]
    for first in (*tensors, *tensors):
        replay([first, torch.ones(3), torch.ones(3)])
    assert all(bool((first != 0).all()) for first in tensors)
    assert len(launches) == 4


def test_what_cannot_be_captured_is_replayed_kernel_by_kernel(launches, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(device_graphs, "captured", refuse)
    caplog.set_level(logging.INFO)
    replay, first = DeviceReplay(moved, 1), torch.zeros(3)
    with random_state(0):
        found = [replay([first, torch.ones(3), torch.ones(3)])[0] for _ in range(2)]
    with random_state(0):
        noise = torch.randn(()) + 1, torch.randn(()) + 1
    assert torch.equal(found[1], 2 * (0 + noise[0] + noise[1]).expand(3))
    assert [record.message for record in caplog.records] == [
        "kernels are launched one by one: operation not permitted when stream is capturing"
    ]
    assert not launches


def test_on_a_cpu_nothing_is_captured():
    assert not device_graphs._on_one_gpu([torch.zeros(2)])
    assert not device_graphs._on_one_gpu([])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("objective", [ELBO, lambda: BetaELBO(GeometricAnnealing(60, 0.1, 1.0))])
def test_training_on_graphs_of_the_device_has_the_bits_of_python(objective, fused, launches):
    """Batches of two forms, a schedule of the learning rate and one of the objective."""
    found = []
    for capture in ("off", "graph"):
        torch.manual_seed(0)
        pair = DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
        x = torch.randn(40, 5)
        history = fit(
            *pair,
            x,
            steps=90,
            batch_size=16,
            objective=objective(),
            optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, fused=fused),
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99),
            capture=capture,
            seed=0,
            progress=False,
        )
        found.append((history.loss, [p for half in pair for p in half.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert len(launches) > (20 if fused else 60)
