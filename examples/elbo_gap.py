"""How far below the evidence is the ELBO, for each model and each guide, and why?

pPCA is fitted in closed form and comes twice: as fitted, and with its latent space rotated, which leaves the evidence
as it is but not the mean-field ELBO. The linear VAE, the deep one and the near-deterministic one are trained with each
guide. The gap of some rows is split into approximation and amortisation, beside what the decoder's Jacobian predicts;
where the evidence has no closed form, some rows get a bracket by annealing from both sides.

    python examples/elbo_gap.py --data digits-logit --model linear_vae --guide linear mean_field --out out/logit
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

import inference
import zoo
from guides import Exact, FullRank, Linear, MeanField, TiedMeanField
from inference import AnalyticKLELBO, Annealed, AnnealedPrecision, GeometricAnnealing, compare, fit, table
from inference.plots.comparison import comparison as plots

GUIDES = {
    "exact": Exact,
    "tied": TiedMeanField,
    "linear": lambda model: Linear(model.data_dim, model.latent_dim),
    "mean_field": lambda model: MeanField(model.data_dim, model.latent_dim),
    "full_rank": lambda model: FullRank(model.data_dim, model.latent_dim),
}
MODELS = ("ppca", "linear_vae", "deep_vae", "ima_vae")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"{', '.join(zoo.dataset_names())}; or a .npy, .npz or .csv file (mnist=PATH for a local copy)"
    parser.add_argument("--data", default="digits", help=names)
    parser.add_argument("--model", nargs="+", default=["all"], choices=[*MODELS, "all"])
    parser.add_argument("--guide", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--gamma2", type=float, default=100.0, help="final precision of the near-deterministic VAE")
    parser.add_argument("--steps", type=int, default=3000, help="training steps per pair")
    parser.add_argument("--learning-rate", type=float, default=None, help="Adam's, decayed; 2e-2 linear, 2e-3 deep")
    parser.add_argument("--samples", type=int, default=1000, help="importance samples per datum")
    parser.add_argument("--rows", type=int, default=32, help="rows whose gap is split and evidence bracketed")
    parser.add_argument("--temperatures", type=int, default=300, help="of annealing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/elbo_gap"))
    return parser.parse_args(argv)


def rotated(model, seed):
    """The same law with its latent space rotated at random: the likelihood cannot tell, the mean-field ELBO can."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(model.latent_dim, model.latent_dim, generator=generator).double())
    turned = copy.deepcopy(model)
    turned.W.data = model.W.data @ rotation.to(model.W)
    return turned


def train(model, guide, x, args):
    """SVI by Adam: closed-form KL, one reparameterised sample, mini-batches, learning rate decayed to a hundredth."""
    objective, steps = AnalyticKLELBO(), args.steps
    if isinstance(model, zoo.IMAVAE):  # up to the final precision over the first 60 % of the steps
        objective = AnnealedPrecision(objective, GeometricAnnealing(math.ceil(0.6 * steps), 1.0, args.gamma2))
    rate = args.learning_rate or (2e-3 if hasattr(model, "network") else 2e-2)
    scheduler = lambda optimizer: LambdaLR(optimizer, lambda step: 0.01 ** (step / steps))  # noqa: E731
    options = {"optimizer": lambda p: Adam(p, lr=rate), "scheduler": scheduler, "batch_size": 256}
    fit(model, guide, x, steps=steps, objective=objective, seed=args.seed, device=args.device, **options)


def pairs_of(name, build, x, args):
    """A model with each guide, trained by SVI where a half has something to learn."""
    for guide_name in args.guide:
        torch.manual_seed(args.seed)
        model = build()
        if guide_name in ("exact", "tied") and not hasattr(model, "posterior"):
            continue
        guide = GUIDES[guide_name](model).to(x)
        if hasattr(guide, "standardise_by"):
            guide.standardise_by(x)
        if any(p.requires_grad for half in (model, guide) for p in half.parameters()):
            print(f"training {name} / {guide_name}", flush=True)
            train(model, guide, x, args)
        yield f"{name} / {guide_name}", (model, guide)


def report(pairs, tree, x, args):
    """Per pair, over some rows: the gap's parts, what the decoder's Jacobian predicts, and a bracket of log p."""
    rows = x[: args.rows]
    dataset = tree["train"].to_dataset().isel(seed=0, datum=slice(args.rows))
    print(f"\nover {len(rows)} rows{'approximation':>27s}{'predicted':>11s}{'amortisation':>14s}   mean log p")
    for name, (model, guide) in pairs.items():
        own = dataset.sel(guide=name)
        approximation, log_p = own["approximation"], f"{own['evidence'].mean():.4f} exactly"
        if not hasattr(model, "log_evidence"):
            settings = {"method": Annealed(num_temperatures=args.temperatures), "num_steps": args.temperatures}
            found = inference.converged_bracket(model, rows, guide=guide, **settings, seed=args.seed, progress=False)
            lower, upper = found.raw_lower.cpu(), found.upper_if_converged.cpu()
            approximation = approximation + lower.numpy() - own["evidence"]
            log_p = f"[{lower.mean():.4f}, {upper.mean():.4f}] if {found.assumption}"
        predicted = inference.predicted_gap(model, guide.posterior(rows).mean).mean()
        cells = f"{approximation.mean():13.4f}{predicted:11.4f}{own['amortisation'].mean():14.4f}"
        print(f"{name:28s}{cells}   {log_p}", flush=True)


def main(argv=None):
    args, start = parse(argv), time.perf_counter()
    data = zoo.named_dataset(args.data).to(device=args.device)
    x, dims = data.train, (data.data_dim, args.latent_dim)
    names = MODELS if "all" in args.model else args.model
    print(f"{data}\n{len(names)} models, {len(args.guide)} guides, {args.steps} steps each: minutes on 2 cores")
    fitted = zoo.PPCA.from_data(x, args.latent_dim).to(x).requires_grad_(False)
    turned = rotated(fitted, args.seed)
    builds = {
        "ppca": {"pPCA": lambda: fitted, "pPCA rotated": lambda: turned},
        "linear_vae": {"linear VAE": lambda: zoo.LinearVAE(*dims)},
        "deep_vae": {"deep VAE": lambda: zoo.DeepGaussianVAE(*dims)},
        "ima_vae": {"IMA VAE": lambda: zoo.IMAVAE(*dims, gamma2=args.gamma2, hidden=(128, 128))},
    }
    pairs = {}
    for label, build in ((label, build) for name in names for label, build in builds[name].items()):
        ready = build if "pPCA" in label else lambda build=build: build().to(x).standardise_by(x)
        pairs |= dict(pairs_of(label, ready, x, args))
    options = {"num_samples": args.samples, "split": args.rows, "seed": args.seed, "log_det": data.train_log_det}
    if len(data.test):
        options |= {"held_out": data.test, "held_out_log_det": data.test_log_det}
    tree = compare(None, pairs, x, **options)
    print("\n" + table(tree))
    report(pairs, tree, x, args)
    inference.save_comparison(tree, args.out / "elbo_gap.nc")
    for name in ("gap_histogram", "elbo_against_evidence", "pareto_k_map"):
        plots.save_figure(getattr(plots, name)(tree), args.out / f"{name}.png")
    for name, pair in pairs.items():
        inference.save_pair(args.out / f"{name.replace(' / ', '-').replace(' ', '_')}.safetensors", *pair)
    print(f"\nwrote {args.out}/ in {time.perf_counter() - start:.0f} s")
    return tree


if __name__ == "__main__":
    main()
