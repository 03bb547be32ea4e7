"""One training step: elbozoo's fit against stock Pyro (SVI + Trace_ELBO) and a hand-written PyTorch loop.

Same network, same Adam, same mini-batches of 256, in one run and interleaved. Prints ratios; run it on your machine.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from timing import add_threads, benchmark_parser, interleaved, machine, parse_with_smoke, report
from torch import nn

from guides import MeanField, mlp
from inference import ELBO, AnalyticKLELBO, fit
from inference.distributions.gaussian import DiagNormal
from zoo import LatentVariableModel

NETWORKS = {"small 64-32-8": (64, (32,), 8), "large 784-512-512-32": (784, (512, 512), 32)}
SMOKE = {"repeats": 1, "steps": 2}
BATCH, RATE, LOG_2PI = 256, 1e-3, math.log(2 * math.pi)


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


def batches(x, steps):
    order = torch.randperm(len(x), device=x.device)
    per_epoch = len(x) // BATCH
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), device=x.device)
        at = step % per_epoch * BATCH
        yield x[order[at : at + BATCH]]


def candidates(shape, x, steps):
    """One trained-from-scratch-once pair per way of training; each call takes ``steps`` steps."""
    device = x.device
    ours = [(Decoder(*shape).to(device), MeanField(shape[0], shape[2], hidden=shape[1]).to(device)) for _ in range(2)]
    stock, hand = StockVAE(*shape).to(device), HandVAE(*shape).to(device)
    pyro.clear_param_store()
    svi = SVI(stock.model, stock.guide, pyro.optim.Adam({"lr": RATE}), loss=Trace_ELBO())
    optimizer = torch.optim.Adam(hand.parameters(), lr=RATE)

    def run_ours(pair, objective):
        fit(*pair, x, steps=steps, batch_size=BATCH, objective=objective, progress=False)

    def run_stock():
        for batch in batches(x, steps):
            svi.step(batch)

    def run_hand():
        for batch in batches(x, steps):
            optimizer.zero_grad()
            hand(batch).backward()
            optimizer.step()

    return {
        "elbozoo fit, ELBO": lambda: run_ours(ours[0], ELBO()),
        "elbozoo fit, AnalyticKLELBO": lambda: run_ours(ours[1], AnalyticKLELBO()),
        "Pyro SVI + Trace_ELBO": run_stock,
        "hand-written PyTorch": run_hand,
    }


def main(argv=None):
    parser = benchmark_parser(__doc__)
    add_threads(parser)
    parser.add_argument("--steps", type=int, default=200, help="steps per timing")
    parser.add_argument("--device", default="cpu", help="where to train")
    args = parse_with_smoke(parser, argv, SMOKE)
    torch.set_num_threads(args.threads)
    print(machine())
    for name, shape in NETWORKS.items():
        torch.manual_seed(0)
        x = torch.randn(BATCH * 20, shape[0], device=args.device)
        seconds = interleaved(candidates(shape, x, args.steps), args.repeats)
        report(f"ms per step, {name}, batch {BATCH}", seconds, list(seconds)[2:], per=args.steps)


if __name__ == "__main__":
    main()
