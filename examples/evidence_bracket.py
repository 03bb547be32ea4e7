"""How narrow a bracket of the evidence does a minute buy, for a trained deep VAE?

Bidirectional Monte Carlo brackets the evidence of data that the model made, whatever the guide: from below by annealing
to the posterior, from above by annealing back from the latents that made the data. On real data long chains stand in
for those latents, and the upper end assumes that they have converged.

    OMP_NUM_THREADS=1 python examples/evidence_bracket.py --latent-dim 8 16 --temperatures 100 300 1000 3000
"""

from __future__ import annotations

import time
from functools import cache, partial

import torch
from _common import example_parser, expect, finish, kept, panels, parse_with_presets, run_as_command, save, say
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

import zoo
from guides import MeanField
from inference import (
    AnalyticKLELBO,
    Annealed,
    bdmc,
    converged_bracket,
    cubo,
    elbo,
    eubo,
    fit,
    iwae,
    log_weights,
    summarise,
)

HEAD = f"{'':18s}{'T':>6s}{'mean':>9s}{'95 %':>8s}{'certified':>11s}{'CPU s':>8s}{'wall s':>8s}"
SMOKE = {"steps": 30, "num_data": 4, "latent_dim": [3], "temperatures": [5, 10], "chains": 4, "samples": 20}


def parse(argv):
    parser = example_parser(__doc__, "evidence_bracket", seed="initialisation, training and annealing")
    parser.add_argument("--latent-dim", type=int, nargs="+", default=[8, 16], help="K of each model")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--num-data", type=int, default=64, help="data to bracket, simulated and real")
    parser.add_argument("--temperatures", type=int, nargs="+", default=[100, 300, 1000, 3000], help="of annealing")
    parser.add_argument("--chains", type=int, default=16, help="of annealing, for each datum")
    parser.add_argument("--samples", type=int, default=2000, help="importance samples, for comparison")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def train(x, latent_dim, args):
    torch.manual_seed(args.seed)
    model = zoo.DeepGaussianVAE(x.shape[1], latent_dim).to(x).standardise_by(x)
    guide = MeanField(x.shape[1], latent_dim).to(x).standardise_by(x)
    options = {"objective": AnalyticKLELBO(), "batch_size": 256, "seed": args.seed, "progress": False}
    fit(model, guide, x, steps=args.steps, **options)
    return model.requires_grad_(False), guide.requires_grad_(False)


def simulated(model, guide, x, method, args):
    """Raw ends on data that the model made, with the width of the data set's mean at 95 %."""
    found = bdmc(model, len(x), guide=guide, method=method, seed=args.seed, progress=False)
    got = found.evidence
    return got.raw_lower, got.raw_upper, got.mean.upper - got.mean.lower, found.draws


def real(model, guide, x, method, args):
    """The same on real data, if chains of as many steps as there are temperatures have converged."""
    num_steps = max(4, method.num_temperatures)
    options = {"method": method, "num_steps": num_steps, "seed": args.seed, "progress": False}
    got = converged_bracket(model, x, guide=guide, **options)
    return got.raw_lower, got.upper_if_converged, float("nan"), None


def measure(bracket, pair, x, args):
    """A row for each number of temperatures: T, mean width, 95 % quantile of its size, certified, seconds, s.e."""
    pair, rows, remarks = pair(), [], []
    for num in args.temperatures:
        wall, cpu = time.perf_counter(), time.process_time()
        lower, upper, certified, draws = bracket(*pair, x, Annealed(num, args.chains), args)
        seconds = time.process_time() - cpu, time.perf_counter() - wall
        rows.append((num, *widths(upper - lower, certified), *seconds, error_of(upper - lower)))
        remarks.append(doubts(lower, upper))
    return {"rows": rows, "remarks": remarks, "bounds": other_bounds(pair, x, draws, lower, args)}


def show(name, found, args):
    for row, remark in zip(found["rows"], found["remarks"], strict=True):
        say("{:18s}{:6d}{:9.4f}{:8.3f}{:11.3f}{:8.1f}{:8.1f}".format(name, *row[:-1]) + remark)
    bounds = ", ".join(f"{n} {v:+.2f}" for n, v in found["bounds"].items())
    say(f"  nats above the lower end, S = {args.samples}: {bounds}")


def bounded(width):
    """The widths of the data whose upper end stands; where the chains disprove their assumption it is infinite."""
    return width[width.isfinite()]


def widths(width, certified):
    """Mean and 95 % quantile of the size; NaN where no upper end stands."""
    kept = bounded(width)
    return (float(kept.mean()), float(kept.abs().quantile(0.95)) if len(kept) else float("nan"), certified)


def error_of(width):
    kept = bounded(width)
    return float(kept.std()) / len(kept) ** 0.5 if len(kept) > 1 else float("nan")


def doubts(lower, upper):
    """What a reader has to know of a row: upper ends that are disproved and left out, and ends upside down by noise."""
    disproved, below = int((~upper.isfinite()).sum()), int((upper < lower).sum())
    said = f"  {disproved} of {len(upper)} upper ends disproved, left out" if disproved else ""
    return said + (f"  {below} brackets upside down by noise" if below else "")


def other_bounds(pair, x, draws, lower, args):
    """The mean of other figures less the lower end: of these only EUBO is an upper bound, and only on average."""
    weights = log_weights(*pair, x if draws is None else draws.x, num_samples=args.samples, progress=False)
    figures = {"ELBO": elbo(weights), "IWAE": iwae(weights), "CUBO": cubo(summarise([weights], args.samples))}
    if draws is not None:
        figures["EUBO"] = eubo(*pair, draws)
    return {name: float((figure.value - lower).mean()) for name, figure in figures.items()}


def conclude(results):
    """The narrowest bracket of each model, and what it cost."""
    print()
    for latent_dim, found in results.items():
        for name, rows in found.items():
            first, last = rows[0], rows[-1]
            print(f"K = {latent_dim}, {name}: {last[0]} temperatures, {last[4]:.1f} CPU seconds, leave", end=" ")
            print(
                f"{last[1]:.4f} ({last[6]:.1g}) nats on average where {first[0]} leave {first[1]:.4f} ({first[6]:.1g})"
            )


def draw(results):
    """Width of the bracket against CPU seconds, one panel for each latent dimension."""
    figure, axes = panels(1, len(results), size=(4.8 * len(results), 3.8), sharey=True)
    for ax, (latent_dim, found) in zip(axes, results.items(), strict=True):
        for (name, rows), colour in zip(found.items(), ("tab:blue", "tab:orange"), strict=True):
            draw_widths(ax, name, rows, colour)
        ax.set(xscale="log", title=f"K = {latent_dim}", xlabel="CPU seconds (labels: temperatures)")
        ax.axhline(0, color="grey", linewidth=0.5)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("upper - lower end (nats)")
    axes[-1].legend(fontsize=7, frameon=False)
    return figure


def draw_widths(ax, name, rows, colour):
    temperatures, mean, quantile, certified, seconds, _, error = zip(*rows, strict=True)
    ax.plot(seconds, quantile, "o-", color=colour, label=f"{name}: 95 % of the data, size")
    ax.errorbar(seconds, mean, error, fmt="s:", color=colour, capsize=2, label=f"{name}: mean, with its s.e.")
    if name == "simulated":
        ax.plot(seconds, certified, "k--", linewidth=1, label=f"{name}: mean, certified at 95 %")
    for num, *point in zip(temperatures, seconds, quantile, strict=True):
        ax.annotate(f"{num}", point, xytext=(3, 4), textcoords="offset points", fontsize=7)


def main(argv=None):
    args = parse(argv)
    data = zoo.digits().to(device=args.device)
    held_out = data.test[: args.num_data]
    print(f"{data}\n{torch.get_num_threads()} threads")
    results = {}
    expect(args, 2 * len(args.latent_dim))
    for latent_dim in args.latent_dim:
        pair = cache(partial(train, data.train, latent_dim, args))  # not needed where both results are kept
        of = f"{args.chains} chains, {len(held_out)} data points"
        say(f"\nK = {latent_dim}: upper - lower end in nats, {of}\n{HEAD}")
        results[latent_dim] = {}
        for name, bracket in {"simulated": simulated, "real, if converged": real}.items():
            found = kept(args, f"K{latent_dim}_{name}", partial(measure, bracket, pair, held_out, args))
            show(name, found, args)
            results[latent_dim][name] = found["rows"]
    conclude(results)
    save(draw(results), args, "evidence_bracket.png")
    finish(args)
    return results


if __name__ == "__main__":
    run_as_command(main)
