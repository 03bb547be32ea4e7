"""The pairs of Pyro's own examples, small and in words of our own, with the evidence of each by other means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

DOUBLE = {"dtype": torch.float64}
CLOSED, SUM, GRID, FORWARD = "a closed form", "a sum", "a grid", "a grid, forward algorithm"


@dataclass(frozen=True)
class Pair:
    """A model and guide with their data.

    Attributes:
        model: Pyro model.
        guide: Pyro guide.
        args: Arguments of both.
        known: log p of each data point by other means, (N,) in nats, or a function that gives it where the model is
            trained; None where there are no other means.
        options: Options of every door, such as ``whole=True``.
        known_by: The other means, in a word or two.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    known: Tensor | Callable[[], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    known_by: str = ""

    @property
    def truth(self) -> Tensor | None:
        """log p of each data point with the model's present parameters, (N,) in nats; None where it is not known."""
        return self.known() if callable(self.known) and not isinstance(self.known, Tensor) else self.known


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.manual_seed(seed), **DOUBLE)


def grid(log_joint: Callable[[Tensor], Tensor], dim: int = 1, width: float = 8.0, number: int = 400) -> Tensor:
    """The log of an integral over a cube by the midpoint rule: points (P, dim) to (P, N)."""
    line = (torch.arange(number, **DOUBLE) + 0.5) / number * 2 * width - width
    points = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    return log_joint(points).logsumexp(0) + dim * math.log(2 * width / number)


def beside(x: Tensor, y: Tensor) -> Tensor:
    """Two tensors as one along the last dimension, the others broadcast."""
    batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return torch.cat([x.expand(batch + x.shape[-1:]), y.expand(batch + y.shape[-1:])], -1)


class VAE(nn.Module):
    """Bound methods around float32 networks, as in the tutorial; a linear decoder keeps the evidence known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 2), x.new_ones(x.shape[0], 2)).to_event(1))
            pyro.sample("obs", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x.reshape(-1, 3))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, 0.2 + 0.2 * scale.sigmoid()).to_event(1))

    def evidence(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        w, b = self.decoder.weight.detach().double(), self.decoder.bias.detach().double()
        covariance = w @ w.T + 0.25 * torch.eye(3, **DOUBLE)
        return dist.MultivariateNormal(b + shift, covariance).log_prob(x.double())


def vae() -> Pair:
    pair, x = VAE(), noise(5, 3).float()
    return Pair(pair.model, pair.guide, (x,), lambda: pair.evidence(x), known_by=CLOSED)


def conditional_vae() -> Pair:
    pair, x, y = VAE().double(), noise(5, 3), noise(5, 3, seed=1)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(pair.decoder(z) + y, 0.5).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", pair.encoder)
        with pyro.plate("data"):
            loc, scale = pair.encoder(x - y).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, 0.2 + 0.2 * scale.sigmoid()).to_event(1))

    return Pair(model, guide, (x, y), lambda: pair.evidence(x, y), known_by=CLOSED)


CENTRES = torch.tensor([[-1.5], [0.5], [2.0]], **DOUBLE)
PRIOR = torch.tensor([0.5, 0.3, 0.2], **DOUBLE)


class SSVAE(nn.Module):
    """Labels that are observed or not: q(y | x) q(z | x, y)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.label, self.code = nn.Linear(2, 3, **DOUBLE), nn.Linear(5, 2, **DOUBLE)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("ss", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(probs=PRIOR), obs=y)
            mean = (z + y @ CENTRES).expand(*torch.broadcast_shapes(z.shape[:-1], y.shape[:-1]), 2)
            pyro.sample("x", dist.Normal(mean, 0.7).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("ss", self)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.label(x)), infer={"enumerate": "parallel"})
            joint = beside(x, y)
            loc, scale = self.code(joint).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, 0.3 + scale.sigmoid()).to_event(1))


def _of_labels(x: Tensor) -> Tensor:
    """log p(x, y) of each label, (N, 3)."""
    covariance = torch.ones(2, 2, **DOUBLE) + 0.49 * torch.eye(2, **DOUBLE)
    return dist.MultivariateNormal(CENTRES.expand(3, 2), covariance).log_prob(x.unsqueeze(1)) + PRIOR.log()


def ss_vae_labelled() -> Pair:
    pair, x = SSVAE(), noise(5, 2)
    labels = torch.tensor([0, 1, 2, 0, 1])
    y = nn.functional.one_hot(labels, 3).double()
    return Pair(pair.model, pair.guide, (x, y), _of_labels(x).gather(1, labels[:, None])[:, 0], known_by=CLOSED)


def ss_vae_unlabelled() -> Pair:
    pair, x = SSVAE(), noise(5, 2)
    return Pair(pair.model, pair.guide, (x,), _of_labels(x).logsumexp(1), known_by=SUM)


def cevae() -> Pair:
    """A latent confounder of covariates, treatment and outcome."""
    x, t, y = noise(5, 2), torch.tensor([0.0, 1, 1, 0, 1], **DOUBLE), noise(5, seed=2)
    slope = torch.tensor([0.8, -0.5], **DOUBLE)
    net = nn.Linear(4, 2, **DOUBLE)

    def model(x: Tensor, t: Tensor, y: Tensor) -> None:
        with pyro.plate("data", size=len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * slope, 1.0).to_event(1), obs=x)
            pyro.sample("t", dist.Bernoulli(logits=z), obs=t)
            pyro.sample("y", dist.StudentT(5.0, t + z, 0.5), obs=y)

    def guide(x: Tensor, t: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", size=len(x), subsample=x):
            loc, scale = net(torch.cat([x, t.unsqueeze(-1), y.unsqueeze(-1)], -1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, 0.3 + scale.sigmoid()))

    def joint(z: Tensor) -> Tensor:
        return (
            dist.Normal(0.0, 1.0).log_prob(z)
            + dist.Normal(z.unsqueeze(-1) * slope, 1.0).log_prob(x).sum(-1)
            + dist.Bernoulli(logits=z).log_prob(t)
            + dist.StudentT(5.0, t + z, 0.5).log_prob(y)
        )

    return Pair(model, guide, (x, t, y), grid(joint), known_by=GRID)


def deep_markov_model() -> Pair:
    """Sequences of unequal length, masked; linear, so that what is observed is jointly Gaussian."""
    x, lengths = noise(4, 3), torch.tensor([3, 2, 3, 1])
    mask = torch.arange(3) < lengths[:, None]
    net = nn.Linear(2, 2, **DOUBLE)

    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x))
            for t in range(3):
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z, 0.6))
                    pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])

    def guide(x: Tensor, mask: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x))
            for t in range(3):
                with poutine.mask(mask=mask[:, t]):
                    out = net(torch.stack(torch.broadcast_tensors(z, x[:, t]), -1))
                    z = pyro.sample(f"z_{t}", dist.Normal(out[..., 0], 0.2 + out[..., 1].sigmoid()))

    walk = torch.tensor([[1, 0, 0], [0.8, 1, 0], [0.64, 0.8, 1]], **DOUBLE)
    covariance = 0.36 * walk @ walk.T + 0.25 * torch.eye(3, **DOUBLE)
    parts = [
        dist.MultivariateNormal(torch.zeros(n, **DOUBLE), covariance[:n, :n]).log_prob(r[:n])
        for r, n in zip(x, lengths)
    ]
    return Pair(model, guide, (x, mask), torch.stack(parts), known_by=CLOSED)


class ScANVI(nn.Module):
    """Counts of genes given a latent, a label and a cell's size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.gain = torch.tensor([0.6, -0.4], **DOUBLE)
        self.label, self.code = nn.Linear(2, 3, **DOUBLE), nn.Linear(5, 2, **DOUBLE)

    def rate(self, z: Tensor) -> Tensor:
        return (1.0 + z.unsqueeze(-1) * self.gain).exp()

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(probs=PRIOR), obs=y)
            z = pyro.sample("z", dist.Normal((y @ CENTRES)[..., 0], 1.0))
            pyro.sample("x", dist.Poisson(self.rate(z)).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)):
            h = (1 + x).log()
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.label(h)), infer={"enumerate": "parallel"})
            loc, scale = self.code(beside(h, y)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, 0.4 + scale.sigmoid()))

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x, y) of each label, (N, 3)."""

        def joint(z: Tensor) -> Tensor:
            prior = dist.Normal(CENTRES[:, 0], 1.0).log_prob(z) + PRIOR.log()
            likelihood = dist.Poisson(self.rate(z)).log_prob(x.unsqueeze(1).unsqueeze(1)).sum(-1)
            return (likelihood.movedim(1, 0) + prior.unsqueeze(1)).flatten(1)

        return grid(joint).view(len(x), 3)


COUNTS = torch.tensor([[3.0, 2], [1, 4], [7, 0], [2, 2]], **DOUBLE)


def scanvi_labelled() -> Pair:
    pair, labels = ScANVI(), torch.tensor([0, 1, 2, 1])
    y = nn.functional.one_hot(labels, 3).double()
    truth = pair.evidence(COUNTS).gather(1, labels[:, None])[:, 0]
    return Pair(pair.model, pair.guide, (COUNTS, y), truth, {"plate": "batch"}, GRID)


def scanvi_unlabelled() -> Pair:
    pair = ScANVI()
    truth = pair.evidence(COUNTS).logsumexp(1)
    return Pair(pair.model, pair.guide, (COUNTS,), truth, {"plate": "batch"}, GRID)


def prod_lda() -> Pair:
    """Topics of documents by a logistic-normal distribution, with batch normalisation in the decoder."""
    torch.manual_seed(3)
    words = torch.tensor([[3.0, 0, 2], [1, 4, 1], [0, 0, 5], [2, 2, 2]], **DOUBLE)
    beta, norm = nn.Linear(2, 3, bias=False, **DOUBLE), nn.BatchNorm1d(3, affine=False, **DOUBLE).eval()
    encoder = nn.Linear(3, 4, **DOUBLE)

    def probabilities(theta: Tensor) -> Tensor:
        return norm(beta(theta.softmax(-1))).softmax(-1)

    def model(docs: Tensor) -> None:
        pyro.module("decoder", beta)
        with pyro.plate("documents", len(docs)):
            theta = pyro.sample("logtheta", dist.Normal(docs.new_zeros(len(docs), 2), 1.0).to_event(1))
            total = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total, probabilities(theta)), obs=docs)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("documents", len(docs)):
            loc, scale = encoder(docs).chunk(2, -1)
            pyro.sample("logtheta", dist.Normal(0.1 * loc, 0.5 + scale.sigmoid()).to_event(1))

    def joint(theta: Tensor) -> Tensor:
        likelihood = dist.Multinomial(6, probabilities(theta).unsqueeze(1), validate_args=False).log_prob(words)
        return dist.Normal(0.0, 1.0).log_prob(theta).sum(-1, keepdim=True) + likelihood

    def truth() -> Tensor:
        return grid(joint, 2, 6.0, 150).detach()

    return Pair(model, guide, (words,), truth, {"plate": "documents"}, GRID)


def eight_schools() -> Pair:
    """Effects of coaching in eight schools, centred on a common mean; all data are one data point."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], **DOUBLE)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], **DOUBLE)

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25 * y.new_ones(())))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    def joint(u: Tensor) -> Tensor:  # over log tau, mu integrated out in closed form
        tau = (u * 1.5).exp()
        covariance = torch.diag_embed(tau.square() + sigma.square()) + 100.0
        prior = dist.HalfCauchy(torch.tensor(25.0, **DOUBLE)).log_prob(tau) + tau.log() + math.log(1.5)
        return (dist.MultivariateNormal(0 * y, covariance).log_prob(y) + prior[:, 0]).unsqueeze(-1)

    guide = _drawn(AutoNormal(model, init_scale=0.5), y, sigma)
    return Pair(model, guide, (y, sigma), grid(joint, 1, 8.0, 4000), {"whole": True}, GRID)


def _drawn(guide: Any, *args: Any) -> Any:
    """An AutoGuide with parameters, which it gets when it is first called."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    guide(*args)
    return guide.double()


def sparse_gamma_def() -> Pair:
    """A deep exponential family of gammas over counts, with an AutoNormal."""
    counts = torch.tensor([[1.0, 4], [0, 2], [3, 3]], **DOUBLE)

    def model(x: Tensor) -> None:
        one = x.new_ones(())
        with pyro.plate("topics", 2, dim=-1):
            w = pyro.sample("w", dist.Gamma(0.6 * one, 0.3 * one))
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Gamma(0.8 * one, 0.5 * one))
            with pyro.plate("columns", 2, dim=-1):
                pyro.sample("x", dist.Poisson(z * w + 0.01), obs=x)

    log_z = torch.arange(-50.0, 8.0, 0.05, **DOUBLE)  # of z, and of each w
    z = log_z.exp()
    prior, weight = (dist.Gamma(a, b).log_prob(z) + log_z + math.log(0.05) for a, b in ((0.8, 0.5), (0.6, 0.3)))
    likelihood = dist.Poisson(torch.outer(z, z) + 0.01).log_prob(counts[..., None, None]).exp()  # (row, column, w, z)
    rows = ((likelihood[:, 0] * prior.exp()) @ likelihood[:, 1].mT).log().sum(0)
    truth = (rows + weight + weight.unsqueeze(-1)).flatten().logsumexp(0).reshape(1)
    guide = _drawn(AutoNormal(model, init_loc_fn=autoguide.init_to_feasible, init_scale=0.3), counts)
    return Pair(model, guide, (counts,), truth, {"whole": True}, GRID)


def air_core() -> Pair:
    """One step of Attend, Infer, Repeat: is there an object, and where is it?"""
    x = noise(4, 3)
    shape, net = torch.tensor([1.0, 2.0, 1.0], **DOUBLE), nn.Linear(3, 3, **DOUBLE)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            present = pyro.sample("present", dist.Bernoulli(0.4 * x.new_ones(())))
            where = pyro.sample("where", dist.Normal(x.new_zeros(()), 1.0))
            picture = (present * where).unsqueeze(-1) * shape
            pyro.sample("x", dist.Normal(picture, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            out = net(x)
            pyro.sample("present", dist.Bernoulli(logits=out[..., 0]), infer={"enumerate": "parallel"})
            pyro.sample("where", dist.Normal(out[..., 1], 0.3 + out[..., 2].sigmoid()))

    eye = 0.25 * torch.eye(3, **DOUBLE)
    there = dist.MultivariateNormal(0 * shape, shape.outer(shape) + eye).log_prob(x) + math.log(0.4)
    absent = dist.MultivariateNormal(0 * shape, eye).log_prob(x) + math.log(0.6)
    return Pair(model, guide, (x,), torch.logaddexp(there, absent), known_by=SUM)


def gaussian_mixture() -> Pair:
    """Two components with unknown means, the assignments summed out."""
    x = torch.tensor([-2.0, -1.4, 1.2, 2.3, 1.9], **DOUBLE)

    def model(x: Tensor) -> None:
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(x.new_tensor([0.4, 0.6])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(Vindex(locs.unsqueeze(-2))[..., k], 0.8), obs=x)

    def joint(locs: Tensor) -> Tensor:
        parts = dist.Normal(locs.unsqueeze(-1), 0.8).log_prob(x) + torch.tensor([[0.4], [0.6]], **DOUBLE).log()
        return (parts.logsumexp(-2).sum(-1) + dist.Normal(0.0, 2.0).log_prob(locs).sum(-1)).unsqueeze(-1)

    guide = _drawn(AutoNormal(poutine.block(model, hide=["k"]), init_scale=0.4), x)
    return Pair(model, guide, (x,), grid(joint, 2, 10.0, 400), {"whole": True}, GRID)


def hidden_markov_model() -> Pair:
    """A chain of two states with one unknown level of emission, the states summed out."""
    x = torch.tensor([0.3, 1.8, 2.2, -0.4], **DOUBLE)
    step = torch.tensor([[0.7, 0.3], [0.4, 0.6]], **DOUBLE)

    def model(x: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(x.new_zeros(()), 2.0))
        state: Any = 0
        for t in pyro.markov(range(len(x))):
            state = pyro.sample(f"s_{t}", dist.Categorical(Vindex(step)[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(level * state, 0.7), obs=x[t])

    def joint(level: Tensor) -> Tensor:
        emission = dist.Normal(level.unsqueeze(-1) * torch.tensor([0.0, 1.0], **DOUBLE), 0.7)
        alpha = step[0].log() + emission.log_prob(x[0])[:, 0]
        for value in x[1:]:
            alpha = (alpha.unsqueeze(-1) + step.log()).logsumexp(-2) + emission.log_prob(value)[:, 0]
        return alpha.logsumexp(-1, keepdim=True) + dist.Normal(0.0, 2.0).log_prob(level)

    guide = _drawn(AutoNormal(poutine.block(model, expose=["level"]), init_scale=0.5), x)
    return Pair(model, guide, (x,), grid(joint, 1, 15.0, 2000), {"whole": True}, FORWARD)


def regression() -> Pair:
    """Linear regression as everyone writes it, with a guide of full rank."""
    x = noise(10, 2)
    y = x @ torch.tensor([1.0, -0.5], **DOUBLE) + 0.5 * noise(10, seed=5)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("points", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    truth = dist.MultivariateNormal(0 * y, x @ x.T + 0.25 * torch.eye(10, **DOUBLE)).log_prob(y)
    guide = _drawn(AutoMultivariateNormal(model), x, y)
    return Pair(model, guide, (x, y), truth.reshape(1), {"whole": True}, CLOSED)


PAIRS: dict[str, Callable[[], Pair]] = {
    "VAE": vae,
    "conditional VAE": conditional_vae,
    "semi-supervised VAE, labelled": ss_vae_labelled,
    "semi-supervised VAE, unlabelled": ss_vae_unlabelled,
    "CEVAE": cevae,
    "deep Markov model": deep_markov_model,
    "scANVI, labelled": scanvi_labelled,
    "scANVI, unlabelled": scanvi_unlabelled,
    "ProdLDA": prod_lda,
    "eight schools": eight_schools,
    "sparse gamma DEF": sparse_gamma_def,
    "AIR": air_core,
    "Gaussian mixture": gaussian_mixture,
    "hidden Markov model": hidden_markov_model,
    "regression": regression,
}
