"""A linear VAE, its guides and their comparison, which several tests share."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.integrate
import scipy.stats
import torch

from guides import Linear, MeanField
from inference import AnalyticELBO, fit
from inference.comparison.guide_comparison import compare
from zoo import LinearVAE

NUM_SAMPLES = 200
HELD_OUT_LOG_DET = torch.linspace(0, 1, 12, dtype=torch.float64)


def make_model(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LinearVAE(5, 2, sigma=0.7).double().requires_grad_(False)


def mean_field(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MeanField(5, 2, hidden=(8,)).double().requires_grad_(False)


def data(model, num, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(n=num)


def measure(model, guides, x, **options):
    return compare(model, guides, x, **{"num_samples": NUM_SAMPLES, "progress": False, **options})


def assert_close(got, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=tolerance, atol=tolerance)


# --- seeds -----------------------------------------------------------------------------------------------


def train_linear(model, x):
    def train(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            guide = Linear(5, 2).double()
        fit(model, guide, x, steps=20, objective=AnalyticELBO(), seed=seed, progress=False)
        return guide

    return train


# --- table -----------------------------------------------------------------------------------------------


def parse(text):
    """The numbers of a table: guide to quantity to one list of numbers a split."""
    rows, heads = {}, []
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if cells[0] == "guide":
            heads = cells[1:]
        elif len(cells) != len(heads) + 1:
            heads = []
        elif heads:
            row = rows.setdefault(cells[0], {})
            for head, cell in zip(heads, cells[1:]):
                row.setdefault(head, []).append([float(n) for n in re.findall(r"-?\d+(?:\.\d+)?|inf|nan", cell)])
    return rows


def assert_printed(numbers, expected, digits=4):
    """Equal to half a unit of the last place."""
    np.testing.assert_allclose(numbers, expected, rtol=0, atol=0.5001 * 10**-digits)


# --- a model without closed form -------------------------------------------------------------------------


def nonlinear_model(x):
    """z ~ N(0, 1), x ~ N([tanh 2z, z^2], 0.5): no closed form, one-dimensional quadrature."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
        mean = torch.stack([torch.tanh(2 * z), z**2], -1)
        pyro.sample("x", dist.Normal(mean, x.new_tensor(0.5)).to_event(1), obs=x)


def nonlinear_guide(slope, sigma):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x[:, 0], x.new_tensor(sigma)))

    return guide


def quadrature(x):
    def density(z):
        normal = scipy.stats.norm.pdf
        return normal(z) * normal(x[0], np.tanh(2 * z), 0.5) * normal(x[1], z**2, 0.5)

    return math.log(scipy.integrate.quad(density, -8, 8, points=[-1, 0, 1], epsabs=1e-13)[0])


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, x.new_tensor(0.1)), obs=x[:, 0])
