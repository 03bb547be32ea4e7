"""Every pair on tensors that claim to be on a GPU: nothing is made on the CPU on the way, and no number is read.

Fake tensors have shapes and devices, and no numbers. They show operations on tensors of two devices and what waits for
the device; scalars on the CPU, copies to it and the backward pass they do not show, and a GPU is not replaced.
"""

import pytest
import torch
from registry import OBJECTIVES, PAIRS, data_for, under
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from guides import MeanField
from inference import ELBO, fit
from inference.numerics import device_graphs
from inference.pair import call as calls
from inference.pair.call import Call
from zoo import DeepGaussianVAE

# Trace_ELBO reads numbers from tensors; AnnealedPrecision copies one to the device, which is not linked here.
OURS = [name for name in OBJECTIVES if name not in ("Trace_ELBO", "AnnealedPrecision")]


def claim_cuda(module):
    """Replace parameters and buffers by fake ones on a GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake


# What a build of torch without CUDA cannot run in this way, and why.
_LINKED = "an operation of it, of linear algebra or an index, is refused where CUDA is not linked"
_ABORTS = "a derivative within it asks for CUDA's guard and ends the process"
UNTESTED_GUIDES = {
    "Exact": _LINKED,
    "TiedMeanField": _LINKED,
    "FullRank": _LINKED,
    "Mixture": _LINKED,
    "Flow": _LINKED,
    "GaussNewtonDiagonal": _ABORTS,
    "GaussNewtonFull": _ABORTS,
    "SemiAmortised": _ABORTS,
}
UNTESTED_MODELS = {"VAE-categorical": _LINKED}
PAIRS_HERE = [(m, g) for m, g in PAIRS if m not in UNTESTED_MODELS and g not in UNTESTED_GUIDES]


@under(*OURS, pairs=PAIRS_HERE)
def test_a_loss_and_weights_stay_on_the_device(make_pair, objective, monkeypatch):
    model, guide = make_pair()
    pair, made = nn.ModuleList([objective.program(model), guide]).requires_grad_(False), objective()
    x = data_for(model)
    with torch.no_grad():
        made.differentiable_loss(*pair, x)  # also finds out how the pair runs on several samples, by comparing numbers
        known = Call(*pair, (x,)).manners(3)
        monkeypatch.setattr(calls, "manners_of", lambda *_: known)
        monkeypatch.setattr(calls, "remembered", lambda *_: None)
        torch._C._ensureCUDADeviceGuardSet()
        # A weight of an objective is a scalar on the CPU.
        with FakeTensorMode(allow_non_fake_inputs=True):
            claim_cuda(pair)
            fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
            loss = made.differentiable_loss(*pair, fake)
            weights = Call(*pair, (fake,)).run(3).log_weights
    assert loss.device.type == weights.device.type == "cuda"
    assert weights.shape == (3, len(x))


class OnTheCPU(DeepGaussianVAE):
    """Makes a tensor on the CPU on the way."""

    def likelihood(self, z):
        return super().likelihood(z + torch.ones(z.shape))


class Reading(DeepGaussianVAE):
    """Reads a number."""

    def likelihood(self, z):
        return super().likelihood(z * float(z.mean()))


# Builds for GPUs name the operator that reads a number; builds for CPUs miss CUDA on the way to it.
@pytest.mark.parametrize(
    ("model", "message"), [(OnTheCPU, r"same device|cuda"), (Reading, r"same device|cuda|_local_scalar_dense")]
)
def test_a_planted_mistake_is_seen(model, message):
    pair = nn.ModuleList([model(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))]).requires_grad_(False)
    torch._C._ensureCUDADeviceGuardSet()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        claim_cuda(pair)
        with pytest.raises(RuntimeError, match=message):
            ELBO().differentiable_loss(*pair, torch.empty(4, 5, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["graph", "compile"])
def test_captured_training_on_a_gpu_is_that_of_the_pair(level):
    histories = []
    for capture in ("off", level):
        torch.manual_seed(0)
        pair = DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))
        x = torch.randn(64, 5)
        options = {"batch_size": 16, "steps": 60, "seed": 0, "device": "cuda", "capture": capture, "progress": False}
        histories.append(torch.tensor(fit(*pair, x, **options).loss))
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["graph", "compile"])
def test_captured_steps_on_a_gpu_are_launched_at_once(level, monkeypatch):
    launched, captured = [], device_graphs.captured

    def counted(*args):
        launch, results = captured(*args)
        return lambda: (launched.append(1), launch())[1], results

    monkeypatch.setattr(device_graphs, "captured", counted)
    torch.manual_seed(0)
    pair, x = (DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))), torch.randn(64, 5)
    fit(*pair, x, batch_size=16, steps=60, seed=0, device="cuda", capture=level, progress=False)
    assert launched


@pytest.mark.gpu
def test_layers_in_bfloat16_train_on_a_gpu():
    losses = []
    for precision in ("full", "bfloat16"):
        torch.manual_seed(0)
        pair, x = (DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))), torch.randn(64, 5)
        options = {"batch_size": 16, "steps": 60, "seed": 0, "device": "cuda", "progress": False}
        losses.append(torch.tensor(fit(*pair, x, precision=precision, **options).loss))
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.1)
