"""Which arguments are rows of data: found by what the density of some rows is, with shared ones of as many rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import MeanField
from inference import LogJoint, evidence, gap, refit
from inference.pair.call import Call
from inference.pair.rows import with_known_rows

torch.manual_seed(0)
X = torch.randn(6, 6, dtype=torch.float64)
SIGMA = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
TRUTH = dist.MultivariateNormal(torch.zeros(6).double(), torch.ones(6, 6).double() + torch.diag(SIGMA**2)).log_prob(X)
QUIET = {"seed": 0, "progress": False}


def model(x, sigma, shift=None):
    """One latent for each data point, noise of each feature, and perhaps a shift of each data point."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        mean = z.unsqueeze(-1) if shift is None else z.unsqueeze(-1) + shift.unsqueeze(-1)
        pyro.sample("x", dist.Normal(mean, sigma).to_event(1), obs=x)


@pytest.mark.parametrize("method", ["quadrature", "laplace", "adaptive", "bridge"])
@pytest.mark.parametrize("block", [None, 4])
def test_a_shared_argument_with_as_many_rows_as_data_is_not_cut(method, block):
    for arguments, named in (((X, SIGMA), {}), ((X,), {"sigma": SIGMA})):
        got = evidence(model, *arguments, method=method, block=block, **QUIET, **named)
        assert bool(((got.value - TRUTH).abs() < 1e-8 + 5 * got.standard_error).all())


def test_rows_are_found_among_several_arguments():
    shift = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    log_joint = LogJoint(model, X, SIGMA, shift=shift)
    assert log_joint.rows(torch.tensor([2, 0]))._call.row_arguments == {0, "shift"}
    u = torch.randn(7, 6, 1, dtype=torch.float64)
    index = torch.tensor([5, 1, 1])
    torch.testing.assert_close(log_joint.rows(index)(u[:, index]), log_joint(u)[:, index])


def test_named_rows_are_taken_and_checked():
    shift = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    found = evidence(model, X, SIGMA, shift=shift, method="laplace", block=4, **QUIET)
    named = evidence(model, X, SIGMA, shift=shift, rows=[0, "shift"], method="laplace", block=4, **QUIET)
    torch.testing.assert_close(named.value, found.value)
    for wrong in ([0], [0, 1, "shift"]):
        with pytest.raises(ValueError, match=r"^expected the density of some of the 6 rows, .* with rows=\[0"):
            evidence(model, X, SIGMA, shift=shift, rows=wrong, method="laplace", block=4, **QUIET)
    with pytest.raises(ValueError, match=r"^expected rows to name arguments .* \(\[0, 1, 'shift'\]\), got \['scale'\]"):
        evidence(model, X, SIGMA, shift=shift, rows=[0, "scale"], method="laplace", block=4, **QUIET)


class OfTwo(nn.Module):
    """A guide that is given the noise as well, and does not need it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, sigma):  # noqa: ARG002
        return self.inner(x)

    def local(self, x, sigma):  # noqa: ARG002
        return OfTwo(self.inner.local(x))


def vector_model(x, sigma):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, sigma).to_event(1), obs=x)


@pytest.mark.parametrize("door", [gap, refit])
def test_rows_named_wrongly_are_refused_where_guides_are_refitted(door):
    guide = OfTwo(MeanField(6, 1, hidden=(4,)).double())
    options = {"restarts": 0, "max_steps": 2, "num_samples": 8, **QUIET}
    assert len(door(vector_model, guide, X, SIGMA, rows=[0], **options).elbo) == 6
    with pytest.raises(ValueError, match=r"^expected the density of some of the 6 rows, .* with rows=\[0, 1\]"):
        door(vector_model, guide, X, SIGMA, rows=[0, 1], **options)


def test_finding_rows_leaves_the_random_state_and_is_done_once():
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        model(x, sigma)

    log_joint = LogJoint(counted, X, SIGMA)
    state = torch.random.get_rng_state()
    first = log_joint.rows(torch.tensor([0]))
    assert torch.equal(torch.random.get_rng_state(), state)
    spent = len(calls)
    log_joint.rows(torch.tensor([1]))
    first.rows(torch.tensor([0, 0]))
    assert len(calls) == spent


def held_outside(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + SIGMA, 1.0), obs=x)


def of_constant_size(x):
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def coupled(x):
    """The density of each data point depends on the whole batch: no rows make sense by themselves."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1 + x.var()), obs=x)


@pytest.mark.parametrize(
    ("program", "block"), [(held_outside, 4), (of_constant_size, 4), (coupled, None), (coupled, 4)]
)
def test_rows_that_are_not_the_whole_run_s_are_refused(program, block):
    with pytest.raises(ValueError, match=r"^expected the density of some of the 6 rows, run by themselves, .* size"):
        evidence(program, X[:, 0], method="adaptive", block=block, **QUIET)


@pytest.mark.parametrize("method", ["quadrature", "laplace", "adaptive", "bridge"])
@pytest.mark.parametrize(("program", "mean"), [(held_outside, SIGMA), (of_constant_size, 0 * SIGMA)])
def test_points_of_rows_that_cannot_be_run_alone_go_along_samples(program, mean, method):
    got = evidence(program, X[:, 0], method=method, **QUIET)
    truth = dist.Normal(mean, 2**0.5).log_prob(X[:, 0])
    assert bool(((got.value - truth).abs() < 1e-8 + 5 * got.standard_error).all())


def test_latents_of_other_data_points_in_a_density_are_refused():
    def neighbours(x):
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + z.roll(1, -1), 1.0), obs=x)

    with pytest.raises(ValueError, match="to depend on its own latents alone"):
        evidence(neighbours, X[:, 0], method="laplace", **QUIET)


def test_a_guide_whose_rows_are_others_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(), 1.0))

    def plain(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    call = Call(plain, guide, (X[:, 0],))
    with pytest.raises(ValueError, match="guide's log-density"):
        with_known_rows(call, call.probe())


class OnlyModules(torch.nn.Module):
    """A float32 network whose model is a bound method, as in Pyro's tutorials."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 3)

    def model(self, x):
        pyro.module("decoder", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)


def test_a_bound_method_is_converted_through_its_module():
    vae, x = OnlyModules(), torch.randn(4, 3)
    w, b = vae.net.weight.detach().double(), vae.net.bias.detach().double()
    truth = dist.MultivariateNormal(b, w @ w.T + 0.25 * torch.eye(3)).log_prob(x.double())
    got = evidence(vae.model, x, method="quadrature", **QUIET)
    torch.testing.assert_close(got.value, truth, rtol=0, atol=1e-7)
    assert vae.net.weight.dtype == torch.float32


def test_a_float32_network_in_a_function_is_refused_with_the_remedy():
    vae = OnlyModules()
    for method in ("quadrature", "laplace", "adaptive", "bridge"):
        with pytest.raises(ValueError, match=r"expected a model in torch.float64, .* call .double\(\)"):
            evidence(lambda x: vae.model(x), torch.randn(4, 3), method=method, **QUIET)
