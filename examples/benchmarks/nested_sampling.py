"""Nested sampling (dynesty) beside evidence, on a deep VAE of digits.

An outside opinion: nested sampling knows nothing of guide, gradient or modes: it shrinks the prior by likelihood. Its
likelihood is written out in NumPy, float64. For each data point the table holds both values with their standard
errors, and their difference in units of both together. Needs ``pip install dynesty``.

    OMP_NUM_THREADS=1 python examples/benchmarks/nested_sampling.py --num-data 5
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import scipy.special
import torch
from timing import machine, parse_with_smoke
from torch import Tensor, nn

import zoo
from guides import MeanField
from inference import AnalyticKLELBO, evidence, fit

SMOKE = {"latent_dim": 2, "steps": 20, "num_data": 2, "live": 40, "tolerance": 1.0}


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--latent-dim", type=int, default=8, help="K")
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--num-data", type=int, default=5, help="held-out data")
    parser.add_argument("--live", type=int, default=500, help="live points of nested sampling")
    parser.add_argument("--tolerance", type=float, default=0.02, help="nats of the rest at which it stops")
    parser.add_argument("--seed", type=int, default=0, help="of training and both methods")
    return parse_with_smoke(parser, argv, SMOKE)


def digits_pair(latent_dim: int, steps: int, seed: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """A deep VAE of the digits with its guide, trained and in float64, and held-out data."""
    data = zoo.digits()
    torch.manual_seed(seed)
    model = zoo.DeepGaussianVAE(data.train.shape[1], latent_dim).to(data.train).standardise_by(data.train)
    guide = MeanField(data.train.shape[1], latent_dim).to(data.train).standardise_by(data.train)
    options = {"objective": AnalyticKLELBO(), "batch_size": 256, "seed": seed, "progress": False}
    fit(model, guide, data.train, steps=steps, **options)
    return model.requires_grad_(False), guide.requires_grad_(False), data.test


def log_likelihood_by_hand(model: nn.Module, x: np.ndarray) -> Callable[[np.ndarray], float]:
    """log p(x | z) of one data point as a function of z: the decoder's layers one by one, in NumPy."""
    layers = [m for m in model.network.modules() if not list(m.children())]
    steps = [(m.weight.numpy(), m.bias.numpy()) if isinstance(m, nn.Linear) else type(m).__name__ for m in layers]
    with torch.no_grad():
        like = model.likelihood(torch.zeros(1, model.latent_dim, dtype=torch.float64))
    sigma = like.stddev.numpy().reshape(-1)
    # The affine map from the network's output to the mean, found at two of its outputs.
    with torch.no_grad():
        probes = torch.randn(4, model.latent_dim, dtype=torch.float64)
        raw, mean = model.network(probes).numpy(), model.decode(probes).numpy()
    scale = float((mean[0] - mean[1]) @ (raw[0] - raw[1]) / ((raw[0] - raw[1]) @ (raw[0] - raw[1])))
    offset = mean[0] - scale * raw[0]
    constant = -0.5 * len(x) * math.log(2 * math.pi) - np.log(np.broadcast_to(sigma, x.shape)).sum()

    def log_likelihood(z: np.ndarray) -> float:
        h = z
        for step in steps:
            h = activation(step, h) if isinstance(step, str) else step[0] @ h + step[1]
        return float(constant - 0.5 * np.square((x - offset - scale * h) / sigma).sum())

    z = probes[0]
    expected = float(model.likelihood(z).log_prob(torch.from_numpy(x)))
    if not math.isclose(log_likelihood(z.numpy()), expected, rel_tol=1e-9):
        raise SystemExit("the decoder is not the one that is written out here")
    return log_likelihood


def activation(name: str, h: np.ndarray) -> np.ndarray:
    """An activation by the name of its module."""
    known = {
        "ReLU": lambda h: np.maximum(h, 0),
        "Tanh": np.tanh,
        "SiLU": lambda h: h * scipy.special.expit(h),
        "Softplus": lambda h: np.logaddexp(0, h),
        "GELU": lambda h: h * scipy.special.ndtr(h),
        "ELU": lambda h: np.where(h > 0, h, np.expm1(np.minimum(h, 0))),
        "LeakyReLU": lambda h: np.where(h > 0, h, 0.01 * h),
    }
    if name not in known:
        raise SystemExit(f"expected one of the activations {sorted(known)}, got {name}")
    return known[name](h)


def nested(model: nn.Module, x: np.ndarray, args: argparse.Namespace, seed: int) -> tuple[float, float, int]:
    """log p(x) by nested sampling, its standard error, and the calls of the likelihood."""
    try:
        from dynesty import NestedSampler
    except ImportError:
        sys.exit("this comparison needs dynesty: pip install dynesty")
    sampler = NestedSampler(
        log_likelihood_by_hand(model, x),
        scipy.special.ndtri,  # from the unit cube to the prior
        args.latent_dim,
        nlive=args.live,
        sample="rwalk" if args.latent_dim > 4 else "unif",
        rstate=np.random.default_rng(seed),
    )
    sampler.run_nested(dlogz=args.tolerance, print_progress=False)
    found = sampler.results
    return float(found.logz[-1]), float(found.logzerr[-1]), int(np.sum(found.ncall))


def main(argv: list[str] | None = None) -> list[tuple[float, ...]]:
    """A row for each data point: both values with their errors, and the difference in both errors together."""
    args = parse(argv)
    print(machine())
    model, guide, held_out = digits_pair(args.latent_dim, args.steps, args.seed)
    x = held_out[: args.num_data]
    found = evidence(model, x, guide=guide, seed=args.seed, progress=False)
    print(f"K = {args.latent_dim}; auto: {found.method}, {found.seconds / len(x):.2f} s a data point")
    head = f"{'':>4s}{'auto':>11s}{'s.e.':>8s}{'nested':>11s}{'s.e.':>8s}{'difference':>12s}{'errors':>8s}"
    print(head + f"{'calls':>10s}{'s':>7s}")
    rows = []
    for n in range(len(x)):
        begin = time.perf_counter()
        value, error, calls = nested(model, x[n].numpy(), args, args.seed + n)
        ours, our_error = float(found.value[n]), float(found.standard_error[n])
        both = (ours - value) / math.hypot(error, our_error)
        rows.append((ours, our_error, value, error, both))
        line = f"{n:4d}{ours:11.3f}{our_error:8.3f}{value:11.3f}{error:8.3f}{ours - value:12.3f}{both:8.1f}"
        print(line + f"{calls:10d}{time.perf_counter() - begin:7.0f}", flush=True)
    print(f"{sum(abs(row[-1]) < 2 for row in rows)} of {len(rows)} within two standard errors of both together")
    return rows


if __name__ == "__main__":
    main()
