"""The toy model of "Fixing a Broken ELBO" (Alemi et al., 2018): one evidence, any rate.

Data of 30 symbols hide a class of two; an encoder, a decoder and a marginal of 30 codes are trained on exact sums under
the ELBO, under weighted rates and at a target rate. Every row may fit the data perfectly: the ELBO does not determine
how much information the code carries. Prints the exact rate R, distortion D, mutual information I(x; z), the divergence
KL(p || g) from the model's distribution of the data, and the code's information on the class, I(z; z*), together with
the paper's numbers; of its data I(x; z*) = .5 is known and no more, so that the rest of their calibration is ours.

    python examples/broken_elbo_toy.py
    python examples/broken_elbo_toy.py --runs 12 --target 0.3
"""

from __future__ import annotations

from functools import partial

import torch
from _common import example_parser, expect, finish, kept, panels, parse_with_presets, run_as_command, save, table_line
from matplotlib.ticker import MaxNLocator

from zoo.benchmarks import (
    beta_loss,
    channel_terms,
    class_information,
    divergence,
    generated,
    optimal_decoder,
    optimal_marginal,
    target_rate_loss,
    toy_data,
    train_channel,
)

QUANTITIES = ("R", "D", "R + D", "I(x; z)", "KL(p||g)", "I(z; z*)")
# What the paper states for its run at beta one and at the target rate 0.5 (section 4, appendix E).
PAPER = {"ELBO": "R = .0002, p ~ g", "target 0.5": "R = .4999, p ~ g, two clusters of codes, 70% and 30%"}
ALIKE = 0.02  # nats within which ELBOs count as one
SMOKE = {"steps": 20, "runs": 2}


def parse(argv):
    parser = example_parser(__doc__, "broken_elbo_toy", seed="the starts", cpu_only="the exact sums are there")
    parser.add_argument("--target", type=float, default=0.5, help="target rate in nats")
    parser.add_argument("--weight", type=float, default=2.0, help="second weight of the distance to the target")
    parser.add_argument("--betas", type=float, nargs="*", default=[0.5, 2.0], help="weights of the rate")
    parser.add_argument("--runs", type=int, default=3, help="starts, trained side by side")
    parser.add_argument("--steps", type=int, default=15_000, help="training steps")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def losses(args):
    """The objectives by name."""
    return {
        "ELBO": beta_loss(),
        **{f"beta {beta:g}": beta_loss(beta) for beta in args.betas},
        f"target {args.target:g}": target_rate_loss(args.target),
        f"target {args.target:g}, weight {args.weight:g}": target_rate_loss(args.target, weight=args.weight),
    }


def trained(log_p, loss, args):
    """Logarithms of encoder, decoder and marginal, as lists."""
    channel = train_channel(log_p, loss, runs=args.runs, steps=args.steps, seed=args.seed)
    return [part.tolist() for part in channel.distributions()]


@torch.no_grad()
def measure(joint, channel):
    """The six quantities of each run, (S, 6), from the logarithms of encoder, decoder and marginal."""
    encoder, decoder, marginal = channel
    log_p = joint.logsumexp(0)
    _, distortion, rate, information = channel_terms(log_p, *channel)
    fit = divergence(log_p, generated(decoder, marginal))
    classes = class_information(joint, encoder)
    return torch.stack([rate, distortion, rate + distortion, information, fit, classes], -1)


def hand_built(joint):
    """The best code of one bit: the encoder draws the class from its posterior, the others are optimal for it."""
    log_p = joint.logsumexp(0)
    encoder = (joint - log_p).mT[None]
    return encoder, optimal_decoder(log_p, encoder), optimal_marginal(log_p, encoder)


def show(results, entropy):
    """One line an objective: mean and range over the runs."""
    print(f"H(x) = {entropy:.5f} nats; mean over runs, below it their range")
    print(table_line("", QUANTITIES, first=22, width=15) + "  the paper, on its own calibration")
    for name, values in results.items():
        means = [f"{m + 0.0:.4f}" for m in values.mean(0).tolist()]  # no minus sign before a zero
        print(f"{table_line(name, means, first=22, width=15)}  {PAPER.get(name, '')}".rstrip())
        if len(values) > 1:
            ranges = [f"{a:.4f}-{b:.4f}" for a, b in zip(values.amin(0), values.amax(0), strict=True)]
            print(table_line("", ranges, first=22, width=15))


def conclude(results):
    """How close all are in ELBO, and how far apart in rate."""
    totals, rates, classes = (torch.stack([v[:, i].mean() for v in results.values()]) for i in (2, 0, 5))
    print(f"the ELBOs of all rows lie within {totals.max() - totals.min():.4f} nats, their rates between", end=" ")
    print(f"{rates.min():.4f} and {rates.max():.4f}, what the code knows of the class between", end=" ")
    print(f"{classes.min():.4f} and {classes.max():.4f}", end="")
    alike = totals.max() - totals.min() < ALIKE
    print(": the ELBO does not tell a code from none" if alike else "; train longer to compare rows of one ELBO")


def draw(joint, channels, results):
    """Data, encoder, decoder and marginal of the first run of each objective, one row each."""
    figure, axes = panels(len(channels), 4, size=(11, 2.3 * len(channels)))
    axes = axes.reshape(-1, 4)
    log_p = joint.logsumexp(0)
    for row, (name, channel) in zip(axes, channels.items(), strict=True):
        draw_data(row[0], log_p, channel)
        draw_codes(row[1:], log_p, channel)
        label_row(row, f"{name}\nR = {results[name][0, 0]:.4f}")
    for ax in (axes[0, 0], axes[0, 3]):
        ax.set_ylim(0, 1.45 * ax.get_ylim()[1])  # room above the data
        ax.legend(fontsize=7, frameon=False, loc="upper right")
    return figure


def draw_data(ax, log_p, channel):
    _, decoder, marginal = channel
    symbols = range(len(log_p))
    ax.bar(symbols, log_p.exp().numpy(), color="lightgrey", label="data p(x)")
    model = generated(decoder, marginal)[0].exp().numpy()
    ax.plot(symbols, model, ".", color="tab:red", markersize=4, label="model g(x)")


def draw_codes(row, log_p, channel):
    """Encoder, decoder and marginal, with the codes in the order of the mean symbol that they stand for."""
    encoder, decoder, marginal = channel
    order = (optimal_decoder(log_p, encoder)[0].exp() @ torch.arange(len(log_p), dtype=log_p.dtype)).argsort()
    image = {"aspect": "auto", "cmap": "Blues", "origin": "lower"}
    row[0].imshow(encoder[0][:, order].exp().mT.numpy(), **image)
    row[1].imshow(decoder[0][order].exp().mT.numpy(), **image)
    codes = range(len(order))
    row[2].bar(codes, marginal[0][order].exp().numpy(), color="lightgrey", label="marginal m(z)")
    aggregate = optimal_marginal(log_p, encoder)[0][order].exp().numpy()
    row[2].plot(codes, aggregate, ".", color="tab:red", markersize=4, label="aggregate e(z)")


def label_row(row, title):
    titles = ("", "encoder e(z|x)", "decoder d(x|z)", "")
    labels = (("symbol x", title), ("x", "code z"), ("z", "x"), ("code z", ""))
    for ax, ax_title, (x_label, y_label) in zip(row, titles, labels, strict=True):
        ax.set_title(ax_title, fontsize=9)
        ax.set_xlabel(x_label, fontsize=8)
        ax.set_ylabel(y_label, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in row[1:3]:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def main(argv=None):
    args = parse(argv)
    joint = toy_data()
    log_p = joint.logsumexp(0)
    channels, objectives = {}, losses(args)
    expect(args, len(objectives))
    for name, loss in objectives.items():
        parts = kept(args, name, partial(trained, log_p, loss, args))
        channels[name] = tuple(torch.tensor(part, dtype=log_p.dtype) for part in parts)
    channels["by hand: e = p(z*|x)"] = hand_built(joint)
    results = {name: measure(joint, channel) for name, channel in channels.items()}
    show(results, -(log_p.exp() * log_p).sum().item())
    conclude(results)
    save(draw(joint, channels, results), args, "toy.png")
    finish(args)
    return results


if __name__ == "__main__":
    run_as_command(main)
