"""Does the encoder invert the decoder, and do its variances follow the decoder's Jacobian? "Embrace the gap", part 1.

Trains near-deterministic VAEs (Reizinger et al., 2022, arXiv 2206.02416) at several precisions gamma^2 of the noise on
data from an orthogonal network with smooth leaky ReLUs, one mixing a seed, and prints, beside what the paper's runs
gave, the squared error of f(mu(x)), the encoder's variances, and their ratio to what the Jacobian says they must be:

    sigma_k^2(x) = (1 + gamma^2 ||J_:k||^2)^-1 as gamma^2 grows.

    python examples/self_consistency.py
    python examples/self_consistency.py --paper-scale
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.distributions import Normal
from torch.optim.lr_scheduler import CosineAnnealingLR

from guides import MeanField
from inference import ELBO, AnnealedPrecision, GeometricAnnealing, fit_many, self_consistency
from inference.plots.comparison import save_figure
from zoo import IMAVAE, mixed, orthogonal_mlp

DIM, START = 3, 10.0
# The public runs of the paper at gamma^2 = 10 ... 10^5: medians over 20 seeds.
PAPER = {
    1e1: (1.1e-2, 0.191, 1.08),
    1e2: (2.5e-4, 0.0257, 1.017),
    1e3: (4.5e-5, 3.28e-3, 0.999),
    1e4: (1.5e-5, 3.77e-4, 1.000),
    1e5: (4.0e-6, 4.44e-5, 1.002),
}
COLUMNS = ("squared error", "sigma^2", "sigma^2 / formula")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper-scale", action="store_true", help="20 seeds, 60 000 data, 60 000 steps")
    parser.add_argument("--gamma2", type=float, nargs="+", default=list(PAPER), help="precisions of the noise")
    parser.add_argument("--seeds", type=int, default=5, help="mixings, one pair each, trained at once")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of Adam, falling to zero as a cosine")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/self_consistency"))
    args = parser.parse_args(argv)
    if args.paper_scale:
        args.seeds, args.rows, args.steps = 20, 60_000, 60_000
    return args


def train(datasets, gamma2, args):
    """One pair for each data set, at a precision that rises over the first 60 % of the steps."""
    torch.manual_seed(0)
    pairs = [(IMAVAE(DIM, DIM).to(args.device), MeanField(DIM, DIM, hidden=(64, 64)).to(args.device)) for _ in datasets]
    history = fit_many(
        pairs,
        [data.train.to(args.device) for data in datasets],
        steps=args.steps,
        objective=AnnealedPrecision(ELBO(), GeometricAnnealing(max(1, args.steps * 3 // 5), START, gamma2)),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=args.rate),
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, args.steps),
        batch_size=args.batch,
        seed=0,
    )
    return pairs, history.seconds


def measure(model, guide, x):
    """Squared error per dimension, the encoder's mean variance, and the median ratio to the formula."""
    result = self_consistency(model, guide, x)
    error = result.reconstruction.square().mean().item() / DIM
    return error, result.var.mean().item(), result.ratio.median().item()


def draw(rows):
    """The three columns against gamma^2: every seed, the median, and the paper's."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    gammas = list(rows)
    for column, (ax, name) in enumerate(zip(figure.subplots(1, 3), COLUMNS, strict=True)):
        for seed in range(len(rows[gammas[0]])):
            ax.plot(gammas, [rows[g][seed, column] for g in gammas], ".", color="tab:blue", alpha=0.4)
        middle = [rows[g][:, column].median() for g in gammas]
        ax.plot(gammas, middle, color="tab:blue", label="here, median")
        ax.plot(list(PAPER), [PAPER[g][column] for g in PAPER], "k--", marker="x", linewidth=0.8, label="paper, median")
        ax.set_xscale("log")
        ax.set_xlabel("gamma^2")
        ax.set_title(name, fontsize=11)
        if column < 2:
            ax.set_yscale("log")
        else:
            ax.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        ax.legend(fontsize=8, frameon=False)
    return figure


def main(argv=None):
    args, start = parse(argv), time.perf_counter()
    law, options = Normal(0.0, 1.0), {"num": args.rows, "test_size": args.rows // 5, "dtype": torch.float32}
    datasets = [mixed(orthogonal_mlp(DIM, seed=s), sources=law, seed=s, **options) for s in range(args.seeds)]
    print(
        f"{args.seeds} mixings, {args.rows} data, a fifth held out and measured on, {args.steps} steps of {args.batch}"
    )
    print("medians here, and the paper's in brackets (mixings of another scale: compare slopes, and the last column)")
    print(f"{'gamma^2':>9s}" + "".join(f"{name:>24s}" for name in COLUMNS))
    rows = {}
    for gamma2 in args.gamma2:
        pairs, seconds = train(datasets, gamma2, args)
        results = [measure(*pair, data.test.to(args.device)) for pair, data in zip(pairs, datasets, strict=True)]
        rows[gamma2] = torch.tensor(results, dtype=torch.float64)
        middle, paper = rows[gamma2].median(0).values.tolist(), PAPER.get(gamma2, (float("nan"),) * 3)
        cells = [f"{a:.3g} ({b:.3g})" for a, b in zip(middle, paper, strict=True)]
        print(f"{gamma2:9.0e}" + "".join(f"{cell:>24s}" for cell in cells) + f"   {seconds:.0f} s")
    save_figure(draw(rows), args.out / "self_consistency.png")
    print(f"wrote {args.out}/ in {time.perf_counter() - start:.0f} s")
    return rows


if __name__ == "__main__":
    main()
