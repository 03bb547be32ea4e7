"""How far below the evidence is the ELBO, for each model and each guide, and why?

pPCA is fitted in closed form and comes twice: as fitted, and with its latent space rotated, which leaves the evidence
as it is but not the mean-field ELBO. The linear VAE, the deep one and the near-deterministic one are trained with each
guide. The gap of some rows is split into approximation and amortisation gap, next to the Jacobian's prediction; where
the evidence has no closed form, some rows get a bracket by annealing from both sides.

    python examples/elbo_gap.py --data digits-logit --model linear_vae --guide linear mean_field --out out/logit
"""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
from _common import example_parser, finish, parse_with_presets, save
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

import inference
import zoo
from guides import Exact, FullRank, Linear, MeanField, TiedMeanField
from inference import AnalyticKLELBO, Annealed, AnnealedPrecision, GeometricAnnealing, compare, fit, plots, table

GUIDES = {
    "exact": Exact,
    "tied": TiedMeanField,
    "linear": lambda model: Linear(model.data_dim, model.latent_dim),
    "mean_field": lambda model: MeanField(model.data_dim, model.latent_dim),
    "full_rank": lambda model: FullRank(model.data_dim, model.latent_dim),
}
MODELS = ("ppca", "linear_vae", "deep_vae", "ima_vae")
SMOKE = {"steps": 30, "samples": 30, "latent_dim": 3, "rows": 3, "temperatures": 10}


def parse(argv):
    parser = example_parser(__doc__, "elbo_gap", device=True, seed="initialisation, training and measurement")
    names = f"{', '.join(zoo.dataset_names())}; or a .npy, .npz or .csv file (mnist=PATH for a local copy)"
    parser.add_argument("--data", default="digits", help=names)
    parser.add_argument("--model", nargs="+", default=["all"], choices=[*MODELS, "all"], help="what to fit")
    parser.add_argument("--guide", nargs="+", default=list(GUIDES), choices=list(GUIDES), help="guides of each model")
    parser.add_argument("--latent-dim", type=int, default=8, help="K of every model")
    parser.add_argument("--gamma2", type=float, default=100.0, help="final precision of the near-deterministic VAE")
    parser.add_argument("--steps", type=int, default=3000, help="training steps per pair")
    parser.add_argument("--learning-rate", type=float, help="Adam's, decayed; where None, 2e-2 linear and 2e-3 deep")
    parser.add_argument("--samples", type=int, default=1000, help="importance samples per datum")
    parser.add_argument("--rows", type=int, default=32, help="rows whose gap is split and evidence bracketed")
    parser.add_argument("--temperatures", type=int, default=300, help="of annealing")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def rotated(model, seed):
    """The same p(x) with the latent space rotated at random: the likelihood cannot tell, the mean-field ELBO can."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(model.latent_dim, model.latent_dim, generator=generator).double())
    turned = copy.deepcopy(model)
    turned.W.data = model.W.data @ rotation.to(model.W)
    return turned


def builders(names, x, args):
    """Name of a model to a function that makes it, for the models chosen."""
    dims = (x.shape[1], args.latent_dim)
    fitted = zoo.PPCA.from_data(x, args.latent_dim).to(x).requires_grad_(False)
    turned = rotated(fitted, args.seed)
    standardised = lambda make: lambda: make(*dims).to(x).standardise_by(x)  # noqa: E731
    near_deterministic = partial(zoo.IMAVAE, gamma2=args.gamma2, hidden=(128, 128))
    found = {
        "ppca": {"pPCA": lambda: fitted, "pPCA rotated": lambda: turned},
        "linear_vae": {"linear VAE": standardised(zoo.LinearVAE)},
        "deep_vae": {"deep VAE": standardised(zoo.DeepGaussianVAE)},
        "ima_vae": {"IMA VAE": standardised(near_deterministic)},
    }
    return {label: make for name in names for label, make in found[name].items()}


def train(model, guide, x, args):
    """SVI by Adam: closed-form KL, one reparameterised sample, mini-batches, learning rate decayed to a hundredth."""
    objective = AnalyticKLELBO()
    if isinstance(model, zoo.IMAVAE):  # up to the final precision over the first 60 % of the steps
        objective = AnnealedPrecision(objective, GeometricAnnealing(math.ceil(0.6 * args.steps), 1.0, args.gamma2))
    fit(
        model,
        guide,
        x,
        steps=args.steps,
        objective=objective,
        optimizer=partial(Adam, lr=args.learning_rate or (2e-3 if hasattr(model, "network") else 2e-2)),
        scheduler=partial(LambdaLR, lr_lambda=lambda step: 0.01 ** (step / args.steps)),
        batch_size=256,
        seed=args.seed,
        device=args.device,
    )


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
            lower, log_p = bracket(model, guide, rows, args)
            approximation = approximation + lower - own["evidence"]
        predicted = inference.predicted_gap(model, guide.posterior(rows).mean).mean()
        cells = f"{approximation.mean():13.4f}{predicted:11.4f}{own['amortisation'].mean():14.4f}"
        print(f"{name:28s}{cells}   {log_p}", flush=True)


def bracket(model, guide, rows, args):
    """The lower end of each row's evidence, and what is known of their mean, as text."""
    annealed = Annealed(num_temperatures=args.temperatures)
    options = {"method": annealed, "num_steps": args.temperatures, "seed": args.seed, "progress": False}
    found = inference.converged_bracket(model, rows, guide=guide, **options)
    return found.raw_lower.cpu().numpy(), str(found)


def compare_pairs(pairs, data, args):
    """The table of all pairs on training and held-out data."""
    options = {"num_samples": args.samples, "split": args.rows, "seed": args.seed, "log_det": data.train_log_det}
    if len(data.test):
        options |= {"held_out": data.test, "held_out_log_det": data.test_log_det}
    return compare(None, pairs, data.train, **options)


def save_all(pairs, tree, args):
    inference.save_comparison(tree, args.out / "elbo_gap.nc")
    for draw in (plots.gap_histogram, plots.elbo_against_evidence, plots.pareto_k_map):
        save(draw(tree), args, f"{draw.__name__}.png")
    for name, pair in pairs.items():
        inference.save_pair(args.out / f"{name.replace(' / ', '-').replace(' ', '_')}.safetensors", *pair)


def main(argv=None):
    args = parse(argv)
    data = zoo.named_dataset(args.data).to(device=args.device)
    names = MODELS if "all" in args.model else args.model
    print(f"{data}\n{len(names)} models, {len(args.guide)} guides, {args.steps} steps each: minutes on 2 cores")
    pairs = {}
    for label, build in builders(names, data.train, args).items():
        pairs |= dict(pairs_of(label, build, data.train, args))
    tree = compare_pairs(pairs, data, args)
    print("\n" + table(tree))
    report(pairs, tree, data.train, args)
    save_all(pairs, tree, args)
    print()
    finish(args)
    return tree


if __name__ == "__main__":
    main()
