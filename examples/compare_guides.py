"""How good are the guides? Every one of them on one and the same model, whose weights stay as they are.

A deep Gaussian VAE is trained on digits with a mean-field guide, then frozen, and each guide is trained on it from
scratch; guides that refine another one stand on the trained mean-field guide. The table splits each gap into what the
family cannot say (approximation) and what the encoder fails to say (amortisation). W2 is the Wasserstein distance, by
the moments, of draws from those of the posterior: exact for the linear VAE, the control, else resampled from many
proposals of the full-rank guide. It is all that is known of guides with samples only; draws' noise makes it positive.

    python examples/compare_guides.py --latent-dim 8 --steps 5000 --device cuda
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

import guides
from inference import evidence, gap, log_weights, pareto_k, posterior_error, predictive
from inference.core.figures import legend_above
from zoo import DeepGaussianVAE, LinearVAE, Scaled, digits

COLUMNS = ("ELBO", "gap", "approximation", "amortisation", "k-hat", "W2", "parameters", "seconds")
DATA_DIM = 64
SMOKE = {"latent_dim": 2, "hidden": 4, "model_steps": 5, "steps": 3, "rows": 2, "samples": 20}


def parse(argv):
    parser = example_parser(__doc__, "compare_guides", seed="initialisation, training and measurement")
    parser.add_argument("--latent-dim", type=int, default=4, help="K of both models")
    parser.add_argument("--hidden", type=int, default=32, help="width of every network's hidden layer")
    parser.add_argument("--model-steps", type=int, default=1500, help="steps of the model's own training")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each guide on the frozen model")
    parser.add_argument("--rows", type=int, default=30, help="data on which the table's values are measured")
    parser.add_argument("--samples", type=int, default=1000, help="draws per data point of k-hat and W2")
    parser.add_argument("--flow", action="store_true", help="a flow, too, whose refit takes long; needs zuko")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def trained_guides(model, args):
    """Name to a guide to be trained."""
    sizes, hidden = (DATA_DIM, args.latent_dim), (args.hidden,)
    found = {
        "linear": guides.Linear(*sizes),
        "constant variance": guides.ConstantVariance(*sizes, hidden=hidden),
        "mean field": guides.MeanField(*sizes, hidden=hidden),
        "Gauss-Newton, diagonal": guides.GaussNewtonDiagonal(model, hidden=hidden),
        "low rank": guides.LowRank(*sizes, hidden=hidden),
        "full rank": guides.FullRank(*sizes, hidden=hidden),
        "Gauss-Newton, full": guides.GaussNewtonFull(model, hidden=hidden),
        "mixture of 2": guides.Mixture(*sizes, hidden=hidden),
    }
    if args.flow:
        found["flow"] = guides.Flow(*sizes, hidden=hidden, context_dim=4, num_transforms=1, flow_hidden=hidden)
    return found


def refined_guides(model, base):
    """Name to a guide that improves another one and has nothing to train."""
    return {
        "mean field + 1 step": guides.SemiAmortised(model, base, steps=1),
        "mean field + 5 steps": guides.SemiAmortised(model, base, steps=5),
        "mean field, resampled": guides.Resampled(model, base, num_proposals=50),
        "mean field + HMC": guides.HMCRefined(model, base),
    }


def train_guide(model, guide, x, steps, args):
    """Train the guide, and what of the model is not frozen; returns the seconds."""
    options = {"batch_size": 128, "seed": args.seed, "device": args.device}
    return train(model, guide.standardise_by(x), x, steps=steps, rate=3e-3, **options).seconds


def measure(model, guide, rows, known, reference, seconds, args):
    """The numbers of :data:`COLUMNS`, NaN for what is unknown; means over the data, of k-hat the median."""
    error = posterior_error(model, guide, rows, reference=reference, num_samples=args.samples, seed=args.seed)
    num_parameters = sum(p.numel() for p in guide.parameters())
    rest = (float(error.wasserstein.mean()), num_parameters, seconds)
    if not guide.has_density:
        return (*[math.nan] * 5, *rest)
    found = gap(model, guide, rows, known=known, num_samples=64, restarts=0, seed=args.seed, progress=False)
    parts = [math.nan if part is None else float(part.mean()) for part in (found.approximation, found.amortisation)]
    k_hat = pareto_k(log_weights(model, guide, rows, num_samples=args.samples, progress=False)).value.median()
    return float(found.elbo.mean()), float(found.total.mean()), *parts, float(k_hat), *rest


def all_guides(model, exact, x, args):
    """Train the model, freeze it and train every guide on it: the guides by name, and their seconds."""
    train_guide(model, trained_guides(model, args)["mean field"], x, args.model_steps, args)
    trained = trained_guides(model.requires_grad_(False), args)
    seconds = {name: train_guide(model, guide, x, args.steps, args) for name, guide in trained.items()}
    refined = refined_guides(model, trained["mean field"])
    seconds |= dict.fromkeys(exact, 0.0) | dict.fromkeys(refined, seconds["mean field"])
    return exact | trained | refined, seconds


def compare(model, exact, x, args):
    """What is known of log p, and name of a guide to the numbers of :data:`COLUMNS`, all of them on one model."""
    every, seconds = all_guides(model, exact, x, args)
    for module in (model, *every.values()):
        module.double()
    rows = x[: args.rows].to(args.device).double()
    proposer = every["full rank"]
    known = evidence(model, rows, guide=None if exact else proposer, seed=args.seed, progress=False)
    best = exact["exact"] if exact else guides.Resampled(model, proposer, num_proposals=1000)
    reference = {"z": predictive(model, best, rows, num_samples=300)["z"]}
    table = {n: measure(model, guide, rows, known, reference, seconds[n], args) for n, guide in every.items()}
    return {"known": str(known), "table": table}


def show(title, found):
    say(f"\n{title}; {found['known']}\n{table_line('guide', COLUMNS, width=14)}")
    for name, row in found["table"].items():
        cells = ["unknown" if math.isnan(value) else f"{value:.4g}" for value in row]
        say(table_line(name, cells, width=14))


def conclude(tables):
    """On each model: which guide leaves least, which part of a gap is larger, and how far weights can be trusted."""
    print()
    for title, table in tables.items():
        known = {name: row for name, row in table.items() if not math.isnan(row[1])}
        best, nearest = min(known, key=lambda name: known[name][1]), min(table, key=lambda name: table[name][5])
        encoders = sum(row[3] > row[2] for row in known.values())
        print(f"{title}: the smallest gap, {known[best][1]:.3g} nats, is that of {best};", end=" ")
        print(f"the draws nearest to the posterior's are those of {nearest} (W2 {table[nearest][5]:.3g})", end="; ")
        print(f"for {encoders} of {len(known)} guides the encoder loses more than the family", end="; ")
        print(f"k-hat is below 0.7 for {sum(row[4] < 0.7 for row in known.values())}")


def draw(tables):
    """Two panels a model, one row a guide: the gap in its two parts, and the distance from the posterior."""
    figure, axes = panels(1, 2 * len(tables), size=(15, 5))
    for (parts, distance), (title, table) in zip(axes.reshape(-1, 2), tables.items(), strict=True):
        draw_parts(parts, table)
        parts.set(xlabel="gap, log p - ELBO (nats)")
        distance.set_title(title, loc="right")
        distance.plot([row[5] for row in table.values()], list(table), "o")
        distance.set(xlabel="W2 from the posterior", xlim=(0, None))
        distance.tick_params(labelleft=False)
        distance.set_ylim(*parts.set_ylim(len(table) - 0.5, -0.5))
    return figure


def draw_parts(ax, table):
    names = list(table)
    _, gaps, approximation, amortisation, *_ = torch.tensor(list(table.values())).nan_to_num(0.0).numpy().T
    not_split = gaps * ((approximation == 0) & (amortisation == 0))
    ax.barh(names, approximation, label="approximation")
    ax.barh(names, amortisation.clip(0), left=approximation, label="amortisation")
    ax.barh(names, not_split, color="0.7", label="not split")
    for name, row in table.items():
        if math.isnan(row[1]):
            ax.text(0, name, " samples only", va="center", fontsize=7)
    legend_above(ax)


def main(argv=None):
    args = parse(argv)
    x = digits(transform=Scaled(16.0), dtype=torch.float32).train
    torch.manual_seed(args.seed)
    control = LinearVAE(DATA_DIM, args.latent_dim, sigma=0.3).standardise_by(x)
    deep = DeepGaussianVAE(DATA_DIM, args.latent_dim, hidden=(args.hidden,)).standardise_by(x)
    closed_form = {"exact": guides.Exact(control), "tied mean field": guides.TiedMeanField(control)}
    tables = {}
    expect(args, 2)
    for title, (model, exact) in {"linear VAE": (control, closed_form), "deep VAE": (deep, {})}.items():
        found = kept(args, title, partial(compare, model, exact, x, args))
        show(title, found)
        tables[title] = found["table"]
    conclude(tables)
    save(draw(tables), args, "compare_guides.png")
    finish(args)
    return tables


if __name__ == "__main__":
    run_as_command(main)
