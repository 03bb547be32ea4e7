"""Pairs of several arguments at the doors that look at data: the numbers of the same pair of one argument."""

import pyro
import pyro.distributions as dist
import torch

from inference import compare, fit, latent_kl, log_weights, mutual_information, posterior_error

QUIET = {"seed": 0, "progress": False}
X = torch.randn(8, 1, generator=torch.manual_seed(0), dtype=torch.float64)
Y = torch.randn(8, 1, generator=torch.manual_seed(1), dtype=torch.float64)


def model(x, y):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + y, 0.5).to_event(1), obs=x)


def guide(x, y):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.8 * (x - y), 0.2**0.5).to_event(1))


def of_difference(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def guide_of_difference(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5).to_event(1))


def test_doors_take_all_arguments_of_a_pair():
    for door, options in ((latent_kl, {}), (mutual_information, {"num_samples": 3, "seed": 0})):
        for block in (None, 3):
            settings = {"plate": "rows", "progress": False, "block": block, **options}
            got = door(model, guide, X, y=Y, **settings)
            expected = door(of_difference, guide_of_difference, X - Y, **settings)
            if door is mutual_information:
                got, expected = got.per_datum, expected.per_datum
            torch.testing.assert_close(got, expected)


def test_a_posterior_error_takes_all_arguments_of_a_pair():
    truth = dist.Normal(Y[:, 0], 1.25**0.5).log_prob(X[:, 0])
    draws = {"z": 0.8 * (X - Y) + 0.2**0.5 * torch.randn(500, 8, 1, dtype=torch.float64)}
    found = posterior_error(model, guide, X, Y, reference=draws, log_evidence=truth, plate="rows", seed=0)
    assert float(found.kl.value.abs().max()) < 1e-9


def test_a_comparison_splits_all_rows_of_a_conditional_pair():
    truth = dist.Normal(Y[:, 0], 1.25**0.5).log_prob(X[:, 0]).numpy()
    held_out = (X.flip(0), Y.flip(0))
    tree = compare(model, {"own": guide}, (X, Y), held_out=held_out, block=3, num_samples=5, plate="rows", **QUIET)
    assert abs(tree["train"]["evidence"].values[0, 0] - truth).max() < 1e-9
    assert abs(tree["held_out"]["evidence"].values[0, 0] - truth[::-1]).max() < 1e-9


def test_dictionaries_integers_and_shared_arguments_train():
    """Rows stand in a dictionary and in labels; centres, as many as there are rows of a mini-batch, are shared."""
    centres = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    data = {"x": X, "unused": Y}
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def labelled(batch, label, centres):
        with pyro.plate("data", len(label)):
            z = pyro.sample("z", dist.Normal(centres[label], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=batch["x"][:, 0])

    def encoder(batch, label, centres):
        a, b = (pyro.param(name, torch.zeros((), dtype=torch.float64)) for name in "ab")
        with pyro.plate("data", len(label)):
            pyro.sample("z", dist.Normal(a * batch["x"][:, 0] + b * centres[label], 0.2**0.5))

    pyro.clear_param_store()
    options = {"steps": 400, "batch_size": 3, "optimizer": lambda p: torch.optim.Adam(p, lr=0.03), **QUIET}
    fit(labelled, encoder, (data, labels, centres), **options)
    store = pyro.get_param_store()
    assert abs(float(store["a"].detach()) - 0.8) < 0.1
    assert abs(float(store["b"].detach()) - 0.2) < 0.1
    truth = dist.Normal(centres[labels], 1.25**0.5).log_prob(X[:, 0])
    weights = log_weights(labelled, encoder, data, labels, centres, num_samples=200, **QUIET)
    assert float((weights.mean(0) - truth).abs().max()) < 0.5
