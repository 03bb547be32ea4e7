"""The page of claims, as Markdown and as HTML: one table a paper, one row a claim."""

from __future__ import annotations

import html
import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from inference.core.display import embedded, html_page
from inference.core.release import __version__
from zoo.claims.claim import UNDECIDED, VERDICTS, Measured, Settings
from zoo.claims.running import Row

_HEADS = ("claim", "paper", "found here", "verdict", "command", "s")
_INTRODUCTION = """Each row is a claim, or an experiment, of one of four papers, and a command that decides it here. The
verdict is computed from the numbers of the run: *reproduced* if every number is where the claim needs it, by two
standard errors where it has one; *refuted* if the claim is about all models of a kind and a number is outside;
*differs* if the claim is an observation and a number is outside; *not decided* otherwise. Of a claim about all models,
*reproduced* means that it held in every case that was run. The bracket behind a number is the interval that the claim
needs. Where the paper's data or networks were others, the claim's direction is tested,
never its numbers."""


def markdown(rows: Sequence[Row], settings: Settings) -> str:
    """The page as Markdown."""
    lines = ["# Claims of the papers", "", _INTRODUCTION, "", verdict_counts(rows), "", _produced(settings), ""]
    for paper in dict.fromkeys(row.claim.paper for row in rows):
        lines += [f"## {paper}", "", _line(_HEADS), _line(["---"] * len(_HEADS))]
        lines += [_line(_marked_up(cells(row, settings))) for row in rows if row.claim.paper == paper]
        lines.append("")
        for sentence, path in _figures(rows, paper):
            lines += [f"![{sentence}](figures/{path.name})", "", f"*{_escaped(sentence)}.*", ""]
    return "\n".join(lines)


def as_html(rows: Sequence[Row], settings: Settings) -> str:
    """The page as one HTML file."""
    paragraphs = (_INTRODUCTION.replace("*", ""), verdict_counts(rows), _produced(settings).replace("`", ""))
    body = [*(f"<p>{html.escape(text)}</p>" for text in paragraphs)]
    for paper in dict.fromkeys(row.claim.paper for row in rows):
        body += [f"<h2>{html.escape(paper)}</h2>", "<table>", _html_line(_HEADS, "th")]
        body += [_html_line(cells(row, settings), "td") for row in rows if row.claim.paper == paper]
        body.append("</table>")
        body += [embedded(name, path.read_bytes()) for name, path in _figures(rows, paper)]
    return html_page("Claims of the papers", "\n".join(body))


def _figures(rows: Sequence[Row], paper: str) -> list[tuple[str, Path]]:
    """Sentence and figure of each claim of a paper that has one."""
    return [(row.claim.sentence, row.figure) for row in rows if row.claim.paper == paper and row.figure is not None]


def verdict_counts(rows: Sequence[Row]) -> str:
    """How many rows have which verdict."""
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    decided = len(rows) - counts[UNDECIDED]
    parts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return f"{decided} of {len(rows)} claims are decided: {parts}."


def command(row: Row, settings: Settings) -> str:
    """What runs this row alone."""
    words = ["elbozoo reproduce --only", row.claim.name]
    if settings.paper_scale:
        words.append("--paper-scale")
    if row.claim.needs_mnist:
        words.append("--mnist PATH")
    if settings.seed:
        words.append(f"--seed {settings.seed}")
    return " ".join(words)


def cells(row: Row, settings: Settings) -> list[str]:
    """The cells of a row, as plain text."""
    found = "; ".join(shown(one) for one in row.measured) or row.note
    seconds = "" if math.isnan(row.seconds) else f"{row.seconds:.1f}"
    ran = command(row, settings) if row.claim.run is not None else ""
    return [row.claim.sentence, row.claim.paper_number, found, row.verdict, ran, seconds]


def shown(one: Measured) -> str:
    """A number with its error and the interval that the claim needs."""
    mark = {True: "", False: " (outside)", None: " (open)"}[one.holds]
    error = f" ± {one.error:.2g}" if one.error else ""
    return f"{one.name} {_number(one.value)}{error} [{_interval(one)}]{mark}"


def _interval(one: Measured) -> str:
    if math.isinf(one.lower):
        return f"≤ {_number(one.upper)}"
    if math.isinf(one.upper):
        return f"≥ {_number(one.lower)}"
    return f"{_number((one.lower + one.upper) / 2)} ± {_number((one.upper - one.lower) / 2)}"


def _number(value: float) -> str:
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.6g}"


def _produced(settings: Settings) -> str:
    words = ["elbozoo reproduce"]
    words += ["--fast"] if settings.fast else []
    words += ["--paper-scale"] if settings.paper_scale else []
    words += ["--mnist PATH"] if settings.mnist else []
    made = f"elbozoo {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    seconds = "Seconds are those of one core; of a run that several rows share, the first row has them."
    return f"Made by `{' '.join(words)}`, seed {settings.seed}, {made}. {seconds}"


def _marked_up(texts: Sequence[str]) -> list[str]:
    """The cells of a row as Markdown."""
    *plain, verdict, ran, seconds = texts
    return [*map(_escaped, plain), f"**{verdict}**", f"`{ran}`" if ran else "", seconds]


def _escaped(text: str) -> str:
    return re.sub(r"([*|])", r"\\\1", text).replace("\n", " ")


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _html_line(texts: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"
