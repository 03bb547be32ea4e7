"""How far is the ELBO from the evidence as the noise vanishes? "Embrace the gap", part 2: the gap is the IMA contrast.

The decoder is known and fixed, the data are x = f(z), and the guide is the best one with independent coordinates for
each data point (ELBO*). Its gap to the evidence rises to C_IMA = E c_IMA(f, z) (Reizinger et al., 2022, arXiv
2206.02416), that to the noiseless density, in the paper's figure, is larger by a divergence, KL(p || p_gamma), which
vanishes. A full covariance closes the gap. For the first decoder an encoder is trained too, at a precision that rises
from row to row: it adds the amortisation gap. The gaps of its means with the Jacobian's (co)variances are printed, too.

    python examples/elbo_gap_vs_gamma.py
    python examples/elbo_gap_vs_gamma.py --paper-scale --exponents 1 2 3 4 5 6 7 8
"""

from __future__ import annotations

from functools import partial

import torch
from _common import example_parser, expect, finish, kept, panels, parse_with_presets, run_as_command, save, say, train

import inference
from guides import GaussNewtonDiagonal, GaussNewtonFull, MeanField, local_gauss_newton
from inference.marginal_likelihood.analytic.near_deterministic import limit_terms
from zoo import IMAVAE, Composition, LinearMixing, SmoothLeakyReLU, triangular_mlp

# As in the paper, whose own decoder is another draw, so that its numbers are none to compare with.
EXPONENTS = [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]
COLUMNS = (
    "log p_gamma - ELBO*",
    "error",
    "of C_IMA",
    "noiseless - ELBO*",
    "full covariance",
    # the others where there is an encoder
    "amortisation",
    "J'J diagonal",
    "J'J full",
)
FORMATS = (".4f", ".1e", "+.2%", ".4f", ".5f", *(".3f",) * 3)
PAPER_SCALE = {"rows": 500, "steps": 20_000}
SMOKE = {"exponents": [2, 5], "rows": 3, "steps": 3}


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
    seed = "the data, training and measurement"
    cpu_only = "the decoders and their data are there"
    parser = example_parser(__doc__, "elbo_gap_vs_gamma", seed=seed, cpu_only=cpu_only)
    parser.add_argument("--exponents", type=float, nargs="+", default=EXPONENTS, help="log10 gamma^2, rising, to 8")
    parser.add_argument("--rows", type=int, default=48, help="data to measure on")
    parser.add_argument("--steps", type=int, default=1500, help="of the encoder, for each row of the table")
    return parse_with_presets(parser, argv, paper_scale=PAPER_SCALE, smoke=SMOKE)


def noisy_evidence(model, x, guide, args):
    """log p_gamma(x) and its error: by quadrature, or the limit where that is valid, or 20 000 samples of a guide."""
    options = {"seed": args.seed, "progress": False}
    if model.latent_dim <= 3:
        found = inference.evidence(model, x, method="quadrature", **options)
        return found.value, (found.upper - found.lower) / 2
    terms = limit_terms(model, x, guide.posterior(x).mean.detach()[None])
    found = inference.evidence(model, x, method=inference.Importance(20_000), guide=guide, **options)
    return terms.log_evidence.where(terms.valid, found.value), terms.error.where(terms.valid, found.standard_error)


def best_gaussians(model, x):
    """The best Gaussian of each data point with independent coordinates, and with a full covariance."""
    for family in (GaussNewtonDiagonal, GaussNewtonFull):
        start = local_gauss_newton(model, x, family=family, seed=0)
        yield inference.refit(model, start, x, num_samples=64, restarts=0, progress=False)


def train_further(model, guide, mixing, last, args):
    """Go on with the encoder, at a precision that rises from that of the last row to the model's."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    z = torch.randn(20_000, model.latent_dim, generator=generator).double()
    rise = inference.GeometricAnnealing(max(1, args.steps // 2), last, float(model.gamma2))
    objective = inference.AnnealedPrecision(inference.AnalyticKLELBO(), rise)
    options = {"objective": objective, "batch_size": 256, "seed": args.seed}
    train(model, guide, mixing(z), steps=args.steps, rate=3e-3, **options)


def encoder_gaps(model, guide, x, log_p, gap):
    """What amortisation adds to the gap, and the gaps of the encoder's means with J'J's diagonal and full precision."""
    means = torch.nn.Module()
    means.forward = lambda x: guide.posterior(x).mean
    others = (family(model, encoder=means).double() for family in (GaussNewtonDiagonal, GaussNewtonFull))
    weights = (inference.log_weights(model, g, x, num_samples=200, progress=False) for g in (guide, *others))
    amortised, *known = (float((log_p - inference.elbo(w).value).mean()) for w in weights)
    return amortised - gap, *known


def noiseless_density(model, mixing, z):
    """log p of x = f(z), with the density of no residual for the dimensions off the image."""
    off_image = 0.5 * (mixing.data_dim - mixing.latent_dim) * (model.gamma2 / (2 * torch.pi)).log()
    return model.prior().log_prob(z) - mixing.log_abs_det(z) + off_image


def measure(mixing, args, *, with_encoder):
    """A row for each precision, in the order of COLUMNS; C_IMA; and the largest condition number."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    z = torch.randn(args.rows, mixing.latent_dim, generator=generator).double()
    x, dims = mixing(z), (mixing.data_dim, mixing.latent_dim)
    contrast = float(inference.ima_contrast(mixing, z))
    guide = MeanField(*dims, hidden=(64, 64)).double()
    last, rows = 10.0, {}
    for exponent in args.exponents:
        model = IMAVAE(*dims, gamma2=10**exponent, network=mixing).double()
        best, full = best_gaussians(model, x)
        log_p, error = noisy_evidence(model, x, full.guide, args)
        gap, full_gap = (float((log_p - found.elbo).mean()) for found in (best, full))
        noiseless = float((noiseless_density(model, mixing, z) - best.elbo).mean())
        row = [gap, float(error.mean()), gap / contrast - 1, noiseless, full_gap]
        if with_encoder:
            train_further(model, guide, mixing, last, args)
            row += encoder_gaps(model, guide, x, log_p, gap)
        last, rows[exponent] = 10**exponent, row
    return rows, contrast, float(torch.linalg.cond(mixing.jacobian(z)).max())


def table_of(name, make, args, *, with_encoder):
    """As :func:`measure`, kept by name."""

    def compute():
        rows, contrast, condition = measure(make(), args, with_encoder=with_encoder)
        return {"rows": list(rows.items()), "contrast": contrast, "condition": condition}

    found = kept(args, name, compute)
    return dict(found["rows"]), found["contrast"], found["condition"]


def show(name, rows, contrast, condition):
    say(f"\n{name}: C_IMA = {contrast:.4f} nats, condition numbers of J up to {condition:.0f}")
    say("  ".join(["log10 gamma^2", *COLUMNS[: len(next(iter(rows.values())))]]))
    for exponent, row in rows.items():
        cells = (format(v, f).rjust(len(name)) for v, f, name in zip(row, FORMATS, COLUMNS, strict=False))
        say("  ".join([f"{exponent:13g}", *cells]))


def conclusions(tables):
    """What the last row of each table says of the claim, and how far the encoder follows."""
    for name, (rows, contrast, _) in tables.items():
        exponent, row = list(rows.items())[-1]
        gap, error, _, noiseless, full = row[:5]
        text = f"{name}: at gamma^2 = 10^{exponent:g} the gap is {gap:.4f} ({error:.0e}), C_IMA {contrast:.4f}"
        yield f"{text}; a full covariance leaves {full:.4f}; noiseless {noiseless:.4f}"
    rows, *_ = next(iter(tables.values()))
    below = [exponent for exponent, row in rows.items() if row[5] < 1]
    encoder = f"up to gamma^2 = 10^{max(below):g}" if below else "at none of these precisions"
    yield f"the encoder's amortisation is below one nat {encoder}"


def draw(tables):
    figure, axes = panels(2, 3, size=(10.2, 6.6))
    for ax, (name, (rows, contrast, _)) in zip(axes, tables.items(), strict=False):
        ax.axhline(contrast, color="black", linewidth=0.8, label="C_IMA")
        for k, style in ((0, ".-"), (3, ".--"), (4, ".:")):
            ax.plot([10**e for e in rows], [row[k] for row in rows.values()], style, label=COLUMNS[k])
        ax.set(xscale="log", xlabel="gamma^2", ylabel="nats", title=name)
    for ax in axes[len(tables) :]:
        ax.set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def main(argv=None):
    args = parse(argv)
    expect(args, len(DECODERS))
    tables = {}
    for name, make in DECODERS.items():
        tables[name] = table_of(name, make, args, with_encoder=not tables)
        show(name, *tables[name])
    print("\n" + "\n".join(conclusions(tables)))
    save(draw(tables), args, "elbo_gap_vs_gamma.png")
    finish(args)
    return tables


if __name__ == "__main__":
    run_as_command(main)
