"""Does the ELBO cause posterior collapse? The tables of "Don't Blame the ELBO!" (Lucas et al., 2019), measured.

Trains a deep Gaussian VAE and the linear VAE from several noise variances sigma^2, kept fixed or learnt, over several
seeds, and prints the ELBO, the ELBO after sigma^2 alone is set to its optimum, the final sigma^2, the share of
collapsed latents and the KL term. For the linear VAE the eigenvalues of the data predict how many latents live.

    python examples/posterior_collapse.py
    python examples/posterior_collapse.py --data path/to/mnist.npz --paper-scale --device cuda
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from guides import Linear, MeanField, mlp
from inference import AnalyticKLELBO, fit
from inference.collapse_plots import collapse_curve_figure
from inference.diagnostics import collapsed, latent_kl, predicted_alive
from inference.plots import save_figure
from zoo import DeepGaussianVAE, FixedNoise, LearntNoise, LinearVAE, Logit, digits_logit, mnist
from zoo.maximum_likelihood import spectrum

HEAD = f"{'run':24s}{'ELBO':>20s}{'tuned ELBO':>20s}{'final s2':>18s}{'collapsed':>18s}{'KL':>16s}"


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
    parser.add_argument("--epsilon", type=float, default=0.1, help="nats below which a latent counts as collapsed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/posterior_collapse"))
    return parser.parse_args(argv)


def build(kind, sigma2, learn, data_dim, args):
    """A pair of the paper: a mirrored ReLU network with one sigma, or the linear VAE with its linear guide."""
    latent_dim, hidden = (200, (1024, 512)) if args.paper_scale else (20, (256, 128))
    sigma = math.sqrt(sigma2)
    if kind == "linear":
        return LinearVAE(data_dim, latent_dim, sigma=sigma, learn_sigma=learn), Linear(data_dim, latent_dim)
    noise = LearntNoise(sigma) if learn else FixedNoise(sigma)
    decoder = mlp(latent_dim, data_dim, hidden[::-1], nn.ReLU)
    encoder = mlp(data_dim, 2 * latent_dim, hidden, nn.ReLU)
    model = DeepGaussianVAE(data_dim, latent_dim, network=decoder, noise=noise)
    return model, MeanField(data_dim, latent_dim, encoder=encoder)


def train(model, guide, x, seed, rate, args):
    """Adam with a learning rate that falls to zero over the second half."""
    steps = args.epochs * math.ceil(len(x) / args.batch)
    fit(
        model,
        guide,
        x,
        steps=steps,
        objective=AnalyticKLELBO(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate),
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps))),
        batch_size=args.batch,
        seed=seed,
        device=args.device,
    )


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


def main(argv=None):
    args, start = parse(argv), time.perf_counter()
    data = digits_logit(test_size=0, dtype=torch.float32)
    if args.data != "digits":
        data = mnist(args.data, transform=Logit(256), max_train=args.rows)
    x = data.train if args.rows is None else data.train[: args.rows]
    x = x - x.mean(0)  # a shift changes no density; sigma^2 stays in the units of the data
    eigenvalues = spectrum(x.double()).eigenvalues
    torch.manual_seed(0)
    print(f"{data.name}: {tuple(x.shape)}, collapsed = KL below {args.epsilon} nats for 99% of the data")
    print(f"mean (s.e.) over {len(args.seeds)} seeds, nats per datum of the training set\n{HEAD}")
    rows, curves = {}, {}
    runs = [("fixed", s2) for s2 in args.fixed] + [("learnt", s2) for s2 in args.learnt]
    for kind, rate in (("deep", 1e-3), ("linear", 1e-2)):
        for mode, s2 in runs:
            results = []
            for seed in args.seeds:
                torch.manual_seed(seed)
                model, guide = build(kind, s2, mode == "learnt", x.shape[1], args)
                train(model, guide, x, seed, rate, args)
                result, kl = measure(model, guide, x, args.epsilon)
                results.append(result)
            values = torch.tensor(results, dtype=torch.float64)
            error = values.std(0, correction=min(1, len(results) - 1)) / math.sqrt(len(results))
            name = f"{kind}, {mode} {s2:g}"
            rows[name], curves[name] = values, kl.cpu()
            cells = [f"{m:.2f} ({e:.2f})" for m, e in zip(values.mean(0), error, strict=True)]
            live = f"  predicted live {predicted_alive(eigenvalues, values[:, 2].mean().item(), kl.shape[1])}"
            live = live + f", measured {round(kl.shape[1] * (1 - values[:, 3].mean().item() / 100), 1)}"
            print(f"{name:24s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells, (20, 20, 18, 18, 16))) + live)
    for kind in ("deep", "linear"):
        chosen = {name: kl for name, kl in curves.items() if name.startswith(kind)}
        save_figure(collapse_curve_figure(chosen), args.out / f"collapse_{kind}.png")
    print(f"\nwrote {args.out}/ in {time.perf_counter() - start:.0f} s")
    return rows


if __name__ == "__main__":
    main()
