"""An estimate's file: recognised by all that changes the numbers, whole after an interruption, and of linear cost."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import MeanField, WrappedEncoder
from inference import Adaptive, Annealed, Importance, evidence, frame, memory_limit
from inference.core.files import locked
from inference.core.storage import load_tree
from inference.marginal_likelihood.base import checkpoint
from zoo import DeepGaussianVAE, Laplace, LinearVAE, WrappedDecoder

X = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double()
NET, ENCODER = torch.nn.Linear(2, 5).double(), torch.nn.Linear(5, 2).double()
GUIDE = MeanField(5, 2, hidden=(8,)).double()
NORMAL = DeepGaussianVAE(5, 2, hidden=(8,)).double()


def noise(scale):
    return WrappedDecoder(NET, lambda m: dist.Normal(m, scale).to_event(1), data_dim=5, latent_dim=2)


def width(scale):
    return WrappedEncoder(ENCODER, lambda m: dist.Normal(m, scale).to_event(1))


def function(flag):
    """Two models of the same constants and names, one of which has another sign."""

    def plus(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(NET(z) + 1.0, 1.0).to_event(1), obs=x)

    def minus(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(NET(z) - 1.0, 1.0).to_event(1), obs=x)

    minus.__qualname__ = plus.__qualname__
    return minus if flag else plus


def with_prior(prior):
    model = DeepGaussianVAE(5, 2, hidden=(8,), prior=prior).double()
    model.load_state_dict(NORMAL.state_dict())
    return model


def attribute(size):
    model = noise(1.0)
    model.size = size
    return model


CHANGES = {
    "function's constant": ({"model": noise(1.0)}, {"model": noise(0.1)}),
    "what a function does": ({"model": function(False)}, {"model": function(True)}),
    "attribute": ({"model": attribute(1.0)}, {"model": attribute(2.0)}),
    "prior": ({"model": NORMAL}, {"model": with_prior(Laplace(2))}),
    "guide's constant": ({"guide": width(1.0)}, {"guide": width(2.0)}),
    "samples": ({"method": Importance(10)}, {"method": Importance(20)}),
    "level": ({"level": 0.9}, {"level": 0.8}),
    "block": ({"block": 5}, {"block": 6}),
    "seed": ({"seed": 1}, {"seed": 2}),
    "tolerance": ({"tolerance": 9.0}, {"tolerance": 8.0}),
    "data": ({"x": X}, {"x": X + 1}),
}
DEFAULTS = {"model": noise(1.0), "x": X, "guide": GUIDE, "method": Importance(10), "seed": 0, "progress": False}


@pytest.mark.parametrize(("first", "second"), CHANGES.values(), ids=CHANGES)
def test_an_estimate_that_differs_in_one_thing_is_refused(first, second, tmp_path):
    options = DEFAULTS | {"checkpoint": tmp_path / "evidence.safetensors"}
    value = evidence(**options | first).value
    assert torch.equal(evidence(**options | first).value, value)
    with pytest.raises(
        ValueError, match=r"expected a checkpoint of this estimate, but .*safetensors belongs to another"
    ):
        evidence(**options | second)


def test_a_memory_limit_that_orders_the_noise_otherwise_is_told(tmp_path):
    options = DEFAULTS | {"checkpoint": tmp_path / "evidence.safetensors"}
    evidence(**options)
    with memory_limit(1.0), pytest.raises(ValueError, match="memory_limit"):
        evidence(**options)


def test_a_model_that_counts_its_calls_is_the_same_model(tmp_path):
    class Counting(WrappedDecoder):
        def forward(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(*args, **kwargs)

    options = DEFAULTS | {"checkpoint": tmp_path / "evidence.safetensors"}
    options["model"] = Counting(NET, lambda m: dist.Normal(m, 1.0).to_event(1), data_dim=5, latent_dim=2)
    options["model"].calls = 0
    first = evidence(**options)
    before = options["model"].calls
    assert torch.equal(evidence(**options).value, first.value)
    assert options["model"].calls < 2 * before


def test_blocks_that_were_not_written_yet_are_written_in_the_end(tmp_path, monkeypatch):
    """However slow the disk is: the second block is held back, an interrupt writes it."""
    file, done = tmp_path / "evidence.safetensors", []
    monkeypatch.setattr(checkpoint, "_SHARE", 0.0)
    original = Importance.estimate

    def counted(self, problem):
        if len(done) == 3:
            assert load_tree(file)["done"]["columns"]["blocks"] == 1
            raise KeyboardInterrupt
        done.append(1)
        return original(self, problem)

    options = DEFAULTS | {"checkpoint": file, "block": 5}
    expected = evidence(**options | {"checkpoint": None}).value
    with monkeypatch.context() as patch:
        patch.setattr(Importance, "estimate", counted)
        with pytest.raises(KeyboardInterrupt):
            evidence(**options)
    assert load_tree(file)["done"]["columns"]["blocks"] == 3
    assert torch.equal(evidence(**options).value, expected)


def test_an_interrupt_while_the_last_blocks_are_written_loses_none(tmp_path, monkeypatch):
    file, save, saved = tmp_path / "evidence.safetensors", checkpoint.save_tree, []

    def interrupted(path, tree):
        saved.append(tree["done"])
        if len(saved) == 2:  # the first block is noted, the others in the end
            raise KeyboardInterrupt
        save(path, tree)

    monkeypatch.setattr(checkpoint, "_SHARE", 0.0)
    monkeypatch.setattr(checkpoint, "save_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evidence(**DEFAULTS | {"checkpoint": file, "block": 5})
    assert load_tree(file)["done"]["columns"]["blocks"] == 4


def test_an_estimate_on_a_file_of_another_run_at_work_is_refused(tmp_path):
    file = tmp_path / "evidence.safetensors"
    with locked(file), pytest.raises(ValueError, match=r"evidence\.safetensors for this run alone"):
        evidence(**DEFAULTS | {"checkpoint": file})


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Importance, "estimate", lambda *_: pytest.fail("it began"))
    with pytest.raises(OSError, match=r"cannot read or write .*file/evidence"):
        evidence(**DEFAULTS | {"checkpoint": tmp_path / "file" / "evidence.safetensors"})


RESULTS = {
    "importance": {"model": NORMAL, "method": Importance(10), "guide": GUIDE},
    "adaptive": {"model": NORMAL, "method": Adaptive(50)},
    "annealed": {"model": NORMAL, "method": Annealed(num_temperatures=5, num_chains=2)},
    "closed form": {"model": LinearVAE(5, 2).double(), "method": "exact"},
    "chosen": {"model": NORMAL, "method": "auto"},
}


@pytest.mark.parametrize("block", [8, 20])
@pytest.mark.parametrize("name", RESULTS)
def test_what_files_hold_is_the_result_without_them(name, block, tmp_path):
    """Written, and read back in the next call: every number and text of every row, of one dtype."""
    options = {"x": X, "block": block, "seed": 0, "progress": False} | RESULTS[name]
    expected = evidence(**options)
    file = tmp_path / "evidence.safetensors"
    for found in (evidence(**options, checkpoint=file) for _ in range(2)):
        for key, want in vars(expected).items():
            got = getattr(found, key)
            if isinstance(want, torch.Tensor):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            else:
                assert got == want or key == "seconds", key
        assert frame(found).equals(frame(expected))
        assert str(found) == str(expected)


def test_rows_that_do_not_fit_their_file_are_refused(tmp_path):
    options = DEFAULTS | {"checkpoint": tmp_path / "evidence.safetensors", "block": 8}
    value = evidence(**options).value.clone()
    rows = tmp_path / "evidence.safetensors.rows"
    content = rows.read_bytes()
    rows.write_bytes(content[:9] + b"0" + content[10:])
    with pytest.raises(ValueError, match=r"checkpoint of this estimate, but .*safetensors does not fit .*\.rows"):
        evidence(**options)
    rows.unlink()
    with pytest.raises(OSError, match=r"evidence\.safetensors"):
        evidence(**options)
    (tmp_path / "evidence.safetensors").unlink()
    assert torch.equal(evidence(**options).value, value)


def test_the_file_of_an_estimate_does_not_grow_with_its_rows(tmp_path):
    """What is replaced after a block holds no rows: those are written once, beside it."""
    sizes = []
    for number in (20, 200):
        file = tmp_path / f"{number}.safetensors"
        evidence(**DEFAULTS | {"x": X.repeat(number // 20, 1), "block": 4, "checkpoint": file})
        sizes.append(file.stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 100
