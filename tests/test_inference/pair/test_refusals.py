"""What is no valid pair is refused by the name of the site that breaks the rule."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from registry import data_for
from torch import nn
from trap_pairs import Normal, assert_exact, chain_case, discrete_case, reference, rows_case, story, zeros

from guides import Exact, MeanField
from inference import (
    ELBO,
    AnalyticELBO,
    AnalyticKLELBO,
    Importance,
    evidence,
    iwae,
    log_weights,
)
from inference.comparison.guide_comparison import compare
from zoo import PPCA

# --- refusals name the culprit ---------------------------------------------------------------------------


X = torch.linspace(-1, 1, 5).double()


def plain_model(x):
    return story(lambda z: z, 1.0, x)


def plain_guide(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("z", Normal(x / 2, 1.0))


def delta_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x))


def wrapped_delta_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x[:, None]).to_event(1).mask(True))


def model_without_latents(x):
    with pyro.plate("data", len(x)):
        pyro.sample("seen", Normal(0.0, 1.0), obs=x)


def empty_guide(x):
    pass


def model_with_a_global_latent(x):
    slope = pyro.sample("slope", Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", Normal(zeros(len(x)), 1.0))
        pyro.sample("x", Normal(slope * z, 1.0), obs=x)


def guide_with_a_global_latent(x):
    pyro.sample("slope", Normal(0.0, 1.0))
    plain_guide(x)


def guide_outside_the_plate(x):
    pyro.sample("z", Normal(x / 2, 1.0).to_event(1))


def guide_of_another_site(x):
    with pyro.plate("data", len(x)):
        pyro.sample("other", Normal(x / 2, 1.0))


def guide_with_a_site_too_many(x):
    plain_guide(x)
    with pyro.plate("data", len(x)):
        pyro.sample("extra", Normal(x / 2, 1.0))


def guide_of_half_the_data(x):
    with pyro.plate("data", len(x) - 1):
        pyro.sample("z", Normal(x[1:] / 2, 1.0))


def model_in_a_loop(x):
    for n in pyro.plate("data", len(x)):
        pyro.sample(f"x{n}", Normal(pyro.sample(f"z{n}", Normal(0.0, 1.0)), 1.0), obs=x[n])


def guide_in_a_loop(x):
    for n in pyro.plate("data", len(x)):
        pyro.sample(f"z{n}", Normal(x[n] / 2, 1.0))


def model_with_a_scaled_site(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", Normal(zeros(len(x)), 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("tempered", Normal(z, 1.0), obs=x)


REFUSED = {
    "Delta": (plain_model, delta_guide, "density at guide site 'z', got a Delta"),
    "wrapped Delta": (plain_model, wrapped_delta_guide, "density at guide site 'z', got a Delta"),
    "no latent": (model_without_latents, empty_guide, r"latent site, got only observed sites \['seen'\]"),
    "global latent": (model_with_a_global_latent, guide_with_a_global_latent, "plate 'data'.*model site 'slope'"),
    "guide outside the plate": (plain_model, guide_outside_the_plate, "plate 'data'.*guide site 'z' in plates"),
    "missing site": (plain_model, empty_guide, r"latent sites \['z'\], got a program without a sample site"),
    "another site": (plain_model, guide_of_another_site, r"latent sites \['z'\], got \['other'\]"),
    "site too many": (plain_model, guide_with_a_site_too_many, r"latent sites \['z'\], got \['extra', 'z'\]"),
    "loop over the data": (model_in_a_loop, guide_in_a_loop, "vectorised plate 'data'.*model site '[xz]0'"),
}


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_what_is_no_pair_is_refused_by_the_name_of_the_site(refused, num_samples):
    model, guide, message = REFUSED[refused]
    with pytest.raises(ValueError, match=message):
        log_weights(model, guide, X, num_samples=num_samples)
    with pytest.raises(ValueError, match=message):
        ELBO(num_samples).loss(model, guide, X)
    with pytest.raises(ValueError, match=message):
        evidence(model, X, method=Importance(num_samples), guide=guide)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_plate_of_another_name_is_refused_until_it_is_named(num_samples):
    model, guide, args, plate, truth = rows_case()
    with pytest.raises(ValueError, match=r"plate 'data'.*plate=.*site 'w' in plates \['rows'\]"):
        log_weights(model, guide, *args, num_samples=num_samples)
    assert_exact(log_weights(model, guide, *args, num_samples=num_samples, plate=plate), truth)


def test_halves_with_plates_of_different_size_are_refused():
    with pytest.raises(ValueError, match=r"size|shape|Shape"):
        log_weights(plain_model, guide_of_half_the_data, X, num_samples=3)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_scaled_site_is_refused_by_weights_and_honoured_by_the_elbo(num_samples):
    for call in (
        lambda: log_weights(model_with_a_scaled_site, plain_guide, X, num_samples=num_samples),
        lambda: evidence(model_with_a_scaled_site, X, method=Importance(num_samples), guide=plain_guide),
        lambda: compare(model_with_a_scaled_site, {"g": plain_guide}, X, num_samples=2, progress=False),
    ):
        with pytest.raises(ValueError, match=r"'tempered' to carry no scale.*0\.5"):
            call()
    bounds = torch.stack([ELBO(num_samples).per_datum(model_with_a_scaled_site, plain_guide, X) for _ in range(400)])
    q, p = reference(X / 2, 1.0), reference(0.0, 1.0)
    expected = -0.25 * ((X - q.mean) ** 2 + 1) - 0.25 * math.log(2 * math.pi) - torch.distributions.kl_divergence(q, p)
    assert float(((bounds.mean(0) - expected).abs() / bounds.std(0)).max()) < 5 / 20


def batch_norm_encoder():
    """Of the prior, whatever the data: its last layer is zero."""
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    for parameter in encoder[2].parameters():
        nn.init.zeros_(parameter)
    return encoder


def test_batch_normalisation_is_refused_by_name_in_train_mode_only():
    model = PPCA(5, 2).double()
    guide, x = MeanField(5, 2, encoder=batch_norm_encoder()).double(), data_for(model)
    for call in (
        lambda: log_weights(model, guide, x, num_samples=3),
        lambda: evidence(model, x, method=Importance(3), guide=guide),
        lambda: compare(model, {"guide": guide}, x, num_samples=3, progress=False),
    ):
        with pytest.raises(ValueError, match=r"MeanField.*'encoder\.1' in train mode.*eval"):
            call()
    value, error = iwae(log_weights(model, guide.eval(), x, num_samples=20_000))
    assert float(((value - model.log_evidence(x).detach()).abs() / error).max()) < 5


def test_batch_normalisation_inside_a_users_function_is_refused_too():
    encoder = batch_norm_encoder()

    def guide(x):
        pyro.module("encoder", encoder)
        mean, log_sigma = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(mean, log_sigma.exp()).to_event(1))

    model = PPCA(5, 2).double()
    with pytest.raises(ValueError, match=r"batch normalisation.*in train mode"):
        log_weights(model, guide, data_for(model), num_samples=3)


def test_objectives_refuse_a_latent_that_is_not_reparameterised():
    model, guide, args, _, _ = discrete_case()
    for objective in (ELBO(), AnalyticKLELBO()):
        with pytest.raises(ValueError, match="reparameterised distribution at guide site 'k', got Bernoulli"):
            objective.loss(model, guide, *args)


def test_the_closed_form_elbo_refuses_other_models_and_guides_by_name():
    model = PPCA(5, 2).double()
    x = data_for(model)
    with pytest.raises(TypeError, match=r"expected_log_likelihood.*got function"):
        AnalyticELBO().loss(plain_model, plain_guide, X)
    with pytest.raises(ValueError, match=r"one latent site, got \['z', 'extra'\]"):
        AnalyticELBO().loss(model, guide_with_a_site_too_many, X)
    with pytest.raises(ValueError, match="mask, scale"):
        AnalyticELBO().loss(model, poutine.scale(Exact(model), scale=2.0), x)


def test_an_autodelta_is_refused_by_weights_for_it_has_no_density():
    model = PPCA(5, 2).double()
    with pytest.raises(ValueError, match="expected a density at guide site 'z', got a Delta"):
        log_weights(model, AutoDelta(model), data_for(model), num_samples=3)


def test_latents_in_another_order_are_refused_where_it_matters():
    model, guide, args, _, _ = chain_case()
    with pytest.raises(ValueError, match=r"\['z1', 'z2'\] in the model and \['z2', 'z1'\]"):
        AnalyticKLELBO().loss(model, guide, *args)


def test_a_site_name_used_twice_is_refused():
    def model(x):
        plain_model(x)
        plain_model(x)

    with pytest.raises(ValueError, match="name of its own, got 'z' twice"):
        log_weights(model, plain_guide, X, num_samples=3)
