"""Interleaved timing: candidates take turns, so that a slow minute of the machine slows all of them."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from zoo.command_line.parser import HelpFormatter


def benchmark_parser(description: str | None, *, repeats: int = 7) -> argparse.ArgumentParser:
    """A parser with the option that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each candidate")
    return parser


def parse_with_smoke(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, smoke: Mapping[str, object]
) -> argparse.Namespace:
    """Parse, where ``--smoke`` replaces the defaults by tiny settings that show whether the benchmark runs at all."""
    parser.add_argument("--smoke", action="store_true", help="tiny settings, a few seconds")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args(argv)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every candidate")


def begin(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, smoke: Mapping[str, object]
) -> argparse.Namespace:
    """Parse as :func:`parse_with_smoke`, with ``--threads``, set their number, and say where this runs."""
    add_threads(parser)
    args = parse_with_smoke(parser, argv, smoke)
    torch.set_num_threads(args.threads)
    print(machine())
    return args


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each candidate, or those that it returns, ``repeats`` times each, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            own = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ > 0:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return seconds


def report(title: str, seconds: Mapping[str, list[float]], peers: list[str], *, per: int = 1) -> None:
    """Print medians per unit of work in milliseconds, and the ratios to each peer with their range over rounds."""
    print(f"\n{title}")
    print(f"{'':46s}{'ms':>9s}" + "".join(f"{'/ ' + peer:>34s}" for peer in peers))
    for name, times in seconds.items():
        cells = []
        for peer in peers:
            ratios = [a / b for a, b in zip(times, seconds[peer], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
        print(f"{name:46s}{1e3 * statistics.median(times) / per:9.3f}" + "".join(f"{cell:>34s}" for cell in cells))


def machine() -> str:
    """One line about where this runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
