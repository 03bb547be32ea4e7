"""Which pairs come with the zoo, and how were they made? This script trains them all and writes their cards.

Each pair is trained by ``elbozoo train`` and measured by ``elbozoo card``; classic models get an AutoGuide each, and a
card with the model's reference as the check. The command of the training stands on the card. With
--resume, pairs that are there already are left as they are, and an interrupted training goes on where it stopped.

    python examples/pretrained_pairs.py --only linear_vae/digits ima_vae/moebius
"""

from __future__ import annotations

import shlex
import shutil

import pyro
import torch
from _common import example_parser, finish, parse_with_presets, run_as_command
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm.auto import tqdm

from inference import fit
from zoo import card, command_line, pairs, pretrained
from zoo.classics import ClassicModel, classic_models

DIGITS = "--data digits --latent-dim 4"
MOEBIUS = "--data moebius --latent-dim 2"
SYNTHETIC = "--data synthetic --latent-dim 8"
PAIRS = {
    "ppca/digits": f"ppca --guide exact {DIGITS}",
    "ppca/digits-mean-field": f"ppca --guide tied {DIGITS}",
    "ppca/synthetic": f"ppca --guide exact {SYNTHETIC}",
    "factor_analysis/synthetic": f"factor_analysis --guide exact {SYNTHETIC}",
    "linear_vae/digits": f"linear_vae --guide linear {DIGITS}",
    "linear_vae/digits-full-rank": f"linear_vae --guide full_rank {DIGITS}",
    "linear_vae/synthetic": f"linear_vae --guide linear {SYNTHETIC}",
    "deep_gaussian_vae/digits": f"deep_gaussian_vae --guide mean_field {DIGITS}",
    "deep_gaussian_vae/digits-full-rank": f"deep_gaussian_vae --guide full_rank {DIGITS}",
    "deep_gaussian_vae/digits-low-rank": f"deep_gaussian_vae --guide low_rank {DIGITS}",
    "deep_gaussian_vae/digits-mixture": f"deep_gaussian_vae --guide mixture {DIGITS}",
    "deep_gaussian_vae/moebius": f"deep_gaussian_vae --guide mean_field {MOEBIUS}",
    "deep_gaussian_vae/moebius-full-rank": f"deep_gaussian_vae --guide full_rank {MOEBIUS}",
    "ima_vae/digits": f"ima_vae --guide mean_field {DIGITS}",
    "ima_vae/digits-full-rank": f"ima_vae --guide full_rank {DIGITS}",
    "ima_vae/moebius": f"ima_vae --guide mean_field {MOEBIUS} --gamma2 1000",
    "ima_vae/moebius-full-rank": f"ima_vae --guide full_rank {MOEBIUS} --gamma2 1000",
}
CLASSICS = {
    "eight_schools/multivariate_normal": ("eight schools", AutoMultivariateNormal, "a grid over tau"),
    "linear_regression/multivariate_normal": ("linear regression", AutoMultivariateNormal, "the closed form"),
    "linear_regression/normal": ("linear regression", AutoNormal, "the closed form"),
    "logistic_regression/multivariate_normal": ("logistic regression", AutoMultivariateNormal, "a grid over w"),
    "logistic_regression/normal": ("logistic regression", AutoNormal, "a grid over w"),
    "gaussian_process/multivariate_normal": ("Gaussian process", AutoMultivariateNormal, "the closed form"),
}
TINY = ["ppca/digits", "linear_vae/digits", "linear_regression/normal"]
SMOKE = {
    "steps": 5,
    "rows": 3,
    "split": 2,
    "samples": 20,
    "simulated": 0,
    "only": TINY,
}


def parse(argv):
    options = {"cpu_only": "so that everyone has the same pairs", "resume": "leave pairs that are there as they are"}
    parser = example_parser(__doc__, "pairs", seed="initialisation, training and measurement", **options)
    parser.add_argument(
        "--only", nargs="+", choices=[*PAIRS, *CLASSICS], default=[*PAIRS, *CLASSICS], help="pairs to make"
    )
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--rows", type=int, default=64, help="rows measured")
    parser.add_argument("--split", type=int, default=16, help="rows whose gap is split")
    parser.add_argument("--samples", type=int, default=1000, help="importance samples per row")
    parser.add_argument("--simulated", type=int, default=1000, help="simulated data that count coverage; 0 leaves it")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def make(name, args):
    """Train and measure one pair; raises SystemExit where a command fails, after its sentence."""
    file = args.out / ".training" / f"{name.replace('/', '-')}.safetensors"
    trained = shlex.split(f"train {PAIRS[name]} --steps {args.steps} --seed {args.seed}")
    measured = shlex.split(
        f"--rows {args.rows} --split {args.split} --samples {args.samples} --simulated {args.simulated}"
    )
    data = trained[trained.index("--data") + 1]
    command = shlex.join(["elbozoo", *trained])
    options = ["--data", data, "--seed", str(args.seed), "--trained-by", command, "--out", str(args.out)]
    for words in (
        [*trained, "--device", "cpu", "--resume", "--out", str(file)],
        ["card", str(file), "--name", name, *options, *measured],
    ):
        if code := command_line.main(words):
            raise SystemExit(code)


def make_classic(name, args):
    """Train an AutoGuide on a classic model, and measure it beside the model's reference."""
    kind, family, means = CLASSICS[name]
    (classic,) = (one for one in classic_models() if one.name == kind)
    model = ClassicModel.of(classic)
    guide, objective = auto_guide(model, family, args.seed)
    options = {"steps": args.steps, "seed": args.seed, "whole": True, "progress": False, "objective": objective}
    fit(model, guide, model.data, optimizer=adam, scheduler=lambda o: CosineAnnealingLR(o, args.steps), **options)
    check = (means, classic.log_evidence)
    command = f"python examples/pretrained_pairs.py --only {name} --steps {args.steps} --seed {args.seed}"
    settings = {"num_samples": args.samples, "simulated": 0, "seed": args.seed, "progress": False}
    found = card(model, guide, model.data, name=name, command=command, check=check, whole=True, **settings)
    print(f"{found}\n\nwrote {pretrained.save(args.out, model, guide, found)}")


def auto_guide(model, family, seed):
    """An AutoGuide in float64 without the discrete sites, which are summed out; and the ELBO that trains it."""
    sites = poutine.trace(model).get_trace().iter_stochastic_nodes()
    hidden = [name for name, site in sites if site["fn"].has_enumerate_support]
    pyro.clear_param_store()
    torch.manual_seed(seed)
    guide = family(poutine.block(model, hide=hidden))
    guide(*model.data)
    kind = TraceEnum_ELBO if hidden else Trace_ELBO
    return guide.double(), kind(num_particles=4, vectorize_particles=True, max_plate_nesting=1)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.03)


def main(argv=None):
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        shutil.rmtree(args.out / ".training", ignore_errors=True)
    there = pairs(args.out) if args.resume else []
    for name in tqdm([name for name in args.only if name not in there], desc="pairs", unit="pair"):
        (make if name in PAIRS else make_classic)(name, args)
    shutil.rmtree(args.out / ".training", ignore_errors=True)
    made = pairs(args.out)
    finish(args)
    return made


if __name__ == "__main__":
    run_as_command(main)
