"""The near-deterministic VAE: its distribution, its precision in training, and the choice among seeds."""

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.optim.lr_scheduler import LambdaLR

from guides import MeanField
from inference import (
    AnalyticKLELBO,
    AnnealedPrecision,
    GeometricAnnealing,
    Importance,
    elbo,
    evidence,
    fit,
    fit_best,
    gap,
    log_weights,
)
from zoo import IMAVAE, LinearVAE, Uniform


def linear_network(weight):
    network = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    network.weight.data = weight.clone()
    return network


SHEAR = torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=torch.float64)


def test_the_likelihood_is_the_stated_normal_in_data_units():
    rows = 3 + 2 * torch.randn(50, 3).double()
    model = IMAVAE(3, 2, gamma2=25.0).double().standardise_by(rows)
    z, x = torch.randn(4, 2).double(), torch.randn(4, 3).double()
    scale = math.sqrt(float((rows - rows.mean(0)).square().mean()))
    mean = rows.mean(0) + scale * model.network(z)
    expected = scipy.stats.norm.logpdf(x.numpy(), mean.detach().numpy(), scale / 5).sum(1)
    np.testing.assert_allclose(model.likelihood(z).log_prob(x).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("gamma2", [1.0, 1e4, 1e8])
def test_with_a_linear_network_it_is_the_linear_vae(gamma2):
    model = IMAVAE(2, 2, gamma2=gamma2, network=linear_network(SHEAR)).double()
    linear = LinearVAE(2, 2, sigma=1 / math.sqrt(gamma2)).double()
    linear.W.data = SHEAR
    z = torch.randn(6, 2).double()
    x = (z @ SHEAR.mT + torch.randn(6, 2).double() / math.sqrt(gamma2)).detach()
    expected = linear.likelihood(z).log_prob(x).detach()
    torch.testing.assert_close(model.likelihood(z).log_prob(x).detach(), expected, rtol=1e-6, atol=1e-6)


def test_svi_finds_the_posterior_that_theory_predicts():
    # W = [[1, .8], [0, .6]], gamma^2 = 100, x = (.7, -1.1): variances 1 / M_kk = 1 / 101
    model = IMAVAE(2, 2, gamma2=100.0, network=linear_network(SHEAR)).double().requires_grad_(False)
    x = torch.tensor([[0.7, -1.1]], dtype=torch.float64)
    guide = MeanField(2, 2, hidden=()).double()
    steps = 1500
    fit(
        model,
        guide,
        x,
        steps=steps,
        objective=AnalyticKLELBO(num_particles=16),
        optimizer=lambda p: torch.optim.Adam(p, lr=5e-2),
        scheduler=lambda o: LambdaLR(o, lambda step: 1e-3 ** (step / steps)),
        seed=0,
        progress=False,
    )
    distribution = guide.posterior(x)
    expected = torch.tensor([[2.07051, -1.73902]], dtype=torch.float64)
    torch.testing.assert_close(distribution.mean.detach(), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(distribution.variance.detach(), torch.full((1, 2), 1 / 101).double(), rtol=0.05, atol=0)
    bound = float(elbo(log_weights(model, guide, x, num_samples=200_000)).value)
    assert bound == pytest.approx(-5.684976, abs=5e-3)
    got = evidence(model, x, method=Importance(200_000), guide=guide, seed=0)
    assert abs(float(got.value) + 5.191365) < 4 * float(got.standard_error)


def test_the_precision_rises_in_training_and_stays_where_it_was_set():
    model, guide = IMAVAE(3, 2, gamma2=7.0, hidden=(8,)), MeanField(3, 2, hidden=(8,))
    objective = AnnealedPrecision(AnalyticKLELBO(), GeometricAnnealing(4, 10.0, 1e5))
    seen = []

    class Spy(MeanField):
        def forward(self, x=None, n=None):
            seen.append(float(model.gamma2))
            return super().forward(x, n)

    spy = Spy(3, 2, hidden=(8,))
    spy.load_state_dict(guide.state_dict())
    fit(model, spy, torch.randn(20, 3), steps=6, objective=objective, seed=0, progress=False)
    np.testing.assert_allclose(seen[-6:], [10, 100, 1000, 1e4, 1e5, 1e5], rtol=1e-5)
    assert float(model.gamma2) == pytest.approx(1e5)


def test_an_interrupted_run_goes_on_at_its_precision(tmp_path):
    x = torch.randn(20, 3)

    def run(steps, checkpoint):
        torch.manual_seed(0)
        pair = IMAVAE(3, 2, hidden=(8,)), MeanField(3, 2, hidden=(8,))
        objective = AnnealedPrecision(AnalyticKLELBO(), GeometricAnnealing(10, 10.0, 1e4))
        fit(*pair, x, steps=steps, objective=objective, seed=0, checkpoint=checkpoint, progress=False)
        return pair

    run(5, tmp_path / "run.safetensors")
    resumed, whole = run(12, tmp_path / "run.safetensors"), run(12, None)
    for a, b in zip(resumed, whole, strict=True):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name


def test_a_model_without_a_precision_is_refused_by_name():
    objective = AnnealedPrecision(AnalyticKLELBO(), GeometricAnnealing(10, 10.0, 1e4))
    with pytest.raises(TypeError, match="expected a model with set_precision, got LinearVAE"):
        objective.loss(LinearVAE(3, 2), MeanField(3, 2), torch.zeros(4, 3))


def test_the_best_seed_has_the_highest_elbo_and_all_are_reported():
    x = torch.randn(60, 3) @ torch.tensor([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 0.1]])
    result = fit_best(
        lambda: (IMAVAE(3, 2, gamma2=10.0, hidden=(8,)), MeanField(3, 2, hidden=(8,))),
        x,
        seeds=[3, 1, 4],
        steps=30,
        objective=AnalyticKLELBO,
        progress=False,
    )
    assert list(result.elbo) == [3, 1, 4]
    assert result.elbo[result.seed] == max(result.elbo.values())
    assert (result.model, result.guide) == result.pairs[result.seed]
    assert len(set(result.elbo.values())) == 3
    for seed, line in zip([3, 1, 4], str(result).splitlines(), strict=True):
        assert line.startswith(f"seed {seed}: ELBO {result.elbo[seed]:.4f}")
        assert line.endswith("(best)") == (seed == result.seed)
    with pytest.raises(TypeError, match="expected objective as a function that makes one, got AnalyticKLELBO"):
        fit_best(lambda: result.pairs[3], x, seeds=[0], steps=1, objective=AnalyticKLELBO())
    with pytest.raises(ValueError, match=r"one seed or more, all different, got \[0, 0\]"):
        fit_best(lambda: result.pairs[3], x, seeds=[0, 0], steps=1)


def rounding(gamma2, data_dim, latent_dim):
    """Largest error of float32 log-likelihoods on the manifold, and the check of float32 data."""
    torch.manual_seed(0)
    model = IMAVAE(data_dim, latent_dim, gamma2=gamma2).double().requires_grad_(False)
    for parameter in model.network.parameters():
        parameter.mul_(2)
    z = torch.randn(500, latent_dim).double()
    x = model.decode(z) + model.sigma * torch.randn(500, data_dim).double()
    z = z + 0.5 * model.sigma * torch.randn_like(z)
    model.check_data(x)
    single = copy.deepcopy(model).float()
    error = (single.likelihood(z.float()).log_prob(x.float()) - model.likelihood(z).log_prob(x)).abs().max()
    return float(error), lambda: single.check_data(x.float())


@pytest.mark.parametrize("size", [(3, 3), (10, 2), (50, 10)])
def test_single_precision_is_refused_where_its_rounding_shows(size):
    for gamma2 in (1e2, 1e4, 1e8):
        error, check = rounding(gamma2, *size)
        assert (error > 0.01) == (gamma2 == 1e8)
        if gamma2 < 1e8:
            check()
        else:
            with pytest.raises(ValueError, match=r"of a dtype that resolves sigma = 0\.0001, got torch\.float32"):
                check()


def test_evidence_of_a_float32_model_is_computed_in_float64():
    model, guide = IMAVAE(3, 2, gamma2=1e8), MeanField(3, 2)
    x = torch.randn(5, 3)
    options = {"method": Importance(50), "seed": 0}
    got = evidence(model, x, guide=guide, **options)
    double = evidence(copy.deepcopy(model).double(), x.double(), guide=copy.deepcopy(guide).double(), **options)
    assert torch.equal(got.value, double.value)
    assert model.gamma2.dtype == torch.float32


def test_a_bounded_prior_and_a_guide_on_its_support_train():
    network = linear_network(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]))
    model = IMAVAE(3, 2, gamma2=400.0, network=network, prior=Uniform(2, -0.5, 0.5)).requires_grad_(False)
    guide = MeanField(3, 2, hidden=(16,), support=model.prior().support)
    z = torch.rand(200, 2) - 0.5
    x = model.likelihood(z).sample()
    fit(model, guide, x, steps=500, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), seed=0, progress=False)
    distribution = guide.posterior(x)
    assert (distribution.sample().abs() < 0.5).all()
    for k in range(2):
        assert np.corrcoef(distribution.mean[:, k].detach(), z[:, k])[0, 1] > 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 4}, "expected latent_dim of at most data_dim = 3, got 4"),
        ({"latent_dim": 2, "gamma2": 0.0}, "expected a positive finite gamma2, got 0.0"),
        ({"latent_dim": 2, "gamma2": math.inf}, "expected a positive finite gamma2, got inf"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IMAVAE(3, **arguments)


# --- single precision at the doors -----------------------------------------------------------------


def sharp():
    """A pair in float32 at gamma^2 = 1e8, and float32 data, off the decoder's image by their own rounding."""
    torch.manual_seed(0)
    model, guide = IMAVAE(3, 2, gamma2=1e8, hidden=(16,)), MeanField(3, 2, hidden=(16,))
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter *= 3
    return model, guide, model(n=6).detach()


@pytest.mark.slow
def test_a_float32_model_has_the_evidence_and_gap_of_its_double_copy():
    model, guide, x = sharp()
    twin = copy.deepcopy(model).double(), copy.deepcopy(guide).double(), x.double()
    for method in ("limit", "quadrature"):
        single, double = (evidence(*pair, method=method, seed=0, progress=False) for pair in ((model, x), twin[::2]))
        assert torch.equal(single.value, double.value)
    options = {"num_samples": 16, "restarts": 0, "seed": 0, "progress": False}
    ours, theirs = gap(model, guide, x, known=single, **options), gap(*twin, known=double, **options)
    for name in ("total", "approximation", "amortisation"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.elbo.dtype == torch.float64
    assert {p.dtype for p in (*model.parameters(), *guide.parameters())} == {torch.float32}
    # the twin: where nothing is converted, rounding shows
    z = guide.posterior(x).mean.detach()
    off = model.likelihood(z).log_prob(x) - twin[0].likelihood(z.double()).log_prob(twin[2])
    assert float(off.detach().abs().max()) > 1


def test_float32_training_is_refused_where_its_rounding_shows():
    model, guide, x = sharp()
    with pytest.raises(ValueError, match=r"resolves sigma = 0\.0001, got torch\.float32.* use model\.double\(\)"):
        fit(model, guide, x, steps=1, progress=False)
    history = fit(model.double(), guide.double(), x.double(), steps=50, seed=0, progress=False)
    assert history.loss[-1] < history.loss[0]


def test_one_seed_that_diverges_does_not_end_the_others():
    x = torch.randn(40, 3)
    made = []

    def make():
        made.append(None)
        model, guide = IMAVAE(3, 2, gamma2=10.0, hidden=(8,)), MeanField(3, 2, hidden=(8,))
        if len(made) == 1:
            torch.nn.init.constant_(guide.encoder[0].weight, math.nan)
        return model, guide

    result = fit_best(make, x, seeds=[0, 1], steps=10, progress=False)
    assert result.elbo[0] == -math.inf
    assert result.seed == 1
    made.clear()
    with pytest.raises(FloatingPointError):
        fit_best(make, x, seeds=[0], steps=10, progress=False)
