"""What does it help to train by another objective than the ELBO? A table of bounds, gaps and gradient noise.

A linear VAE (whose evidence is exact) and a small deep VAE are first trained by the ELBO for a while. From there, each
objective trains a copy of the pair. The table says what value the objective itself reached, what ELBO and log-evidence
the pair then has, the gap between them, and the signal-to-noise ratio of the objective's gradient at the common start.

    python examples/compare_objectives.py --particles 64 --steps 5000 --device cuda
"""

from __future__ import annotations

import copy
import math
import time
from functools import cache, partial

import torch
from _common import (
    example_parser,
    expect,
    finish,
    kept,
    panels,
    parse_with_presets,
    run_as_command,
    save,
    say,
    table_line,
)

import inference
from guides import Linear, MeanField
from inference.core.protocols import SupportsLogEvidence
from zoo import DeepGaussianVAE, LinearVAE, Scaled, digits

COLUMNS = ("bound", "ELBO", "log p", "gap", "SNR encoder", "SNR decoder", "seconds")
SMOKE = {"particles": 4, "latent_dim": 2, "warmup": 5, "steps": 3, "repeats": 2, "samples": 20, "rows": 20}


def parse(argv):
    parser = example_parser(__doc__, "compare_objectives", seed="initialisation, training and gradients")
    parser.add_argument("--particles", type=int, default=16, help="samples per data point, a multiple of 4")
    parser.add_argument("--latent-dim", type=int, default=8, help="K of both models")
    parser.add_argument("--warmup", type=int, default=600, help="steps by the ELBO before the objectives part")
    parser.add_argument("--steps", type=int, default=600, help="steps by each objective")
    parser.add_argument("--batch", type=int, default=128, help="data of a training step")
    parser.add_argument("--repeats", type=int, default=50, help="gradients for the signal-to-noise ratio")
    parser.add_argument("--samples", type=int, default=1000, help="samples per data point for the estimated log p")
    parser.add_argument("--rows", type=int, default=300, help="rows on which the table's values are measured")
    args = parse_with_presets(parser, argv, smoke=SMOKE)
    if args.particles < 4 or args.particles % 4:
        parser.error(f"expected --particles to be a multiple of 4, got {args.particles}")
    return args


def objectives(k):
    """Name to objective, of k samples per data point each."""
    return {
        "ELBO": inference.ELBO(k),
        "sticking the landing, 1": inference.StickingTheLanding(1),
        "IWAE": inference.IWELBO(k),
        "DReG": inference.DReG(k),
        "CIWAE": inference.CIWAE(0.5, k),
        "MIWAE": inference.MIWAE(4, k // 4),
        "PIWAE": inference.PIWAE(4, k // 4),
        "Renyi, alpha = 0.5": inference.VRBound(0.5, k),
        "CUBO (guide only)": inference.CUBO(2, k),
        "wake-wake": inference.WakeWake(k),
        "wake-sleep": inference.WakeSleep(k),
        "target rate 20": inference.TargetRate(20.0, 5.0, k),
        "BILBO": inference.BILBO(k),
    }


def train(model, guide, x, objective, steps, args):
    """Adam with a learning rate that falls to zero; returns the seconds."""
    start = time.perf_counter()
    inference.fit(
        model,
        guide,
        x,
        steps=steps,
        objective=objective,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))),
        batch_size=args.batch,
        seed=args.seed,
        device=args.device,
        progress=False,
    )
    return time.perf_counter() - start


def measure(model, guide, x, objective, args):
    """Bound, ELBO, log p and gap of a trained pair in nats per data point; log p is exact where the model knows it."""
    with torch.no_grad():
        value = float(objective.per_datum(model, guide, x).mean())
        weights = inference.log_weights(model, guide, x, num_samples=args.samples, chunk=100, progress=False)
        log_p = model.log_evidence(x) if isinstance(model, SupportsLogEvidence) else inference.iwae(weights).value
    bound = -value if isinstance(objective, inference.CUBO) else value
    lower, log_p = float(inference.elbo(weights).value.mean()), float(log_p.mean())
    return bound, lower, log_p, log_p - lower


def row(name, objective, model, guide, x, args):
    """The numbers of :data:`COLUMNS` of one objective, which trains this pair."""
    if name == "BILBO":
        model = inference.FittedPrior(model, args.latent_dim)
    noise = inference.gradient_noise(
        objective, model, guide, x[:20], num_repeats=args.repeats, seed=args.seed, progress=False
    )
    seconds = train(model, guide, x, objective, args.steps, args)
    if name == "BILBO":
        model.freeze(guide, x)
    ratios = [noise[half].signal_to_noise for half in ("encoder", "decoder")]
    return *measure(model, guide, x[: args.rows], objective, args), *ratios, seconds


def compare(title, model, guide, x, args):
    """Name of the objective to the numbers of :data:`COLUMNS`."""

    @cache
    def started():
        """The common start, which no row needs where all are kept."""
        train(model, guide, x, inference.ELBO(), args.warmup, args)
        return model, guide

    def of(name, objective):
        return row(name, objective, *copy.deepcopy(started()), x.to(args.device), args)

    rows = {}
    for name, objective in objectives(args.particles).items():
        rows[name] = kept(args, f"{title}_{name}", partial(of, name, objective))
        say(table_line(name, [f"{value:.3f}" for value in rows[name]]))
    return rows


def conclude(tables):
    """Which objective ends at the highest log p and the smallest gap, and whose gradient has least noise."""
    print()
    for title, rows in tables.items():
        by_log_p, by_elbo = (max(rows, key=lambda name: rows[name][column]) for column in (2, 1))
        by_gap = min(rows, key=lambda name: rows[name][3])
        print(f"{title}: log p is highest after {by_log_p}, {rows[by_log_p][2] - rows['ELBO'][2]:+.3f} nats", end=" ")
        print(f"against the ELBO; the ELBO itself after {by_elbo}; the gap is smallest after {by_gap}", end=", ")
        print(f"{rows[by_gap][3]:.3f} nats, {rows['ELBO'][3]:.3f} after the ELBO (one seed, so no error is known)")


def draw(tables):
    """Two panels a model, one row an objective: the gap, and the gradient's signal-to-noise ratio."""
    figure, axes = panels(1, 2 * len(tables), size=(13, 4.5), sharey=True)
    for (gap, noise), (title, rows) in zip(axes.reshape(-1, 2), tables.items(), strict=True):
        names, values = list(rows), torch.tensor(list(rows.values()))
        gap.plot(values[:, 3], names, "o")
        gap.set_title(title, fontsize=9)
        noise.plot(values[:, 4], names, "o", label="encoder")
        noise.plot(values[:, 5], names, "s", label="decoder", fillstyle="none")
        noise.legend(fontsize=8)
        for ax, label in ((gap, "gap, log p - ELBO (nats)"), (noise, "gradient signal / noise")):
            ax.set(xlabel=label, xlim=(0, None))
            ax.grid(axis="y", alpha=0.3)
    axes[0].invert_yaxis()
    return figure


def main(argv=None):
    args = parse(argv)
    x, k = digits(transform=Scaled(16.0), dtype=torch.float32).train, args.latent_dim
    torch.manual_seed(args.seed)
    pairs = {
        "linear VAE, exact log p": (LinearVAE(64, k, sigma=0.3), Linear(64, k)),
        "deep VAE, importance-sampled log p": (DeepGaussianVAE(64, k, hidden=(64,)), MeanField(64, k, hidden=(64,))),
    }
    tables = {}
    expect(args, len(pairs) * len(objectives(args.particles)))
    for title, (model, guide) in pairs.items():
        say(f"\n{title}; nats per data point\n{table_line('objective', COLUMNS)}")
        tables[title] = compare(title, model.standardise_by(x), guide.standardise_by(x), x, args)
    conclude(tables)
    save(draw(tables), args, "compare_objectives.png")
    finish(args)
    return tables


if __name__ == "__main__":
    run_as_command(main)
