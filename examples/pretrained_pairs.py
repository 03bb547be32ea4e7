"""Which pairs come with the zoo, and how were they made? This script trains them all and writes their cards.

Each pair is trained by ``elbozoo train`` and measured by ``elbozoo card``; the command of the training stands on the
card. Pairs that are there already are left as they are, so that an interrupted run goes on where it stopped.

    python examples/pretrained_pairs.py --only linear_vae/digits ima_vae/moebius
"""

from __future__ import annotations

import shlex
import shutil

from _common import example_parser, finish, parse_with_presets

from zoo import command_line, pairs

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
SMOKE = {"steps": 5, "rows": 3, "split": 2, "samples": 20, "simulated": 0, "only": ["ppca/digits", "linear_vae/digits"]}


def parse(argv):
    parser = example_parser(__doc__, "pairs", seed="initialisation, training and measurement")
    parser.add_argument("--only", nargs="+", choices=list(PAIRS), default=list(PAIRS), help="pairs to make")
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
        [*trained, "--resume", "--out", str(file)],
        ["card", str(file), "--name", name, *options, *measured],
    ):
        if code := command_line.main(words):
            raise SystemExit(code)


def main(argv=None):
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if name not in pairs(args.out):
            make(name, args)
    shutil.rmtree(args.out / ".training", ignore_errors=True)
    made = pairs(args.out)
    finish(args)
    return made


if __name__ == "__main__":
    main()
