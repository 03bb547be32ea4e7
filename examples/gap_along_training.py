"""The gap along training: is posterior collapse the ELBO's fault or the optimiser's?

A linear and a deep Gaussian VAE learn digits, dequantised and through the logit, from three starts of a learnt noise
variance sigma^2: above all eigenvalues of the data, just below the largest two, and small. At checkpoints log p(x) is
computed, exactly or by quadrature, beside the ELBO; the gap between them is split into what the guide's family leaves
and what the encoder loses, next to the decoder's prediction. Where latents are collapsed and the gap is nought, the
ELBO is the evidence: what is lost there was lost by the model's parameters, not by the bound.

    python examples/gap_along_training.py
    python examples/gap_along_training.py --steps 20000 --rows 64 --checkpoints 20
"""

from __future__ import annotations

import math

import numpy as np
import torch
from _common import (
    cosine_decay,
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
)

import inference
from guides import MeanField, TiedMeanField
from inference import AnalyticKLELBO, evidence, fit, gap, predicted_gap
from inference.diagnostics import collapsed, latent_kl
from inference.information import rate_distortion
from zoo import DeepGaussianVAE, LearntNoise, LinearVAE, digits_logit

COLUMNS = ("log p", "ELBO", "error", "approximation", "amortisation", "predicted", "live", "sigma^2")
SMOKE = {"starts": [100.0, 1.0], "steps": 4, "checkpoints": 2, "rows": 2, "hidden": 4}
EPSILON = 0.05  # nats below which a latent is collapsed, if for 99 % of the data


def parse(argv):
    seed = "initialisation, noise and order"
    parser = example_parser(__doc__, "gap_along_training", seed=seed)
    parser.add_argument("--starts", type=float, nargs="+", default=[100.0, 30.0, 1.0], help="first values of sigma^2")
    parser.add_argument("--kinds", nargs="+", default=["linear", "deep"], choices=["linear", "deep"], help="models")
    parser.add_argument("--latent-dim", type=int, default=2, help="K; up to 3 log p is found by quadrature")
    parser.add_argument("--hidden", type=int, default=64, help="width of the deep model's hidden layers")
    parser.add_argument("--steps", type=int, default=2000, help="of Adam")
    parser.add_argument("--checkpoints", type=int, default=15, help="at which the gap is measured, first one included")
    parser.add_argument("--rows", type=int, default=10, help="data on which it is measured")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def read(args):
    x = digits_logit(test_size=0, dtype=torch.float64).train
    return (x - x.mean(0)).to(args.device)


def build(kind, var, args):
    torch.manual_seed(args.seed)
    sigma, sizes, hidden = math.sqrt(var), (64, args.latent_dim), (args.hidden,)
    if kind == "linear":
        return LinearVAE(*sizes, sigma=sigma).double(), MeanField(*sizes, hidden=hidden).double()
    model = DeepGaussianVAE(*sizes, hidden=hidden, noise=LearntNoise(sigma))
    return model.double(), MeanField(*sizes, hidden=hidden).double()


def moments_of(args):
    """The steps of the checkpoints: nought, then equally spaced in their logarithm."""
    later = torch.logspace(math.log10(max(1, args.steps // 300)), math.log10(args.steps), args.checkpoints - 1)
    return sorted({0, *(round(float(step)) for step in later)})


class Measure(inference.Callback):
    """Measures the pair at chosen steps."""

    def __init__(self, steps, x, args):
        self.steps, self.x, self.args, self.rows = set(steps), x, args, []

    def on_step(self, moment):
        if moment.step in self.steps:
            self.rows.append([moment.step, *measure(moment.model, moment.guide, self.x, self.args)])


@torch.no_grad()
def parts_of_linear(model, guide, rows):
    """log p, ELBO and its error, approximation and amortisation of a linear model, in closed form."""
    best = -rate_distortion(model, TiedMeanField(model), rows, progress=False).totals.value
    log_p, own = model.log_evidence(rows), -rate_distortion(model, guide, rows, progress=False).totals.value
    return [float(part.mean()) for part in (log_p, own, torch.zeros(1), log_p - best, best - own)]


def parts_of_deep(model, guide, rows, args):
    """The same of a deep one, by quadrature or sampling, and by a refit of every data point."""
    options = {"seed": args.seed, "progress": False}
    known = evidence(model, rows, guide=guide, **options)
    found = gap(model, guide, rows, known=known, num_samples=64, restarts=0, **options)
    error = float(found.elbo_error.square().sum().sqrt()) / len(rows)
    return [
        float(known.value.mean()),
        float(found.elbo.mean()),
        error,
        float(found.approximation.mean()),
        float(found.amortisation.mean()),
    ]


def measure(model, guide, x, args):
    """The numbers of :data:`COLUMNS`, means over some data in nats."""
    rows = x[: args.rows]
    linear = isinstance(model, LinearVAE)
    parts = parts_of_linear(model, guide, rows) if linear else parts_of_deep(model, guide, rows, args)
    with torch.no_grad():
        predicted = float(predicted_gap(model, guide.posterior(rows).mean).mean())
        alive = float((~collapsed(latent_kl(model, guide, x, progress=False), epsilon=EPSILON)).sum())
        return [*parts, predicted, alive, float(model.sigma.square())]


def run(kind, var, x, args):
    """Train from one start: a row for each checkpoint, the step and the numbers of :data:`COLUMNS`."""
    model, guide = build(kind, var, args)
    model, guide = model.to(args.device), guide.to(args.device)
    steps = moments_of(args)
    watch = Measure(steps, x, args)
    first = [0, *measure(model, guide, x, args)]
    fit(
        model,
        guide,
        x,
        steps=args.steps,
        objective=AnalyticKLELBO(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
        scheduler=cosine_decay(args.steps),
        batch_size=256,
        seed=args.seed,
        callbacks=[watch],
        progress=False,
    )
    return [first, *watch.rows]


def show(name, rows):
    say("\n" + table_line(f"{name}: step", COLUMNS, width=15))
    for step, *numbers in rows:
        say(table_line(f"{step:>12d}", [f"{value:.4f}" for value in numbers], width=15))


def draw(tables):
    """A column for each model and start: log p and ELBO above, the parts of the gap and live latents below."""
    figure, axes = panels(2, len(tables), size=(3.5 * len(tables), 6), sharex=True)
    upper, lower = axes[: len(tables)], axes[len(tables) :]
    for top, bottom, (name, rows) in zip(upper, lower, tables.items(), strict=True):
        values = np.array(rows)
        step = values[:, 0].clip(min=1)
        top.plot(step, values[:, 1], "k-", label="log p")
        top.plot(step, values[:, 2], "C0o--", markersize=3, label="ELBO")
        top.set(xscale="log", title=name)
        bottom.stackplot(step, values[:, 4].clip(min=0), values[:, 5].clip(min=0), colors=("C1", "C2"), alpha=0.6)
        bottom.plot(step, values[:, 6], "k:", label="predicted approximation")
        bottom.fill_between([], [], color="C1", alpha=0.6, label="approximation")
        bottom.fill_between([], [], color="C2", alpha=0.6, label="amortisation")
        bottom.set(xlabel="step")
        bottom.set_yscale("symlog", linthresh=0.1)
        bottom.set_ylim(0, None)
        alive = bottom.twinx()
        alive.step(step, values[:, 7], "C3-", where="post", linewidth=1)
        alive.set(ylim=(-0.1, values[:, 7].max() + 1))
        alive.tick_params(axis="y", colors="C3", labelsize=7)
        alive.yaxis.get_major_locator().set_params(integer=True)
    upper[0].set_ylabel("nats per data point")
    lower[0].set_ylabel("gap (nats)")
    lower[0].plot([], [], "C3-", label="live latents (right)")
    upper[0].legend(fontsize=8, frameon=False)
    figure.legend(*lower[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def conclude(tables):
    """What is lost where latents are collapsed, and by what."""
    for name, rows in tables.items():
        dead = [row for row in rows if row[7] == 0]
        last, best = rows[-1], max(row[1] for row in rows)
        text = f"{name}: ends at log p {last[1]:.3f}, ELBO {last[2]:.3f} ({last[3]:.1g}), {last[7]:.0f} live latents"
        if dead:
            widest = max(dead, key=lambda row: row[1] - row[2])
            away = best - widest[1]
            text += f"; with none live the gap is at most {widest[1] - widest[2]:.4f} ({widest[3]:.1g}) nats, while"
            text += f" log p itself is {away:.1f} below its best"
        print(text)


def main(argv=None):
    args = parse(argv)
    x = read(args)
    print(f"{len(x)} digits, K = {args.latent_dim}; gaps are means over {args.rows} of them, in nats per data point")
    expect(args, len(args.kinds) * len(args.starts))
    tables = {}
    for kind in args.kinds:
        for var in args.starts:
            name = f"{kind}, sigma^2 from {var:g}"
            tables[name] = kept(args, f"{kind}_{var:g}", lambda kind=kind, var=var: run(kind, var, x, args))
            show(name, tables[name])
    print()
    conclude(tables)
    save(draw(tables), args, "gap_along_training.png")
    finish(args)
    return tables


if __name__ == "__main__":
    run_as_command(main)
