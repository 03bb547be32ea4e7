"""What every guide of the registry does with its models: draws, densities, files."""

import math

import torch
from pyro import poutine
from pyro.infer import Predictive
from references import (
    assert_block_diagonal,
    assert_same_moments,
    changed,
    largest,
    reference_log_joint,
    state,
    trace_of,
    train_by_svi,
)
from registry import MODELS, data_for
from torch.func import jacrev

from inference import (
    load_pair,
    predictive,
    reconstruct,
    save_pair,
)


def test_a_saved_pair_is_rebuilt_from_its_file(pair, tmp_path):
    x, member = data_for(pair[0]), MODELS[pair[0].member]
    train_by_svi(*pair, x)
    save_pair(tmp_path / "pair.safetensors", *pair)
    model, guide = load_pair(tmp_path / "pair.safetensors", None if member.rebuilt else member())
    assert changed(state(*pair), model, guide) == []
    z = torch.ones(len(x), pair[0].latent_dim, dtype=x.dtype)
    assert torch.equal(guide.posterior(x).log_prob(z), pair[1].posterior(x).log_prob(z))


def test_predictive_draws_latents_from_the_guide(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    z = Predictive(model, guide=guide, num_samples=num, parallel=True)(x)["z"].detach()
    assert z.shape == (num, 6, model.latent_dim)
    assert_same_moments(z, guide.posterior(x).sample((num,)))


def test_predictive_of_an_unconditioned_model_draws_new_data(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    draws = Predictive(poutine.uncondition(model), guide=guide, num_samples=num, parallel=True)(x)["x"].detach()
    assert draws.shape == (num, *x.shape)
    assert_same_moments(draws, model.likelihood(guide.posterior(x).sample((num,))).sample())


def test_our_predictive_draws_latents_and_new_data(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    draws = predictive(model, guide, x, num_samples=num)
    z = guide.posterior(x).sample((num,))
    assert_same_moments(draws["z"], z)
    assert_same_moments(draws["x"], model.likelihood(z).sample())


def test_reconstruction_is_the_mean_of_decoded_latents(pair):
    model, guide = pair
    x, num = data_for(model, 6), 4000
    got = reconstruct(model, guide, x, num_samples=num)
    decoded = model.decode(guide.posterior(x).sample((num,)))
    error = decoded.std(0) * math.sqrt(2 / num)
    assert largest((got - decoded.mean(0)) / error) < 5


def test_replay_takes_the_latents_of_a_guide_trace(pair):
    model, guide = pair
    x = data_for(model)
    guide_trace = trace_of(guide, x)
    z = guide_trace.nodes["z"]["value"]
    trace = trace_of(poutine.replay(model, trace=guide_trace), x)
    torch.testing.assert_close(trace.nodes["z"]["value"], z, rtol=0, atol=0)
    torch.testing.assert_close(trace.log_prob_sum(), reference_log_joint(model, x, z).sum())
    torch.testing.assert_close(guide_trace.log_prob_sum(), guide.posterior(x).log_prob(z).sum())


def test_posterior_of_a_latent_depends_on_its_own_datum_alone(pair):
    model, guide = pair
    x, z = data_for(model, 4), torch.randn(4, model.latent_dim, dtype=torch.float64)
    assert_block_diagonal(jacrev(lambda x: guide.posterior(x).log_prob(z))(x))


def test_a_datum_by_itself_is_what_it_is_in_company(pair):
    model, guide = pair
    x, z = data_for(model, 4), torch.randn(4, model.latent_dim, dtype=torch.float64)
    together = [guide.posterior(x).log_prob(z), model.likelihood(z).log_prob(x)]
    alone = [
        torch.cat([guide.posterior(x[i : i + 1]).log_prob(z[i : i + 1]) for i in range(4)]),
        torch.cat([model.likelihood(z[i : i + 1]).log_prob(x[i : i + 1]) for i in range(4)]),
    ]
    torch.testing.assert_close(alone, together)
