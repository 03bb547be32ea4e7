"""What does it help to train by another objective than the ELBO? A table of bounds, gaps and gradient noise.

A linear VAE (whose evidence is exact) and a small deep VAE are first trained by the ELBO for a while. From there, each
objective trains a copy of the pair. The table says what value the objective itself reached, what ELBO and log-evidence
the pair then has, the gap between them, and the signal-to-noise ratio of the objective's gradient at the common start.

    python examples/compare_objectives.py --particles 64 --steps 5000 --device cuda
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

import inference
from guides import Linear, MeanField
from inference.core.protocols import SupportsLogEvidence
from inference.plots.comparison import save_figure
from zoo import DeepGaussianVAE, LinearVAE, digits
from zoo.data.preprocessing import Scaled

COLUMNS = ("bound", "ELBO", "log p", "gap", "SNR encoder", "SNR decoder", "seconds")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=16, help="samples per datum, a multiple of 4")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=600, help="steps by the ELBO before the objectives part")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=50, help="gradients for the signal-to-noise ratio")
    parser.add_argument("--samples", type=int, default=1000, help="samples per datum for the estimated log p")
    parser.add_argument("--rows", type=int, default=300, help="rows on which the table's values are measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/compare_objectives"))
    args = parser.parse_args(argv)
    if args.particles < 4 or args.particles % 4:
        parser.error(f"expected --particles to be a multiple of 4, got {args.particles}")
    return args


def objectives(k):
    """Name to objective, of k samples per datum each."""
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
    """Adam with a learning rate that falls to zero."""
    inference.fit(
        model,
        guide,
        x,
        steps=steps,
        objective=objective,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))),
        batch_size=args.batch,
        seed=0,
        device=args.device,
    )


def measure(model, guide, x, objective, args):
    """Bound, ELBO, log p and gap of a trained pair in nats per datum; log p is exact where the model knows it."""
    with torch.no_grad():
        value = float(objective.per_datum(model, guide, x).mean())
        weights = inference.log_weights(model, guide, x, num_samples=args.samples, chunk=100)
        log_p = model.log_evidence(x) if isinstance(model, SupportsLogEvidence) else inference.iwae(weights).value
    lower, log_p = float(inference.elbo(weights).value.mean()), float(log_p.mean())
    return (-value if isinstance(objective, inference.CUBO) else value), lower, log_p, log_p - lower


def compare(model, guide, x, args):
    """Name of the objective to the numbers of :data:`COLUMNS`."""
    train(model, guide, x, inference.ELBO(), args.warmup, args)
    rows, x = {}, x.to(args.device)
    for name, objective in objectives(args.particles).items():
        pair = copy.deepcopy((model, guide))
        own, code = (inference.FittedPrior(pair[0], args.latent_dim) if name == "BILBO" else pair[0]), pair[1]
        noise = inference.gradient_noise(objective, own, code, x[:20], num_repeats=args.repeats, seed=0, progress=False)
        start = time.perf_counter()
        train(own, code, x, objective, args.steps, args)
        seconds = time.perf_counter() - start
        if name == "BILBO":
            own.freeze(code, x)
        ratios = [noise[g].signal_to_noise for g in ("encoder", "decoder")]
        rows[name] = (*measure(own, code, x[: args.rows], objective, args), *ratios, seconds)
        print(f"{name:24s}" + "".join(f"{v:>13.3f}" for v in rows[name]))
    return rows


def draw(tables):
    """Two panels a model, one row an objective: the gap, and the gradient's signal-to-noise ratio."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = iter(figure.subplots(1, 2 * len(tables), sharey=True))
    for title, rows in tables.items():
        names, values = list(rows), torch.tensor(list(rows.values()))
        gap, noise = next(axes), next(axes)
        gap.plot(values[:, 3], names, "o")
        noise.plot(values[:, 4], names, "o", label="encoder")
        noise.plot(values[:, 5], names, "s", label="decoder", fillstyle="none")
        noise.legend(fontsize=8)
        gap.set_title(title, fontsize=9)
        for ax, label in ((gap, "gap, log p - ELBO (nats)"), (noise, "gradient signal / noise")):
            ax.set(xlabel=label, xlim=(0, None))
            ax.grid(axis="y", alpha=0.3)
    figure.axes[0].invert_yaxis()
    return figure


def main(argv=None):
    args = parse(argv)
    x, k = digits(transform=Scaled(16.0), dtype=torch.float32).train, args.latent_dim
    torch.manual_seed(0)
    pairs = {
        "linear VAE, exact log p": (LinearVAE(64, k, sigma=0.3), Linear(64, k)),
        "deep VAE, importance-sampled log p": (DeepGaussianVAE(64, k, hidden=(64,)), MeanField(64, k, hidden=(64,))),
    }
    tables = {}
    for title, (model, guide) in pairs.items():
        print(f"\n{title}; nats per datum\n{'objective':24s}" + "".join(f"{c:>13s}" for c in COLUMNS))
        tables[title] = compare(model.standardise_by(x), guide.standardise_by(x), x, args)
    save_figure(draw(tables), args.out / "compare_objectives.png")
    return tables


if __name__ == "__main__":
    main()
