"""All benchmarks that print times, one after the other: a text file each, and a figure where there are ratios.

Each file begins with the hardware and its load before and after, for on a busy machine ratios alone say something, and
they little. ``--device cuda`` runs those that need a GPU, in a few minutes; the others compare work on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
# Files by their names: script and options. Those on a GPU take few turns, so that all end within minutes.
CPU = {
    "training": ["svi_step.py"],
    "log_weights": ["log_weights.py"],
    "annealing": ["annealing.py"],
    "evidence_methods": ["evidence_methods.py"],
    "exponents": ["exponents.py"],
    "ppca_one_thread": ["ppca_fit.py", "--threads", "1"],
    "ppca_two_threads": ["ppca_fit.py", "--threads", "2"],
    "ima_contrast": ["ima_contrast.py"],
}
CUDA = {"training": ["svi_step.py", "--device", "cuda", "--repeats", "3", "--steps", "500", "--many-steps", "500"]}
_ROW = re.compile(r"^(.{46})\s*(\d+\.\d+)\s+(\d+\.\d+) \((\d+\.\d+)\.\.(\d+\.\d+)\)$")


@dataclass
class Table:
    """A table of :func:`timing.report` with one peer: name, median ratio and its range, of each row."""

    title: str
    peer: str
    rows: list[tuple[str, float, float, float]] = field(default_factory=list)


def tables_in(text: str) -> list[Table]:
    """The tables of ratios in what a benchmark prints."""
    found, lines = list[Table](), text.splitlines()
    for title, line in zip(["", *lines], lines, strict=False):
        if head := re.fullmatch(r"\s{46}\s*ms\s+/ (.+)", line):
            found.append(Table(title, head[1]))
        elif found and (row := _ROW.match(line)):
            found[-1].rows.append((row[1].strip(), *(float(row[i]) for i in (3, 4, 5))))
    return [table for table in found if table.rows]


def draw(tables: list[Table], path: Path) -> None:
    """Ratios as bars, with their range over rounds; a panel for each table."""
    height = sum(len(table.rows) for table in tables)
    figure = Figure(figsize=(9, 1 + 0.3 * height + 0.6 * len(tables)), layout="constrained")
    heights = [len(table.rows) for table in tables]
    axes = figure.subplots(len(tables), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for ax, table in zip(axes, tables, strict=True):
        names, middles, lows, highs = zip(*table.rows, strict=True)
        errors = [[m - low for m, low in zip(middles, lows, strict=True)]]
        errors += [[high - m for m, high in zip(middles, highs, strict=True)]]
        ax.barh(names, middles, xerr=errors, color="tab:blue", error_kw={"linewidth": 0.8})
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.invert_yaxis()
        ax.set_title(table.title, fontsize="medium")
        ax.set_xlabel(f"time / {table.peer}")
    figure.savefig(path, dpi=150)


def hardware(device: str) -> str:
    """One line about the processor, or the GPU, and the software."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, Python {sys.version.split()[0]}"


def _cpuinfo() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().splitlines()
    return []


def load() -> str:
    """The mean number of processes that ran in the last minute, where the system tells."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def run(name: str, command: list[str], args: argparse.Namespace) -> None:
    """Run one benchmark and write its files."""
    before, start = load(), time.perf_counter()
    smoke = ["--smoke"] if args.smoke else []
    done = subprocess.run(
        [sys.executable, command[0], *command[1:], *smoke], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    head = f"{hardware(args.device)}\nload {before} before, {load()} after; {seconds:.0f} s; {' '.join(command)}\n\n"
    failed = f"\nfailed with code {done.returncode}:\n{done.stderr[-2000:]}" if done.returncode else ""
    (args.out / f"{name}.txt").write_text(head + done.stdout + failed)
    if tables := tables_in(done.stdout):
        draw(tables, args.out / f"{name}.png")
    print(f"{name}: {'failed, ' if failed else ''}{seconds:.0f} s, {args.out / name}.txt", flush=True)
    if failed:
        args.failed.append(name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")
    parser.add_argument("--out", type=Path, default=Path("out") / "benchmarks", help="folder of the tables and figures")
    parser.add_argument("--smoke", action="store_true", help="tiny settings, which show whether all run")
    parser.add_argument("--only", nargs="+", help="names of some, as 'log_weights'")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device for --device cuda, found none")
    args.out.mkdir(parents=True, exist_ok=True)
    args.failed = []
    for name, command in (CUDA if args.device == "cuda" else CPU).items():
        if args.only is None or name in args.only:
            run(name, command, args)
    if args.failed:
        raise SystemExit(f"failed: {', '.join(args.failed)}")


if __name__ == "__main__":
    main()
