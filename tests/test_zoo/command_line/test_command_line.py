"""The command line, run in this process; one test runs it as a user does."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import zoo
from inference import load_comparison, load_pair
from zoo.command_line import main
from zoo.command_line.building import GUIDES, MODELS

TRAIN = ["--steps", "4", "--latent-dim", "2", "--hidden", "4"]
LINEAR = ("tied", "exact")


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "mine.csv"
    np.savetxt(path, np.random.default_rng(0).normal(size=(50, 3)), delimiter=",", header="a,b,c", comments="")
    return str(path)


@pytest.fixture
def trained(tmp_path, csv):
    path = tmp_path / "pair.safetensors"
    assert main(["train", "linear_vae", "--guide", "linear", "--data", csv, *TRAIN, "--out", str(path)]) == 0
    return str(path)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("guide", GUIDES)
def test_every_model_trains_with_every_guide_or_says_why_not(model, guide, tmp_path, csv, capsys):
    path = tmp_path / "pair.safetensors"
    code = main(["train", model, "--guide", guide, "--data", csv, *TRAIN, "--out", str(path)])
    said = capsys.readouterr()
    if model == "bernoulli_vae":  # the data are not binary
        assert (code, path.exists()) == (1, False)
        assert "elbozoo train: " in said.err
    elif guide in LINEAR and model in ("deep_gaussian_vae", "ima_vae"):
        assert (code, path.exists()) == (1, False)
        assert "expected a linear model for this guide" in said.err
    else:
        assert (code, said.err.count("Traceback")) == (0, 0)
        load_pair(path)
    assert not list(tmp_path.glob("*checkpoint*"))


def test_evidence_and_gap_print_and_write_the_same_numbers(trained, csv, tmp_path, capsys):
    common = [trained, "--data", csv, "--rows", "5"]
    assert main(["evidence", *common, "--json", str(tmp_path / "e.json")]) == 0
    assert "mean log p" in capsys.readouterr().out
    tree = json.loads((tmp_path / "e.json").read_text())
    assert (len(tree["value"]), tree["guarantee"]) == (5, ["exact"] * 5)
    model, _ = load_pair(trained)
    torch.testing.assert_close(
        torch.tensor(tree["value"], dtype=torch.float64), model.log_evidence(zoo.named_dataset(csv).test[:5]).detach()
    )
    assert main(["gap", *common, "--json", "-"]) == 0
    gap = json.loads(capsys.readouterr().out)
    assert len(gap["rows"]["elbo"]) == 5
    assert gap["mean"]["gap"]["value"] >= 0


def test_compare_of_a_csv_writes_table_netcdf_and_report(csv, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--guide", "mean_field", "full_rank", "--rows", "6", "--samples", "20", "--split", "0", "--out", str(out)]
    assert main(["compare", "--data", csv, "--model", "linear_vae", *words, *TRAIN]) == 0
    printed = capsys.readouterr().out
    assert "linear_vae / full_rank" in printed
    assert load_comparison(out / "comparison.nc")["train"].sizes["datum"] == 6
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3
    assert "linear_vae / mean_field" in report
    assert "http" not in report  # nothing is fetched


def test_a_reader_that_wants_no_more_lines_is_no_error(monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):  # noqa: ARG002
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert main(["list"]) == 0
        sys.stdout.close()
    assert capsys.readouterr().err == ""


def test_card_adds_a_pair_that_list_and_show_know(trained, csv, tmp_path, capsys):
    folder = str(tmp_path / "pairs")
    words = ["--rows", "4", "--split", "1", "--samples", "20", "--simulated", "0", "--out", folder]
    assert main(["card", trained, "--data", csv, "--name", "mine/csv", "--trained-by", "by hand", *words]) == 0
    capsys.readouterr()
    assert main(["list", "--folder", folder]) == 0
    assert "mine/csv" in capsys.readouterr().out
    assert main(["show", "mine/csv", "--folder", folder, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == "by hand"
    assert main(["evidence", f"{folder}/mine/csv", "--rows", "2"]) == 0  # on the card's own data


def test_an_interrupted_training_resumes_to_the_same_bits(csv, tmp_path, monkeypatch, capsys):
    words = ["train", "deep_gaussian_vae", "--data", csv, *TRAIN]
    assert main([*words, "--out", str(tmp_path / "whole.safetensors")]) == 0
    checkpoint = tmp_path / "cut.checkpoint.safetensors"

    def interrupted(*args, checkpoint, **options):
        fit(*args, checkpoint=checkpoint, **options)
        raise KeyboardInterrupt

    from zoo.command_line import building

    fit = building.fit
    monkeypatch.setattr(building, "fit", interrupted)
    assert main([*words, "--out", str(tmp_path / "cut.safetensors")]) == 130
    assert "interrupted; --resume goes on from the last checkpoint" in capsys.readouterr().err
    assert checkpoint.exists()
    monkeypatch.undo()
    assert main([*words, "--out", str(tmp_path / "cut.safetensors")]) == 1  # not without being told to
    assert main([*words, "--out", str(tmp_path / "cut.safetensors"), "--resume"]) == 0
    whole, cut = (load_pair(tmp_path / f"{name}.safetensors") for name in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "no/pair"], "expected one of the pairs"),
        (["evidence", "PAIR"], "expected --data"),
        (["evidence", "PAIR", "--data", "nothing.csv"], "nothing.csv"),
        (["evidence", "PAIR", "--data", "synthetic"], "rows of 3 numbers"),
        (["evidence", "PAIR", "--data", "CSV", "--rows", "0"], "rows"),
        (["card", "PAIR", "--name", "a/../b", "--data", "CSV"], "name"),
        (["train", "linear_vae", "--data", "CSV", "--device", "gpu"], "expected device to be 'auto' or one of ['cpu'"),
        (["list", "--folder", "nowhere"], "folder of trained pairs"),
        (["show", "linear_vae/digit"], "did you mean linear_vae/digits?"),
        (["evidence", "nothing.safetensors", "--data", "CSV"], "found no file"),
        (["evidence", "FOLDER", "--data", "CSV"], "expected a pair with card.json"),
        (["evidence", "PAIR", "--data", "CSV", "--json", "FOLDER"], "it is a folder"),
        (["train", "linear_vae", "--data", "CSV", "--out", "FOLDER"], "it is a folder"),
        (["train", "linear_vae", "--data", "FOLDER"], "that is a folder"),
        (["train", "deep_gaussian_vae", "--data", "CSV", "--hidden", "-3"], "a hidden width"),
        (["card", "PAIR", "--data", "CSV", "--name", "a/b", "--out", "CSV"], "cannot read or write"),
        (["card", "eight_schools/multivariate_normal", "--data", "CSV", "--name", "a/b"], "a pair for rows of data"),
        (["compare", "eight_schools/multivariate_normal", "--data", "CSV"], "a pair for rows of data"),
        (["compare", "--data", "CSV", "--out", "CSV"], "cannot read or write"),
        (["train", "linear_vae", "--data", "CSV", "--seed", "99999999999999999999"], "expected seed below"),
        (["reproduce", "--mnist", "nowhere"], "found nothing at nowhere"),
    ],
)
def test_mistakes_end_with_one_sentence(words, sentence, trained, csv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    places = {"PAIR": trained, "CSV": csv, "FOLDER": str(tmp_path)}
    assert main([places.get(word, word) for word in words]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith(f"elbozoo {words[0]}: ")


@pytest.mark.parametrize("words", [[], ["train"], ["train", "gan", "--data", "digits"], ["fly"]])
def test_what_cannot_be_parsed_exits_with_two(words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


def test_it_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "zoo", "list"], capture_output=True, text=True, check=True)
    assert "linear_vae/digits" in run.stdout


def test_the_closed_form_needs_no_guide(capsys):
    for command in ("evidence", "gap"):
        assert main([command, "linear_vae/digits", "--method", "exact", "--rows", "2"]) == 0
        assert "by exact, exact" in capsys.readouterr().out


def test_classic_pairs_are_measured_on_their_own_data(csv, capsys):
    assert main(["evidence", "linear_regression/normal", "--json", "-"]) == 0
    tree = json.loads(capsys.readouterr().out)
    reference = zoo.load("linear_regression/normal").card.check.value
    assert tree["lower"][0] - 1e-9 <= reference <= tree["upper"][0] + 1e-9
    assert main(["evidence", "linear_regression/normal", "--data", csv]) == 1
    assert "expected no --data" in capsys.readouterr().err
