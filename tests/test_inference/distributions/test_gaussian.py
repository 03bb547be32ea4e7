"""The two Gaussians against SciPy, torch and Monte Carlo, for every way in which their arguments broadcast."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch.distributions import kl_divergence
from torch.func import vmap

from inference.distributions.gaussian import DiagNormal, FullNormal, as_full_normal, coordinate_kl, diagonal_moments

DIM = 3


def positive(*shape):
    return 0.3 + torch.rand(*shape, dtype=torch.float64)


def real(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def lower(*shape):
    return torch.tril(real(*shape, DIM, DIM), -1) + torch.diag_embed(positive(*shape, DIM))


# How the arguments may broadcast: name to a function that makes mean and sigma, or mean and factor.
DIAGONAL = {
    "one": lambda: (real(DIM), positive(DIM)),
    "spherical": lambda: (real(DIM), positive(1)),
    "batch": lambda: (real(4, DIM), positive(4, DIM)),
    "shared sigma": lambda: (real(4, DIM), positive(DIM)),
    "shared spherical sigma": lambda: (real(4, DIM), positive(1)),
    "spherical sigma by datum": lambda: (real(4, DIM), positive(4, 1)),
    "shared mean": lambda: (real(DIM), positive(4, 1)),
    "shared mean, own sigmas": lambda: (real(DIM), positive(4, DIM)),
    "outer": lambda: (real(2, 1, DIM), positive(4, DIM)),
    "outer spherical": lambda: (real(2, 1, DIM), positive(4, 1)),
    "one dimension": lambda: (real(4, 1), positive(4, 1)),
}
FULL = {
    "one": lambda: (real(DIM), lower()),
    "batch": lambda: (real(4, DIM), lower(4)),
    "shared factor": lambda: (real(4, DIM), lower()),
    "outer": lambda: (real(2, 4, DIM), lower(4)),
}


def distributions():
    for name, make in DIAGONAL.items():
        yield pytest.param(lambda make=make: DiagNormal(*make()), id=f"diagonal, {name}")
    for name, make in FULL.items():
        yield pytest.param(lambda make=make: FullNormal(*make()), id=f"full, {name}")


def moments(distribution):
    """Mean and covariance as full arrays of shape batch + ..., from the arguments alone."""
    if isinstance(distribution, DiagNormal):
        dim = distribution.loc.shape[-1]
        mean = torch.broadcast_to(distribution.loc, (*distribution.batch_shape, dim))
        covariance = torch.diag_embed(torch.broadcast_to(distribution.sigma, (*distribution.batch_shape, dim)) ** 2)
    else:
        mean, factor = torch.broadcast_to(distribution.loc, (*distribution.batch_shape, DIM)), distribution.scale_tril
        covariance = factor @ factor.mT
    return mean.numpy(), covariance.numpy()


def scipy_distributions(distribution):
    """One frozen SciPy distribution per batch member."""
    mean, covariance = moments(distribution)
    dim = mean.shape[-1]
    return [
        scipy.stats.multivariate_normal(m, c) for m, c in zip(mean.reshape(-1, dim), covariance.reshape(-1, dim, dim))
    ]


def assert_close(got, expected, tolerance=1e-12):
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=distributions())
def distribution(request):
    return request.param()


# --- one distribution ------------------------------------------------------------------------------


def test_log_prob_is_scipys(distribution):
    value = real(*distribution.batch_shape, *distribution.event_shape)
    rows = value.reshape(-1, distribution.event_shape[0]).numpy()
    expected = [one.logpdf(row) for one, row in zip(scipy_distributions(distribution), rows)]
    got = distribution.log_prob(value)
    assert got.shape == distribution.batch_shape
    assert_close(got.reshape(-1), expected)


def test_log_prob_broadcasts_over_samples(distribution):
    value = real(7, *[1 for _ in distribution.batch_shape], *distribution.event_shape)
    got = distribution.log_prob(value)
    assert got.shape == (7, *distribution.batch_shape)
    expected = [
        distribution.log_prob(one.expand(distribution.batch_shape + distribution.event_shape)).numpy() for one in value
    ]
    assert_close(got, np.stack(expected))


def test_entropy_is_scipys(distribution):
    got = distribution.entropy()
    assert got.shape == distribution.batch_shape
    assert_close(got.reshape(-1), [one.entropy() for one in scipy_distributions(distribution)])


def test_mean_and_variance_are_those_of_the_arguments(distribution):
    mean, covariance = moments(distribution)
    assert_close(distribution.mean, mean)
    assert_close(distribution.variance, np.diagonal(covariance, axis1=-2, axis2=-1))
    assert_close(distribution.stddev, np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1)))


def test_draws_have_the_distributions_moments(distribution):
    num = 20_000
    draws = distribution.rsample((num,))
    assert draws.shape == (num, *distribution.batch_shape, *distribution.event_shape)
    assert draws.dtype == torch.float64
    mean, covariance = moments(distribution)
    centred = draws.numpy() - mean
    second = np.einsum("s...i,s...j->...ij", centred, centred) / num
    variances = np.diagonal(covariance, axis1=-2, axis2=-1)
    assert np.abs(centred.mean(0) / np.sqrt(variances / num)).max() < 5
    # Var of z_i z_j is c_ii c_jj + c_ij^2.
    error = np.sqrt((variances[..., :, None] * variances[..., None, :] + covariance**2) / num)
    assert np.abs((second - covariance) / error).max() < 5


def test_draws_of_a_batch_are_independent(distribution):
    draws = distribution.rsample((20_000,)).flatten(1).numpy()
    dim = distribution.event_shape[0]
    correlation = np.corrcoef(draws.T)
    across = np.kron(np.eye(len(correlation) // dim), np.ones((dim, dim))) == 0
    assert np.abs(correlation[across]).max(initial=0) < 5 / math.sqrt(20_000)


def test_draws_are_reparameterised(distribution):
    """The gradient of a draw in the mean is one, and that in sigma the noise."""
    loc = torch.zeros(distribution.batch_shape + distribution.event_shape, dtype=torch.float64, requires_grad=True)
    second = (
        (distribution.sigma if isinstance(distribution, DiagNormal) else distribution._unbroadcasted_scale_tril)
        .clone()
        .requires_grad_()
    )
    draw = type(distribution)(loc, second).rsample()
    draw.sum().backward()
    assert bool((loc.grad == 1).all())
    if isinstance(distribution, DiagNormal):
        noise = (draw.detach() / second.detach()).sum_to_size(second.shape)
        assert_close(second.grad, noise.numpy(), 1e-10)
    else:
        assert float(second.grad.abs().sum()) > 0


def test_sample_carries_no_gradient(distribution):
    distribution = type(distribution)(
        distribution.loc.clone().requires_grad_(),
        distribution.sigma if isinstance(distribution, DiagNormal) else distribution.scale_tril,
    )
    assert not distribution.sample().requires_grad
    assert distribution.rsample().requires_grad


@pytest.mark.parametrize("leading", [(), (2,), (5, 2)])
def test_expand_changes_the_batch_alone(distribution, leading):
    batch = torch.Size(leading) + distribution.batch_shape
    expanded = distribution.expand(batch)
    assert isinstance(expanded, type(distribution))
    assert (expanded.batch_shape, expanded.event_shape) == (batch, distribution.event_shape)
    value = real(*batch, *distribution.event_shape)
    assert_close(expanded.log_prob(value), distribution.log_prob(value).numpy())
    assert_close(expanded.entropy(), distribution.entropy().expand(batch).numpy())
    assert_close(expanded.mean, distribution.mean.expand(batch + distribution.event_shape).numpy())
    assert_close(expanded.variance, distribution.variance.expand(batch + distribution.event_shape).numpy())
    assert expanded.rsample((3,)).shape == (3, *batch, *distribution.event_shape)
    # Expanded distributions draw afresh for every member of the new batch.
    if leading:
        assert len(expanded.rsample().reshape(-1).unique()) == expanded.rsample().numel()


def test_expand_copies_no_scale():
    sigma, factor = positive(1), lower()
    assert DiagNormal(real(DIM), sigma).expand((1000,)).sigma is sigma
    expanded = FullNormal(real(DIM), factor).expand((1000,))
    assert expanded._unbroadcasted_scale_tril.data_ptr() == factor.data_ptr()
    assert expanded._unbroadcasted_scale_tril.shape == (DIM, DIM)


def test_a_distribution_has_its_arguments_dtype_and_runs_in_vmap():
    for distribution in (DiagNormal(torch.zeros(DIM), torch.ones(1)), FullNormal(torch.zeros(DIM), torch.eye(DIM))):
        assert distribution.rsample().dtype == torch.float32
        assert distribution.log_prob(torch.zeros(DIM)).dtype == torch.float32
    draws = vmap(lambda loc: DiagNormal(loc, torch.ones(1)).rsample(), randomness="different")(torch.zeros(6, DIM))
    assert len(draws.reshape(-1).unique()) == 6 * DIM


@pytest.mark.parametrize("sigma", [1e-150, 1e-6, 1e6, 1e150])
def test_log_prob_holds_at_extreme_scales(sigma):
    zeros = torch.zeros(64, dtype=torch.float64)
    expected = 64 * scipy.stats.norm.logpdf(2.0) - 64 * math.log(sigma)
    for distribution in (DiagNormal(zeros, zeros[:1] + sigma), DiagNormal(zeros, zeros + sigma)):
        assert float(distribution.log_prob(zeros + 2 * sigma)) == pytest.approx(expected, rel=1e-13)


# --- Pyro's own methods ----------------------------------------------------------------------------


def test_to_event_zero_changes_nothing(distribution):
    value = real(*distribution.batch_shape, *distribution.event_shape)
    same = distribution.to_event(0)
    assert (same.batch_shape, same.event_shape) == (distribution.batch_shape, distribution.event_shape)
    assert_close(same.log_prob(value), distribution.log_prob(value).numpy())
    assert_close(kl_divergence(same, distribution), np.zeros(distribution.batch_shape), 1e-10)


def test_to_event_sums_over_the_batch():
    distribution = DiagNormal(real(4, DIM), positive(1))
    value = real(4, DIM)
    joint = distribution.to_event(1)
    assert (joint.batch_shape, joint.event_shape) == ((), (4, DIM))
    assert_close(joint.log_prob(value), distribution.log_prob(value).sum().numpy())


def test_mask_zeroes_what_it_hides(distribution):
    value = real(*distribution.batch_shape, *distribution.event_shape)
    mask = torch.rand(distribution.batch_shape) < 0.5
    assert_close(distribution.mask(mask).log_prob(value), np.where(mask, distribution.log_prob(value), 0.0))
    assert bool((distribution.mask(False).log_prob(value) == 0).all())


def test_expand_by_finds_its_place_in_a_plate():
    with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 4, dim=-1):
        assert pyro.sample("z", DiagNormal(real(DIM), positive(1))).shape == (7, 4, DIM)
        assert pyro.sample("y", FullNormal(real(4, DIM), lower(4))).shape == (7, 4, DIM)


# --- Kullback-Leibler ------------------------------------------------------------------------------


def torch_normal(distribution):
    """The same distribution as torch's own multivariate normal with a full factor."""
    mean, covariance = moments(distribution)
    return torch.distributions.MultivariateNormal(torch.from_numpy(mean.copy()), torch.from_numpy(covariance.copy()))


def torch_kl(q, p):
    """Torch's closed form over the common batch, one pair of members after the other."""
    batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    q, p = torch_normal(q).expand(batch), torch_normal(p).expand(batch)
    return kl_divergence(q, p).numpy()


PAIRED = {
    "one": lambda: (real(DIM), positive(DIM), lower()),
    "spherical": lambda: (real(DIM), positive(1), lower()),
    "batch": lambda: (real(4, DIM), positive(4, DIM), lower(4)),
    "shared scale": lambda: (real(4, DIM), positive(DIM), lower()),
    "shared spherical sigma": lambda: (real(4, DIM), positive(1), lower()),
    "spherical by datum": lambda: (real(4, DIM), positive(4, 1), lower(4)),
    "outer": lambda: (real(2, 1, DIM), positive(4, 1), lower(4)),
}
FORMS = {
    "diagonal": lambda loc, sigma, _: DiagNormal(loc, sigma),
    "full": lambda loc, _, factor: FullNormal(
        loc.expand(*torch.broadcast_shapes(loc.shape[:-1], factor.shape[:-2]), DIM), factor
    ),
}


@pytest.mark.parametrize("p_name", PAIRED)
@pytest.mark.parametrize("q_name", PAIRED)
@pytest.mark.parametrize("p_form", FORMS)
@pytest.mark.parametrize("q_form", FORMS)
def test_kl_is_torchs(q_form, p_form, q_name, p_name):
    q, p = FORMS[q_form](*PAIRED[q_name]()), FORMS[p_form](*PAIRED[p_name]())
    got = kl_divergence(q, p)
    assert_close(got.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape)), torch_kl(q, p), 1e-10)


@pytest.mark.parametrize("p_form", FORMS)
@pytest.mark.parametrize("q_form", FORMS)
def test_kl_is_the_mean_of_log_ratios(q_form, p_form):
    loc, sigma, factor = PAIRED["batch"]()
    q, p = FORMS[q_form](loc, sigma, factor), FORMS[p_form](loc + 1, 2 * sigma, 2 * factor)
    draws = q.rsample((20_000,))
    ratios = (q.log_prob(draws) - p.log_prob(draws)).numpy()
    error = ratios.std(0) / math.sqrt(len(ratios))
    kl = kl_divergence(q, p).numpy()
    assert (np.abs(ratios.mean(0) - kl) < 4 * error).all()
    # A KL that forgot its half does not pass.
    assert (np.abs(ratios.mean(0) - 2 * kl) > 6 * error).all()


def test_kl_of_a_distribution_to_itself_is_zero(distribution):
    assert_close(kl_divergence(distribution, distribution), np.zeros(distribution.batch_shape), 1e-12)


FOREIGN = {
    "torch Independent Normal": lambda loc, sigma, _: torch.distributions.Independent(
        torch.distributions.Normal(loc, sigma.expand(loc.shape)), 1
    ),
    "pyro Normal to_event": lambda loc, sigma, _: dist.Normal(loc, sigma).to_event(1),
    "torch MultivariateNormal": lambda loc, _, factor: torch.distributions.MultivariateNormal(loc, scale_tril=factor),
    "pyro MultivariateNormal": lambda loc, _, factor: dist.MultivariateNormal(loc, scale_tril=factor),
}


def foreign_moments(distribution):
    if hasattr(distribution, "covariance_matrix"):
        return torch.distributions.MultivariateNormal(distribution.loc, distribution.covariance_matrix)
    return torch.distributions.MultivariateNormal(distribution.mean, torch.diag_embed(distribution.variance))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_kl_with_foreign_gaussians_in_both_directions(foreign, form):
    ours, theirs = FORMS[form](*PAIRED["batch"]()), FOREIGN[foreign](*PAIRED["batch"]())
    same = foreign_moments(theirs)
    assert_close(kl_divergence(ours, theirs), kl_divergence(torch_normal(ours), same).numpy(), 1e-10)
    assert_close(kl_divergence(theirs, ours), kl_divergence(same, torch_normal(ours)).numpy(), 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_kl_with_what_is_not_gaussian_is_refused(form):
    ours, laplace = FORMS[form](*PAIRED["batch"]()), dist.Laplace(real(4, DIM), 1.0).to_event(1)
    with pytest.raises(NotImplementedError):
        kl_divergence(laplace, ours)


def test_kl_of_independent_but_not_gaussian_ones_is_torchs():
    q, p = (dist.Gamma(positive(4, DIM), positive(4, DIM)).to_event(1) for _ in range(2))
    assert_close(kl_divergence(q, p), kl_divergence(q.base_dist, p.base_dist).sum(-1).numpy())


# --- reading Gaussians -----------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_gaussians_are_read_as_full_normals(foreign):
    theirs = FOREIGN[foreign](*PAIRED["batch"]())
    same, value = as_full_normal(theirs), real(4, DIM)
    assert same.batch_shape == theirs.batch_shape
    assert_close(same.log_prob(value), theirs.log_prob(value).numpy(), 1e-10)


def test_diagonal_gaussians_are_read_by_their_moments(distribution):
    read = diagonal_moments(distribution)
    if isinstance(distribution, FullNormal):
        assert read is None
    else:
        mean, covariance = moments(distribution)
        assert_close(read[0], mean)
        assert_close(torch.diag_embed(read[1] ** 2), covariance)
    full = as_full_normal(distribution)
    value = real(*distribution.batch_shape, *distribution.event_shape)
    assert_close(full.log_prob(value), distribution.log_prob(value).numpy(), 1e-10)


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Laplace(torch.zeros(4, DIM), 1.0).to_event(1),
        dist.Normal(torch.zeros(4, DIM), 1.0),
        dist.Normal(torch.zeros(4, 2, DIM), 1.0).to_event(2),
        dist.LogNormal(torch.zeros(4, DIM), 1.0).to_event(1),
        DiagNormal(torch.zeros(4, 2, DIM), torch.ones(1)).to_event(1),
        FullNormal(torch.zeros(4, DIM), torch.eye(DIM)).mask(False),
    ],
    ids=["Laplace", "no event", "two event dimensions", "log-normal", "a batch as event", "masked"],
)
def test_what_is_no_gaussian_vector_is_not_read_as_one(distribution):
    assert diagonal_moments(distribution) is None
    assert as_full_normal(distribution) is None


@pytest.mark.parametrize(
    "make", [lambda: DiagNormal(real(4, DIM), positive(4, DIM)), lambda: FullNormal(real(4, DIM), lower(4))]
)
def test_kl_of_each_coordinate_is_that_of_its_marginal(make):
    q, loc, scale = make(), real(DIM), positive(DIM)
    marginals = dist.Normal(q.mean, q.variance.sqrt())
    expected = kl_divergence(marginals, dist.Normal(loc, scale))
    torch.testing.assert_close(coordinate_kl(q, dist.Normal(loc, scale).to_event(1)), expected)
