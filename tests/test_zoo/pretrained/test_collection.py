"""Trained pairs in a folder, those that come with the zoo among them."""

import math

import pytest
import torch
from pyro.infer.autoguide import AutoGuide

import zoo
from guides import MeanField
from inference import evidence, log_weights
from inference.weights.pareto_smoothing import tail_length
from zoo import LinearVAE, card
from zoo.classics import ClassicModel
from zoo.pretrained import load, pairs, save

FAST = {"rows": 4, "split": 1, "num_samples": 20, "simulated": 0, "check": None, "progress": False}


def own_pair(tmp_path, name="mine/random"):
    torch.manual_seed(0)
    model, guide = LinearVAE(4, 2), MeanField(4, 2, hidden=(8,))
    found = card(model, guide, torch.randn(4, 4), name=name, **FAST)
    save(tmp_path / "pairs", model, guide, found)
    return model, guide, found


def test_an_own_pair_joins_a_folder_and_comes_back(tmp_path):
    model, guide, found = own_pair(tmp_path)
    assert pairs(tmp_path / "pairs") == ["mine/random"]
    again = load("mine/random", tmp_path / "pairs")
    assert again.card == found
    x = torch.randn(3, 4)
    options = {"num_samples": 5, "seed": 1}
    assert torch.equal(log_weights(*again[:2], x, **options), log_weights(model, guide, x, **options))
    assert not again.model.training
    assert not again.guide.training


def test_a_pair_of_the_same_name_is_replaced(tmp_path):
    own_pair(tmp_path)
    _, _, found = own_pair(tmp_path)
    assert load("mine/random", tmp_path / "pairs").card == found
    assert [path.name for path in sorted((tmp_path / "pairs/mine/random").iterdir())] == [
        "card.json",
        "pair.safetensors",
    ]


@pytest.mark.parametrize("name", ["../out", "/etc/pair", "a//b", "", "a b", "a/.."])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected a pair's name"):
        load(name, tmp_path)


def test_unknown_names_list_the_known_ones(tmp_path):
    own_pair(tmp_path)
    with pytest.raises(ValueError, match="expected one of the pairs mine/random, got 'other'"):
        load("other", tmp_path / "pairs")


def test_a_damaged_card_is_named(tmp_path):
    own_pair(tmp_path)
    path = tmp_path / "pairs/mine/random/card.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"card\.json: expected a card as JSON"):
        load("mine/random", tmp_path / "pairs")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of trained pairs"):
        pairs(tmp_path / "nowhere")


def test_data_are_still_loaded_under_the_old_name():
    with pytest.warns(DeprecationWarning, match="load_data"):
        data = zoo.load(torch.eye(3))
    assert data.train.shape == (3, 3)
    with pytest.warns(DeprecationWarning, match="load_data"), pytest.raises(FileNotFoundError):
        zoo.load("rows.npy")


# --- the pairs that come with the zoo --------------------------------------------------------------


def test_there_are_pairs_of_every_model():
    models = {name.split("/")[0] for name in zoo.pairs()}
    assert {"ppca", "linear_vae", "deep_gaussian_vae", "ima_vae"} <= models
    assert len(zoo.pairs()) >= 16


def test_the_pairs_are_small():
    home = zoo.pretrained.collection._OURS
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 8e6


def measured_data(model, found):
    """What a pair is measured on, and how it is taken: the rows of a data set, or a classic model's own data."""
    if isinstance(model, ClassicModel):
        return model.data, {"whole": True}
    return (zoo.named_dataset(found.dataset).test[: found.num_data],), {}


def test_classic_models_have_autoguides_and_their_references():
    classics = {classic.name: classic for classic in zoo.classic_models()}
    names = [name for name in zoo.pairs() if isinstance(zoo.load(name).model, ClassicModel)]
    assert len({name.split("/")[0] for name in names}) >= 4
    for name in names:
        model, guide, found = zoo.load(name)
        assert isinstance(guide, AutoGuide)
        reference = classics[model.name]
        assert all(torch.equal(own, value) for own, value in zip(model.data, reference.args, strict=True))
        assert found.check.value == pytest.approx(reference.log_evidence, abs=1e-9)
        assert found.evidence.lower <= reference.log_evidence <= found.evidence.upper


@pytest.mark.parametrize("name", zoo.pairs())
def test_the_numbers_of_a_card_are_found_again(name):
    model, guide, found = zoo.load(name)
    assert found.name == name
    assert found.agrees
    assert found.check is not None
    x, options = measured_data(model, found)
    weights = log_weights(model, guide, *x, num_samples=200, seed=1, **options).double()
    num_data = weights.shape[1]
    assert sum(found.guarantee.values()) == found.num_data == num_data
    error = float(weights.std(0).square().sum().sqrt()) / num_data / 200**0.5
    assert abs(float(weights.mean()) - found.elbo.value) <= 5 * (error + found.elbo.standard_error) + 1e-9
    if set(found.guarantee) == {"exact"}:
        assert evidence(model, *x).mean.value == pytest.approx(found.evidence.value, rel=1e-12)
    for bound in (found.elbo, found.iwae):
        assert bound.value - 5 * bound.standard_error <= found.evidence.upper + 1e-9


def widened(interval):
    """Ends twice as far from the value: of more than a hundred pairs of intervals at 95 %, some do not meet."""
    return tuple(2 * end - interval.value for end in (interval.lower, interval.upper))


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.pairs())
def test_all_else_of_a_card_is_found_again(name):
    model, guide, found = zoo.load(name)
    x, options = measured_data(model, found)
    data = x if options else zoo.named_dataset(found.dataset)
    again = card(model, guide, data, name=name, rows=found.num_data, seed=7, **options)
    assert again.agrees
    for part in ("evidence", "gap", "rate", "distortion", "coverage"):
        old, new = getattr(found, part), getattr(again, part)
        if options and part == "coverage":
            assert (old, new) == (None, None)  # no guide of many data, so none to simulate
            continue
        (old_lower, old_upper), (new_lower, new_upper) = widened(old), widened(new)
        assert max(old_lower, new_lower) <= min(old_upper, new_upper) + 1e-6, part
    assert again.collapsed == found.collapsed  # the same rows, and no samples
    if (found.pareto_k or 0) <= 0.7:  # beyond, an IWAE has no error that can be known
        error = math.hypot(found.iwae.standard_error, again.iwae.standard_error)
        assert abs(again.iwae.value - found.iwae.value) <= 5 * error + 1e-9
    check_pareto_k(found, again)


def check_pareto_k(found, again):
    """The median of k-hat by the error of each, and the share above a limit by the binomial distribution's."""
    shares = found.heavy, again.heavy
    mean = sum(shares) / 2
    assert abs(shares[0] - shares[1]) <= 5 * math.sqrt(2 * mean * (1 - mean) / found.num_data) + 1e-9
    if found.pareto_k is None:
        assert again.pareto_k is None
        return
    error = (1 + max(found.pareto_k, again.pareto_k)) / math.sqrt(tail_length(found.num_samples) * found.num_data)
    median = math.sqrt(math.pi / 2) * error  # against that of the mean
    assert abs(again.pareto_k - found.pareto_k) <= 5 * math.sqrt(2) * median
