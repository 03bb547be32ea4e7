"""Rate-distortion curves, as in "Fixing a Broken ELBO" (Alemi et al., 2018): what the ELBO alone does not tell.

First the linear VAE on digits at a fixed sigma^2, trained at ten betas, against the curve in closed form. Then, with
--deep, four VAEs on binarised digits: a simple or a powerful decoder (independent pixels, or autoregressive) under a
simple or a powerful marginal (standard normal, or a mixture). The powerful decoder ignores its code where beta is 2,
and a beta below one makes it use it, at the same ELBO.

    python examples/rate_distortion.py
    python examples/rate_distortion.py --deep --seeds 3
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import torch
from _common import (
    decay_in_second_half,
    example_parser,
    expect,
    finish,
    kept_pair,
    kept_pairs,
    pair_under_seed,
    parse_with_presets,
    run_as_command,
    save,
    say,
    table_line,
)
from torch import nn
from torch.optim import LBFGS, Adam

from guides import Linear, MeanField, mlp
from inference import AnalyticBetaELBO, BetaELBO, empirical_entropy, fit, fit_many, rate_distortion_curve
from inference.information import lower_hull, phase, water_filling, water_filling_at_rate
from inference.plots import rate_distortion_figure
from zoo import VAE, AutoregressiveVAE, LinearVAE, MixtureOfGaussians, Scaled, StandardNormal, digits
from zoo.linear import spectrum

LINEAR_DIM, DEEP_DIM, SMALLEST_BETA = 10, 8, 0.1
CONVERGED = 1e-2  # norm of the gradient of D + beta R, in nats per natural unit of the parameters
DECODERS, MARGINALS = ("simple decoder", "powerful decoder"), ("simple marginal", "powerful marginal")
SMOKE = {"points": 2, "iterations": 3, "deep": True, "epochs": 1, "betas": [2.0]}


def parse(argv):
    parser = example_parser(__doc__, "rate_distortion", seed="the first run")
    parser.add_argument("--var", type=float, default=0.05, help="sigma^2 of the linear VAE, for pixels from 0 to 1")
    parser.add_argument("--points", type=int, default=10, help="points of the linear curve")
    parser.add_argument("--iterations", type=int, default=400, help="of LBFGS, a point")
    parser.add_argument("--deep", action="store_true", help="the four deep VAEs, too: ten minutes a seed")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1, 0.3, 0.6, 1, 2, 4, 10], help="of the deep VAEs")
    parser.add_argument("--epochs", type=int, default=200, help="of the deep VAEs")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each deep VAE, of consecutive seeds")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def train_linear(beta, seed, x, args):
    """A linear VAE at its optimum of D + beta R: exact terms, so LBFGS can be used."""
    torch.manual_seed(seed)
    model = LinearVAE(x.shape[1], LINEAR_DIM, sigma=math.sqrt(args.var), learn_sigma=False).double()
    guide = Linear(x.shape[1], LINEAR_DIM).double().standardise_by(x)
    model.mu.data = x.mean(0)
    lbfgs = partial(LBFGS, max_iter=args.iterations, history_size=50, line_search_fn="strong_wolfe")
    options = {"objective": AnalyticBetaELBO(beta), "optimizer": lbfgs, "progress": False}
    train = partial(fit, model, guide, x, steps=1, **options)
    return kept_pair(args, f"linear, beta {beta:.8g}, {seed}", (model, guide), train)


def slope(beta, model, guide, x):
    """The norm of the gradient at which the optimiser stopped."""
    parameters = [p for half in (model, guide) for p in half.parameters() if p.requires_grad]
    loss = -AnalyticBetaELBO(beta).per_datum(model, guide, x).mean()
    return math.hypot(*(float(g.norm()) for g in torch.autograd.grad(loss, parameters)))


def warn_unless_converged(slopes, args):
    """Say at which betas the optimiser stopped short: their differences are the optimiser's."""
    if short := [f"{beta:.4g} ({norm:.2g})" for beta, norm in slopes.items() if not norm < CONVERGED]:
        text = f"NOT CONVERGED after {args.iterations} iterations, gradient norm above {CONVERGED:g}"
        say(f"{text} at beta = {', '.join(short)}: raise --iterations")


def linear_curve(args):
    """Points equally spaced in rate, from .3 to .95 of that at beta = .1, and their distance to the closed form."""
    x = digits(transform=Scaled(16.0), test_size=0).train
    eigenvalues = spectrum(x).eigenvalues
    curve = partial(water_filling_at_rate, eigenvalues, args.var, LINEAR_DIM)
    largest = water_filling(eigenvalues, args.var, LINEAR_DIM, beta=SMALLEST_BETA).rate
    rates = torch.linspace(0.3, 0.95, args.points).double() * largest
    truth = [curve(rate=rate) for rate in rates.tolist()]
    slopes = {}

    def trained(beta, seed):
        pair = train_linear(beta, seed, x, args)
        slopes[beta] = slope(beta, *pair, x)
        return pair

    points = rate_distortion_curve(trained, [t.beta for t in truth], x, seeds=[args.seed], progress=False)
    errors = show_linear(points, truth, curve, args)
    warn_unless_converged(slopes, args)
    fine = [curve(rate=rate) for rate in torch.linspace(0.2 * largest, largest, 200).tolist()]
    known = [t.rate for t in fine], [t.distortion for t in fine]
    title = f"Linear VAE on digits, K = {LINEAR_DIM}, sigma^2 = {args.var}"
    save(rate_distortion_figure({"trained": points}, truth=known, title=title), args, "linear.png")
    return errors


def show_linear(points, truth, curve, args):
    """A line a point; its errors in rate and distortion, and its distortion above the curve at its own rate."""
    say(f"linear VAE, K = {LINEAR_DIM}, sigma^2 = {args.var}, digits / 16: trained less closed form, nats per datum")
    say(f"{'beta':>8s}{'R':>10s}{'D':>10s}{'R error':>12s}{'D error':>12s}{'D above curve':>15s}")
    errors = []
    for point, known in zip(points, truth, strict=True):
        rate, distortion = point.rate.value, point.distortion.value
        errors.append([rate - known.rate, distortion - known.distortion, distortion - curve(rate=rate).distortion])
        say(f"{known.beta:8.4f}{rate:10.4f}{distortion:10.4f}" + "{:12.5f}{:12.5f}{:15.5f}".format(*errors[-1]))
    return torch.tensor(errors)


def new_deep(decoder, marginal, data_dim):
    """One of the four VAEs with its guide."""
    hidden = (256, 256)
    prior = StandardNormal(DEEP_DIM) if marginal == MARGINALS[0] else MixtureOfGaussians(DEEP_DIM, 32)
    family = VAE if decoder == DECODERS[0] else AutoregressiveVAE
    model = family(data_dim, DEEP_DIM, hidden=hidden, prior=prior)
    return model, MeanField(data_dim, DEEP_DIM, encoder=mlp(data_dim, 2 * DEEP_DIM, hidden, nn.SiLU))


def trained_deep(decoder, marginal, x, args):
    """Beta and seed to one of the four VAEs: all at once by Adam, its rate falling to zero over the second half."""
    runs = list(product(args.betas, range(args.seed, args.seed + args.seeds)))
    make = partial(new_deep, decoder, marginal, x.shape[1])
    pairs = {
        f"{decoder}, {marginal}, beta {beta:g}, {seed}": pair_under_seed(seed, make, args.device) for beta, seed in runs
    }
    steps = args.epochs * math.ceil(len(x) / 100)
    train = partial(
        fit_many,
        list(pairs.values()),
        x,
        steps=steps,
        objective=[BetaELBO(beta) for beta, _ in runs],
        optimizer=partial(Adam, lr=1e-3),
        scheduler=decay_in_second_half(steps),
        batch_size=100,
        seed=args.seed,
        progress=False,
    )
    return dict(zip(runs, kept_pairs(args, pairs, train), strict=True))


def deep_curves(args):
    """The four curves on the training data, with phases and hull; their entropy is a floor for R + D."""
    data = digits(dtype=torch.float32)
    x = (data.train >= 8).float().to(args.device)
    curves, seeds = {}, range(args.seed, args.seed + args.seeds)
    for decoder in DECODERS:
        for marginal in MARGINALS:
            found = trained_deep(decoder, marginal, x, args)
            curves[f"{decoder}, {marginal}"] = rate_distortion_curve(
                lambda beta, seed, found=found: found[beta, seed], args.betas, x, seeds=seeds, progress=False
            )
    # The data set's own entropy is out of reach; the best R + D stands for that of the distribution, as in the paper.
    best = min(point.total.value for points in curves.values() for point in points)
    print(f"\nbinarised digits {tuple(x.shape)}: R + D is at least {empirical_entropy(x):.3f}", end="")
    print(f", found at least {best:.3f}")
    for name, points in curves.items():
        show_deep(name, points, best)
    save(rate_distortion_figure(curves, entropy=best, title="Binarised digits"), args, "deep.png")
    return curves


def show_deep(name, points, entropy):
    hull = lower_hull([p.rate.value for p in points], [p.distortion.value for p in points])
    print(f"{name}\n{'beta':>8s}{'R':>10s}{'D':>10s}{'R + D':>10s}{'95% of R + D':>20s}  phase (* on the hull)")
    for i, p in enumerate(points):
        label = phase(p.rate.value, p.distortion.value, entropy) + " *" * (i in hull)
        numbers = [f"{value:.3f}" for value in (p.rate.value, p.distortion.value, p.total.value)]
        band = f"{p.total.lower:.2f} to {p.total.upper:.2f}"
        print(f"{table_line(f'{p.parameter:8g}', numbers, first=8, width=10)}{band:>20s}  {label}")


def main(argv=None):
    args = parse(argv)
    expect(args, args.points + args.deep * len(DECODERS) * len(MARGINALS) * len(args.betas) * args.seeds)
    errors = linear_curve(args)
    above = errors[:, 2]
    print(f"the codes trained lie {above.min():.5f} to {above.max():.5f} nats above the curve in closed form", end="")
    print(f"; largest difference of R or D {errors[:, :2].abs().max():.5f} nats")
    curves = deep_curves(args) if args.deep else {}
    finish(args)
    return errors, curves


if __name__ == "__main__":
    run_as_command(main)
