"""Jacobians, contrasts, recovery and self-consistency against closed forms, autograd, SciPy and known pairs."""

import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import kl_divergence
from torch.func import jacrev, vmap

from guides import Exact, TiedMeanField
from inference import (
    amari_distance,
    column_angles,
    column_contrast,
    column_norms,
    conformal_contrast,
    decoder_jacobian,
    ima_contrast,
    ima_contrast_of_inverse,
    ima_penalty,
    local_ima_contrast,
    local_ima_contrast_of_inverse,
    mcc,
    rank_mcc,
    self_consistency,
)
from inference.numerics.jacobian import log_volume
from zoo import (
    VAE,
    ConvDecoder,
    DeepGaussianVAE,
    LinearVAE,
    OptimalNoise,
    column_orthogonal,
    moebius,
    orthogonal_mlp,
    rotated_gaussian,
    shear,
    triangular_mlp,
    unit_determinant,
)

F64 = torch.float64


def network(latent_dim, data_dim, dtype=F64):
    return nn.Sequential(nn.Linear(latent_dim, 8), nn.Tanh(), nn.Linear(8, data_dim)).to(dtype)


def matrix(*shape):
    return torch.randn(*shape, dtype=F64)


def rotation(degrees):
    t = math.radians(degrees)
    return torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]], dtype=F64)


# -- Jacobians


@pytest.mark.parametrize(("latent_dim", "data_dim"), [(2, 7), (3, 3), (7, 2)])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_the_jacobian_is_that_of_reverse_mode_point_by_point(latent_dim, data_dim, chunk):
    decoder, z = network(latent_dim, data_dim), matrix(2, 5, latent_dim)
    jacobian = decoder_jacobian(decoder, z, block=chunk)
    assert jacobian.shape == (2, 5, data_dim, latent_dim)
    torch.testing.assert_close(jacobian, vmap(vmap(jacrev(decoder)))(z), rtol=1e-13, atol=1e-14)
    each = [torch.autograd.functional.jacobian(decoder, point) for point in z.flatten(0, 1)]
    torch.testing.assert_close(jacobian.flatten(0, 1), torch.stack(each), rtol=1e-13, atol=1e-14)


def test_the_jacobian_takes_modules_with_state_that_want_a_batch():
    # Convolutions and batch normalisation take no single point; in eval mode the latter is an affine map.
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), ConvDecoder(6, (4, 4), channels=(4,))).double()
    with torch.no_grad():
        decoder(matrix(50, 3))
    decoder.eval()
    z = matrix(4, 3)
    each = [torch.autograd.functional.jacobian(lambda v: decoder(v[None])[0], point) for point in z]
    torch.testing.assert_close(decoder_jacobian(decoder, z), torch.stack(each), rtol=1e-12, atol=1e-13)


def test_the_jacobian_passes_gradients_to_parameters_and_points():
    decoder, z = network(2, 3), matrix(4, 2).requires_grad_()
    ours = torch.autograd.grad(decoder_jacobian(decoder, z, block=3).square().sum(), [z, *decoder.parameters()][:-1])
    reference = vmap(jacrev(decoder))(z).square().sum()
    expected = torch.autograd.grad(reference, [z, *decoder.parameters()][:-1])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3)])
def test_log_volume_is_half_the_log_determinant_of_the_gram_matrix(shape):
    jacobian = matrix(5, *shape)
    expected = 0.5 * np.linalg.slogdet((jacobian.mT @ jacobian).numpy())[1]
    np.testing.assert_allclose(log_volume(jacobian).numpy(), expected, rtol=1e-12)


# -- contrasts


@pytest.mark.parametrize("dim", [2, 3, 5, 10])
def test_moebius_transformations_have_contrast_zero(dim):
    mixing, z = moebius(dim, seed=dim), torch.rand(1000, dim, dtype=F64) - 0.5
    assert float(local_ima_contrast(mixing, z).abs().max()) < 1e-12
    assert float(local_ima_contrast_of_inverse(mixing.inverse, mixing(z)).abs().max()) < 1e-12
    assert float(conformal_contrast(decoder_jacobian(mixing, z)).abs().max()) < 1e-12


@pytest.mark.parametrize(("strength", "value"), [(1.0, 0.3465735903), (2.0, 0.8047189562)])
def test_a_shear_has_half_the_logarithm_of_one_plus_its_square(strength, value):
    c = column_contrast(shear(strength).matrix)
    assert float(c) == pytest.approx(0.5 * math.log1p(strength**2), rel=1e-14)
    assert float(c) == pytest.approx(value, abs=5e-11)


@pytest.mark.parametrize("degrees", [60, 10, 120])
def test_unit_columns_at_an_angle_have_minus_log_sine(degrees):
    t = math.radians(degrees)
    columns = torch.tensor([[1.0, math.cos(t)], [0.0, math.sin(t)]], dtype=F64)
    assert float(column_contrast(columns)) == pytest.approx(-math.log(math.sin(t)), rel=1e-13)
    assert float(column_angles(columns)[0, 1]) == pytest.approx(t, rel=1e-13)
    if degrees == 60:
        assert float(column_contrast(columns)) == pytest.approx(0.1438410362, abs=5e-11)


@pytest.mark.parametrize("angle", [1e-4, 1e-8, 1e-12])
def test_contrast_and_angle_of_nearly_parallel_columns_are_exact(angle):
    columns = torch.tensor([[1.0, math.cos(angle)], [0.0, math.sin(angle)]], dtype=F64)
    columns = torch.linalg.qr(torch.randn(6, 2, dtype=F64)).Q @ columns
    expected, rounding = -math.log(math.sin(angle)), 1e-15 / angle
    flipped = columns * torch.tensor([1.0, -1.0], dtype=F64)
    assert float(column_angles(columns)[0, 1]) == pytest.approx(angle, abs=1e-15)
    assert float(column_angles(flipped)[1, 0]) == pytest.approx(math.pi - angle, abs=1e-15)
    assert float(column_contrast(columns)) == pytest.approx(expected, abs=10 * rounding)
    unmix = torch.linalg.pinv(columns, rtol=1e-15)
    of_inverse = local_ima_contrast_of_inverse(lambda x: x @ unmix.T, torch.zeros(1, 6, dtype=F64))
    assert float(of_inverse) == pytest.approx(expected, abs=100 * rounding)


def test_the_contrast_of_the_worked_example():
    c = column_contrast(torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=F64))
    assert float(c) == pytest.approx(0.510825624, abs=5e-10)
    assert float(c) == pytest.approx(-math.log(0.6), rel=1e-14)


@pytest.mark.parametrize("shape", [(3, 3), (7, 3)])
def test_the_contrast_is_a_divergence_between_gaussians(shape):
    jacobian = matrix(20, *shape)
    gram = jacobian.mT @ jacobian
    zero = gram.new_zeros(shape[1])
    diagonal = torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    expected = kl_divergence(dist.MultivariateNormal(zero, gram), dist.MultivariateNormal(zero, diagonal))
    torch.testing.assert_close(column_contrast(jacobian), expected, rtol=1e-10, atol=1e-11)
    # The conformal one is the divergence from the best multiple of the identity.
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    multiples = [dist.MultivariateNormal(zero, (f * level)[:, None, None] * torch.eye(shape[1])) for f in (1, 0.9, 1.1)]
    best, *others = (kl_divergence(dist.MultivariateNormal(zero, gram), m) for m in multiples)
    torch.testing.assert_close(conformal_contrast(jacobian), best, rtol=1e-10, atol=1e-11)
    assert all(bool((best < other).all()) for other in others)


@pytest.mark.parametrize("shape", [(3, 3), (7, 3)])
def test_what_the_contrast_does_and_does_not_notice(shape):
    jacobian = matrix(10, *shape)
    c = column_contrast(jacobian)
    assert bool((c > 0).all())
    q, _ = torch.linalg.qr(matrix(shape[0], shape[0]))
    lengths = torch.tensor([1e-3, 2.0, -1e4], dtype=F64)
    for same in (q @ jacobian, jacobian[..., [2, 0, 1]], jacobian * lengths, 7 * jacobian):
        torch.testing.assert_close(column_contrast(same), c, rtol=1e-10, atol=1e-11)
    outputs = torch.linspace(1, 3, shape[0], dtype=F64)
    turned = jacobian @ torch.linalg.qr(matrix(3, 3))[0]
    for other in (outputs.unsqueeze(-1) * jacobian, turned):
        assert float((column_contrast(other) - c).abs().min()) > 1e-6
    # The conformal contrast does notice lengths, and neither notices a common factor.
    conformal = conformal_contrast(jacobian)
    torch.testing.assert_close(conformal_contrast(7 * q @ jacobian), conformal, rtol=1e-10, atol=1e-11)
    assert bool((conformal_contrast(jacobian * lengths) > conformal).all())
    assert bool((conformal > c).all())


def test_dependent_columns_give_infinity_and_a_zero_column_nan():
    jacobian = torch.tensor([[[1.0, 2.0], [1.0, 2.0]], [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert column_contrast(jacobian).tolist() == [math.inf, pytest.approx(math.nan, nan_ok=True), 0.0]


def test_the_global_contrast_is_the_mean_of_local_ones():
    mixing, z = orthogonal_mlp(3, seed=2), matrix(500, 3)
    local = torch.stack([column_contrast(torch.autograd.functional.jacobian(mixing, point)) for point in z])
    torch.testing.assert_close(local_ima_contrast(mixing, z, block=7), local, rtol=1e-11, atol=1e-12)
    assert float(ima_contrast(mixing, z)) == pytest.approx(float(local.mean()), rel=1e-12)
    assert float(column_contrast(mixing.jacobian(z).mean(0))) < 0.8 * float(local.mean())


@pytest.mark.parametrize("mixing", [triangular_mlp(3, seed=1), orthogonal_mlp(4, seed=2), unit_determinant(3)])
def test_the_inverse_tells_the_same_contrast(mixing):
    z = matrix(50, mixing.latent_dim)
    x = mixing(z)
    local = local_ima_contrast_of_inverse(mixing.inverse, x, block=8)
    torch.testing.assert_close(local, local_ima_contrast(mixing, z), rtol=1e-8, atol=1e-9)
    assert float(ima_contrast_of_inverse(mixing.inverse, x)) == pytest.approx(float(local.mean()), rel=1e-12)


def test_the_nearest_point_inverse_has_the_rectangular_contrast():
    skewed = column_orthogonal(5, 3).matrix @ unit_determinant(3).matrix
    c = local_ima_contrast_of_inverse(lambda x: x @ torch.linalg.pinv(skewed).T, matrix(2, 5))
    torch.testing.assert_close(c, column_contrast(skewed).expand(2), rtol=1e-11, atol=1e-12)


def test_modules_and_their_methods_are_measured_in_float64():
    decoder, z = network(3, 5, torch.float32), torch.randn(20, 3)
    model = LinearVAE(5, 3, sigma=0.5)
    exact = column_contrast(vmap(jacrev(decoder.double()))(z.double())).detach()
    decoder.float()
    torch.testing.assert_close(local_ima_contrast(decoder, z), exact, rtol=1e-11, atol=1e-12)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    linear = column_contrast(model.W.detach().double())
    torch.testing.assert_close(local_ima_contrast(model.decode, z), linear.expand(20), rtol=1e-11, atol=1e-12)
    rough = local_ima_contrast(lambda v: decoder(v), z)
    assert rough.dtype == F64
    assert 0 < float((rough - exact).abs().max()) < 1e-4


def test_norms_and_angles_are_those_of_numpy():
    jacobian = matrix(4, 6, 3)
    np.testing.assert_allclose(column_norms(jacobian).numpy(), np.linalg.norm(jacobian.numpy(), axis=1), rtol=1e-14)
    angles = column_angles(jacobian)
    assert float(angles.diagonal(dim1=-2, dim2=-1).abs().max()) == 0
    for i, j in itertools.combinations(range(3), 2):
        a, b = jacobian[0, :, i].numpy(), jacobian[0, :, j].numpy()
        expected = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert float(angles[0, i, j]) == pytest.approx(expected, rel=1e-12)
        assert float(angles[0, j, i]) == pytest.approx(expected, rel=1e-12)


def test_the_penalty_is_the_contrast_and_orthogonalises_columns():
    decoder, z = network(2, 4), matrix(16, 2)
    assert float(ima_penalty(decoder, z).detach()) == pytest.approx(float(ima_contrast(decoder, z)), rel=1e-12)
    weight = decoder[0].weight

    def at(value):
        return ima_penalty(lambda v: decoder[2](torch.tanh(v @ value.T + decoder[0].bias)), z)

    assert torch.autograd.gradcheck(at, (weight,), atol=1e-7)
    before = float(ima_contrast(decoder, z))
    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        ima_penalty(decoder, z).backward()
        optimiser.step()
    assert float(ima_contrast(decoder, z)) < 0.05 * before


# -- recovery


def uniform_sources(num=100_000, dim=2):
    return torch.rand(num, dim, dtype=F64) - 0.5


def test_order_sign_and_scale_do_not_matter_to_mcc():
    s = uniform_sources(500, 3)
    codes = s[:, [2, 0, 1]] * torch.tensor([-3.0, 1e-4, 100.0]) + 5
    for result in (mcc(codes, s), rank_mcc(codes, s)):
        assert result.value == pytest.approx(1, abs=1e-9)
        assert result.matching.tolist() == [1, 2, 0]
        assert result.constant == ()


def test_monotone_maps_do_not_matter_to_ranks():
    s = uniform_sources(500, 2)
    assert rank_mcc((5 * s).exp(), s).value == pytest.approx(1, abs=1e-12)
    assert mcc((5 * s).exp(), s).value < 0.95


@pytest.mark.parametrize(("degrees", "value"), [(15, 0.966), (30, 0.866), (45, 0.707)])
def test_rotated_uniform_sources_have_mcc_cosine(degrees, value):
    s = uniform_sources()
    found = mcc(s @ rotation(degrees).T, s).value
    # A correlation r has standard error below 1 / sqrt(N), a mean of two no more; matching by chance adds no more.
    assert found == pytest.approx(math.cos(math.radians(degrees)), abs=4 / math.sqrt(len(s)))
    assert found == pytest.approx(value, abs=5e-4 + 4 / math.sqrt(len(s)))


def test_correlations_are_scipys_and_the_matching_the_best_of_all():
    s = matrix(200, 3)
    codes = s @ matrix(3, 4) + 0.5 * matrix(200, 4)
    for ours, theirs in ((mcc, stats.pearsonr), (rank_mcc, stats.spearmanr)):
        result = ours(codes, s)
        table = np.array([[abs(theirs(codes[:, i], s[:, j]).statistic) for j in range(3)] for i in range(4)])
        np.testing.assert_allclose(result.correlations.numpy(), table, rtol=1e-10)
        best = max(np.mean([table[p[j], j] for j in range(3)]) for p in itertools.permutations(range(4), 3))
        assert result.value == pytest.approx(best, rel=1e-10)
        assert np.mean([table[i, j] for j, i in enumerate(result.matching)]) == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize(("num", "value"), [(12000, 0.011), (64, 0.151)])
def test_chance_mcc_depends_on_the_number_of_data(num, value):
    runs = torch.tensor([mcc(matrix(num, 3), matrix(num, 3)).value for _ in range(100)])
    assert float(runs.mean()) == pytest.approx(value, abs=5e-4 + 4 * float(runs.std()) / 10)


def test_constant_codes_are_named_and_count_as_zero():
    s = uniform_sources(100, 2)
    collapsed = torch.stack([s[:, 0], torch.full((100,), 0.1, dtype=F64)], -1)
    rounded = collapsed.float()
    rounded[::2, 1] = torch.nextafter(rounded[::2, 1], torch.tensor(1.0))  # a network's constant, to its rounding
    for codes, measure in ((collapsed, mcc), (rounded, mcc), (collapsed, rank_mcc)):
        with pytest.warns(UserWarning, match=r"codes \[1\] are constant"):
            result = measure(codes, s)
        assert result.constant == (1,)
        assert result.value == pytest.approx(0.5, abs=1e-6)
        assert result.correlations[1].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"sources that vary, got constant ones: \[1\]"):
        mcc(s, collapsed)


def test_amari_distance():
    assert float(amari_distance(torch.eye(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))) == pytest.approx(0.25)
    mixing = matrix(5, 3)
    unmixing = torch.linalg.pinv(mixing)
    scaled = torch.tensor([[-2.0], [0.1], [30.0]]) * unmixing[[2, 0, 1]]
    for inverse in (unmixing, scaled):
        assert float(amari_distance(inverse, mixing)) == pytest.approx(0, abs=1e-12)
    # A rotation by 45 degrees has all entries equal: each row and column contributes one.
    assert float(amari_distance(rotation(45), torch.eye(2))) == pytest.approx(1, rel=1e-12)
    assert amari_distance(unmixing.expand(7, 3, 5), mixing).shape == (7,)


# -- self-consistency


class NearDeterministic(nn.Module):
    """A mixing as decoder, and a guide that is told what to say."""

    def __init__(self, mixing, sigma, distribution, codes=None, var=None):
        super().__init__()
        self.mixing, self.distribution, self.codes, self.var = mixing, distribution, codes, var
        self.data_dim, self.latent_dim = mixing.data_dim, mixing.latent_dim
        self.register_buffer("sigma", torch.full((1,), sigma, dtype=F64))

    def prior(self):
        return self.distribution

    def decode(self, z):
        return self.mixing(z)

    def posterior(self, x):  # noqa: ARG002
        return dist.Normal(self.codes, self.var.sqrt()).to_event(1)


@pytest.mark.parametrize("gamma2", [1e2, 1e4, 1e6])
def test_an_optimal_linear_vae_is_self_consistent_to_noise_order(gamma2):
    model = LinearVAE(5, 3, sigma=gamma2**-0.5).double()
    with torch.no_grad():
        model.W.copy_(matrix(5, 3))
    gamma2 = float(model.sigma.detach()) ** -2  # as rounded by the model
    w = model.W.detach()
    pseudo_inverse = torch.linalg.pinv(w)
    x = matrix(20, 3) @ w.T
    result = self_consistency(model, TiedMeanField(model), x, inverse=lambda v: v @ pseudo_inverse.T)
    precision = torch.eye(3) + gamma2 * w.T @ w
    torch.testing.assert_close(result.var, precision.diagonal().reciprocal().expand(20, 3), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.ratio, torch.ones(20, 3, dtype=F64), rtol=1e-9, atol=0)
    # The posterior mean shrinks: mu - g(x) = (M^-1 gamma^2 W'W - I) g(x) = -M^-1 g(x).
    shrunk = -torch.linalg.solve(precision, (x @ pseudo_inverse.T).T).T
    torch.testing.assert_close(result.inversion, shrunk.norm(dim=-1), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(result.reconstruction, (shrunk @ w.T).norm(dim=-1), rtol=1e-6, atol=1e-10)


def test_a_full_covariance_guide_lacks_the_predicted_variances():
    model = LinearVAE(5, 3, sigma=0.01).double()
    x = model.decode(matrix(20, 3)).detach()
    assert float(self_consistency(model, Exact(model), x).ratio.detach().min()) > 1.01


@pytest.mark.parametrize(
    ("distribution", "curvature"),
    [
        (dist.Normal(torch.zeros(3, dtype=F64), 2.0).to_event(1), lambda z: torch.full_like(z, 0.25)),
        (dist.Uniform(-torch.ones(3, dtype=F64), 1.0).to_event(1), torch.zeros_like),
        (dist.Laplace(torch.zeros(3, dtype=F64), 1.0).to_event(1), torch.zeros_like),
        (
            dist.Beta(torch.full((3,), 2.0, dtype=F64), torch.full((3,), 5.0, dtype=F64)).to_event(1),
            lambda z: 1 / z**2 + 4 / (1 - z) ** 2,
        ),
    ],
)
def test_predicted_variances_are_the_formula(distribution, curvature):
    mixing = moebius(3, minimum=1.2, seed=3)
    z = 0.1 + 0.8 * torch.rand(30, 3, dtype=F64)
    jacobian = torch.stack([torch.autograd.functional.jacobian(mixing, point) for point in z])
    expected = 1 / (curvature(z) + jacobian.square().sum(-2) / 0.1**2)
    pair = NearDeterministic(mixing, 0.1, distribution, codes=z + 0.01, var=2 * expected)
    result = self_consistency(pair, pair, mixing(z), inverse=mixing.inverse)
    torch.testing.assert_close(result.predicted_var, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.ratio, torch.full((30, 3), 2.0, dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.inversion, torch.full((30,), 0.01 * 3**0.5, dtype=F64), rtol=1e-9, atol=0)
    moved = (mixing(z + 0.01) - mixing(z)).norm(dim=-1)
    torch.testing.assert_close(result.reconstruction, moved, rtol=1e-9, atol=0)


def test_without_an_inverse_the_codes_stand_for_it():
    mixing, z = moebius(3, minimum=1.2, seed=3), 0.1 + 0.8 * torch.rand(30, 3, dtype=F64)
    distribution = dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1)
    pair = NearDeterministic(mixing, 0.1, distribution, codes=z, var=torch.ones(30, 3, dtype=F64))
    given, without = (self_consistency(pair, pair, mixing(z), inverse=g) for g in (mixing.inverse, None))
    assert without.inversion is None
    torch.testing.assert_close(without.predicted_var, given.predicted_var, rtol=1e-10, atol=0)


def test_distributions_without_stated_moments_are_sampled():
    z = matrix(40, 3)
    transformed = dist.TransformedDistribution(
        dist.Normal(z, 0.3).to_event(1), [dist.transforms.AffineTransform(1.0, 2.0, event_dim=1)]
    )
    distribution = dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1)
    pair = NearDeterministic(orthogonal_mlp(3), 0.1, distribution)
    pair.posterior = lambda x: transformed  # noqa: ARG005
    result = self_consistency(pair, pair, matrix(40, 3))
    # A sample variance of 1000 draws has standard error var sqrt(2 / 999); the largest of 120 within 5.
    assert float((result.var / 0.36 - 1).abs().max()) < 5 * math.sqrt(2 / 999)


# -- spurious solutions, as the measures see them


def test_an_automorphism_keeps_the_distribution_but_not_the_sources():
    z = matrix(4000, 2)
    stretched = column_orthogonal(2, 2, longest=4.0, seed=1)
    turned = rotated_gaussian(rotation(45))
    assert float(ima_contrast(stretched, z)) == pytest.approx(0, abs=1e-13)
    assert float(ima_contrast(lambda s: stretched(turned(s)), z)) > 0.1
    assert mcc(turned.inverse(z), z).value < 0.75


# -- refusals


def unfrozen():
    return DeepGaussianVAE(5, 2, hidden=(8,), noise=OptimalNoise())


@pytest.mark.parametrize(
    ("error", "act", "message"),
    [
        (TypeError, lambda: decoder_jacobian(network(2, 3), torch.ones(3, 2, dtype=torch.long)), "floating tensor"),
        (TypeError, lambda: local_ima_contrast(network(2, 3), [[1.0, 2.0]]), "floating tensor"),
        (ValueError, lambda: decoder_jacobian(network(2, 3), torch.ones(0, 2)), "at least one point"),
        (ValueError, lambda: decoder_jacobian(network(2, 3), torch.full((1, 2), math.nan)), "finite"),
        (ValueError, lambda: decoder_jacobian(lambda z: z.sum(), torch.ones(3, 2)), r"to \(1, D\), got \(\)"),
        (ValueError, lambda: decoder_jacobian(lambda z: z, torch.ones(3, 2), block=0), "block"),
        (ValueError, lambda: decoder_jacobian(nn.BatchNorm1d(2), torch.ones(3, 2)), "batch normalisation"),
        (ValueError, lambda: ima_penalty(nn.Dropout(0.5), torch.ones(3, 2)), "Dropout"),
        (ValueError, lambda: column_contrast(torch.ones(2, 3)), "D >= K"),
        (ValueError, lambda: ima_contrast(network(3, 2), matrix(4, 3)), "D >= K"),
        (ValueError, lambda: ima_contrast_of_inverse(network(2, 3), matrix(4, 2)), "D >= K"),
        (ValueError, lambda: mcc(torch.ones(4, 2), torch.ones(5, 2)), "codes"),
        (ValueError, lambda: mcc(torch.ones(4, 2), torch.ones(4, 3)), "L >= K"),
        (ValueError, lambda: mcc(torch.full((4, 2), math.nan), torch.ones(4, 2)), "codes to be finite"),
        (ValueError, lambda: mcc(torch.ones(1, 2), torch.ones(1, 2)), "two data points"),
        (ValueError, lambda: amari_distance(torch.eye(2), torch.eye(3)), r"\(2, 2\) and \(3, 3\)"),
        (
            TypeError,
            lambda: self_consistency(VAE(5, 2), None, torch.ones(4, 5)),
            r"decode\(z\), sigma and prior\(\), got VAE",
        ),
        (ValueError, lambda: self_consistency(unfrozen(), None, torch.ones(4, 5)), "sigma to be finite"),
    ],
)
def test_bad_input_is_named(error, act, message):
    with pytest.raises(error, match=message):
        act()
