"""References and criteria of the conformance tests, written out: nothing of inference but what is said."""

import math

import pyro
import torch
from observations import normal_log_prob
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from registry import observation_of
from torch import nn

from inference import (
    ELBO,
    fit,
)
from inference.core.protocols import (
    SupportsLogEvidence,
    SupportsPosterior,
)

EXACT = [SupportsLogEvidence, SupportsPosterior]


def state(*modules):
    """A copy of every parameter and buffer."""
    return {k: v.clone() for k, v in nn.ModuleList(modules).state_dict().items()}


def unchanged(before, *modules):
    """Names of the trainable parameters that are what they were, bit for bit."""
    trainable = [k for k, p in nn.ModuleList(modules).named_parameters() if p.requires_grad]
    after = state(*modules)
    return [k for k in trainable if torch.equal(before[k], after[k])]


def changed(before, *modules):
    """Names of the tensors, buffers included, that are not what they were, bit for bit."""
    return [k for k, v in state(*modules).items() if not torch.equal(before[k], v)]


def train_by_svi(model, guide, x, objective=Trace_ELBO, steps=3):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), objective())
    for _ in range(steps):
        svi.step(x)


def train_by_torch(model, guide, x, objective=Trace_ELBO, steps=3):
    loss = objective()(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()


def train_by_fit(model, guide, x, objective=ELBO, steps=3):
    fit(model, guide, x, steps=steps, objective=objective(), progress=False)


def elbo_per_datum(model, guide, x, num=4000):
    """ELBO per data point of the data and its standard error, written out: no Pyro, nothing of inference."""
    with torch.no_grad():
        distribution = guide.posterior(x)
        z = distribution.sample((num,))
        w = model.prior().log_prob(z) + model.likelihood(z).log_prob(x) - distribution.log_prob(z)
    return float(w.mean()), float(w.std(0).square().sum().sqrt()) / math.sqrt(num) / len(x)


def reference_log_likelihood(model, x, z):
    """log p(x_n | z_n) by hand, see :class:`observations.Observation`."""
    return observation_of(model).log_prob(model, x, z)


def reference_log_joint(model, x, z):
    """log p(z_n) + log p(x_n | z_n) by hand, see :func:`reference_log_likelihood`."""
    return normal_log_prob(z, torch.zeros_like(z), 1.0) + reference_log_likelihood(model, x, z)


def reference_marginal(model):
    """The distribution of x from the parameters alone, as a dense Gaussian."""
    return observation_of(model).marginal(model)


@torch.no_grad()
def quadrature(model, x, step=0.2, reach=10.0):
    """Log evidence (N,), and z (S, K) with its posterior weights (S, N), by the trapezoidal rule on a grid over z.

    Spectrally accurate for smooth distributions that vanish at the edge: two shifted grids must agree, the edge be
    empty.
    """
    dim = model.latent_dim
    assert dim <= 3, "a grid serves few latents only: give the model of the registry K <= 3"
    line = torch.arange(-reach, reach, step, dtype=x.dtype)
    log_evidence = []
    for shift in (0.0, 0.5):
        z = torch.cartesian_prod(*[line + shift * step] * dim).reshape(-1, dim)
        parts = [reference_log_joint(model, x, part.unsqueeze(1)) for part in z.split(2**16)]
        log_joint = torch.cat(parts) + dim * math.log(step)
        log_evidence.append(log_joint.logsumexp(0))
    weights = (log_joint - log_evidence[1]).exp()
    edge = z.abs().amax(-1) > reach - 1
    assert largest(weights[edge].sum(0)) < 1e-9
    torch.testing.assert_close(*log_evidence, rtol=0, atol=1e-7)
    return log_evidence[1], z, weights


def largest(tensor):
    """The largest absolute value, as a number."""
    return float(tensor.detach().abs().max())


def assert_same_moments(draws, reference):
    """Mean and variance over the first dimension agree within 5 standard errors, those of both sets of draws."""
    for moment in (lambda a: a, lambda a: (a - a.mean(0)).square()):
        a, b = moment(draws), moment(reference)
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert largest((a.mean(0) - b.mean(0)) / error) < 5


def assert_same_covariance(draws, reference):
    """Covariances of draws (n, D) agree within 5 standard errors, those of both sets of draws."""

    def products(a):
        centred = a - a.mean(0)
        return torch.einsum("si,sj->sij", centred, centred)

    a, b = products(draws), products(reference)
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    assert largest((a.mean(0) - b.mean(0)) / error) < 5


def assert_moments(draws, mean, covariance):
    """Mean and covariance of draws (n, D) agree within 5 standard errors with those of a Gaussian."""
    num, var = len(draws), covariance.diagonal()
    assert largest((draws.mean(0) - mean) / (var / num).sqrt()) < 5
    error = ((torch.outer(var, var) + covariance.square()) / num).sqrt()
    assert largest((draws.T.cov() - covariance) / error) < 5


def trace_of(model, *args, **kwargs):
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return trace


def assert_block_diagonal(jacobian):
    """A Jacobian (N, N, K) is zero between different data, and nowhere zero within one."""
    num = len(jacobian)
    other = ~torch.eye(num, dtype=torch.bool)
    assert largest(jacobian[other]) == 0
    assert bool((jacobian[~other].abs().sum(-1) > 0).all())
