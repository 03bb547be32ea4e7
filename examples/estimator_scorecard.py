"""Which estimator of the evidence keeps its word, and where? Every method on problems whose evidence is known.

The table holds, for each kind of problem (all noise levels together) and each method: the mean error of the value with
its standard error, the shares of the data that are refused, or get a two-sided interval or a bound, how often the
interval holds the truth with 99 % binomial limits, how often the bound is on the wrong side, the median width, and the
cost. MISSES marks what fails more often than its 95 % allow, beyond doubt. scorecard.csv has each noise level.

    OMP_NUM_THREADS=1 python examples/estimator_scorecard.py --num-data 50
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from inference import Annealed, ExactDraws, bdmc, evidence
from inference.marginal_likelihood.estimate import METHODS
from inference.plots.comparison import comparison as plots
from zoo import known_answers

LEVEL, CONFIDENCE, ROUNDING = 0.95, 0.99, 1e-9
SHARES = ("refused", "two-sided", "one-sided", "coverage", "from", "to", "wrong side")
FORMATS = dict.fromkeys(SHARES, "{:.0%}".format) | dict.fromkeys(("error", "s.e.", "width", "s/datum"), "{:.2g}".format)
FORMATS["evaluations"] = "{:,.0f}".format


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-dim", type=int, nargs="+", default=[1, 4, 16, 64], help="of the linear problems")
    parser.add_argument("--sigma", type=float, nargs="+", default=[1.0, 1e-1, 1e-2, 1e-3, 1e-4])
    parser.add_argument("--num-data", type=int, default=20, help="data of each problem")
    for name, default in {"--samples": 2000, "--temperatures": 100, "--chains": 16, "--seed": 0}.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("out/estimator_scorecard"))
    return parser.parse_args(argv)


def estimators(args):
    """Name to a function of problem and seed: every method of ``evidence``, and annealing from both sides."""
    annealed = Annealed(args.temperatures, args.chains)
    settings = {"num_samples": args.samples, "annealed": annealed}
    options = {"level": LEVEL, "progress": False}

    def of(name, method):
        chosen = method(**{f.name: settings[f.name] for f in fields(method) if f.name in settings})
        own = options | {"method": annealed if name == annealed.name else chosen}
        return lambda p, seed: evidence(p.model, p.x, guide=None if name == "exact" else p.guide, seed=seed, **own)

    def both_sides(p, seed):
        draws = ExactDraws(p.x, {"z": p.z})
        return bdmc(p.model, draws, guide=p.guide, method=annealed, seed=seed, **options).evidence

    return {name: of(name, method) for name, method in METHODS.items()} | {"bdmc": both_sides}


def measure(problem, estimate, seed):
    """Of each datum the errors of the value and of both ends, (3, N), with evaluations and seconds; or what refused."""
    try:
        found = estimate(problem, seed)
    except (TypeError, ValueError) as refusal:
        return str(refusal)
    truth = problem.log_evidence.numpy()
    slack = ROUNDING * (1 + np.abs(truth))
    errors = [found.value.numpy(), found.lower.numpy() - slack, found.upper.numpy() + slack] - truth
    return errors, found.evaluations, found.seconds


def score(parts):
    """The scorecard of one method on some problems."""
    answered = [part for part in parts if not isinstance(part, str)]
    row = {"refused": 1 - len(answered) / len(parts)}
    if not answered:
        return row
    error, low, high = np.concatenate([part[0] for part in answered], 1)
    two, one = np.isfinite(low) & np.isfinite(high), np.isfinite(low) ^ np.isfinite(high)
    holds, known = (low <= 0) & (high >= 0), pd.Series(error[np.isfinite(error)])
    cover, wrong = share(holds[two]), share(~holds[one])
    row |= {"error": known.mean(), "s.e.": known.sem(), "two-sided": two.mean(), "one-sided": one.mean()}
    row |= dict(zip(("coverage", "from", "to", "wrong side"), (*cover, wrong[0])))
    row |= {"width": pd.Series((high - low)[two]).median(), "evaluations": np.mean([part[1] for part in answered])}
    row["s/datum"] = sum(part[2] for part in answered) / len(error)
    return row | {"verdict": "MISSES" if cover[2] < LEVEL or wrong[1] > 1 - LEVEL else ""}


def share(hits):
    """A share with Clopper and Pearson's limits."""
    if not len(hits):
        return np.nan, np.nan, np.nan
    return hits.mean(), *scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE)


def show(results):
    """A table for each kind of problem; methods that refuse all of it stand below it, with their reason."""
    for family in dict.fromkeys(family for family, _ in next(iter(results.values()))):
        own = {name: [part for (f, _), part in parts.items() if f == family] for name, parts in results.items()}
        rows = {name: score(parts) for name, parts in own.items()}
        answers = pd.DataFrame.from_dict({n: r for n, r in rows.items() if len(r) > 1}, orient="index")
        print(f"\n{family}\n{answers.to_string(formatters=FORMATS, na_rep='-')}")
        print("".join(f"{n} refuses: {own[n][0]:.100}\n" for n, row in rows.items() if len(row) == 1), end="")


def draw(results):
    """Two maps of methods by problems: how often the claim holds, and how far the value is off."""
    problems = list(next(iter(results.values())))
    held, off = np.full((2, len(results), len(problems)), np.nan)
    for i, parts in enumerate(results.values()):
        for j, part in enumerate(parts.values()):
            error, low, high = np.full((3, 1), np.nan) if isinstance(part, str) else part[0]
            claims = np.isfinite(low) | np.isfinite(high)
            held[i, j] = ((low <= 0) & (high >= 0))[claims].mean() if claims.any() else np.nan
            off[i, j] = np.log10(np.maximum(1e-12, np.median(np.abs(error))))
    titles = "share of data whose interval or bound holds", "log10 of the median error of the value, in nats"
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for ax, values, cmap, limits, title in zip(axes, (held, off), ("RdYlGn", "viridis_r"), ((0.5, 1), (-9, 1)), titles):
        image = ax.imshow(values, aspect="auto", cmap=cmap, vmin=limits[0], vmax=limits[1])
        figure.colorbar(image, ax=ax, pad=0.01)
        ax.set_title(f"{title} (white: none)", fontsize=10)
        ax.set_yticks(range(len(results)), list(results), fontsize=8)
        ax.set_xticks(range(len(problems)), [f"{f}, {s:g}" for f, s in problems], rotation=90, fontsize=7)
    axes[1].set_xlabel("problem, sigma")
    return figure


def main(argv=None):
    args = parse(argv)
    ladder = known_answers(args.latent_dim, args.sigma, num_data=args.num_data, seed=args.seed)
    results = {}
    for name, estimate in estimators(args).items():
        # A seed for each problem: shared noise would count one bad draw many times.
        bar = enumerate(tqdm(ladder, desc=f"{name:12s}", unit="problem"), 1000 * args.seed)
        results[name] = {(p.family, p.sigma): measure(p, estimate, seed) for seed, p in bar}
    show(results)
    rows = {(name, *problem): score([part]) for name, parts in results.items() for problem, part in parts.items()}
    plots.save_figure(draw(results), args.out / "scorecard.png")
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["method", "problem", "sigma"])
    table.to_csv(args.out / "scorecard.csv")
    print(f"\nwrote {args.out}/")
    return results


if __name__ == "__main__":
    main()
