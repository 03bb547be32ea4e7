"""Did it work? Three AutoGuides on ten classic models, beside the truth.

For each pair: the ELBO, its gap to the reference evidence with one standard error, Pareto k-hat of the weights, the
error of posterior moments beside the reference (in posterior standard deviations, and as a ratio of them), and the
posterior contraction, one less the guide's variance over the prior's. Above, the bracket that evidence finds without
the reference.

    python examples/autoguides.py --steps 2000
    python examples/autoguides.py --models "eight schools" funnel

References: Yao, Vehtari, Simpson, Gelman, "Yes, but Did It Work?: Evaluating Variational Inference", 2018,
arXiv 1802.02538.
"""

from __future__ import annotations

from functools import partial

import pandas as pd
import pyro
import torch
from _common import example_parser, expect, finish, kept, parse_with_presets, run_as_command, say, table_line
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal
from torch.optim.lr_scheduler import CosineAnnealingLR

from inference import elbo, evidence, fit, log_weights, pareto_k
from zoo.classics import classic_models

FAMILIES = (AutoNormal, AutoMultivariateNormal, AutoLaplaceApproximation)
CLOSE, TRUSTED = 0.1, 0.7  # nats of a gap that is none; k-hat up to which the weights' mean is known
HEAD = ("ELBO", "gap", "k-hat", "mean off by", "sd ratio", "contraction")
CPU_ONLY = "the models and their references are there"
SMOKE = {"steps": 5, "samples": 50, "models": ["linear regression", "Gaussian mixture"]}


def parse(argv):
    parser = example_parser(__doc__, "autoguides", seed="data, training and weights", cpu_only=CPU_ONLY)
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--samples", type=int, default=2000, help="importance samples, and draws for moments")
    parser.add_argument("--models", nargs="+", default=None, help="names of the models; all if none is given")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def discrete_sites(classic):
    """The model's discrete sites, which no AutoGuide takes and which are summed out."""
    sites = poutine.trace(classic.model).get_trace(*classic.args).nodes.items()
    latents = {name: site["fn"] for name, site in sites if site["type"] == "sample" and not site["is_observed"]}
    return [name for name, fn in latents.items() if fn.has_enumerate_support]


def train(classic, family, args):
    pyro.clear_param_store()
    torch.manual_seed(args.seed)
    hidden = discrete_sites(classic)
    guide = family(poutine.block(classic.model, hide=hidden))
    guide(*classic.args)
    guide.double()
    kind = TraceEnum_ELBO if hidden else Trace_ELBO
    objective = kind(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    options = {"steps": args.steps, "seed": args.seed, "progress": False}
    fit(classic.model, guide, classic.args, objective=objective, optimizer=adam, scheduler=falling(args), **options)
    return guide.laplace_approximation(*classic.args) if family is AutoLaplaceApproximation else guide


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.03)


def falling(args):
    """A learning rate that falls to nothing, so that the noise of the gradient averages out."""
    return lambda optimizer: CosineAnnealingLR(optimizer, args.steps)


def draws(program, classic, args, name):
    torch.manual_seed(args.seed)
    return Predictive(program, num_samples=args.samples, return_sites=[name], parallel=True)(*classic.args)[
        name
    ].reshape(args.samples, -1)


def moments(classic, guide, args):
    """Largest error of a mean in standard deviations, most extreme ratio of them, mean contraction; of one site."""
    if not classic.moments:
        return ["", "", ""]
    name, (mean, sd) = next(iter(classic.moments.items()))
    own, prior = (draws(program, classic, args, name) for program in (guide, classic.model))
    off = ((own.mean(0) - mean.flatten()) / sd.flatten()).abs().max()
    ratio = own.std(0) / sd.flatten()
    extreme = ratio[ratio.log().abs().argmax()]
    return [f"{off:.2f}", f"{extreme:.2f}", f"{(1 - own.var(0) / prior.var(0)).mean():.2f}"]


def measure(classic, args):
    rows = {}
    for family in FAMILIES:
        guide = train(classic, family, args)
        options = {"num_samples": args.samples, "seed": args.seed, "progress": False, "whole": True}
        weights = log_weights(classic.model, guide, *classic.args, **options)
        bound, error = (float(column) for column in elbo(weights))
        gap = f"{round(classic.log_evidence - bound, 2) + 0.0:.2f} ± {error:.2f}"  # no minus zero
        cells = [f"{bound:.2f}", gap, f"{float(pareto_k(weights).value):.2f}"]
        rows[family.__name__] = cells + moments(classic, guide, args)
    return rows


def run(classic, args):
    """What evidence finds without the reference, and the cells of each family."""
    got = evidence(classic.model, *classic.args, whole=True, seed=args.seed, progress=False)
    bracket = [float(got.value), float(got.lower), float(got.upper), got.guarantee[0]]
    return {"bracket": bracket, "rows": measure(classic, args)}


def show(classic, found):
    value, lower, upper, guarantee = found["bracket"]
    bracket = f"{value:.4f} [{lower:.4f}, {upper:.4f}] ({guarantee})"
    say(f"\n{classic.name}: log p {classic.log_evidence:.4f}, found {bracket}")
    say(table_line("", HEAD))
    for family, cells in found["rows"].items():
        say(table_line(family, cells))


def conclude(found):
    """By family, on how many models the ELBO reaches the evidence, and on how many its weights can be trusted."""
    for family in FAMILIES:
        cells = [row for (_, name), row in found.items() if name == family.__name__]
        gaps = [[float(part) for part in row[1].split(" ± ")] for row in cells]
        close = sum(abs(gap) <= CLOSE + 2 * error for gap, error in gaps)
        trusted = sum(float(row[2]) < TRUSTED for row in cells)
        text = f"{family.__name__}: within {CLOSE:g} nats of log p, by two standard errors, on {close} of {len(cells)}"
        print(f"{text} models; k-hat below {TRUSTED:g} on {trusted}; widest gap {max(gap for gap, _ in gaps):.2f} nats")


def markdown(found):
    """The table for the documentation."""
    rows = [("model", "guide", *HEAD), ("---",) * (2 + len(HEAD)), *((*pair, *cells) for pair, cells in found.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(argv=None):
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    every = classic_models(seed=args.seed)
    chosen = [classic for classic in every if not args.models or classic.name in args.models]
    expect(args, len(chosen))
    found = {}
    for classic in chosen:
        got = kept(args, classic.name, partial(run, classic, args))
        show(classic, got)
        found |= {(classic.name, family): cells for family, cells in got["rows"].items()}
    print()
    conclude(found)
    pd.DataFrame.from_dict(found, orient="index", columns=HEAD).to_csv(args.out / "autoguides.csv")
    (args.out / "autoguides.md").write_text(markdown(found))
    finish(args)
    return found


if __name__ == "__main__":
    run_as_command(main)
