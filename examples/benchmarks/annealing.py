"""Annealed importance sampling: elbozoo's Annealed against hand-written annealing with a plain HMC in PyTorch.

Same decoder network in float64, as many chains, temperatures and leapfrog steps, from the prior; ratios of time,
interleaved in one run. The hand-written one has one step size for all and no warm-up.
"""

from __future__ import annotations

import math

import torch
from svi_step import LOG_2PI, NETWORKS, Decoder
from timing import begin, benchmark_parser, interleaved, report

from inference import Annealed, evidence

SMOKE = {"repeats": 1, "temperatures": 10, "chains": 4, "data": 2}


def log_likelihood(model, x, z):
    residual = (x - model.net(z)) / model.log_sigma.exp()
    return (-0.5 * residual.square() - model.log_sigma - 0.5 * LOG_2PI).sum(-1)


def by_hand(model, x, temperatures, chains, leapfrog, step=0.1):
    """Log weights (chains, N) of annealing from the prior: what one would write without a library."""
    z = torch.randn(chains, len(x), model.latent_dim, dtype=x.dtype)
    weights = torch.zeros(chains, len(x), dtype=x.dtype)

    def energy(z, beta):
        return 0.5 * z.square().sum(-1) - beta * log_likelihood(model, x, z)

    def gradient(z, beta):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(energy(z, beta).sum(), z)[0]

    for i in range(1, temperatures + 1):
        beta = i / temperatures
        with torch.no_grad():
            weights += log_likelihood(model, x, z) / temperatures
        first = torch.randn_like(z)
        new, momentum = z, first - 0.5 * step * gradient(z, beta)
        for j in range(leapfrog):
            new = new + step * momentum
            momentum = momentum - (step if j < leapfrog - 1 else 0.5 * step) * gradient(new, beta)
        with torch.no_grad():
            before = energy(z, beta) + 0.5 * first.square().sum(-1)
            after = energy(new, beta) + 0.5 * momentum.square().sum(-1)
            accepted = torch.rand_like(before) < (before - after).exp()
            z = torch.where(accepted.unsqueeze(-1), new, z).detach()
    return weights


def main(argv=None):
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--data", type=int, default=16, help="number of data points")
    parser.add_argument("--temperatures", type=int, default=200, help="of annealing")
    parser.add_argument("--chains", type=int, default=16, help="per datum")
    parser.add_argument("--leapfrog", type=int, default=3, help="steps at each temperature")
    args = begin(parser, argv, SMOKE)
    for name, (data_dim, hidden, latent_dim) in NETWORKS.items():
        torch.manual_seed(0)
        model, x = Decoder(data_dim, hidden, latent_dim).double(), torch.randn(args.data, data_dim).double()
        sizes = {"num_temperatures": args.temperatures, "num_chains": args.chains, "num_leapfrog": args.leapfrog}
        method = Annealed(**sizes)
        ways = {
            "elbozoo Annealed": lambda: evidence(model, x, method=method, seed=0, progress=False),  # noqa: B023
            "hand-written HMC": lambda: by_hand(model, x, *sizes.values()),  # noqa: B023
        }
        seconds = interleaved(ways, args.repeats)
        report(f"ms for {args.data} data points, {name}", seconds, ["hand-written HMC"])
        found = evidence(model, x, method=method, seed=0, progress=False)
        weights = by_hand(model, x, *sizes.values())
        plain = float(weights.logsumexp(0).mean()) - math.log(args.chains)
        print(f"log p, mean over the data: {float(found.value.mean()):.2f} and {plain:.2f} nats", end="; ")
        print(f"{found.evaluations:.0f} evaluations a data point, and {math.prod(sizes.values())} by hand")


if __name__ == "__main__":
    main()
