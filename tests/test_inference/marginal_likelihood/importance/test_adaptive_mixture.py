"""Adaptive importance sampling: intervals that cover, on a thousand problems, and where it is blind."""

import math
import typing

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch
from linear_problems import GUIDES, keeps_its_word, mean_field, problem, record, shifted
from pyro_problems import (
    COUNTS,
    SQUARES,
    noisy,
    one_mode_guide,
    poisson_evidence,
    poisson_guide,
    poisson_model,
    square_evidence,
    square_model,
)

from inference import Adaptive, Bridge, evidence
from inference.distributions.batched_gaussian import Gaussian
from inference.distributions.student_t import Student, Students, concatenate, moment_fit, refit, temperatures
from inference.marginal_likelihood.base.method import Problem
from inference.marginal_likelihood.base.result import ASYMPTOTIC, PROBABILISTIC
from inference.marginal_likelihood.importance.mode_starts import find_starts
from inference.marginal_likelihood.importance.proposal import Proposal, guide_with_density
from inference.pair.call import Call
from inference.posterior.modes import Modes
from inference.weights.summary import merge, summarise
from zoo.benchmarks.ladder import banana, bimodal, fold, half_seen_fold, ring


def adaptive(model, x, guide=None, method=Adaptive(), seed=0, **options):  # noqa: B008
    return evidence(model, x, method=method, guide=guide, seed=seed, progress=False, **options)


# --- intervals keep their word ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [pytest.param(mean_field, marks=pytest.mark.slow), shifted, pytest.param(None, marks=pytest.mark.slow)],
    ids=["mean field", "shifted", "no guide"],
)
def test_a_hundred_problems_are_covered(change):
    result = record(Adaptive(4000), change, num_models=6, num_data=17)
    assert keeps_its_word(result)
    assert result.two_sided >= 0.9 * result.num
    assert result.width <= 0.1


def turned_kinks(dim, num, seed):
    """x = Q' f(Q z) + noise with f of six ReLUs a coordinate: as many integrals on lines, and kinks across them all."""
    rng = torch.Generator().manual_seed(seed)
    slopes, places = torch.randn(2, dim, 6, generator=rng, dtype=torch.float64)
    signs = torch.randint(2, (dim, 6), generator=rng) * 2.0 - 1.0
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64))[0]
    sigma = 0.3

    def decoder(u):
        return (slopes * (signs * (u.unsqueeze(-1) - places)).relu()).sum(-1)

    x = decoder(torch.randn(num, dim, generator=rng, dtype=torch.float64) @ turn)
    x = x + sigma * torch.randn(num, dim, generator=rng, dtype=torch.float64)
    line = torch.linspace(-9, 9, 40_001, dtype=torch.float64).view(-1, 1, 1)
    log_f = dist.Normal(0.0, 1.0).log_prob(line) + dist.Normal(decoder(line.expand(-1, 1, dim)), sigma).log_prob(x)
    return noisy(lambda z: decoder(z @ turn), dim, sigma), x, (log_f.logsumexp(0) + math.log(18 / 40_000)).sum(-1)


@pytest.mark.parametrize("dim", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_decoders_with_kinks_are_answered_and_covered(dim):
    """Newton's method stalls at another point from every start: these are no crowd of modes, whose end is unknown."""
    model, x, truth = turned_kinks(dim, num=20, seed=dim)
    got = adaptive(model, x, method=Adaptive(2000))
    two_sided = got.upper.isfinite()
    assert two_sided.double().mean() >= 0.8  # k-hat of 2000 draws denies a few
    holds = (got.lower <= truth) & (truth <= got.upper)
    assert scipy.stats.binom.cdf(int(holds[two_sided].sum()), int(two_sided.sum()), 0.95) > 1e-3
    assert (got.lower <= truth + 0.1)[~two_sided].all()


def test_intervals_of_half_the_size_do_not_cover():
    result = record(Adaptive(4000), mean_field, num_models=6, num_data=17, shrink=0.5)
    assert not keeps_its_word(result)


@pytest.mark.slow
@pytest.mark.parametrize("change", GUIDES.values(), ids=GUIDES)
def test_a_thousand_problems_are_covered_and_their_intervals_narrow(change):
    result = record("adaptive", change, num_models=60, num_data=17)
    print(change.__name__, result.line)
    assert result.num >= 1000
    assert keeps_its_word(result)
    assert result.two_sided >= 0.9 * result.num
    assert result.width <= 0.1


def test_a_users_model_of_two_latents_agrees_with_quadrature():
    truth = poisson_evidence(COUNTS)
    for guide in (poisson_guide, None):
        got = adaptive(poisson_model, COUNTS, guide)
        assert got.guarantee == (ASYMPTOTIC,) * 3
        assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()
        assert float((got.upper - got.lower).max()) < 0.1


def test_one_datum_is_the_first_of_one():
    model, x, truth = problem(1, 1)
    got = adaptive(model, x)
    assert got.value.shape == (1,)
    assert abs(float(got.value) - truth[0]) < 4 * float(got.standard_error)


def test_a_model_in_float32_is_estimated_in_float64():
    model, x, _ = problem(4, 5)
    single = model.float()
    got = adaptive(single, x.float())
    truth = evidence(single, x.float(), method="exact").value
    assert got.value.dtype == torch.float64
    assert bool(((got.value - truth).abs() < 4 * got.standard_error).all())


def test_a_model_that_cannot_broadcast_gives_the_same():
    model, x, truth = problem(1, 2)
    got = adaptive(model, x, method=Adaptive(200, num_draws=100, num_rounds=2), broadcast=False)
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


def test_groups_of_data_are_put_together_in_order(monkeypatch):
    # One data point per group.
    monkeypatch.setattr("inference.marginal_likelihood.importance.adaptive_mixture._ELEMENTS", 5000)
    monkeypatch.setattr("inference.marginal_likelihood.importance.proposal._ELEMENTS", 5000)
    model, x, truth = problem(1, 4)
    got = adaptive(model, x, method=Adaptive(2000))
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


# --- a tail in doubt -------------------------------------------------------------------------------


def dirichlet_counts(prior, num, seed):
    """Multinomial counts with a Dirichlet prior: model, data, and log-evidence in closed form."""
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(prior, num)
    x = torch.from_numpy(np.stack([generator.multinomial(200, row) for row in p])).double()
    before, after = torch.tensor(prior).double(), torch.tensor(prior).double() + x
    truth = before.sum().lgamma() - after.sum(-1).lgamma() + (after.lgamma() - before.lgamma()).sum(-1)

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(before))
            pyro.factor("x", (x * p.log()).sum(-1))

    return model, x, truth


def test_where_the_tail_is_in_doubt_rounds_go_on(monkeypatch):
    model, x, truth = dirichlet_counts([0.6] * 6, 40, seed=0)
    again = adaptive(model, x)
    monkeypatch.setattr(Adaptive, "tail_in_doubt", lambda *_: torch.zeros(len(x), dtype=torch.bool))
    once = adaptive(model, x)
    kept, gained = once.upper.isfinite(), again.upper.isfinite() & ~once.upper.isfinite()
    assert int(gained.sum()) >= 2
    assert torch.equal(again.value[kept], once.value[kept])
    assert bool(((again.value - truth).abs() < 4 * again.standard_error)[gained].all())
    assert again.evaluations > once.evaluations


# --- what the guide covers is kept ---------------------------------------------------------------


def inside(made, method, *, seed=0):
    """Two-sided intervals, and how many of them hold the truth; one-sided bounds, and how many are above it."""
    got = adaptive(made.model, made.x, made.guide, method, seed)
    two, truth = torch.isfinite(got.upper), made.log_evidence
    held = (got.lower <= truth) & ((truth <= got.upper) | ~two)
    return int(two.sum()), int((held & two).sum()), int((~two).sum()), int((~held & ~two).sum())


@pytest.mark.parametrize("make", [fold, bimodal])
@pytest.mark.parametrize("sigma", [pytest.param(1e-2, marks=pytest.mark.slow), 1e-3])
@pytest.mark.parametrize("method", [Adaptive(2000), Bridge(2000)], ids=["adaptive", "bridge"])
def test_both_modes_of_a_guide_are_kept(make, sigma, method):
    torch.manual_seed(1)
    two, held, _, _ = inside(make(sigma, 100), method)
    assert two >= 90
    assert held >= scipy.stats.binom.ppf(0.001, two, 0.95)


@pytest.mark.parametrize("method", [Adaptive(2000), Bridge(2000)], ids=["adaptive", "bridge"])
def test_a_mode_that_the_guide_misses_is_found(method):
    torch.manual_seed(1)
    two, held, _, _ = inside(half_seen_fold(1e-2, 100), method)
    assert two >= 90
    assert held >= scipy.stats.binom.ppf(0.001, two, 0.95)


def highest_alone(*args):
    found = find_starts(*args)
    return found._replace(modes=Modes(*(part[:1] for part in found.modes)))


@pytest.mark.parametrize("method", [Adaptive(2000), Bridge(2000)], ids=["adaptive", "bridge"])
def test_one_mode_alone_does_not_cover(method, monkeypatch):
    """The twin."""
    monkeypatch.setattr("inference.marginal_likelihood.importance.mode_starts.find_starts", highest_alone)
    torch.manual_seed(1)
    two, held, _, _ = inside(half_seen_fold(1e-2, 100), method)
    assert held < scipy.stats.binom.ppf(0.001, two, 0.95)


@pytest.mark.parametrize("make", [banana, pytest.param(ring, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [Adaptive(2000), Bridge(2000)], ids=["adaptive", "bridge"])
def test_thin_bent_ridges_get_bounds_that_hold(make, method):
    torch.manual_seed(1)
    two, held, one, above = inside(make(1e-2, 16), method)
    assert held >= scipy.stats.binom.ppf(0.001, two, 0.95)
    assert one >= 8
    assert above <= scipy.stats.binom.ppf(0.999, one, 0.05)


def test_the_guides_share_keeps_a_mode_that_the_mixture_lost():
    torch.manual_seed(0)
    made = fold(1e-2, 20)
    problem_ = Problem(Call(made.model, made.guide, (made.x,)))
    one = made.guide.posterior(made.x)
    distributions = Student(Gaussian(one.locs[:, 0], one.sigmas[:, 0].unsqueeze(-1)), 6.0)
    distributions = Students((distributions,), torch.zeros(1, 20).double())
    log_joint = problem_.log_joint

    def errors(proposal):
        strata = [summarise(blocks, size) for blocks, size in proposal.log_weights(4000)]
        value, error = (strata[0] if len(strata) == 1 else merge(*strata)).iwae
        return (value - made.log_evidence) / error

    apart = made.x[:, 0] > 0.1  # both modes matter and stand apart
    with torch.no_grad():
        assert bool((errors(Proposal(log_joint, distributions, *guide_with_density(problem_))).abs() < 4).all())
        assert bool((errors(Proposal(log_joint, distributions)) < -4)[apart].all())


def test_a_guide_that_knows_no_density_gives_starts():
    class Roots(dist.TorchDistribution):
        support = torch.distributions.constraints.real
        arg_constraints: typing.ClassVar = {}

        def __init__(self, x):
            self.root = x[:, 0].sqrt()
            super().__init__(self.root.shape, validate_args=False)

        def rsample(self, sample_shape=()):
            shape = (*sample_shape, *self.root.shape)
            sign = 1 - 2 * (torch.rand(shape) < 0.5).double()
            return sign * self.root + 0.01 * torch.randn(shape).double()

        def expand(self, batch_shape, _instance=None):
            new = Roots.__new__(Roots)
            new.root = self.root.expand(batch_shape)
            dist.TorchDistribution.__init__(new, batch_shape, validate_args=False)
            return new

        def log_prob(self, value):
            raise NotImplementedError

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Roots(x))

    assert guide_with_density(Problem(Call(square_model, guide, (SQUARES,)))) == (None, None)
    got = adaptive(square_model, SQUARES, guide)
    assert (np.abs(got.value.numpy() - square_evidence(SQUARES)) < 4 * got.standard_error.numpy()).all()


# --- modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [None, one_mode_guide])
def test_mirrored_modes_are_found_whatever_the_guide(guide):
    truth = square_evidence(SQUARES)
    got = adaptive(square_model, SQUARES, guide)
    assert got.guarantee == (ASYMPTOTIC,) * 3
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()


def cubic(z):
    return z**3 - 3 * z


def sine(z):
    return torch.sin(3 * z)


@pytest.mark.parametrize(
    ("curve", "sigma", "seen"),
    [
        (cubic, 0.5, False),
        (sine, 0.1, True),
        pytest.param(cubic, 0.5, True, marks=pytest.mark.slow),
        pytest.param(cubic, 0.01, False, marks=pytest.mark.slow),
        pytest.param(cubic, 0.01, True, marks=pytest.mark.slow),
        pytest.param(sine, 0.1, False, marks=pytest.mark.slow),
    ],
)
def test_curves_with_many_modes_are_covered(curve, sigma, seen):
    z = torch.randn(100, dtype=torch.float64)
    x = (curve(z) + sigma * torch.randn(100, dtype=torch.float64)).unsqueeze(1)
    grid = torch.linspace(-9, 9, 900_001, dtype=torch.float64)
    priors, means = dist.Normal(0.0, 1.0).log_prob(grid), curve(grid)
    truth = torch.stack([(priors + dist.Normal(means, sigma).log_prob(one)).logsumexp(0) for one in x]) + math.log(2e-5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(curve(z), sigma), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(z, 0.3 * sigma + 0.02))

    got = adaptive(model, x, guide if seen else None)
    two = got.upper.isfinite()
    held = int(((got.lower <= truth) & (truth <= got.upper))[two].sum())
    assert int(two.sum()) >= 75
    assert held >= scipy.stats.binom.ppf(0.001, int(two.sum()), 0.95)
    assert bool((got.lower <= truth)[~two].all())


def squares(x):
    """x_k = z_k^2 + noise: two modes a coordinate."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.1).to_event(1), obs=x)


def squares_data(dim):
    x = torch.linspace(0.5, 2.0, 2 * dim, dtype=torch.float64).reshape(2, dim)
    return x, square_evidence(x.reshape(-1, 1)).reshape(2, dim).sum(-1)


def test_sixteen_modes_are_found_without_a_grid():
    x, truth = squares_data(4)
    got = adaptive(squares, x)
    assert got.guarantee == (ASYMPTOTIC,) * 2
    assert (np.abs(got.value.numpy() - truth) < 4 * got.standard_error.numpy()).all()
    for note in got.notes:
        assert note.startswith("16 modes found from ")
        assert note.endswith("independent starts; the last look found none that matters")


def test_more_modes_than_were_looked_for_leave_no_upper_end():
    x, truth = squares_data(9)
    got = adaptive(squares, x, method=Adaptive(2000, num_draws=200, num_rounds=2))
    assert got.guarantee == (PROBABILISTIC,) * 2
    assert got.upper.tolist() == [math.inf] * 2
    assert (got.lower.numpy() < truth).all()
    assert all(note.endswith("there may be further ones that matter") for note in got.notes)


# --- parts -----------------------------------------------------------------------------------------


def random_student(dim=3, num_data=2, degrees=5.0):
    factor = torch.randn(num_data, dim, dim).double().tril() + 2 * torch.eye(dim).double()
    return Student(Gaussian(torch.randn(num_data, dim).double(), factor), degrees)


def test_the_student_t_is_scipys_and_its_draws_follow_it():
    distribution = random_student()
    u, log_density = distribution.draw(4000)
    for n in range(2):
        loc, factor = (part[n].numpy() for part in distribution.gaussian)
        reference = scipy.stats.multivariate_t(loc, factor @ factor.T, df=5)
        np.testing.assert_allclose(log_density[:, n].numpy(), reference.logpdf(u[:, n].numpy()), rtol=1e-10)
        np.testing.assert_allclose(
            distribution.log_prob(u)[:, n].numpy(), reference.logpdf(u[:, n].numpy()), rtol=1e-10
        )
        distance = (np.linalg.solve(factor, (u[:, n].numpy() - loc).T) ** 2).sum(0)
        assert scipy.stats.kstest(distance / 3, scipy.stats.f(3, 5).cdf).pvalue > 1e-4
        # The twin: a Gaussian's distances.
        assert scipy.stats.kstest(distance, scipy.stats.chi2(3).cdf).pvalue < 1e-4


def random_mixture():
    return Students((random_student(), random_student()), torch.tensor([[0.3, 0.0], [0.7, 1.0]]).double().log())


def numpy_terms(mixture, u, n):
    """Shares times densities of the distributions of data point n, (J, S)."""
    distributions = [[part[n].numpy() for part in distribution.gaussian] for distribution in mixture.components]
    densities = [scipy.stats.multivariate_t(loc, f @ f.T, df=5).pdf(u[:, n].numpy()) for loc, f in distributions]
    return mixture.log_shares[:, n].exp().numpy()[:, None] * densities


def test_a_mixtures_density_is_the_sum_and_its_draws_have_its_mean():
    mixture = random_mixture()
    u, log_density = mixture.draw(20_000)
    for n in range(2):
        np.testing.assert_allclose(log_density[:, n].exp().numpy(), numpy_terms(mixture, u, n).sum(0), rtol=1e-9)
        shares = mixture.log_shares[:, n].exp()
        mean = sum(
            share * distribution.gaussian.loc[n] for share, distribution in zip(shares, mixture.components)
        ).numpy()
        error = u[:, n].std(0).numpy() / math.sqrt(20_000)
        assert (np.abs(u[:, n].mean(0).numpy() - mean) < 4 * error).all()
        np.testing.assert_allclose(mixture.within.loc[n].numpy(), mean, rtol=1e-10)


def test_a_refit_is_a_step_of_expectation_and_maximisation():
    before, u, log_weights = random_mixture(), torch.randn(4000, 2, 3).double(), torch.randn(4000, 2).double()
    got = refit(u, log_weights, before)
    terms = numpy_terms(before, u, 0)
    weights = np.exp(log_weights[:, 0].numpy()) * terms / terms.sum(0)
    np.testing.assert_allclose(got.log_shares[:, 0].exp().numpy(), weights.sum(1) / weights.sum(), rtol=1e-9)
    for distribution, own in zip(got.components, weights):
        np.testing.assert_allclose(distribution.gaussian.loc[0].numpy(), np.average(u[:, 0].numpy(), 0, own), rtol=1e-9)
    assert got.log_shares[:, 1].exp().tolist() == pytest.approx([0, 1])


def test_unsupported_components_fall_away_and_mixtures_keep_order():
    one, two = random_mixture(), random_mixture().rows(torch.tensor([1]))
    u = two.components[1].draw(500)[0]
    single = refit(u, torch.zeros(500, 1).double(), two)
    assert len(single.components) == 1
    both, at = concatenate([one, single]), torch.randn(7, 3, 3).double()
    expected = torch.cat([one.log_prob(at[:, :2]), single.log_prob(at[:, 2:])], 1)
    torch.testing.assert_close(both.log_prob(at), expected)


def test_moments_are_weighted_and_shrunk_towards_those_before():
    distribution, u, log_weights = random_student(), torch.randn(50, 2, 3).double(), torch.randn(50, 2).double()
    got = moment_fit(u, log_weights, distribution)
    for n in range(2):
        w = np.exp(log_weights[:, n].numpy())
        size = w.sum() ** 2 / (w**2).sum()
        covariance = np.cov(u[:, n].numpy().T, aweights=w, ddof=0)
        before = distribution.gaussian.factor[n].numpy()
        expected = (size * covariance + 6 * before @ before.T) / (size + 6)
        factor = got.gaussian.factor[n].numpy()
        np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-10)
        np.testing.assert_allclose(got.gaussian.loc[n].numpy(), np.average(u[:, n].numpy(), 0, w), rtol=1e-10)


def test_weights_that_are_all_zero_leave_the_distribution():
    distribution = random_student()
    log_weights = torch.zeros(50, 2).double()
    log_weights[:, 1] = -math.inf
    got = moment_fit(torch.randn(50, 2, 3).double(), log_weights, distribution)
    assert torch.equal(got.gaussian.factor[1], distribution.gaussian.factor[1])
    assert torch.equal(got.gaussian.loc[1], distribution.gaussian.loc[1])
    assert not torch.equal(got.gaussian.loc[0], distribution.gaussian.loc[0])


def test_powers_leave_the_size_that_is_asked_for():
    log_weights = torch.stack([10 * torch.randn(500), 0.1 * torch.randn(500)], 1).double()
    power, size = temperatures(log_weights, 50)

    def kish(p, n):
        w = np.exp(p * (log_weights[:, n] - log_weights[:, n].max()).numpy())
        return w.sum() ** 2 / (w**2).sum()

    expected = scipy.optimize.brentq(lambda p: kish(p, 0) - 50, 1e-6, 1)
    assert float(power[0]) == pytest.approx(expected, abs=1e-6)
    assert float(power[1]) == 1
    np.testing.assert_allclose(size.numpy(), [50, kish(1, 1)], rtol=1e-4)


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples to be at least 1, got 0"),
        ({"num_draws": 0}, "num_draws to be at least 1, got 0"),
        ({"num_rounds": 0}, "num_rounds to be at least 1, got 0"),
        ({"degrees": 0.0}, "expected positive finite degrees of freedom, got 0.0"),
    ],
)
def test_settings_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(**options)


def test_a_density_that_breaks_down_is_named():
    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            factor = torch.where(z > 6.0, math.nan, 0.25 * z)
            pyro.factor("x", factor + 0 * x[:, 0])

    with pytest.raises(FloatingPointError, match=r"log weight of data point \d+ is NaN"):
        adaptive(broken, torch.zeros(3, 1).double())
