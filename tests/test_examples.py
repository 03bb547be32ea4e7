"""Every example runs with tiny settings and says what it found."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats
import torch

from guides import Linear
from inference import load_pair
from inference.marginal_likelihood.estimate import METHODS
from zoo import LinearVAE

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = (
    "autoguides.py",
    "broken_elbo_toy.py",
    "compare_guides.py",
    "compare_objectives.py",
    "constant_variance.py",
    "elbo_gap.py",
    "elbo_gap_vs_gamma.py",
    "estimator_scorecard.py",
    "gap_against_collapse.py",
    "gap_along_training.py",
    "guides_on_one_decoder.py",
    "evidence_bracket.py",
    "linear_vae_landscape.py",
    "moebius_identifiability.py",
    "posterior_collapse.py",
    "pretrained_pairs.py",
    "pyro_workflow.py",
    "rate_distortion.py",
    "reproduce.py",
    "self_consistency.py",
    "sprites.py",
    "training_choices.py",
)
BENCHMARKS = (
    "benchmarks/annealing.py",
    "benchmarks/evidence_methods.py",
    "benchmarks/ima_contrast.py",
    "benchmarks/log_weights.py",
    "benchmarks/ppca_fit.py",
    "benchmarks/svi_step.py",
)
PROTOCOLS = (
    "benchmarks/coverage.py",
    "benchmarks/exponents.py",
    "benchmarks/gap_coverage.py",
    "benchmarks/large_data.py",
    "benchmarks/nested_sampling.py",
    "benchmarks/run_all.py",
)
HELPERS = ("_common.py", *(f"benchmarks/{name}.py" for name in ("timing", "drawn_problems", "numpyro_step")))


@pytest.fixture
def load(monkeypatch):
    """Import an example by its name, its neighbours within reach."""

    def load_script(name):
        for folder in (EXAMPLES, EXAMPLES / "benchmarks"):
            monkeypatch.syspath_prepend(str(folder))
        path = EXAMPLES / name
        spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load_script


@pytest.fixture
def run(load, monkeypatch):
    """Run an example's main with tiny settings and further arguments, as its command line would, on the CPU."""

    def run_main(name, *arguments):
        return load(name).main(["--smoke", *arguments])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield run_main
    torch.set_num_threads(threads)


def test_every_example_is_listed_here():
    files = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("**/*.py")}
    assert files == {*SCRIPTS, *BENCHMARKS, *PROTOCOLS, *HELPERS}


@pytest.mark.parametrize("name", [*SCRIPTS, *BENCHMARKS, *PROTOCOLS])
def test_help_shows_what_the_example_does_and_its_options(name, load, capsys):
    module = load(name)
    with pytest.raises(SystemExit) as leaving:
        module.main(["--help"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in printed
    assert "--repeats" in printed if name in BENCHMARKS else "--smoke" in printed
    if name in SCRIPTS:
        options = re.split(r"\n  (?=-)", printed)
        for option in ("--out", "--device", "--seed ", "--resume"):
            (text,) = (text for text in options if text.startswith(option))
            assert re.search(r"[a-z]{2,} .*\(default: \S+\)", " ".join(text.split()))


def test_a_preset_changes_defaults_and_yields_to_what_is_stated(load):
    parse = load("sprites.py").parse
    plain, smoke, stated = parse([]), parse(["--smoke"]), parse(["--smoke", "--steps", "7"])
    assert (plain.steps, plain.rows, plain.gamma2) == (8000, 10_000, 0.05)
    assert (smoke.steps, smoke.rows, smoke.gamma2) == (3, 60, 0.05)
    assert (stated.steps, stated.rows) == (7, 60)
    paper = parse(["--paper-scale", "--rows", "100"])
    assert (paper.size, paper.gamma2, paper.channels, paper.rows) == (64, 0.013, [32, 32, 64, 64], 100)


def test_a_preset_knows_its_options(load):
    common = load("_common.py")
    parser = common.example_parser("What it does.", "name", seed="all")
    with pytest.raises(ValueError, match=r"expected a preset of the script's own options, got .'step'."):
        common.parse_with_presets(parser, [], smoke={"step": 3})


def test_a_device_that_is_not_there_is_refused(load, capsys):
    parser = load("_common.py").example_parser("What it does.", "name", seed="all")
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "gpu"])
    assert "argument --device: expected device to be 'auto' or one of ['cpu'" in capsys.readouterr().err


def test_a_result_is_taken_again_for_the_same_settings_alone(load, tmp_path):
    common = load("_common.py")
    parser = common.example_parser("What it does.", "name", seed="all")
    words, calls = ["--out", str(tmp_path)], []

    def value_of(*further):
        args = common.parse_with_presets(parser, [*words, *further])
        return common.kept(args, "one", lambda: calls.append(further) or {"value": [1.0, math.inf]})

    assert value_of() == value_of("--resume") == {"value": [1.0, math.inf]}
    assert len(calls) == 1
    value_of("--resume", "--seed", "1")  # another run, which replaces it
    value_of("--resume")
    value_of()  # without --resume, anew
    assert len(calls) == 4


def test_a_script_on_the_cpu_alone_says_why(load, capsys):
    common = load("_common.py")
    parser = common.example_parser("What it does.", "name", seed="all", cpu_only="the references are there")
    assert {parser.parse_args(words).device for words in ([], ["--device", "cpu"])} == {"cpu"}
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "cuda"])
    assert "expected cpu, got 'cuda': the references are there" in capsys.readouterr().err


def test_an_interrupted_example_goes_on_from_what_it_has(run, load, tmp_path, monkeypatch, capsys):
    whole = run("broken_elbo_toy.py", "--out", str(tmp_path / "whole"))
    module, calls = load("broken_elbo_toy.py"), []
    train = module.train_channel

    def interrupted_at(limit):
        def train_or_stop(*args, **options):
            calls.append(options)
            if len(calls) == limit:
                raise KeyboardInterrupt
            return train(*args, **options)

        return train_or_stop

    words = ["--smoke", "--out", str(tmp_path / "parts")]
    monkeypatch.setattr(module, "train_channel", interrupted_at(3))
    with pytest.raises(SystemExit) as leaving:
        module.run_as_command(lambda: module.main(words))
    assert leaving.value.code == 130
    assert "interrupted; --resume goes on from the results that are in the folder" in capsys.readouterr().err
    assert len(list((tmp_path / "parts" / "rows").iterdir())) == 2
    monkeypatch.setattr(module, "train_channel", interrupted_at(None))
    found = module.main([*words, "--resume"])
    assert len(calls) == 3 + len(whole) - 1 - 2  # the row by hand is not trained, and two were there
    assert all(torch.equal(values, whole[name]) for name, values in found.items())


def test_a_bar_counts_the_results_and_bears_the_name(load, tmp_path, capsys):
    common = load("_common.py")
    parser = common.example_parser("What it does.", "this script", seed="all")
    args = common.parse_with_presets(parser, ["--out", str(tmp_path)])
    common.expect(args, 2)
    for name in ("first", "beta = 2"):
        common.kept(args, name, lambda: 1.0)
        common.say(name)
    shown = capsys.readouterr()
    assert shown.out == "first\nbeta = 2\n"
    assert "this script: 100%" in shown.err
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {"first.json", "beta___2.json"}


def test_pairs_trained_at_once_are_trained_again_where_one_is_missing(load, tmp_path):
    common, trainings = load("_common.py"), []
    parser = common.example_parser("What it does.", "name", seed="all")

    def train():
        trainings.append(torch.rand(5))  # the training's own draws
        return [(torch.nn.Linear(1, 1), offset) for offset in (1.0, 2.0)]

    def results(*further, broken=False):
        args = common.parse_with_presets(parser, ["--out", str(tmp_path), *further])

        def measure(_, offset):
            if broken and offset == 2.0:
                raise KeyboardInterrupt
            return offset + float(torch.rand(()))

        return common.kept_of_pairs(args, train, {"first": measure, "second": measure})

    whole = results()
    assert results("--resume") == whole
    assert len(trainings) == 1
    assert whole[1] - 2 != whole[0] - 1  # each is measured with its own noise
    (tmp_path / "rows" / "second.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        results("--resume", broken=True)
    assert results("--resume") == whole  # to the same bits, whichever was there
    assert len(trainings) == 3


def test_kept_pairs_begin_untrained_and_take_the_weights_kept(load, tmp_path):
    common = load("_common.py")
    parser = common.example_parser("What it does.", "name", seed="all")

    def trained(*further):
        args = common.parse_with_presets(parser, ["--out", str(tmp_path), *further])
        pairs = {f"beta = {i}": (LinearVAE(3, 1), Linear(3, 1)) for i in range(2)}
        begun = []

        def train():
            for i, (model, _) in enumerate(pairs.values()):
                begun.append(float(model.W.detach().abs().sum()))
                model.W.data.fill_(float(i))

        found = common.kept_pairs(args, pairs, train)
        assert all(pair[0] is own[0] for pair, own in zip(found, pairs.values(), strict=True))
        assert [pair[0].W.unique().tolist() for pair in found] == [[0.0], [1.0]]
        return begun

    assert len(trained()) == 2
    assert trained("--resume") == []
    (tmp_path / "rows" / "beta___1.json").unlink()
    assert 0.0 not in trained("--resume")  # the one that was there is not trained from where it ended


def test_autoguides_conclude_how_many_are_close_and_trusted(load, capsys):
    module = load("autoguides.py")
    rows = {"close": ["-1.00", "0.15 ± 0.04", "0.30"], "off": ["-9.00", "3.20 ± 0.10", "0.90"]}
    families = [family.__name__ for family in module.FAMILIES]
    module.conclude({(model, family): row for model, row in rows.items() for family in families})
    expected = (
        "within 0.1 nats of log p, by two standard errors, on 1 of 2 models; k-hat below 0.7 on 1; widest gap 3.20"
    )
    assert [f"{family}: {expected} nats" for family in families] == capsys.readouterr().out.splitlines()


def test_one_seed_has_a_mean_and_no_standard_error(load):
    common = load("_common.py")
    assert common.means_with_errors(torch.tensor([[1.0, -2.5]])) == ["1.00", "-2.50"]
    assert common.means_with_errors(torch.tensor([[1.0], [3.0]])) == ["2.00 (1.00)"]


EVERY_MODEL = ["pPCA", "pPCA rotated", "linear VAE", "deep VAE", "IMA VAE"]


@pytest.mark.parametrize(
    ("chosen", "models", "count"),
    [
        ("--model ppca deep_vae --guide exact mean_field", ["pPCA", "pPCA rotated", "deep VAE"], 5),
        pytest.param("", EVERY_MODEL, 13, marks=pytest.mark.slow),
    ],
)
def test_elbo_gap_measures_saves_and_prints(chosen, models, count, run, tmp_path, capsys):
    gaps = run("elbo_gap.py", *chosen.split(), "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert list(gaps) == models
    assert f"{count} pairs" in printed
    for name, guides in gaps.items():
        for guide, gap in guides.items():
            row = next(line for line in printed.splitlines() if line.startswith(f"{name} / {guide} "))
            assert f"{gap.elbo.mean():.3f}" in row
            assert "nan" not in row
            # a negative number of a gap stands beside its interval
            assert " -" not in re.sub(r"-\d+\.\d+ \[", "", row.split(f"{gap.evidence.value.mean():.3f}")[-1])
            torch.testing.assert_close(gap.approximation + gap.amortisation, gap.total)
    assert float(gaps["pPCA"]["exact"].total.abs().max()) < 1e-9
    for name in {"pPCA rotated", "linear VAE"}.intersection(
        models
    ):  # of linear models the decoder's prediction is the approximation
        row = next(line for line in printed.splitlines() if line.startswith(f"{name} / mean_field"))
        assert f"{gaps[name]['mean_field'].approximation.mean():.3f}" == row.split()[-2]
    means = [gap.mean["gap"] for guides in gaps.values() for gap in guides.values()]
    assert f"{sum(part.lower > 1e-3 for part in means)} of {count} pairs have a gap of more than 0.001" in printed
    assert printed.splitlines()[-1] == f"figure: {tmp_path / 'gaps.png'}"
    assert {p.suffix for p in tmp_path.iterdir() if p.is_file()} == {".png", ".safetensors"}
    model, guide = load_pair(tmp_path / "deep_VAE-mean_field.safetensors")
    assert (model.latent_dim, guide.latent_dim) == (2, 2)


def test_elbo_gap_takes_a_file_and_a_choice_of_models_and_guides(run, tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).standard_normal((60, 6)))
    arguments = ["--data", str(tmp_path / "mine.npy"), "--model", "linear_vae", "--guide", "linear", "tied"]
    gaps = run("elbo_gap.py", *arguments, "--out", str(tmp_path / "out"))
    assert {name: list(guides) for name, guides in gaps.items()} == {"linear VAE": ["linear", "tied"]}
    assert len(gaps["linear VAE"]["tied"].elbo) == 2


def test_gap_coverage_checks_intervals_and_goes_on_where_it_was(run, tmp_path, capsys):
    lines = run("benchmarks/gap_coverage.py", "--out", str(tmp_path))
    first = capsys.readouterr().out
    assert [key[0] for key, _ in lines] == ["gap", "gap", "compare", "compare"]
    for key, result in lines:
        if key[0] == "gap":  # of four data points each; one miss is nothing unusual
            assert max(result[name] for name in ("total", "approximation", "amortisation", "negative", "short")) <= 1
            assert result["evidence_off"] < 1e-6
            assert result["not_stationary"] == 0
        else:
            assert result["data"] <= scipy.stats.binom.ppf(0.999, key[1], 0.05)
            assert result["again"] == 0
    assert run("benchmarks/gap_coverage.py", "--out", str(tmp_path)) == lines
    assert first.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]


def test_pyro_workflow_compares_pairs_of_both_sides(run, tmp_path, capsys):
    tree = run("pyro_workflow.py", "--out", str(tmp_path))
    assert list(tree["train"]["guide"].values) == ["zoo / zoo", "zoo / yours", "yours / zoo"]
    assert list(tree["train"]["method"].values.ravel()) == ["exact", "exact", "importance"]
    printed = capsys.readouterr().out
    assert "posterior draws of five digits: (100, 5, 4)" in printed
    gaps = tree["train"]["gap"].values.reshape(3, -1).mean(1)
    assert f"nats, the widest that of {tree['train']['guide'].values[gaps.argmax()]}, {gaps.max():.2f}" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["elbo_against_evidence.png"]


def test_posterior_collapse_prints_a_row_a_run_and_draws_the_curves(run, tmp_path, capsys):
    rows = run("posterior_collapse.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert list(rows) == [f"{kind}, {mode}" for kind in ("deep", "linear") for mode in ("fixed 1", "learnt 3")]
    for name, values in rows.items():
        # seeds; ELBO, tuned ELBO, sigma^2, share collapsed, KL; live: predicted, measured
        assert values.shape == (2, 7)
        assert bool((values[:, 1] >= values[:, 0] - 1e-6).all())
        assert values[:, 6].tolist() == pytest.approx([20 * (1 - share / 100) for share in values[:, 3].tolist()])
        assert f"{name:24s}{f'{values[:, 0].mean():.2f}':>13s}" in printed
    assert rows["deep, fixed 1"][:, 2].tolist() == pytest.approx([1.0, 1.0])
    for kind in ("deep", "linear"):
        live = torch.cat([values[:, 5:] for name, values in rows.items() if name.startswith(kind)])
        assert f"{kind}: as many latents live as predicted in {int((live[:, 0] == live[:, 1]).sum())} of 4" in printed
    made = {"rows", "collapse_deep.png", "collapse_linear.png", "alive.png"}
    assert {path.name for path in tmp_path.iterdir()} == made


def test_the_collapsed_linear_vae_keeps_what_the_spectrum_predicts(run, capsys, tmp_path):
    # fewer steps may leave one latent more alive, depending on how the threads of a machine round
    arguments = ["--kinds", "linear", "--rows", "2000", "--seeds", "1", "--steps", "60", "--out", str(tmp_path)]
    rows = run("posterior_collapse.py", *arguments, "--fixed", "20", "10", "--learnt")
    assert [values[0, 5:].tolist() for values in rows.values()] == [[3.0, 3.0], [6.0, 6.0]]
    printed = capsys.readouterr().out
    assert "linear: as many latents live as predicted in 2 of 2 runs; correlation 1.000 (Pearson), 1.000" in printed


def test_posterior_collapse_brackets_log_p_and_parts_model_from_gap(run, load, tmp_path, capsys):
    few = ["--evidence", "2", "--temperatures", "5", "--kinds", "deep"]
    run("posterior_collapse.py", *few, "--fixed", "--seeds", "1", "--out", str(tmp_path))
    assert re.search(r"deep, learnt 3( +-?\d+\.\d\d){6}\n", capsys.readouterr().out)
    module = load("posterior_collapse.py")
    torch.manual_seed(0)
    model, guide = LinearVAE(5, 2), Linear(5, 2)
    x, args = torch.randn(6, 5), module.parse(["--temperatures", "50"])
    bound, weighted, lower, upper = torch.tensor(module.bracket(model, guide, x, 0, args))
    truth = model.double().log_evidence(x.double())
    slack = math.log(1e4) / 8  # Markov's, of eight chains
    assert bool((bound < weighted).all())
    assert bool((lower < truth + slack).all())
    assert bool((truth < upper + slack).all())
    better = [[-10, -14], [-9, -11], [-9, -12], [-7, -11]]  # ELBO, IWAE and both ends of two data
    worse = [[-20, -22], [-20, -22], [-19, -21], [-18, -20]]
    runs = {"learnt 1": better, "learnt 30": worse}
    module.model_or_gap({name: torch.tensor([values], dtype=torch.float64) for name, values in runs.items()})
    printed = capsys.readouterr().out
    assert (
        "the ELBO falls by 9.00 (1.00) nats and log p, if the chains have converged, by at least 9.00 (0.00)" in printed
    )
    assert "none of it is the gap, which is at least 0.00 nats wider at the better start" in printed
    worse[3] = [-17, -17]  # a wider gap of the worse start
    module.model_or_gap({name: torch.tensor([values], dtype=torch.float64) for name, values in runs.items()})
    assert "at least 7.00 (1.00): at most 2.00 nats of it are the gap's" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(6, 4, 3), (3, 6, 4)])
def test_posterior_collapse_takes_colour_images_of_a_file(shape, run, load, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)
    np.save(tmp_path / "faces.npy", images)
    words = ["--data", str(tmp_path / "faces.npy"), "--channels", "4", "5", "--evidence", "3", "--temperatures", "5"]
    rows = run("posterior_collapse.py", *words, "--seeds", "1", "--rows", "10", "--out", str(tmp_path / "out"))
    assert [values.shape for values in rows.values()] == [(1, 7)] * 4
    assert "faces: (10, 72), K = 20" in capsys.readouterr().out
    module = load("posterior_collapse.py")
    data = module.read(module.parse([*words, "--rows", "10"]))
    assert (data.shape, data.held_out.shape) == ((3, 6, 4), (3, 72))
    flat, _ = module.channels_first(torch.tensor(images).flatten(1), shape)
    colours = images if shape[0] == 3 else images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(flat, colours.reshape(20, 72))
    few = module.spectrum_of(data.x.double(), module.parse(["--kinds", "deep"])).eigenvalues
    torch.testing.assert_close(few, module.spectrum(data.x.double()).eigenvalues[:10], atol=1e-9, rtol=1e-9)
    model, guide = module.build("deep", 1.0, True, data.shape, module.parse(words))
    assert all(any(isinstance(part, torch.nn.Conv2d) for part in half.modules()) for half in (model, guide))


def test_training_choices_report_the_elbo_of_every_choice_at_beta_one(run, tmp_path, capsys):
    tables = run("training_choices.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert list(tables) == [30.0, 3.0]
    for start, rows in tables.items():
        assert len(rows) == 11
        for name, values in rows.items():
            elbo, tuned, sigma2, _, share, rate, active, seconds = values.unbind(-1)
            assert values.shape == (2, 8)
            assert bool((seconds > 0).all())
            # KL once, and two Gaussian log-likelihoods with one residual: the one tells the other
            residual = (-(tuned + rate) / 32 - 1).exp() / (2 * math.pi)
            expected = -rate - 32 * (2 * math.pi * sigma2).log() - 32 * residual / sigma2
            torch.testing.assert_close(elbo, expected)
            assert f"{name:24s}{f'{elbo.mean():.2f}':>10s}" in printed
            assert bool(((share >= 0) & (share <= 100) & (rate > 0) & (active <= 20)).all())
        assert rows["fixed sigma^2"][:, 2].tolist() == pytest.approx([start] * 2)
        gain = rows["KL annealed"] - rows["sampled KL"]
        assert f"KL annealed against sampled KL: ELBO {gain[:, 0].mean():.2f} (" in printed
    assert torch.equal(*(rows["optimal sigma^2"][:, :7] for rows in tables.values()))  # has no start
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "training_choices.png"}


def test_compare_objectives_prints_a_row_an_objective_for_both_models(run, tmp_path, capsys):
    tables = run("compare_objectives.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert len(tables) == 2
    for rows in tables.values():
        assert len(rows) == 13
        for name, (bound, lower, log_p, gap, *_) in rows.items():
            assert gap == pytest.approx(log_p - lower)
            assert f"{name:24s}{bound:>13.3f}{lower:>13.3f}{log_p:>13.3f}" in printed
        gaps = {name: row[3] for name, row in rows.items()}
        assert min(gaps.values()) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "compare_objectives.png"}
    best = max(tables["linear VAE, exact log p"].items(), key=lambda item: item[1][2])[0]
    assert f"linear VAE, exact log p: log p is highest after {best}, " in printed
    again = run("compare_objectives.py", "--resume", "--out", str(tmp_path))
    assert repr(again) == repr(tables)  # of which one number is not known: NaN


@pytest.mark.slow
def test_compare_guides_splits_the_gap_of_every_guide_with_a_density(run, tmp_path, capsys):
    tables = run("compare_guides.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert [len(table) for table in tables.values()] == [14, 12]
    for table in tables.values():
        for name, (elbo, gap, approximation, amortisation, k_hat, distance, *_) in table.items():
            assert name in printed
            assert distance >= 0
            if name in ("mean field, resampled", "mean field + HMC"):
                assert all(math.isnan(v) for v in (elbo, gap, approximation, amortisation, k_hat))
            else:
                assert gap == pytest.approx(approximation + amortisation, abs=1e-9)
                assert amortisation >= -1e-9  # the rounding of two equal ELBOs
        assert table["mean field + 5 steps"][3] < table["mean field + 1 step"][3] < table["mean field"][3]
    linear = tables["linear VAE"]
    assert abs(linear["exact"][1]) < 1e-9
    assert linear["tied mean field"][3] == pytest.approx(0, abs=1e-6)
    assert linear["mean field"][2] == pytest.approx(linear["tied mean field"][2], abs=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "compare_guides.png"}
    assert "linear VAE: the smallest gap, " in printed


def test_constant_variance_reports_units_and_the_variance_network(run, tmp_path, capsys):
    table, losses, shifts, learnt = run("constant_variance.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    for name, (elbo, rate, distortion, *_) in table.items():
        assert f"{name:30s}{elbo:12.3f}" in printed
        assert elbo == pytest.approx(-rate - distortion)
    assert table["half width, BILBO"][4] < table["mean field"][4]
    assert min(losses[0.5]) > 0
    assert max(abs(shift) for shift in shifts.values()) < 1e-3
    assert "the loss is nan" in learnt[1e3]
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "constant_variance.png"}


def test_broken_elbo_toy_prints_a_row_an_objective_and_draws_it(run, tmp_path, capsys):
    results = run("broken_elbo_toy.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    for name, values in results.items():
        rate, distortion, total, information, _, classes = values.unbind(-1)
        assert bool((total - rate - distortion).abs().max() < 1e-12)
        assert bool((classes <= information + 1e-12).all())
        assert f"{name:22s}{rate.mean():15.4f}" in printed
    by_hand = results["by hand: e = p(z*|x)"]
    assert by_hand[0, 0].item() == pytest.approx(0.5, abs=1e-6)  # the information of data and class, A2
    assert by_hand[0, 5].item() == pytest.approx(0.3856, abs=1e-4)
    assert "H(x) = 2.86291" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "toy.png"}


def test_rate_distortion_prints_the_linear_curve_and_four_deep_ones(run, tmp_path, capsys):
    errors, curves = run("rate_distortion.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert errors.shape == (2, 3)
    assert bool((errors[:, 2] > 0).all())  # no code is below the curve, however little trained
    assert len(curves) == 4
    for name, points in curves.items():
        assert name in printed
        assert [p.parameter for p in points] == [2.0]
    assert "R + D is at least 7.234" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "linear.png", "deep.png"}
    again, _ = run("rate_distortion.py", "--resume", "--out", str(tmp_path))
    assert torch.equal(again, errors)


@pytest.mark.slow
def test_elbo_gap_vs_gamma_finds_the_contrast_and_prints_it(run, tmp_path, capsys):
    tables = run("elbo_gap_vs_gamma.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert len(tables) == 5
    for name, (rows, contrast, condition) in tables.items():
        assert list(rows) == [2.0, 5.0]
        assert f"{name}: C_IMA = {contrast:.4f} nats" in printed
        assert 0 < rows[2.0][0] < rows[5.0][0]  # the gap rises
        assert abs(rows[5.0][0] / contrast - 1) < 0.02  # to the contrast
        assert abs(rows[5.0][4]) < 0.02 * contrast  # of which a full covariance leaves nothing
        assert contrast >= 1
        assert condition <= 100 or "paper" in name
    first = next(iter(tables.values()))[0]
    assert min(row[5] for row in first.values()) > 0
    assert "amortisation is below one nat at none of these precisions" in printed  # after three steps
    assert f"the gap is {first[5.0][0]:.4f}" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "elbo_gap_vs_gamma.png"}


def test_evidence_bracket_prints_a_row_for_each_temperature_count(run, tmp_path, capsys):
    results = run("evidence_bracket.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert list(results) == [3]
    for found in results.values():
        assert [row[0] for row in found["simulated"]] == [5, 10]
        for num, mean, _, certified, cpu, wall, _ in found["simulated"]:
            assert certified == pytest.approx(mean + 2 * math.log(40) / 4)  # Markov's price, shared by four data
            assert re.search(rf"simulated +{num} +{mean:.4f} .* {certified:.3f} +{cpu:.1f} +{wall:.1f}", printed)
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "evidence_bracket.png"}
    assert f"K = 3, simulated: 10 temperatures, {results[3]['simulated'][1][4]:.1f} CPU seconds" in printed


@pytest.mark.slow
def test_estimator_scorecard_scores_every_method_on_every_problem(run, tmp_path, capsys):
    results = run("estimator_scorecard.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert list(results) == [*METHODS, "bdmc"]
    families = ["linear K=2", "fold", "half-seen fold", "bimodal", "banana", "ring", "unseen mode"]
    for parts in results.values():
        assert [family for family, _ in parts] == families
    error, lower, upper = results["quadrature"]["banana", 0.1][0]
    assert np.abs(error).max() < 1e-6
    assert bool(((lower <= 0) & (upper >= 0)).all())
    assert results["quadrature"]["unseen mode", 0.02][0][0].max() < -math.log(2) + 1e-6  # no rule sees it
    assert "exact refuses: expected a model with log_evidence(x)" in printed
    table = pd.read_csv(tmp_path / "scorecard.csv", index_col=["method", "problem"])
    assert len(table) == len(families) * len(results)
    annealed = results["annealed"]["fold", 0.1][0][0]
    assert table.loc[("annealed", "fold"), "error"] == pytest.approx(annealed.mean())
    assert table.loc[("annealed", "fold"), "s.e."] == pytest.approx(annealed.std(ddof=1) / math.sqrt(3))
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "scorecard.csv", "scorecard.png"}
    assert re.search(r"\d+ of \d+ methods that answer keep their word", printed)
    check_scores(sys.modules["example_estimator_scorecard"].score)


def test_the_scorecard_concludes_who_misses_and_who_keeps_its_word(load, capsys):
    zero = np.zeros(40)
    above = np.where(np.arange(40) < 10, 0.5, -1.0)  # ten of forty lie above the truth
    good, bad = ((np.stack([zero, low, 1 + zero]), 8.0, 2.0) for low in (zero - 1, above))
    parts = {"fine": (good, good), "narrow": (bad, good), "shy": ("no", good), "silent": ("no", "no")}
    results = {name: {("fold", 0.1): first, ("ring", 0.1): second} for name, (first, second) in parts.items()}
    load("estimator_scorecard.py").conclude(results)
    misses, kept = capsys.readouterr().out.splitlines()
    assert misses == "narrow misses more often than its 95% allow on: fold"
    assert kept.startswith("2 of 3 methods that answer keep their word on every kind of problem; of them fine gives")


def check_scores(score):
    """What misses, and what is on the wrong side, is counted and marked."""
    zero, inf = np.zeros(40), np.full(40, math.inf)
    above = np.where(np.arange(40) < 10, 0.5, -1.0)  # ten of forty lie above the truth
    good, bad = (np.stack([zero, -1 + zero, 1 + zero]), 8.0, 2.0), (np.stack([zero, above, 1 + zero]), 8.0, 2.0)
    one_sided = (np.stack([zero + 2, above, inf]), 8.0, 2.0)
    assert (score([good])["coverage"], score([good])["verdict"]) == (1.0, "")
    assert (score([bad])["coverage"], score([bad])["verdict"]) == (0.75, "MISSES")
    assert (score([one_sided])["wrong side"], score([one_sided])["verdict"]) == (0.25, "MISSES")
    both = score([good, one_sided, "no"])
    assert (both["refused"], both["two-sided"], both["one-sided"]) == (pytest.approx(1 / 3), 0.5, 0.5)
    assert both["error"] == 1.0
    assert both["s/datum"] == 0.05
    limits = scipy.stats.beta.ppf(0.005, 30, 11), scipy.stats.beta.ppf(0.995, 31, 10)
    assert (score([bad])["from"], score([bad])["to"]) == pytest.approx(limits)


def test_linear_vae_landscape_finds_the_thresholds_at_the_eigenvalues(run, tmp_path, capsys):
    _, _, rows = run("linear_vae_landscape.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    found = re.findall(r"wakes up below sigma\^2 = (\S+), eigenvalue (\S+)", printed)
    assert found
    assert all(float(a) == pytest.approx(float(b), abs=1e-6) for a, b in found)
    assert len(rows) == 6  # three values of sigma^2, a leading and a trailing component (K = 2 has none between)
    for var, eigenvalue, log_p, elbo, theory in rows:
        assert theory == pytest.approx((var - eigenvalue) / var**2)
        assert (log_p, elbo) == pytest.approx((theory, theory), abs=1e-10)
        assert f"{log_p:13.6f}{elbo:13.6f}{theory:13.6f}  {'wakes up' if eigenvalue > var else 'stable'}" in printed
    assert [theory < 0 for *_, theory in rows] == [True, True, True, False, False, False]
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


def test_self_consistency_prints_a_row_a_precision_and_the_slopes(run, tmp_path, capsys):
    rows = run("self_consistency.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert list(rows) == [10.0, 1000.0]
    for values, paper in zip(rows.values(), ("(1.08)", "(0.999)"), strict=True):
        assert values.shape == (2, 3)  # seeds; squared error, variance, ratio to the formula
        assert bool((values > 0).all())
        assert f"{values[:, 2].median():.3g} {paper}" in printed
    first, last = (rows[g][:, 1].median() for g in (10.0, 1000.0))
    assert f"sigma^2 {float((last / first).log()) / math.log(100):.2f}; theory -2" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "self_consistency.png"}


def test_moebius_identifiability_measures_both_kinds_of_maps(run, tmp_path, capsys):
    rows, broken, correlation = run("moebius_identifiability.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    # maps; contrast of the mixing, MCC, contrast of the decoder, MCC by batches
    assert [row.shape for row in rows.values()] == [(2, 4), (2, 4)]
    assert rows[10.0][:, 3].tolist() == pytest.approx(rows[10.0][:, 1].tolist())  # twenty data are one batch
    assert max(row[:, 0].max() for row in rows.values()) < 1e-12  # Moebius maps are conformal
    assert broken.shape == (6, 4)
    assert broken[:, 0].min() > 1e-3
    assert correlation == pytest.approx(np.corrcoef(np.log(broken[:, 0]), broken[:, 1])[0, 1])
    assert f"and MCC: {correlation:.3f}\n" in printed
    assert "paper" not in printed  # whose experiment is in three dimensions
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "moebius_identifiability.png"}
    run("moebius_identifiability.py", "--latent-dim", "3", "--out", str(tmp_path))
    assert "(paper -0.507)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sources", "mixing", "linear"), [("beta", "moebius", "angle"), ("normal", "coupling", "columns")]
)
def test_moebius_identifiability_takes_other_sources_and_maps(sources, mixing, linear, run, tmp_path, capsys):
    words = ["--sources", sources, "--mixing", mixing, "--linear", linear, "--out", str(tmp_path)]
    rows, broken, _ = run("moebius_identifiability.py", *words)
    assert (rows[10.0][:, 0].max() < 1e-12) == (mixing == "moebius")
    assert broken[:-1, 0].min() > 1e-6
    assert (broken[-1, 0] < 1e-12) == (linear == "angle")  # at a right angle
    rows, broken, correlation = run("moebius_identifiability.py", *words, "--broken", "0")
    assert len(broken) == 0
    assert math.isnan(correlation)
    assert "paper" not in capsys.readouterr().out


@pytest.mark.parametrize("size", ["16", "64"])
def test_sprites_prints_the_correlations_of_its_factors(size, run, tmp_path, capsys):
    found, contrast = run("sprites.py", "--size", size, "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert f"{size} x {size}, 4 factors, 60 images" in printed
    assert f"MCC {found.value:.3f}\n" in printed
    matched = found.correlations[found.matching, torch.arange(4)]
    assert found.value == pytest.approx(float(matched.mean()))
    assert f"hue {float(matched[3]):.3f}" in printed
    assert contrast >= 0
    assert re.search(rf"{int((matched > 0.9).sum())} of 4 factors have a code of their own", printed)
    assert {path.name for path in tmp_path.iterdir()} == {"sprites.png", "training.safetensors"}
    again, _ = run("sprites.py", "--size", size, "--resume", "--out", str(tmp_path))
    assert again.value == found.value


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_print_ratios_to_their_peers(name, run, capsys):
    run(name)
    printed = capsys.readouterr().out
    ratios = [float(r) for r in re.findall(r"(?<![\d.])(\d+\.\d\d)(?= \()", printed)]
    assert ratios
    assert all(0 < r < math.inf for r in ratios)


def test_an_exponent_is_the_slope_of_log_time_in_log_size(load):
    exponent = load("benchmarks/exponents.py").exponent
    rounds = [[3.0, 2.0], [6.0, 8.0], [12.0, 32.0]]  # seconds of sizes 1, 2, 4 in two rounds: slopes one and two
    np.testing.assert_allclose(exponent([1, 2, 4], rounds), (1.5, 1.0, 2.0))


@pytest.mark.slow
def test_all_benchmarks_in_one_command_write_a_table_and_a_figure(run, load, tmp_path):
    run("benchmarks/run_all.py", "--only", "log_weights", "exponents", "--out", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"log_weights.txt", "log_weights.png", "exponents.txt"}
    text = (tmp_path / "log_weights.txt").read_text()
    assert re.search(r"cores, torch .*\nload .* before, .* after; \d+ s; log_weights.py", text)
    tables = load("benchmarks/run_all.py").tables_in(text)
    assert [len(table.rows) for table in tables] == [4, 4, 4]
    assert all(table.peer == "hand-written loop" for table in tables)
    assert all(table.rows[-1] == ("hand-written loop", 1.0, 1.0, 1.0) for table in tables)


def test_a_benchmark_that_fails_is_said_at_the_end(load, tmp_path):
    run_all = load("benchmarks/run_all.py")
    run_all.CPU = {"other": ["log_weights.py", "--no-such-option"]}
    with pytest.raises(SystemExit, match="failed: other"):
        run_all.main(["--smoke", "--out", str(tmp_path)])
    assert "unrecognized arguments: --no-such-option" in (tmp_path / "other.txt").read_text()


def test_coverage_keeps_its_word_on_a_fast_subset_and_goes_on(run, tmp_path, capsys):
    by_cell, by_method = run("benchmarks/coverage.py", "--out", str(tmp_path))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed0-of-8/*.csv")}
    assert len(files) == 3 * 3 * 2
    assert not [cell for cell in by_cell.index[by_cell.fails != ""] if not cell.startswith("importance")]
    assert (by_cell.loc[["auto | linear K=1", "auto | fold", "auto | counts"], "two-sided"] == 1).all()
    assert by_method.loc["auto", "cover"] == 1
    assert by_method.loc["auto", "worst"] < 1e-7
    next(iter(files)).unlink()
    again, _ = run("benchmarks/coverage.py", "--out", str(tmp_path))
    changed = [path for path, made in files.items() if path.stat().st_mtime_ns != made]
    assert len(changed) == 1  # the others were there
    pd.testing.assert_frame_equal(again.drop(columns="s"), by_cell.drop(columns="s"))
    assert "| auto, linear K=1 | 16 | 1.000 | 1.000 |" in capsys.readouterr().out


def test_coverage_finds_what_is_too_narrow_and_what_is_silent(load):
    score = load("benchmarks/coverage.py")
    normal = np.random.default_rng(0).standard_normal(400)
    rows = pd.DataFrame({"value": normal, "truth": 0.0, "error": abs(normal), "width": 2.0, "seconds": 0.0})
    for half, verdict in ((1.96, ""), (1.3, "two-sided")):
        rows["holds"], rows["two_sided"] = abs(normal) < half, True
        assert score.summary(rows)["fails"] == verdict
    rows["holds"], rows["two_sided"] = True, np.arange(400) < 370
    assert score.summary(rows, 0.95)["fails"] == "silent"
    assert score.floor("auto", "linear K=4-50") == 0.99
    assert score.floor("auto", "ring K=2") == 0.95
    assert score.floor("importance", "fold") == 0


def test_problems_of_coverage_are_what_their_names_say(load):
    """The evidence of two families once more, by SciPy's integrators."""
    drawn = load("benchmarks/drawn_problems.py")
    ring = drawn.ring(2, np.random.default_rng(1), 3)
    for x, sigma, truth in zip(*(column.flatten().tolist() for column in (*ring.args, ring.truth))):
        near = max(0.0, x - 10 * sigma), max(0.0, x) + 10 * sigma
        found = scipy.integrate.quad(ring_density, *near, args=(x, sigma), epsabs=1e-14)[0]
        assert math.log(found) == pytest.approx(truth, abs=1e-6)
    counts = drawn.counts(np.random.default_rng(1), 3)
    for x, shape, rate, truth in zip(*(column.numpy() for column in (*counts.args, counts.truth))):
        found = scipy.integrate.quad(count_density, 0, np.inf, args=(x, shape, rate))[0]
        assert math.log(found) == pytest.approx(truth, abs=1e-6)


def ring_density(square, x, sigma):
    """Of x and of the square of the radius."""
    return scipy.stats.norm.pdf(x, square, sigma) * math.exp(-square / 2) / 2


def count_density(z, x, shape, rate):
    """Of three counts and of their rate."""
    return np.prod(scipy.stats.poisson.pmf(x, z)) * scipy.stats.gamma.pdf(z, shape, scale=1 / rate)


def test_nested_sampling_agrees_with_the_evidence(run, capsys):
    pytest.importorskip("dynesty")
    rows = run("benchmarks/nested_sampling.py", "--smoke")
    assert len(rows) == 2
    assert all(abs(row[-1]) < 4 for row in rows)
    assert "within two standard errors of both together" in capsys.readouterr().out


def test_reproduce_is_the_command_under_another_name(run, tmp_path, capsys):
    assert run("reproduce.py", "--out", str(tmp_path)) == 0
    assert "alemi-tight-bounds  reproduced" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "claims.md", "claims.html"}


def test_gap_along_training_splits_the_gap_and_goes_on(run, tmp_path, capsys):
    tables = run("gap_along_training.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert list(tables) == [f"{kind}, sigma^2 from {var}" for kind in ("linear", "deep") for var in (100, 1)]
    for name, rows in tables.items():
        assert [row[0] for row in rows] == [0, 1]
        for _, log_p, elbo, error, approximation, amortisation, predicted, alive, _ in rows:
            assert log_p - elbo == pytest.approx(approximation + amortisation, abs=1e-6)
            assert approximation > -4 * error - 1e-9
            assert predicted > 0
            assert alive in (0, 1, 2)
            if name.startswith("linear"):
                assert approximation == pytest.approx(predicted, abs=1e-6)  # exact there
        assert f"{name}: ends at log p {rows[-1][1]:.3f}" in printed
    assert run("gap_along_training.py", "--resume", "--out", str(tmp_path)) == tables
    assert "fit" not in capsys.readouterr().err  # nothing is trained twice
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "gap_along_training.png"}


def test_gap_against_collapse_prints_every_noise_and_concludes(run, tmp_path, capsys):
    rows = run("gap_against_collapse.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert [row[0] for row in rows] == [30.0, 1.0]
    assert all(gap > -4 * error for _, _, gap, error, *_ in rows)
    assert f"the best model, log p {max(row[1] for row in rows):.2f}" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "gap_against_collapse.png"}


def test_guides_on_one_decoder_finds_the_families_in_order(run, tmp_path, capsys):
    tables, grid = run("guides_on_one_decoder.py", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    found = tables[1.0]
    assert found["contrast"] == pytest.approx(0.5 * math.log(2))  # of the shear alone: the nonlinearity scales columns
    assert found["mean field"][0] == pytest.approx(found["predicted"], rel=0.2)
    assert found["full rank"][0] < found["mean field"][0]
    assert grid[4, 20][0] > 0
    assert f"predicted for independent coordinates {found['predicted']:.4f}" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "guides_on_one_decoder.png"}


@pytest.mark.slow
def test_a_flow_trained_on_the_decoder_leaves_less_than_a_mean_field(run, tmp_path):
    pytest.importorskip("zuko")
    words = ["--families", "mean field", "flow", "--strengths", "4", "--family-steps", "600", "--out", str(tmp_path)]
    tables, _ = run("guides_on_one_decoder.py", *words)
    assert tables[4.0]["flow"][0] < 0.1 * tables[4.0]["mean field"][0]  # which its own network alone can give


def test_pretrained_pairs_trains_measures_and_goes_on(run, tmp_path, capsys):
    made = run("pretrained_pairs.py", "--out", str(tmp_path))
    assert made == ["linear_regression/normal", "linear_vae/digits", "ppca/digits"]
    printed = capsys.readouterr().out
    assert "elbozoo train ppca --guide exact" in printed
    assert "-25.0000 by the closed form" in printed
    assert run("pretrained_pairs.py", "--resume", "--out", str(tmp_path)) == made
    assert "elbozoo train" not in capsys.readouterr().out  # nothing is made twice


@pytest.mark.slow
def test_cost_against_rows_is_measured_in_own_processes(run, capsys):
    found = run("benchmarks/large_data.py")
    printed = capsys.readouterr().out
    assert "seconds by rows" in printed
    assert "MB by rows" in printed
    assert list(found)[:3] == ["start, 1 rank", "start in memory, 1 rank", "checkpoint, 1 rank"]
    assert {"gap to a file", "compare to a file"} <= set(found)
    assert all(seconds > 0 for seconds, _ in found["train, 1 rank"])
    assert found["evidence of the file"][1] < 500
