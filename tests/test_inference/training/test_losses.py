"""Every loss that stock SVI takes trains by fit: to the optimum of a conjugate model, whatever its methods."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from torch.optim.lr_scheduler import ExponentialLR

from inference import ELBO, fit

torch.manual_seed(0)
X = torch.randn(8, dtype=torch.float64)


class Model(torch.nn.Module):
    """A latent for each data point, around a mean that is learnt; without param statements."""

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mean.expand(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(torch.nn.Module):
    """The exact family: half of x and of the mean."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.shift, 0.5**0.5))


LOSSES = {
    "Trace_ELBO": lambda: infer.Trace_ELBO(num_particles=4),
    "TraceMeanField_ELBO": lambda: infer.TraceMeanField_ELBO(),
    "TraceGraph_ELBO": lambda: infer.TraceGraph_ELBO(num_particles=4),
    "RenyiELBO": lambda: infer.RenyiELBO(alpha=0.0, num_particles=4, vectorize_particles=True),
    "ReweightedWakeSleep": lambda: infer.ReweightedWakeSleep(num_particles=4),
    "Subclass": lambda: type("Subclass", (infer.Trace_ELBO,), {})(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_stock_pyro_reach_a_conjugate_model_s_optimum(name):
    model, guide = Model(), Guide()
    options = {"optimizer": lambda p: torch.optim.Adam(p, 0.1), "scheduler": lambda o: ExponentialLR(o, 0.985)}
    history = fit(model, guide, X, steps=300, objective=LOSSES[name](), seed=0, progress=False, **options)
    # The rate falls slowly enough to average over 60 steps, of 8 data points with a gradient of variance one half.
    error = 4 * (0.5 / 8 / 60) ** 0.5
    assert abs(float((model.mean - X.mean()).detach())) < error
    assert abs(float((guide.shift - model.mean / 2).detach())) < error
    assert len(history.loss) == 300


@pytest.mark.parametrize("make", [lambda: infer.RenyiELBO(alpha=0.5, num_particles=3), infer.TraceGraph_ELBO])
def test_the_gradient_of_a_step_is_stock_pyro_s_per_data_point(make):
    model, guide, twin = Model(), Guide(), Model()
    history = fit(model, guide, X, steps=1, objective=make(), seed=3, progress=False)

    def named(x):
        pyro.module("twin", twin)
        return twin(x)

    with pyro.get_param_store().scope():
        torch.manual_seed(3)
        torch.randint(2**31, ())  # the order of mini-batches
        loss = make().loss_and_grads(named, Guide(), X)
    assert history.loss[0] == pytest.approx(loss / 8, rel=1e-12)
    torch.testing.assert_close(model.mean.grad, twin.mean.grad / 8)


def mixture(x):
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gap = pyro.param("gap", torch.ones((), dtype=torch.float64))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(shares), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(gap * c, 1.0), obs=x)


def nothing(x):
    """No latent is left."""


@pytest.mark.parametrize("make", [lambda: infer.TraceEnum_ELBO(max_plate_nesting=1), ELBO])
def test_a_mixture_is_trained_to_its_maximum_likelihood(make):
    pyro.clear_param_store()
    fit(
        mixture,
        nothing,
        X,
        steps=300,
        objective=make(),
        seed=0,
        progress=False,
        optimizer=lambda p: torch.optim.Adam(p, 0.05),
    )
    gaps = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    parts = [w * dist.Normal(m, 1.0).log_prob(X[:, None]).exp() for w, m in ((0.3, 0 * gaps), (0.7, gaps))]
    best = gaps[sum(parts).log().sum(0).argmax()]
    assert abs(float(pyro.param("gap").detach() - best)) < 2e-3  # the grid's step, twice
    pyro.clear_param_store()


def test_a_loss_without_gradient_is_refused_by_name():
    class Still(infer.Trace_ELBO):
        def loss_and_grads(self, model, guide, *args):  # noqa: ARG002
            return 0.0

    with pytest.raises(ValueError, match="expected Still to give a gradient, got none"):
        fit(Model(), Guide(), X, steps=1, objective=Still(), progress=False)
