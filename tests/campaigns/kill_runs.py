"""Runs that are killed or interrupted at random moments, and called again: same bits, no unusable file, no lost step.

    python tests/campaigns/kill_runs.py --signal KILL --runs 50 --seed 0
    python tests/campaigns/kill_runs.py --signal INT --runs 50 --seed 0 --doors fit fit_many

Each run of a door is a process of its own, stopped once at a moment that is uniform over the CPU time that the whole
work takes, and called again in another process. Its result must equal that of a run that nobody stopped, bit for bit;
nothing but the files of the result may be left; and after an interrupt the files must hold every step of training and
every block of rows but the one in which it came. The processes are forked (by Linux) from one that has done each work
once, so that none of their time is spent on imports.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.lr_scheduler import ExponentialLR
from tqdm.auto import tqdm

from guides import MeanField
from inference import (
    Adaptive,
    Annealed,
    Importance,
    compare,
    evidence,
    fit,
    fit_best,
    fit_many,
    gap,
    load_comparison,
    save_comparison,
)
from inference.comparison import local_problem
from inference.core.storage import load_tree
from inference.marginal_likelihood.base.checkpoint import Blocks
from zoo import DeepGaussianVAE, LinearVAE

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
QUIET = {"progress": False}
WAIT = 600.0


def pair(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(seed)
    return LinearVAE(4, 2).double(), MeanField(4, 2, hidden=(8,)).double()


def digest(*values: Any) -> str:
    total = hashlib.sha256()
    for value in values:
        total.update(value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return total.hexdigest()


def counting(folder: Path) -> Callable[[Any], torch.optim.Optimizer]:
    """Adam that writes down how many updates it has made in all."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        made, file = (
            torch.optim.Adam(parameters, 1e-2),
            os.open(folder / "updates", os.O_CREAT | os.O_APPEND | os.O_WRONLY),
        )
        made.register_step_post_hook(lambda *_: os.write(file, b"."))
        return made

    return make


def options(folder: Path) -> dict[str, Any]:
    return {
        "steps": 40,
        "seed": 0,
        "optimizer": counting(folder),
        "scheduler": lambda made: ExponentialLR(made, 0.99),
        "batch_size": 16,
        "checkpoint": folder / "run.safetensors",
        "checkpoint_every": 3,
        **QUIET,
    }


def work_fit(folder: Path) -> str:
    halves = pair()
    history = fit(*halves, X, validation=X[:10] + 0.1, evaluate_every=7, **options(folder))
    return digest(history.loss, history.validation, history.best_step, *(p for h in halves for p in h.parameters()))


def work_fit_many(folder: Path) -> str:
    pairs = [pair(i) for i in range(3)]
    history = fit_many(pairs, X, **options(folder))
    return digest(history.loss, *(p for halves in pairs for h in halves for p in h.parameters()))


def work_fit_best(folder: Path) -> str:
    given = options(folder) | {"steps": 15, "seeds": (0, 1), "checkpoint": folder / "seeds"}
    del given["seed"]
    found = fit_best(lambda: (LinearVAE(4, 2).double(), MeanField(4, 2, hidden=(8,)).double()), X, **given)
    return digest(found.elbo, found.seed, *(p for p in found.model.parameters()))


def deep_pair(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(seed)
    return DeepGaussianVAE(4, 2, hidden=(8,)).double(), MeanField(4, 2, hidden=(8,)).double()


def estimate(method: Any) -> Callable[[Path], str]:
    def work(folder: Path) -> str:
        model, guide = deep_pair()
        file = folder / "evidence.safetensors"
        got = evidence(model, X[:24], method=method, guide=guide, block=8, checkpoint=file, seed=0, **QUIET)
        return digest(got.value, got.lower, got.upper, got.standard_error, *got.guarantee, *got.notes)

    return work


def work_gap(folder: Path) -> str:
    """The gap in blocks of eight rows; the files of the evidence and its own."""
    few = {"method": Importance(16, search=False), "num_samples": 16, "restarts": 0, "max_steps": 2, "seed": 0}
    with patch.object(local_problem, "_DRAWS", 16 * 8 * 8):
        found = gap(*deep_pair(), X[:24], checkpoint=folder / "gap.safetensors", **few, **QUIET)
    parts = [vars(found)[name] for name in sorted(vars(found)) if isinstance(vars(found)[name], torch.Tensor)]
    truth = found.evidence
    return digest(*parts, truth.value, truth.lower, truth.upper, *truth.guarantee, *truth.notes)


def work_compare(folder: Path) -> str:
    """Compare, and save over a sound file."""
    model, guide = pair()
    file = folder / "comparison.nc"
    if file.exists():
        load_comparison(file)
    else:
        save_comparison(compare(model, {"one": guide}, X[:8], num_samples=5, seed=1, **QUIET), file)
    found = compare(model, {"one": guide, "two": pair(1)[1]}, X[:16], num_samples=10, block=8, seed=0, **QUIET)
    save_comparison(found, file)
    data = load_comparison(file)["train"].to_dataset()
    return digest(*(torch.from_numpy(data[name].values.copy()) for name in ("elbo", "evidence", "gap")))


def work_table(folder: Path) -> str:
    """Compare two guides of one model and a pair of their own, block by block, to files."""
    guides = {"one": deep_pair()[1], "two": deep_pair(1)[1], "own": pair()}
    given = {"held_out": X[24:], "num_samples": 30, "block": 8, "checkpoint": folder / "table", "seed": 0}
    tree = compare(deep_pair()[0], guides, X[:24], **given, **QUIET)
    parts = [tree[name].to_dataset().drop_vars(["seconds", "memory"]) for name in ("train", "held_out")]
    return digest(*(part[name].values.tolist() for part in parts for name in sorted(part.data_vars)))


WORKS: dict[str, Callable[[Path], str]] = {
    "fit": work_fit,
    "fit_many": work_fit_many,
    "fit_best": work_fit_best,
    "importance": estimate(Importance(50)),
    "adaptive": estimate(Adaptive(50)),
    "annealed": estimate(Annealed(num_temperatures=4, num_chains=2)),
    "compare": work_compare,
    "gap": work_gap,
    "table": work_table,
}


def start(door: str, folder: Path) -> int:
    """Fork a process that does the work and writes its digest to a file."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tqdm.set_lock(threading.RLock())  # the bars' own is shared with the children before, which were killed
    try:
        text = WORKS[door](folder)
        (folder / "result").write_text(text)
    except KeyboardInterrupt:
        os._exit(3)
    except BaseException:
        (folder / "error").write_text(traceback.format_exc())
        os._exit(4)
    os._exit(0)


def cpu_time(child: int) -> float:
    """Seconds that a process has computed: by Linux's number of its clock."""
    return time.clock_gettime((~child << 3) | 2)


def stop_at(child: int, moment: float, number: int) -> int:
    """Send a signal to a process that has computed for some seconds, if it still runs, and return its status."""
    end = time.perf_counter() + WAIT
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if cpu_time(child) >= moment:
            break
        time.sleep(0.001)
    os.kill(child, number)
    return os.waitpid(child, 0)[1]


def lost_steps(folder: Path) -> int:
    """Updates and blocks of rows that were made and no file holds, beyond the one in which an interrupt came."""
    updates = folder / "updates"
    made, kept = updates.stat().st_size if updates.exists() else 0, kept_steps(folder)
    updates.write_bytes(b"." * kept)  # those are done again
    return max(made - kept - 1, 0)


def kept_steps(folder: Path) -> int:
    """Updates and blocks of rows that the files hold."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.read_bytes()[8:9] == b"{"]
    trees = [load_tree(file) for file in files]
    return sum(
        len(tree["loss"]) if "loss" in tree else tree["done"].get("columns", tree["done"])["blocks"] for tree in trees
    )


def count_blocks() -> None:
    """Let each block of rows be written down, beside its file, before it is kept there."""
    original = Blocks.add

    def add(self: Any, part: Any) -> None:
        with open(self._path.parent / "updates", "ab") as file:
            file.write(b".")
        original(self, part)

    Blocks.add = add  # type: ignore[method-assign]


def outcome(folder: Path) -> str:
    """The digest that a run came to, or what it leaves or raises in place of it."""
    error = folder / "error"
    if error.exists():
        return error.read_text()
    if not (folder / "result").exists():
        return "neither a result nor an error"
    left = [p for p in folder.rglob(".*") if p.is_file()]
    return f"left {left}" if left else (folder / "result").read_text()


def one_run(door: str, number: int, whole: float, generator: random.Random) -> tuple[str, bool, int]:
    """What a run came to, whether it was stopped before, and the steps that it lost."""
    folder, lost = Path(tempfile.mkdtemp()), 0
    status = stop_at(start(door, folder), generator.uniform(0, whole), number)
    stopped = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 3
    if stopped:
        if number == signal.SIGINT:
            lost = lost_steps(folder)
        (folder / "result").unlink(missing_ok=True)
        stop_at(start(door, folder), WAIT, signal.SIGKILL)
    result = outcome(folder)
    shutil.rmtree(folder)
    return result, stopped, lost


def whole_run(door: str) -> tuple[str, float]:
    """What a run that nobody stops comes to, and its CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    folder = Path(tempfile.mkdtemp())
    os.waitpid(start(door, folder), 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = outcome(folder)
    shutil.rmtree(folder)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def campaign(door: str, number: int, runs: int, generator: random.Random) -> bool:
    """As many stopped runs as are asked for; one that ends before its moment is drawn anew, if it was right."""
    want, whole = whole_run(door)
    stops = lost = other = 0
    for _ in range(4 * runs):
        if stops == runs:
            break
        got, stopped, missing = one_run(door, number, whole, generator)
        stops, lost, other = stops + stopped, lost + missing, other + (got != want)
        if got != want:
            print(f"{door}: {got[-600:]}", flush=True)
    print(f"{door:11s} {stops:3d} stopped: {other} with other bits or unusable, {lost} steps lost", flush=True)
    return other == lost == 0 and stops == runs


def warm_up(doors: list[str]) -> None:
    """Import and compile, once for all children, what the works need."""
    for name in ("scipy.stats", "h5netcdf", "xarray.backends", "sklearn.metrics"):
        importlib.import_module(name)
    for door in doors:
        with tempfile.TemporaryDirectory() as folder:
            WORKS[door](Path(folder))


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--signal", choices=("KILL", "INT"), default="KILL")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doors", nargs="+", choices=WORKS, default=list(WORKS))
    given = parser.parse_args()
    count_blocks()
    warm_up(given.doors)
    generator = random.Random(given.seed)
    number = signal.Signals[f"SIG{given.signal}"]
    held = [campaign(door, number, given.runs, generator) for door in given.doors]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
