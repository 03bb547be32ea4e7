"""Damaged files for every reader: each is refused by a sentence with its name, or read with the same numbers.

    python tests/campaigns/fuzz_readers.py --files 100000 --seed 0

A file is a sound one with some bytes flipped, zeroed, cut, doubled, moved or replaced by numbers that headers may hold,
with another version of the format, or it is another file: that of another reader, or of another run of the same call.
Of the project's own trees some have the damage in their JSON text or tensors and a right digest again: they must be
refused in a sentence, or read. Files are read in child processes, which find crashes, hangs and growth of memory.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import json
import math
import os
import random
import resource
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributions import Uniform

from guides import Linear, MeanField
from inference import (
    Importance,
    compare,
    evidence,
    fit,
    gap,
    load_comparison,
    load_pair,
    memory_limit,
    save_comparison,
    save_pair,
)
from inference.core.storage import load_tree, save_tree
from zoo import LinearVAE, load_mixed, mixed, moebius, save_mixed
from zoo.data.files import read_arrays, read_images

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
HANG, GROWTH, BATCH = 30, 300e6, 250
NUMBERS = (-1, 0, 1, 10**9, 2**70, 0.5, math.nan, True)
OTHERS: tuple[Any, ...] = (None, "", "text", "int64", [], {}, [[[]]], torch.zeros(2))
SEALED, FOREIGN = 0.3, 0.05  # shares of files with a right digest, and of other files


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    return LinearVAE(4, 2).double(), MeanField(4, 2, hidden=(4,)).double()


def numbers(value: Any) -> str:
    total = hashlib.sha256()
    for tensor in value:
        total.update(torch.as_tensor(tensor).detach().numpy().tobytes())
    return total.hexdigest()


def read_pair(path: Path) -> str:
    return numbers(t for half in load_pair(path) for t in half.state_dict().values())


def read_mixed(path: Path) -> str:
    data = load_mixed(path)
    return numbers([data.train, data.test, data.truth["z"], data.truth["z_test"], data.mixing(data.truth["z"])])


def read_comparison(path: Path) -> str:
    data = load_comparison(path)["train"].to_dataset()
    return numbers(data[name].values.copy() for name in ("elbo", "evidence", "gap"))


def read_run(path: Path, seed: int = 0) -> str:
    halves = pair()
    loss = fit(*halves, X, steps=4, seed=seed, checkpoint=path, progress=False).loss
    return numbers([loss, *(p for half in halves for p in half.parameters())])


def read_estimate(path: Path, seed: int = 0) -> str:
    model, guide = pair()
    found = evidence(model, X, method=Importance(5), guide=guide, block=6, seed=seed, checkpoint=path, progress=False)
    return numbers([found.value, found.lower, found.standard_error]) + texts(found.guarantee, found.notes)


def read_gap(path: Path, seed: int = 0) -> str:
    """In two blocks of six rows, which the limit makes so small."""
    few = {"method": Importance(8), "num_samples": 8, "restarts": 0, "max_steps": 1, "seed": seed}
    with memory_limit(0.094):
        found = gap(*pair(), X, checkpoint=path, progress=False, **few)
    parts = [found.total, found.elbo, found.approximation, found.amortisation, found.converged, found.evidence.upper]
    return numbers(parts) + texts(found.evidence.guarantee, found.evidence.notes)


def read_table(path: Path, seed: int = 0) -> str:
    model, guide = pair()
    given = {"num_samples": 5, "block": 6, "seed": seed, "checkpoint": path, "progress": False}
    tree = compare(model, {"mine": guide, "other": Linear(4, 2).double()}, X, **given)
    data = tree["train"].to_dataset()
    return numbers(data[name].values.copy() for name in ("elbo", "iwae", "evidence", "gap", "pareto_k"))


def texts(*several: Any) -> str:
    return hashlib.sha256(repr([list(some) for some in several]).encode()).hexdigest()


def beside(reader: Callable[[Path], str], name: str) -> Callable[[Path], str]:
    """Reads a file by a call that is given the name of another one in its folder."""
    return lambda path: reader(path.with_name(name))


READERS: dict[str, tuple[Callable[[Path], Any], bool, int]] = {  # reader, whether the format is ours, weight
    "pair.safetensors": (read_pair, True, 8),
    "mixed.safetensors": (read_mixed, True, 6),
    "run.safetensors": (read_run, True, 1),
    "estimate.safetensors": (read_estimate, True, 1),
    "estimate.safetensors.rows": (beside(read_estimate, "estimate.safetensors"), True, 1),
    "gap.safetensors": (read_gap, True, 1),
    "gap.safetensors.rows": (beside(read_gap, "gap.safetensors"), True, 1),
    "gap.safetensors.evidence": (beside(read_gap, "gap.safetensors"), True, 1),
    "gap.safetensors.evidence.rows": (beside(read_gap, "gap.safetensors"), True, 1),
    "table.train.0": (beside(read_table, "table"), True, 1),
    "table.train.0.rows": (beside(read_table, "table"), True, 1),
    "table.train.0.0.rows": (beside(read_table, "table"), True, 1),
    "comparison.nc": (read_comparison, True, 4),
    "rows.npy": (read_arrays, False, 6),
    "rows.npz": (read_arrays, False, 6),
    "rows.csv": (read_arrays, False, 4),
    "images.npz": (read_images, False, 3),
    "train-images-idx3-ubyte.gz": (lambda path: read_images(path.parent), False, 3),
    "t10k-images-idx3-ubyte": (lambda path: read_images(path.parent), False, 3),
}


CALLS: dict[str, Callable[[Path, int], str]] = {  # that have checkpoints, by the name that they are given
    "run.safetensors": read_run,
    "estimate.safetensors": read_estimate,
    "gap.safetensors": read_gap,
    "table": read_table,
}


def make_others(folder: Path) -> dict[str, bytes]:
    """The files of other runs of the same calls."""
    for name, call in CALLS.items():
        call(folder / name, 1)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_sound(folder: Path) -> None:
    """Write a sound file for every reader."""
    generator = np.random.default_rng(0)
    rows, images = generator.standard_normal((6, 3)), generator.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    save_pair(folder / "pair.safetensors", *pair())
    save_mixed(folder / "mixed.safetensors", mixed(moebius(3), sources=Uniform(-0.5, 0.5), num=10))
    for name, call in CALLS.items():
        call(folder / name, 0)
    guides = {"mine": Linear(4, 2).double()}
    tree = compare(LinearVAE(4, 2).double(), guides, X, num_samples=5, seed=0, progress=False)
    save_comparison(tree, folder / "comparison.nc")
    np.save(folder / "rows.npy", rows)
    np.savez_compressed(folder / "rows.npz", x_train=rows, x_test=rows)
    np.savetxt(folder / "rows.csv", rows, delimiter=",")
    np.savez(folder / "images.npz", x_train=images, x_test=images)
    idx = b"\0\0\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx)


def damage(content: bytes, generator: random.Random) -> bytes:
    """A file with one to three faults."""
    for _ in range(generator.randint(1, 3)):
        a, b = sorted(generator.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + generator.choice([1, 4, 8, 64, 4096]))
        kind = generator.randrange(8)
        if kind == 0:
            content = (
                content[:a]
                + bytes(byte ^ generator.randrange(1, 256) for byte in content[a : a + 1])
                + content[a + 1 :]
            )
        elif kind == 1:
            content = content[:a] + bytes(b - a) + content[b:]
        elif kind == 2:
            content = content[:a]
        elif kind == 3:
            content = content[:a] + content[a:b] * 2 + content[b:]
        elif kind == 4:
            content = content[:a] + content[b:]
        elif kind == 5:
            number = generator.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 10**9])
            content = content[:a] + number.to_bytes(8, "little") + content[a + 8 :]
        elif kind == 6:
            content = content.replace(b"elbozoo 2", generator.choice([b"elbozoo 1", b"elbozoo 3", b"elbozoo 22", b""]))
        else:
            content = (
                content[:a] + generator.choice([b"9", b"99999999", b"-", b"nan", b"null", b"{}", b'"']) + content[b:]
            )
        content = content or b"\0"
    return content


def damaged_tree(tree: Any, generator: random.Random) -> Any:
    """A tree with one leaf or branch replaced."""
    if isinstance(tree, dict) and tree and generator.random() < 0.9:
        key = generator.choice(list(tree))
        rest = {k: v for k, v in tree.items() if k != key}
        return rest if generator.random() < 0.05 else {**tree, key: damaged_tree(tree[key], generator)}
    if isinstance(tree, list | tuple) and len(tree) and generator.random() < 0.9:
        i = generator.randrange(len(tree))
        return [*tree[:i], damaged_tree(tree[i], generator), *tree[i + 1 :]]
    return generator.choice(NUMBERS + OTHERS)


class Files:
    """Sound files by name, and what stands in their place.

    Args:
        folder: Holds the sound ones.
        others: Files of other runs, by the same names.
    """

    def __init__(self, folder: Path, others: dict[str, bytes]) -> None:
        self.folder, self.place, self.others = folder, folder / "damaged", others
        self.sound = {name: (folder / name).read_bytes() for name in READERS}
        ours = [name for name, content in self.sound.items() if READERS[name][1] and content[8:9] == b"{"]
        self.trees = {name: load_tree(folder / name) for name in ours}
        self.place.mkdir(exist_ok=True)
        self.restore("")

    def damage(self, name: str, generator: random.Random) -> bool:
        """Write a damaged file in place of a sound one; whether its digest is right."""
        kind = generator.random()
        if name in self.trees and kind < SEALED:
            save_tree(self.place / name, damaged_tree(self.trees[name], generator))
            return True
        if kind < SEALED + FOREIGN:
            found = [content for other, content in self.sound.items() if content != self.sound[name]]
            self._write(name, generator.choice([*found, *[self.others.get(name, found[0])] * 5]))
        else:
            self._write(name, damage(self.sound[name], generator))
        return False

    def restore(self, name: str) -> None:
        """Write the sound files of one call, which may have written others itself."""
        for other in self.sound:
            if other.startswith(name.split(".")[0]):
                self._write(other, self.sound[other])

    def _write(self, name: str, content: bytes) -> None:
        (self.place / name).unlink(missing_ok=True)  # not written over: a result may be a view of it
        (self.place / name).write_bytes(content)


def judge(name: str, place: Path, want: Any, sealed: bool) -> str:
    """What a reader does with a file."""
    reader, own, _ = READERS[name]
    signal.alarm(HANG)
    try:
        got = reader(place)
    except (ValueError, OSError) as error:
        told = str(place) in str(error) or str(place.parent) in str(error)
        return "refused" if told else f"without its name: {type(error).__name__} {str(error)[:150]}"
    except Exception as error:
        return f"obscure: {type(error).__name__} {str(error)[:150]}"
    finally:
        signal.alarm(0)
    return "read" if not own or sealed or got == want else "OTHER NUMBERS"


def batch(files: Files, seed: int, report: Path) -> None:
    """Judge some files, and write down what happened; in a child process."""
    generator, counts = random.Random(seed), Counter[str]()
    wants = {name: READERS[name][0](files.folder / name) for name in READERS if READERS[name][1]}
    weights = [weight for _, _, weight in READERS.values()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(BATCH):
        name = generator.choices(list(READERS), weights)[0]
        sealed = files.damage(name, generator)
        verdict = judge(name, files.place / name, wants.get(name), sealed)
        files.restore(name)
        counts[f"{name}{' with a right digest' if sealed else ''}: {verdict}"] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > GROWTH:
            counts[f"{name}: GREW by {grown / 1e6:.0f} MB at {seed}, {i}"] += 1
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report.write_text(json.dumps(counts))
    os._exit(0)


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in ("scipy.stats", "h5netcdf", "xarray.backends"):
        importlib.import_module(name)  # once, for all children
    total = Counter[str]()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        make_sound(Path(first))
        files, report = Files(Path(first), make_others(Path(second))), Path(second) / "report"
        for number in range(-(-given.files // BATCH)):
            report.unlink(missing_ok=True)
            child = os.fork()
            if child == 0:
                batch(files, given.seed * 1_000_003 + number, report)
            _, status = os.waitpid(child, 0)
            if report.exists():
                total.update(json.loads(report.read_text()))
            else:
                total[f"batch {number}: CRASHED or HUNG, status {status}"] += 1
            if number % 20 == 19:
                print(f"{(number + 1) * BATCH} files", flush=True)
    for verdict, count in sorted(total.items()):
        print(f"{count:7d} {verdict}")
    bad = {v: c for v, c in total.items() if not v.endswith((": refused", ": read"))}
    print(f"{sum(total.values())} files, {sum(bad.values())} bad")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
