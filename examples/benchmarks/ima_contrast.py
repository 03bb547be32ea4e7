"""Time and memory of the IMA contrast of a decoder, against loops over points by torch's own Jacobians.

    python examples/benchmarks/ima_contrast.py

The loops are measured on a part of the points and scaled to all of them: their cost per point is constant. All give
the contrast of each point in float64, and must agree.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import benchmark_parser, interleaved, machine, parse_with_smoke, report
from torch import Tensor, nn
from torch.func import jacrev

from guides import mlp
from inference import column_contrast, local_ima_contrast

LATENT_DIM, DATA_DIM, HIDDEN = 20, 50, (64, 64)
TARGET = 50  # times faster than the loop over torch.autograd.functional.jacobian
SMOKE = {"points": 40, "subset": 4, "repeats": 1, "memory": [20, 40]}
OURS, LOOP = "elbozoo local_ima_contrast", "loop, autograd jacobian"


def make(points: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mlp(LATENT_DIM, DATA_DIM, HIDDEN).double(), torch.randn(points, LATENT_DIM, dtype=torch.float64)


def loop(jacobian: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.stack([column_contrast(jacobian(point)) for point in z])


def compare_time(points: int, subset: int, repeats: int) -> float:
    """Print a table and return how many times faster the batched contrast is than the loop."""
    decoder, z = make(points)
    reverse = jacrev(decoder)
    candidates = {
        OURS: lambda: local_ima_contrast(decoder, z),
        LOOP: lambda: loop(lambda v: torch.autograd.functional.jacobian(decoder, v), z[:subset]),
        "loop, func.jacrev": lambda: loop(reverse, z[:subset]).detach(),
    }
    values = {name: run()[:subset] for name, run in candidates.items()}
    difference = max(float((value - values[OURS]).abs().max()) for value in values.values())
    seconds = interleaved(candidates, repeats)
    for name in candidates:
        if name != OURS:
            seconds[name] = [t * points / subset for t in seconds[name]]
    report(f"ms for the contrast of {points} points, MLP {LATENT_DIM}-64-64-{DATA_DIM}", seconds, [OURS])
    print(f"loops measured on {subset} points and scaled; contrasts agree to {difference:.1e}")
    return statistics.median(a / b for a, b in zip(seconds[LOOP], seconds[OURS], strict=True))


def print_peak(points: int) -> None:
    """Compute the contrasts of many points in this process and print its peak memory in MB (Linux)."""
    local_ima_contrast(*make(points))
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10)


def measure_peak(points: int) -> float:
    """Peak memory in MB of a fresh process."""
    command = [sys.executable, __file__, "--peak-of", str(points)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare_memory(few: int, many: int) -> float:
    """Print one line and return by how many MB many points need more than they and their contrasts take."""
    low, high = measure_peak(few), measure_peak(many)
    held = (many - few) * (LATENT_DIM + 1) * 8 / 2**20
    print(
        f"peak {low:.0f} MB for {few} points, {high:.0f} MB for {many}: {high - low - held:+.1f} MB beyond the "
        f"{held:.0f} MB of points and contrasts; their Jacobians are {many * LATENT_DIM * DATA_DIM * 8 / 2**20:.0f} MB"
    )
    return high - low - held


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--points", type=int, default=10_000, help="of the batched contrast")
    parser.add_argument("--subset", type=int, default=200, help="points of the loops")
    parser.add_argument("--memory", type=int, nargs=2, default=[10_000, 1_000_000], help="numbers of points")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    return parse_with_smoke(parser, argv, SMOKE)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    if options.peak_of:
        print_peak(options.peak_of)
        return
    print(machine())
    ratio = compare_time(options.points, options.subset, options.repeats)
    excess = compare_memory(*options.memory)
    verdict = "reached" if ratio >= TARGET else "missed"
    print(
        f"Conclusion: {ratio:.0f} times faster than the loop over torch.autograd.functional.jacobian, the target of "
        f"{TARGET} {verdict}; {options.memory[1]} points take {excess:+.1f} MB beyond their own size."
    )


if __name__ == "__main__":
    main()
