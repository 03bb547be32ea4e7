"""Running claims: each result is stored as it comes, and found again by the next call with the same settings."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from inference.core.figures import save_figure
from inference.core.files import atomic_path
from inference.core.release import __version__
from zoo.claims.claim import Claim, Measured, Settings
from zoo.claims.figures import FIGURES

NOT_REACHED = "not run yet"  # before an interruption


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a claim.

    Attributes:
        claim: The claim.
        measured: The numbers of its run; none where it was not run.
        seconds: What the run took.
        note: Why there is no number.
        figure: The file of its figure, where it has one.
    """

    claim: Claim
    measured: tuple[Measured, ...] = ()
    seconds: float = math.nan
    note: str = ""
    figure: Path | None = None

    @property
    def verdict(self) -> str:
        """From the numbers."""
        return self.claim.verdict(self.measured)


def run_claims(
    claims: Sequence[Claim], settings: Settings, folder: Path, *, again: bool = False, progress: bool = True
) -> list[Row]:
    """Run claims one after the other; an interruption keeps what is done.

    Args:
        claims: The claims.
        settings: How much is run.
        folder: Where the result of each is kept, and taken from where it is there for the same settings and code.
        again: Run what is there, too.
        progress: Show a progress bar.

    Returns:
        A row for each claim; after an interruption, those not reached say so.
    """
    rows: list[Row] = []
    bar = tqdm(claims, disable=not progress, desc="claims", unit="claim")
    try:
        for one in bar:
            bar.set_postfix_str(one.name)
            rows.append(_row(one, settings, folder, again))
    except KeyboardInterrupt:
        bar.close()
    left = claims[len(rows) :]
    return rows + [Row(claim=one, note=one.excuse(settings) or NOT_REACHED) for one in left]


def _row(one: Claim, settings: Settings, folder: Path, again: bool) -> Row:
    if note := one.excuse(settings):
        return Row(claim=one, note=note)
    path, figure = folder / f"{one.name}.json", folder.parent / "figures" / f"{one.name}.png"
    mark = fingerprint(one, settings)
    stored = None if again else _load(path, mark)
    if stored is None:
        try:
            stored = _run(one, settings, mark)
        except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            return Row(claim=one, note=f"the run failed: {type(error).__name__}: {error}")
        figure.unlink(missing_ok=True)  # of another run
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(stored, indent=1) + "\n")
    return Row(
        claim=one,
        measured=tuple(Measured(**m) for m in stored["measured"]),
        seconds=stored["seconds"],
        figure=_drawn(one, settings, figure),
    )


def _drawn(one: Claim, settings: Settings, path: Path) -> Path | None:
    """The file of the claim's figure, drawn unless it is there."""
    if one.name not in FIGURES:
        return None
    if not path.exists():
        save_figure(FIGURES[one.name](settings), path)
    return path


def _run(one: Claim, settings: Settings, mark: str) -> dict:
    assert one.run is not None
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        measured = [asdict(m) for m in one.run(settings)]
    return {"fingerprint": mark, "seconds": round(time.perf_counter() - start, 1), "measured": measured}


def fingerprint(one: Claim, settings: Settings) -> str:
    """Settings, version, and the code of the run's module: changes of other code are not seen, hence ``--again``."""
    module = ast.parse(inspect.getsource(inspect.getmodule(one.run) or one.run))  # type: ignore[arg-type]
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []  # the sentence of a claim, and the paper's number
    mnist = str(settings.mnist) if one.needs_mnist else ""
    parts = (one.name, str(settings.paper_scale), str(settings.seed), mnist, __version__, ast.dump(module))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _load(path: Path, mark: str) -> dict | None:
    """The stored result, unless it is another one's."""
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return stored if isinstance(stored, dict) and stored.get("fingerprint") == mark else None
