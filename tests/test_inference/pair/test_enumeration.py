"""Discrete latents summed out: against sums written out by hand, the forward algorithm, and stock Pyro's loss."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro.infer import TraceEnum_ELBO, config_enumerate

from inference import ELBO, IWELBO, Annealed, BetaELBO, LogJoint, elbo, evidence, gap, iwae, log_weights, predictive
from inference.pair.call import Call
from inference.pair.log_einsum import einsum

torch.manual_seed(0)
X = torch.randn(4, dtype=torch.float64)
SHARES, MEANS = torch.tensor([0.25, 0.25, 0.5]).double(), torch.tensor([-1.0, 0.0, 2.0]).double()
QUIET = {"seed": 0, "progress": False}


def mixture(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(SHARES))
        z = pyro.sample("z", dist.Normal(MEANS[c], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def drawing_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.7))


def enumerating_guide(x):
    with pyro.plate("data", len(x)):
        logits = torch.stack([-x, 0 * x, x], -1)
        c = pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        pyro.sample("z", dist.Normal((MEANS[c] + 3 * x) / 5, 0.6))


def empty_guide(x):
    """Leaves every site out."""


MIXTURE = (td.Normal(MEANS, 1.25**0.5).log_prob(X[:, None]) + SHARES.log()).logsumexp(-1)


def test_the_log_joint_is_the_sum_over_components():
    log_joint, u = LogJoint(mixture, X), torch.randn(6, 4, 1, dtype=torch.float64)
    prior = (td.Normal(MEANS, 1.0).log_prob(u) + SHARES.log()).logsumexp(-1)
    got = log_joint.terms(u)
    torch.testing.assert_close(got.prior, prior)
    torch.testing.assert_close(got.likelihood, td.Normal(u[..., 0], 0.5).log_prob(X))
    torch.testing.assert_close(log_joint(u[0]), log_joint(u)[0])
    torch.testing.assert_close(log_joint.rows(torch.tensor([2, 0]))(u[:, [2, 0]]), log_joint(u)[:, [2, 0]])


@pytest.mark.parametrize("num_samples", [1, 9])
def test_weights_of_a_left_out_component_sum_over_it(num_samples):
    draw = Call(mixture, drawing_guide, (X,)).run(num_samples)
    z = draw.latents["z"].reshape(num_samples, 4, 1)
    terms = td.Normal(MEANS, 1.0).log_prob(z) + SHARES.log() + td.Normal(z, 0.5).log_prob(X[:, None])
    expected = terms.logsumexp(-1) - td.Normal(0.8 * X, 0.7).log_prob(z[..., 0])
    torch.testing.assert_close(draw.log_weights, expected)
    assert draw.layout.num_data == 4


def by_hand(draw, num_samples):
    """Terms of the enumerating guide by data point and component, (S, N, 3): log p - log q(z | c), and log q(c)."""
    z = draw.guide_sites["z"].value.reshape(3, num_samples, 4).movedim(0, -1)
    joint = td.Normal(MEANS, 1.0).log_prob(z) + SHARES.log() + td.Normal(z, 0.5).log_prob(X[:, None])
    log_q = torch.stack([-X, 0 * X, X], -1).log_softmax(-1)
    return joint - td.Normal((MEANS + 3 * X[:, None]) / 5, 0.6).log_prob(z), log_q


@pytest.mark.parametrize("num_samples", [1, 9])
def test_an_enumerating_guide_draws_once_for_each_value(num_samples):
    draw = Call(mixture, enumerating_guide, (X,)).run(num_samples, enumerate_guide=True)
    ratio, log_q = by_hand(draw, num_samples)
    torch.testing.assert_close(draw.log_weights, ratio.logsumexp(-1))
    torch.testing.assert_close(draw.elbo_terms, (log_q.exp() * (ratio - log_q)).sum(-1))


@pytest.mark.parametrize("guide", [drawing_guide, enumerating_guide])
def test_the_weights_mean_is_the_evidence(guide):
    weights = log_weights(mixture, guide, X, num_samples=20000, seed=0)
    error = weights.softmax(0).square().sum(0).sqrt()  # relative error of the mean, at least
    assert bool(((iwae(weights).value - MIXTURE).abs() < 4 * error).all())


@pytest.mark.parametrize("guide", [drawing_guide, enumerating_guide])
def test_the_elbo_is_that_of_stock_enumeration(guide):
    stock = TraceEnum_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(1)
    draw = Call(mixture, guide, (X,)).run(4000, enumerate_guide=True)
    ours = draw.elbo_terms.sum(-1)
    expected = -stock.loss(config_enumerate(mixture), guide, X)
    assert abs(float(ours.mean()) - expected) < 4 * float(ours.std()) * math.sqrt(2 / 4000)


def test_the_gap_of_an_enumerating_guide_is_of_the_trained_elbo():
    found = gap(mixture, enumerating_guide, X, **QUIET)
    draw = Call(mixture, enumerating_guide, (X,)).run(20000, enumerate_guide=True)
    error = (draw.elbo_terms.var(0) / 20000 + found.elbo_error.square()).sqrt()
    assert bool(((found.elbo - draw.elbo_terms.mean(0)).abs() < 4 * error).all())
    assert bool((found.elbo + 0.05 < elbo(log_weights(mixture, enumerating_guide, X, num_samples=4000)).value).any())


@pytest.mark.parametrize("method", ["auto", "adaptive", "importance", "bridge", "laplace", Annealed(30, 100, 2)])
def test_evidence_by_continuous_methods_holds_the_mixture_s(method):
    guide = drawing_guide if method in ("importance", "bridge") else None
    level = 0.999 if isinstance(method, Annealed) else 0.95  # its few temperatures leave errors of a tenth of a nat
    got = evidence(mixture, X, method=method, guide=guide, level=level, **QUIET)
    assert bool(((got.lower - 1e-6 <= MIXTURE) & (got.upper + 1e-6 >= MIXTURE)).all())


def test_gradients_of_the_elbo_are_those_of_stock_enumeration():
    logits = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(SHARES))
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    def guide(x):  # noqa: ARG001
        with pyro.plate("data", 4):
            pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    losses = [ELBO().differentiable_loss(model, guide, X)]
    with pyro.poutine.block():
        losses.append(TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, X))
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    evidence_of_mixture = (td.Normal(MEANS, 1.0).log_prob(X[:, None]) + SHARES.log()).logsumexp(-1)
    torch.testing.assert_close(IWELBO(3).per_datum(model, guide, X), evidence_of_mixture)


def test_discrete_latents_alone_give_the_exact_evidence():
    def model(x):
        with pyro.plate("data", len(x)):
            flag = pyro.sample("flag", dist.Bernoulli(x.new_tensor(0.3)))
            hot = pyro.sample("hot", dist.OneHotCategorical(SHARES))
            count = pyro.sample("count", dist.Binomial(2, x.new_tensor(0.6)))
            pyro.sample("x", dist.Normal(flag + (hot * MEANS).sum(-1) - count, 1.0), obs=x)

    total = []
    for flag, k, count in itertools.product(range(2), range(3), range(3)):
        binomial = math.comb(2, count) * 0.6**count * 0.4 ** (2 - count)
        weight = math.log(0.3 if flag else 0.7) + SHARES[k].log() + math.log(binomial)
        total.append(weight + td.Normal(flag + MEANS[k] - count, 1.0).log_prob(X))
    expected = torch.stack(total).logsumexp(0)
    got = evidence(model, X, progress=False)
    torch.testing.assert_close(got.value, expected, atol=1e-6, rtol=0)  # Pyro takes the probability .6 in float32
    assert set(got.guarantee) == {"exact"}
    torch.testing.assert_close(log_weights(model, empty_guide, X, num_samples=2)[1], got.value)
    with pytest.raises(ValueError, match="got discrete ones alone: use method='exact'"):
        evidence(model, X, method="adaptive", progress=False)


def nested(x):
    """A component for each data point, and flags in a plate of their own, which depend on it."""
    with pyro.plate("data", len(x), dim=-1):
        c = pyro.sample("c", dist.Categorical(SHARES))
        with pyro.plate("inner", 3, dim=-2):
            flag = pyro.sample("flag", dist.Bernoulli(0.2 + 0.2 * c))
            pyro.sample("x", dist.Normal(MEANS[c] + 2 * flag, 1.0), obs=x.T)


def test_sites_in_nested_plates_are_summed_place_by_place():
    x = torch.randn(4, 3, dtype=torch.float64)
    components = []
    for c in range(3):
        rate = 0.2 + 0.2 * c
        on, off = (td.Normal(MEANS[c] + shift, 1.0).log_prob(x) for shift in (2, 0))
        components.append(SHARES[c].log() + torch.logaddexp(math.log(rate) + on, math.log(1 - rate) + off).sum(-1))
    got = evidence(nested, x, progress=False)
    torch.testing.assert_close(got.value, torch.stack(components).logsumexp(0), atol=1e-6, rtol=0)


TRANSITION = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.5, 0.5]]).double()


def hidden_markov(x, lengths):
    """States in a chain; steps beyond a sequence's length are masked."""
    with pyro.plate("data", len(x)):
        state = 0
        for t in pyro.markov(range(x.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):
                probs = SHARES if t == 0 else TRANSITION[state]
                state = pyro.sample(f"state_{t}", dist.Categorical(probs))
                pyro.sample(f"x_{t}", dist.Normal(MEANS[state], 0.5), obs=x[:, t])


def forward_algorithm(sequence):
    alpha = SHARES.log() + td.Normal(MEANS, 0.5).log_prob(sequence[0])
    for value in sequence[1:]:
        alpha = (alpha[:, None] + TRANSITION.log()).logsumexp(0) + td.Normal(MEANS, 0.5).log_prob(value)
    return alpha.logsumexp(0)


def test_a_hidden_markov_model_has_the_forward_algorithm_s_evidence():
    x, lengths = torch.randn(3, 40, dtype=torch.float64), torch.tensor([40, 1, 25])
    truth = torch.stack([forward_algorithm(row[:n]) for row, n in zip(x, lengths, strict=True)])
    got = evidence(hidden_markov, x, lengths, progress=False)
    torch.testing.assert_close(got.value, truth, atol=1e-6, rtol=1e-9)
    weights = log_weights(hidden_markov, lambda x, lengths: None, x, lengths, num_samples=1)  # noqa: ARG005
    torch.testing.assert_close(weights[0], got.value)


def test_factors_that_peak_at_different_values_are_not_lost():
    a, b = torch.tensor([0.0, -900.0]).double(), torch.tensor([-900.0, 1.0]).double()
    expected = torch.logaddexp(a + b, torch.full_like(a, -math.inf)).logsumexp(0)
    torch.testing.assert_close(einsum("a,a->", a, b), expected)
    c = torch.full((2, 2), -math.inf, dtype=torch.float64, requires_grad=True)
    found = einsum("a,ab->b", a, c)
    (gradient,) = torch.autograd.grad(found[0], c)
    assert bool((found == -math.inf).all())
    assert not gradient.any()


def poisson(x):
    with pyro.plate("data", len(x)):
        count = pyro.sample("count", dist.Poisson(torch.ones_like(x)))
        pyro.sample("x", dist.Normal(count, 1.0), obs=x)


def vector(x):
    with pyro.plate("data", len(x)):
        flags = pyro.sample("count", dist.Bernoulli(0.5 * x.new_ones(3)).to_event(1))
        pyro.sample("x", dist.Normal(flags.sum(-1), 1.0), obs=x)


@pytest.mark.parametrize("model", [poisson, vector])
def test_sites_that_cannot_be_listed_are_refused_by_name(model):
    with pytest.raises(ValueError, match=r"expected the guide to sample the model's latent sites \['count'\]"):
        log_weights(model, empty_guide, X, num_samples=1)
    with pytest.raises(ValueError, match="latent site 'count'"):
        evidence(model, X, progress=False)


def test_objectives_that_take_an_enumerating_guide_apart_refuse_it():
    with pytest.raises(ValueError, match=r"expected a guide that draws its sites, got \['c'\] enumerated"):
        BetaELBO(0.5).loss(mixture, enumerating_guide, X)


def test_predictions_draw_components_from_their_posterior():
    values = predictive(mixture, drawing_guide, X, num_samples=4000, seed=0)
    z = values["z"]
    posterior = (td.Normal(MEANS, 1.0).log_prob(z[..., None]) + SHARES.log()).softmax(-1)
    found = torch.stack([(values["c"] == k).double().mean(0) for k in range(3)], -1)
    assert bool(((found - posterior.mean(0)).abs() < 4 * 0.5 / math.sqrt(4000)).all())
