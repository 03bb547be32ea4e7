"""Which estimator of the evidence keeps its word, and where? Every method on problems whose evidence is known.

The table holds, for each kind of problem (all noise levels together) and each method: the mean error of the value with
its standard error, the shares of the data that are refused, or get a two-sided interval or a bound, how often the
interval holds the truth with 99 % binomial limits, how often the bound is on the wrong side, the median width, and the
cost. MISSES marks what fails more often than its 95 % allow, beyond doubt. scorecard.csv has each noise level.

    OMP_NUM_THREADS=1 python examples/estimator_scorecard.py --num-data 50
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import numpy as np
import pandas as pd
import scipy.stats
from _common import example_parser, expect, finish, kept, panels, parse_with_presets, run_as_command, save

from inference import Annealed, ExactDraws, bdmc, evidence
from inference.marginal_likelihood.estimate import METHODS
from zoo import known_answers

LEVEL, CONFIDENCE, ROUNDING = 0.95, 0.99, 1e-9
SHARES = ("refused", "two-sided", "one-sided", "coverage", "from", "to", "wrong side")
NUMBERS = ("error", "s.e.", "width", "s/datum")
FORMATS = {
    **dict.fromkeys(SHARES, "{:.0%}".format),
    **dict.fromkeys(NUMBERS, "{:.2g}".format),
    "evaluations": "{:,.0f}".format,
}
SMOKE = {"latent_dim": [2], "sigma": [0.1], "num_data": 3, "samples": 100, "temperatures": 5, "chains": 4}


def parse(argv):
    seed, cpu_only = "the problems and the estimators", "seconds are compared, and the problems are there"
    parser = example_parser(__doc__, "estimator_scorecard", seed=seed, cpu_only=cpu_only)
    parser.add_argument("--latent-dim", type=int, nargs="+", default=[1, 4, 16, 64], help="of the linear problems")
    parser.add_argument("--sigma", type=float, nargs="+", default=[1.0, 1e-1, 1e-2, 1e-3, 1e-4], help="of the noise")
    parser.add_argument("--num-data", type=int, default=20, help="data of each problem")
    parser.add_argument("--samples", type=int, default=2000, help="of the methods that draw from a guide")
    parser.add_argument("--temperatures", type=int, default=100, help="of annealing")
    parser.add_argument("--chains", type=int, default=16, help="of annealing, for each datum")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def estimators(args):
    """Name to a function of problem and seed: every method of ``evidence``, and annealing from both sides."""
    annealed = Annealed(args.temperatures, args.chains)
    settings = {"num_samples": args.samples, "annealed": annealed}
    options = {"level": LEVEL, "progress": False}

    def of(name, method):
        own = {field.name: settings[field.name] for field in fields(method) if field.name in settings}
        chosen = annealed if name == annealed.name else method(**own)

        def estimate(p, seed):
            guide = None if name == "exact" else p.guide
            return evidence(p.model, p.x, method=chosen, guide=guide, seed=seed, **options)

        return estimate

    def both_sides(p, seed):
        draws = ExactDraws(x=p.x, latents={"z": p.z})
        return bdmc(p.model, draws, guide=p.guide, method=annealed, seed=seed, **options).evidence

    return {name: of(name, method) for name, method in METHODS.items()} | {"bdmc": both_sides}


def measure(problem, estimate, seed):
    """Errors of the value and of both ends, (3, N) as lists; evaluations, seconds. Or the error that was raised."""
    try:
        found = estimate(problem, seed)
    except (TypeError, ValueError) as refusal:
        return str(refusal)
    truth = problem.log_evidence.numpy()
    slack = ROUNDING * (1 + np.abs(truth))
    errors = [found.value.numpy(), found.lower.numpy() - slack, found.upper.numpy() + slack] - truth
    return errors.tolist(), found.evaluations, found.seconds


def as_arrays(part):
    """What :func:`measure` gives, its errors as an array."""
    return part if isinstance(part, str) else (np.array(part[0]), *part[1:])


def score(parts):
    """The scorecard of one method on some problems."""
    answered = [part for part in parts if not isinstance(part, str)]
    row = {"refused": 1 - len(answered) / len(parts)}
    if not answered:
        return row
    error, low, high = np.concatenate([part[0] for part in answered], 1)
    known = pd.Series(error[np.isfinite(error)])
    claims, misses = score_claims(low, high)
    row |= {"error": known.mean(), "s.e.": known.sem()} | claims
    row["evaluations"] = np.mean([part[1] for part in answered])
    row["s/datum"] = sum(part[2] for part in answered) / len(error)
    return row | {"verdict": "MISSES" if misses else ""}


def score_claims(low, high):
    """How often an interval or a bound is given and holds, from the errors of both ends; whether it fails too often."""
    two_sided = np.isfinite(low) & np.isfinite(high)
    one_sided = np.isfinite(low) ^ np.isfinite(high)
    holds = (low <= 0) & (high >= 0)
    coverage, least, most = share(holds[two_sided])
    wrong, surely_wrong, _ = share(~holds[one_sided])
    claims = {
        "two-sided": two_sided.mean(),
        "one-sided": one_sided.mean(),
        "coverage": coverage,
        "from": least,
        "to": most,
        "wrong side": wrong,
        "width": pd.Series((high - low)[two_sided]).median(),
    }
    return claims, most < LEVEL or surely_wrong > 1 - LEVEL


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


def conclude(results):
    """Which methods keep their word on every kind of problem, and which give most intervals of those that do."""
    by_family = {name: {} for name in results}
    for name, parts in results.items():
        for (family, _), part in parts.items():
            by_family[name].setdefault(family, []).append(part)
    missed = {n: [f for f, own in found.items() if score(own).get("verdict")] for n, found in by_family.items()}
    answered = {name: score(list(parts.values())) for name, parts in results.items()}
    given = {name: row["two-sided"] * (1 - row["refused"]) for name, row in answered.items() if "two-sided" in row}
    faithful = [name for name in given if not missed[name]]
    for name, families in missed.items():
        if families:
            print(f"{name} misses more often than its {LEVEL:.0%} allow on: {', '.join(families)}")
    text = f"{len(faithful)} of {len(given)} methods that answer keep their word on every kind of problem"
    if faithful:
        most = max(faithful, key=given.get)
        text += f"; of them {most} gives a two-sided interval most often, for {given[most]:.0%} of the data"
    print(text)


def maps(results):
    """Of each method and problem, the share of the claims that hold, and log10 of the median error of the value."""
    shape = (len(results), len(next(iter(results.values()))))
    held, off = np.full(shape, np.nan), np.full(shape, np.nan)
    for i, parts in enumerate(results.values()):
        for j, part in enumerate(parts.values()):
            if isinstance(part, str):
                continue
            error, low, high = part[0]
            claims = np.isfinite(low) | np.isfinite(high)
            held[i, j] = ((low <= 0) & (high >= 0))[claims].mean() if claims.any() else np.nan
            off[i, j] = np.log10(np.maximum(1e-12, np.median(np.abs(error))))
    return held, off


def draw(results):
    """Two maps of methods by problems: how often the claim holds, and how far the value is off."""
    held, off = maps(results)
    problems = [f"{family}, {sigma:g}" for family, sigma in next(iter(results.values()))]
    figure, (above, below) = panels(2, 1, size=(13, 8), sharex=True)
    images = (
        above.imshow(held, aspect="auto", cmap="RdYlGn", vmin=0.5, vmax=1),
        below.imshow(off, aspect="auto", cmap="viridis_r", vmin=-9, vmax=1),
    )
    titles = "share of data whose interval or bound holds", "log10 of the median error of the value, in nats"
    for ax, image, title in zip((above, below), images, titles, strict=True):
        figure.colorbar(image, ax=ax, pad=0.01)
        ax.set_title(f"{title} (white: none)", fontsize=10)
        ax.set_yticks(range(len(results)), list(results), fontsize=8)
        ax.set_xticks(range(len(problems)), problems, rotation=90, fontsize=7)
    below.set_xlabel("problem, sigma")
    return figure


def main(argv=None):
    args = parse(argv)
    ladder = known_answers(args.latent_dim, args.sigma, num_data=args.num_data, seed=args.seed)
    results, methods = {}, estimators(args)
    expect(args, len(methods) * len(ladder))
    for name, estimate in methods.items():
        # A seed for each problem: shared noise would count one bad draw many times.
        problems = enumerate(ladder, 1000 * args.seed)
        made = {(p.family, p.sigma): partial(measure, p, estimate, seed) for seed, p in problems}
        parts = {key: kept(args, "_".join([name, key[0], f"{key[1]:g}"]), make) for key, make in made.items()}
        results[name] = {key: as_arrays(part) for key, part in parts.items()}
    show(results)
    conclude(results)
    save(draw(results), args, "scorecard.png")
    scorecard(results).to_csv(args.out / "scorecard.csv")
    finish(args)
    return results


def scorecard(results):
    """A row for each method, problem and noise level."""
    rows = {(name, *problem): score([part]) for name, parts in results.items() for problem, part in parts.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["method", "problem", "sigma"])


if __name__ == "__main__":
    run_as_command(main)
