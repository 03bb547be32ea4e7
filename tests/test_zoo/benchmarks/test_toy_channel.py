"""The toy model of "Fixing a Broken ELBO": sums against NumPy, data against SciPy, what each loss trains to."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from zoo.benchmarks.categorical_channel import (
    channel_terms,
    divergence,
    generated,
    mutual_information_of,
    optimal_decoder,
    optimal_marginal,
)
from zoo.benchmarks.toy_channel import (
    CLASS_MEANS,
    CLASS_PROBABILITIES,
    CLASS_SIGMAS,
    ToyChannel,
    beta_loss,
    class_information,
    target_rate_loss,
    toy_data,
    train_channel,
)

EXACT = 1e-12  # sums of some hundred terms of order one in float64


def random_distributions(symbols=30, codes=20, batch=(), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def distribution(*shape):
        return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)

    return (
        distribution(symbols),
        distribution(*batch, symbols, codes),
        distribution(*batch, codes, symbols),
        distribution(*batch, codes),
    )


# --- exact sums ----------------------------------------------------------------------------------------------------


def by_loops(log_p, log_e, log_d, log_m):
    """The four terms by NumPy, written as the definitions."""
    p, e, d, m = (np.exp(t.numpy()) for t in (log_p, log_e, log_d, log_m))
    aggregate = p @ e
    entropy = -sum(p[x] * math.log(p[x]) for x in range(len(p)))
    pairs = [(x, z, p[x] * e[x, z]) for x in range(len(p)) for z in range(len(m))]
    distortion = -sum(w * math.log(d[z, x]) for x, z, w in pairs)
    rate = sum(w * math.log(e[x, z] / m[z]) for x, z, w in pairs)
    return entropy, distortion, rate, sum(w * math.log(e[x, z] / aggregate[z]) for x, z, w in pairs)


def test_terms_are_the_sums_of_their_definitions():
    distributions = random_distributions()
    assert [float(t) for t in channel_terms(*distributions)] == pytest.approx(by_loops(*distributions), abs=EXACT)


def test_a_batch_of_channels_is_each_of_them():
    distributions = random_distributions(batch=(3,))
    together = channel_terms(*distributions)
    for i in range(3):
        one = channel_terms(distributions[0], *(distribution[i] for distribution in distributions[1:]))
        assert [float(t[i]) for t in together] == pytest.approx([float(t) for t in one], abs=EXACT)


@pytest.mark.parametrize("seed", range(20))
def test_a1_the_information_lies_between_its_bounds(seed):
    entropy, distortion, rate, information = channel_terms(*random_distributions(seed=seed))
    assert entropy - distortion < information < rate
    assert distortion + rate > entropy


@pytest.mark.parametrize("seed", range(20))
def test_a1_the_bounds_are_equal_for_the_optimal_decoder_and_marginal(seed):
    log_p, log_e, log_d, log_m = random_distributions(seed=seed)
    best_d, best_m = optimal_decoder(log_p, log_e), optimal_marginal(log_p, log_e)
    entropy, distortion, rate, information = channel_terms(log_p, log_e, best_d, best_m)
    assert abs(entropy - distortion - information) < 1e-10
    assert abs(rate - information) < 1e-10
    # Neither of the two does the other's work.
    assert channel_terms(log_p, log_e, log_d, best_m).distortion > distortion + 1e-3
    assert channel_terms(log_p, log_e, best_d, log_m).rate > rate + 1e-3


def test_the_slack_of_the_bounds_is_the_kl_from_the_optimum():
    log_p, log_e, log_d, log_m = random_distributions()
    entropy, distortion, rate, information = channel_terms(log_p, log_e, log_d, log_m)
    aggregate = optimal_marginal(log_p, log_e)
    to_decoder = (aggregate.exp() * divergence(optimal_decoder(log_p, log_e), log_d)).sum()
    assert information - (entropy - distortion) == pytest.approx(float(to_decoder), abs=EXACT)
    assert rate - information == pytest.approx(float(divergence(aggregate, log_m)), abs=EXACT)


def test_symbols_without_probability_add_nothing_and_have_gradients():
    log_p, log_e, log_d, log_m = random_distributions(4, 3)
    log_p = torch.tensor([0.5, 0.5, 0.0, 0.0]).double().log()
    log_e.requires_grad_()
    terms = channel_terms(log_p, log_e, log_d, log_m)
    half = channel_terms(log_p[:2], log_e[:2], log_d[:, :2], log_m)
    assert [t.item() for t in terms] == pytest.approx([t.item() for t in half], abs=EXACT)
    (terms.distortion + terms.rate).backward()
    assert bool(log_e.grad.isfinite().all())


def test_information_of_identity_is_entropy_and_of_product_zero():
    log_p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    entropy = scipy.stats.entropy(log_p.exp().numpy())
    assert float(mutual_information_of(log_p.exp().diag().log())) == pytest.approx(entropy, abs=EXACT)
    assert abs(float(mutual_information_of(log_p[:, None] + log_p))) < EXACT


def test_generated_is_the_mixture_of_the_decoders_distributions():
    _, _, log_d, log_m = random_distributions()
    expected = np.log(np.exp(log_m.numpy()) @ np.exp(log_d.numpy()))
    assert np.abs(generated(log_d, log_m).numpy() - expected).max() < EXACT


def test_distributions_that_do_not_fit_are_refused():
    log_p, log_e, log_d, log_m = random_distributions()
    with pytest.raises(ValueError, match=r"expected p, decoder and marginal of trailing shapes .*30.*, got .*20, 30"):
        channel_terms(log_p, log_e.mT, log_d, log_m)


# --- the data ------------------------------------------------------------------------------------------------------


def test_a2_the_data_are_those_of_the_paper():
    log_joint = toy_data()
    log_p = log_joint.logsumexp(0)
    assert float(log_p.logsumexp(0)) == pytest.approx(0, abs=EXACT)
    assert float(mutual_information_of(log_joint)) == pytest.approx(0.5, abs=1e-6)
    assert scipy.stats.entropy(log_p.exp().numpy()) == pytest.approx(2.86291, abs=1e-4)
    assert scipy.stats.entropy(log_joint.exp().sum(1).numpy()) == pytest.approx(0.611, abs=1e-3)
    assert log_joint.exp().amax(0).sum() == pytest.approx(0.9605, abs=5e-5)  # accuracy of the best guess of the class
    peak = int(log_p.argmax())
    assert peak == 10
    assert float(log_p[peak].exp()) == pytest.approx(0.123, abs=5e-4)
    assert float(log_p[19].exp()) == pytest.approx(0.034, abs=5e-4)


def test_bins_are_those_of_scipy_into_the_far_tails():
    edges = np.arange(31) - 0.5
    for i, (mean, sigma, share) in enumerate(zip(CLASS_MEANS, CLASS_SIGMAS, CLASS_PROBABILITIES, strict=True)):
        distribution = scipy.stats.norm(mean, sigma)
        bins = np.where(edges[:-1] > mean, -np.diff(distribution.sf(edges)), np.diff(distribution.cdf(edges)))
        assert toy_data()[i].exp().numpy() == pytest.approx(share * bins / bins.sum(), rel=1e-10)


# --- the model -----------------------------------------------------------------------------------------------------


def test_distributions_are_of_the_stated_form():
    channel = ToyChannel(2, num_symbols=4)
    s = np.arange(4) / 3
    log_e, log_d, log_m = (distribution.detach().numpy() for distribution in channel.distributions())
    for parameters, distribution in ((channel.encoder, log_e), (channel.decoder, log_d)):
        w, b = parameters.detach().numpy()
        for run, given in ((0, 1), (1, 3)):
            weights = np.exp(-((w[run] * s[given] - b[run]) ** 2))
            assert distribution[run, given] == pytest.approx(np.log(weights / weights.sum()), abs=EXACT)
    assert np.exp(log_m).sum(-1) == pytest.approx([1, 1], abs=EXACT)


def test_class_information_is_that_of_the_code_and_the_class():
    channel, joint = ToyChannel(2), toy_data()
    e = channel.distributions()[0].exp().detach().numpy()
    for run in range(2):
        with_code = joint.exp().numpy() @ e[run]
        independent = np.outer(with_code.sum(1), with_code.sum(0))
        expected = scipy.stats.entropy(with_code.ravel(), independent.ravel())
        assert class_information(joint, channel.distributions()[0])[run].item() == pytest.approx(expected, abs=EXACT)


def test_runs_side_by_side_train_as_if_alone():
    log_p = toy_data().logsumexp(0)
    channel = train_channel(log_p, beta_loss(0.5), runs=2, steps=20, seed=0, progress=False)
    torch.manual_seed(0)
    start = ToyChannel(2)
    alone = ToyChannel(1)
    with torch.no_grad():
        for mine, both in zip(alone.parameters(), start.parameters(), strict=True):
            mine.copy_(both[..., 1:, :])
    optimizer = torch.optim.Adam(alone.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        optimizer.zero_grad()
        terms = alone.terms(log_p)
        (terms.distortion + 0.5 * terms.rate).sum().backward()
        optimizer.step()
        schedule.step()
    for mine, both in zip(alone.parameters(), channel.parameters(), strict=True):
        assert (mine - both[..., 1:, :]).abs().max() < 1e-9


def test_training_leaves_the_random_state_and_checks_log_p():
    before = torch.get_rng_state()
    train_channel(toy_data().logsumexp(0), beta_loss(), steps=1, seed=3, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="exponentials sum to one"):
        train_channel(torch.zeros(4), beta_loss(), steps=1, progress=False)


def measured(losses, runs, **training):
    """Terms, KL(p || g) and I(z; z*) of some runs of each loss, all trained side by side: (len(losses), runs) each."""

    def loss(terms):
        return torch.cat([f(terms)[i * runs : (i + 1) * runs] for i, f in enumerate(losses)])

    joint = toy_data()
    log_p = joint.logsumexp(0)
    channel = train_channel(log_p, loss, runs=len(losses) * runs, seed=0, progress=False, **training)
    with torch.no_grad():
        terms = channel.terms(log_p)
        fit = divergence(log_p, generated(*channel.distributions()[1:]))
        found = [
            t.reshape(len(losses), runs) for t in (*terms, fit, class_information(joint, channel.distributions()[0]))
        ]
    entropy, distortion, rate, information = found[:4]
    assert bool((entropy - distortion <= information + EXACT).all())
    assert bool((information <= rate + EXACT).all())
    return found


def test_a_target_rate_is_met_at_the_evidence_of_the_elbo():
    entropy, distortion, rate, _, fit, classes = measured(
        [beta_loss(), target_rate_loss(0.5, weight=2.0)], 2, steps=3000, learning_rate=0.1
    )
    assert (rate[1] - 0.5).abs().max() < 0.003
    assert (rate + distortion - entropy).max() < 0.01
    assert fit.max() < 0.005
    assert classes[1].min() > 0.15


@pytest.fixture(scope="module")
def trained():
    """Five runs each of the ELBO and of the target rate at weights one and two."""
    return measured([beta_loss(), target_rate_loss(0.5), target_rate_loss(0.5, weight=2.0)], 5)


@pytest.mark.slow
def test_a3_the_elbo_is_at_its_optimum_and_the_code_empty(trained):
    entropy, distortion, rate, _, fit, classes = (t[0] for t in trained)
    assert rate.max() < 0.01
    assert (rate + distortion - entropy).abs().max() < 0.002
    assert fit.max() < 0.001
    assert classes.max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("row", "low", "high"), [(1, 0.49, 0.55), (2, 0.497, 0.503)])
def test_a4_the_target_rate_is_met_and_the_code_tells_the_class(trained, row, low, high):
    entropy, distortion, rate, _, fit, classes = (t[row] for t in trained)
    assert bool(((rate > low) & (rate < high)).all())
    assert (rate + distortion - entropy).max() < 0.01
    assert fit.max() < 0.005
    assert classes.min() > 0.15
    assert classes.median() > 0.25
