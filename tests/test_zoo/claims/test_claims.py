"""Verdicts follow from numbers, results are kept, and every claim's run can fail."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from zoo.claims import (
    VERDICTS,
    Claim,
    Measured,
    Settings,
    all_claims,
    chosen_claims,
    markdown,
    run_claims,
    verdict_counts,
)
from zoo.claims.claim import DIFFERS, REFUTED, REPRODUCED, UNDECIDED, at_least, at_most, close
from zoo.claims.figures import FIGURES
from zoo.claims.page import as_html, shown
from zoo.claims.running import fingerprint
from zoo.command_line import main

PAGE = Path(__file__).parents[3] / "docs" / "claims.md"
# Closed forms and exact sums, of seconds together.
QUICK = (
    "lucas-collapsed-column",
    "lucas-principal-directions",
    "lucas-against-latent-dim",
    "alemi-information-bounds",
    "alemi-generative-bounds",
    "alemi-tight-bounds",
    "alemi-same-elbo",
    "alemi-slope",
    "reizinger-prefers-orthogonal",
    "fyffe-smooth-decoder",
    "fyffe-batch-bound",
)
ONE = Claim(name="one", paper="Somebody 2000", sentence="Two is two", run=lambda _: [close("two", 2.0, 2.0, 1e-9)])


def named(name):
    return next(one for one in all_claims() if one.name == name)


def test_a_number_holds_fails_or_is_open_by_two_standard_errors():
    assert close("x", 1.0, 1.0, 0.1).holds is True
    assert close("x", 1.0, 1.0, 0.1, error=0.049).holds is True
    assert close("x", 1.0, 1.0, 0.1, error=0.051).holds is None
    assert at_least("x", -1.0, 0.0, error=0.49).holds is False
    assert at_least("x", -1.0, 0.0, error=0.51).holds is None
    assert at_most("x", -1.0, 0.0, error=0.49).holds is True
    assert at_most("x", math.nan, 0.0).holds is None
    assert at_most("x", 0.0, 1.0, error=math.inf).holds is None


def test_the_verdict_is_that_of_the_worst_number():
    good, bad, open_ = close("x", 0.0, 0.0, 1.0), close("x", 2.0, 0.0, 1.0), close("x", 0.0, 0.0, 1.0, error=9.0)
    universal = replace(ONE, universal=True)
    assert ONE.verdict([good, good]) == REPRODUCED
    assert (ONE.verdict([good, bad, open_]), universal.verdict([good, bad, open_])) == (DIFFERS, REFUTED)
    assert ONE.verdict([good, open_]) == UNDECIDED
    assert ONE.verdict([]) == UNDECIDED


def test_names_are_unique_and_every_claim_runs_or_says_why_not():
    claims = all_claims()
    assert len({one.name for one in claims}) == len(claims) >= 60
    assert {one.name for one in claims if one.run is None} == {one.name for one in claims if one.reason}
    with pytest.raises(ValueError, match="expected either a run or a reason"):
        replace(ONE, reason="and a reason")
    assert {one.paper for one in chosen_claims("LUCAS")} == {"Lucas et al. 2019"}
    with pytest.raises(ValueError, match="expected part of a claim's name, paper or sentence, got 'elephant'"):
        chosen_claims("elephant")


@pytest.mark.parametrize("name", QUICK)
def test_quick_claims_are_decided_and_each_of_their_numbers_can_fail(name):
    one = named(name)
    measured = list(one.run(Settings()))
    assert one.verdict(measured) == REPRODUCED
    for i, number in enumerate(measured):
        assert number.holds
        ends = [end for end in (number.lower, number.upper) if math.isfinite(end)]
        assert ends, f"{number.name} cannot fail"
        for end in ends:
            step = 1.0 + 3 * number.error
            planted = replace(number, value=end + step if end == number.upper else end - step)
            assert one.verdict([*measured[:i], planted, *measured[i + 1 :]]) == (REFUTED if one.universal else DIFFERS)


def test_a_planted_error_in_what_is_run_is_seen(monkeypatch):
    from zoo.claims import lucas_linear

    right = lucas_linear.collapse_threshold
    monkeypatch.setattr(lucas_linear, "collapse_threshold", lambda *a, **k: 1.001 * right(*a, **k))
    one = named("lucas-collapsed-column")
    assert one.verdict(one.run(Settings())) == REFUTED


@pytest.mark.parametrize(
    "name", ["alemi-information-bounds", pytest.param("fyffe-optimal-decoder", marks=pytest.mark.slow)]
)
def test_an_error_of_one_percent_is_seen(name, monkeypatch):
    from zoo.claims import alemi_exact, fyffe_codes

    right, decoder = alemi_exact.channel_terms, fyffe_codes.OptimalDecoder

    def understated(*args):
        terms = right(*args)
        return terms._replace(rate=0.99 * terms.rate)

    class Brighter(decoder):
        def __call__(self, z):
            return 1.01 * super().__call__(z)

    monkeypatch.setattr(alemi_exact, "channel_terms", understated)
    monkeypatch.setattr(fyffe_codes, "OptimalDecoder", Brighter)
    assert named(name).verdict(named(name).run(Settings())) == REFUTED


def test_results_are_kept_and_those_of_other_settings_are_not_taken(tmp_path):
    calls = []

    def run(settings):
        calls.append(settings)
        return [close("two", 2.0, 2.0, 1e-9)]

    one = replace(ONE, run=run)
    first = run_claims([one], Settings(), tmp_path, progress=False)
    again = run_claims([one], Settings(fast=True), tmp_path, progress=False)
    assert (len(calls), first[0].measured) == (1, again[0].measured)
    assert first[0].seconds == again[0].seconds
    run_claims([one], Settings(seed=1), tmp_path, progress=False)
    run_claims([one], Settings(seed=1), tmp_path, again=True, progress=False)
    assert len(calls) == 3
    (tmp_path / "one.json").write_text("{")  # damaged
    run_claims([one], Settings(seed=1), tmp_path, progress=False)
    assert len(calls) == 4


def test_a_stored_result_depends_on_code_and_not_on_sentences(monkeypatch):
    one, source = named("alemi-tight-bounds"), {}
    monkeypatch.setattr("inspect.getsource", lambda _: source["text"])
    marks = []
    for text in ("@claim('a')\ndef f(): return 1", "@claim('b')\ndef f(): return 1  # one", "def f(): return 2"):
        source["text"] = text
        marks.append(fingerprint(one, Settings()))
    assert marks[0] == marks[1] != marks[2]


def test_a_run_that_fails_or_is_interrupted_leaves_the_others(tmp_path):
    def fail(_):
        raise ValueError("no such thing")

    def stop(_):
        raise KeyboardInterrupt

    claims = [
        replace(ONE, name=name, run=run) for name, run in (("a", fail), ("b", ONE.run), ("c", stop), ("d", ONE.run))
    ]
    rows = run_claims(claims, Settings(), tmp_path, progress=False)
    assert [row.verdict for row in rows] == [UNDECIDED, REPRODUCED, UNDECIDED, UNDECIDED]
    assert rows[0].note == "the run failed: ValueError: no such thing"
    assert rows[2].note == rows[3].note == "not run yet"
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_an_interrupted_command_writes_its_page_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    claims = [ONE, replace(ONE, name="two", run=stop)]
    monkeypatch.setattr("zoo.command_line.commands.chosen_claims", lambda _: claims)
    assert main(["reproduce", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert "1 of 2 claims are decided" in (tmp_path / "claims.md").read_text()
    claims[1] = replace(ONE, name="two")
    assert main(["reproduce", "--out", str(tmp_path)]) == 0
    assert "2 of 2 claims are decided" in capsys.readouterr().out


def test_the_page_has_a_row_a_claim_with_number_verdict_and_command(tmp_path):
    slow = replace(ONE, name="slow", slow=True, sentence="a | b")
    rows = run_claims([ONE, slow, replace(ONE, name="none", run=None, reason="no data")], Settings(fast=True), tmp_path)
    text = markdown(rows, Settings(fast=True))
    assert "1 of 3 claims are decided: 1 reproduced, 0 differs, 0 refuted, 2 not decided." in text
    assert (
        "| Two is two | not recoverable | two 2 [2 ± 1.0e-09] | **reproduced** | `elbozoo reproduce --only one` |"
        in text
    )
    assert "| a \\| b | not recoverable | left out by --fast | **not decided** |" in text
    assert "no data" in text
    assert "<td>reproduced</td>" in as_html(rows, Settings())
    assert shown(Measured(name="x", value=3.0, error=0.25, lower=2.0)) == "x 3 ± 0.25 [≥ 2]"
    assert shown(Measured(name="x", value=1.0, upper=0.5)) == "x 1 [≤ 0.5] (outside)"
    assert "claims are decided" in verdict_counts(rows)


def test_the_command_runs_writes_and_goes_on(tmp_path, capsys):
    words = ["reproduce", "--only", "alemi-tight-bounds", "--out", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "alemi-tight-bounds  reproduced" in printed
    assert "1 of 1 claims are decided" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "claims.md", "claims.html"}
    stored = json.loads((tmp_path / "rows" / "alemi-tight-bounds.json").read_text())
    assert stored["measured"][0]["value"] < 1e-10
    assert main(["reproduce", "--only", "elephant", "--out", str(tmp_path)]) == 1


def test_a_figure_is_drawn_kept_and_shown_on_both_pages(tmp_path):
    one = named("lucas-against-latent-dim")
    rows = run_claims([one], Settings(), tmp_path / "rows", progress=False)
    figure = tmp_path / "figures" / "lucas-against-latent-dim.png"
    assert rows[0].figure == figure
    learnt, fixed = FIGURES[one.name](Settings()).axes[0].lines[::2]
    assert learnt.get_ydata()[-1] - fixed.get_ydata()[-1] > 1  # at K = 60
    assert "](figures/lucas-against-latent-dim.png)" in markdown(rows, Settings())
    assert 'src="data:image/png;base64,' in as_html(rows, Settings())
    made = figure.stat().st_mtime_ns
    run_claims([one], Settings(), tmp_path / "rows", progress=False)
    assert figure.stat().st_mtime_ns == made
    run_claims([one], Settings(seed=1), tmp_path / "rows", progress=False)
    assert figure.stat().st_mtime_ns > made


def test_the_committed_page_shows_every_figure_of_a_claim():
    assert set(FIGURES) <= {one.name for one in all_claims()}
    for name in FIGURES:
        assert f"](figures/{name}.png)" in PAGE.read_text()
        assert (PAGE.parent / "figures" / f"{name}.png").exists()


def test_the_optimal_decoder_is_drawn_along_both_codes():
    shown = [ax.images[0].get_array() for ax in FIGURES["fyffe-smooth-decoder"](Settings()).axes]
    assert len(shown) == 22
    steps = [abs(b - a).max() for row in (shown[:11], shown[11:]) for a, b in pairwise(row)]
    assert 0 < max(steps) < 1  # pixels from zero to one, and no jump


def test_the_committed_page_has_every_claim_and_its_own_counts():
    text = PAGE.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "**" in line]
    assert len(rows) == len(all_claims())
    for one in all_claims():
        assert one.run is None or f"--only {one.name}" in text
    counts = {verdict: sum(f"**{verdict}**" in row for row in rows) for verdict in VERDICTS}
    assert ", ".join(f"{number} {verdict}" for verdict, number in counts.items()) in text
    for name in QUICK:
        assert "**reproduced**" in next(row for row in rows if f"--only {name}`" in row)
