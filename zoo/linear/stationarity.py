r"""The stationary points of probabilistic PCA and the linear VAE whose W'W is diagonal: where the ELBO can get stuck.

.. math::
    W = U_A (\Lambda_A - \sigma^2 I)^{1/2} P, \qquad A \subseteq \{i : \lambda_i > \sigma^2\}, \quad |A| \le K,

with :math:`\lambda_i, u_i` the eigenpairs of the data covariance S (divisor N), P a signed permutation and a zero
column (a collapsed latent) for each of the K - q missing components, q = \|A\|. All of them are stationary for the
evidence and for the ELBO with its best guide, their gap is zero, and both objectives agree on which is a maximum.

They are not all. The evidence is stationary at every rotation W R of them, too, where the ELBO in general is not; and
the ELBO has saddles, but no maxima, whose W'W is not diagonal and whose gap is positive.

**Sign convention.** Hessians are those of the *negative* objective, per data point, in nats: a local maximum has no
negative eigenvalue, and each negative one is a direction of ascent.

References:
    Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse", 2019,
    arXiv 1911.02469. Tipping, Bishop, "Probabilistic Principal Component Analysis", 1999, J. R. Stat. Soc. B 61.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Objective: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of W, log sigma^2 and S
Inertia: TypeAlias = tuple[int, int, int]  # numbers of negative, zero and positive eigenvalues
ZERO = 1e-9  # an eigenvalue of a Hessian below this part of its unit counts as zero


class StationaryPoint(NamedTuple):
    """A stationary point; values are means over the data, in nats.

    Attributes:
        active: A, the components kept, ascending from 0.
        W: (D, K), float64; the columns beyond the q-th are zero. W P is as good for every signed permutation P.
        var: sigma^2.
        log_evidence: Mean log-evidence, from the eigenvalues alone.
        elbo: Mean ELBO with its best guide, from W and the covariance.
        evidence_inertia: Theory's numbers of negative, zero and positive eigenvalues for the negative evidence.
        elbo_inertia: The same for the negative ELBO with the guide profiled out.
    """

    active: tuple[int, ...]
    W: Tensor
    var: float
    log_evidence: float
    elbo: float
    evidence_inertia: Inertia
    elbo_inertia: Inertia

    @property
    def gap(self) -> float:
        """Evidence minus ELBO, zero up to rounding."""
        return self.log_evidence - self.elbo

    @property
    def is_maximum(self) -> bool:
        """Whether it is a local maximum (up to rotations, of the evidence; strictly, of the ELBO)."""
        return self.evidence_inertia[0] == 0


def mean_log_evidence(W: Tensor, log_var: Tensor, covariance: Tensor) -> Tensor:
    r"""Log-evidence, mean over data with the given covariance.

    .. math:: -\tfrac12 [D \log 2\pi + \log|C| + \operatorname{tr} C^{-1} S], \qquad C = W W^\top + \sigma^2 I

    Args:
        W: (D, K).
        log_var: log sigma^2, ().
        covariance: S with divisor N, (D, D); the mean of the model is that of the data.

    Returns:
        () in nats and float64; differentiable, and works under ``torch.func``.
    """
    W, covariance = W.double(), covariance.double()
    eye = torch.eye(len(W), dtype=W.dtype, device=W.device)
    factor = torch.linalg.cholesky(W @ W.mT + log_var.double().exp() * eye)
    trace = torch.cholesky_solve(covariance, factor).diagonal().sum()
    return -0.5 * (len(W) * math.log(2 * math.pi) + 2 * factor.diagonal().log().sum() + trace)


def mean_rate(V: Tensor, log_d: Tensor, covariance: Tensor) -> Tensor:
    r"""KL(q(z \| x) \|\| N(0, I)) of the guide q = N(V (x - mu), diag d), mean over the data.

    .. math:: \tfrac12 [\operatorname{tr} D - \log\det D + \operatorname{tr} V S V^\top - K]

    Takes V (K, D), the guide's log-variances log_d (K,) and S (D, D); returns () in nats and float64.
    """
    V, log_d = V.double(), log_d.double()
    return 0.5 * (log_d.exp().sum() - log_d.sum() + ((V @ covariance.double()) * V).sum() - len(V))


def mean_distortion(W: Tensor, log_var: Tensor, V: Tensor, log_d: Tensor, covariance: Tensor) -> Tensor:
    r"""-E_q log p(x \| z), mean over the data.

    .. math:: \frac{\operatorname{tr} W^\top W D + \operatorname{tr} (I - W V) S (I - W V)^\top}{2 \sigma^2}
              + \tfrac D2 \log 2 \pi \sigma^2

    Arguments as for :func:`mean_log_evidence` and :func:`mean_rate`; returns () in nats and float64.
    """
    W, log_var = W.double(), log_var.double()
    residual = torch.eye(len(W), dtype=W.dtype, device=W.device) - W @ V.double()
    error = W.square().sum(0) @ log_d.double().exp() + ((residual @ covariance.double()) * residual).sum()
    return 0.5 * (error * torch.exp(-log_var) + len(W) * (math.log(2 * math.pi) + log_var))


def mean_elbo(W: Tensor, log_var: Tensor, V: Tensor, log_d: Tensor, covariance: Tensor) -> Tensor:
    """ELBO of the linear VAE, mean over the data: minus :func:`mean_distortion` minus :func:`mean_rate`, () in nats."""
    return -mean_distortion(W, log_var, V, log_d, covariance) - mean_rate(V, log_d, covariance)


def optimal_guide(W: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    r"""The guide that maximises the ELBO of a given decoder, whatever the data.

    .. math:: V = M^{-1} W^\top, \qquad D = \sigma^2 / \operatorname{diag} M, \qquad M = W^\top W + \sigma^2 I

    Returns:
        V (K, D) and the logarithm of D's diagonal (K,), float64.
    """
    W, log_var = W.double(), log_var.double()
    M = W.mT @ W + log_var.exp() * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    # not torch.linalg.solve: under vmap, torch.func.hessian of it is NaN at some W (torch 2.13)
    return torch.cholesky_solve(W.mT, torch.linalg.cholesky(M)), log_var - M.diagonal().log()


def profiled_elbo(W: Tensor, log_var: Tensor, covariance: Tensor) -> Tensor:
    r"""ELBO with the guide profiled out, mean over the data.

    .. math:: \max_{V, D} ELBO = \log p - \tfrac12 [\textstyle\sum_k \log M_{kk} - \log\det M]

    computed from :func:`mean_elbo`, not from this identity. Arguments and result as :func:`mean_log_evidence`.
    """
    return mean_elbo(W, log_var, *optimal_guide(W, log_var), covariance)


def stationary_point(
    eigenvalues: Tensor, eigenvectors: Tensor, active: tuple[int, ...], latent_dim: int, var: float
) -> StationaryPoint:
    """The stationary point with the given active components.

    Args:
        eigenvalues: Of the covariance, distinct, in any order, (D,).
        eigenvectors: In columns, (D, D).
        active: A, q different components.
        latent_dim: K.
        var: sigma^2.

    Raises:
        ValueError: If q exceeds K, var is not positive, or an active eigenvalue does not exceed it.
    """
    lam, axes, kept = eigenvalues.double(), eigenvectors.double(), list(active)
    if len(kept) > latent_dim or not var > 0 or not (lam[kept] > var).all():
        raise ValueError(
            f"expected at most {latent_dim} active components with eigenvalues above var > 0, "
            f"got components {active} with eigenvalues {lam[kept].tolist()} and var {var}"
        )
    W = lam.new_zeros(len(lam), latent_dim)
    W[:, : len(kept)] = axes[:, kept] * (lam[kept] - var).sqrt()
    elbo = profiled_elbo(W, lam.new_tensor(math.log(var)), (axes * lam) @ axes.mT)
    evidence = _log_evidence(lam, kept, var)
    curvatures = [f(lam, active, latent_dim, var) for f in (evidence_curvatures, elbo_curvatures)]
    return StationaryPoint(tuple(active), W, var, evidence, elbo.item(), *(_signs(c) for c in curvatures))


def stationary_points(
    eigenvalues: Tensor, eigenvectors: Tensor, latent_dim: int, var: float
) -> Iterator[StationaryPoint]:
    """The stationary points with diagonal W'W at a fixed sigma^2, one for each admissible A: lazily, for they are many.

    Exactly one is a local maximum, the one that keeps the leading components above sigma^2. Inertias are of the
    Hessian in W, (D K, D K). Arguments as for :func:`stationary_point`.

    Example:
        >>> lam, axes = torch.tensor([3.0, 2.0, 0.5]).double(), torch.eye(3).double()
        >>> for point in stationary_points(lam, axes, latent_dim=1, var=1.0):
        ...     print(point.active, f"{point.elbo:.4f}", point.elbo_inertia, point.is_maximum)
        () -5.5068 (2, 0, 1) False
        (0,) -5.0561 (0, 0, 3) True
        (1,) -5.3534 (1, 0, 2) False
    """
    above = (eigenvalues > var).nonzero().flatten().tolist()
    for q in range(min(latent_dim, len(above)) + 1):
        for active in combinations(above, q):
            yield stationary_point(eigenvalues, eigenvectors, active, latent_dim, var)


def stationary_points_of_learned_noise(
    eigenvalues: Tensor, eigenvectors: Tensor, latent_dim: int
) -> Iterator[StationaryPoint]:
    r"""Those stationary in (W, log sigma^2) with diagonal W'W: sigma^2 is the mean of the eigenvalues left out.

    That mean lies below the largest eigenvalue left out, so a collapsed latent is never stable, and the only local
    maximum is the global one. Inertias are of the joint Hessian, (D K + 1, D K + 1): one more positive eigenvalue.
    Arguments as for :func:`stationary_point`.
    """
    lam = eigenvalues.double()
    for q in range(min(latent_dim, len(lam) - 1) + 1):
        for active in combinations(range(len(lam)), q):
            var = lam[[j for j in range(len(lam)) if j not in active]].mean().item()
            if 0 < var < min((lam[i].item() for i in active), default=math.inf):
                point = stationary_point(lam, eigenvectors, active, latent_dim, var)
                joint = [(n, zero, p + 1) for n, zero, p in (point.evidence_inertia, point.elbo_inertia)]
                yield point._replace(evidence_inertia=joint[0], elbo_inertia=joint[1])


def evidence_curvatures(eigenvalues: Tensor, active: tuple[int, ...], latent_dim: int, var: float) -> Tensor:
    r"""All D K eigenvalues, ascending, of the Hessian in W of the negative mean log-evidence at a stationary point.

    .. math::
        \frac{\lambda_i - \lambda_j}{\sigma^2 \lambda_i}, \quad
        \frac{2 (\lambda_i - \sigma^2)}{\lambda_i^2}, \quad
        \frac{\lambda_i + \lambda_{i'} - 2 \sigma^2}{\lambda_i \lambda_{i'}}, \quad
        \frac{\sigma^2 - \lambda_j}{\sigma^4}

    for column i moved towards a component j left out; its length; a pair of columns mixed, where the other
    combination is a rotation and gives 0; a zero column moved towards j, or towards an active component, again a
    rotation, 0. So :math:`q (q-1) / 2 + q (K-q)` eigenvalues are zero.
    """
    common, first, second = _blocks(eigenvalues, active, latent_dim, var)
    mixed = (first + second - 2 * var) / (first * second)
    rotations = torch.zeros(len(mixed) + len(active) * (latent_dim - len(active)), dtype=mixed.dtype)
    return torch.cat([common, mixed, rotations.to(mixed.device)]).sort().values


def elbo_curvatures(eigenvalues: Tensor, active: tuple[int, ...], latent_dim: int, var: float) -> Tensor:
    r"""The same for the negative ELBO with its guide profiled out: the gap's curvature fixes every rotation.

    .. math:: \frac{(w_i \pm w_{i'})^2}{\lambda_i \lambda_{i'}}, \; w_i^2 = \lambda_i - \sigma^2, \qquad
              \frac{\lambda_i - \sigma^2}{\sigma^2 \lambda_i}

    for a pair of columns, and for a zero column moved towards an active component; the others are those of
    :func:`evidence_curvatures`, so the negative ones are the same. None is zero if eigenvalues are distinct.
    """
    common, first, second = _blocks(eigenvalues, active, latent_dim, var)
    kept = eigenvalues.double()[list(active)]
    w, v = (first - var).sqrt(), (second - var).sqrt()
    mixed = [(w + sign * v).square() / (first * second) for sign in (1, -1)]
    zero_column = ((kept - var) / (var * kept)).repeat(latent_dim - len(active))
    return torch.cat([common, *mixed, zero_column]).sort().values


def negative_hessian(objective: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Hessian of minus ``objective(*parameters)`` in all entries of the parameters, in order: (P, P)."""
    sizes = [p.numel() for p in parameters]

    def loss(flat: Tensor) -> Tensor:
        return -objective(*(part.reshape(p.shape) for part, p in zip(flat.split(sizes), parameters)))

    # reverse mode twice: the forward mode of torch.func.hessian compiles TorchScript, with a DeprecationWarning
    return torch.func.jacrev(torch.func.grad(loss))(torch.cat([p.reshape(-1) for p in parameters]))


def inertia(hessian: Tensor, *, unit: float = 1.0) -> Tensor:
    """Numbers of negative, zero and positive eigenvalues of symmetric matrices, (..., P, P) to (..., 3).

    Zero means a magnitude below 1e-9 ``unit``. A Hessian in W has the unit of 1 / variance: for data whose mean
    variance is far from 1, pass its inverse. The threshold is deliberately not relative to the largest eigenvalue:
    true curvatures span more than nine decades, (w_1 - w_2)^2 against 1 / sigma^2.
    """
    e = torch.linalg.eigvalsh(hessian) / unit
    return torch.stack([(e <= -ZERO).sum(-1), (e.abs() < ZERO).sum(-1), (e >= ZERO).sum(-1)], -1)


def smallest_curvature(objective: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    """Smallest eigenvalue of the Hessian of minus ``objective(W)`` orthogonal to the orbit of rotations W R, ()."""
    basis = _orthogonal_to_rotations(W)
    return torch.linalg.eigvalsh(basis.mT @ negative_hessian(objective, W) @ basis)[0]


def landscape(objective: Callable[[Tensor], Tensor], W: Tensor, directions: Tensor, grid: Tensor) -> Tensor:
    """``objective(W)`` along a direction, or over the plane (or more) that several span.

    Args:
        objective: Of W (D, K), to ().
        W: The point that 0 of the grid stands for.
        directions: (n, D, K).
        grid: Multiples of every direction, (G,).

    Returns:
        (G,) * n.
    """
    steps = torch.cartesian_prod(*[grid] * len(directions)).reshape(-1, len(directions))
    values = torch.func.vmap(lambda step: objective(W + torch.tensordot(step, directions, 1)))(steps)
    return values.reshape([len(grid)] * len(directions))


def collapse_threshold(
    eigenvalues: Tensor,
    eigenvectors: Tensor,
    active: tuple[int, ...],
    latent_dim: int,
    *,
    low: float,
    high: float,
    objective: Objective = mean_log_evidence,
) -> float:
    """The sigma^2 below which the zero columns of a stationary point are unstable, so that collapsed latents wake up.

    Found by bisection on :func:`smallest_curvature`, that is without theory. In theory, where ``active`` are the
    leading q < K components, it is the next eigenvalue.

    Args:
        eigenvalues: Of the covariance, (D,).
        eigenvectors: In columns, (D, D).
        active: Components of the columns that are not zero.
        latent_dim: K.
        low: A sigma^2 at which the point is a saddle.
        high: A sigma^2 at which it is a maximum, below every active eigenvalue.
        objective: :func:`mean_log_evidence` or :func:`profiled_elbo`.

    Returns:
        sigma^2, to a relative 1e-10.

    Raises:
        ValueError: If the smallest curvature is not negative at ``low`` and positive at ``high``.
    """
    covariance = (eigenvectors * eigenvalues) @ eigenvectors.mT

    def curvature(var: float) -> float:
        W = stationary_point(eigenvalues, eigenvectors, active, latent_dim, var).W
        log_var = W.new_tensor(math.log(var))
        return smallest_curvature(lambda W: objective(W, log_var, covariance), W).item()

    if not curvature(low) < 0 < curvature(high):
        raise ValueError(
            f"expected a saddle at low and a maximum at high, got smallest curvatures {curvature(low)} at {low} "
            f"and {curvature(high)} at {high}"
        )
    while high - low > 1e-10 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if curvature(middle) < 0 else (low, middle)
    return 0.5 * (low + high)


def _log_evidence(lam: Tensor, kept: list[int], var: float) -> float:
    """-1/2 [D log 2 pi + sum_A log lam + q + (D - q) log var + (sum of the others) / var]."""
    q, D = len(kept), len(lam)
    inside = lam[kept].log().sum() + (lam.sum() - lam[kept].sum()) / var
    return -0.5 * (D * math.log(2 * math.pi) + q + (D - q) * math.log(var) + inside.item())


def _blocks(lam: Tensor, active: tuple[int, ...], latent_dim: int, var: float) -> tuple[Tensor, Tensor, Tensor]:
    """The curvatures that both objectives share, and the eigenvalues of each pair of active components."""
    lam, q = lam.double(), len(active)
    left_out = lam[[j for j in range(len(lam)) if j not in active]]
    kept = lam[list(active)]
    turned = (kept[:, None] - left_out) / (var * kept[:, None])
    zero_column = ((var - left_out) / var**2).repeat(latent_dim - q)
    pairs = torch.triu_indices(q, q, 1, device=lam.device)
    return torch.cat([turned.flatten(), 2 * (kept - var) / kept**2, zero_column]), kept[pairs[0]], kept[pairs[1]]


def _signs(curvatures: Tensor) -> Inertia:
    signs = curvatures.sign().long().tolist()
    return signs.count(-1), signs.count(0), signs.count(1)


def _orthogonal_to_rotations(W: Tensor) -> Tensor:
    """Orthonormal basis, (D K, .), of what is orthogonal to every W times a skew-symmetric matrix."""
    pairs = list(combinations(range(W.shape[1]), 2))
    tangents = W.new_zeros(len(pairs), *W.shape)
    for tangent, (i, j) in zip(tangents, pairs):
        tangent[:, i], tangent[:, j] = W[:, j], -W[:, i]
    left, length, _ = torch.linalg.svd(tangents.reshape(len(pairs), W.numel()).mT)
    return left[:, int((length > ZERO * W.norm()).sum()) :]
