"""Stationary points of pPCA and of the linear VAE: theory against autograd, optimisers and printed numbers.

Random problems have eigenvalues and sigma^2 at relative distances of at least 1e-3: where two coincide, an eigenvalue
of the Hessian is zero that theory gives a sign to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap

from guides import Linear
from inference import AnalyticELBO
from zoo import LinearGaussian, LinearVAE
from zoo.linear import stationarity as sp
from zoo.linear.estimation import spectrum

TEXTBOOK = torch.tensor([5.0, 3.0, 2.0, 1.2, 0.6, 0.3], dtype=torch.float64)
SEPARATED = torch.tensor([15.4, 8.7, 4.1, 2.05, 1.0, 0.4, 0.3, 0.25, 0.2, 0.15], dtype=torch.float64)
OBJECTIVES = {"evidence": sp.mean_log_evidence, "elbo": sp.profiled_elbo}


class Problem(NamedTuple):
    lam: Tensor
    axes: Tensor
    latent_dim: int
    var: float

    @property
    def S(self) -> Tensor:
        return (self.axes * self.lam) @ self.axes.mT

    @property
    def log_var(self) -> Tensor:
        return torch.tensor(math.log(self.var), dtype=torch.float64)

    def of(self, objective):
        """The objective as a function of W alone."""
        return lambda W: objective(W, self.log_var, self.S)


def rotation(dim: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]


def textbook(latent_dim: int, var: float) -> Problem:
    return Problem(TEXTBOOK, rotation(6, torch.Generator().manual_seed(0)), latent_dim, var)


def random_problem(seed: int, max_dim: int = 12, max_latent: int = 5) -> Problem:
    """Eigenvalues and sigma^2 log-uniform over three octaves and a half either side of 1, in general position."""
    generator = torch.Generator().manual_seed(seed)
    dim = int(torch.randint(2, max_dim + 1, (), generator=generator))
    latent_dim = int(torch.randint(1, min(dim - 1, max_latent) + 1, (), generator=generator))
    while True:
        values = (2.5 * (2 * torch.rand(dim + 1, generator=generator, dtype=torch.float64) - 1)).exp()
        if values.log().sort().values.diff().min() > 1e-3:
            break
    lam = values[1:].sort(descending=True).values
    return Problem(lam, rotation(dim, generator), latent_dim, values[0].item())


def signed_permutation(dim: int, generator: torch.Generator) -> Tensor:
    signs = 2.0 * torch.randint(2, (dim,), generator=generator) - 1
    return (torch.eye(dim)[torch.randperm(dim, generator=generator)] * signs).double()


def hessians(objective, W: Tensor) -> Tensor:
    return vmap(lambda w: sp.negative_hessian(objective, w), chunk_size=256)(W)


# ------------------------------------------------------------------------------------------------ objectives


def test_objectives_are_the_means_of_the_zoo_s_own() -> None:
    x = torch.randn(40, 6, dtype=torch.float64) @ rotation(6, torch.Generator()) * torch.arange(1, 7) + 3
    W, V = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    log_var, log_d = torch.tensor(-0.3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    S = torch.cov(x.mT, correction=0)
    distribution = LinearGaussian(W, x.mean(0), (0.5 * log_var).exp())
    assert sp.mean_log_evidence(W, log_var, S).item() == pytest.approx(
        distribution.log_prob(x).mean().item(), rel=1e-12
    )

    single = sp.mean_log_evidence(W.float(), log_var.float(), S.float())
    assert single.dtype == torch.float64
    assert single.item() == pytest.approx(distribution.log_prob(x).mean().item(), rel=1e-6)

    model, guide = LinearVAE(6, 3).double(), Linear(6, 3).double()
    with torch.no_grad():
        for parameter, value in [(model.W, W), (model.mu, x.mean(0)), (model.log_sigma, 0.5 * log_var)]:
            parameter.copy_(value)
        for parameter, value in [(guide.V, V), (guide.bias, -V @ x.mean(0)), (guide.log_sigma, 0.5 * log_d)]:
            parameter.copy_(value)
    expected = -AnalyticELBO().loss(model, guide, x) / len(x)
    assert sp.mean_elbo(W, log_var, V, log_d, S).item() == pytest.approx(expected, rel=1e-12)


def hadamard_gap(W: Tensor, log_var: Tensor, factor: float = 0.5) -> Tensor:
    M = W.mT @ W + log_var.exp() * torch.eye(W.shape[1], dtype=W.dtype)
    return factor * (M.diagonal().log().sum() - torch.logdet(M))


def test_gap_at_any_decoder_is_hadamard_s_and_the_guide_is_optimal() -> None:
    """L2; a wrong constant in the closed form would be seen."""
    problem = textbook(3, 0.7)
    for seed in range(20):
        W = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gap = problem.of(sp.mean_log_evidence)(W) - problem.of(sp.profiled_elbo)(W)
        assert abs(gap - hadamard_gap(W, problem.log_var)) < 1e-10
        assert abs(gap - hadamard_gap(W, problem.log_var, factor=0.51)) > 1e-4
        guide = sp.optimal_guide(W, problem.log_var)
        slopes = grad(lambda V, d, W=W: sp.mean_elbo(W, problem.log_var, V, d, problem.S), argnums=(0, 1))(*guide)
        assert max(s.abs().max().item() for s in slopes) < 1e-12


def test_an_unrotated_maximum_of_the_evidence_maximises_the_elbo() -> None:
    """L2, with the numbers of the derivation: rotating PCs 1 and 2 leaves the evidence, opens a gap and a slope.

    The slope is the gap's: W (diag(M)^-1 - M^-1), downhill.
    """
    problem = textbook(3, 0.7)
    point = sp.stationary_point(problem.lam, problem.axes, (0, 1, 2), 3, 0.7)
    parameters = (point.W, problem.log_var, *sp.optimal_guide(point.W, problem.log_var))
    slopes = grad(lambda *p: sp.mean_elbo(*p, problem.S), argnums=(0, 1, 2, 3))(*parameters)
    assert max(s.abs().max().item() for s in slopes) < 1e-13
    assert abs(point.gap) < 1e-12
    assert point.log_evidence == pytest.approx(-9.67922, abs=5e-6)
    for degrees, gap in [(10, 0.00388), (30, 0.02440), (45, 0.03227)]:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        W = point.W @ torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)
        M = W.mT @ W + 0.7 * torch.eye(3, dtype=torch.float64)
        slope = grad(problem.of(sp.profiled_elbo))(W)
        assert problem.of(sp.mean_log_evidence)(W).item() == pytest.approx(point.log_evidence, abs=1e-12)
        assert point.log_evidence - problem.of(sp.profiled_elbo)(W).item() == pytest.approx(gap, abs=5e-6)
        torch.testing.assert_close(slope, W @ (M.inverse() - (1 / M.diagonal()).diag()), rtol=0, atol=1e-13)
        assert slope.norm() > 0.05


def digits() -> tuple[Tensor, Tensor]:
    eigen = spectrum(torch.from_numpy(load_digits(return_X_y=True)[0]) / 16)
    return eigen.eigenvalues, eigen.eigenvectors


def test_a_noise_that_is_fixed_makes_further_latents_useless() -> None:
    """L8: digits / 16, sigma^2 fixed at its optimum for K = 10."""
    lam, axes = digits()
    var = lam[10:].mean().item()

    def best(K: int) -> float:
        active = tuple(range(min(K, int((lam > var).sum()))))
        point = sp.stationary_point(lam, axes, active, K, var)
        assert point.is_maximum
        assert abs(point.gap) < 1e-9
        return point.log_evidence

    expected = {2: -15.87, 5: 5.17, 10: 17.4519, 15: 21.53, 20: 22.93, 30: 23.2815, 40: 23.2815}
    for K, value in expected.items():
        assert best(K) == pytest.approx(value, abs=5.1e-5 if K in (10, 30, 40) else 5.1e-3)
    assert best(28) < best(29) == pytest.approx(best(40), abs=1e-12)


def test_rate_and_distortion_for_each_beta() -> None:
    """L11: the optimum of D + beta R at sigma^2 is that of the ELBO at beta sigma^2. Without the beta it is not."""
    lam, axes = digits()
    S, log_var = (axes * lam) @ axes.mT, torch.tensor(math.log(0.05), dtype=torch.float64)
    table = {
        0.5: (12.325, -22.266),
        1.0: (8.859, -19.766),
        2.0: (5.393, -14.766),
        5.0: (1.650, -3.195),
        20.0: (0.0, 9.881),
    }
    for beta, (rate, distortion) in table.items():
        for var in {0.05 * beta, 0.05}:
            active = tuple(range(min(10, int((lam > var).sum()))))
            W = sp.stationary_point(lam, axes, active, 10, var).W
            V, log_d = sp.optimal_guide(W, W.new_tensor(math.log(var)))
            found = sp.mean_rate(V, log_d, S).item(), sp.mean_distortion(W, log_var, V, log_d, S).item()
            assert (found == pytest.approx((rate, distortion), abs=1e-3)) == (var == 0.05 * beta)


# ------------------------------------------------------------------------------------------------ stability


@pytest.mark.parametrize(
    ("var", "maximum"), [(0.25, (0, 1, 2)), (0.9, (0, 1, 2)), (1.5, (0, 1, 2)), (2.5, (0, 1)), (4.0, (0,)), (6.0, ())]
)
def test_one_local_maximum_at_each_fixed_noise(var: float, maximum: tuple[int, ...]) -> None:
    """L3, and beyond it: every eigenvalue of every Hessian is the formula's."""
    problem = textbook(3, var)
    points = list(sp.stationary_points(problem.lam, problem.axes, 3, var))
    assert [p.active for p in points if p.is_maximum] == [maximum]
    assert max(points, key=lambda p: p.elbo).active == maximum
    W = torch.stack([p.W for p in points])
    for objective, curvatures in [
        (sp.mean_log_evidence, sp.evidence_curvatures),
        (sp.profiled_elbo, sp.elbo_curvatures),
    ]:
        found = torch.linalg.eigvalsh(hessians(problem.of(objective), W))
        theory = torch.stack([curvatures(problem.lam, p.active, 3, var) for p in points])
        torch.testing.assert_close(found, theory, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_local_maximum_with_learned_noise(name: str) -> None:
    """L3: eight stationary points in (W, log sigma^2), one maximum; the joint inertia is theory's."""
    problem = textbook(3, 1.0)
    points = list(sp.stationary_points_of_learned_noise(problem.lam, problem.axes, 3))
    assert len(points) == 8
    assert [p.active for p in points if p.is_maximum] == [(0, 1, 2)]
    for point in points:
        parameters = point.W, torch.tensor(math.log(point.var), dtype=torch.float64)

        def objective(W: Tensor, log_var: Tensor) -> Tensor:
            return OBJECTIVES[name](W, log_var, problem.S)

        slopes = grad(objective, argnums=(0, 1))(*parameters)
        assert max(s.abs().max().item() for s in slopes) < 1e-12
        found = sp.inertia(sp.negative_hessian(objective, *parameters))
        assert tuple(found.tolist()) == (point.evidence_inertia if name == "evidence" else point.elbo_inertia)


def test_a_guide_that_is_free_adds_positive_eigenvalues_only() -> None:
    """Haynsworth: the inertia of (W, V, log d) is that of the profile plus K D + K positive ones."""
    problem = textbook(2, 0.7)
    points = list(sp.stationary_points(problem.lam, problem.axes, 2, 0.7))
    expected = [[negative, zero, positive + 2 * 6 + 2] for negative, zero, positive in (p.elbo_inertia for p in points)]
    assert vmap_full_inertia(problem, torch.stack([p.W for p in points])).tolist() == expected


def check_family(problem: Problem, seed: int) -> int:
    """Slope, gap and both inertias at every point of the family, each with its own signed permutation."""
    points = list(sp.stationary_points(problem.lam, problem.axes, problem.latent_dim, problem.var))
    generator, K = torch.Generator().manual_seed(seed), problem.latent_dim
    W = torch.stack([p.W @ signed_permutation(K, generator) for p in points])
    q = torch.tensor([len(p.active) for p in points])
    for name, objective in OBJECTIVES.items():
        f = problem.of(objective)
        assert vmap(grad(f))(W).abs().max() < 1e-9
        found = sp.inertia(hessians(f, W))
        theory = [p.evidence_inertia if name == "evidence" else p.elbo_inertia for p in points]
        assert found.tolist() == [list(t) for t in theory]
        zeros = q * (q - 1) // 2 + q * (K - q)
        assert torch.equal(found[:, 1], zeros if name == "evidence" else torch.zeros_like(q))
        assert torch.equal(found[:, 0], torch.tensor([climbs(problem.lam, p.active, K, problem.var) for p in points]))
    values = vmap(problem.of(sp.mean_log_evidence))(W), vmap(problem.of(sp.profiled_elbo))(W)
    assert (values[0] - values[1]).abs().max() < 1e-9
    assert max(abs(p.gap) for p in points) < 1e-9
    assert sum(p.is_maximum for p in points) == 1
    return len(points)


def climbs(lam: Tensor, active: tuple[int, ...], K: int, var: float) -> int:
    """Counted in words: a column may move to any larger component left out, a zero column to any above sigma^2."""
    left_out = [j for j in range(len(lam)) if j not in active]
    columns = sum(bool(lam[j] > lam[i]) for i in active for j in left_out)
    return columns + (K - len(active)) * sum(bool(lam[j] > var) for j in left_out)


def test_family_of_random_problems() -> None:
    assert sum(check_family(random_problem(seed, max_dim=8, max_latent=3), seed) for seed in range(100)) > 700


@pytest.mark.slow
def test_family_of_500_random_problems() -> None:
    total = sum(check_family(random_problem(seed), seed) for seed in range(500))
    print(f"{total} stationary points of 500 problems")
    assert total > 18_000


def test_a_wrong_length_or_a_wrong_rotation_is_no_stationary_point() -> None:
    problem = textbook(3, 0.7)
    W = sp.stationary_point(problem.lam, problem.axes, (0, 2), 3, 0.7).W
    for objective in OBJECTIVES.values():
        assert grad(problem.of(objective))(W).abs().max() < 1e-13
        assert grad(problem.of(objective))(1.01 * W).abs().max() > 1e-3
    generator = torch.Generator().manual_seed(1)
    assert grad(problem.of(sp.mean_log_evidence))(W @ rotation(3, generator)).abs().max() < 1e-13
    assert grad(problem.of(sp.profiled_elbo))(W @ rotation(3, generator)).abs().max() > 1e-3


def test_inertia_counts_in_the_given_unit() -> None:
    matrix = torch.diag(torch.tensor([-1.0, -5e-10, 0.0, 2e-9, 3.0], dtype=torch.float64))
    assert sp.inertia(matrix).tolist() == [1, 2, 2]
    assert sp.inertia(torch.stack([matrix, -matrix]), unit=1e-2).tolist() == [[2, 1, 2], [2, 1, 2]]


# ------------------------------------------------------------------------------------------------ saddles with a gap


def newton(objective, W: Tensor, steps: int = 20) -> Tensor:
    for _ in range(steps):
        step = torch.linalg.solve(sp.negative_hessian(objective, W), grad(objective)(W).flatten())
        W = W + step.reshape(W.shape)
    return W


def test_the_elbo_has_a_saddle_with_a_positive_gap_outside_the_family() -> None:
    problem = textbook(2, 0.7)
    a, b = 1.3668 * problem.axes[:, 0], 1.1697 * problem.axes[:, 1]
    start = torch.stack([a + b, a - b], -1)
    elbo = problem.of(sp.profiled_elbo)
    assert grad(elbo)(start).abs().max() < 1e-4
    W = newton(elbo, start)
    assert (W - start).abs().max() < 1e-4
    assert grad(elbo)(W).abs().max() < 1e-14
    gap = problem.of(sp.mean_log_evidence)(W) - elbo(W)
    assert gap.item() == pytest.approx(0.00813, abs=5e-6)
    negative, zero, _ = sp.inertia(sp.negative_hessian(elbo, W)).tolist()
    assert negative >= 1
    assert zero == 0
    assert grad(problem.of(sp.mean_log_evidence))(W).abs().max() > 1e-2  # evidence is not even stationary there


def ascend(objective, W: Tensor, steps: int = 300) -> Tensor:
    """Saddle-free Newton from a batch of starts: along eigenvectors, by slope over |curvature|, halved at need."""
    halves = 0.5 ** torch.arange(12, dtype=W.dtype)
    values = vmap(vmap(objective))
    for _ in range(steps):
        slope = vmap(grad(objective))(W).flatten(1)
        if slope.abs().max() < 1e-12:
            break
        e, Q = torch.linalg.eigh(hessians(objective, W))
        coordinates = (Q.mT @ slope[..., None]).squeeze(-1) / (e.abs() + 1e-3 * slope.norm(dim=-1, keepdim=True))
        step = (Q @ coordinates[..., None]).reshape(W.shape)
        step = step / (step.flatten(1).norm(dim=-1)[:, None, None] / 2).clamp(min=1)
        tries = W[:, None] + halves[:, None, None] * step[:, None]
        # the full step once converging: rounding of the value would pick another
        best = values(tries).argmax(1) * (slope.abs().amax(-1) > 1e-5)
        W = tries[torch.arange(len(W)), best]
    return W


def vmap_full_inertia(problem: Problem, W: Tensor) -> Tensor:
    """Inertia in (W, V, log d), at the best guide."""

    def full(w: Tensor) -> Tensor:
        guide = sp.optimal_guide(w, problem.log_var)
        return sp.negative_hessian(lambda W, V, d: sp.mean_elbo(W, problem.log_var, V, d, problem.S), w, *guide)

    return sp.inertia(vmap(full, chunk_size=64)(W))


def check_maxima(problem: Problem, starts: int, seed: int) -> None:
    """From random starts of all scales: every local maximum found has no gap, and is the one of theory."""
    generator = torch.Generator().manual_seed(seed)
    shape = (starts, len(problem.lam), problem.latent_dim)
    sizes = (6 * torch.rand(starts, 1, 1, generator=generator, dtype=torch.float64) - 4).exp()
    elbo = problem.of(sp.profiled_elbo)
    W = ascend(elbo, sizes * torch.randn(shape, generator=generator, dtype=torch.float64))
    assert vmap(grad(elbo))(W).abs().max() < 1e-9
    gap = vmap(problem.of(sp.mean_log_evidence))(W) - vmap(elbo)(W)
    maxima = vmap_full_inertia(problem, W)[:, 0] == 0
    assert torch.equal(maxima, sp.inertia(hessians(elbo, W))[:, 0] == 0)
    assert maxima.sum() >= 0.9 * starts
    assert gap[maxima].abs().max() < 1e-9
    theory = [
        p for p in sp.stationary_points(problem.lam, problem.axes, problem.latent_dim, problem.var) if p.is_maximum
    ]
    torch.testing.assert_close(
        vmap(elbo)(W[maxima]), W.new_full((int(maxima.sum()),), theory[0].elbo), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("seed", range(4))
def test_maxima_found_from_random_starts_have_no_gap(seed: int) -> None:
    check_maxima(random_problem(seed, max_dim=6, max_latent=3), 50, seed)


@pytest.mark.slow
def test_maxima_of_many_problems_have_no_gap() -> None:
    for seed in range(100):
        check_maxima(random_problem(seed), 50, seed)


@pytest.mark.slow
def test_no_spurious_maxima_with_all_parameters_free() -> None:
    """L5: LBFGS in (W, V, log d, log sigma^2), four seeds and four initial noises: all at the maximum likelihood."""
    D, K = len(SEPARATED), 5
    axes = rotation(D, torch.Generator().manual_seed(0))
    S = (axes * SEPARATED) @ axes.mT
    *_, best = (p for p in sp.stationary_points_of_learned_noise(SEPARATED, axes, K) if p.is_maximum)
    assert best.active == tuple(range(K))
    for seed in range(4):
        for var in (10.0, 1.0, 0.1, 0.01):
            assert lbfgs(S, K, var, seed) == pytest.approx(best.log_evidence, abs=1e-4)


def lbfgs(S: Tensor, K: int, var: float, seed: int) -> float:
    generator, D = torch.Generator().manual_seed(seed), len(S)
    W = torch.randn(D, K, generator=generator, dtype=torch.float64) / math.sqrt(D)
    V = torch.randn(K, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
    parameters = [W, W.new_tensor(math.log(var)), V, W.new_zeros(K)]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, tolerance_grad=1e-7, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -sp.mean_elbo(*parameters, S)
        loss.backward()
        return loss

    optimizer.step(closure)
    return -closure().item()


# ------------------------------------------------------------------------------------------------ landscape


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("component", [0, 1, 2])
def test_collapse_threshold_is_the_eigenvalue(name: str, component: int) -> None:
    problem = textbook(3, 1.0)
    bounds = [7.0, *problem.lam.tolist()]
    threshold = sp.collapse_threshold(
        problem.lam,
        problem.axes,
        tuple(range(component)),
        3,
        low=bounds[component + 2],
        high=0.999 * bounds[component],
        objective=OBJECTIVES[name],
    )
    assert threshold == pytest.approx(problem.lam[component].item(), abs=1e-6)
    assert threshold != pytest.approx(problem.lam[component + 1].item(), abs=1e-2)


def test_a_bracket_without_a_change_of_stability_is_refused() -> None:
    problem = textbook(3, 1.0)
    with pytest.raises(ValueError, match="expected a saddle at low and a maximum at high"):
        sp.collapse_threshold(problem.lam, problem.axes, (0,), 3, low=3.5, high=4.5)


def test_inadmissible_components_are_refused() -> None:
    problem = textbook(2, 1.0)
    for active in [(0, 1, 2), (3, 4)]:
        with pytest.raises(ValueError, match="expected at most 2 active components with eigenvalues above var"):
            sp.stationary_point(problem.lam, problem.axes, active, 2, 1.0)


@pytest.mark.parametrize(("var", "unstable"), [(1.0, (True, True)), (1.6, (True, False)), (2.5, (False, False))])
def test_landscape_of_a_zero_column(var: float, unstable: tuple[bool, bool]) -> None:
    """Figure 1 of the paper: towards components 2 (lambda 2) and 3 (lambda 1.2)."""
    problem = textbook(3, var)
    point = sp.stationary_point(problem.lam, problem.axes, (0, 1), 3, var)
    directions = torch.zeros(2, 6, 3, dtype=torch.float64)
    directions[:, :, 2] = problem.axes[:, 2:4].mT
    grid = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    for objective in OBJECTIVES.values():
        f = problem.of(objective)
        plane = sp.landscape(f, point.W, directions, grid)
        lines = [sp.landscape(f, point.W, d[None], grid) for d in directions]
        assert plane.shape == (31, 31)
        torch.testing.assert_close(plane[:, 15], lines[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(plane[15], lines[1], rtol=0, atol=1e-13)
        torch.testing.assert_close(plane[3, 20], f(point.W + grid[3] * directions[0] + grid[20] * directions[1]))
        assert tuple(bool(line[16] > line[15]) for line in lines) == unstable
        # in one direction the column's length solves a scalar problem: t^2 = lambda - sigma^2, or 0
        for line, lam in zip(lines, problem.lam[2:4].tolist()):
            assert abs(abs(grid[line.argmax()]) - math.sqrt(max(lam - var, 0))) <= 0.05 + 1e-9


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("var", [0.5, 1.6, 6.0])
def test_curvature_of_a_fully_collapsed_model_towards_each_component(name: str, var: float) -> None:
    """(sigma^2 - lambda) / sigma^4, by differences of the landscape, for leading, middle and trailing components."""
    problem, W, step = textbook(3, var), torch.zeros(6, 3, dtype=torch.float64), 1e-3
    for lam, axis in zip(problem.lam.tolist(), problem.axes.mT):
        direction = torch.zeros(1, 6, 3, dtype=torch.float64)
        direction[0, :, 2] = axis
        left, middle, right = sp.landscape(
            problem.of(OBJECTIVES[name]), W, direction, torch.tensor([-step, 0.0, step], dtype=torch.float64)
        )
        found = -float(left - 2 * middle + right) / step**2
        truncation = step**2 * (lam / var**3 - 0.5 / var**2)  # the quartic term of the scalar problem
        rounding = 20 * torch.finfo(torch.float64).eps * abs(float(middle)) / step**2
        assert found == pytest.approx((var - lam) / var**2 + truncation, abs=rounding)
