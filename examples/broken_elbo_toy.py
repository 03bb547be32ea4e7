"""The toy model of "Fixing a Broken ELBO" (Alemi et al., 2018): one evidence, any rate.

Data of 30 symbols hide a class of two; an encoder, a decoder and a marginal of 30 codes are trained on exact sums under
the ELBO, under weighted rates and at a target rate. Every row may fit the data perfectly: which part of it the code
tells is not the ELBO's affair. Prints the exact rate R, distortion D, mutual information I(x; z), the divergence
KL(p || g) from what the model generates, and the code's information on the class, I(z; z*), beside the paper's numbers.

    python examples/broken_elbo_toy.py
    python examples/broken_elbo_toy.py --runs 12 --target 0.3
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inference.plots.comparison import save_figure
from zoo.benchmarks.categorical_channel import channel_terms, divergence, generated, optimal_decoder, optimal_marginal
from zoo.benchmarks.toy_channel import beta_loss, class_information, target_rate_loss, toy_data, train_channel

QUANTITIES = ("R", "D", "R + D", "I(x; z)", "KL(p||g)", "I(z; z*)")
# What the paper states for its run at beta one and at the target rate 0.5 (section 4, appendix E).
PAPER = {"ELBO": "R = .0002, p ~ g", "target 0.5": "R = .4999, p ~ g, two clusters of codes, 70% and 30%"}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.5, help="target rate in nats")
    parser.add_argument("--weight", type=float, default=2.0, help="second weight of the distance to the target")
    parser.add_argument("--betas", type=float, nargs="*", default=[0.5, 2.0])
    parser.add_argument("--runs", type=int, default=3, help="starts, trained side by side")
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/broken_elbo_toy"))
    return parser.parse_args(argv)


def losses(args):
    """The objectives by name."""
    return {
        "ELBO": beta_loss(),
        **{f"beta {beta:g}": beta_loss(beta) for beta in args.betas},
        f"target {args.target:g}": target_rate_loss(args.target),
        f"target {args.target:g}, weight {args.weight:g}": target_rate_loss(args.target, weight=args.weight),
    }


@torch.no_grad()
def measure(joint, laws):
    """The six quantities of each run, (S, 6), from the logarithms of encoder, decoder and marginal."""
    log_p = joint.logsumexp(0)
    _, distortion, rate, information = channel_terms(log_p, *laws)
    fit = divergence(log_p, generated(*laws[1:]))
    classes = class_information(joint, laws[0])
    return torch.stack([rate, distortion, rate + distortion, information, fit, classes], -1)


def hand_built(joint):
    """The best code of one bit: the encoder draws the class from its posterior, the others are optimal for it."""
    log_p = joint.logsumexp(0)
    encoder = (joint - log_p).mT[None]
    return encoder, optimal_decoder(log_p, encoder), optimal_marginal(log_p, encoder)


def table(results, entropy):
    """One line an objective: mean and range over the runs."""
    lines = [f"H(x) = {entropy:.5f} nats; mean over runs, below it their range", f"{'':22s}"]
    lines[1] += "".join(f"{q:>15s}" for q in QUANTITIES) + "  the paper"
    for name, values in results.items():
        low, high = values.amin(0), values.amax(0)
        means = "".join(f"{m + 0.0:15.4f}" for m in values.mean(0).tolist())
        lines.append(f"{name:22s}{means}  {PAPER.get(name, '')}".rstrip())
        if len(values) > 1:
            lines.append(f"{'':22s}" + "".join(f"{f'{a:.4f}-{b:.4f}':>15s}" for a, b in zip(low, high, strict=True)))
    return "\n".join(lines)


def figure(joint, laws, results):
    """Data, encoder, decoder and marginal of the first run of each objective, one row each."""
    log_p = joint.logsumexp(0)
    canvas = Figure(figsize=(11, 2.3 * len(laws)), layout="constrained")
    axes = canvas.subplots(len(laws), 4, squeeze=False)
    symbols = range(len(log_p))
    for row, (name, (encoder, decoder, marginal)) in zip(axes, laws.items(), strict=True):
        row[0].bar(symbols, log_p.exp().numpy(), color="lightgrey", label="data p(x)")
        row[0].step(
            symbols, generated(decoder, marginal)[0].exp().numpy(), where="mid", color="tab:red", label="model g(x)"
        )
        # Codes in the order of the mean symbol that they stand for, the unused ones with the rest.
        order = (optimal_decoder(log_p, encoder)[0].exp() @ torch.arange(len(log_p), dtype=log_p.dtype)).argsort()
        row[1].imshow(encoder[0][:, order].exp().mT.numpy(), aspect="auto", cmap="Blues", origin="lower")
        row[2].imshow(decoder[0][order].exp().mT.numpy(), aspect="auto", cmap="Blues", origin="lower")
        row[3].bar(range(len(order)), marginal[0][order].exp().numpy(), color="lightgrey", label="marginal m(z)")
        aggregate = optimal_marginal(log_p, encoder)[0][order].exp().numpy()
        row[3].step(range(len(order)), aggregate, where="mid", color="tab:red", label="aggregate e(z)")
        row[0].set_ylabel(f"{name}\nR = {results[name][0, 0]:.4f}", fontsize=9)
        labels = (("symbol x", ""), ("x", "code z"), ("z", "x"), ("code z", ""))
        for ax, (x_label, y_label), title in zip(row, labels, ("", "encoder e(z|x)", "decoder d(x|z)", "")):
            ax.set_xlabel(x_label, fontsize=8)
            ax.set_title(title, fontsize=9)
            ax.tick_params(labelsize=7)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if y_label:
                ax.set_ylabel(y_label, fontsize=8)
    for ax in (axes[0, 0], axes[0, 3]):
        ax.legend(fontsize=7, frameon=False)
    return canvas


def main(argv=None):
    args, start = parse(argv), time.perf_counter()
    joint = toy_data()
    log_p = joint.logsumexp(0)
    laws = {}
    for name, loss in losses(args).items():
        channel = train_channel(log_p, loss, runs=args.runs, steps=args.steps, seed=args.seed)
        laws[name] = tuple(law.detach() for law in channel.laws())
    laws["by hand: e = p(z*|x)"] = hand_built(joint)
    results = {name: measure(joint, law) for name, law in laws.items()}
    print(table(results, -(log_p.exp() * log_p).sum().item()))
    save_figure(figure(joint, laws, results), args.out / "toy.png")
    print(f"wrote {args.out}/toy.png in {time.perf_counter() - start:.0f} s")
    return results


if __name__ == "__main__":
    main()
