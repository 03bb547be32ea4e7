"""How good are the guides? Every one of them on one and the same model, whose weights stay as they are.

A deep Gaussian VAE is trained on digits with a mean-field guide, then frozen, and each guide is trained on it from
scratch; guides that refine another one stand on the trained mean-field guide. The table splits each gap into what the
family cannot say (approximation) and what the encoder fails to say (amortisation). W2 is the Wasserstein distance, by
the moments, of draws from those of the posterior: exact for the linear VAE, the control, else resampled from many
proposals of the full-rank guide. It is all that is known of guides with samples only; draws' noise makes it positive.

    python examples/compare_guides.py --latent-dim 8 --steps 5000 --device cuda
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR

import guides
from inference import evidence, fit, gap, log_weights, pareto_k, predictive
from inference.diagnostics.accuracy import posterior_error
from inference.plots.comparison import save_figure
from zoo import DeepGaussianVAE, LinearVAE, Scaled, digits

COLUMNS = ("ELBO", "gap", "approximation", "amortisation", "k-hat", "W2", "parameters", "seconds")
DATA_DIM = 64


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-dim", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=32, help="width of every network's hidden layer")
    parser.add_argument("--model-steps", type=int, default=1500, help="steps of the model's own training")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each guide on the frozen model")
    parser.add_argument("--rows", type=int, default=30, help="data on which the table's values are measured")
    parser.add_argument("--samples", type=int, default=1000, help="draws per datum of k-hat and W2")
    parser.add_argument("--flow", action="store_true", help="a flow, too, whose refit takes long; needs zuko")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/compare_guides"))
    return parser.parse_args(argv)


def trained_guides(model, args):
    """Name to a guide to be trained."""
    sizes, hidden = (DATA_DIM, args.latent_dim), {"hidden": (args.hidden,)}
    found = {
        "linear": guides.Linear(*sizes),
        "constant variance": guides.ConstantVariance(*sizes, **hidden),
        "mean field": guides.MeanField(*sizes, **hidden),
        "Gauss-Newton, diagonal": guides.GaussNewtonDiagonal(model, **hidden),
        "low rank": guides.LowRank(*sizes, **hidden),
        "full rank": guides.FullRank(*sizes, **hidden),
        "Gauss-Newton, full": guides.GaussNewtonFull(model, **hidden),
        "mixture of 2": guides.Mixture(*sizes, **hidden),
    }
    if args.flow:
        found["flow"] = guides.Flow(*sizes, **hidden, context_dim=4, num_transforms=1, flow_hidden=(args.hidden,))
    return found


def refined_guides(model, base):
    """Name to a guide that improves another one and has nothing to train."""
    return {
        "mean field + 1 step": guides.SemiAmortised(model, base, steps=1),
        "mean field + 5 steps": guides.SemiAmortised(model, base, steps=5),
        "mean field, resampled": guides.Resampled(model, base, num_proposals=50),
        "mean field + HMC": guides.HMCRefined(model, base),
    }


def train(model, guide, x, steps, args):
    """Adam with a learning rate that falls to zero; returns the seconds."""
    options = {"steps": steps, "batch_size": 128, "seed": 0, "device": args.device, "progress": False}
    options |= {"optimizer": partial(torch.optim.Adam, lr=3e-3), "scheduler": lambda o: CosineAnnealingLR(o, steps)}
    return fit(model, guide, x, **options).seconds


def measure(model, guide, rows, known, reference, seconds, args):
    """The numbers of :data:`COLUMNS`, NaN for what is unknown; means over the data, of k-hat the median."""
    error = posterior_error(model, guide, rows, reference=reference, num_samples=args.samples, seed=0)
    rest = (float(error.wasserstein.mean()), sum(p.numel() for p in guide.parameters()), seconds)
    if not guide.has_density:
        return (*[math.nan] * 5, *rest)
    found = gap(model, guide, rows, known=known, num_samples=64, restarts=0, seed=0, progress=False)
    parts = [math.nan if p is None else float(p.mean()) for p in (found.approximation, found.amortisation)]
    k_hat = pareto_k(log_weights(model, guide, rows, num_samples=args.samples)).value.median()
    return float(found.elbo.mean()), float(found.total.mean()), *parts, float(k_hat), *rest


def compare(title, model, exact, x, args):
    """Train the model, freeze it, train every guide on it: name to the numbers of :data:`COLUMNS`."""
    train(model, trained_guides(model, args)["mean field"].standardise_by(x), x, args.model_steps, args)
    trained = trained_guides(model.requires_grad_(False), args)
    seconds = {name: train(model, g.standardise_by(x), x, args.steps, args) for name, g in trained.items()}
    refined = refined_guides(model, trained["mean field"])
    seconds |= dict.fromkeys(exact, 0.0) | dict.fromkeys(refined, seconds["mean field"])
    every = exact | trained | refined
    for module in (model, *every.values()):
        module.double()
    rows, proposer = x[: args.rows].to(args.device).double(), every["full rank"]
    known = evidence(model, rows, guide=None if exact else proposer, seed=0, progress=False)
    best = exact["exact"] if exact else guides.Resampled(model, proposer, num_proposals=1000)
    reference = {"z": predictive(model, best, rows, num_samples=300)["z"]}
    print(f"\n{title}; {known}\n{'guide':24s}" + "".join(f"{c:>14s}" for c in COLUMNS))
    table = {}
    for name, guide in every.items():
        table[name] = measure(model, guide, rows, known, reference, seconds[name], args)
        print(f"{name:24s}" + "".join(f"{'unknown' if math.isnan(v) else f'{v:.4g}':>14s}" for v in table[name]))
    return table


def draw(tables):
    """Two panels a model, one row a guide: the gap in its two parts, and the distance from the posterior."""
    axes = (figure := Figure(figsize=(15, 5), layout="constrained")).subplots(1, 2 * len(tables)).reshape(-1, 2)
    for (parts, distance), (title, table) in zip(axes, tables.items(), strict=True):
        names, values = list(table), torch.tensor(list(table.values())).nan_to_num(0.0).numpy()
        rest = values[:, 1] * ~values[:, 2:4].any(-1)
        parts.barh(names, values[:, 2], label="approximation")
        parts.barh(names, values[:, 3].clip(0), left=values[:, 2], label="amortisation")
        parts.barh(names, rest, color="0.7", label="not split")
        for name in (name for name, row in table.items() if math.isnan(row[1])):
            parts.text(0, name, " samples only", va="center", fontsize=7)
        parts.set(xlabel="gap, log p - ELBO (nats)", title=title)
        parts.legend(fontsize=7, loc="center right")
        distance.plot(values[:, 5], names, "o")
        distance.set(xlabel="W2 from the posterior", xlim=(0, None))
        distance.tick_params(labelleft=False)
        distance.set_ylim(*parts.set_ylim(len(names) - 0.5, -0.5))
    return figure


def main(argv=None):
    args = parse(argv)
    x = digits(transform=Scaled(16.0), dtype=torch.float32).train
    torch.manual_seed(0)
    control = LinearVAE(DATA_DIM, args.latent_dim, sigma=0.3).standardise_by(x)
    deep = DeepGaussianVAE(DATA_DIM, args.latent_dim, hidden=(args.hidden,)).standardise_by(x)
    closed = {"exact": guides.Exact(control), "tied mean field": guides.TiedMeanField(control)}
    tables = {t: compare(t, *pair, x, args) for t, *pair in (("linear VAE", control, closed), ("deep VAE", deep, {}))}
    save_figure(draw(tables), args.out / "compare_guides.png")
    return tables


if __name__ == "__main__":
    main()
