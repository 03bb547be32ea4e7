"""Ground-truth mixings: inverse, Jacobian and volume against autograd, their geometry, and data sets made with them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Beta, Laplace, MultivariateNormal, Normal, Uniform

from inference import column_contrast, conformal_contrast, ima_contrast, mcc
from inference.core.storage import load_tree, save_tree
from zoo import (
    ComplexExp,
    ComplexPower,
    Composition,
    Darmois,
    Inverted,
    LinearMixing,
    Moebius,
    NormalToLaplace,
    NormalToUniform,
    Polar,
    SmoothLeakyReLU,
    affine_coupling_flow,
    column_orthogonal,
    gaussian_darmois,
    load_mixed,
    mixed,
    moebius,
    orthogonal,
    orthogonal_mlp,
    rotated_gaussian,
    save_mixed,
    shear,
    triangular_mlp,
    unit_determinant,
)
from zoo.mixings.base import describe, from_description

F64 = torch.float64
R30 = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]], dtype=F64)

# Name to a map and a distribution of sources in its domain.
MAPS = {
    "orthogonal": (orthogonal(4, seed=1), Normal(0.0, 1.0)),
    "column_orthogonal": (column_orthogonal(5, 3, seed=2), Normal(0.0, 1.0)),
    "shear": (shear(2.0), Normal(0.0, 1.0)),
    "unit_determinant": (unit_determinant(3, seed=3), Normal(0.0, 1.0)),
    "shifted": (LinearMixing([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]], [1.0, 2.0, 3.0]), Normal(0.0, 1.0)),
    "moebius 2": (moebius(2, minimum=0.7, seed=4), Uniform(-0.5, 0.5)),
    "moebius 5": (moebius(5, alpha=2.0, seed=5), Uniform(-0.5, 0.5)),
    "leaky relu": (SmoothLeakyReLU(3, 0.2), Normal(0.0, 10.0)),
    "orthogonal_mlp": (orthogonal_mlp(3, seed=6), Normal(0.0, 1.0)),
    "triangular_mlp": (triangular_mlp(3, seed=7), Normal(0.0, 1.0)),
    "coupling": (affine_coupling_flow(5, seed=8), Normal(0.0, 1.0)),
    "complex exp": (ComplexExp(), Uniform(-3.0, 3.0)),
    "complex square": (ComplexPower(2.0), Uniform(0.1, 2.0)),
    "complex power": (ComplexPower(1.5), Uniform(0.1, 2.0)),
    "polar": (Polar(), Uniform(0.1, 3.0)),
    "to uniform": (NormalToUniform(2, -1.0, 3.0), Normal(0.0, 1.0)),
    "to laplace": (NormalToLaplace(2, 0.7), Normal(0.0, 1.0)),
    "inverted": (Inverted(orthogonal_mlp(2, seed=9)), Normal(0.0, 0.5)),
    "composition": (Composition([moebius(3, seed=1), column_orthogonal(6, 3)]), Uniform(-0.5, 0.5)),
    "automorphism": (rotated_gaussian(R30, NormalToUniform(2, -0.5, 0.5)), Uniform(-0.5, 0.5)),
    "darmois": (Darmois(triangular_mlp(2, seed=3)), Normal(0.0, 1.0)),
}


def draw(distribution, num, dim):
    return distribution.sample((num, dim)).double()


def reference_jacobian(mixing, s):
    """Row by row by torch.autograd, reverse mode."""
    return torch.stack([torch.autograd.functional.jacobian(mixing, row) for row in s])


@pytest.fixture(params=list(MAPS))
def case(request):
    mixing, distribution = MAPS[request.param]
    num = 4 if request.param == "darmois" else 60
    return mixing, draw(distribution, num, mixing.latent_dim)


def test_inverse_leads_back(case):
    mixing, s = case
    x = mixing(s)
    assert x.shape == (len(s), mixing.data_dim)
    # An inverse amplifies the rounding of x, of 1e-16 its size, by the reciprocal of the least singular value.
    worst = torch.linalg.svdvals(mixing.jacobian(s)).amin(-1).reciprocal()
    bound = 1e-14 * (10 * worst * (1 + x.abs().amax(-1)) + 10 * (1 + s.abs().amax(-1)))
    assert bool(((mixing.inverse(x) - s).abs().amax(-1) < bound).all())
    torch.testing.assert_close(mixing(mixing.inverse(x)), x, rtol=1e-12, atol=1e-12)


def test_jacobian_and_volume_are_those_of_autograd(case):
    mixing, s = case
    if isinstance(mixing, Darmois):  # the map itself is found by iteration: autograd sees its inverse
        reference = torch.linalg.inv(reference_jacobian(mixing.inverse, mixing(s)))
    else:
        reference = reference_jacobian(mixing, s)
    torch.testing.assert_close(mixing.jacobian(s), reference, rtol=1e-10, atol=1e-12)
    volume = 0.5 * torch.logdet(reference.mT @ reference)
    torch.testing.assert_close(mixing.log_abs_det(s), volume, rtol=1e-9, atol=1e-9)


def test_leading_dimensions_are_a_batch(case):
    mixing, s = case
    stacked = s[:4].reshape(2, 2, -1)
    x = mixing(stacked)
    torch.testing.assert_close(x.reshape(4, -1), mixing(s[:4]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixing.jacobian(stacked).flatten(0, 1), mixing.jacobian(s[:4]), rtol=1e-10, atol=1e-12)
    assert mixing.log_abs_det(stacked).shape == (2, 2)
    torch.testing.assert_close(mixing.inverse(x), stacked, rtol=1e-9, atol=1e-9)


def test_a_description_in_a_file_builds_the_same_map_again(case, tmp_path):
    mixing, s = case
    save_tree(tmp_path / "map.safetensors", describe(mixing))
    again = from_description(load_tree(tmp_path / "map.safetensors"))
    assert torch.equal(again(s), mixing(s))
    for name, value in again.state_dict().items():
        assert torch.equal(value, mixing.state_dict()[name])
    again.load_state_dict(mixing.state_dict())


def test_a_state_dict_carries_a_map_of_the_same_class():
    one, other = moebius(3, seed=1), moebius(3, seed=2)
    s = draw(Uniform(-0.5, 0.5), 5, 3)
    assert not torch.allclose(one(s), other(s))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(s), other(s))


@pytest.mark.parametrize("dim", [2, 3, 5, 10])
def test_moebius_transformations_are_conformal(dim):
    jacobian = moebius(dim, seed=dim).jacobian(draw(Uniform(-0.5, 0.5), 500, dim))
    assert float(column_contrast(jacobian).abs().max()) < 1e-12
    assert float(conformal_contrast(jacobian).abs().max()) < 1e-12


def test_a_moebius_transformation_is_the_written_formula():
    mixing = Moebius([1.0, -2.0], R30, [3.0, 4.0], alpha=0.5)
    s = np.array([0.3, 0.1])
    offset = s - np.array([1.0, -2.0])
    expected = np.array([3.0, 4.0]) + 0.5 * R30.numpy() @ offset / (offset @ offset)
    np.testing.assert_allclose(mixing(torch.from_numpy(s)).numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("minimum", [0.5, 0.7])
def test_poles_follow_a_normal_distribution_cut_at_the_minimum(minimum):
    poles = torch.cat([moebius(5, minimum=minimum, seed=seed).pole for seed in range(200)])
    assert float(poles.abs().min()) > minimum
    distribution = stats.truncnorm(minimum, np.inf)
    assert stats.kstest(poles.abs().numpy(), distribution.cdf).pvalue > 1e-3
    assert stats.kstest(poles.abs().numpy(), stats.truncnorm(0, np.inf).cdf).pvalue < 1e-6  # the planted defect
    assert abs(float((poles > 0).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(1000)


def test_complex_maps_are_those_of_complex_arithmetic():
    s = draw(Uniform(0.1, 1.5), 50, 2)
    z = torch.view_as_complex(s)
    for mixing, value in ((ComplexExp(), z.exp()), (ComplexPower(2.0), z * z), (ComplexPower(1.5), z**1.5)):
        torch.testing.assert_close(mixing(s), torch.view_as_real(value), rtol=1e-13, atol=1e-13)
        assert float(conformal_contrast(mixing.jacobian(s)).abs().max()) < 1e-13


def test_polar_coordinates_are_orthogonal_but_not_conformal():
    s = torch.tensor([[2.0, 0.3]], dtype=F64)
    jacobian = Polar().jacobian(s)
    assert float(column_contrast(jacobian)) == pytest.approx(0, abs=1e-15)
    # Columns of lengths 1 and 2: 1/2 [2 log(5/2) - log 4].
    assert float(conformal_contrast(jacobian)) == pytest.approx(math.log(2.5) - math.log(2), rel=1e-14)


def test_column_orthogonal_and_unit_determinant_are_what_they_say():
    matrix = column_orthogonal(6, 3, longest=3.0).matrix
    gram = matrix.T @ matrix
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-14)
    assert 1 < float(gram.diagonal().min()) <= float(gram.diagonal().max()) < 9
    for seed in range(5):
        mixing = unit_determinant(3, seed=seed)
        assert abs(float(torch.linalg.det(mixing.matrix))) == pytest.approx(1, rel=1e-12)
        assert bool((mixing.matrix > 0).all())


def test_the_activation_is_the_papers_far_beyond_torchs_softplus():
    s = np.array([-700.0, -30.0, -1.0, 0.0, 1.0, 19.0, 21.0, 30.0, 700.0])
    expected = 0.2 * s + 0.8 * np.logaddexp(0, s)
    np.testing.assert_allclose(SmoothLeakyReLU(9)(torch.from_numpy(s)).numpy(), expected, rtol=1e-15)


@pytest.mark.parametrize("slope", [0.001, 0.01, 0.2, 0.9])
def test_newton_inverts_the_activation_to_rounding(slope):
    activation = SmoothLeakyReLU(1, slope)
    s = torch.linspace(-60, 60, 4001, dtype=F64).unsqueeze(-1)
    torch.testing.assert_close(activation.inverse(activation(s)), s, rtol=0, atol=1e-12)


def test_triangular_mlps_are_triangular_and_increasing():
    jacobian = triangular_mlp(4, seed=3).jacobian(draw(Normal(0.0, 1.0), 50, 4))
    assert torch.equal(jacobian, jacobian.tril())
    assert bool((jacobian.diagonal(dim1=-2, dim2=-1) > 0).all())


def test_seeds_fix_maps_and_leave_torchs_random_state_alone():
    state = torch.get_rng_state()
    makers = (orthogonal, unit_determinant, moebius, orthogonal_mlp, triangular_mlp, affine_coupling_flow)
    for make in makers:
        a, b, c = make(3, seed=1), make(3, seed=1), make(3, seed=2)
        s = torch.full((1, 3), 0.1, dtype=F64)
        assert torch.equal(a(s), b(s))
        assert not torch.allclose(a(s), c(s))
    assert torch.equal(torch.get_rng_state(), state)


def test_haar_matrices_have_no_preferred_direction():
    corners = torch.stack([orthogonal(3, seed=seed).matrix for seed in range(400)])
    # Entries of a Haar matrix have mean 0 and variance 1/3.
    assert float(corners.mean(0).abs().max()) < 4.5 * math.sqrt(1 / 3 / 400)  # the largest of nine


# -- spurious solutions


@pytest.mark.parametrize(
    ("from_normal", "distribution", "reference"),
    [
        (None, Normal(0.0, 1.0), stats.norm),
        (NormalToUniform(2, -0.5, 0.5), Uniform(-0.5, 0.5), stats.uniform(-0.5, 1.0)),
        (NormalToLaplace(2, 0.7), Laplace(0.0, 0.7), stats.laplace(0, 0.7)),
    ],
)
def test_rotated_gaussians_preserve_measure_and_mix_sources(from_normal, distribution, reference):
    automorphism = rotated_gaussian(R30, from_normal)
    s = draw(distribution, 20000, 2)
    t = automorphism(s)
    # The density is preserved exactly: log p(s) = log p(t) + log |det|.
    log_p = [torch.from_numpy(reference.logpdf(v.numpy())).sum(-1) for v in (s, t)]
    torch.testing.assert_close(log_p[0], log_p[1] + automorphism.log_abs_det(s), rtol=1e-8, atol=1e-8)
    for k in range(2):
        assert stats.kstest(t[:, k].numpy(), reference.cdf).pvalue > 1e-3
    assert abs(stats.spearmanr(*t.T.numpy()).statistic) < 4 / math.sqrt(20000)
    assert mcc(t, s).value < 0.95


def test_a_plain_rotation_does_not_preserve_uniform_sources():
    t = LinearMixing(R30)(draw(Uniform(-0.5, 0.5), 20000, 2))
    assert stats.kstest(t[:, 0].numpy(), stats.uniform(-0.5, 1.0).cdf).pvalue < 1e-6


def test_gaussian_darmois_has_the_datas_moments_and_a_contrast():
    mixing = orthogonal(3, seed=1)
    stretched = LinearMixing(mixing.matrix @ torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64)), [1.0, 2.0, 3.0])
    spurious = gaussian_darmois(stretched)
    torch.testing.assert_close(
        spurious.matrix @ spurious.matrix.T, stretched.matrix @ stretched.matrix.T, rtol=1e-13, atol=1e-13
    )
    assert torch.equal(spurious.matrix, spurious.matrix.tril())
    # The first coordinate is the distribution function of x_1, the next the conditional one of x_2 given x_1.
    x = stretched(draw(Normal(0.0, 1.0), 5, 3))
    distribution = MultivariateNormal(stretched.shift, stretched.matrix @ stretched.matrix.T)
    c, m = distribution.covariance_matrix.numpy(), distribution.mean.numpy()
    z = spurious.inverse(x).numpy()
    np.testing.assert_allclose(z[:, 0], (x[:, 0].numpy() - m[0]) / np.sqrt(c[0, 0]), rtol=1e-12)
    conditional = m[1] + c[1, 0] / c[0, 0] * (x[:, 0].numpy() - m[0])
    np.testing.assert_allclose(
        z[:, 1], (x[:, 1].numpy() - conditional) / np.sqrt(c[1, 1] - c[1, 0] ** 2 / c[0, 0]), rtol=1e-10
    )
    assert float(column_contrast(stretched.matrix)) < 1e-13
    assert float(column_contrast(spurious.matrix)) > 0.05


def test_darmois_has_the_density_of_the_data():
    truth, spurious = MAPS["darmois"][0].triangular, MAPS["darmois"][0]
    s = draw(Normal(0.0, 1.0), 6, 2)
    x = truth(s)
    v = spurious.inverse(x)
    densities = [-0.5 * z.square().sum(-1) - mixing.log_abs_det(z) for mixing, z in ((truth, s), (spurious, v))]
    torch.testing.assert_close(densities[1], densities[0], rtol=0, atol=1e-10)


def test_darmois_makes_independent_normals_that_are_not_the_sources():
    truth, spurious = MAPS["darmois"][0].triangular, MAPS["darmois"][0]
    s = draw(Normal(0.0, 1.0), 1000, 2)
    v = spurious.inverse(truth(s))
    for k in range(2):
        assert stats.kstest(v[:, k].numpy(), stats.norm.cdf).pvalue > 1e-3
    for f in (lambda t: t, torch.abs):
        assert abs(float(torch.corrcoef(f(v).T)[0, 1])) < 4 / math.sqrt(1000)
    assert mcc(v, s).value < 0.98
    raw = truth(s)  # the planted defect: data that no one unmixed
    assert abs(float(torch.corrcoef(raw.T)[0, 1])) > 4 / math.sqrt(1000)


def test_a_linear_triangular_map_has_the_darmois_of_cholesky():
    lower = LinearMixing([[1.0, 0.0], [0.7, 1.3]])
    x = lower(draw(Normal(0.0, 1.0), 5, 2))
    flipped = gaussian_darmois(LinearMixing(lower.matrix.flip(0)))
    torch.testing.assert_close(Darmois(lower).inverse(x), flipped.inverse(x.flip(-1)), rtol=1e-10, atol=1e-10)


# -- data sets


@pytest.mark.parametrize(
    ("distribution", "reference"),
    [
        (Uniform(-0.5, 0.5), stats.uniform(-0.5, 1)),
        (Normal(0.0, 2.0), stats.norm(0, 2)),
        (Laplace(0.0, 1.0), stats.laplace),
        (Beta(2.0, 5.0), stats.beta(2, 5)),
        (Normal(torch.zeros(3), torch.ones(3)), stats.norm),
    ],
)
def test_data_are_mixed_sources_of_the_given_distribution(distribution, reference):
    mixing = column_orthogonal(5, 3)
    data = mixed(mixing, sources=distribution, num=3000, test_size=500, seed=3)
    assert (data.train.shape, data.test.shape) == ((2500, 5), (500, 5))
    assert torch.equal(mixing(data.truth["z"]), data.train)
    assert torch.equal(mixing(data.truth["z_test"]), data.test)
    for k in range(3):
        assert stats.kstest(data.truth["z"][:, k].numpy(), reference.cdf).pvalue > 1e-3
    assert abs(float(torch.corrcoef(data.truth["z"].T)[0, 1])) < 4 / math.sqrt(2500)


def test_noise_has_the_given_deviation_and_a_seed_fixes_all():
    state = torch.get_rng_state()
    data, again = (mixed(shear(), sources=Uniform(0.0, 1.0), num=5000, noise=0.1, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.train, again.train)
    noise = data.train - data.mixing(data.truth["z"])
    assert float(noise.std()) == pytest.approx(0.1, abs=4 * 0.1 / math.sqrt(2 * 10000))
    assert float(data.truth["sigma"]) == 0.1


def test_standardising_keeps_the_truth_and_the_contrast():
    mixing = Composition([moebius(3, minimum=0.7), unit_determinant(3)])
    distribution = Uniform(-0.5, 0.5)
    raw = mixed(mixing, sources=distribution, num=1000, test_size=100, noise=0.01)
    data = mixed(mixing, sources=distribution, num=1000, test_size=100, noise=0.01, standardise=True)
    torch.testing.assert_close(data.train.mean(0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-13)
    assert float(data.train.square().mean()) == pytest.approx(1, rel=1e-12)
    assert torch.equal(data.truth["z"], raw.truth["z"])
    ratio = float(data.truth["sigma"]) / 0.01
    assert ratio == pytest.approx(float(1 / (raw.train - raw.train.mean(0)).square().mean().sqrt()), rel=1e-12)
    noise = [d.train - d.mixing(d.truth["z"]) for d in (raw, data)]
    torch.testing.assert_close(noise[1], noise[0] * ratio, rtol=0, atol=1e-12)
    contrasts = [ima_contrast(d.mixing, d.truth["z"]) for d in (raw, data)]
    torch.testing.assert_close(*contrasts, rtol=1e-10, atol=1e-12)


def test_a_saved_data_set_comes_back_with_its_mixing(tmp_path):
    data = mixed(
        orthogonal_mlp(3), sources=Normal(0.0, 1.0), num=20, test_size=5, standardise=True, dtype=torch.float32
    )
    save_mixed(tmp_path / "data.safetensors", data)
    again = load_mixed(tmp_path / "data.safetensors")
    for name in ("train", "test", "train_log_det"):
        assert torch.equal(getattr(again, name), getattr(data, name))
    assert {k: v.tolist() for k, v in again.truth.items()} == {k: v.tolist() for k, v in data.truth.items()}
    s = data.truth["z"].double()
    assert torch.equal(again.mixing(s), data.mixing(s))
    torch.testing.assert_close(again.mixing(s), data.train.double(), rtol=1e-5, atol=1e-5)


# -- refusals


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: shear()(torch.zeros(4, 3)), r"expected sources of shape \(\.\.\., 2\), got \(4, 3\)"),
        (lambda: column_orthogonal(3, 2).inverse(torch.zeros(2)), r"expected data of shape \(\.\.\., 3\)"),
        (lambda: LinearMixing([[1.0, 1.0], [1.0, 1.0]]), "rank 2"),
        (lambda: LinearMixing([[1.0, 1.0]]), "D >= K"),
        (lambda: LinearMixing([[1.0]], [1.0, 2.0]), "shift"),
        (lambda: LinearMixing([[math.nan]]), "finite"),
        (lambda: Composition([]), "at least one map"),
        (lambda: Composition([column_orthogonal(3, 2), shear()]), "from dimension 3"),
        (lambda: Inverted(column_orthogonal(3, 2)), "K = D"),
        (lambda: Moebius([1.0, 1.0], [[1.0, 1.0], [0.0, 1.0]]), "orthogonal matrix"),
        (lambda: Moebius([1.0], [[1.0]], alpha=0.0), "alpha"),
        (lambda: SmoothLeakyReLU(2, 0.0), "slope"),
        (lambda: ComplexPower(0.5), "at least one"),
        (lambda: affine_coupling_flow(1), "at least 2"),
        (lambda: NormalToUniform(2, 1.0, 0.0), "low below high"),
        (lambda: rotated_gaussian(torch.ones(2, 2)), "orthogonal"),
        (lambda: Darmois(orthogonal_mlp(2)), "lower triangular"),
        (lambda: gaussian_darmois(column_orthogonal(3, 2)), "K = D"),
        (lambda: from_description({"class": "Nonsense", "config": {}}), "Nonsense"),
        (lambda: mixed(shear(), sources=Normal(0.0, 1.0), num=5, test_size=5), "test_size below num"),
        (lambda: mixed(shear(), sources=Normal(0.0, 1.0), num=5, noise=-1.0), "noise >= 0"),
        (lambda: mixed(shear(), sources=Normal(torch.zeros(3), 1.0), num=5), "distribution of one source"),
        (lambda: mixed(ComplexPower(2.0), sources=Normal(0.0, 1.0), num=50), "injective"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
