"""Callbacks see the run at the right moments, may stop it, and change no bit of it."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from guides import Linear
from inference import Callback, Logging, Snapshots, TensorBoard, fit
from zoo import LinearVAE, linear_gaussian

X = linear_gaussian(30, 5, 2).train
HOOKS = ("on_step", "on_evaluate", "on_checkpoint", "on_end")


class Witness(Callback):
    """Notes each call, draws random numbers, and stops at a chosen one."""

    def __init__(self, stop=None):
        self.calls, self.losses, self.stop = [], [], stop

    def _note(self, hook, moment):
        torch.randn(7)
        assert not moment.model.training
        self.calls.append((hook, moment.step))
        self.losses.append(moment.loss)
        return (hook, moment.step) == self.stop


for name in HOOKS:
    setattr(Witness, name, lambda self, moment, hook=name: self._note(hook, moment))


def run(*callbacks, steps=6, **options):
    torch.manual_seed(0)
    pair = LinearVAE(5, 2).double(), Linear(5, 2).double()
    return fit(*pair, X, steps=steps, seed=0, callbacks=callbacks, progress=False, **options), pair


def test_hooks_are_called_at_their_moments(tmp_path):
    witness = Witness()
    options = {"validation": X[:5], "evaluate_every": 3, "checkpoint": tmp_path / "run", "checkpoint_every": 4}
    history, _ = run(witness, **options)
    steps = {hook: [step for name, step in witness.calls if name == hook] for hook in HOOKS}
    assert steps == {"on_step": [1, 2, 3, 4, 5, 6], "on_evaluate": [3, 6], "on_checkpoint": [4, 6], "on_end": [6]}
    seen = [loss for (hook, _), loss in zip(witness.calls, witness.losses) if hook == "on_step"]
    assert seen == history.loss


def test_a_callback_changes_no_bit_of_the_run():
    with_witness, pair = run(Witness())
    without, other = run()
    assert with_witness.loss == without.loss
    assert all(torch.equal(a, b) for m, n in zip(pair, other) for a, b in zip(m.parameters(), n.parameters()))


@pytest.mark.parametrize(("stop", "steps"), [(("on_step", 2), 2), (("on_evaluate", 3), 3), (("on_checkpoint", 4), 4)])
def test_a_true_return_stops_the_run(stop, steps, tmp_path):
    witness = Witness(stop)
    options = {"validation": X[:5], "evaluate_every": 3, "checkpoint": tmp_path / "run", "checkpoint_every": 4}
    history, pair = run(witness, **options)
    assert (history.steps, history.stopped_early) == (steps, True)
    assert witness.calls[-1] == ("on_end", steps)
    assert not pair[0].training
    assert run(steps=steps)[0].loss == history.loss


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    run(Witness(("on_step", 3)), checkpoint=tmp_path / "run")
    resumed, pair = run(checkpoint=tmp_path / "run")
    whole, other = run()
    assert resumed.loss == whole.loss
    assert all(torch.equal(a, b) for m, n in zip(pair, other) for a, b in zip(m.parameters(), n.parameters()))


def test_an_error_of_a_callback_ends_the_run_with_its_history():
    class Broken(Callback):
        def on_step(self, moment):
            if moment.step == 4:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        run(Broken())
    assert caught.value.history.steps <= 4


def test_losses_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="inference.training.callbacks"):
        history, _ = run(Logging(2), validation=X[:5], evaluate_every=4)
    expected = [f"step {s}: loss {history.loss[s - 1]:.4f}" for s in (2, 4, 6)]
    expected += [f"step {s}: validation loss {loss:.4f}" for s, loss in history.validation]
    assert sorted(record.message for record in caplog.records) == sorted([*expected, "step 6: the end"])


def test_losses_are_written_for_tensorboard(monkeypatch, tmp_path):
    written, flushed = [], []
    writer = SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar), flush=lambda: flushed.append(True))
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: writer if folder == str(tmp_path) else None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    history, _ = run(TensorBoard(tmp_path, every=3), validation=X[:5], evaluate_every=6)
    assert [scalar for scalar in written if scalar[0] == "loss"] == [("loss", history.loss[s - 1], s) for s in (3, 6)]
    assert ("validation loss", history.validation[0][1], 6) in written
    assert flushed


def test_snapshots_are_the_pair_as_it_was():
    snapshots = Snapshots(2)
    run(snapshots)
    assert list(snapshots.pairs) == [2, 4, 6]
    for steps, copies in snapshots.pairs.items():
        _, pair = run(steps=steps)
        assert all(torch.equal(a, b) for m, n in zip(pair, copies) for a, b in zip(m.parameters(), n.parameters()))


@pytest.mark.parametrize("callbacks", [Logging(), [print], [Logging]])
def test_what_is_no_list_of_callbacks_is_refused(callbacks):
    with pytest.raises(TypeError, match="expected callbacks as a list of"):
        fit(LinearVAE(5, 2).double(), Linear(5, 2).double(), X, steps=1, callbacks=callbacks)
