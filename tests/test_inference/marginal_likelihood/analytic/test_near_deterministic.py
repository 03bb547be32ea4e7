"""The evidence in the limit of little noise: against closed forms, dense sums, and its own statement of error."""

import math

import pytest
import torch

from guides import MeanField
from inference import evidence
from inference.identifiability.gap_prediction import predicted_gap
from inference.marginal_likelihood.analytic.near_deterministic import Limit, limit_terms
from inference.marginal_likelihood.base.result import NUMERICAL
from inference.numerics.levenberg_marquardt import nearest_latents
from zoo import IMAVAE, LinearVAE, Uniform


def linear(gamma2, data_dim=5, latent_dim=3):
    model = LinearVAE(data_dim, latent_dim, sigma=1 / math.sqrt(gamma2)).double().requires_grad_(False)
    model.W.data = torch.randn(data_dim, latent_dim).double()
    return model


@pytest.mark.parametrize("gamma2", [1e4, 1e6, 1e8])
def test_on_linear_models_it_is_right_to_its_stated_error(gamma2):
    model = linear(gamma2)
    x = model(n=50).detach()
    got = limit_terms(model, x, torch.randn(4, 50, 3).double())
    error = (got.log_evidence - model.log_evidence(x)).abs()
    assert (error <= got.error + 1e-9).all()
    assert (error + 1e-9 >= got.error / 10).all()  # no more than ten times too careful
    assert got.valid.all()


def curve(gamma2, prior=None):
    torch.manual_seed(1)
    model = IMAVAE(3, 1, gamma2=gamma2, hidden=(16,), prior=prior).double().requires_grad_(False)
    for parameter in model.network.parameters():
        parameter.mul_(2)
    return model


def dense_sum(model, x, terms):
    """log of the integral over z by a trapezoidal sum around the nearest latent."""
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    sd = terms.stiffness.rsqrt()
    z = (terms.z[:, 0] + grid[:, None] * sd)[..., None]
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    return torch.logsumexp(joint, 0) + torch.log((grid[1] - grid[0]) * sd)


def test_off_a_curved_image_it_is_right_to_its_stated_error():
    stated = {}
    for gamma2 in (1e4, 1e6, 1e8):
        model = curve(gamma2)
        x = model.likelihood(torch.randn(40, 1).double()).sample()
        terms = limit_terms(model, x, torch.randn(8, 40, 1).double())
        error = (terms.log_evidence - dense_sum(model, x, terms)).abs()
        assert (error <= 1.5 * terms.error + 1e-10).all()
        stated[gamma2] = float(terms.error.max())
    assert stated[1e6] < 0.02 * stated[1e4]
    assert stated[1e8] < 0.02 * stated[1e6]


def test_without_its_curvature_term_it_is_wrong_at_every_precision():
    """The twin: with J'J in place of the second derivatives the error does not fall."""
    for gamma2 in (1e4, 1e8):
        model = curve(gamma2)
        z = torch.randn(40, 1).double()
        x = model.likelihood(z).sample()
        # far off the curve in a fixed number of sigma is near it in x; what counts is r times the curvature
        x = x + 0.3 * torch.randn_like(x)
        terms = limit_terms(model, x, z.expand(8, 40, 1).clone())
        jacobian = torch.stack([torch.func.jacrev(model.decode)(p) for p in terms.z]) * math.sqrt(gamma2)
        flat = jacobian.square().sum((1, 2)).log()
        residual = (x - model.decode(terms.z)).square().sum(-1) * gamma2
        prior = model.prior().log_prob(terms.z)
        wrong = prior + 0.5 * math.log(2 * math.pi) - 0.5 * flat - 0.5 * residual
        wrong = wrong + 1.5 * math.log(gamma2 / (2 * math.pi))
        truth = dense_sum(model, x, terms)
        near = terms.error < 0.01
        assert near.sum() > 10
        assert (wrong - truth)[near].abs().median() > 0.02
        assert (terms.log_evidence - truth)[near].abs().max() < 0.01


def test_with_as_many_dimensions_it_is_the_change_of_variables():
    model = linear(1e8, 3, 3)
    z = torch.randn(20, 3).double()
    x = z @ model.W.mT
    terms = limit_terms(model, x, torch.randn(3, 20, 3).double())
    expected = model.prior().log_prob(z) - torch.linalg.slogdet(model.W).logabsdet
    torch.testing.assert_close(terms.log_evidence, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(terms.z, z, atol=1e-7, rtol=0)


def test_the_predicted_gap_is_the_contrast_of_the_columns():
    model = IMAVAE(2, 2, gamma2=1e6, network=torch.nn.Linear(2, 2, bias=False)).double().requires_grad_(False)
    model.network.weight.copy_(torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=torch.float64))
    terms = limit_terms(model, model(n=5), torch.randn(3, 5, 2).double())
    torch.testing.assert_close(terms.contrast, torch.full((5,), 0.510825624, dtype=torch.float64), atol=1e-8, rtol=0)


def test_the_method_answers_per_datum_with_its_error_and_guarantee():
    model = curve(1e6)
    x = model(n=30)
    got = evidence(model, x, method="limit", seed=0)
    terms = limit_terms(model, x, torch.randn(20, 30, 1).double())
    torch.testing.assert_close(got.value, terms.log_evidence, atol=1e-9, rtol=0)
    assert got.guarantee == (NUMERICAL,) * 30
    assert ((got.lower < got.value) & (got.value < got.upper)).all()
    assert got.mean.upper - got.mean.lower < 0.01
    guide = MeanField(3, 1, hidden=(8,)).double()
    with_guide = evidence(model, x, method=Limit(num_starts=20), guide=guide, seed=0)
    torch.testing.assert_close(with_guide.value, got.value, atol=1e-9, rtol=0)


def test_float32_models_are_taken_to_float64_at_the_door():
    model = curve(1e4).float()
    x = model(n=10).detach()
    got = evidence(model, x, method="limit", seed=0)
    torch.testing.assert_close(got.value, evidence(model.double(), x.double(), method="limit", seed=0).value)


def test_it_is_refused_where_the_noise_is_too_much_with_numbers():
    model = curve(20.0)
    with pytest.raises(ValueError, match=r"expected gamma\^2 lambda_min.*>= 100 .* for method='limit', got \d+ of 10"):
        evidence(model, model(n=10), method="limit", seed=0)


def test_it_is_refused_at_the_boundary_of_a_prior():
    model = curve(1e6, Uniform(1, 0.0, 1.0))
    inside, edge = model.decode(torch.tensor([[0.5]]).double()), model.decode(torch.tensor([[1.0]]).double())
    assert evidence(model, inside, method="limit", seed=0).upper.isfinite().all()
    with pytest.raises(ValueError, match="got 1 of 2 data points beyond, the first, 1, with"):
        evidence(model, torch.cat([inside, edge]), method="limit", seed=0)


def test_nearest_latents_are_found_from_afar():
    model = IMAVAE(4, 2, gamma2=1e6, hidden=(16,)).double().requires_grad_(False)
    z = torch.randn(30, 2).double()
    found = nearest_latents(model, model.decode(z), z + 0.5 * torch.randn(8, 30, 2).double())
    torch.testing.assert_close(found.z, z, atol=1e-6, rtol=0)
    assert found.gradient_norm.max() < 1e-3


def test_models_without_gaussian_noise_and_float32_are_refused():
    with pytest.raises(TypeError, match=r"expected a model with decode\(z\), sigma and prior\(\), got"):
        evidence(torch.nn.Module(), torch.zeros(3, 5).double(), method="limit")
    with pytest.raises(TypeError, match=r"expected float64 for the limit of little noise, got torch\.float32"):
        limit_terms(curve(100.0).float(), torch.zeros(3, 3), torch.zeros(1, 3, 1))


@pytest.mark.parametrize("sigma", [1e-4, 1.0, 100.0])
def test_the_prediction_is_the_closed_form_of_a_linear_model(sigma):
    model = linear(1 / sigma**2)
    precision = model.W.mT @ model.W / sigma**2 + torch.eye(3).double()
    expected = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    got = predicted_gap(model, torch.randn(4, 3).double())
    torch.testing.assert_close(got, expected.expand(4), atol=1e-9, rtol=1e-9)


def test_the_prediction_tends_to_the_contrast():
    model = IMAVAE(4, 2, gamma2=1e8, hidden=(16,)).double().requires_grad_(False)
    z = torch.randn(10, 2).double()
    contrast = limit_terms(model, model.decode(z), z[None]).contrast
    torch.testing.assert_close(predicted_gap(model, z), contrast, atol=1e-4, rtol=0)


class Fold(torch.nn.Module):
    """Two latents decode to each point: sheets at -sqrt(x) and sqrt(x), of which the prior prefers the lower."""

    def forward(self, z):
        return torch.cat([z.square() + 0.1 * z, z.square() + 0.1 * z], -1)


def folded(gamma2, at):
    """The fold, data from latents, and their evidence by a dense sum over the prior."""
    model = IMAVAE(2, 1, gamma2=gamma2, network=Fold()).double()
    x = model.decode(torch.tensor(at, dtype=torch.float64)[:, None])
    grid = torch.linspace(-4, 4, 400_001, dtype=torch.float64)
    joint = model.prior().log_prob(grid[:, None]) + model.likelihood(grid[:, None, None]).log_prob(x).mT
    return model, x, torch.logsumexp(joint, -1) + torch.log(grid[1] - grid[0])


def test_all_latents_that_decode_to_the_same_data_are_summed():
    model, x, truth = folded(1e6, [1.0, 2.0, 0.5])
    got = evidence(model, x, method="limit", seed=0)
    assert got.guarantee == (NUMERICAL,) * 3
    assert ((got.lower <= truth + 1e-9) & (truth - 1e-9 <= got.upper)).all()
    alone = limit_terms(model, x, torch.tensor([1.0, 2.0, 0.5]).double().view(1, 3, 1))
    assert (truth - alone.log_evidence > 0.4).all()


@pytest.mark.parametrize("sheets_apart", [1.5, 3.2, 6.0])
def test_sheets_that_overlap_are_right_to_the_error_or_refused(sheets_apart):
    """Half the sheets' distance in posterior standard deviations is a gamma (2 a) sqrt(2) at z = a - .05."""
    gamma2, half = 1e4, math.sqrt(sheets_apart / 2 / (100 * 2 * math.sqrt(2)))
    model, x, truth = folded(gamma2, [half - 0.05])
    terms = limit_terms(model, x, torch.linspace(-1, 1, 16).double().view(16, 1, 1))
    assert float((terms.log_evidence - truth).abs()) <= 1.5 * float(terms.error)
    assert not terms.valid.any() or float(terms.error) < 0.01
