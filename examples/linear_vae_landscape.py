"""Where can a linear VAE get stuck? Its stationary points, and the noise at which a collapsed latent wakes up.

The stationary points whose W'W is diagonal keep some principal components as columns of W and collapse the other
columns to zero; outside this family the ELBO has saddles, but no maxima. With sigma^2 fixed, a zero column is stable
where sigma^2 exceeds every eigenvalue left out; with sigma^2 learned it never is. The evidence and the ELBO agree on
that: collapse is not the ELBO's doing (Lucas et al. 2019, Figure 1).

    python examples/linear_vae_landscape.py --data synthetic --latent-dim 3
"""

from __future__ import annotations

import math

import torch
from _common import example_parser, finish, parse_with_presets, run_as_command, save
from torch.func import grad

from inference.plots import landscape_figure, threshold_figure
from zoo import Scaled, digits, linear_gaussian, load_data
from zoo.linear import (
    collapse_threshold,
    landscape,
    mean_log_evidence,
    profiled_elbo,
    smallest_curvature,
    spectrum,
    stationary_point,
)

SMOKE = {"data": "synthetic", "latent_dim": 2, "points": 7}


def parse(argv):
    options = {"cpu_only": "everything is in closed form there", "resume": "nothing is kept: a run takes seconds"}
    parser = example_parser(__doc__, "linear_vae_landscape", seed="the synthetic data", **options)
    parser.add_argument("--data", default="digits", help="digits, synthetic, or a .npy, .npz or .csv file")
    parser.add_argument("--latent-dim", type=int, default=4, help="K, from 2 to the number of columns less three")
    parser.add_argument("--points", type=int, default=41, help="points of a curve, and a side of a plane")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def read(name, seed):
    if name == "digits":
        return digits(transform=Scaled(16.0), test_size=0).train
    if name == "synthetic":
        return linear_gaussian(1000, data_dim=8, latent_dim=5, seed=seed).train
    return load_data(name).train.double()


def objectives(eigen, var):
    covariance = (eigen.eigenvectors * eigen.eigenvalues) @ eigen.eigenvectors.mT
    log_var = covariance.new_tensor(math.log(var))
    return {
        "evidence": lambda W: mean_log_evidence(W, log_var, covariance),
        "ELBO": lambda W: profiled_elbo(W, log_var, covariance),
    }


def components(latent_dim):
    """A leading, a middle and a trailing component."""
    return sorted({0, latent_dim // 2, latent_dim - 1})


def points_of_interest(eigen, latent_dim):
    """The maximum, and those with a leading, a middle or a trailing latent collapsed; sigma^2 fixed or its own."""
    lam, axes = eigen.eigenvalues, eigen.eigenvectors
    var = lam[latent_dim:].mean().item()
    for dropped in (None, *components(latent_dim)):
        active = tuple(i for i in range(latent_dim) if i != dropped)
        name = "none" if dropped is None else f"latent {dropped + 1}"
        yield name, "fixed", stationary_point(lam, axes, active, latent_dim, var)
        own = lam[[j for j in range(len(lam)) if j not in active]].mean().item()
        if dropped is not None and own < lam[list(active)].min():
            yield name, "its own", stationary_point(lam, axes, active, latent_dim, own)


def show(points):
    print("collapsed  sigma^2             log p      ELBO      gap  ways up (log p, ELBO)")
    for name, kind, p in points:
        ways = "none: a maximum" if p.is_maximum else f"{p.evidence_inertia[0]}, {p.elbo_inertia[0]}: a saddle"
        values = f"{p.log_evidence:8.4f}  {p.elbo:8.4f}  {abs(p.gap):7.0e}"
        print(f"{name:9s}  {kind:7s}  {p.var:.5f}  {values}  {ways}")


def zero_column(eigen, latent_dim):
    """All latents collapsed, W = 0; three values of sigma^2; and one column moved towards each component, (3, D, K)."""
    chosen, dim = components(latent_dim), len(eigen.eigenvalues)
    lam = eigen.eigenvalues[chosen].tolist()
    noises = {"below all": 0.6 * lam[-1], "between": math.sqrt(lam[-2] * lam[-1]), "above all": 1.3 * lam[0]}
    directions = torch.zeros(len(chosen), dim, latent_dim, dtype=torch.float64)
    directions[:, :, -1] = eigen.eigenvectors[:, chosen].mT
    return torch.zeros(dim, latent_dim, dtype=torch.float64), noises, directions


def curvatures(eigen, latent_dim):
    """Second derivatives of minus log p and minus ELBO along each direction, by autograd, and theory's."""
    W, noises, directions = zero_column(eigen, latent_dim)
    chosen = components(latent_dim)
    print("\nW = 0 and a column moved towards a component: curvature")
    print("sigma^2  component  eigenvalue    of -log p     of -ELBO  (sigma^2 - eigenvalue) / sigma^4")
    for var in noises.values():
        functions = objectives(eigen, var).values()
        for component, own, direction in zip(chosen, eigen.eigenvalues[chosen].tolist(), directions, strict=True):
            measured = [curvature_along(function, W, direction) for function in functions]
            found = [*measured, (var - own) / var**2]
            state = "stable" if min(found) > 0 else "wakes up"
            print(f"{var:7.4f}{component + 1:11d}{own:12.4f}" + "".join(f"{c:13.6f}" for c in found) + f"  {state}")
            yield var, own, *found


def curvature_along(function, W, direction):
    """The second derivative of minus the function."""
    return grad(grad(lambda t: -function(W + t * direction)))(W.sum()).item()


def moved_zero_column(eigen, latent_dim, num):
    """Figure 1 of the paper: a zero column pushed towards three components, for three values of sigma^2."""
    W, noises, directions = zero_column(eigen, latent_dim)
    labels = [f"component {i + 1}" for i in components(latent_dim)]
    lam = eigen.eigenvalues
    grid = 1.3 * lam[0].sqrt() * torch.linspace(-1, 1, num, dtype=lam.dtype)
    panels = {}
    for name, var in noises.items():
        functions = objectives(eigen, var)
        lines = {
            label: {key: landscape(f, W, way[None], grid) - f(W) for key, f in functions.items()}
            for label, way in zip(labels, directions, strict=True)
        }
        elbo = functions["ELBO"]
        plane = landscape(elbo, W, directions[[0, -1]], grid) - elbo(W)
        panels[f"sigma^2 = {var:.3f}, {name}"] = lines, plane
    return landscape_figure(grid, panels, plane_labels=(labels[0], labels[-1]))


def thresholds(eigen, latent_dim, num):
    """Smallest curvature of minus the ELBO, freed of units by sigma^2, with all latents from one on collapsed."""
    lam, axes = eigen.eigenvalues, eigen.eigenvectors
    found, curves = {}, {}
    for component in components(latent_dim):
        active, own = tuple(range(component)), lam[component].item()
        low = 0.5 * own
        high = 0.5 * (own + lam[component - 1].item()) if component else 1.5 * own
        options = {"low": low, "high": high, "objective": profiled_elbo}
        threshold = collapse_threshold(lam, axes, active, latent_dim, **options)
        grid = torch.linspace(low, high, max(num // 3, 2))
        curve = torch.tensor([scaled_curvature(eigen, active, latent_dim, var) for var in grid.tolist()])
        found[component] = threshold, own
        curves[f"latents from {component + 1} on collapsed"] = grid, curve, own, threshold
    return threshold_figure(curves), found


def scaled_curvature(eigen, active, latent_dim, var):
    """The smallest curvature of minus the ELBO where only these components are active, times sigma^2."""
    W = stationary_point(eigen.eigenvalues, eigen.eigenvectors, active, latent_dim, var).W
    return var * smallest_curvature(objectives(eigen, var)["ELBO"], W).item()


def main(argv=None):
    args = parse(argv)
    eigen = spectrum(read(args.data, args.seed))
    points = list(points_of_interest(eigen, args.latent_dim))
    show(points)
    rows = list(curvatures(eigen, args.latent_dim))
    figure, found = thresholds(eigen, args.latent_dim, args.points)
    for component, (var, own) in found.items():
        print(f"latent {component + 1} wakes up below sigma^2 = {var:.9f}, eigenvalue {own:.9f}")
    save(figure, args, "threshold.png")
    save(moved_zero_column(eigen, args.latent_dim, args.points), args, "zero_column.png")
    finish(args)
    return points, found, rows


if __name__ == "__main__":
    run_as_command(main)
