"""Training on several ranks: the same steps as on one, one writer, and a sentence where a rank is lost."""

import os
import signal

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from several_ranks import collect, errors_on_ranks, on_ranks, start
from torch import nn

from guides import Linear, MeanField
from inference import (
    BILBO,
    ELBO,
    IWELBO,
    AnalyticELBO,
    AnalyticKLELBO,
    AnalyticTargetRate,
    Callback,
    FittedPrior,
    FreeBitsELBO,
    SampledTargetRate,
    TargetRate,
    fit,
    fit_many,
)
from zoo import DeepGaussianVAE, LinearVAE, OptimalNoise

N, D, K = 26, 5, 2
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Network(nn.Module):
    """A pair's half with a layer that is given."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, 8), *layers, nn.Linear(8, 2 * K)).double()

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, log_sigma = self.layers(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_sigma.exp()).to_event(1))


class Discrete(nn.Module):
    """A mixture of two: its guide draws the component."""

    def __init__(self, guide):
        super().__init__()
        self.free = nn.Parameter(torch.zeros(2, D, dtype=torch.float64))
        self.guide = guide

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if self.guide:
                return pyro.sample("c", dist.Categorical(logits=x @ self.free.T))
            c = pyro.sample("c", dist.Categorical(x.new_ones(2)))
            return pyro.sample("x", dist.Normal(self.free[c], 1.0).to_event(1), obs=x)


def linear():
    return LinearVAE(D, K).double(), Linear(D, K).double()


def deep():
    return DeepGaussianVAE(D, K, hidden=(8,)).double(), MeanField(D, K, hidden=(8,)).double()


PAIRS = {
    "linear": linear,
    "deep": deep,
    "optimal noise": lambda: (DeepGaussianVAE(D, K, hidden=(8,), noise=OptimalNoise()).double(), deep()[1]),
    "batch normalisation": lambda: (linear()[0], Network(nn.BatchNorm1d(8))),
    "dropout": lambda: (linear()[0], Network(nn.Dropout(0.5))),
    "floating prior": lambda: (FittedPrior(linear()[0], K), deep()[1]),
    "discrete": lambda: (Discrete(False), Discrete(True)),
}
OBJECTIVES = {
    "closed form": (AnalyticELBO, "linear"),
    "closed form at a rate": (lambda: AnalyticTargetRate(0.5), "linear"),
    "ELBO": (ELBO, "deep"),
    "IWELBO": (lambda: IWELBO(3), "deep"),
    "free bits": (lambda: FreeBitsELBO(0.3), "deep"),
    "rate": (lambda: TargetRate(0.5), "deep"),
    "sampled rate": (lambda: SampledTargetRate(0.5), "deep"),
    "optimal noise": (ELBO, "optimal noise"),
    "Pyro's": (pyro.infer.Trace_ELBO, "deep"),
}
STEPS = {"steps": 6, "seed": 3, "batch_size": 8, "progress": False}  # the last batch of an epoch has two rows


def parameters(pair):
    return torch.cat([p.detach().flatten() for half in pair for p in half.parameters()])


def trained(objective, name, **options):
    """Parameters, losses and validation losses; each rank begins with other parameters."""
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    pair = PAIRS[name]()
    history = fit(*pair, X, objective=objective(), **STEPS | {"validation": X[:7], "evaluate_every": 3} | options)
    return parameters(pair), torch.tensor(history.loss), torch.tensor(history.validation)


def trained_by_each():
    return {name: trained(make, pair) for name, (make, pair) in OBJECTIVES.items()}


def test_two_ranks_take_the_steps_of_one(tmp_path):
    expected, found = trained_by_each(), on_ranks(trained_by_each, 2, tmp_path)
    for name in OBJECTIVES:
        for rank in found:
            for got, want in zip(rank[name], expected[name], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4])
def test_any_number_of_ranks_takes_the_steps_of_one(size, tmp_path):
    expected, found = trained_in_full(), on_ranks(trained_in_full, size, tmp_path)
    for rank in found:
        for got, want in zip(rank, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def trained_in_full():
    return [trained(*OBJECTIVES[name], batch_size=None) for name in ("closed form", "ELBO", "free bits")]


def trained_together():
    torch.manual_seed(4)
    pairs = [deep() for _ in range(2)]
    fit_many(pairs, X, objective=AnalyticKLELBO(), **STEPS)
    return torch.stack([parameters(pair) for pair in pairs])


def test_many_pairs_at_once_are_shared_among_ranks(tmp_path):
    for found in on_ranks(trained_together, 2, tmp_path):
        torch.testing.assert_close(found, trained_together(), rtol=1e-10, atol=1e-10)


def trained_with(name):
    return trained(ELBO if name != "floating prior" else BILBO, name)


def trained_in_small_batches():
    return trained(ELBO, "deep", batch_size=1)


def trained_whole():
    return trained(ELBO, "deep", whole=True, batch_size=None, validation=None)


def trained_on_other_data():
    x = X + torch.distributed.get_rank()
    return fit(*linear(), x, **STEPS)


def refused():
    """The texts of the errors, one after the other in the same processes."""
    found = []
    for case in (
        lambda: trained_with("batch normalisation"),
        lambda: trained_with("floating prior"),
        trained_in_small_batches,
        trained_whole,
        trained_on_other_data,
    ):
        try:
            case()
            found.append("nothing")
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_shared_is_refused_by_name_on_all_ranks(tmp_path):
    for norm, prior, small, whole, data in on_ranks(refused, 2, tmp_path):
        assert "expected modules that treat each row by itself on several ranks, got BatchNorm1d" in norm
        assert "expected an objective and a pair whose loss of a batch is the sum over its rows" in prior
        assert "of at least 3 rows for 2 ranks, got one of 1" in small
        assert "expected rows of data to share among 2 ranks, got whole=True" in whole
        assert "expected the same data on all 2 ranks" in data


def trained_with_other_noise():
    return trained(ELBO, "dropout"), trained(pyro.infer.TraceGraph_ELBO, "discrete", validation=None)


def test_noise_by_parameters_leaves_the_ranks_in_step(tmp_path):
    first, second = on_ranks(trained_with_other_noise, 2, tmp_path)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert bool(one[1].isfinite().all())


class Killer:
    """A hook that ends its process after some calls."""

    calls = 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls > 20:
            os.kill(os.getpid(), signal.SIGKILL)


def trained_until_a_rank_is_killed(folder):
    torch.manual_seed(torch.distributed.get_rank())
    model, guide = deep()
    if torch.distributed.get_rank() == 1:
        calls = []
        guide.register_forward_hook(
            lambda *_: calls.append(1) or (len(calls) > 20 and os.kill(os.getpid(), signal.SIGKILL))
        )
    fit(model, guide, X, checkpoint=f"{folder}/run", checkpoint_every=1, **STEPS | {"steps": 60})


def resumed(folder):
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    pair = deep()
    history = fit(*pair, X, checkpoint=f"{folder}/run", checkpoint_every=1, **STEPS | {"steps": 60})
    return parameters(pair), history.steps


def test_a_killed_rank_ends_the_others_and_the_run_resumes(tmp_path):
    (found,) = collect(*start(trained_until_a_rank_is_killed, 2, tmp_path / "first", str(tmp_path)), 1).values()
    assert found[0].startswith("RankLost: expected all ranks to go on, but another one has ended")
    (tmp_path / "alone").mkdir()
    expected, _ = resumed(tmp_path / "alone")
    for got, steps in on_ranks(resumed, 2, tmp_path / "second", str(tmp_path)):
        assert steps == 60
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


class Stop(Callback):
    """Stops the run, and notes in which process it was asked."""

    def __init__(self, folder):
        self.folder = folder

    def on_step(self, moment):
        (self.folder / f"{os.getpid()}").touch()
        return moment.step == 3


def stopped(folder):
    return fit(*deep(), X, callbacks=[Stop(folder)], **STEPS).steps


def test_callbacks_run_on_the_first_rank_alone_and_stop_all(tmp_path):
    (tmp_path / "called").mkdir()
    assert on_ranks(stopped, 2, tmp_path, tmp_path / "called") == [3, 3]
    assert len(list((tmp_path / "called").iterdir())) == 1


def broken_callback():
    class Broken(Callback):
        def on_step(self, _):
            raise ArithmeticError("no such number")

    fit(*deep(), X, callbacks=[Broken()], **STEPS)


def test_an_error_on_the_first_rank_is_an_error_on_all(tmp_path):
    assert errors_on_ranks(broken_callback, 2, tmp_path) == ["ArithmeticError: no such number"] * 2
