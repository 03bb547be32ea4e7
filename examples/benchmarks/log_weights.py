"""Importance weights of a trained pair: elbozoo's log_weights against a hand-written importance-weighted loop.

Same networks, same number of samples in chunks of the same size, or of elbozoo's own, compiled as well, no gradient.
Prints ratios of time, interleaved in one run, and checks that both estimate the same bound.
"""

from __future__ import annotations

import torch
from svi_step import LOG_2PI, NETWORKS, Decoder
from timing import begin, benchmark_parser, interleaved, report

from guides import MeanField
from inference import iter_log_weights, iwae, log_weights

SMOKE = {"repeats": 1, "samples": [20], "chunk": 10, "data": 4}


@torch.no_grad()
def by_hand(model, guide, x, num_samples, chunk):
    """What one would write without a library: a loop over chunks of samples, all densities spelt out."""
    sigma, out = model.log_sigma.exp(), []
    mean, log_scale = guide.encoder(x).chunk(2, -1)
    for _ in range(num_samples // chunk):
        noise = torch.randn(chunk, *mean.shape)
        z = mean + log_scale.exp() * noise
        log_q = (-0.5 * noise.square() - log_scale - 0.5 * LOG_2PI).sum(-1)
        log_prior = (-0.5 * z.square() - 0.5 * LOG_2PI).sum(-1)
        residual = (x - model.net(z)) / sigma
        log_likelihood = (-0.5 * residual.square() - sigma.log() - 0.5 * LOG_2PI).sum(-1)
        out.append(log_prior + log_likelihood - log_q)
    return torch.cat(out)


def compare(model, guide, x, samples, name, args):
    """Print times, and check that both estimate the same bound."""
    options = {"num_samples": samples, "chunk": args.chunk, "progress": False}
    compiled = options | {"chunk": None, "capture": "compile"}
    log_weights(model, guide, x, **compiled)  # compiles, once for all calls
    seconds = interleaved(
        {
            "elbozoo log_weights": lambda: log_weights(model, guide, x, **options),
            "elbozoo log_weights, its own chunks": lambda: log_weights(model, guide, x, **options | {"chunk": None}),
            "elbozoo log_weights, compiled": lambda: log_weights(model, guide, x, **compiled),
            "elbozoo iter_log_weights": lambda: [None for _ in iter_log_weights(model, guide, x, **options)],
            "hand-written loop": lambda: by_hand(model, guide, x, samples, args.chunk),
        },
        args.repeats,
    )
    report(f"ms for {samples} samples of {len(x)} data points, {name}", seconds, ["hand-written loop"])
    ours = iwae(log_weights(model, guide, x, **options))
    theirs = iwae(by_hand(model, guide, x, samples, args.chunk))
    errors = torch.hypot(ours.standard_error, theirs.standard_error)
    z = (ours.value - theirs.value).sum() / errors.square().sum().sqrt()
    print(f"the two IWAE bounds differ by {z:.1f} standard errors")
    if not abs(z) < 4:
        raise SystemExit("the two do not estimate the same bound")


def main(argv=None):
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", type=int, default=64, help="number of data points")
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10_000, 100_000], help="per datum")
    parser.add_argument("--chunk", type=int, default=100, help="samples at a time")
    args = begin(parser, argv, SMOKE)
    for name, (data_dim, hidden, latent_dim) in NETWORKS.items():
        torch.manual_seed(0)
        model = Decoder(data_dim, hidden, latent_dim)
        guide = MeanField(data_dim, latent_dim, hidden=hidden)
        x = torch.randn(args.data, data_dim)
        for samples in args.samples if data_dim == 64 else args.samples[:1]:
            compare(model, guide, x, samples, name, args)


if __name__ == "__main__":
    main()
