"""Which training choices cure posterior collapse? One table for a deep Gaussian VAE, from a bad and a good sigma^2.

Each row changes one thing of the first, a learnt sigma^2 under the ELBO with its KL term in closed form. Reported is
always the ELBO with beta = 1 in eval mode, on the training data. "Early" is after a tenth of the steps, where linear
annealing has reached beta = 0.2: does what was alive collapse again (Lucas et al., 2019)? Annealed and weighted
objectives sample the KL term: compare them with "sampled KL". Free bits keep latents alive by decree, useful or not.

    python examples/training_choices.py --starts 30 3 --epochs 300
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from _common import (
    decay_in_second_half,
    example_parser,
    expect,
    finish,
    kept,
    means_with_errors,
    measure_collapse,
    pair_under_seed,
    panels,
    parse_with_presets,
    run_as_command,
    save,
    say,
    table_line,
)
from torch import nn

from guides import MeanField, mlp
from inference import (
    ELBO,
    AnalyticKLELBO,
    BetaELBO,
    CyclicalAnnealing,
    FreeBitsELBO,
    LinearAnnealing,
    Objective,
    fit_many,
)
from inference.diagnostics import active_units, posterior_means
from zoo import DeepGaussianVAE, FixedNoise, LearntNoise, OptimalNoise, digits_logit


class Choice(NamedTuple):
    """An objective for a number of steps, the noise from an initial sigma, the encoder's normalisation."""

    objective: Callable[[int], Objective] = lambda _: AnalyticKLELBO()
    noise: Callable[[float], nn.Module] = LearntNoise
    norm: Callable[[int], nn.Module] | None = None


def annealed(steps):
    return BetaELBO(LinearAnnealing(math.ceil(steps / 2)))


CHOICES = {
    "learnt sigma^2": Choice(),
    "sampled KL": Choice(lambda _: ELBO()),
    "KL annealed": Choice(annealed),
    "KL annealed in 4 cycles": Choice(lambda steps: BetaELBO(CyclicalAnnealing(math.ceil(steps / 4)))),
    "beta = 0.5": Choice(lambda _: BetaELBO(0.5)),
    "beta = 2": Choice(lambda _: BetaELBO(2.0)),
    "free bits, 0.25 nats": Choice(lambda _: FreeBitsELBO(0.25)),
    "batch-norm in encoder": Choice(norm=nn.BatchNorm1d),
    "optimal sigma^2": Choice(noise=lambda _: OptimalNoise()),  # has no start
    "fixed sigma^2": Choice(noise=FixedNoise),
    "fixed, KL annealed": Choice(annealed, FixedNoise),
}
COMPARED = {"KL annealed": "sampled KL", "KL annealed in 4 cycles": "sampled KL", "fixed, KL annealed": "fixed sigma^2"}
TITLES = ("ELBO", "tuned ELBO", "final s2", "% early", "% collapsed", "KL", "active", "seconds")
SMOKE = {"epochs": 1, "seeds": 2, "rows": 200, "starts": [30.0, 3.0]}


def parse(argv):
    parser = example_parser(__doc__, "training_choices", seed="the first run")
    parser.add_argument("--starts", type=float, nargs="+", default=[30, 1], help="initial values of sigma^2")
    parser.add_argument("--epochs", type=int, default=150, help="training epochs")
    parser.add_argument("--batch", type=int, default=100, help="data of a training step")
    parser.add_argument("--rows", type=int, help="training rows; where None, all of them")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, of consecutive seeds")
    parser.add_argument("--epsilon", type=float, default=0.1, help="nats below which a latent counts as collapsed")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def build(choice, sigma2, data_dim):
    decoder = mlp(20, data_dim, (128, 256), nn.ReLU)
    model = DeepGaussianVAE(data_dim, 20, network=decoder, noise=choice.noise(math.sqrt(sigma2)))
    encoder = mlp(data_dim, 40, (256, 128), nn.ReLU, norm=choice.norm)
    return model, MeanField(data_dim, 20, encoder=encoder)


def run(choice, sigma2, x, args):
    """Train a pair for each seed, at once, by Adam with a learning rate that falls to zero over the second half.

    Returns:
        The numbers of TITLES for each seed; seconds are a pair's share.
    """
    seeds, make = range(args.seed, args.seed + args.seeds), partial(build, choice, sigma2, x.shape[1])
    pairs = [pair_under_seed(seed, make, args.device) for seed in seeds]
    steps = args.epochs * math.ceil(len(x) / args.batch)
    options = {
        "objective": choice.objective(steps),
        "scheduler": decay_in_second_half(steps),
        "batch_size": args.batch,
        "seed": args.seed,
        "progress": False,
    }
    measured = []
    with tempfile.TemporaryDirectory() as folder:  # the second call goes on where the first one stopped
        for end in (max(1, steps // 10), steps):
            history = fit_many(pairs, x, steps=end, checkpoint=Path(folder) / "run.safetensors", **options)
            measured.append([measure(*pair, x, args) for pair in pairs])
    share = history.seconds / len(pairs)
    return [[*final[:3], early[3], *final[3:], share] for early, final in zip(*measured, strict=True)]


def measure(model, guide, x, args):
    """ELBO, tuned ELBO, sigma^2, percentage of collapsed latents, KL term and active latents."""
    if isinstance(model.noise, OptimalNoise):
        model = copy.deepcopy(model)  # the pair itself is to train further
        model.freeze(guide, x, num_samples=10)
    active = active_units(posterior_means(model, guide, x))
    return *measure_collapse(model, guide, x, args.epsilon)[0], active.sum().item()


def run_all(start, x, args):
    """The table of one start: name of a choice to the numbers of TITLES, (seeds, columns)."""
    say("\n" + table_line(f"sigma^2 from {start:g}", TITLES, width=17))
    rows = {}
    for name, choice in CHOICES.items():
        found = kept(args, f"{name}_{start:g}", partial(run, choice, start, x, args))
        rows[name] = torch.tensor(found, dtype=torch.float64)
        say(table_line(name, means_with_errors(rows[name]), width=17))
    for name, base in COMPARED.items():
        elbo, _, _, _, collapsed, *_ = means_with_errors(rows[name] - rows[base])
        say(f"{name} against {base}: ELBO {elbo} nats, collapsed {collapsed} points")
    return rows


def draw(tables):
    """Tuned ELBO and collapse of every choice: a dot is the mean over seeds, hollow after a tenth of the steps."""
    figure, (left, right) = panels(1, 2, size=(9.5, 4.6), sharey=True)
    for i, (start, rows) in enumerate(tables.items()):
        at = torch.arange(len(CHOICES)) + 0.3 * (i + 0.5) / len(tables) - 0.15
        values = torch.stack([rows[name] for name in CHOICES])
        mean, num_seeds = values.mean(1), values.shape[1]
        error = values.std(1) / math.sqrt(num_seeds) if num_seeds > 1 else None
        label = f"sigma^2 from {start:g}"
        styles = ((left, 1, f"C{i}", label), (right, 3, "white", f"{label} (early)"), (right, 4, f"C{i}", label))
        for ax, column, face, text in styles:
            style = {"fmt": "o", "color": f"C{i}", "markerfacecolor": face, "markersize": 5, "label": text}
            ax.errorbar(mean[:, column], at, xerr=None if error is None else error[:, column], **style)
    left.set(xlabel="tuned ELBO (nats per data point)", yticks=range(len(CHOICES)), yticklabels=list(CHOICES))
    left.invert_yaxis()
    right.set(xlabel="collapsed latents (%)", xlim=(-4, 104))
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(argv=None):
    args = parse(argv)
    x = digits_logit(test_size=0, dtype=torch.float32).train[: args.rows]
    x = (x - x.mean(0)).to(args.device)
    print(f"digits: {tuple(x.shape)}, mean (s.e.) over {args.seeds} seeds, nats per data point of the training set")
    expect(args, len(args.starts) * len(CHOICES))
    tables = {start: run_all(start, x, args) for start in args.starts}
    save(draw(tables), args, "training_choices.png")
    print()
    finish(args)
    return tables


if __name__ == "__main__":
    run_as_command(main)
