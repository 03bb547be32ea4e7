"""How far is the ELBO from the evidence as the noise vanishes? "Embrace the gap", part 2: the gap is the IMA contrast.

The decoder is known and fixed, the data are x = f(z), and the guide is the best one with independent coordinates for
each datum (ELBO*). Its gap to the evidence rises to C_IMA = E c_IMA(f, z) (Reizinger et al., 2022, arXiv 2206.02416),
that to the noiseless density, the paper's column, is larger by a divergence, KL(p || p_gamma), which vanishes. A full
covariance closes the gap. For the first decoder an encoder is trained too, at a precision that rises from row to row:
what it adds is amortisation. Beside it stand the gaps of its means with the (co)variances that the Jacobian gives.

    python examples/elbo_gap_vs_gamma.py
    python examples/elbo_gap_vs_gamma.py --paper-scale --exponents 1 2 3 4 5 6 7 8
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR

import inference
from guides import GaussNewtonDiagonal, GaussNewtonFull, MeanField, nearest_local
from inference.marginal_likelihood.analytic.near_deterministic import limit_terms
from inference.plots.comparison import save_figure
from zoo import IMAVAE, Composition, LinearMixing, SmoothLeakyReLU, triangular_mlp

# The paper's public runs, E[log p - ELBO*] against the noiseless density by log10 gamma^2; its C_IMA is 7.072.
PAPER = {1: 12.287, 1.5: 10.1, 2: 8.461, 2.5: 7.386, 3: 6.913, 3.5: 6.885, 4: 7.009, 4.5: 7.128, 5: 7.155}
COLUMNS = ("log p_gamma - ELBO*", "error", "of C_IMA", "noiseless - ELBO*", "full covariance")
COLUMNS += ("paper (another draw)", "amortisation", "J'J diagonal", "J'J full")  # where there is an encoder


def triangular(data_dim, latent_dim, below, seed):
    """A triangular MLP with smaller entries below the diagonal, so that no direction is all but lost."""
    generator, maps = torch.Generator().manual_seed(seed), []
    for rows in (latent_dim, latent_dim, data_dim):
        matrix = (below * torch.randn(rows, latent_dim, generator=generator, dtype=torch.float64)).tril(-1)
        matrix.diagonal().copy_(0.5 + torch.rand(latent_dim, generator=generator, dtype=torch.float64))
        maps += [LinearMixing(matrix), SmoothLeakyReLU(latent_dim, 0.2)]
    return Composition(maps[:-1])


# All but the first have C_IMA of at least one nat and Jacobians of condition numbers up to 100.
DECODERS = {
    "the paper's kind, K = D = 5": partial(triangular_mlp, 5, seed=0),
    "K = D = 2": partial(triangular_mlp, 2, seed=4),
    "K = D = 5": partial(triangular, 5, 5, 0.5, 2),
    "K = D = 10": partial(triangular, 10, 10, 0.25, 4),
    "K = 2, D = 10": partial(triangular, 10, 2, 1.0, 4),
}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper-scale", action="store_true", help="500 data measured, 20 000 steps a row")
    parser.add_argument("--exponents", type=float, nargs="+", default=list(PAPER), help="log10 gamma^2, rising, to 8")
    parser.add_argument("--rows", type=int, default=48, help="data to measure on")
    parser.add_argument("--steps", type=int, default=1500, help="of the encoder, for each row of the table")
    parser.add_argument("--out", type=Path, default=Path("out/elbo_gap_vs_gamma"))
    args = parser.parse_args(argv)
    if args.paper_scale:
        args.rows, args.steps = 500, 20_000
    return args


def noisy_evidence(model, x, guide):
    """log p_gamma(x) and its error: by quadrature, or the limit where that is valid, or 20 000 samples of a guide."""
    if model.latent_dim <= 3:
        found = inference.evidence(model, x, method="quadrature", seed=0, progress=False)
        return found.value, (found.upper - found.lower) / 2
    terms = limit_terms(model, x, guide.posterior(x).mean.detach()[None])
    found = inference.evidence(model, x, method=inference.Importance(20_000), guide=guide, seed=0, progress=False)
    return terms.log_evidence.where(terms.valid, found.value), terms.error.where(terms.valid, found.standard_error)


def train(model, guide, mixing, last, steps):
    """Go on with the encoder, at a precision that rises from that of the last row to the model's."""
    z = torch.randn(20_000, model.latent_dim, generator=torch.Generator().manual_seed(1)).double()
    rise = inference.GeometricAnnealing(max(1, steps // 2), last, float(model.gamma2))
    objective = inference.AnnealedPrecision(inference.AnalyticKLELBO(), rise)
    adam, decay = partial(torch.optim.Adam, lr=3e-3), partial(CosineAnnealingLR, T_max=steps)
    options = {"optimizer": adam, "scheduler": decay, "batch_size": 256, "seed": 0, "progress": False}
    inference.fit(model, guide, mixing(z), steps=steps, objective=objective, **options)


def measure(mixing, args, *, with_encoder):
    """A row for each precision, in the order of COLUMNS; C_IMA; and the largest condition number."""
    torch.manual_seed(0)
    z = torch.randn(args.rows, mixing.latent_dim, generator=torch.Generator().manual_seed(0)).double()
    x, dims, last, rows = mixing(z), (mixing.data_dim, mixing.latent_dim), 10.0, {}
    contrast, guide = float(inference.ima_contrast(mixing, z)), MeanField(*dims, hidden=(64, 64)).double()
    means = torch.nn.Module()
    means.forward = lambda x: guide.posterior(x).mean
    for exponent in args.exponents:
        model = IMAVAE(*dims, gamma2=10**exponent, network=mixing).double()
        starts = (nearest_local(model, x, family=family) for family in (GaussNewtonDiagonal, GaussNewtonFull))
        best, full = (inference.refit(model, s, x, num_samples=64, restarts=0, progress=False) for s in starts)
        log_p, error = noisy_evidence(model, x, full.guide)
        gap, full_gap = (float((log_p - found.elbo).mean()) for found in (best, full))
        off_image = 0.5 * (dims[0] - dims[1]) * (model.gamma2 / (2 * torch.pi)).log()  # density of no residual
        noiseless = float((model.prior().log_prob(z) - mixing.log_abs_det(z) + off_image - best.elbo).mean())
        row = [gap, float(error.mean()), gap / contrast - 1, noiseless, full_gap]
        if with_encoder:
            train(model, guide, mixing, last, args.steps)
            guides = guide, *(kind(model, encoder=means).double() for kind in (GaussNewtonDiagonal, GaussNewtonFull))
            elbos = [inference.elbo(inference.log_weights(model, g, x, num_samples=200)).value for g in guides]
            amortised, *known = (float((log_p - value).mean()) for value in elbos)
            row += [PAPER.get(exponent, float("nan")), amortised - gap, *known]
        last, rows[exponent] = 10**exponent, row
    return rows, contrast, float(torch.linalg.cond(mixing.jacobian(z)).max())


def show(name, rows, contrast, condition):
    formats = (".4f", ".1e", "+.2%", ".4f", ".5f", *(".3f",) * 4)
    print(f"\n{name}: C_IMA = {contrast:.4f} nats, condition numbers of J up to {condition:.0f}")
    print("log10 gamma^2", *COLUMNS[: len(next(iter(rows.values())))], sep="  ")
    for exponent, row in rows.items():
        cells = (format(v, f).rjust(len(name)) for v, f, name in zip(row, formats, COLUMNS, strict=False))
        print(f"{exponent:13g}", *cells, sep="  ")


def draw(tables):
    figure = Figure(figsize=(3.4 * len(tables), 3.6), layout="constrained")
    for ax, (name, (rows, contrast, _)) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items()):
        ax.axhline(contrast, color="black", linewidth=0.8, label="C_IMA")
        for k, style in ((0, ".-"), (3, ".--"), (4, ".:")):
            ax.plot([10**e for e in rows], [row[k] for row in rows.values()], style, label=COLUMNS[k])
        ax.set(xscale="log", xlabel="gamma^2", ylabel="nats", title=name)
    ax.legend(fontsize=8, frameon=False)
    return figure


def main(argv=None):
    args, start, tables = parse(argv), time.perf_counter(), {}
    for name, make in DECODERS.items():
        tables[name] = measure(make(), args, with_encoder=not tables)
        show(name, *tables[name])
    below = [exponent for exponent, row in next(iter(tables.values()))[0].items() if row[6] < 1]
    print(f"\nthe encoder's amortisation is below one nat up to gamma^2 = 10^{max(below, default=float('nan')):g}")
    save_figure(draw(tables), args.out / "elbo_gap_vs_gamma.png")
    print(f"wrote {args.out}/ in {time.perf_counter() - start:.0f} s")
    return tables


if __name__ == "__main__":
    main()
