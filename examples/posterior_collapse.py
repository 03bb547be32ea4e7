"""Does the ELBO cause posterior collapse? The tables of "Don't Blame the ELBO!" (Lucas et al., 2019), measured.

Trains a deep Gaussian VAE and the linear VAE from several noise variances sigma^2, kept fixed or learnt, over several
seeds, and prints the ELBO, the ELBO after sigma^2 alone is set to its optimum, the final sigma^2, the share of
collapsed latents and the KL term. The data's eigenvalues above sigma^2 predict how many latents live: of the linear
VAE exactly, of the deep one as far as its correlation with the measured number goes.

    python examples/posterior_collapse.py
    python examples/posterior_collapse.py --data path/to/mnist.npz --paper-scale --device cuda
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from guides import Linear, MeanField, mlp
from inference import AnalyticELBO, AnalyticKLELBO, fit
from inference.diagnostics.collapse import collapsed, latent_kl, predicted_alive
from inference.plots.collapse import alive_figure, collapse_curve_figure
from inference.plots.comparison import save_figure
from zoo import DeepGaussianVAE, FixedNoise, LearntNoise, LinearVAE, Logit, digits_logit, mnist
from zoo.linear.estimation import spectrum

# Nats below which a latent is collapsed, if for 99% of the data: the paper's, but for what noisy training leaves.
EPSILON = {"deep": 0.1, "linear": 0.01}
WIDTHS = (20, 20, 18, 18, 16, 16, 16)
TITLES = ("ELBO", "tuned ELBO", "final s2", "% collapsed", "KL", "predicted live", "measured live")
HEAD = f"{'run':24s}" + "".join(f"{title:>{width}s}" for title, width in zip(TITLES, WIDTHS, strict=True))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or a file or folder of MNIST")
    parser.add_argument("--paper-scale", action="store_true", help="784-1024-512-200, as in the paper's MNIST runs")
    parser.add_argument("--fixed", type=float, nargs="*", default=[30, 10, 3, 1, 0.1], help="values of fixed sigma^2")
    parser.add_argument("--learnt", type=float, nargs="*", default=[30, 10, 3, 1], help="starts of learnt sigma^2")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rows", type=int, default=None, help="training rows; all of them by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=["deep", "linear"], choices=["deep", "linear"])
    parser.add_argument("--steps", type=int, default=60, help="of LBFGS, for the linear VAE; 300 for MNIST")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/posterior_collapse"))
    return parser.parse_args(argv)


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
    options = {"steps": steps, "objective": AnalyticKLELBO(), "batch_size": args.batch, "seed": seed}
    schedule = partial(LambdaLR, lr_lambda=lambda step: min(1.0, 2 * (1 - step / steps)))
    fit(model, guide, x, scheduler=schedule, device=args.device, **options)


def train_linear(model, guide, eigen, args):
    """LBFGS, without noise: the ELBO of a linear VAE knows of the data their covariance, which 2 D points have, too."""
    half = (len(eigen.eigenvalues) * eigen.eigenvalues.clamp(min=0)).sqrt()[:, None] * eigen.eigenvectors.mT
    optimizer = partial(torch.optim.LBFGS, max_iter=20, history_size=30, line_search_fn="strong_wolfe")
    points = torch.cat([half, -half])
    fit(model, guide, points, steps=args.steps, objective=AnalyticELBO(), optimizer=optimizer, device=args.device)


@torch.no_grad()
def measure(model, guide, x, epsilon):
    """ELBO on the training data, after tuning sigma^2, sigma^2, share collapsed, KL; and the KL of each latent."""
    x = x.to(next(guide.parameters()).device)
    data_dim, squares, kl = x.shape[1], 0.0, []
    for batch in x.split(2000):
        kl.append(latent_kl(model, guide, batch))
        for _ in range(10):
            squares += (batch - model.decode(guide.posterior(batch).rsample())).square().sum().item() / 10
    kl, best = torch.cat(kl), squares / x.numel()
    sigma2, rate = model.sigma.square().item(), kl.sum(1).mean().item()
    elbo, tuned = (-rate - 0.5 * data_dim * (math.log(2 * math.pi * s2) + best / s2) for s2 in (sigma2, best))
    return (elbo, tuned, sigma2, 100 * collapsed(kl, epsilon=epsilon).double().mean().item(), rate), kl


def agreement(kind, points):
    """How far the predicted number of live latents is the measured one, from (runs, 2)."""
    equal, n = int((points[:, 0] == points[:, 1]).sum()), len(points)
    text = f"{kind}: as many latents live as predicted in {equal} of {n} runs"
    if bool((points.std(0) == 0).any()):
        return f"{text}; no correlation, one number does not vary"
    pearson, spearman = (f(*points.T.numpy()).statistic for f in (pearsonr, spearmanr))
    return f"{text}; correlation {pearson:.3f} (Pearson), {spearman:.3f} (Spearman), n = {n}"


def main(argv=None):
    args, start = parse(argv), time.perf_counter()
    data = mnist(args.data, transform=Logit(256)) if args.data != "digits" else digits_logit(test_size=0)
    x = data.train[: args.rows].float()
    x = x - x.mean(0)  # a shift changes no density; sigma^2 stays in the units of the data
    eigen = spectrum(x.double())
    print(f"{data.name}: {tuple(x.shape)}, K = {200 if args.paper_scale else 20}")
    print(f"mean (s.e.) over {len(args.seeds)} seeds, nats per datum of the training set\n{HEAD}")
    rows, points, runs = {}, {}, [*(("fixed", s2) for s2 in args.fixed), *(("learnt", s2) for s2 in args.learnt)]
    for kind in args.kinds:
        curves = {}
        for mode, s2 in runs:
            results, name = [], f"{kind}, {mode} {s2:g}"
            for seed in args.seeds:
                torch.manual_seed(seed)
                model, guide = build(kind, s2, mode == "learnt", x.shape[1], args)
                if kind == "deep":
                    train(model, guide, x, seed, args)
                else:
                    train_linear(model, guide, eigen, args)
                result, kl = measure(model, guide, x.to(model.sigma.dtype), EPSILON[kind])
                live = round(kl.shape[1] * (1 - result[3] / 100))
                results.append((*result, predicted_alive(eigen.eigenvalues, result[2], kl.shape[1]), live))
            rows[name] = values = torch.tensor(results, dtype=torch.float64)
            curves[name] = kl.cpu()
            error = values.std(0, correction=min(1, len(results) - 1)) / math.sqrt(len(results))
            cells = [f"{m:.2f} ({e:.2f})" for m, e in zip(values.mean(0), error, strict=True)]
            print(f"{name:24s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells, WIDTHS, strict=True)))
        points[kind] = torch.cat([rows[name][:, 5:] for name in curves])
        save_figure(collapse_curve_figure(curves), args.out / f"collapse_{kind}.png")
    print("\n" + "\n".join(agreement(kind, found) for kind, found in points.items()))
    save_figure(alive_figure(points), args.out / "alive.png")
    print(f"wrote {args.out}/ in {time.perf_counter() - start:.0f} s")
    return rows


if __name__ == "__main__":
    main()
