"""Does the encoder invert the decoder, and do its variances follow the decoder's Jacobian? "Embrace the gap", part 1.

Trains near-deterministic VAEs (Reizinger et al., 2022, arXiv 2206.02416) at several precisions gamma^2 of the noise on
data from an orthogonal network with smooth leaky ReLUs, one mixing per seed, and prints the squared error of f(mu(x)),
the encoder's variances, and their ratio to those that the Jacobian predicts:

    sigma_k^2(x) = (1 + gamma^2 ||J_:k||^2)^-1 as gamma^2 grows.

Error and variance depend on the mixing's scale, and the paper's was another one: of them the slopes are compared, of
the ratio the paper's medians themselves.

    python examples/self_consistency.py
    python examples/self_consistency.py --paper-scale
"""

from __future__ import annotations

import numpy as np
import torch
from _common import (
    add_near_deterministic_options,
    example_parser,
    expect,
    finish,
    kept,
    panels,
    parse_with_presets,
    run_as_command,
    save,
    say,
    train_near_deterministic,
)

from guides import MeanField
from inference import self_consistency
from zoo import IMAVAE, mixed, orthogonal_mlp

DIM = 3
# The ratio in the public runs of the paper: medians over 20 seeds.
PAPER = {1e1: 1.08, 1e2: 1.017, 1e3: 0.999, 1e4: 1.000, 1e5: 1.002}
COLUMNS = ("squared error per dimension", "sigma^2", "sigma^2 / formula")
PAPER_SCALE = {"seeds": 20, "rows": 60_000, "steps": 60_000}
SMOKE = {"gamma2": [10.0, 1000.0], "seeds": 2, "rows": 100, "steps": 3}


def parse(argv):
    seed = "initialisation, noise and order; the mixings stay"
    parser = example_parser(__doc__, "self_consistency", seed=seed)
    parser.add_argument("--gamma2", type=float, nargs="+", default=list(PAPER), help="precisions of the noise")
    parser.add_argument("--seeds", type=int, default=5, help="mixings, one pair each, trained at once")
    add_near_deterministic_options(parser, steps=6000, rate=1e-3)
    return parse_with_presets(parser, argv, paper_scale=PAPER_SCALE, smoke=SMOKE)


def dataset(seed, args):
    sources = torch.distributions.Normal(0.0, 1.0)
    options = {"num": args.rows, "test_size": args.rows // 5, "dtype": torch.float32}
    return mixed(orthogonal_mlp(DIM, seed=seed), sources=sources, seed=seed, **options)


def new_pair():
    return IMAVAE(DIM, DIM), MeanField(DIM, DIM, hidden=(64, 64))


def measure(model, guide, x):
    """Squared error per dimension, the encoder's mean variance, and the median ratio to the formula."""
    result = self_consistency(model, guide, x, seed=0, progress=False)
    error = result.reconstruction.square().mean().item() / DIM
    return error, result.var.mean().item(), result.ratio.median().item()


def draw(rows):
    """The three columns against gamma^2: every seed and the median; the paper's ratio."""
    figure, axes = panels(1, 3, size=(11, 3.6))
    gammas = list(rows)
    for column, (ax, name) in enumerate(zip(axes, COLUMNS, strict=True)):
        for seed in range(len(rows[gammas[0]])):
            ax.plot(gammas, [rows[g][seed, column] for g in gammas], ".", color="tab:blue", alpha=0.4)
        middle = [rows[g][:, column].median() for g in gammas]
        ax.plot(gammas, middle, color="tab:blue", label="here, median")
        ax.set_xscale("log")
        ax.set_xlabel("gamma^2")
        ax.set_title(name, fontsize=11)
        if column < 2:
            ax.set_yscale("log")
        else:
            ax.plot(list(PAPER), list(PAPER.values()), "k--", marker="x", linewidth=0.8, label="paper, median")
            ax.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        ax.legend(fontsize=8, frameon=False)
    return figure


def trained_and_measured(datasets, gamma2, args):
    pairs, seconds = train_near_deterministic(new_pair, datasets, gamma2, args)
    results = [list(measure(*pair, data.test.to(args.device))) for pair, data in zip(pairs, datasets, strict=True)]
    return {"results": results, "seconds": seconds}


def run(datasets, gamma2, args):
    """Train a pair for each data set and print the medians of the columns: (seeds, columns)."""
    found = kept(args, f"gamma2_{gamma2:g}", lambda: trained_and_measured(datasets, gamma2, args))
    values, seconds = torch.tensor(found["results"], dtype=torch.float64), found["seconds"]
    cells = [f"{value:.3g}" for value in values.median(0).values.tolist()]
    cells[-1] += f" ({PAPER[gamma2]:.3g})" if gamma2 in PAPER else ""
    say(f"{gamma2:9.0e}" + "".join(f"{cell:>30s}" for cell in cells) + f"   {seconds:.0f} s")
    return values


def slope(rows, column):
    """Of log median against log gamma^2 over the upper half of the precisions, by least squares."""
    gammas = sorted(rows)[-max(2, (len(rows) + 1) // 2) :]
    return np.polyfit(np.log(gammas), np.log([float(rows[g][:, column].median()) for g in gammas]), 1)[0]


def conclude(rows):
    """Whether the slopes are those of the theory, and the ratio one."""
    ratio = rows[max(rows)][:, 2]
    if len(rows) > 1:
        print(f"slopes against gamma^2: squared error {slope(rows, 0):.2f}, sigma^2 {slope(rows, 1):.2f}", end="")
        print("; theory -2 of the best encoder's error, -1 of the variance")
    print(f"at gamma^2 = {max(rows):.0e} the variances are {ratio.min():.3f} to {ratio.max():.3f} of the formula")


def main(argv=None):
    args = parse(argv)
    datasets = [dataset(seed, args) for seed in range(args.seeds)]
    print(f"{args.seeds} mixings, {args.rows} data points, a fifth held out and measured on", end="")
    print(f", {args.steps} steps of {args.batch}")
    print("medians over the mixings, and the paper's ratio in brackets")
    print(f"{'gamma^2':>9s}" + "".join(f"{name:>30s}" for name in COLUMNS))
    expect(args, len(args.gamma2))
    rows = {gamma2: run(datasets, gamma2, args) for gamma2 in args.gamma2}
    conclude(rows)
    save(draw(rows), args, "self_consistency.png")
    finish(args)
    return rows


if __name__ == "__main__":
    run_as_command(main)
