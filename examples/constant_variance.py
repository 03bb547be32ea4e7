"""BILBO and BAGGINS, after "There and Back Again" (Fyffe, 2019): VAEs without learnt variances.

1. The half-width encoder on digits: its network gives means only, the guide's variance is one and the prior follows
   the codes (BILBO), also with the BAGGINS-style likelihood in place of a learnt noise, beside the usual encoder.
2. What a constant variance costs: 1/2 sum_k (log E H_k - E log H_k), from the curvature H_k of the log joint, beside
   what the best guides of each datum lose when their variances must be the same for all data.
3. Units: data times c lower the ELBO of the BAGGINS-style likelihood by D log c and change nothing else, where a
   network for variances on raw data breaks down. It is a reconstruction from the abstract, not the paper's formula.

    python examples/constant_variance.py --steps 10000 --latent-dim 16
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from guides import ConstantVariance, Local, MeanField
from inference import AnalyticKLELBO, LogJoint, fit, rate_distortion, refit
from inference.diagnostics.curvature import constant_var, constant_var_penalty, expected_hessian
from inference.distributions.gaussian import DiagNormal
from inference.plots.comparison import save_figure
from zoo import VAE, DeepGaussianVAE, FixedNoise, FloatingPrior, GaussianLikelihood, LearntNoise, Scaled, digits
from zoo import PooledBagginsReconstruction as Baggins

COLUMNS, FACTORS = ("ELBO", "R", "D", "test ELBO", "parameters", "seconds"), (1.0, 1e-3, 1e3)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="noise of the second part")
    parser.add_argument("--rows", type=int, default=60, help="data of the second part")
    parser.add_argument("--unit-steps", type=int, default=300, help="of the third part")
    parser.add_argument("--out", type=Path, default=Path("out/constant_variance"))
    return parser.parse_args(argv)


def train(model, guide, x, steps):
    """Adam with a learning rate that falls to zero; returns the seconds."""
    options = {"objective": AnalyticKLELBO(), "batch_size": 256, "seed": 0, "progress": False}
    options |= {"optimizer": partial(Adam, lr=2e-3), "scheduler": lambda o: CosineAnnealingLR(o, steps)}
    return fit(model, guide, x, steps=steps, **options).seconds


def make(x, args, guide, noise, floating=False):
    """A deep Gaussian VAE and its guide, in the units of the data."""
    torch.manual_seed(0)
    k, hidden = args.latent_dim, (args.hidden,)
    model = DeepGaussianVAE(x.shape[1], k, hidden=hidden, noise=noise, prior=FloatingPrior(k) if floating else None)
    return model.to(x).standardise_by(x), guide(x.shape[1], k, hidden=hidden).to(x).standardise_by(x)


def encoders(args):
    """Name to ELBO, rate, distortion and held-out ELBO in nats per datum, the guide's parameters, and seconds."""
    data, unit = digits(transform=Scaled(16.0), dtype=torch.float32), partial(ConstantVariance, learn_sigma=False)
    kinds = {
        "mean field": (MeanField, LearntNoise, False),
        "constant variance": (ConstantVariance, LearntNoise, False),
        "half width, BILBO": (unit, LearntNoise, True),
        "half width, BILBO + BAGGINS": (unit, Baggins, True),
    }
    print(f"{'encoder':30s}" + "".join(f"{c:>12s}" for c in COLUMNS))
    table = {}
    for name, (guide_class, noise, floating) in kinds.items():
        model, guide = make(data.train, args, guide_class, noise(), floating)
        seconds = train(model, guide, data.train, args.steps)
        for part in (model.prior_law,) * floating + (model,) * (noise is Baggins):
            part.freeze(guide, data.train)
        own, test = (rate_distortion(model, guide, x, seed=0) for x in (data.train, data.test))
        numbers = (-own.total.value, own.rate.value, own.distortion.value, -test.total.value)
        table[name] = (*numbers, sum(p.numel() for p in guide.parameters()), seconds)
        print(f"{name:30s}" + "".join(f"{v:12.3f}" for v in numbers) + "{:12d}{:12.1f}".format(*table[name][4:]))
    return table


def penalty(sigma, args):
    """The loss by a constant variance, predicted and measured, in nats per datum, of a VAE with noise sigma."""
    x = digits(transform=Scaled(16.0)).train
    model, guide = make(x, args, MeanField, FixedNoise(sigma))
    train(model, guide, x, args.steps)
    model, x = model.requires_grad_(False), x[: args.rows]
    best = refit(model, guide, x, restarts=0, seed=0, progress=False)
    law = best.guide.posterior(x)
    hessian = expected_hessian(LogJoint(model, x), law.sample(torch.Size((64,)))).value
    curvature, mean = hessian.diagonal(dim1=-2, dim2=-1), law.mean.detach()
    same = constant_var(curvature).sqrt()
    tied = Local(x, mean, same.expand_as(mean), family=lambda m: DiagNormal(m, same), support=law.support)
    worse = refit(model, tied, x, restarts=0, seed=0, progress=False)
    return float(constant_var_penalty(curvature)), float((best.elbo - worse.elbo).mean())


def units(args):
    """For each c: ELBO(c) + D log c, less its value at one, of the BAGGINS-style model; what a learnt variance does."""
    x, shifted, learnt = digits(transform=Scaled(16.0)).train, {}, {}
    for c in FACTORS:
        shift, (model, guide) = x.shape[1] * math.log(c), make(c * x, args, MeanField, Baggins())
        train(model, guide, c * x, args.unit_steps)
        torch.manual_seed(0)
        model.freeze(guide, c * x)
        shifted[c] = shift - rate_distortion(model, guide, c * x, seed=0).total.value
        raw = VAE(x.shape[1], args.latent_dim, likelihood=GaussianLikelihood()).to(x)
        try:
            train(raw, encoder := MeanField(x.shape[1], args.latent_dim).to(x), c * x, args.unit_steps)
            learnt[c] = f"ELBO + D log c = {shift - rate_distortion(raw, encoder, c * x, seed=0).total.value:.3f}"
        except FloatingPointError as error:
            learnt[c] = str(error)
        print(f"c = {c:g}: ELBO + D log c = {shifted[c]:.6f}, {shifted[c] - shifted[1.0]:+.1e} to c = 1")
        print(f"    a network for variances, on raw data: {learnt[c]}")
    return {c: value - shifted[1.0] for c, value in shifted.items()}, learnt


def draw(table, losses, shifts):
    """Rate against distortion, measured against predicted loss (line: equal), and the shift by units."""
    plane, loss, scale = (figure := Figure(figsize=(13, 4), layout="constrained")).subplots(1, 3)
    for name, (_, rate, distortion, *_) in table.items():
        plane.plot(rate, distortion, "o", label=name)
    plane.set(xlabel="rate (nats)", ylabel="distortion (nats)", title="Encoders on digits")
    predicted, measured = zip(*losses.values(), strict=True)
    loss.plot([0, max(predicted)], [0, max(predicted)], "-", predicted, measured, "o")
    for sigma, point in losses.items():
        loss.annotate(f"sigma = {sigma:g}  ", point, fontsize=8, ha="right")
    loss.set(xlabel="predicted loss (nats)", ylabel="measured loss (nats)", title="Cost of a constant variance")
    plane.legend(fontsize=8)
    scale.loglog(list(shifts), [max(abs(v), 1e-16) for v in shifts.values()], "o")
    scale.set(xlabel="c", ylabel="|ELBO(c) + D log c - ELBO(1)|", title="BAGGINS-style likelihood in other units")
    return figure


def main(argv=None):
    args = parse(argv)
    table, losses = encoders(args), {sigma: penalty(sigma, args) for sigma in args.sigmas}
    for sigma, (known, found) in losses.items():
        print(f"sigma = {sigma:g}: a constant variance costs {known:.4f} nats by formula, {found:.4f} measured")
    save_figure(draw(table, losses, (found := units(args))[0]), args.out / "constant_variance.png")
    return table, losses, *found


if __name__ == "__main__":
    main()
