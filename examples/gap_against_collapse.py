"""A small gap is no sign of quality: the gap between evidence and ELBO against posterior collapse.

Deep Gaussian VAEs learn digits, dequantised and through the logit, at several fixed noise variances sigma^2 and from
several seeds, all at once. For each the gap is measured beside the KL term, the share of collapsed latents and log p
itself: the gap vanishes where the latents die, and the best model is not the one with the smallest gap.

    python examples/gap_against_collapse.py
    python examples/gap_against_collapse.py --seeds 5 --steps 10000 --rows 64
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import torch
from _common import (
    example_parser,
    expect,
    finish,
    kept_of_pairs,
    pair_under_seed,
    panels,
    parse_with_presets,
    run_as_command,
    save,
    table_line,
    train_many,
)
from scipy.stats import spearmanr

from guides import MeanField
from inference import AnalyticKLELBO, evidence, gap
from inference.diagnostics import collapsed, latent_kl
from zoo import DeepGaussianVAE, FixedNoise, digits_logit

COLUMNS = ("log p", "gap", "error", "KL", "% collapsed")
SMOKE = {"noises": [30.0, 1.0], "seeds": 1, "steps": 2, "rows": 2, "hidden": 4}
EPSILON = 0.05  # nats below which a latent is collapsed, if for 99 % of the data


def parse(argv):
    seed = "the first initialisation, of noise and order"
    parser = example_parser(__doc__, "gap_against_collapse", seed=seed)
    noises = [100.0, 30.0, 20.0, 10.0, 6.0, 3.0, 2.0, 1.0]
    parser.add_argument("--noises", type=float, nargs="+", default=noises, help="fixed values of sigma^2")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each")
    parser.add_argument("--latent-dim", type=int, default=2, help="K; up to 3 log p is found by quadrature")
    parser.add_argument("--hidden", type=int, default=64, help="width of the hidden layers")
    parser.add_argument("--steps", type=int, default=1000, help="of Adam")
    parser.add_argument("--rows", type=int, default=8, help="data on which the gap is measured")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def new_pair(var, args):
    sizes, hidden = (64, args.latent_dim), (args.hidden,)
    model = DeepGaussianVAE(*sizes, hidden=hidden, noise=FixedNoise(math.sqrt(var))).double()
    return model, MeanField(*sizes, hidden=hidden).double()


def train(runs, x, args):
    """A pair for every sigma^2 and seed, trained at once."""
    pairs = [pair_under_seed(args.seed + s, partial(new_pair, var, args), args.device) for var, s in runs]
    train_many(pairs, x, steps=args.steps, rate=5e-3, objective=AnalyticKLELBO(), batch_size=256, seed=args.seed)
    return pairs


def measure(model, guide, x, args):
    """The numbers of :data:`COLUMNS`: means over some data, in nats; the share is over all of them."""
    rows = x[: args.rows]
    known = evidence(model, rows, guide=guide, seed=args.seed, progress=False)
    found = gap(model, guide, rows, known=known, num_samples=64, restarts=0, seed=args.seed, progress=False)
    kl = latent_kl(model, guide, x, progress=False)
    error = float(found.elbo_error.square().sum().sqrt()) / len(rows)
    share = 100 * float(collapsed(kl, epsilon=EPSILON).double().mean())
    return [float(known.value.mean()), float(found.total.mean()), error, float(kl.sum(1).mean()), share]


def run(x, args):
    """A row for every sigma^2 and seed: sigma^2, and the numbers of :data:`COLUMNS`."""
    runs = list(product(args.noises, range(args.seeds)))
    expect(args, len(runs))
    measures = {f"{var:g}_{seed}": partial(measure, x=x, args=args) for var, seed in runs}
    rows = kept_of_pairs(args, partial(train, runs, x, args), measures)
    return [[var, *row] for (var, _), row in zip(runs, rows, strict=True)]


def show(rows, args):
    print(table_line("sigma^2, mean over seeds", COLUMNS, width=14))
    for var in args.noises:
        values = torch.tensor([row[1:] for row in rows if row[0] == var], dtype=torch.float64).mean(0)
        print(table_line(f"{var:>12g}", [f"{value:.3f}" for value in values.tolist()], width=14))


def conclude(rows):
    """Whether a small gap goes with a large log p, and what the gap is where all latents are collapsed."""
    values = torch.tensor(rows, dtype=torch.float64)
    log_p, gaps, errors, shares = values[:, 1], values[:, 2], values[:, 3], values[:, 5]
    best, dead = int(log_p.argmax()), shares == 100
    smaller = int((gaps < gaps[best] - 2 * errors).sum())
    print(
        f"\nthe best model, log p {log_p[best]:.2f}, has a gap of {gaps[best]:.3f} ({errors[best]:.1g}) nats;", end=" "
    )
    print(f"{smaller} of the other {len(rows) - 1} have a smaller one, beyond two standard errors")
    if dead.any():
        widest = int(torch.where(dead, gaps, -math.inf).argmax())
        print(f"with all latents collapsed ({int(dead.sum())} runs) the gap is at most {gaps[widest]:.4f}", end="")
        print(f" ({errors[widest]:.1g}) nats, and log p {log_p[dead].max():.2f} at best")
    if len(rows) > 3 and float(gaps.std()) > 0 and float(log_p.std()) > 0:
        rho = float(spearmanr(gaps.numpy(), log_p.numpy()).statistic)
        error = (1 - rho**2) / math.sqrt(len(rows) - 1)
        print(f"rank correlation of gap and log p over {len(rows)} runs: {rho:+.2f} ({error:.2f})", end="")
        print("; were a small gap a sign of quality, it would be negative")


def draw(rows):
    """The gap against sigma^2, against the KL term, and against log p; the colour is the share of collapsed latents."""
    values = torch.tensor(rows, dtype=torch.float64)
    figure, axes = panels(1, 3, size=(11, 3.6), sharey=True)
    styles = ((0, "sigma^2", "log"), (4, "KL term (nats per data point)", "linear"), (1, "log p (nats)", "linear"))
    for ax, (column, label, scale) in zip(axes, styles, strict=True):
        dots = ax.scatter(
            values[:, column],
            values[:, 2],
            c=values[:, 5],
            cmap="viridis_r",
            vmin=0,
            vmax=100,
            s=26,
            edgecolor="0.3",
            linewidth=0.4,
        )
        ax.set(xscale=scale, xlabel=label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("gap, log p - ELBO (nats)")
    figure.colorbar(dots, ax=axes, label="collapsed latents (%)")
    return figure


def main(argv=None):
    args = parse(argv)
    x = digits_logit(test_size=0, dtype=torch.float64).train
    x = (x - x.mean(0)).to(args.device)
    print(f"{len(x)} digits, K = {args.latent_dim}, {args.seeds} seeds; gaps are means over {args.rows} data, in nats")
    rows = run(x, args)
    show(rows, args)
    conclude(rows)
    save(draw(rows), args, "gap_against_collapse.png")
    finish(args)
    return rows


if __name__ == "__main__":
    run_as_command(main)
