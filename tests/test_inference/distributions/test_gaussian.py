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

from inference.distributions.gaussian import DiagNormal, FullNormal, as_full_normal, diagonal_moments

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


def laws():
    for name, make in DIAGONAL.items():
        yield pytest.param(lambda make=make: DiagNormal(*make()), id=f"diagonal, {name}")
    for name, make in FULL.items():
        yield pytest.param(lambda make=make: FullNormal(*make()), id=f"full, {name}")


def moments(law):
    """Mean and covariance as full arrays of shape batch + ..., from the arguments alone."""
    if isinstance(law, DiagNormal):
        dim = law.loc.shape[-1]
        mean = torch.broadcast_to(law.loc, (*law.batch_shape, dim))
        covariance = torch.diag_embed(torch.broadcast_to(law.sigma, (*law.batch_shape, dim)) ** 2)
    else:
        mean, factor = torch.broadcast_to(law.loc, (*law.batch_shape, DIM)), law.scale_tril
        covariance = factor @ factor.mT
    return mean.numpy(), covariance.numpy()


def scipy_distributions(law):
    """One frozen SciPy law per batch member."""
    mean, covariance = moments(law)
    dim = mean.shape[-1]
    return [
        scipy.stats.multivariate_normal(m, c) for m, c in zip(mean.reshape(-1, dim), covariance.reshape(-1, dim, dim))
    ]


def assert_close(got, expected, tolerance=1e-12):
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=laws())
def law(request):
    return request.param()


# --- one law ---------------------------------------------------------------------------------------


def test_log_prob_is_scipys(law):
    value = real(*law.batch_shape, *law.event_shape)
    rows = value.reshape(-1, law.event_shape[0]).numpy()
    expected = [one.logpdf(row) for one, row in zip(scipy_distributions(law), rows)]
    got = law.log_prob(value)
    assert got.shape == law.batch_shape
    assert_close(got.reshape(-1), expected)


def test_log_prob_broadcasts_over_samples(law):
    value = real(7, *[1 for _ in law.batch_shape], *law.event_shape)
    got = law.log_prob(value)
    assert got.shape == (7, *law.batch_shape)
    expected = [law.log_prob(one.expand(law.batch_shape + law.event_shape)).numpy() for one in value]
    assert_close(got, np.stack(expected))


def test_entropy_is_scipys(law):
    got = law.entropy()
    assert got.shape == law.batch_shape
    assert_close(got.reshape(-1), [one.entropy() for one in scipy_distributions(law)])


def test_mean_and_variance_are_those_of_the_arguments(law):
    mean, covariance = moments(law)
    assert_close(law.mean, mean)
    assert_close(law.variance, np.diagonal(covariance, axis1=-2, axis2=-1))
    assert_close(law.stddev, np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1)))


def test_draws_have_the_laws_moments(law):
    num = 20_000
    draws = law.rsample((num,))
    assert draws.shape == (num, *law.batch_shape, *law.event_shape)
    assert draws.dtype == torch.float64
    mean, covariance = moments(law)
    centred = draws.numpy() - mean
    second = np.einsum("s...i,s...j->...ij", centred, centred) / num
    variances = np.diagonal(covariance, axis1=-2, axis2=-1)
    assert np.abs(centred.mean(0) / np.sqrt(variances / num)).max() < 5
    # Var of z_i z_j is c_ii c_jj + c_ij^2.
    error = np.sqrt((variances[..., :, None] * variances[..., None, :] + covariance**2) / num)
    assert np.abs((second - covariance) / error).max() < 5


def test_draws_of_a_batch_are_independent(law):
    draws = law.rsample((20_000,)).flatten(1).numpy()
    dim = law.event_shape[0]
    correlation = np.corrcoef(draws.T)
    across = np.kron(np.eye(len(correlation) // dim), np.ones((dim, dim))) == 0
    assert np.abs(correlation[across]).max(initial=0) < 5 / math.sqrt(20_000)


def test_draws_are_reparameterised(law):
    """The gradient of a draw in the mean is one, and that in sigma the noise."""
    loc = torch.zeros(law.batch_shape + law.event_shape, dtype=torch.float64, requires_grad=True)
    second = (law.sigma if isinstance(law, DiagNormal) else law._unbroadcasted_scale_tril).clone().requires_grad_()
    draw = type(law)(loc, second).rsample()
    draw.sum().backward()
    assert bool((loc.grad == 1).all())
    if isinstance(law, DiagNormal):
        noise = (draw.detach() / second.detach()).sum_to_size(second.shape)
        assert_close(second.grad, noise.numpy(), 1e-10)
    else:
        assert float(second.grad.abs().sum()) > 0


def test_sample_carries_no_gradient(law):
    law = type(law)(law.loc.clone().requires_grad_(), law.sigma if isinstance(law, DiagNormal) else law.scale_tril)
    assert not law.sample().requires_grad
    assert law.rsample().requires_grad


@pytest.mark.parametrize("leading", [(), (2,), (5, 2)])
def test_expand_changes_the_batch_alone(law, leading):
    batch = torch.Size(leading) + law.batch_shape
    expanded = law.expand(batch)
    assert isinstance(expanded, type(law))
    assert (expanded.batch_shape, expanded.event_shape) == (batch, law.event_shape)
    value = real(*batch, *law.event_shape)
    assert_close(expanded.log_prob(value), law.log_prob(value).numpy())
    assert_close(expanded.entropy(), law.entropy().expand(batch).numpy())
    assert_close(expanded.mean, law.mean.expand(batch + law.event_shape).numpy())
    assert_close(expanded.variance, law.variance.expand(batch + law.event_shape).numpy())
    assert expanded.rsample((3,)).shape == (3, *batch, *law.event_shape)
    # Expanded laws draw afresh for every member of the new batch.
    if leading:
        assert len(expanded.rsample().reshape(-1).unique()) == expanded.rsample().numel()


def test_expand_copies_no_scale():
    sigma, factor = positive(1), lower()
    assert DiagNormal(real(DIM), sigma).expand((1000,)).sigma is sigma
    expanded = FullNormal(real(DIM), factor).expand((1000,))
    assert expanded._unbroadcasted_scale_tril.data_ptr() == factor.data_ptr()
    assert expanded._unbroadcasted_scale_tril.shape == (DIM, DIM)


def test_the_law_is_that_of_the_arguments_dtype_and_runs_under_vmap():
    for law in (DiagNormal(torch.zeros(DIM), torch.ones(1)), FullNormal(torch.zeros(DIM), torch.eye(DIM))):
        assert law.rsample().dtype == torch.float32
        assert law.log_prob(torch.zeros(DIM)).dtype == torch.float32
    draws = vmap(lambda loc: DiagNormal(loc, torch.ones(1)).rsample(), randomness="different")(torch.zeros(6, DIM))
    assert len(draws.reshape(-1).unique()) == 6 * DIM


@pytest.mark.parametrize("sigma", [1e-150, 1e-6, 1e6, 1e150])
def test_log_prob_holds_at_extreme_scales(sigma):
    zeros = torch.zeros(64, dtype=torch.float64)
    expected = 64 * scipy.stats.norm.logpdf(2.0) - 64 * math.log(sigma)
    for law in (DiagNormal(zeros, zeros[:1] + sigma), DiagNormal(zeros, zeros + sigma)):
        assert float(law.log_prob(zeros + 2 * sigma)) == pytest.approx(expected, rel=1e-13)


# --- Pyro's own methods ----------------------------------------------------------------------------


def test_to_event_zero_changes_nothing(law):
    value = real(*law.batch_shape, *law.event_shape)
    same = law.to_event(0)
    assert (same.batch_shape, same.event_shape) == (law.batch_shape, law.event_shape)
    assert_close(same.log_prob(value), law.log_prob(value).numpy())
    assert_close(kl_divergence(same, law), np.zeros(law.batch_shape), 1e-10)


def test_to_event_sums_over_the_batch():
    law = DiagNormal(real(4, DIM), positive(1))
    value = real(4, DIM)
    joint = law.to_event(1)
    assert (joint.batch_shape, joint.event_shape) == ((), (4, DIM))
    assert_close(joint.log_prob(value), law.log_prob(value).sum().numpy())


def test_mask_zeroes_what_it_hides(law):
    value = real(*law.batch_shape, *law.event_shape)
    mask = torch.rand(law.batch_shape) < 0.5
    assert_close(law.mask(mask).log_prob(value), np.where(mask, law.log_prob(value), 0.0))
    assert bool((law.mask(False).log_prob(value) == 0).all())


def test_expand_by_finds_its_place_in_a_plate():
    with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 4, dim=-1):
        assert pyro.sample("z", DiagNormal(real(DIM), positive(1))).shape == (7, 4, DIM)
        assert pyro.sample("y", FullNormal(real(4, DIM), lower(4))).shape == (7, 4, DIM)


# --- Kullback-Leibler ------------------------------------------------------------------------------


def torch_normal(law):
    """The same law as torch's own multivariate normal with a full factor."""
    mean, covariance = moments(law)
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


def test_kl_of_a_law_to_itself_is_zero(law):
    assert_close(kl_divergence(law, law), np.zeros(law.batch_shape), 1e-12)


FOREIGN = {
    "torch Independent Normal": lambda loc, sigma, _: torch.distributions.Independent(
        torch.distributions.Normal(loc, sigma.expand(loc.shape)), 1
    ),
    "pyro Normal to_event": lambda loc, sigma, _: dist.Normal(loc, sigma).to_event(1),
    "torch MultivariateNormal": lambda loc, _, factor: torch.distributions.MultivariateNormal(loc, scale_tril=factor),
    "pyro MultivariateNormal": lambda loc, _, factor: dist.MultivariateNormal(loc, scale_tril=factor),
}


def foreign_moments(law):
    if hasattr(law, "covariance_matrix"):
        return torch.distributions.MultivariateNormal(law.loc, law.covariance_matrix)
    return torch.distributions.MultivariateNormal(law.mean, torch.diag_embed(law.variance))


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


def test_kl_of_independent_laws_that_are_not_gaussian_is_still_torchs():
    q, p = (dist.Gamma(positive(4, DIM), positive(4, DIM)).to_event(1) for _ in range(2))
    assert_close(kl_divergence(q, p), kl_divergence(q.base_dist, p.base_dist).sum(-1).numpy())


# --- reading Gaussians -----------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_gaussians_are_read_as_full_normals(foreign):
    theirs = FOREIGN[foreign](*PAIRED["batch"]())
    same, value = as_full_normal(theirs), real(4, DIM)
    assert same.batch_shape == theirs.batch_shape
    assert_close(same.log_prob(value), theirs.log_prob(value).numpy(), 1e-10)


def test_diagonal_gaussians_are_read_by_their_moments(law):
    read = diagonal_moments(law)
    if isinstance(law, FullNormal):
        assert read is None
    else:
        mean, covariance = moments(law)
        assert_close(read[0], mean)
        assert_close(torch.diag_embed(read[1] ** 2), covariance)
    full = as_full_normal(law)
    value = real(*law.batch_shape, *law.event_shape)
    assert_close(full.log_prob(value), law.log_prob(value).numpy(), 1e-10)


@pytest.mark.parametrize(
    "law",
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
def test_what_is_no_gaussian_vector_is_not_read_as_one(law):
    assert diagonal_moments(law) is None
    assert as_full_normal(law) is None
