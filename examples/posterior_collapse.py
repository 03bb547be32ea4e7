"""Does the ELBO cause posterior collapse? The tables of "Don't Blame the ELBO!" (Lucas et al., 2019), measured.

Trains a deep Gaussian VAE and the linear VAE from several noise variances sigma^2, kept fixed or learnt, over several
seeds, and prints the ELBO, the ELBO after sigma^2 alone is set to its optimum, the final sigma^2, the share of
collapsed latents and the KL term. The data's eigenvalues above sigma^2 predict how many latents live: of the linear
VAE exactly, of the deep one as far as its correlation with the measured number goes.

    python examples/posterior_collapse.py
    python examples/posterior_collapse.py --data path/to/mnist.npz --paper-scale --device cuda
"""

from __future__ import annotations

import math
from functools import partial

import torch
from _common import (
    decay_in_second_half,
    example_parser,
    finish,
    kept,
    means_with_errors,
    measure_collapse,
    parse_with_presets,
    save,
)
from scipy.stats import pearsonr, spearmanr
from torch import nn

from guides import Linear, MeanField, mlp
from inference import AnalyticELBO, AnalyticKLELBO, fit
from inference.diagnostics import predicted_alive
from inference.plots import alive_figure, collapse_curve_figure
from zoo import DeepGaussianVAE, FixedNoise, LearntNoise, LinearVAE, Logit, digits_logit, mnist
from zoo.linear import spectrum

WIDTHS = (20, 20, 18, 18, 16, 16, 16)
TITLES = ("ELBO", "tuned ELBO", "final s2", "% collapsed", "KL", "predicted live", "measured live")
HEAD = f"{'run':24s}" + "".join(f"{title:>{width}s}" for title, width in zip(TITLES, WIDTHS, strict=True))
SMOKE = {"epochs": 1, "seeds": [0, 1], "rows": 100, "fixed": [1.0], "learnt": [3.0], "steps": 2}


def parse(argv):
    parser = example_parser(__doc__, "posterior_collapse", device=True, resume=True)
    parser.add_argument("--data", default="digits", help="digits, or a file or folder of MNIST")
    parser.add_argument("--paper-scale", action="store_true", help="784-1024-512-200, as in the paper's MNIST runs")
    parser.add_argument("--fixed", type=float, nargs="*", default=[30, 10, 3, 1, 0.1], help="values of fixed sigma^2")
    parser.add_argument("--learnt", type=float, nargs="*", default=[30, 10, 3, 1], help="starts of learnt sigma^2")
    parser.add_argument("--epochs", type=int, default=300, help="of Adam, for the deep VAE")
    parser.add_argument("--batch", type=int, default=128, help="data of a step of Adam")
    parser.add_argument("--rows", type=int, help="training rows; where None, all of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each")
    parser.add_argument("--kinds", nargs="+", default=["deep", "linear"], choices=["deep", "linear"], help="models")
    text = (
        "nats below which a latent is collapsed, if for 99%% of the data; the paper's is 0.01, less than noise leaves"
    )
    parser.add_argument("--epsilon", type=float, default=0.1, help=text)
    parser.add_argument("--steps", type=int, default=60, help="of LBFGS, for the linear VAE; 300 for MNIST")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def read(args):
    """Name of the data, and the training rows, centred: a shift changes no density; sigma^2 stays in their units."""
    data = digits_logit(test_size=0) if args.data == "digits" else mnist(args.data, transform=Logit(256))
    x = data.train[: args.rows].float()
    return data.name, x - x.mean(0)


def build(kind, sigma2, learn, data_dim, args):
    """A pair of the paper: a mirrored ReLU network with one sigma, or the linear VAE with its linear guide."""
    latent_dim, hidden = (200, (1024, 512)) if args.paper_scale else (20, (256, 128))
    sigma = math.sqrt(sigma2)
    if kind == "linear":
        model = LinearVAE(data_dim, latent_dim, sigma=sigma, learn_sigma=learn)
        return model.double(), Linear(data_dim, latent_dim).double()
    noise = LearntNoise if learn else FixedNoise
    decoder = mlp(latent_dim, data_dim, hidden[::-1], nn.ReLU)
    encoder = mlp(data_dim, 2 * latent_dim, hidden, nn.ReLU)
    model = DeepGaussianVAE(data_dim, latent_dim, network=decoder, noise=noise(sigma))
    return model, MeanField(data_dim, latent_dim, encoder=encoder)


def train(model, guide, x, seed, args):
    """Adam with a learning rate that falls to zero over the second half."""
    steps = args.epochs * math.ceil(len(x) / args.batch)
    fit(
        model,
        guide,
        x,
        steps=steps,
        objective=AnalyticKLELBO(),
        scheduler=decay_in_second_half(steps),
        batch_size=args.batch,
        seed=seed,
        device=args.device,
    )


def train_linear(model, guide, eigen, args):
    """LBFGS, without noise: the ELBO of a linear VAE knows of the data their covariance, which 2 D points have, too."""
    lengths = (len(eigen.eigenvalues) * eigen.eigenvalues.clamp(min=0)).sqrt()
    half = lengths[:, None] * eigen.eigenvectors.mT
    optimizer = partial(torch.optim.LBFGS, max_iter=20, history_size=30, line_search_fn="strong_wolfe")
    points = torch.cat([half, -half])
    fit(model, guide, points, steps=args.steps, objective=AnalyticELBO(), optimizer=optimizer, device=args.device)


def run(kind, mode, sigma2, seed, x, eigen, args):
    """Train a pair: the numbers of TITLES, and the KL of each latent, (N, K)."""
    torch.manual_seed(seed)
    model, guide = build(kind, sigma2, mode == "learnt", x.shape[1], args)
    if kind == "deep":
        train(model, guide, x, seed, args)
    else:
        train_linear(model, guide, eigen, args)
    numbers, kl = measure_collapse(model, guide, x.to(model.sigma.dtype), args.epsilon)
    _, _, final_sigma2, share, _ = numbers
    latent_dim = kl.shape[1]
    predicted = predicted_alive(eigen.eigenvalues, final_sigma2, latent_dim)
    some = kl[:: max(1, len(kl) // 2000)]  # enough for the curve
    return [*numbers, predicted, round(latent_dim * (1 - share / 100))], some.tolist()


def run_seeds(name, kind, mode, sigma2, x, eigen, args):
    """A line of the table: the numbers of TITLES for each seed, and the KL of each latent of the last one."""
    made = (partial(run, kind, mode, sigma2, seed, x, eigen, args) for seed in args.seeds)
    kinds = (f"{kind}_{mode}_{sigma2:g}_{seed}" for seed in args.seeds)
    results, kls = zip(*(kept(args, name, make) for name, make in zip(kinds, made, strict=True)), strict=True)
    values = torch.tensor(results, dtype=torch.float64)
    cells = zip(means_with_errors(values), WIDTHS, strict=True)
    print(f"{name:24s}" + "".join(f"{cell:>{width}s}" for cell, width in cells))
    return values, torch.tensor(kls[-1])


def agreement(kind, points):
    """How far the predicted number of live latents is the measured one, from (runs, 2)."""
    equal, n = int((points[:, 0] == points[:, 1]).sum()), len(points)
    text = f"{kind}: as many latents live as predicted in {equal} of {n} runs"
    if bool((points.std(0) == 0).any()):
        return f"{text}; no correlation, one number does not vary"
    pearson, spearman = (f(*points.T.numpy()).statistic for f in (pearsonr, spearmanr))
    return f"{text}; correlation {pearson:.3f} (Pearson), {spearman:.3f} (Spearman), n = {n}"


def main(argv=None):
    args = parse(argv)
    data_name, x = read(args)
    eigen = spectrum(x.double())
    print(f"{data_name}: {tuple(x.shape)}, K = {200 if args.paper_scale else 20}")
    print(f"mean (s.e.) over {len(args.seeds)} seeds, nats per data point of the training set", end="")
    print(f"; collapsed: below {args.epsilon:g} nats for 99 % of the data\n{HEAD}")
    starts = [("fixed", sigma2) for sigma2 in args.fixed] + [("learnt", sigma2) for sigma2 in args.learnt]
    rows, points = {}, {}
    for kind in args.kinds:
        curves = {}
        for mode, sigma2 in starts:
            name = f"{kind}, {mode} {sigma2:g}"
            rows[name], curves[name] = run_seeds(name, kind, mode, sigma2, x, eigen, args)
        points[kind] = torch.cat([rows[name][:, 5:] for name in curves])
        save(collapse_curve_figure(curves, marked=args.epsilon), args, f"collapse_{kind}.png")
    print("\n" + "\n".join(agreement(kind, found) for kind, found in points.items()))
    save(alive_figure(points), args, "alive.png")
    finish(args)
    return rows


if __name__ == "__main__":
    main()
