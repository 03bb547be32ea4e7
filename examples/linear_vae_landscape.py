"""Where can a linear VAE get stuck? Its stationary points, and the noise at which a collapsed latent wakes up.

Every stationary point keeps some principal components as columns of W and collapses the other columns to zero. With
sigma^2 fixed, a zero column is stable where sigma^2 exceeds every eigenvalue left out; with sigma^2 learned it never
is. The evidence and the ELBO agree on that: collapse is not the ELBO's doing (Lucas et al. 2019, Figure 1).

    python examples/linear_vae_landscape.py --data synthetic --latent-dim 3
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inference import plots
from zoo import Scaled, digits, linear_gaussian, load
from zoo import stationary_points as sp
from zoo.maximum_likelihood import spectrum

COLOURS = ("tab:blue", "tab:orange", "tab:green")
STYLES = ({"linewidth": 3, "alpha": 0.35}, {"linestyle": "--"})


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, synthetic, or a .npy, .npz or .csv file")
    parser.add_argument("--latent-dim", type=int, default=4, help="K, from 2 to the number of columns less three")
    parser.add_argument("--points", type=int, default=41, help="points of a curve, and a side of a plane")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic data")
    parser.add_argument("--out", type=Path, default=Path("out/linear_vae_landscape"))
    return parser.parse_args(argv)


def read(name, seed):
    if name == "digits":
        return digits(transform=Scaled(16.0), test_size=0).train
    if name == "synthetic":
        return linear_gaussian(1000, data_dim=8, latent_dim=5, seed=seed).train
    return load(name).train.double()


def objectives(eigen, var):
    covariance = (eigen.eigenvectors * eigen.eigenvalues) @ eigen.eigenvectors.mT
    log_var = covariance.new_tensor(math.log(var))
    return {
        "evidence": lambda W: sp.mean_log_evidence(W, log_var, covariance),
        "ELBO": lambda W: sp.profiled_elbo(W, log_var, covariance),
    }


def points_of_interest(eigen, latent_dim):
    """The maximum, and those with a leading, a middle or a trailing latent collapsed; sigma^2 fixed or its own."""
    lam, axes = eigen.eigenvalues, eigen.eigenvectors
    var = lam[latent_dim:].mean().item()
    for dropped in (None, *sorted({0, latent_dim // 2, latent_dim - 1})):
        active = tuple(i for i in range(latent_dim) if i != dropped)
        name = "none" if dropped is None else f"latent {dropped + 1}"
        yield name, "fixed", sp.stationary_point(lam, axes, active, latent_dim, var)
        own = lam[[j for j in range(len(lam)) if j not in active]].mean().item()
        if dropped is not None and own < lam[list(active)].min():
            yield name, "its own", sp.stationary_point(lam, axes, active, latent_dim, own)


def table(points):
    lines = ["collapsed  sigma^2             log p      ELBO      gap  ways up (log p, ELBO)"]
    for name, kind, p in points:
        ways = "none: a maximum" if p.is_maximum else f"{p.evidence_inertia[0]}, {p.elbo_inertia[0]}: a saddle"
        values = f"{p.log_evidence:8.4f}  {p.elbo:8.4f}  {abs(p.gap):7.0e}"
        lines.append(f"{name:9s}  {kind:7s}  {p.var:.5f}  {values}  {ways}")
    return "\n".join(lines)


def perturbed_zero_column(eigen, latent_dim, num):
    """Figure 1 of the paper: a zero column pushed towards two components, for three values of sigma^2."""
    lam, axes = eigen.eigenvalues, eigen.eigenvectors
    active, pair = tuple(range(latent_dim - 1)), (latent_dim - 1, latent_dim + 1)  # the paper's are two apart
    larger, smaller, last = lam[pair[0]].item(), lam[pair[1]].item(), lam[latent_dim - 2].item()
    noises = {"below both": 0.6 * smaller, "between": math.sqrt(larger * smaller), "above both": 0.5 * (larger + last)}
    directions = torch.zeros(2, len(lam), latent_dim, dtype=lam.dtype)
    directions[:, :, -1] = axes[:, list(pair)].mT
    grid = 1.5 * math.sqrt(larger) * torch.linspace(-1, 1, num, dtype=lam.dtype)
    figure = Figure(figsize=(10.5, 7.6), layout="constrained")
    for column, (name, var) in enumerate(noises.items()):
        W, functions = sp.stationary_point(lam, axes, active, latent_dim, var).W, objectives(eigen, var)
        top, bottom = (figure.add_subplot(2, 3, column + row) for row in (1, 4))
        for direction, component, colour in zip(directions, pair, COLOURS):
            for (label, f), style in zip(functions.items(), STYLES):
                line = sp.landscape(f, W, direction[None], grid) - f(W)
                top.plot(grid, line, color=colour, label=f"{label}, component {component + 1}", **style)
        plane = sp.landscape(functions["ELBO"], W, directions, grid) - functions["ELBO"](W)
        colours = bottom.contourf(grid, grid, plane.mT, levels=20, cmap="viridis")
        bottom.plot(0, 0, "+", color="red", markersize=10)
        bar = figure.colorbar(colours, ax=bottom, location="bottom", label="ELBO above zero column (nats)", shrink=0.9)
        bar.locator = MaxNLocator(5)
        top.set(title=f"sigma^2 = {var:.3f}, {name}", xlabel="zero column moved by", ylabel="nats above zero column")
        bottom.set(xlabel=f"along component {pair[0] + 1}", ylabel=f"along component {pair[1] + 1}")
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"A zero column of W pushed towards components with eigenvalues {larger:.3f} and {smaller:.3f}")
    return figure


def thresholds(eigen, latent_dim, num):
    """Smallest curvature of minus the ELBO, freed of units by sigma^2, with all latents from one on collapsed."""
    lam, axes = eigen.eigenvalues, eigen.eigenvectors
    figure, found = Figure(figsize=(7, 4.4), layout="constrained"), {}
    ax = figure.add_subplot()
    for component, colour in zip(sorted({0, latent_dim // 2, latent_dim - 1}), COLOURS):
        active, own = tuple(range(component)), lam[component].item()
        high = 0.5 * (own + lam[component - 1].item()) if component else 1.5 * own
        bracket = {"low": 0.5 * own, "high": high, "objective": sp.profiled_elbo}
        found[component] = sp.collapse_threshold(lam, axes, active, latent_dim, **bracket)
        grid, curve = torch.linspace(0.5 * own, high, max(num // 3, 2)).tolist(), []
        for var in grid:
            W, f = sp.stationary_point(lam, axes, active, latent_dim, var).W, objectives(eigen, var)["ELBO"]
            curve.append(var * sp.smallest_curvature(f, W).item())
        ax.plot(grid, curve, ".-", markersize=4, color=colour, label=f"latents from {component + 1} on collapsed")
        ax.axvline(own, color=colour, linewidth=0.8, linestyle=":")
        ax.plot(found[component], 0, "o", color=colour, markerfacecolor="none", markersize=9)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="sigma^2 (dotted: eigenvalue; circle: bisection)", ylabel="sigma^2 x smallest curvature")
    ax.set_title("Collapsed latents are stable where sigma^2 exceeds the next eigenvalue", fontsize=11)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return figure, found


def main(argv=None):
    args = parse(argv)
    start = time.perf_counter()
    eigen = spectrum(read(args.data, args.seed))
    points = list(points_of_interest(eigen, args.latent_dim))
    print(table(points))
    figure, found = thresholds(eigen, args.latent_dim, args.points)
    for component, var in found.items():
        own = eigen.eigenvalues[component].item()
        print(f"latent {component + 1} wakes up below sigma^2 = {var:.9f}, eigenvalue {own:.9f}")
    plots.save_figure(figure, args.out / "threshold.png")
    plots.save_figure(perturbed_zero_column(eigen, args.latent_dim, args.points), args.out / "zero_column.png")
    print(f"wrote {args.out}/ in {time.perf_counter() - start:.0f} s")
    return points, found


if __name__ == "__main__":
    main()
