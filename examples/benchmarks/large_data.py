"""Start, memory and cost of training, evidence, gap and compare against the number of rows, on one rank and on two.

Run: python examples/benchmarks/large_data.py [--rows 1000 10000 100000 1000000] [--ranks 1 2] [--gigabytes 4]

The data are memory-mapped files of float32 with 784 columns, of a gap 8, of a comparison 256; "in memory" are arrays
of the same numbers, and "to a file" is with a checkpoint, whose files hold the results. Each number comes from a fresh
process, or as many as there are ranks, started by torchrun; its memory is the most that is not a file's, in MB, above
what it was before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import machine, parse_with_smoke

from guides import FullRank, MeanField
from inference import AnalyticKLELBO, Callback, Importance, compare, evidence, fit, gap
from zoo import DeepGaussianVAE, LinearVAE

SMOKE = {"rows": [300, 600], "ranks": [1], "gigabytes": 0.002, "steps": 2, "samples": 2}
SMOKE |= {"gap_rows": [10, 20], "compare_rows": [100, 200]}
DIM, LATENT, BATCH, BLOCK = 784, 8, 256, 2048
GAP_DIM, COMPARE_DIM = 8, 256


class Memory:
    """The most anonymous memory of this process while the block runs, above what it was before, in MB (Linux)."""

    def __enter__(self):
        self.before = self.peak = self._now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.used = (self.peak - self.before) / 2**10

    def _watch(self):
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, self._now())

    def _now(self):
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


class Clock(Callback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step(self, _):
        self.ends.append(time.perf_counter())


def make_file(folder, rows, dim=DIM):
    path = Path(folder) / f"{rows}_{dim}.npy"
    if not path.exists():
        x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dim))
        rng = np.random.default_rng(0)
        for start in range(0, rows, 8192):
            part = x[start : start + 8192]
            part[:] = rng.standard_normal(part.shape, np.float32)
    return path


def pair():
    torch.manual_seed(0)
    return LinearVAE(DIM, LATENT), MeanField(DIM, LATENT, hidden=(64,))


def start(x, _):
    """Seconds and memory until the first step has ended, of which the step itself is the same for any data."""
    clock, begun = Clock(), time.perf_counter()
    fit(*pair(), x, steps=1, batch_size=BATCH, objective=AnalyticKLELBO(), callbacks=[clock], seed=0, progress=False)
    return clock.ends[0] - begun


def train(x, steps):
    begun = time.perf_counter()
    fit(*pair(), x, steps=steps, batch_size=BATCH, objective=AnalyticKLELBO(), seed=0, progress=False)
    return time.perf_counter() - begun


def measure(x, samples, **options):
    model, guide = pair()
    begun = time.perf_counter()
    evidence(model, x, method=Importance(samples), guide=guide, block=BLOCK, seed=0, progress=False, **options)
    return time.perf_counter() - begun


def save(x, _):
    """Seconds of a step with a checkpoint, less those of one without: medians of twenty each, that take turns."""
    clock = Clock()
    options = {"objective": AnalyticKLELBO(), "batch_size": BATCH, "callbacks": [clock], "seed": 0, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        fit(*pair(), x, steps=43, checkpoint=Path(folder) / "run", checkpoint_every=2, **options)
    spans = np.diff(clock.ends)[2:]
    return abs(float(np.median(spans[::2]) - np.median(spans[1::2])))


def in_files(measured, x, samples):
    """Seconds with a checkpoint, whose files hold the rows."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(x, samples, checkpoint=Path(folder) / "rows")


def split(x, samples, **options):
    """Seconds of a gap with its parts, at few steps and samples."""
    torch.manual_seed(0)
    model, guide = DeepGaussianVAE(GAP_DIM, 2, hidden=(16,)), MeanField(GAP_DIM, 2, hidden=(16,))
    few = {"method": Importance(16), "num_samples": max(2, samples), "restarts": 0, "max_steps": 20}
    begun = time.perf_counter()
    gap(model, guide, x, seed=0, progress=False, **few, **options)
    return time.perf_counter() - begun


def tabulate(x, samples, **options):
    torch.manual_seed(0)
    guides = {"diagonal": MeanField(COMPARE_DIM, 4, hidden=(32,)), "full": FullRank(COMPARE_DIM, 4, hidden=(32,))}
    begun = time.perf_counter()
    options |= {"num_samples": max(2, samples), "seed": 0, "progress": False}
    compare(DeepGaussianVAE(COMPARE_DIM, 4), guides, x, **options)
    return time.perf_counter() - begun


CASES = {
    "start": start,
    "start in memory": start,
    "checkpoint": save,
    "train": train,
    "evidence": measure,
    "evidence to a file": partial(in_files, measure),
}
BY_ROWS = {"gap": split, "compare": tabulate}
BY_ROWS |= {f"{name} to a file": partial(in_files, door) for name, door in BY_ROWS.items()}


def run_case(options):
    """One case in this process; the first rank prints its numbers."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])  # its first use imports the compiler
    ranked = "RANK" in os.environ
    if ranked:
        torch.distributed.init_process_group("gloo")
    x = np.load(options.file, mmap_mode=None if options.case.endswith("in memory") else "r")
    door = (CASES | BY_ROWS)[options.case]
    door(x[:512], 1)  # what is imported and found out on first use
    with Memory() as memory:
        seconds = door(x, options.work)
    if not ranked or torch.distributed.get_rank() == 0:
        print(json.dumps([seconds, memory.used]))
    if ranked:
        torch.distributed.destroy_process_group()


def case(name, path, work, ranks=1):
    """Seconds and MB of one case in a fresh process."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "--case", name, "--file", str(path), "--work", str(work)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(printed.strip().splitlines()[-1])


def exponent(rows, values):
    """Slope of log value against log rows over the last two, NaN where there is one."""
    if len(rows) < 2 or min(values[-2:]) <= 0:
        return math.nan
    return math.log(values[-1] / values[-2]) / math.log(rows[-1] / rows[-2])


def table(title, rows, lines):
    print(f"\n{title}\n{'':34s}" + "".join(f"{n:>12,}" for n in rows) + f"{'exponent':>12s}")
    for name, values in lines.items():
        print(f"{name:34s}" + "".join(f"{v:12.3f}" for v in values) + f"{exponent(rows, values):12.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [1000, 10_000, 100_000, 1_000_000]
    parser.add_argument("--rows", type=int, nargs="*", default=rows, help="of each column")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="for training and evidence")
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the largest file, measured on one rank; 0 leaves it"
    )
    parser.add_argument("--gap-rows", type=int, nargs="*", default=[200, 2000, 20_000], help="of gap, on one rank")
    parser.add_argument("--compare-rows", type=int, nargs="*", default=[2000, 20_000, 200_000], help="of compare")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--samples", type=int, default=4, help="of the evidence, for each row")
    parser.add_argument("--folder", help="where the files go; a temporary one by default")
    for hidden in ("--case", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    options = parse_with_smoke(parser, argv, SMOKE)
    if options.case:
        run_case(options)
        return {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return measured(folder, options)


def measured(folder, options):
    """Prints the tables, and returns seconds and MB by name, for each number of rows."""
    print(machine())
    found = {}
    works = {
        "train": options.steps,
        "evidence": options.samples,
        "evidence to a file": options.samples,
    }
    for name in CASES:
        work = works.get(name, 1)
        for ranks in options.ranks if name in ("train", "evidence") else [1]:
            label = f"{name}, {ranks} rank{'s' if ranks > 1 else ''}"
            found[label] = [case(name, make_file(folder, n), work, ranks) for n in options.rows]
    if options.rows:
        table("seconds by rows", options.rows, {name: [s for s, _ in values] for name, values in found.items()})
        table("MB by rows", options.rows, {name: [m for _, m in values] for name, values in found.items()})
    sizes = {"gap": (options.gap_rows, GAP_DIM, 16), "compare": (options.compare_rows, COMPARE_DIM, options.samples)}
    for name in BY_ROWS:
        rows, dim, work = sizes[name.partition(" ")[0]]
        found[name] = [case(name, make_file(folder, n, dim), work) for n in rows]
        if rows:
            seconds, used = zip(*found[name], strict=True)
            table(f"{name} by rows", rows, {"seconds": seconds, "MB": used})
    if not options.gigabytes:
        return found
    rows = max(1, int(options.gigabytes * 2**30 / DIM / 4))
    path = make_file(folder, rows)
    for name in ("start", "train", "evidence"):
        seconds, used = found[f"{name} of the file"] = case(name, path, works.get(name, 1))
        print(f"{options.gigabytes:g} GB of {rows:,} rows, {name}: {seconds:.2f} s, {used:.0f} MB of memory")
    return found


if __name__ == "__main__":
    main()
