"""Does every method keep its word? Coverage on problems freshly drawn.

Each problem has a truth by independent means. A cell is a method on a family of problems: without a guide and with
good, biased and too narrow ones, in equal parts where the method takes a guide. For each cell the table holds the
share answered two-sided, the coverage of two-sided and of one-sided intervals, the median width and the worst error
of the two-sided ones, and seconds a problem. A cell fails where the one-sided 99.9 % binomial limit of a coverage
lies below the level, or where fewer are answered two-sided than its floor asks. Finished batches are kept in the
folder; called again, the same command goes on.

    OMP_NUM_THREADS=1 python examples/benchmarks/coverage.py --seed 0
"""

from __future__ import annotations

import argparse
import os
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
from drawn_problems import FAMILIES, GUIDES, Drawn
from timing import parse_with_smoke
from tqdm.auto import tqdm

from inference import Annealed, evidence

LEVEL, SURE, POOLED = 0.95, 0.999, 0.93

# Truths and answers are rounded, relative to their size and in nats.
ROUNDING = 1e-7

# Method: guides that it takes, most latent dimensions, and whether it is slow.
METHODS: dict[str, tuple[tuple[str, ...], float, bool]] = {
    "auto": (GUIDES, np.inf, False),
    "quadrature": (("none", "biased"), 3, False),
    "adaptive": (GUIDES, np.inf, False),
    "bridge": (GUIDES, np.inf, False),
    "importance": (GUIDES[1:], np.inf, False),
    "smoothed": (GUIDES[1:], np.inf, False),
    "defensive": (GUIDES[1:], np.inf, False),
    "annealed": (GUIDES, np.inf, True),
}
LIKELY = ("auto", "adaptive", "bridge")
SMOKE = {
    "problems": 16,
    "slow_problems": 8,
    "batch": 8,
    "methods": ["auto", "adaptive", "importance"],
    "families": ["linear K=1", "fold", "counts"],
}


def floor(method: str, family: str) -> float:
    """The least share that has to be answered two-sided."""
    if family.startswith("linear") and method in LIKELY:
        return 0.99
    dim = FAMILIES[family][0]
    return 0.95 if method == "auto" and dim is not None and dim <= 2 else 0.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=Path("out") / "coverage", help="folder of the finished batches")
    parser.add_argument("--seed", type=int, default=0, help="of problems and methods")
    parser.add_argument("--problems", type=int, default=400, help="of each cell")
    parser.add_argument("--slow-problems", type=int, default=100, help="of each cell of annealing")
    parser.add_argument("--batch", type=int, default=25, help="problems estimated together")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--table-only", action="store_true", help="print the table of what there is")
    return parse_with_smoke(parser, argv, SMOKE)


def _seed(*parts: int | str) -> int:
    """A seed of its own for each batch and method."""
    numbers = [part if isinstance(part, int) else zlib.crc32(part.encode()) for part in parts]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@cache
def _drawn(family: str, seed: int, batch: int, num: int) -> Drawn:
    """The problems of a batch: the same for every method."""
    return FAMILIES[family][1](np.random.default_rng(_seed(family, seed, batch)), num)


def measure(family: str, method: str, seed: int, batch: int, num: int) -> pd.DataFrame:
    """What a method says of one batch of problems, a row for each."""
    guides, _, slow = METHODS[method]
    guide = guides[batch % len(guides)]
    problems = _drawn(family, seed, batch, num)
    chosen = Annealed(num_temperatures=300, num_chains=100) if slow else method
    options = {"guide": problems.guides.get(guide), "seed": _seed(family, seed, batch, method), "progress": False}
    begin = time.perf_counter()
    found = evidence(problems.model, *problems.args, method=chosen, level=LEVEL, **options)
    seconds = (time.perf_counter() - begin) / num
    columns = {"truth": problems.truth, "value": found.value, "lower": found.lower, "upper": found.upper}
    table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
    return table.assign(guarantee=found.guarantee, seconds=seconds, guide=guide, batch=batch)


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """(family, method, batch) in an order in which all cells grow alike."""
    longest = -(-max(args.problems, args.slow_problems) // args.batch)
    for batch in range(longest):
        for family in args.families:
            for method in args.methods:
                _, most, slow = METHODS[method]
                wanted = args.slow_problems if slow else args.problems
                dim = FAMILIES[family][0]
                if batch * args.batch < wanted and (most == np.inf or (dim is not None and dim <= most)):
                    yield family, method, batch


def fill(args: argparse.Namespace) -> None:
    """Make the batches that are not there yet, each a file."""
    todo = [cell for cell in cells(args) if not path(args, *cell).exists()]
    for family, method, batch in tqdm(todo, desc="coverage", unit="batch"):
        target = path(args, family, method, batch)
        table = measure(family, method, args.seed, batch, args.batch)
        target.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(target.with_suffix(".part"), index=False)
        os.replace(target.with_suffix(".part"), target)
        if method == args.methods[-1]:
            _drawn.cache_clear()


def path(args: argparse.Namespace, family: str, method: str, batch: int) -> Path:
    """The file of a batch: its name says all that its numbers depend on, but the version of the package."""
    name = family.replace(" ", "_").replace("=", "")
    return args.out / f"seed{args.seed}-of-{args.batch}" / f"{name}-{method}-{batch:03d}.csv"


def collect(args: argparse.Namespace) -> pd.DataFrame:
    """All rows that there are of the chosen cells."""
    there = [(family, method, path(args, family, method, batch)) for family, method, batch in cells(args)]
    parts = [pd.read_csv(p).assign(family=family, method=method) for family, method, p in there if p.exists()]
    rows = pd.concat(parts, ignore_index=True)
    slack = ROUNDING * (1 + rows.truth.abs())
    rows["two_sided"] = np.isfinite(rows.lower) & np.isfinite(rows.upper)
    rows["holds"] = (rows.lower <= rows.truth + slack) & (rows.truth <= rows.upper + slack)
    rows["error"], rows["width"] = (rows.value - rows.truth).abs(), rows.upper - rows.lower
    return rows


def fails(held: int, of: int) -> bool:
    """Whether the one-sided 99.9 % upper limit of a coverage (Clopper and Pearson) lies below the level."""
    return of > held and scipy.stats.beta.ppf(SURE, held + 1, of - held) < LEVEL


def summary(rows: pd.DataFrame, least: float = 0.0) -> dict[str, float | int | str]:
    """One line of the table."""
    two, one = rows[rows.two_sided], rows[~rows.two_sided]
    verdicts = {
        "two-sided": fails(int(two.holds.sum()), len(two)),
        "one-sided": fails(int(one.holds.sum()), len(one)),
        "silent": fails_floor(len(two), len(rows), least),
    }
    return {
        "problems": len(rows),
        "two-sided": len(two) / len(rows),
        "cover": two.holds.mean(),
        "one-sided cover": one.holds.mean(),
        "width": two.width.median(),
        "worst": two.error.max(),
        "s": rows.seconds.mean(),
        "fails": ", ".join(name for name, wrong in verdicts.items() if wrong),
    }


def fails_floor(answered: int, of: int, least: float) -> bool:
    """Whether fewer are answered two-sided than the floor asks."""
    return answered < least * of


def table(rows: pd.DataFrame, by: list[str], floors: bool = False) -> pd.DataFrame:
    """The summaries of groups of rows."""
    lines = {}
    for key, part in rows.groupby(by, sort=False):
        least = floor(part.method.iloc[0], part.family.iloc[0]) if floors else 0.0
        lines[" | ".join(key)] = summary(part, least)
    return pd.DataFrame.from_dict(lines, orient="index")


FORMATS = {
    **dict.fromkeys(("two-sided", "cover", "one-sided cover"), "{:.3f}".format),
    **dict.fromkeys(("width", "worst", "s"), "{:.2g}".format),
}


def show(found: pd.DataFrame, name: str) -> None:
    """Print a table in Markdown."""
    columns = list(found.columns)
    print(f"\n| {name} | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for key, line in found.iterrows():
        cells = [FORMATS.get(c, str)(v) if v == v else "-" for c, v in line.items()]
        print(f"| {str(key).replace(' | ', ', ')} | " + " | ".join(cells) + " |")


def main(argv: list[str] | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fill the cells, print the tables, and say what fails.

    Returns:
        The tables by cell and by method.
    """
    args = parse(argv)
    if not args.table_only:
        fill(args)
    rows = collect(args)
    by_cell, by_method = table(rows, ["method", "family"], floors=True), table(rows, ["method"])
    show(by_cell, "cell")
    show(table(rows, ["method", "guide"]), "guide")
    show(by_method, "method")
    by_cell.to_csv(args.out / "coverage.csv")
    low = [name for name, cover in by_method.cover.items() if cover < POOLED]
    wrong = [name for name, text in by_cell.fails.items() if text]
    print(f"\n{len(rows)} problems; {len(wrong)} of {len(by_cell)} cells fail: {'; '.join(wrong) or 'none'}")
    print(f"\npooled two-sided coverage below {POOLED}: {', '.join(low) or 'of no method'}")
    return by_cell, by_method


if __name__ == "__main__":
    main()
