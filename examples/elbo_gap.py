"""How far below the evidence is the ELBO, for each model and each guide?

pPCA is fitted in closed form and comes twice: as fitted, and with its latent space rotated, which leaves the evidence
as it is but not the mean-field ELBO. The linear VAE, and on demand the deep one, are trained with each guide.

    python examples/elbo_gap.py --data digits-logit --model linear_vae --guide linear mean_field --out out/logit
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

import zoo
from guides import Exact, FullRank, Linear, MeanField, TiedMeanField
from inference import AnalyticKLELBO, compare, fit, plots, save_comparison, save_pair, table

DATA = {
    "digits": zoo.digits,
    "digits-scaled": lambda: zoo.digits(transform=zoo.Scaled(16.0)),
    "digits-logit": zoo.digits_logit,
    "synthetic": lambda: zoo.linear_gaussian(2000, 20, 8, test_size=500),
}
IMAGES = {"mnist": zoo.mnist, "fashion-mnist": zoo.fashion_mnist}
GUIDES = {
    "exact": Exact,
    "tied": TiedMeanField,
    "linear": lambda model: Linear(model.data_dim, model.latent_dim),
    "mean_field": lambda model: MeanField(model.data_dim, model.latent_dim),
    "full_rank": lambda model: FullRank(model.data_dim, model.latent_dim),
}
MODELS = ("ppca", "linear_vae", "deep_vae")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"{', '.join(DATA)}; {', '.join(IMAGES)}, with =PATH for a local copy"
    parser.add_argument("--data", default="digits", help=f"{names}; or a .npy, .npz or .csv file")
    parser.add_argument("--model", nargs="+", default=MODELS[:2], choices=[*MODELS, "all"])
    parser.add_argument("--guide", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000, help="training steps per pair")
    parser.add_argument("--learning-rate", type=float, default=2e-2, help="Adam's, decayed to a hundredth")
    parser.add_argument("--samples", type=int, default=1000, help="importance samples per datum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/elbo_gap"))
    return parser.parse_args(argv)


def read(name):
    """A named data set, or a user's file with a fifth of its rows held out unless it brings test rows of its own."""
    if name in DATA:
        return DATA[name]()
    kind, _, path = name.partition("=")
    if kind in IMAGES:
        return IMAGES[kind](path or None, dtype=torch.float64)
    data = zoo.load(name)
    return data if len(data.test) else zoo.load(name, test_size=0.2)


def rotated(model, seed):
    """The same law with its latent space rotated at random: the likelihood cannot tell, the mean-field ELBO can."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(model.latent_dim, model.latent_dim, generator=generator).double())
    turned = copy.deepcopy(model)
    turned.W.data = model.W.data @ rotation.to(model.W)
    return turned


def train(model, guide, x, args):
    """SVI by Adam: closed-form KL, one reparameterised sample, mini-batches, learning rate decayed to a hundredth."""
    fit(
        model,
        guide,
        x,
        steps=args.steps,
        objective=AnalyticKLELBO(),
        optimizer=lambda parameters: Adam(parameters, lr=args.learning_rate),
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 0.01 ** (step / args.steps)),
        batch_size=256,
        seed=args.seed,
        device=args.device,
    )


def pairs_of(name, build, x, args):
    """A model with each guide, trained by SVI where a half has something to learn."""
    pairs = {}
    for guide_name in args.guide:
        torch.manual_seed(args.seed)
        model = build()
        if guide_name in ("exact", "tied") and not hasattr(model, "posterior"):
            continue
        guide = GUIDES[guide_name](model).to(x)
        if hasattr(guide, "standardise_by"):
            guide.standardise_by(x)
        if any(p.requires_grad for half in (model, guide) for p in half.parameters()):
            print(f"training {name} / {guide_name}")
            train(model, guide, x, args)
        pairs[f"{name} / {guide_name}"] = model, guide
    return pairs


def main(argv=None):
    args = parse(argv)
    start = time.perf_counter()
    data = read(args.data).to(device=args.device)
    x, dims = data.train, (data.data_dim, args.latent_dim)
    print(data)
    models = MODELS if "all" in args.model else args.model
    pairs = {}
    if "ppca" in models:
        fitted = zoo.PPCA.from_data(x, args.latent_dim).to(x).requires_grad_(False)
        turned = rotated(fitted, args.seed)
        pairs |= pairs_of("pPCA", lambda: fitted, x, args)
        pairs |= pairs_of("pPCA rotated", lambda: turned, x, args)
    if "linear_vae" in models:
        pairs |= pairs_of("linear VAE", lambda: zoo.LinearVAE(*dims).to(x).standardise_by(x), x, args)
    if "deep_vae" in models:
        pairs |= pairs_of("deep VAE", lambda: zoo.DeepGaussianVAE(*dims).to(x).standardise_by(x), x, args)
    tree = compare(
        None,
        pairs,
        x,
        held_out=data.test if len(data.test) else None,
        log_det=data.train_log_det,
        held_out_log_det=data.test_log_det,
        num_samples=args.samples,
        seed=args.seed,
    )
    print("\n" + table(tree))
    save_comparison(tree, args.out / "elbo_gap.nc")
    for name in ("gap_histogram", "elbo_against_evidence", "pareto_k_map"):
        plots.save_figure(getattr(plots, name)(tree), args.out / f"{name}.png")
    for name, pair in pairs.items():
        save_pair(args.out / f"{name.replace(' / ', '-').replace(' ', '_')}.safetensors", *pair)
    print(f"\nwrote {args.out}/ in {time.perf_counter() - start:.0f} s")
    return tree


if __name__ == "__main__":
    main()
