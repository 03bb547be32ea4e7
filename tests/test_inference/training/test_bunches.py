"""Bunches of captured steps: the losses, bits, events and errors of single ones."""

import copy
import logging
import shutil

import pytest
import torch
from captured_pairs import Late, same
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR

from guides import MeanField
from inference import BetaELBO, Callback, LinearAnnealing, Logging, Snapshots, fit, fit_many
from inference.training.bunches import BUNCH
from inference.training.capturing import Capture
from inference.training.recorded_adam import PlainAdam, adam_obstacle
from zoo import DeepGaussianVAE

QUIET = {"progress": False}
LOGGER = "inference.training.capturing"


def fused(parameters):
    return Adam(parameters, lr=0.01, fused=True)


def small():
    torch.manual_seed(0)
    return DeepGaussianVAE(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))


def rows(num=30):
    return torch.randn(num, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sizes(monkeypatch):
    """The number of steps of each replay of a bunch."""
    seen, run = [], Capture.bunch

    def noted(self, batches):
        losses = run(self, batches)
        seen.append(0 if losses is None else len(losses))
        return losses

    monkeypatch.setattr(Capture, "bunch", noted)
    return seen


def both(level="graph", *, make=small, data=None, **options):
    """A pair trained by its own Python, and a copy of it by captured steps, with both histories."""
    options = {"steps": 40, "seed": 3, "optimizer": fused} | options | QUIET
    results = []
    for way in ("off", level):
        pair = make()
        own = {name: value() if name in ("objective", "callbacks") else value for name, value in options.items()}
        results.append((fit(*pair, rows() if data is None else data, capture=way, **own), pair))
    return results


def grouped(parameters):
    some, rest = parameters[:3], parameters[3:]
    return Adam([{"params": some, "lr": 0.1, "betas": (0.5, 0.9)}, {"params": rest}], lr=0.01, fused=True)


OPTIONS = {
    "batches": {"batch_size": 7, "steps": 60},
    "decay": {"optimizer": lambda p: Adam(p, lr=0.01, weight_decay=0.1, fused=True)},
    "AdamW": {"optimizer": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True)},
    "groups": {"optimizer": grouped, "batch_size": 6},
    "learning-rate schedule": {"scheduler": lambda o: ExponentialLR(o, 0.9)},
    "schedule of beta": {"objective": lambda: BetaELBO(LinearAnnealing(20))},
    "validation": {"validation": rows(12), "evaluate_every": 7, "patience": 3, "batch_size": 5},
    "float64": {"make": lambda: tuple(half.double() for half in small()), "data": rows().double()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bunches_have_the_bits_of_single_steps(options, sizes):
    (eager, pair), (captured, other) = both(**options)
    assert captured.loss == eager.loss
    assert captured.validation == eager.validation
    assert same(pair, other)
    assert sizes
    assert set(sizes) == {BUNCH}


def test_callbacks_see_the_steps_that_they_ask_for(sizes):
    class Messages(logging.Handler):
        def __init__(self):
            super().__init__()
            self.texts = []

        def emit(self, record):
            self.texts.append(record.getMessage())

    kept, texts = [], []

    def callbacks():
        logger, messages = logging.Logger("own"), Messages()
        logger.addHandler(messages)
        kept.append(Snapshots(6))
        texts.append(messages.texts)
        return [kept[-1], Logging(10, logger=logger)]

    both(callbacks=callbacks, steps=33)
    assert texts[0] == texts[1]
    assert list(kept[0].pairs) == list(kept[1].pairs) == [6, 12, 18, 24, 30]
    assert all(map(same, kept[0].pairs.values(), kept[1].pairs.values()))
    assert BUNCH in sizes


class Interrupting(Callback):
    def on_checkpoint(self, moment):
        if moment.step >= 50:
            raise KeyboardInterrupt


def test_a_run_in_bunches_resumes_to_the_same_bits(tmp_path, sizes):
    options = {"steps": 93, "seed": 3, "optimizer": fused, "batch_size": 7, "capture": "graph", **QUIET}
    straight, stopped, resumed = small(), small(), small()
    expected = fit(*straight, rows(), **options | {"capture": "off"})
    files = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 25}
    with pytest.raises(KeyboardInterrupt) as error:
        fit(*stopped, rows(), callbacks=[Interrupting()], **options, **files)
    assert error.value.history.loss == expected.loss[:50]
    assert fit(*resumed, rows(), **options, **files).loss == expected.loss
    assert same(straight, resumed)
    assert BUNCH in sizes


def test_pairs_trained_together_go_in_bunches(sizes):
    start, trained = [small() for _ in range(3)], []
    for level in ("off", "graph"):
        pairs = copy.deepcopy(start)
        options = {"steps": 20, "seed": 0, "batch_size": 8, "capture": level, **QUIET}
        trained.append((fit_many(pairs, rows(32), **options).loss, pairs))
    assert trained[0][0] == trained[1][0]
    assert all(map(same, trained[0][1], trained[1][1]))
    assert BUNCH in sizes


def test_a_hidden_change_is_found_in_bunches_and_undone(caplog):
    # A step, its capture, and the four own steps to which the first bunch is compared come before the first check.
    pair = Late(6), MeanField(5, 2, hidden=(8,))
    caplog.set_level(logging.INFO, LOGGER)
    with pytest.warns(UserWarning, match="another on the same noise; steps 0 to 53 are taken again"):
        history = fit(*pair, rows(), capture="graph", steps=70, seed=3, optimizer=fused, **QUIET)
    assert history.steps == 70
    assert "the pair's own Python" in caplog.messages[-1]


class Branching(DeepGaussianVAE):
    """Takes another way on data of a large mean."""

    def likelihood(self, z):
        return super().likelihood(z if z.mean() > 0 else -2 * z)


def test_a_branch_within_a_bunch_keeps_the_bits():
    def make():
        torch.manual_seed(0)
        return Branching(5, 2, hidden=(8,)), MeanField(5, 2, hidden=(8,))

    with pytest.warns(UserWarning, match="depends on values; steps"):
        (eager, pair), (captured, other) = both(make=make, steps=120, batch_size=30)
    assert captured.loss == eager.loss
    assert same(pair, other)


def broken(parameters):
    return Adam(parameters, lr=1e20, fused=True)


def test_a_loss_in_a_bunch_that_is_not_finite_is_the_same_error():
    errors = []
    for level in ("off", "graph"):
        pair = small()
        with pytest.raises(FloatingPointError, match="at step") as error:
            fit(*pair, 1e10 * rows(), steps=60, seed=0, capture=level, optimizer=broken, **QUIET)
        errors.append((str(error.value), error.value.history.loss, pair))
    assert errors[0][:2] == errors[1][:2]
    assert same(errors[0][2], errors[1][2])


OBSTACLES = {
    "SGD": (lambda p: SGD(p, lr=0.01), None, "not Adam"),
    "amsgrad": (lambda p: Adam(p, amsgrad=True, fused=True), None, "amsgrad"),
    "not fused": (Adam, None, "not fused"),
    "a rate that is a tensor": (lambda p: Adam(p, lr=torch.tensor(0.1), fused=True), None, "a tensor"),
    "momentum that moves": (fused, lambda o: OneCycleLR(o, 0.1, total_steps=50), "OneCycleLR"),
}


@pytest.mark.parametrize(("optimizer", "scheduler", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_no_bunch_can_hold_is_taken_singly(optimizer, scheduler, reason, sizes):
    made = optimizer([nn.Parameter(torch.ones(2))])
    assert reason in adam_obstacle(made, None if scheduler is None else scheduler(made), exactly=True)
    (eager, pair), (captured, other) = both(optimizer=optimizer, scheduler=scheduler)
    assert captured.loss == eager.loss
    assert same(pair, other)
    assert not sizes


def test_hooks_of_the_optimiser_are_obstacles():
    optimizer = fused([nn.Parameter(torch.ones(2))])
    LambdaLR(optimizer, lambda _: 1.0)  # wraps the step
    assert not adam_obstacle(optimizer, None, exactly=True)
    optimizer.register_step_post_hook(lambda *_: None)
    assert "hooks" in adam_obstacle(optimizer, None, exactly=True)


def decayed(kind):
    return lambda p: kind([{"params": p[:1], "weight_decay": 0.1, "lr": 0.02}, {"params": p[1:]}], lr=0.01)


@pytest.mark.parametrize("make", [decayed(Adam), decayed(AdamW), lambda p: Adam(p, betas=(0.5, 0.9), eps=1e-3)])
def test_the_formula_of_adam_is_that_of_torch(make):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, dtype=torch.float64, generator=generator) for n in (3, 2)]
    gradients = torch.randn(9, 5, dtype=torch.float64, generator=generator)
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    own, reference = make(ours), make(theirs)
    for i, row in enumerate(gradients):
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, row.split([3, 2]), strict=True):
                parameter.grad = gradient.clone()
        reference.step()
        if i == 0:  # the moments of the first step are made by torch
            own.step()
            continue
        adam = PlainAdam(own, ours)
        with torch.no_grad():
            adam.update([p.grad for p in ours], adam.rates([[g["lr"] for g in own.param_groups]])[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.state_dict()["state"], reference.state_dict()["state"], rtol=1e-12, atol=1e-12)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_compiled_bunches_agree_within_rounding(sizes):
    options = {"steps": 61, "batch_size": 7, "objective": lambda: BetaELBO(LinearAnnealing(20))}
    options |= {"scheduler": lambda o: ExponentialLR(o, 0.97), "optimizer": lambda p: Adam(p, lr=0.01)}
    options |= {"validation": rows(12), "evaluate_every": 15, "callbacks": lambda: [Snapshots(10)]}
    (eager, pair), (compiled, other) = both("compile", **options)
    assert BUNCH in sizes
    assert compiled.steps == 61
    torch.testing.assert_close(torch.tensor(compiled.loss), torch.tensor(eager.loss), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(compiled.validation), torch.tensor(eager.validation), rtol=1e-4, atol=1e-4)
    for one, two in zip(pair, other, strict=True):
        torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_loss_that_is_not_finite_is_an_error_at_its_step(sizes):
    steps = []
    for level in ("off", "compile"):
        with pytest.raises(FloatingPointError, match="at step") as error:
            fit(*small(), 1e10 * rows(), steps=60, seed=0, capture=level, optimizer=broken, **QUIET)
        steps.append(str(error.value).split(":")[0])
    assert steps[0] == steps[1]
    assert BUNCH in sizes


@pytest.mark.slow
@needs_compiler
def test_a_hidden_change_is_found_in_compiled_bunches():
    pair = Late(6), MeanField(5, 2, hidden=(8,))
    with pytest.warns(UserWarning, match="another on the same noise; steps 0 to 53 are taken again"):
        fit(*pair, rows(), capture="compile", steps=70, seed=3, optimizer=fused, **QUIET)
