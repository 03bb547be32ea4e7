"""Seconds a data point of each evidence method on a trained deep VAE of digits, as ratios to adaptive sampling.

At K = 8 the methods that serve any dimension, interleaved; at K = 3 quadrature at several tolerances, the last of them
the half-width that adaptive sampling reaches there.
"""

from __future__ import annotations

from nested_sampling import digits_pair
from timing import begin, benchmark_parser, interleaved, report

from inference import Annealed, Quadrature, evidence

METHODS = ("adaptive", "auto", "bridge", "importance", "smoothed", "defensive", "laplace")
SMOKE = {"repeats": 1, "data": 2, "steps": 10, "temperatures": 10, "tolerances": [1e-2], "latent_dims": [4, 1]}


def main(argv: list[str] | None = None) -> None:
    """Print both tables, in milliseconds."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--data", type=int, default=16, help="data estimated together")
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--temperatures", type=int, default=1000, help="of annealing")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-7, 1e-4, 1e-2], help="of quadrature")
    parser.add_argument("--latent-dims", type=int, nargs=2, default=[8, 3], help="K of either table")
    args = begin(parser, argv, SMOKE)
    high, low = args.latent_dims
    methods = {name: name for name in METHODS} | {"annealed": Annealed(args.temperatures)}
    compare(f"ms a data point, digits VAE, K = {high}", methods, high, args)
    rules = {f"quadrature at {tolerance:g}": Quadrature(tolerance=tolerance) for tolerance in args.tolerances}
    compare(f"ms a data point, digits VAE, K = {low}", {"adaptive": "adaptive"} | rules, low, args)


def compare(title: str, methods: dict[str, object], latent_dim: int, args) -> None:
    """One table, with the median half-width of the intervals and the evaluations a data point below it."""
    model, guide, held_out = digits_pair(latent_dim, args.steps, 0)
    x = held_out[: args.data]
    found = {}

    def run(name: str) -> None:
        found[name] = evidence(model, x, method=methods[name], guide=guide, seed=0, progress=False)

    seconds = interleaved({name: lambda name=name: run(name) for name in methods}, args.repeats)
    report(title, seconds, ["adaptive"], per=len(x))
    for name, result in found.items():
        width = float((result.upper - result.lower).median()) / 2
        share = float(result.upper.isfinite().double().mean())
        print(f"{name}: {share:.0%} two-sided, median half-width {width:.2g}, {result.evaluations:.0f} evaluations")


if __name__ == "__main__":
    main()
