"""Time and memory of fitting probabilistic PCA in closed form, against scikit-learn in the same run.

Run: python examples/benchmarks/ppca_fit.py [--repeats 7] [--threads 2] [--sizes 100000x128 20000x784]

Both sides get the same float64 array, take turns, and start each turn after a rest: the threads of a linear-algebra
library keep spinning for some tens of milliseconds after its last call and would be charged to the next in turn.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from timing import add_threads, benchmark_parser, parse_with_smoke

from zoo.linear import maximum_likelihood

REST = 0.2  # seconds
BATCH_ROWS = 5000
TARGET = 0.9  # of the time of scikit-learn
MEMORY_LIMIT = 20  # MB
SMOKE = {"repeats": 1, "sizes": [(2000, 24)], "streams": [(100, 24), (200, 24)]}


def make_data(num: int, dim: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((num, dim)) * np.geomspace(10, 1, dim) + rng.standard_normal(dim)


def seconds(fit: Callable[[], object]) -> float:
    time.sleep(REST)
    start = time.perf_counter()
    fit()
    return time.perf_counter() - start


def compare(num: int, dim: int, latent_dim: int, repeats: int) -> float:
    """Print one line and return the ratio of the median times."""
    x = make_data(num, dim)
    fits: list[Callable[[], object]] = [
        lambda: maximum_likelihood(x, latent_dim),
        lambda: PCA(n_components=latent_dim, svd_solver="covariance_eigh").fit(x),
    ]
    for fit in fits:
        fit()
    turns = [[seconds(fit) for fit in fits] for _ in range(repeats)]
    ours, theirs = (1e3 * statistics.median(column) for column in zip(*turns))
    ratios = sorted(a / b for a, b in turns)
    print(
        f"N = {num}, D = {dim}, K = {latent_dim}: zoo {ours:.1f} ms, scikit-learn {theirs:.1f} ms, "
        f"ratio {ours / theirs:.2f} (single turns {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    return ours / theirs


def stream(num: int, dim: int) -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    for start in range(0, num, BATCH_ROWS):
        yield rng.standard_normal((min(BATCH_ROWS, num - start), dim))


def print_peak(num: int, dim: int, latent_dim: int) -> None:
    """Fit a stream in this process and print its peak memory in MB (Linux).

    Not ru_maxrss: that starts from the peak of the process that started this one.
    """
    maximum_likelihood(stream(num, dim), latent_dim)
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10)


def measure_peak(num: int, dim: int, options: argparse.Namespace) -> float:
    """Peak memory in MB of a fresh process that fits a stream."""
    command = [sys.executable, __file__, "--peak-of", f"{num}x{dim}", "--latent-dim", str(options.latent_dim)]
    command += ["--threads", str(options.threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare_memory(options: argparse.Namespace) -> float:
    """Print one line and return by how many MB the longer stream needs more."""
    (few, dim), (many, _) = options.streams
    low, high = (measure_peak(num, dim, options) for num in (few, many))
    array = many * dim * 8 / 2**20
    print(
        f"streamed, D = {dim}: peak {low:.0f} MB at N = {few}, {high:.0f} MB at N = {many} "
        f"(difference {high - low:+.1f} MB; the data alone are {array:.0f} MB)"
    )
    return high - low


def size(text: str) -> tuple[int, int]:
    num, dim = text.split("x")
    return int(num), int(dim)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    add_threads(parser)
    parser.add_argument("--latent-dim", type=int, default=16, help="components to fit")
    sizes, streams = [(100_000, 128), (20_000, 784)], [(10_000, 128), (1_000_000, 128)]
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, metavar="NxD", help="arrays to time")
    parser.add_argument("--streams", type=size, nargs=2, default=streams, metavar="NxD", help="streams to compare")
    parser.add_argument("--peak-of", type=size, help=argparse.SUPPRESS)
    return parse_with_smoke(parser, argv, SMOKE)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        num, dim = options.peak_of
        print_peak(num, dim, options.latent_dim)
        return
    with threadpool_limits(options.threads):
        ratios = [compare(num, dim, options.latent_dim, options.repeats) for num, dim in options.sizes]
    growth = compare_memory(options)
    verdicts = ["within" if good else "outside" for good in (max(ratios) <= TARGET, growth <= MEMORY_LIMIT)]
    print(
        f"Conclusion: on {options.threads} thread(s) the fit takes {min(ratios):.2f} to {max(ratios):.2f} of the time "
        f"of scikit-learn, {verdicts[0]} the target of {TARGET}; a longer stream takes {growth:.1f} MB more, "
        f"{verdicts[1]} {MEMORY_LIMIT} MB. Other load slows scikit-learn more: run it on an idle machine."
    )


if __name__ == "__main__":
    main()
