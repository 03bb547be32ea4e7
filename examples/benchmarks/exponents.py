"""How times grow with the numbers of data N, dimensions D, latents K and samples S: exponents of a power.

Each size is changed alone, the others stay; the exponent is the slope of log time in log size over all of its values,
taken in turns. One where the work dominates; less where fixed costs do, or where only a part of the work grows.
"""

from __future__ import annotations

import statistics

import numpy as np
import torch
from svi_step import Decoder
from timing import begin, benchmark_parser, interleaved

from guides import MeanField
from inference import ELBO, log_weights

SMOKE = {"repeats": 1, "doublings": 1, "data": 8, "dims": 4, "latents": 2, "samples": 4, "width": 8}
SIZES = {"N": "data", "D": "dims", "K": "latents", "S": "samples"}


def weights_of(sizes, width):
    model, guide, x = problem(sizes, width)
    return lambda: log_weights(model, guide, x, num_samples=sizes["S"], progress=False)


def gradient_of(sizes, width):
    model, guide, x = problem(sizes, width)
    objective = ELBO(sizes["S"])
    return lambda: objective.differentiable_loss(model, guide, x).backward()


def problem(sizes, width):
    torch.manual_seed(0)
    shape = sizes["D"], (width,), sizes["K"]
    return Decoder(*shape), MeanField(shape[0], shape[2], hidden=shape[1]), torch.randn(sizes["N"], sizes["D"])


def exponent(values, seconds):
    """Slope of log time in log size, and the range over rounds."""
    rounds = zip(*seconds, strict=True)
    slopes = [float(np.polyfit(np.log(values), np.log(times), 1)[0]) for times in rounds]
    return statistics.median(slopes), min(slopes), max(slopes)


def main(argv=None):
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--doublings", type=int, default=3, help="of each size")
    parser.add_argument("--data", type=int, default=256, help="N where it stays, and its first value")
    parser.add_argument("--dims", type=int, default=128, help="D")
    parser.add_argument("--latents", type=int, default=16, help="K")
    parser.add_argument("--samples", type=int, default=32, help="S")
    parser.add_argument("--width", type=int, default=128, help="of the hidden layer")
    args = begin(parser, argv, SMOKE)
    start = {letter: getattr(args, name) for letter, name in SIZES.items()}
    for title, make in {"log_weights": weights_of, "gradient of the ELBO": gradient_of}.items():
        print(f"\n{title}: exponents of the time, from {', '.join(f'{k} = {v}' for k, v in start.items())}")
        for letter, first in start.items():
            values = [first * 2**i for i in range(args.doublings + 1)]
            ways = {str(v): make(start | {letter: v}, args.width) for v in values}
            seconds = list(interleaved(ways, args.repeats).values())
            middle, low, high = exponent(values, seconds)
            times = " ".join(f"{1e3 * statistics.median(own):.2f}" for own in seconds)
            print(f"{letter} to {values[-1]:<8d} {middle:5.2f} ({low:.2f}..{high:.2f})   ms: {times}")


if __name__ == "__main__":
    main()
