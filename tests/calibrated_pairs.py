"""A linear VAE and guides of known calibration, which several tests share."""

import functools

import pyro
import pyro.distributions as dist
import torch

from guides import Exact
from inference import (
    simulate,
)
from inference.distributions.gaussian import FullNormal
from zoo import LinearVAE

NUM, SEED = 4000, 20
ACCEPT, DETECT = 0.01, 1e-6


@functools.cache
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LinearVAE(5, 2, sigma=0.5).double()


def widened(factor, shift=0.0):
    """The exact guide with its standard deviations multiplied and its mean moved."""

    def guide(x):
        distribution = model().posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", FullNormal(distribution.loc + shift, factor * distribution._unbroadcasted_scale_tril))

    return guide


@functools.cache
def simulation(factor=1.0, shift=0.0):
    guide = Exact(model()) if (factor, shift) == (1.0, 0.0) else widened(factor, shift)
    x = torch.zeros(1000, 5).double()
    return simulate(model(), guide, x, num_simulations=NUM, seed=SEED, progress=False)


# --- a pair in a user's hand: two latent sites, counts ---------------------------------------------------


def counts_model(x):
    """A total and how it is shared: Poisson counts whose posterior is a Gamma and a Beta."""
    with pyro.plate("people", len(x), dim=-1):
        total = pyro.sample("total", dist.Gamma(torch.tensor(4.0), 0.5))
        share = pyro.sample("share", dist.Beta(torch.tensor(2.0), 3.0))
        rates = torch.stack([total * share, total * (1 - share)], -1)
        pyro.sample("counts", dist.Poisson(rates).to_event(1), obs=x)


def counts_guide(x, excess=0.0):
    with pyro.plate("people", len(x), dim=-1):
        pyro.sample("total", dist.Gamma(4.0 + x.sum(-1), 1.5))
        pyro.sample("share", dist.Beta(2.0 + x[:, 0] + excess, 3.0 + x[:, 1] + excess))


def counts(guide):
    return simulate(
        counts_model,
        guide,
        torch.zeros(500, 2),
        num_simulations=NUM,
        plate="people",
        quantities={"squared": lambda sites: sites["total"] ** 2 + sites["share"] ** 2},
        seed=SEED,
        progress=False,
    )


# --- what one test cannot see, another does --------------------------------------------------------------


def sum_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 0.3).to_event(1), obs=x)


def sum_posterior(x):
    """Mean x / 2.09 in each coordinate, variance 1 - 1 / 2.09, covariance -1 / 2.09."""
    covariance = torch.eye(2).double() - 1 / 2.09
    return dist.MultivariateNormal((x / 2.09).expand(len(x), 2), covariance)


def sum_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", sum_posterior(x))


def marginal_guide(x):
    """Both marginals are the posterior's, and there is no correlation."""
    distribution = sum_posterior(x)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(distribution.mean, distribution.variance.sqrt()).to_event(1))


def prior_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))


@functools.cache
def sums(guide):
    x = torch.zeros(1000, 1).double()
    return simulate(sum_model, guide, x, num_simulations=NUM, seed=SEED, progress=False)
