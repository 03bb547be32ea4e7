"""How far below the evidence is the ELBO, for each model and each guide, and why?

pPCA is fitted in closed form and comes twice: as fitted, and with its latent space rotated, which leaves the evidence
as it is but not the mean-field ELBO. The linear VAE, the deep one and the near-deterministic one are trained with each
guide. On some held-out rows the evidence is computed (exactly, or by sampling with an interval), and the gap below it
is split into what the guide's family leaves and what the encoder loses, next to the Jacobian's prediction.

    python examples/elbo_gap.py --data digits-logit --model linear_vae --guide linear mean_field --out out/logit
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial

import torch
from _common import example_parser, finish, kept_pair, parse_with_presets, run_as_command, save, table_line
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

import inference
import zoo
from guides import Exact, FullRank, Linear, MeanField, TiedMeanField
from inference import AnalyticKLELBO, AnnealedPrecision, GeometricAnnealing, fit, plots

GUIDES = {
    "exact": Exact,
    "tied": TiedMeanField,
    "linear": lambda model: Linear(model.data_dim, model.latent_dim),
    "mean_field": lambda model: MeanField(model.data_dim, model.latent_dim),
    "full_rank": lambda model: FullRank(model.data_dim, model.latent_dim),
}
MODELS = ("ppca", "linear_vae", "deep_vae", "ima_vae")
INDEPENDENT = ("tied", "linear", "mean_field")  # guides with independent coordinates, whose gap is predicted
SMOKE = {"steps": 30, "latent_dim": 2, "rows": 2, "refit_steps": 5}
WIDTHS = (30, 26, 25, 10, 26)
LEGEND = """
log p >= ELBO, so gap = log p - ELBO >= 0; gap = approximation + amortisation.
approximation: left by the best guide of this family that a refit of each row found; a better one would move nats from
    it to amortisation, so its interval reaches down to 0. predicted: the same from the decoder's Jacobian alone.
amortisation: what the encoder loses against that guide, at least.
"""
TIGHT = 1e-3
HEADS = ("ELBO", "log p", "gap", "approximation", "predicted", "amortisation")


def parse(argv):
    resume = "take the trained pairs that an earlier call with the same settings left in the folder"
    parser = example_parser(__doc__, "elbo_gap", seed="initialisation, training and measurement", resume=resume)
    names = f"{', '.join(zoo.dataset_names())}; or a .npy, .npz or .csv file (mnist=PATH for a local copy)"
    parser.add_argument("--data", default="digits", help=names)
    parser.add_argument("--model", nargs="+", default=["all"], choices=[*MODELS, "all"], help="what to fit")
    parser.add_argument(
        "--guide",
        nargs="+",
        default=["exact", "mean_field", "full_rank"],
        choices=list(GUIDES),
        help="guides of each model",
    )
    parser.add_argument("--latent-dim", type=int, default=8, help="K of every model")
    parser.add_argument("--gamma2", type=float, default=100.0, help="final precision of the near-deterministic VAE")
    parser.add_argument("--steps", type=int, default=3000, help="training steps per pair")
    parser.add_argument("--learning-rate", type=float, help="Adam's, decayed; where None, 2e-2 linear and 2e-3 deep")
    parser.add_argument("--rows", type=int, default=20, help="held-out rows on which the gap is measured")
    parser.add_argument("--refit-steps", type=int, default=200, help="of the search for the family's best, at most")
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
        progress=False,
    )


def pairs_of(names, x, args) -> Iterator[tuple[str, str, object, object]]:
    """Each model with each guide that fits it, not trained yet, under their names."""
    for name, build in builders(names, x, args).items():
        for guide_name in args.guide:
            torch.manual_seed(args.seed)
            model = build()
            if guide_name in ("exact", "tied") and not hasattr(model, "posterior"):
                continue
            guide = GUIDES[guide_name](model).to(x)
            if hasattr(guide, "standardise_by"):
                guide.standardise_by(x)
            yield name, guide_name, model, guide


def measure(model, guide, rows, args):
    """The gap with its parts over some rows."""
    options = {"seed": args.seed, "progress": False}
    known = inference.evidence(model, rows, guide=None if hasattr(model, "log_evidence") else guide, **options)
    return inference.gap(model, guide, rows, known=known, restarts=0, max_steps=args.refit_steps, **options)


def cells(gap, prediction):
    """What the table says of a gap; a bound where nothing bounds log p from above."""
    log_p = gap.evidence.mean
    parts = [shown(log_p), *map(shown, gap.mean.values())]
    parts.insert(3, "" if prediction is None else f"{prediction:.3f}")
    return [f"{gap.elbo.mean():.3f}", *parts]


def shown(part):
    """A mean with its interval where that is wider than the digits printed."""
    if math.isinf(part.upper):
        return f">= {part.lower:.3f}"
    value = f"{part.value + 0.0:.3f}".replace("-0.000", "0.000")
    narrow = part.upper - part.lower < 1e-3 and part.lower - 5e-4 < part.value
    return value if narrow else f"{value} [{part.lower:.3f}, {part.upper:.3f}]"


def run_all(pairs, data, args):
    """Train, measure and print pair after pair under one bar; the gaps and predictions by model and guide."""
    rows, gaps, predicted = data.test[: args.rows], {}, {}
    with tqdm(total=3 * len(pairs), desc="pairs x (train, measure, save)", unit="stage") as bar:
        for name, guide_name, model, guide in pairs:
            bar.set_postfix_str(f"{name} / {guide_name}")
            if any(p.requires_grad for half in (model, guide) for p in half.parameters()):
                kept_pair(args, f"{name}_{guide_name}", (model, guide), partial(train, model, guide, data.train, args))
            bar.update()
            gap, prediction = measure(model, guide, rows, args), None
            if guide_name in INDEPENDENT:
                prediction = float(inference.predicted_gap(model, guide.posterior(rows).mean).mean())
                predicted.setdefault(name, {})[guide_name] = prediction
            gaps.setdefault(name, {})[guide_name] = gap
            bar.update()
            bar.write(line(f"{name} / {guide_name}", cells(gap, prediction)))
            file = f"{name}-{guide_name}".replace(" ", "_")
            inference.save_pair(args.out / f"{file}.safetensors", model, guide)
            bar.update()
    return gaps, predicted


def line(name, texts):
    """A line of the table."""
    first, *rest = texts
    return table_line(name, [first], first=25, width=9) + "".join(f" {text:>{w}s}" for text, w in zip(rest, WIDTHS))


def conclude(gaps):
    """How many pairs have a gap, which has the widest, and for how many of them the encoder is to blame."""
    parts = {f"{model} / {guide}": gap.mean for model, found in gaps.items() for guide, gap in found.items()}
    wide = {name: mean for name, mean in parts.items() if mean["gap"].lower > TIGHT}
    print(f"{len(wide)} of {len(parts)} pairs have a gap of more than {TIGHT:g} nats, beyond its interval", end="")
    if wide:
        name, widest = max(wide.items(), key=lambda item: item[1]["gap"].value)
        split = [mean for mean in wide.values() if "amortisation" in mean]
        encoders = sum(mean["amortisation"].lower > mean["approximation"].upper for mean in split)
        print(f"; the widest is that of {name}, {shown(widest['gap'])} nats;", end=" ")
        print(f"for {encoders} of them the encoder loses more than the family, beyond their intervals", end="")
    print()


def main(argv=None):
    args = parse(argv)
    data = zoo.named_dataset(args.data).to(device=args.device)
    names = MODELS if "all" in args.model else args.model
    pairs = list(pairs_of(names, data.train, args))
    print(f"{data}\n{len(pairs)} pairs, each trained by {args.steps} steps where it learns, then measured on ", end="")
    print(f"{min(args.rows, len(data.test))} held-out rows; nats per data point, 95 % intervals in brackets\n")
    print(line("model / guide", HEADS), flush=True)
    gaps, predicted = run_all(pairs, data, args)
    print(LEGEND)
    conclude(gaps)
    path = save(plots.gap_parts_figure(gaps, predicted), args, "gaps.png")
    finish(args)
    print(f"figure: {path}")
    return gaps


if __name__ == "__main__":
    run_as_command(main)
