"""What a guide's family costs and what its encoder costs, on decoders that are known and stay as they are.

The decoders are shears of increasing strength behind a smooth nonlinearity, so the columns of their Jacobians go from
orthogonal to nearly parallel; the data are drawn from the model, and log p is known by quadrature. First the best
member of each family is found for every data point: the approximation gap of independent coordinates follows the
decoder's contrast, that of others does not. Then encoders of several widths are trained on several numbers of data:
their amortisation gap, on data that they have not seen, is what they lose against the best guide of each data point.

    python examples/guides_on_one_decoder.py
    python examples/guides_on_one_decoder.py --new 500 --steps 5000 --widths 4 16 64 256
"""

from __future__ import annotations

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
    table_line,
    train,
)

import guides
from guides import GaussNewtonDiagonal, GaussNewtonFull, local_gauss_newton
from inference import ELBO, AnalyticKLELBO, evidence, ima_contrast, predicted_gap, refit
from inference.core.figures import legend_above
from zoo import IMAVAE, Composition, SmoothLeakyReLU, shear

SMOKE = {"strengths": [1.0], "rows": 2, "new": 2, "widths": [4], "sizes": [20], "steps": 2, "family_steps": 2}
FAMILIES = ("mean field", "full rank", "mixture of 2", "flow")


def parse(argv):
    seed = "the data, initialisation and noise"
    parser = example_parser(__doc__, "guides_on_one_decoder", seed=seed)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0, 4.0], help="of the shear")
    parser.add_argument("--gamma2", type=float, default=30.0, help="precision of the noise")
    parser.add_argument("--rows", type=int, default=16, help="data on which families are measured")
    parser.add_argument("--new", type=int, default=64, help="data on which encoders are measured")
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 16, 64], help="of the encoder's hidden layer")
    parser.add_argument("--sizes", type=int, nargs="+", default=[30, 300, 3000], help="numbers of training data")
    parser.add_argument("--steps", type=int, default=800, help="of an encoder's training")
    text = "of guides; the last two take minutes, and a flow needs zuko"
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES[:2]), help=text)
    parser.add_argument("--family-steps", type=int, default=1000, help="training of the last two before their refit")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def make_model(strength, args):
    """A decoder of a nonlinearity and a shear, frozen; K = D = 2."""
    mixing = Composition([SmoothLeakyReLU(2, 0.2), shear(strength)])
    model = IMAVAE(2, 2, gamma2=args.gamma2, network=mixing).double().requires_grad_(False)
    return model.to(args.device)


def draw_data(model, num, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(n=num)


def starts(model, x, args):
    """Name of a family to a guide to refit."""
    makers = {
        "mean field": lambda: local_gauss_newton(model, x, family=GaussNewtonDiagonal, seed=0),
        "full rank": lambda: local_gauss_newton(model, x, family=GaussNewtonFull, seed=0),
        "mixture of 2": lambda: trained(guides.Mixture(2, 2, hidden=(32, 32)), model, args),
        "flow": lambda: trained(guides.Flow(2, 2, hidden=(32, 32), context_dim=4, flow_hidden=(32, 32)), model, args),
    }
    return {name: makers[name]() for name in args.families}


def trained(guide, model, args):
    """A guide trained on data of the model: a flow's own network is one for all data, which a refit leaves as it is."""
    x = draw_data(model, 2000, args.seed + 3)
    guide = guide.to(x)
    options = {"objective": ELBO(num_particles=4), "batch_size": 100, "seed": args.seed}
    train(model, guide, x, steps=args.family_steps, rate=5e-3, **options)
    return guide


def families(strength, args):
    """Contrast, predicted gap, and the approximation gap of each family with its standard error over noise."""
    model = make_model(strength, args)
    x = draw_data(model, args.rows, args.seed + 1)
    log_p = evidence(model, x, method="quadrature", progress=False).value
    torch.manual_seed(args.seed)
    found = {}
    for name, start in starts(model, x, args).items():
        best = refit(model, start, x, restarts=0, seed=args.seed, progress=False)
        error = float(best.standard_error.square().sum().sqrt()) / len(x)
        found[name] = [float((log_p - best.elbo).mean()), error]
        if "contrast" not in found:
            z = best.guide.posterior(x).mean.detach()
            found["predicted"], found["contrast"] = (
                float(predicted_gap(model, z).mean()),
                float(ima_contrast(model.decode, z)),
            )
    return found


def amortised(width, size, strength, args):
    """The amortisation gap of a mean-field encoder on new data, and its standard error."""
    model = make_model(strength, args)
    x, new = draw_data(model, size, args.seed + 2), draw_data(model, args.new, args.seed + 1)
    torch.manual_seed(args.seed)
    guide = guides.MeanField(2, 2, hidden=(width,)).to(x)
    options = {"objective": AnalyticKLELBO(), "batch_size": min(64, size), "seed": args.seed}
    train(model, guide, x, steps=args.steps, rate=1e-2, **options)
    best = refit(model, guide, new, restarts=0, seed=args.seed, progress=False)
    error = float(best.improvement_error.square().sum().sqrt()) / len(new)
    return [float(best.improvement.mean()), error]


def show(tables, grid, args):
    names = args.families
    print(table_line("strength of the shear", ["contrast", "predicted", *names], first=24, width=18))
    for strength, found in tables.items():
        cells = [f"{found['contrast']:.4f}", f"{found['predicted']:.4f}"]
        cells += [f"{value:.4f} ({error:.4f})" for value, error in (found[name] for name in names)]
        print(table_line(f"{strength:g}", cells, first=24, width=18))
    print("\n" + table_line("amortisation, width", [f"{size} data" for size in args.sizes], width=18))
    for width in args.widths:
        cells = [f"{value:.4f} ({error:.4f})" for value, error in (grid[width, size] for size in args.sizes)]
        print(table_line(f"{width}", cells, width=18))


def conclude(tables, grid, args):
    """How close the mean field is to its prediction, what the others leave, and what widens or narrows amortisation."""
    found = tables[max(tables)]
    left = ", ".join(f"{name} {found[name][0]:.4f} ({found[name][1]:.1g})" for name in args.families)
    print(
        f"\nat the strongest shear, of contrast {found['contrast']:.4f} nats, the best guides leave {left} nats", end=""
    )
    print(f"; predicted for independent coordinates {found['predicted']:.4f}")
    narrow, wide = grid[min(args.widths), max(args.sizes)], grid[max(args.widths), max(args.sizes)]
    few = grid[max(args.widths), min(args.sizes)]
    print(
        f"the widest encoder loses {wide[0]:.4f} ({wide[1]:.1g}) nats on new data after {max(args.sizes)} data", end=""
    )
    print(f", {few[0]:.4f} ({few[1]:.1g}) after {min(args.sizes)}; the narrowest {narrow[0]:.4f} ({narrow[1]:.1g})")


def draw(tables, grid, args):
    """Approximation against contrast for each family, and amortisation against data for each width."""
    figure, (left, right) = panels(1, 2, size=(10, 3.8))
    contrast = [found["contrast"] for found in tables.values()]
    for name in args.families:
        values = torch.tensor([found[name] for found in tables.values()])
        left.errorbar(contrast, values[:, 0], yerr=2 * values[:, 1], fmt="o-", markersize=4, capsize=2, label=name)
    left.plot(contrast, [found["predicted"] for found in tables.values()], "k:", label="predicted, mean field")
    left.set(xlabel="contrast of the decoder (nats)", ylabel="approximation gap (nats)")
    for width in args.widths:
        values = torch.tensor([grid[width, size] for size in args.sizes])
        label = f"{width} hidden units"
        right.errorbar(args.sizes, values[:, 0], yerr=2 * values[:, 1], fmt="o-", markersize=4, capsize=2, label=label)
    right.set(
        xscale="log", yscale="log", xlabel="training data of the encoder", ylabel="amortisation gap, new data (nats)"
    )
    left.legend(fontsize=8, frameon=False, loc="upper left")
    legend_above(right)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return figure


def main(argv=None):
    args = parse(argv)
    print(f"K = D = 2, gamma^2 = {args.gamma2:g}; nats per data point, over {args.rows} of them,", end=" ")
    print(f"encoders over {args.new} (standard errors of the estimates, for these data)\n")
    expect(args, len(args.strengths) + len(args.widths) * len(args.sizes))
    tables = {s: kept(args, f"families_{s:g}", partial(families, s, args)) for s in args.strengths}
    middle = sorted(args.strengths)[len(args.strengths) // 2]
    grid = {
        (width, size): kept(args, f"encoder_{width}_{size}", partial(amortised, width, size, middle, args))
        for width in args.widths
        for size in args.sizes
    }
    show(tables, grid, args)
    conclude(tables, grid, args)
    save(draw(tables, grid, args), args, "guides_on_one_decoder.png")
    finish(args)
    return tables, grid


if __name__ == "__main__":
    run_as_command(main)
