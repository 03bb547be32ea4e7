"""Training: a step of elbozoo's fit against stock Pyro (SVI + Trace_ELBO), a hand-written loop, and NumPyro; many fits.

Same networks, same mini-batches, in one run and interleaved. The hand-written loop has torch's default Adam, the rest
what its row says; a step of fit is timed once it is captured. NumPyro, where it is installed, scans over all steps in
one compiled loop, on the CPU. Prints ratios; run it on your machine.
"""

from __future__ import annotations

import logging
import math
import time

import pyro
import pyro.distributions as dist
import torch
from numpyro_step import by_numpyro, has_numpyro
from pyro.infer import SVI, Trace_ELBO
from timing import begin, benchmark_parser, interleaved, report
from torch import nn

from guides import MeanField, mlp
from inference import Logging, fit, fit_many
from inference.distributions.gaussian import DiagNormal
from zoo import LatentVariableModel

NETWORKS = {
    "small 64-32-8": (64, (32,), 8),
    "middle 784-256-256-32": (784, (256, 256), 32),
    "large 784-512-512-32": (784, (512, 512), 32),
}
BATCHES = dict(zip(NETWORKS, (128, 128, 512), strict=True))
SMOKE = {"repeats": 1, "steps": 2, "levels": ["off", "graph"], "pairs": [1, 2], "many_steps": 2}
HAND, PYRO, NUMPYRO = "hand-written PyTorch", "Pyro SVI + Trace_ELBO", "NumPyro SVI, scanned"
RATE, LOG_2PI = 1e-3, math.log(2 * math.pi)


class Decoder(LatentVariableModel):
    """A Gaussian decoder network with one learnt sigma."""

    def __init__(self, data_dim, hidden, latent_dim):
        super().__init__(data_dim, latent_dim)
        self.net = mlp(latent_dim, data_dim, hidden[::-1])
        self.log_sigma = nn.Parameter(torch.zeros(1))

    def likelihood(self, z):
        return DiagNormal(self.net(z), self.log_sigma.exp())


class StockVAE(nn.Module):
    """The same pair as the Pyro tutorial writes it."""

    def __init__(self, data_dim, hidden, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder, self.decoder = mlp(data_dim, 2 * latent_dim, hidden), mlp(latent_dim, data_dim, hidden[::-1])

    def model(self, x):
        pyro.module("decoder", self.decoder)
        log_sigma = pyro.param("log_sigma", torch.zeros(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), log_sigma.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            mean, log_sigma = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_sigma.exp()).to_event(1))


class HandVAE(nn.Module):
    """The same pair without Pyro, its KL in closed form."""

    def __init__(self, data_dim, hidden, latent_dim):
        super().__init__()
        self.encoder, self.decoder = mlp(data_dim, 2 * latent_dim, hidden), mlp(latent_dim, data_dim, hidden[::-1])
        self.log_sigma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        mean, log_sigma = self.encoder(x).chunk(2, -1)
        z = mean + log_sigma.exp() * torch.randn_like(mean)
        squares = ((x - self.decoder(z)) / self.log_sigma.exp()).square().sum(-1)
        log_likelihood = -0.5 * squares - x.shape[-1] * (self.log_sigma + 0.5 * LOG_2PI)
        kl = 0.5 * (mean.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(-1)
        return (kl - log_likelihood).mean()


class Times(logging.Handler):
    """Notes when messages come."""

    def __init__(self):
        super().__init__()
        self.times = []

    def emit(self, record):  # noqa: ARG002
        self.times.append(time.perf_counter())


def rows_of_batches(num_rows, size, steps, device=None):
    per_epoch = num_rows // size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(num_rows, device=device)
        at = step % per_epoch * size
        yield order[at : at + size]


def batches(x, size, steps):
    return (x[rows] for rows in rows_of_batches(len(x), size, steps, x.device))


def new_pair(shape, device="cpu"):
    return Decoder(*shape).to(device), MeanField(shape[0], shape[2], hidden=shape[1]).to(device)


def by_fit(shape, x, size, steps, level, fused, precision="full"):
    """A function that trains a pair and returns the seconds of its steps after as many others.

    By then they are captured, and their checks as rare as in a longer run of the kind.
    """
    pair = new_pair(shape, x.device)

    def run():
        logger, noted = logging.Logger("steps"), Times()
        logger.addHandler(noted)
        options = {
            "batch_size": size,
            "capture": level,
            "precision": precision,
            "callbacks": [Logging(steps, logger=logger)],
            "progress": False,
        }
        fit(*pair, x, steps=2 * steps, optimizer=lambda p: torch.optim.Adam(p, lr=RATE, fused=fused), **options)
        return noted.times[1] - noted.times[0]

    return run


def by_hand(shape, x, size, steps, *, fused=None, compiled=False):
    net = HandVAE(*shape).to(x.device)
    optimizer, loss = torch.optim.Adam(net.parameters(), lr=RATE, fused=fused), torch.compile(net) if compiled else net

    def run():
        for batch in batches(x, size, steps):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()

    return run


def products_alone(shape, x, size, steps):
    """The matrix products of a step, forwards and backwards, and nothing else: no replay in these can take less."""
    net = HandVAE(*shape).to(x.device)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    ends = [
        [torch.randn(size, n, device=x.device) for n in (layer.in_features, layer.out_features)] for layer in layers
    ]

    @torch.no_grad()
    def run():
        for _ in range(steps):
            for i, (layer, (inputs, gradients)) in enumerate(zip(layers, ends, strict=True)):
                torch.addmm(layer.bias, inputs, layer.weight.t())
                gradients.t() @ inputs
                if i:  # the data need no gradient
                    gradients @ layer.weight

    return run


def by_pyro(shape, x, size, steps):
    stock = StockVAE(*shape).to(x.device)
    pyro.clear_param_store()
    svi = SVI(stock.model, stock.guide, pyro.optim.Adam({"lr": RATE}), loss=Trace_ELBO())

    def run():
        for batch in batches(x, size, steps):
            svi.step(batch)

    return run


def steps_of(shape, x, size, steps, levels):
    """One trained-from-scratch-once pair per way of training; each call takes ``steps`` steps."""
    task = shape, x, size, steps
    ways = {HAND: by_hand(*task), f"{HAND}, fused Adam": by_hand(*task, fused=True), PYRO: by_pyro(*task)}
    ways["its matrix products alone"] = products_alone(*task)
    if "compile" in levels:
        ways[f"{HAND}, compiled, fused Adam"] = by_hand(*task, fused=True, compiled=True)
    if x.device.type == "cpu" and has_numpyro():
        ways[NUMPYRO] = by_numpyro(shape, x, size, lambda: rows_of_batches(len(x), size, steps), RATE)
    if x.device.type != "cpu":
        ways |= {f"fit, {level}, fused, bfloat16": by_fit(*task, level, True, "bfloat16") for level in levels}
    ways |= {f"fit, {level}": by_fit(*task, level, None) for level in levels}
    return ways | {f"fit, {level}, fused Adam": by_fit(*task, level, True) for level in levels}


def short_fits(shape, x, size):
    """Whole fits of 100 steps, each of a new pair."""
    options = {"steps": 100, "batch_size": size, "progress": False}
    return {level: lambda level=level: fit(*new_pair(shape), x, capture=level, **options) for level in ("off", "auto")}


def many_fits(shape, x, size, steps, numbers):
    """Whole fits of several pairs at once, beside one by itself that is not captured."""
    options = {"batch_size": size, "progress": False}
    pairs = {number: [new_pair(shape) for _ in range(number)] for number in numbers}
    alone = new_pair(shape)
    ways = {"one fit": lambda: fit(*alone, x, steps=steps, capture="off", **options)}
    for number, own in pairs.items():
        ways[f"fit_many, {number}"] = lambda own=own: fit_many(own, x, steps=steps, capture="graph", **options)
        ways[f"start-up of fit_many, {number}"] = start_up(own, x, options)
    return ways


def start_up(pairs, x, options):
    """A function that returns the seconds that a fit of pairs takes beside its steps."""

    def seconds(steps):
        start = time.perf_counter()
        fit_many(pairs, x, steps=steps, capture="off", **options)
        return time.perf_counter() - start

    return lambda: 2 * seconds(1) - seconds(2)


def main(argv=None):
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="steps per timing, of the small network")
    names = [name.split()[0] for name in NETWORKS]
    parser.add_argument("--networks", nargs="+", default=names, choices=names, help="that are trained")
    parser.add_argument("--levels", nargs="+", default=["off", "graph", "compile"], help="of capture")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 8, 64], help="trained at once")
    parser.add_argument("--many-steps", type=int, default=1000, help="steps of several pairs at once")
    parser.add_argument("--device", default="cpu", help="where to train")
    args = begin(parser, argv, SMOKE)
    for name, shape in NETWORKS.items():
        if name.split()[0] not in args.networks:
            continue
        torch.manual_seed(0)
        size = BATCHES[name]
        steps = args.steps if shape[0] == 64 else max(args.steps // 5, 2)  # of larger networks fewer
        x = torch.randn(size * 20, shape[0], device=args.device)
        seconds = interleaved(steps_of(shape, x, size, steps, args.levels), args.repeats)
        title = f"ms per step, {name}, batch {size}"
        report(title, seconds, [HAND], per=steps)
        if NUMPYRO in seconds:
            ours = {way: times for way, times in seconds.items() if way == NUMPYRO or way.startswith("fit")}
            report(title, ours, [NUMPYRO], per=steps)
    small = next(iter(NETWORKS))
    x = torch.randn(BATCHES[small] * 20, NETWORKS[small][0])
    task = NETWORKS[small], x, BATCHES[small]
    report(f"ms for 100 steps, {small}", interleaved(short_fits(*task), args.repeats), ["off"])
    seconds = interleaved(many_fits(*task, args.many_steps, args.pairs), args.repeats)
    report(f"ms for {args.many_steps} steps of so many pairs, {small}", seconds, ["one fit"])


if __name__ == "__main__":
    main()
