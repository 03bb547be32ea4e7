"""The Student-t guide: density, quantiles and gradients against SciPy, under vmap, and what its tails are for."""

import math

import pytest
import scipy.stats
import torch
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from guides import MeanField, StudentT
from guides.student_t import DiagStudentT
from inference import ELBO, fit, log_weights, pareto_k
from zoo import LinearVAE

DEGREES = (0.7, 2.5, 10.0, 1e4)


def distribution(degrees, num=1, dtype=torch.float64):
    """One coordinate at 1 with scale 2, ``num`` times."""
    loc = torch.ones(num, 1, dtype=dtype)
    return DiagStudentT(loc, 2 * loc, degrees * loc)


@pytest.mark.parametrize("degrees", DEGREES)
def test_the_density_is_scipys(degrees):
    z = torch.linspace(-300, 300, 1001, dtype=torch.float64)
    expected = scipy.stats.t(degrees, loc=1, scale=2).logpdf(z.numpy())
    # Log gamma functions of 5000, of size 4e4, differ by 4.6: eleven digits are left.
    got = distribution(degrees, len(z)).log_prob(z.unsqueeze(-1))
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("degrees", DEGREES)
def test_the_quantiles_of_draws_are_scipys(degrees):
    draws = distribution(degrees).sample((100_000,))[:, 0, 0].numpy()
    assert scipy.stats.kstest(draws, scipy.stats.t(degrees, loc=1, scale=2).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(draws, scipy.stats.t(0.9 * degrees, loc=1, scale=2.1).cdf).pvalue < 1e-6


def test_coordinates_are_independent():
    one = torch.zeros(1, 2, dtype=torch.float64)
    squares = DiagStudentT(one, one + 1, one + 10).sample((100_000,))[:, 0].square()
    assert abs(scipy.stats.pearsonr(*squares.numpy().T).pvalue) > 1e-3


def test_mean_and_variance_are_scipys():
    mean, variance = scipy.stats.t(2.5, loc=1, scale=2).stats()
    got = distribution(2.5)
    assert (float(got.mean), float(got.variance)) == pytest.approx((mean, variance))


def test_draws_carry_the_gradient_of_all_three_parameters():
    # d E[f(z)] / d(loc, sigma, degrees) for f = tanh, against SciPy's integral, differenced.
    parameters = [torch.tensor([[v]], dtype=torch.float64, requires_grad=True) for v in (0.3, 1.2, 3.0)]
    wide = [p.expand(200_000, 1) for p in parameters]
    per_draw = torch.autograd.grad(DiagStudentT(*wide).rsample().tanh().sum(), wide)

    def expectation(values):
        loc, scale, degrees = values
        return scipy.stats.t(degrees, loc=loc, scale=scale).expect(lambda z: math.tanh(z), epsabs=1e-12)

    for i, gradient in enumerate(per_draw):
        step = [1e-3 * (i == j) for j in range(3)]
        up, down = ([p.item() + sign * s for p, s in zip(parameters, step)] for sign in (1, -1))
        expected = (expectation(up) - expectation(down)) / 2e-3
        error = float(gradient.std()) / math.sqrt(len(gradient))
        assert abs(float(gradient.mean()) - expected) < 4 * error + 1e-6
        assert abs(expected) > 8 * error  # a gradient that is missing would be noticed


def test_many_degrees_of_freedom_are_a_gaussian():
    z = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(-1)
    expected = torch.from_numpy(scipy.stats.norm(1, 2).logpdf(z[:, 0].numpy()))
    torch.testing.assert_close(distribution(1e6, 7).log_prob(z), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [1e12, 1e16, 1e20])
def test_no_degrees_of_freedom_make_a_density_of_rounding(degrees):
    z = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(-1)
    expected = torch.from_numpy(scipy.stats.norm(1, 2).logpdf(z[:, 0].numpy()))
    torch.testing.assert_close(distribution(degrees, 7).log_prob(z), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("degrees", [199.0, 200.0, 201.0, 300.0])
def test_the_series_of_the_norm_goes_on_from_the_gamma_functions(degrees):
    expected = scipy.stats.t(degrees, loc=1, scale=2).logpdf(0.0)
    assert abs(float(distribution(degrees, 1).log_prob(torch.zeros(1, 1).double())[0]) - expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_and_their_gradients_are_finite(dtype):
    degrees = torch.full((100_000, 1), 2.0, dtype=dtype, requires_grad=True)
    draws = DiagStudentT(torch.zeros_like(degrees), torch.ones_like(degrees), degrees).rsample()
    (gradient,) = torch.autograd.grad(draws.sum(), degrees)
    assert bool(draws.isfinite().all() and gradient.isfinite().all())


def test_it_draws_under_vmap_and_in_a_traced_graph():
    draws = vmap(lambda _: distribution(3.0).rsample()[0, 0], randomness="different")(torch.zeros(100))
    assert len(set(draws.tolist())) == 100
    graph = make_fx(lambda x: DiagStudentT(x, x.exp(), x.exp()).rsample())(torch.zeros(4, 2))
    torch.manual_seed(1)
    expected = DiagStudentT(*[torch.ones(4, 2), torch.ones(4, 2).exp(), torch.ones(4, 2).exp()]).rsample()
    torch.manual_seed(1)
    torch.testing.assert_close(graph(torch.ones(4, 2)), expected)


def test_a_larger_batch_has_the_same_distribution():
    small = DiagStudentT(*torch.rand(3, 4, 2).double().add(1).unbind(0))
    wide, z = small.expand((3, 4)), torch.randn(3, 4, 2).double()
    assert (wide.batch_shape, wide.event_shape, wide.rsample((5,)).shape) == ((3, 4), (2,), (5, 3, 4, 2))
    torch.testing.assert_close(wide.log_prob(z), torch.stack([small.log_prob(one) for one in z]))


def test_free_parameters_give_what_the_encoder_gives():
    guide, x, z = StudentT(3, 2, hidden=(8,)).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    local = guide.local(x)
    torch.testing.assert_close(local.posterior(x).log_prob(z), guide.posterior(x).log_prob(z))


def test_a_guide_on_the_unit_interval_has_a_density_of_mass_one():
    guide = StudentT(3, 1, hidden=(8,), support=(0.0, 1.0)).double()
    z = (torch.arange(20_000, dtype=torch.float64) + 0.5).div(20_000).reshape(-1, 1, 1)
    density = guide.posterior(torch.randn(1, 3).double()).log_prob(z).exp()
    assert float(density.mean().detach()) == pytest.approx(1, abs=1e-3)


def narrow(guide_class):
    """A guide with the posterior's place and half its width, for a linear model of one latent."""
    model = LinearVAE(2, 1, sigma=0.5).double().requires_grad_(False)
    guide, exact = guide_class(2, 1, encoder=torch.nn.Identity()), model.posterior(torch.zeros(1, 2).double())
    sigma = 0.5 * float(exact.variance.sqrt())

    def encode(x):
        loc = model.posterior(x).loc
        rest = guide.num_parameters - 2
        return torch.cat([loc, torch.full_like(loc, math.log(sigma)), torch.zeros(len(x), rest).double()], -1)

    guide.encode = encode
    return model, guide.double()


def test_its_tails_tame_the_weights_of_a_guide_that_is_too_narrow():
    x = torch.randn(20, 2).double()
    gaussian, heavy = (pareto_k(log_weights(*narrow(g), x, num_samples=20_000)).value for g in (MeanField, StudentT))
    # Half the width has k = 3/4 for a Gaussian; above one half the weights have no variance.
    assert float(gaussian.median()) > 0.6
    assert float(heavy.max()) < 0.5


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


def test_training_finds_the_degrees_of_a_heavy_tailed_posterior():
    class Heavy(LinearVAE):
        """z is Student-t of 4 degrees, and x says nothing of it."""

        def prior(self):
            one = torch.ones(1, dtype=torch.float64)
            return DiagStudentT(0 * one, one, 4 * one)

    model = Heavy(1, 1).double().requires_grad_(False)
    model.W.zero_()
    guide, x = StudentT(1, 1, hidden=(4,)).double(), torch.zeros(50, 1).double()
    fit(model, guide, x, steps=1500, objective=ELBO(20), optimizer=adam, seed=0, progress=False)
    with torch.no_grad():
        found = guide.posterior(x[:1])
    assert float(found.degrees) == pytest.approx(4, rel=0.15)
    assert float(found.sigma) == pytest.approx(1, rel=0.05)
