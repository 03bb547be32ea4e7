"""Training whose layers compute in bfloat16, against the same training in float32."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from references import reference_marginal
from torch import nn
from torch.overrides import TorchFunctionMode

from guides import Flow, MeanField
from inference import IWELBO, AnalyticKLELBO, elbo, evidence, fit, fit_many, log_weights
from inference.training.mixed_precision import in_precision
from zoo import DeepGaussianVAE, LinearVAE, linear_gaussian

QUIET = {"seed": 0, "progress": False}


def pair(guide=MeanField):
    torch.manual_seed(0)
    return DeepGaussianVAE(6, 2, hidden=(16,)), guide(6, 2, hidden=(16,))


def rows(num=64):
    return linear_gaussian(num, 6, 2, seed=0).train[:num].float()


def parameters_of(halves):
    return [p for half in halves for p in half.parameters()]


class Watch(TorchFunctionMode):
    """Notes the dtypes that each linear layer's kernel is given."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            self.met.append({x.dtype for x in args if x is not None})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(6, 4), (5, 6)),
        (lambda: nn.Conv1d(3, 4, 3), (5, 3, 8)),
        (lambda: nn.Conv2d(3, 4, 3), (5, 3, 8, 8)),
        (lambda: nn.ConvTranspose2d(3, 4, 3), (5, 3, 8, 8)),
    ],
)
@torch.no_grad()
def test_a_layer_rounds_as_bfloat16_and_gives_float32(layer, shape):
    torch.manual_seed(0)
    layer, x = layer(), torch.randn(shape)
    expected = layer(x)
    with in_precision("bfloat16"):
        got = layer(x)
        inner = x @ x.mT  # no layer's
    assert got.dtype == torch.float32
    assert torch.equal(inner, x @ x.mT)
    difference = float((got - expected).abs().max() / expected.abs().max())
    assert 1e-4 < difference < 2e-2  # eight bits: a half of 2^-8 for each number, but not those of float32


def test_gradients_are_float32_and_close():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 1)), torch.randn(200, 6)
    found = []
    for precision in ("full", "bfloat16"):
        with in_precision(precision):
            found.append(torch.autograd.grad(net(x).square().mean(), list(net.parameters())))
    for one, other in zip(*found, strict=True):
        assert other.dtype == torch.float32
        assert 0 < float((one - other).norm()) < 0.03 * float(one.norm())


@pytest.mark.parametrize(
    ("guide", "objective"),
    [(MeanField, None), (MeanField, AnalyticKLELBO()), (MeanField, IWELBO(num_particles=3)), (Flow, None)],
    ids=["mean field, ELBO", "mean field, analytic", "mean field, IWELBO", "flow, ELBO"],
)
def test_training_ends_near_that_in_float32(guide, objective):
    optimizer, losses = lambda p: torch.optim.Adam(p, lr=1e-2), []
    for precision in ("full", "bfloat16"):
        halves = pair(guide)
        history = fit(
            *halves, rows(), steps=150, objective=objective, optimizer=optimizer, precision=precision, **QUIET
        )
        losses.append(torch.tensor(history.loss))
        assert all(p.dtype == torch.float32 for p in parameters_of(halves))
    assert not torch.equal(*losses)
    assert float(losses[0][:10].mean() - losses[0][-10:].mean()) > 1  # nats: it learns
    assert abs(float(losses[0][-10:].mean() - losses[1][-10:].mean())) < 0.1


def test_captured_steps_have_the_bits_of_python():
    found = []
    for capture in ("off", "graph"):
        halves = pair()
        history = fit(*halves, rows(), steps=100, batch_size=16, precision="bfloat16", capture=capture, **QUIET)
        found.append((history.loss, parameters_of(halves)))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_many_pairs_train_so_too():
    losses = [
        fit_many([pair(), pair()], rows(), steps=20, precision=precision, **QUIET).loss
        for precision in ("full", "bfloat16")
    ]
    assert losses[0] != losses[1]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.02, atol=0)


def test_only_training_is_affected():
    """Validation, and what is measured later, is the pair's own."""
    halves = pair()
    options = {"steps": 4, "validation": rows()[:10], "evaluate_every": 2, **QUIET}
    history = fit(*halves, rows(), precision="bfloat16", **options)
    by_hand = float(-elbo(log_weights(*halves, rows()[:10], num_samples=20_000, seed=1, progress=False)).value.mean())
    assert abs(history.validation[-1][1] - by_hand) < 1.0
    counts = []
    for validation in (None, rows()[:10]):
        with Watch() as watch:
            fit(*pair(), rows(), precision="bfloat16", capture="off", **{**options, "validation": validation})
        counts.append([watch.met.count({dtype}) for dtype in (torch.bfloat16, torch.float32)])
        assert len(watch.met) == sum(counts[-1])
    (trained, _), (trained_again, _) = counts
    assert trained == trained_again == 4 * 4  # two layers in each half
    assert counts[1][1] >= counts[0][1] + 2 * 4  # of two evaluations
    with Watch() as watch:
        log_weights(*halves, rows(), num_samples=3, progress=False)
    assert watch.met
    assert all(dtypes == {torch.float32} for dtypes in watch.met)


def test_the_evidence_of_what_was_trained_so_is_exact_in_float64():
    torch.manual_seed(0)
    model, guide = LinearVAE(6, 2), MeanField(6, 2, hidden=())
    fit(model, guide, rows(), steps=50, precision="bfloat16", **QUIET)
    model, x = model.double(), rows().double()
    found = evidence(model, x)
    assert found.value.dtype == torch.float64
    expected = reference_marginal(model).log_prob(x).detach()
    np.testing.assert_allclose(found.value, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("wrong", "said"), [("half", "'full' or 'bfloat16', got 'half'"), (16, "got 16"), (None, "got None")]
)
def test_an_unknown_precision_is_refused(wrong, said):
    with pytest.raises(ValueError, match=f"expected precision as .*{said}"):
        fit(*pair(), rows(), steps=1, precision=wrong, **QUIET)


def test_a_pair_in_float64_is_refused():
    model, guide = (half.double() for half in pair())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"expected parameters in float32 for precision='bfloat16', got torch.float64"):
        fit(model, guide, rows().double(), steps=1, precision="bfloat16", **QUIET)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_run_resumes_in_its_precision_alone(tmp_path):
    options = {"checkpoint": tmp_path / "run.safetensors", "batch_size": 16, **QUIET}
    halves, straight = pair(), pair()
    fit(*halves, rows(), steps=20, precision="bfloat16", **options)
    with pytest.raises(ValueError, match="precision"):
        fit(*pair(), rows(), steps=30, **options)
    fit(*halves, rows(), steps=30, precision="bfloat16", **options)
    fit(*straight, rows(), steps=30, precision="bfloat16", **{**options, "checkpoint": None})
    assert all(map(torch.equal, parameters_of(halves), parameters_of(straight)))


def test_functions_with_param_statements_train_so():
    net = nn.Linear(2, 6)

    def model(x):
        scale = pyro.param("scale", lambda: torch.ones(6), constraint=dist.constraints.positive)
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(len(x), 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    history = fit(
        model, guide, rows(), steps=60, optimizer=lambda p: torch.optim.Adam(p, 0.02), precision="bfloat16", **QUIET
    )
    assert sum(history.loss[-10:]) < sum(history.loss[:10])
