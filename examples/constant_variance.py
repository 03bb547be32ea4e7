"""BILBO and BAGGINS, after "There and Back Again" (Fyffe, 2019): VAEs without learnt variances.

1. The half-width encoder on digits: its network gives means only, the guide's variance is one and the prior follows
   the codes (BILBO), also with the BAGGINS-style likelihood in place of learnt noise, compared with the usual encoder.
2. What a constant variance costs: 1/2 sum_k (log E H_k - E log H_k), from the curvature H_k of the log joint, compared
   with what the best guides of each data point lose when their variances must be the same for all data.
3. Units: data times c lower the ELBO of the BAGGINS-style likelihood by D log c and change nothing else, where a
   network for variances on raw data breaks down. It is a reconstruction from the abstract, not the paper's formula.

    python examples/constant_variance.py --steps 10000 --latent-dim 16
"""

from __future__ import annotations

import math
from functools import partial

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
    train,
)

from guides import ConstantVariance, Local, MeanField
from inference import AnalyticKLELBO, LogJoint, rate_distortion, refit
from inference.diagnostics import constant_var, constant_var_penalty, expected_hessian
from inference.distributions.gaussian import DiagNormal
from zoo import VAE, DeepGaussianVAE, FixedNoise, FloatingPrior, GaussianLikelihood, LearntNoise, Scaled, digits
from zoo import PooledBagginsReconstruction as Baggins

COLUMNS = ("ELBO", "R", "D", "test ELBO", "parameters", "seconds")
FACTORS = (1.0, 1e-3, 1e3)
SMOKE = {"latent_dim": 2, "hidden": 8, "steps": 3, "sigmas": [0.5], "rows": 5, "unit_steps": 3}


def parse(argv):
    parser = example_parser(__doc__, "constant_variance", seed="initialisation, training and measurement")
    parser.add_argument("--latent-dim", type=int, default=8, help="K of every model")
    parser.add_argument("--hidden", type=int, default=64, help="width of every network's hidden layer")
    parser.add_argument("--steps", type=int, default=2000, help="of the first and the second part")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="noise of the second part")
    parser.add_argument("--rows", type=int, default=60, help="data of the second part")
    parser.add_argument("--unit-steps", type=int, default=300, help="of the third part")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def scaled_digits(args, **options):
    return digits(transform=Scaled(16.0), **options).to(device=args.device)


def train_analytic(model, guide, x, steps, args):
    """By the ELBO with its KL term in closed form; returns the seconds."""
    options = {"objective": AnalyticKLELBO(), "batch_size": 256, "seed": args.seed}
    return train(model, guide, x, steps=steps, rate=2e-3, **options).seconds


def make(x, args, guide, noise, *, floating=False):
    """A deep Gaussian VAE and its guide, in the units of the data."""
    torch.manual_seed(args.seed)
    data_dim, latent_dim, hidden = x.shape[1], args.latent_dim, (args.hidden,)
    prior = FloatingPrior(latent_dim) if floating else None
    model = DeepGaussianVAE(data_dim, latent_dim, hidden=hidden, noise=noise, prior=prior).to(x)
    return model.standardise_by(x), guide(data_dim, latent_dim, hidden=hidden).to(x).standardise_by(x)


def encoders(args):
    """Name to ELBO, rate, distortion and held-out ELBO in nats per data point, the guide's parameters, and seconds."""
    data = scaled_digits(args, dtype=torch.float32)
    unit_variance = partial(ConstantVariance, learn_sigma=False)
    kinds = {
        "mean field": (MeanField, LearntNoise, False),
        "constant variance": (ConstantVariance, LearntNoise, False),
        "half width, BILBO": (unit_variance, LearntNoise, True),
        "half width, BILBO + BAGGINS": (unit_variance, Baggins, True),
    }
    say(table_line("encoder", COLUMNS, first=30, width=12))
    table = {}
    for name, kind in kinds.items():
        table[name] = kept(args, name, partial(encoder_row, data, *kind, args))
        *numbers, parameters, seconds = table[name]
        cells = [*(f"{value:.3f}" for value in numbers), str(parameters), f"{seconds:.1f}"]
        say(table_line(name, cells, first=30, width=12))
    return table


def encoder_row(data, guide_class, noise, floating, args):
    model, guide = make(data.train, args, guide_class, noise(), floating=floating)
    seconds = train_analytic(model, guide, data.train, args.steps, args)
    if floating:
        model.prior_module.freeze(guide, data.train)
    if noise is Baggins:
        model.freeze(guide, data.train)
    own, test = (rate_distortion(model, guide, x, seed=args.seed, progress=False) for x in (data.train, data.test))
    numbers = (-own.total.value, own.rate.value, own.distortion.value, -test.total.value)
    return *numbers, sum(p.numel() for p in guide.parameters()), seconds


def penalty(sigma, args):
    """The loss by a constant variance, predicted and measured, in nats per data point, of a VAE with noise sigma."""
    x = scaled_digits(args).train
    model, guide = make(x, args, MeanField, FixedNoise(sigma))
    train_analytic(model, guide, x, args.steps, args)
    model, x = model.requires_grad_(False), x[: args.rows]
    best = refit(model, guide, x, restarts=0, seed=args.seed, progress=False)
    posterior = best.guide.posterior(x)
    hessian = expected_hessian(LogJoint(model, x), posterior.sample(torch.Size((64,)))).value
    curvature = hessian.diagonal(dim1=-2, dim2=-1)
    tied = tied_guide(x, posterior, constant_var(curvature).sqrt())
    worse = refit(model, tied, x, restarts=0, seed=args.seed, progress=False)
    return float(constant_var_penalty(curvature)), float((best.elbo - worse.elbo).mean())


def tied_guide(x, posterior, sigma):
    """The best guide of each data point, where all data have these standard deviations."""
    mean = posterior.mean.detach()
    family = partial(DiagNormal, sigma=sigma)
    return Local(x, mean, sigma.expand_as(mean), family=family, support=posterior.support)


def units(args):
    """For each c: ELBO(c) + D log c, less its value at one, of the BAGGINS-style model; what a learnt variance does."""
    x = scaled_digits(args).train
    shifted, learnt = {}, {}
    for c in FACTORS:
        shift = x.shape[1] * math.log(c)
        shifted[c] = shift + kept(args, f"baggins_{c:g}", partial(elbo_of_baggins, c * x, args))
        learnt[c] = kept(args, f"network_{c:g}", partial(try_learnt_variance, c * x, shift, args))
        say(f"c = {c:g}: ELBO + D log c = {shifted[c]:.6f}, {shifted[c] - shifted[1.0]:+.1e} to c = 1")
        say(f"    a network for variances, on raw data: {learnt[c]}")
    return {c: value - shifted[1.0] for c, value in shifted.items()}, learnt


def elbo_of_baggins(x, args):
    model, guide = make(x, args, MeanField, Baggins())
    train_analytic(model, guide, x, args.unit_steps, args)
    torch.manual_seed(args.seed)
    model.freeze(guide, x)
    return -rate_distortion(model, guide, x, seed=args.seed, progress=False).total.value


def try_learnt_variance(x, shift, args):
    """What comes of a network for variances on raw data, as text."""
    raw = VAE(x.shape[1], args.latent_dim, likelihood=GaussianLikelihood()).to(x)
    encoder = MeanField(x.shape[1], args.latent_dim).to(x)
    try:
        train_analytic(raw, encoder, x, args.unit_steps, args)
        total = rate_distortion(raw, encoder, x, seed=args.seed, progress=False).total.value
        return f"ELBO + D log c = {shift - total:.3f}"
    except FloatingPointError as error:
        return str(error)


def draw(table, losses):
    """Rate against distortion, and measured against predicted loss (line: equal)."""
    figure, (plane, loss) = panels(1, 2, size=(9.5, 4))
    for name, (_, rate, distortion, *_) in table.items():
        plane.plot(rate, distortion, "o", label=name)
    plane.set(xlabel="rate (nats)", ylabel="distortion (nats)", title="Encoders on digits")
    plane.legend(fontsize=8)
    predicted, measured = zip(*losses.values(), strict=True)
    loss.plot([0, max(predicted)], [0, max(predicted)], "-", predicted, measured, "o")
    for sigma, point in losses.items():
        loss.annotate(f"sigma = {sigma:g}  ", point, fontsize=8, ha="right")
    loss.set(xlabel="predicted loss (nats)", ylabel="measured loss (nats)", title="Cost of a constant variance")
    return figure


def conclude(table, losses, shifts):
    """What the half-width encoder, a constant variance, and other units cost."""
    usual, half = table["mean field"], table["half width, BILBO"]
    print(f"\nthe half-width encoder has {half[4] / usual[4]:.0%} of the parameters and wins", end=" ")
    print(f"{half[3] - usual[3]:+.2f} nats of held-out ELBO (one seed, so no error is known)")
    off = max(abs(predicted - measured) for predicted, measured in losses.values())
    print(f"the formula of the cost of a constant variance is off by at most {off:.4f} nats", end="; ")
    print(f"other units shift the ELBO by D log c within {max(abs(v) for v in shifts.values()):.0e} nats")


def main(argv=None):
    args = parse(argv)
    expect(args, 4 + len(args.sigmas) + 2 * len(FACTORS))
    table = encoders(args)
    losses = {sigma: kept(args, f"penalty_{sigma:g}", partial(penalty, sigma, args)) for sigma in args.sigmas}
    for sigma, (known, found) in losses.items():
        say(f"sigma = {sigma:g}: a constant variance costs {known:.4f} nats by formula, {found:.4f} measured")
    shifts, learnt = units(args)
    conclude(table, losses, shifts)
    save(draw(table, losses), args, "constant_variance.png")
    finish(args)
    return table, losses, shifts, learnt


if __name__ == "__main__":
    run_as_command(main)
