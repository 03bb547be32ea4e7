"""Runs that are killed or interrupted at random moments, and called again: same bits, no unusable file, no lost step.

    python tests/campaigns/kill_runs.py --signal KILL --runs 50 --seed 0
    python tests/campaigns/kill_runs.py --signal INT --runs 50 --seed 0 --doors fit fit_many

Each run of a door is a process of its own, stopped once at a moment that is uniform over the time that the
whole work takes, and called again. Its result must equal that of a run that nobody stopped, bit for bit; nothing but
the files of the result may be left; and after an interrupt the file must hold every step but the one in which it came.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import ExponentialLR

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
    load_comparison,
    save_comparison,
)
from inference.core.storage import load_tree
from zoo import DeepGaussianVAE, LinearVAE

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
QUIET = {"progress": False}
STOPS = 1
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


def estimate(method: Any) -> Callable[[Path], str]:
    def work(folder: Path) -> str:
        torch.manual_seed(0)
        model, guide = DeepGaussianVAE(4, 2, hidden=(8,)).double(), MeanField(4, 2, hidden=(8,)).double()
        file = folder / "evidence.safetensors"
        got = evidence(model, X, method=method, guide=guide, block=8, checkpoint=file, seed=0, **QUIET)
        return digest(got.value, got.lower, got.upper, got.standard_error, got.guarantee, got.notes)

    return work


def work_compare(folder: Path) -> str:
    model, guide = pair()
    file = folder / "comparison.nc"
    if file.exists():
        load_comparison(file)
    guides = {"one": guide, "two": pair(1)[1]}
    for _ in range(2):
        save_comparison(compare(model, guides, X, num_samples=20, block=20, seed=0, **QUIET), file)
    data = load_comparison(file)["train"].to_dataset()
    return digest(*(torch.from_numpy(data[name].values.copy()) for name in ("elbo", "evidence", "gap")))


WORKS: dict[str, Callable[[Path], str]] = {
    "fit": work_fit,
    "fit_many": work_fit_many,
    "fit_best": work_fit_best,
    "importance": estimate(Importance(200)),
    "adaptive": estimate(Adaptive(200)),
    "annealed": estimate(Annealed(num_temperatures=6, num_chains=2)),
    "compare": work_compare,
}


def start(door: str, folder: Path) -> int:
    """Fork a process that does the work and writes its digest to a file."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        text = WORKS[door](folder)
        (folder / "result").write_text(text)
    except KeyboardInterrupt:
        os._exit(3)
    except BaseException:
        (folder / "error").write_text(traceback.format_exc())
        os._exit(4)
    os._exit(0)


def stop_at(child: int, moment: float, number: int) -> int:
    """Send a signal to a process at a moment, if it still runs, and return its status."""
    end = time.perf_counter() + moment
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    os.kill(child, number)
    return os.waitpid(child, 0)[1]


def lost_steps(folder: Path) -> int:
    """Updates that the optimiser made and the file does not hold, beyond the one in which an interrupt came."""
    file, updates = folder / "run.safetensors", folder / "updates"
    made = updates.stat().st_size if updates.exists() else 0
    kept = len(load_tree(file)["loss"]) if file.exists() else 0
    updates.write_bytes(b"." * kept)  # those are done again
    return max(made - kept - 1, 0)


def one_run(door: str, number: int, whole: float, generator: random.Random) -> tuple[str, int, int]:
    """The digest of a run that was stopped, how often it was, and the steps that it lost; an error in place of it."""
    folder, stops, lost = Path(tempfile.mkdtemp()), 0, 0
    for attempt in range(STOPS + 1):
        child = start(door, folder)
        status = stop_at(child, generator.uniform(0, whole) if attempt < STOPS else WAIT, number)
        stopped = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 3
        stops += stopped
        if stopped and number == signal.SIGINT and door in ("fit", "fit_many"):
            lost += lost_steps(folder)
        if not stopped:
            break
    error = folder / "error"
    result = error.read_text() if error.exists() else (folder / "result").read_text()
    left = [p for p in folder.rglob(".*") if p.is_file()]
    shutil.rmtree(folder)
    return (f"left {left}" if left and not result.startswith("Traceback") else result), stops, lost


def campaign(door: str, number: int, runs: int, generator: random.Random) -> bool:
    folder = Path(tempfile.mkdtemp())
    begin = time.perf_counter()
    os.waitpid(start(door, folder), 0)
    whole, want = time.perf_counter() - begin, (folder / "result").read_text()
    shutil.rmtree(folder)
    stops = lost = other = 0
    for _ in range(runs):
        got, stopped, missing = one_run(door, number, whole, generator)
        stops, lost, other = stops + stopped, lost + missing, other + (got != want)
        if got != want:
            print(f"{door}: {got[-600:]}", flush=True)
    print(
        f"{door:11s} {runs} runs, {stops:3d} stopped: {other} with other bits or unusable, {lost} steps lost",
        flush=True,
    )
    return other == lost == 0


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--signal", choices=("KILL", "INT"), default="KILL")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doors", nargs="+", choices=WORKS, default=list(WORKS))
    given = parser.parse_args()
    for name in ("scipy.stats", "h5netcdf", "xarray.backends", "sklearn.metrics"):
        importlib.import_module(name)  # once, for all children
    generator = random.Random(given.seed)
    number = signal.Signals[f"SIG{given.signal}"]
    held = [campaign(door, number, given.runs, generator) for door in given.doors]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
