"""What somebody trips over in the first hour: each is an error with a reason, or simply right."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import Exact, Linear, MeanField, WrappedEncoder
from inference import compare, evidence, fit, load_pair, log_weights, pareto_k, save_pair
from zoo import PPCA, LinearVAE, WrappedDecoder, digits, linear_gaussian

X = linear_gaussian(40, 5, 2).train
QUIET = {"progress": False}


def pair(seed=0):
    torch.manual_seed(seed)
    return LinearVAE(5, 2).double(), Linear(5, 2).double()


def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optimizer": adam(0.1)},
        {"data": X.flip(1)},
        {"data": X[torch.arange(39, -1, -1)]},
        {"batch_size": 10},
    ],
    ids=["seed", "learning rate", "columns", "rows", "batch size"],
)
def test_a_checkpoint_is_not_taken_for_that_of_another_run(change, tmp_path):
    options = {"steps": 5, "seed": 0, "optimizer": adam(0.01), "checkpoint": tmp_path / "run.safetensors", **QUIET}
    fit(*pair(), X, **options)
    options = {"data": X, **options, **change}
    with pytest.raises(ValueError, match="expected a checkpoint of this run"):
        fit(*pair(), options.pop("data"), **options)


def test_a_checkpoint_of_the_same_run_is_taken(tmp_path):
    options = {"steps": 5, "seed": 0, "checkpoint": tmp_path / "run.safetensors", **QUIET}
    assert fit(*pair(), X, **options).loss == fit(*pair(), X.clone(), **options).loss


def test_more_patience_goes_on_where_less_stopped(tmp_path):
    options = {"optimizer": adam(0.3), "evaluate_every": 1, "validation": X[:5] + 1, "seed": 0}
    options |= {"checkpoint": tmp_path / "run.safetensors", "steps": 60, **QUIET}
    stopped = fit(*pair(), X, patience=1, **options)
    assert stopped.stopped_early
    resumed = fit(*pair(), X, patience=None, **options)
    assert (resumed.steps, resumed.stopped_early) == (60, False)


@pytest.mark.parametrize("steps", [50, 150])
def test_the_last_step_is_evaluated_too(steps):
    history = fit(*pair(), X, steps=steps, validation=X, evaluate_every=100, seed=0, **QUIET)
    assert history.validation[-1][0] == steps


def test_dropout_in_train_mode_is_refused_and_in_eval_mode_is_not():
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    guide = WrappedEncoder(encoder, lambda out: dist.Normal(out[..., :2], out[..., 2:].exp()).to_event(1))
    model = PPCA(5, 2)
    with pytest.raises(ValueError, match=r"got Dropout in WrappedEncoder, 'network.1' in train mode: call \.eval"):
        log_weights(model, guide, X.float(), num_samples=3)
    assert log_weights(model, guide.eval(), X.float(), num_samples=3).shape == (3, 40)


def test_a_decoder_with_two_outputs_splits_the_last_dimension():
    model = WrappedDecoder(nn.Linear(2, 10), lambda o: dist.Normal(o[..., :5], o[..., 5:].exp()).to_event(1), 5, 2)
    assert log_weights(model, MeanField(5, 2), X.float(), num_samples=3).shape == (3, 40)


def test_the_oracle_is_trusted_in_float32_too():
    x = digits().train
    model = PPCA.from_data(x, 8).float()
    k = pareto_k(log_weights(model, Exact(model), x.float(), num_samples=200)).value
    assert bool((k == -math.inf).all())


def test_a_guide_of_another_latent_dimension_is_named():
    with pytest.raises(ValueError, match=r"expected a value of event shape \(2,\) at the model's site 'z', got .*3\)"):
        log_weights(LinearVAE(5, 2), Linear(5, 3), X.float(), num_samples=3)


def test_an_autoguide_over_all_data_at_once_is_named_as_the_cause():
    model = PPCA(5, 2).double()
    with pytest.raises(ValueError, match=r"guide site '_AutoDiagonalNormal_latent' in plates \[\]"):
        log_weights(model, pyro.infer.autoguide.AutoDiagonalNormal(model), X, num_samples=3)


def test_a_model_in_closed_form_is_not_standardised_again():
    with pytest.raises(ValueError, match="got those of the maximum in closed form"):
        PPCA.from_data(X, 2).standardise_by(X)


def test_sigma_may_be_given_to_the_closed_form():
    model = PPCA.from_data(X, 2, sigma=0.7)
    assert model.sigma.item() == pytest.approx(0.7)
    assert not model.log_sigma.requires_grad
    assert model.log_evidence(X).mean() <= PPCA.from_data(X, 2).log_evidence(X).mean()
    assert LinearVAE.optimum(X, 2, sigma=0.7).linear_gaussian.W.equal(model.linear_gaussian.W)


def test_numpy_integers_are_integers():
    assert PPCA.from_data(X, np.int64(2))(n=np.int64(3)).shape == (3, 5)


def test_what_was_fixed_is_fixed_after_loading(tmp_path):
    model, guide = pair()
    model.requires_grad_(False)
    save_pair(tmp_path / "pair.safetensors", model, guide)
    loaded = load_pair(tmp_path / "pair.safetensors")
    assert [p.requires_grad for half in loaded for p in half.parameters()] == [False] * 3 + [True] * 3


def test_a_guide_without_a_method_is_a_question():
    with pytest.raises(ValueError, match="did you mean method='importance'"):
        evidence(PPCA(5, 2).double(), X, method="exact", guide=Linear(5, 2).double())


def test_bound_methods_of_one_module_are_trained_and_left_in_eval():
    class Tutorial(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(5, 2), nn.Linear(2, 5)

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))

    vae = Tutorial().double()
    before = [p.detach().clone() for p in vae.parameters()]
    fit(vae.model, vae.guide, X, steps=3, seed=0, **QUIET)
    assert not vae.training
    assert not any(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))


def test_compare_sees_unfit_data_before_it_trains():
    trained = []

    def train(seed):
        trained.append(seed)
        return Linear(5, 2).double()

    model = PPCA(5, 2).double()
    with pytest.raises(ValueError, match=r"expected (held_out of shape \(M, 5\)|x of shape \(N, 5\)), got \(40, 4\)"):
        compare(model, {"a": train}, X, held_out=X[:, :4], seeds=[0, 1], **QUIET)
    with pytest.raises(TypeError, match="expected 'a' to be a function of a seed, with seeds=, got Exact"):
        compare(model, {"a": Exact(model)}, X, seeds=[0, 1], **QUIET)
    assert not trained


def test_compare_in_blocks_is_compare_in_one(monkeypatch):
    model = PPCA.from_data(X, 2)
    guides = {"exact": Exact(model), "own": Linear(5, 2).double()}
    trees = []
    for block in (7, 2048):
        monkeypatch.setattr("inference.comparison.guide_comparison._BLOCK", block)
        trees.append(compare(model, guides, X, num_samples=50, **QUIET)["train"].to_dataset())
    for name in ("evidence", "mean_evidence", "mean_evidence_se"):
        np.testing.assert_allclose(trees[0][name], trees[1][name], rtol=1e-12)
    assert trees[0]["elbo"].dims == trees[1]["elbo"].dims
    assert trees[0].sizes == trees[1].sizes
    # The draws differ, their means agree within four standard errors.
    a, b = (tree.sel(guide="own") for tree in trees)
    error = np.hypot(np.linalg.norm(a["elbo_se"]), np.linalg.norm(b["elbo_se"]))
    assert abs(float((a["elbo"] - b["elbo"]).sum())) < 4 * error
