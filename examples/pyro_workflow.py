"""The zoo inside somebody's ordinary Pyro code: nothing here is special, which is the point.

1. stock ``pyro.infer.SVI`` on a pair of the zoo;
2. a guide of yours on a model of the zoo;
3. a guide of the zoo on a model of yours;
4. ``Predictive`` and poutine;
5. all of them in one table.

    python examples/pyro_workflow.py
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from _common import example_parser, finish, parse_with_presets, run_as_command, save
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam

from guides import MeanField
from inference import compare, fit, table
from inference.plots import elbo_against_evidence
from zoo import LinearVAE, digits

SMOKE = {"steps": 5, "samples": 30}


class MyGuide(torch.nn.Module):
    """A guide of yours: any module or function that samples "z" in the plate "data"."""

    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.net = torch.nn.Linear(data_dim, latent_dim)
        self.log_scale = torch.nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x):
        pyro.module("my_guide", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x / 16), self.log_scale.exp()).to_event(1))


class MyModel(torch.nn.Module):
    """A model of yours: heavy-tailed noise around a decoder network; its evidence is not known."""

    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, 64), torch.nn.Tanh(), torch.nn.Linear(64, data_dim)
        )

    def forward(self, x):
        pyro.module("my_model", self)
        scale = pyro.param("my_scale", x.new_tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.StudentT(4.0, 8 + 8 * self.decoder(z), scale).to_event(1), obs=x)


def train(model, guide, x, steps):
    """Stock SVI, as in any Pyro tutorial; returns the ELBO per data point at both ends."""
    svi = SVI(model, guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())
    losses = [svi.step(x) / len(x) for _ in range(steps)]
    return -losses[0], -losses[-1]


def parse(argv):
    resume = "nothing is kept: a run takes seconds"
    parser = example_parser(__doc__, "pyro_workflow", seed="everything", resume=resume)
    parser.add_argument("--steps", type=int, default=1000, help="training steps per pair")
    parser.add_argument("--samples", type=int, default=500, help="importance samples per datum")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def main(argv=None):
    args = parse(argv)
    pyro.set_rng_seed(args.seed)
    data = digits(dtype=torch.float32).to(device=args.device)
    x, held_out = data.train, data.test

    print("1. stock SVI on a pair of the zoo")
    vae, mean_field = (half.to(x).standardise_by(x) for half in (LinearVAE(64, 4), MeanField(64, 4)))
    print("   ELBO per data point: {:.2f} -> {:.2f}".format(*train(vae, mean_field, x, args.steps)))

    print("2. a guide of yours on that model, its weights kept")
    my_guide = MyGuide(64, 4).to(x)
    print("   ELBO per data point: {:.2f} -> {:.2f}".format(*train(vae.requires_grad_(False), my_guide, x, args.steps)))

    print("3. a guide of the zoo on a model of yours, by the zoo's training loop")
    my_model, guide = MyModel(64, 4).to(x), MeanField(64, 4).to(x).standardise_by(x)
    history = fit(my_model, guide, x, steps=args.steps, batch_size=256, seed=args.seed, progress=False)
    print(f"   ELBO per data point: {-history.loss[0]:.2f} -> {-history.loss[-1]:.2f}")

    print("4. Predictive and poutine")
    z = Predictive(vae, guide=mean_field, num_samples=100, parallel=True)(x[:5])["z"]
    print(f"   posterior draws of five digits: {tuple(z.shape)}, mean sd {z.std(0).mean().item():.3f}")
    new = Predictive(poutine.uncondition(vae), guide=mean_field, num_samples=100, parallel=True)(x[:5])["x"]
    print(f"   posterior predictive of them: {tuple(new.shape)}, rms error {(new - x[:5]).square().mean().sqrt():.2f}")
    done = poutine.do(vae, data={"z": x.new_zeros(3, 4)})(n=3)
    print(f"   three data at z = 0: mean {done.mean().item():.2f} (the data's: {x.mean().item():.2f})")
    trace = poutine.trace(poutine.condition(vae, data={"x": x[:5]})).get_trace(n=5)
    print(f"   log p(x, z) of five data at prior draws: {trace.log_prob_sum().item() / 5:.1f} nats per datum")

    print("5. how far is each ELBO from the evidence?\n")
    tree = compare(
        None,
        {"zoo / zoo": (vae, mean_field), "zoo / yours": (vae, my_guide), "yours / zoo": (my_model, guide)},
        x,
        held_out=held_out,
        num_samples=args.samples,
        seed=args.seed,
        progress=False,
    )
    print(table(tree))
    gaps = tree["train"]["gap"]
    means = dict(zip(tree["train"]["guide"].values, gaps.mean(gaps.dims[-1]).values.ravel(), strict=True))
    least, most = (choose(means, key=means.get) for choose in (min, max))
    print(f"\nthe least gap is that of {least}, {means[least]:.2f} nats, the widest that of", end=" ")
    print(f"{most}, {means[most]:.2f}; where log p is not exact, it and the gap are estimates from below")
    save(elbo_against_evidence(tree), args, "elbo_against_evidence.png")
    finish(args)
    return tree


if __name__ == "__main__":
    run_as_command(main)
