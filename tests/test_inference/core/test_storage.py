"""Files: pairs come back as they were, nothing is half-written, nothing is unpickled."""

import json
import zipfile

import pyro.distributions as dist
import pytest
import torch
from registry import data_for, for_pairs_with, for_rebuilt_pairs
from safetensors.torch import save_file

from guides import Exact, Linear, MeanField, WrappedEncoder
from inference import Module, fit, load_pair, save_pair
from inference.core.files import atomic_path
from inference.core.protocols import SupportsLogEvidence
from inference.core.storage import load_tree, save_tree
from zoo import IMAVAE, PPCA, DeepGaussianVAE, Laplace, LinearVAE, digits


def test_a_tree_of_tensors_and_values_comes_back_as_it_was(tmp_path):
    tree = {
        "a": torch.arange(3),
        7: [1, 2.5, None, True, "text", (1, (torch.ones(2, 2).double(), -0.0))],
        "shared": {"x": torch.zeros(2), "empty": torch.zeros(0), "scalar": torch.tensor(1.5)},
        "extremes": [1e-300, float("inf"), 2**70],
    }
    save_tree(tmp_path / "tree.safetensors", tree)
    back = load_tree(tmp_path / "tree.safetensors")
    assert list(back) == list(tree)
    assert torch.equal(back["a"], tree["a"])
    assert back[7][:5] == tree[7][:5]
    assert isinstance(back[7][5], tuple)
    assert torch.equal(back[7][5][1][0], tree[7][5][1][0])
    assert back["extremes"] == tree["extremes"]
    assert all(
        torch.equal(back["shared"][k], v) and back["shared"][k].dtype == v.dtype for k, v in tree["shared"].items()
    )


def test_what_is_neither_tensor_nor_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected tensors and JSON values to save, got function"):
        save_tree(tmp_path / "tree.safetensors", {"f": lambda: 0})
    assert list(tmp_path.iterdir()) == []


def test_an_exception_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("new, but only ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def saved_and_loaded(pair, path):
    """Data in whose units a pair was trained, and the pair as it comes back from its file."""
    model, guide = pair
    x = data_for(model)
    for half in pair:
        if hasattr(half, "standardise_by"):
            half.standardise_by(x)
    fit(model, guide, x, steps=3, seed=0, progress=False)
    save_pair(path, model, guide)
    return x, *load_pair(path)


@for_rebuilt_pairs
def test_a_pair_is_rebuilt_from_its_file_alone(pair, tmp_path):
    model, guide = pair
    x, new_model, new_guide = saved_and_loaded(pair, tmp_path / "pair.safetensors")
    assert type(new_model) is type(model)
    assert type(new_guide) is type(guide)
    assert new_model.store_name != model.store_name
    for new, old in ((new_model, model), (new_guide, guide)):
        assert list(new.state_dict()) == list(old.state_dict())
        assert all(torch.equal(new.state_dict()[k], v) for k, v in old.state_dict().items())
    z = torch.randn(20, model.latent_dim).double()
    assert torch.equal(new_model.prior().log_prob(z), model.prior().log_prob(z))
    assert torch.equal(new_model.likelihood(z).log_prob(x), model.likelihood(z).log_prob(x))
    z = guide.posterior(x).sample()
    assert torch.equal(new_guide.posterior(x).log_prob(z), guide.posterior(x).log_prob(z))


@for_pairs_with(SupportsLogEvidence)
def test_a_rebuilt_model_has_the_evidence_of_the_saved_one(pair, tmp_path):
    x, new_model, _ = saved_and_loaded(pair, tmp_path / "pair.safetensors")
    assert torch.equal(new_model.log_evidence(x), pair[0].log_evidence(x))


def test_a_guide_of_the_model_is_rebuilt_around_the_rebuilt_model(tmp_path):
    model = PPCA(5, 2)
    save_pair(tmp_path / "pair.safetensors", model, Exact(model))
    new_model, new_guide = load_pair(tmp_path / "pair.safetensors")
    assert new_guide.model is new_model


def test_fixed_sigma_stays_fixed(tmp_path):
    model = LinearVAE(5, 2, sigma=0.3, learn_sigma=False)
    save_pair(tmp_path / "pair.safetensors", model, Linear(5, 2))
    loaded, _ = load_pair(tmp_path / "pair.safetensors")
    assert not loaded.log_sigma.requires_grad
    assert loaded.sigma.item() == pytest.approx(0.3)


def wrapped(seed):
    torch.manual_seed(seed)
    return WrappedEncoder(torch.nn.Linear(5, 2), lambda mean: dist.Normal(mean, 1.0).to_event(1))


def test_a_half_that_cannot_be_rebuilt_is_loaded_into_an_instance(tmp_path):
    guide, x = wrapped(0), torch.randn(4, 5)
    save_pair(tmp_path / "pair.safetensors", PPCA(5, 2), guide)
    with pytest.raises(ValueError, match="WrappedEncoder cannot be rebuilt from the file alone"):
        load_pair(tmp_path / "pair.safetensors")
    _, loaded = load_pair(tmp_path / "pair.safetensors", guide=wrapped(1))
    assert torch.equal(loaded.posterior(x).mean, guide.posterior(x).mean)


def test_another_class_or_other_shapes_are_refused(tmp_path):
    path = tmp_path / "pair.safetensors"
    save_pair(path, PPCA(5, 2), Linear(5, 2))
    with pytest.raises(
        ValueError, match=r"expected an instance of guides\.linear\.Linear to load into, got .*MeanField"
    ):
        load_pair(path, guide=MeanField(5, 2))
    with pytest.raises(ValueError, match="the saved weights do not fit this"):
        load_pair(path, model=PPCA(6, 2))


def test_a_class_that_is_not_imported_is_named(tmp_path):
    path = tmp_path / "pair.safetensors"

    class Passing(Module):
        def config(self):
            return {}

    save_pair(path, Passing(), Passing())
    text = json.dumps(load_tree(path)["model"]["class"])
    assert "Passing" in text
    tree = load_tree(path)
    tree["model"]["class"] = "os.system"
    save_tree(path, tree)
    with pytest.raises(ValueError, match=r"the file holds a os\.system: import its module before loading"):
        load_pair(path)


def test_what_is_no_module_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"expected the model to be an nn\.Module, got function"):
        save_pair(tmp_path / "pair.safetensors", lambda x: x, Linear(5, 2))


def missing(_):
    return FileNotFoundError, "expected a file written by save_pair at .*, found no file"


def garbage(path):
    path.write_bytes(b"\x00" * 100)
    return ValueError, "is damaged or no safetensors file"


def truncated(path):
    save_pair(path, PPCA(5, 2), Linear(5, 2))
    path.write_bytes(path.read_bytes()[:-10])
    return ValueError, "is damaged or no safetensors file"


def pickled(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"cos\nsystem\n(S'exit 1'\ntR.")
    return ValueError, "is damaged or no safetensors file"


def older(path):
    save_file({"0": torch.zeros(2)}, path, metadata={"tree": '{"__tensor__": "0"}'})
    return ValueError, r"pair\.safetensors was written by an older version, before 0\.2\.0, without a digest"


def deep(path):
    tree = []
    for _ in range(400):
        tree = [tree]
    save_tree(path, tree)
    path.write_bytes(path.read_bytes().replace(b"[" * 100, b"(" * 100))
    return ValueError, r"pair\.safetensors is damaged: its content is not that of its digest"


def folder(path):
    path.mkdir()
    return IsADirectoryError, "expected a file written by save_pair at .*, found a folder"


def foreign(path):
    save_file({"w": torch.zeros(2)}, path)
    return ValueError, "was not written by this library"


def other_tree(path):
    save_tree(path, {"model": 1})
    return ValueError, "expected a file written by save_pair"


@pytest.mark.parametrize("make", [missing, garbage, truncated, pickled, older, deep, folder, foreign, other_tree])
def test_a_bad_file_is_one_clear_sentence(make, tmp_path):
    path = tmp_path / "pair.safetensors"
    error, message = make(path)
    with pytest.raises(error, match=message):
        load_pair(path)


def test_every_changed_byte_of_a_file_is_noticed(tmp_path):
    path = tmp_path / "pair.safetensors"
    save_pair(path, PPCA(5, 2), Linear(5, 2))
    sound = path.read_bytes()
    begin = 8 + int.from_bytes(sound[:8], "little")
    for place in [*range(0, begin, 41), *range(begin, len(sound), 97)]:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 85]) + sound[place + 1 :])
        with pytest.raises(ValueError, match=r"pair\.safetensors"):
            load_pair(path)


def test_loaded_tensors_are_copies_of_the_file(tmp_path):
    path = tmp_path / "tree.safetensors"
    save_tree(path, {"a": torch.ones(10_000)})
    loaded = load_tree(path)["a"]
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.truncate(10)
    assert loaded.eq(1).all()


def test_a_configuration_far_larger_than_the_weights_is_not_built(tmp_path):
    path = tmp_path / "pair.safetensors"
    save_pair(path, PPCA(5, 2), MeanField(5, 2, hidden=(4,)))
    for hidden in ([10**5, 10**5], [1] * 300_000):
        tree = load_tree(path)
        tree["guide"]["config"]["hidden"] = hidden
        save_tree(path, tree)
        with pytest.raises(ValueError, match="its configuration builds a module far larger than its weights"):
            load_pair(path)


OTHER_INSTANCES = {
    "precision": (
        lambda: IMAVAE(5, 2, gamma2=25.0, hidden=(8,)),
        lambda: IMAVAE(5, 2, gamma2=1e4, hidden=(8,)),
        "gamma2",
    ),
    "prior": (
        lambda: DeepGaussianVAE(5, 2, hidden=(8,)),
        lambda: DeepGaussianVAE(5, 2, hidden=(8,), prior=Laplace(2)),
        r"prior_module\.class: expected .*StandardNormal",
    ),
    "activation": (
        lambda: WrappedEncoder(torch.nn.Sequential(torch.nn.Linear(5, 2), torch.nn.ReLU()), fixed(1.0)),
        lambda: WrappedEncoder(torch.nn.Sequential(torch.nn.Linear(5, 2), torch.nn.Tanh()), fixed(1.0)),
        "ReLU",
    ),
    "constant of a function": (
        lambda: WrappedEncoder(torch.nn.Linear(5, 2), fixed(1.0)),
        lambda: WrappedEncoder(torch.nn.Linear(5, 2), fixed(2.0)),
        r"closure\.sigma: expected 1\.0, got 2\.0",
    ),
}


def fixed(sigma):
    return lambda mean: dist.Normal(mean, sigma).to_event(1)


@pytest.mark.parametrize(("make", "other", "message"), OTHER_INSTANCES.values(), ids=OTHER_INSTANCES)
def test_an_instance_of_another_configuration_is_refused(make, other, message, tmp_path):
    path, half = tmp_path / "pair.safetensors", make()
    save_pair(path, half, half)
    loaded, _ = load_pair(path, make(), make())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), half.parameters(), strict=True))
    with pytest.raises(ValueError, match=rf"pair\.safetensors holds another .*{message}"):
        load_pair(path, other(), make())


def test_the_digits_pair_survives_the_file_in_original_units(tmp_path):
    x = digits(test_size=0).train
    model = PPCA.from_data(x, 8)
    save_pair(tmp_path / "pair.safetensors", model, Exact(model))
    loaded, _ = load_pair(tmp_path / "pair.safetensors")
    assert loaded.log_evidence(x).mean().item() == pytest.approx(-163.23588991, abs=1e-8)
