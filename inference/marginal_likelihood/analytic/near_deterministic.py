r"""Near-deterministic limit of the evidence, by the change of variables of the decoder.

.. math::
    p(x) \approx \sum_g \Bigl(\tfrac{\gamma^2}{2\pi}\Bigr)^{(D - K) / 2} p_0(g) \det\Bigl(J^\top J
    - \sum_d r_d \nabla^2 f_d\Bigr)^{-1/2} e^{-\gamma^2 \|r\|^2 / 2}

with g the latents whose decoding is nearest to x, one on each sheet of the decoder that comes near x, r = x - f(g) and
J the Jacobian at g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import scipy
import torch
from torch import Tensor
from torch.func import grad

from inference.core.checks import check_arguments, check_count
from inference.core.protocols import SupportsGaussianDecoder, supports_gaussian_decoder
from inference.distributions.gaussian import LOG_2PI
from inference.identifiability.ima_contrasts import column_contrast
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import NUMERICAL, Evidence
from inference.numerics.jacobian import decoder_jacobian, directional_derivative
from inference.numerics.levenberg_marquardt import nearest_latents

_MIN_STIFFNESS, _MAX_ERROR = 100.0, 0.01
_NUM_POINTS = 256
_MAX_GRADIENT_NORM = 1e-3

# Points of a smaller share, in nats, do not matter.
_LEAST_SHARE = -20.0


@dataclass(frozen=True)
class LimitTerms:
    r"""The parts of the near-deterministic limit, per data point.

    Attributes:
        z: Nearest latent g(x), (N, K).
        log_evidence: The limit, (N,) in nats.
        error: Estimated error of the limit, (N,) in nats.
        stiffness: The smallest eigenvalue of gamma^2 J'J at the points that matter, (N,).
        gradient_norm: How far g(x) is from stationary, (N,); see
            :class:`inference.numerics.levenberg_marquardt.Nearest`.
        contrast: Local independent mechanism analysis (IMA) contrast of the decoder at g(x), (N,) in nats: the limit of
            the gap of the best guide with independent coordinates.
        evaluations: Decoder evaluations per data point, roughly.
    """

    z: Tensor
    log_evidence: Tensor
    error: Tensor
    stiffness: Tensor
    gradient_norm: Tensor
    contrast: Tensor
    evaluations: float

    @property
    def valid(self) -> Tensor:
        """Where the limit may be used, (N,): stiff enough, with an error below 0.01 nats, at a found nearest point."""
        return (
            (self.stiffness >= _MIN_STIFFNESS) & (self.error <= _MAX_ERROR) & (self.gradient_norm <= _MAX_GRADIENT_NORM)
        )


@torch.no_grad()
def limit_terms(model: SupportsGaussianDecoder, x: Tensor, starts: Tensor) -> LimitTerms:
    r"""The limit of the evidence, its error and the predicted gap, per data point.

    Warning:
        Holds for data within a few sigma of the decoder's image, off the boundary of a bounded prior. Where several
        latents decode to x, the terms of those that some start leads to are summed. The error is estimated by the mean
        of the joint density against the sum of the limit's Gaussians, over 256 antithetic Sobol points of each.

    References:
        Reizinger et al., "Embrace the Gap: VAEs Perform Independent Mechanism Analysis", 2022, arXiv 2206.02416.
        Gresele, von Kügelgen, Stimper, Schölkopf, Besserve, "Independent mechanism analysis, a new concept?", 2021,
        arXiv 2106.05200.

    Args:
        model: Model with a decoder and Gaussian noise.
        x: Data, (N, D).
        starts: Latents to search the nearest ones from, (S, N, K).

    Raises:
        TypeError: If the model is of another kind, or the data are not float64.
        ValueError: If the data are not finite or have the wrong shape.
    """
    if not supports_gaussian_decoder(model):
        raise TypeError(f"expected a model with decode(z), sigma and prior(), got {type(model).__name__}")
    check_arguments((model,), (x,), {})
    if x.dtype != torch.float64:
        raise TypeError(f"expected float64 for the limit of little noise, got {x.dtype}")
    found = nearest_latents(model, x, starts)
    z, apart = _together(found.points, found.apart)
    scaled = decoder_jacobian(model.decode, z.flatten(0, 1)) / model.sigma.unsqueeze(-1)
    stiffness = torch.linalg.matrix_norm(scaled, ord=-2).square().view_as(apart)
    hessian = torch.stack([_hessian(model, x, point) for point in z])
    factor, info = torch.linalg.cholesky_ex(hessian)
    log_det = torch.linalg.eigvalsh(hessian).abs().clamp(min=torch.finfo(x.dtype).tiny).log().sum(-1)
    terms = _log_joint(model, x, z) + 0.5 * z.shape[-1] * LOG_2PI - 0.5 * log_det
    terms = torch.where(apart, terms, -math.inf)
    value, matter = terms.logsumexp(0), terms.log_softmax(0) > _LEAST_SHARE
    error = _neglected(model, x, z, factor, terms)
    failed = (matter & (info != 0)).any(0) | ~value.isfinite()
    value, error = value.masked_fill(failed, math.nan), error.masked_fill(failed, math.inf)
    evaluations = found.num_starts * 20.0 * (1 + z.shape[-1]) + _NUM_POINTS * len(z)
    contrast = column_contrast(decoder_jacobian(model.decode, found.z))
    stiffness = torch.where(matter, stiffness, math.inf).amin(0)
    stiffness = torch.where(stiffness.isfinite(), stiffness, 0.0)
    return LimitTerms(found.z, value, error, stiffness, found.gradient_norm, contrast, evaluations)


def _together(points: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """The points (S, N, K) that stand apart, (J, N, K) in their order, and which of the J each data point has."""
    order = (~apart).to(torch.uint8).argsort(stable=True, dim=0)[: int(apart.sum(0).max())]
    return points.gather(0, order.unsqueeze(-1).expand(-1, -1, points.shape[-1])), apart.gather(0, order)


def _log_joint(model: SupportsGaussianDecoder, x: Tensor, z: Tensor) -> Tensor:
    """log p(x, z), (..., N), minus infinity outside the prior's support."""
    prior = model.prior()
    assert prior.support is not None
    inside = prior.support.check(z)
    density = torch.where(inside, prior.log_prob(z), -math.inf)
    squares = ((x - model.decode(z)) / model.sigma).square().sum(-1)
    log_sigma = model.sigma.log().expand(x.shape[-1]).sum()
    return density - 0.5 * squares - log_sigma - 0.5 * x.shape[-1] * LOG_2PI


def _hessian(model: SupportsGaussianDecoder, x: Tensor, z: Tensor) -> Tensor:
    """Second derivatives of half the squared residual in units of sigma, (N, K, K)."""

    def energy(z: Tensor) -> Tensor:
        return 0.5 * ((x - model.decode(z)) / model.sigma).square().sum()

    directions = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    rows = [directional_derivative(grad(energy), z, e.expand_as(z))[1] for e in directions]
    hessian = torch.stack(rows, -2)
    return 0.5 * (hessian + hessian.mT)


def _neglected(model: SupportsGaussianDecoder, x: Tensor, z: Tensor, factor: Tensor, terms: Tensor) -> Tensor:
    """|log E (joint density / sum of the limit's Gaussians)| under that sum, and its own spread, (N,).

    Args:
        model: Model with a decoder.
        x: (N, D).
        z: Points, (J, N, K).
        factor: Cholesky factors of the second derivatives there, (J, N, K, K).
        terms: Logs of the integrals of the Gaussians, (J, N); minus infinity where there is none.
    """
    noise = _antithetic(z)
    shares, total, variance = terms.softmax(0), torch.zeros_like(terms[0]), torch.zeros_like(terms[0])
    for point, own, share in zip(z, factor, shares, strict=True):
        steps = torch.linalg.solve_triangular(own.mT, noise.expand(-1, len(point), -1).unsqueeze(-1), upper=True)
        at = point + steps.squeeze(-1)
        ratio = (_log_joint(model, x, at) - _log_sum(at, z, factor, terms)).exp().nan_to_num(0.0)
        pairs = 0.5 * (ratio[: _NUM_POINTS // 2] + ratio[_NUM_POINTS // 2 :])
        total = total + torch.where(share > 0, share * pairs.mean(0), 0.0)
        variance = variance + torch.where(share > 0, share.square() * pairs.var(0) / len(pairs), 0.0)
    return total.log().abs() + 2 * variance.sqrt()


def _antithetic(like: Tensor) -> Tensor:
    """Antithetic standard normal Sobol points, (P, 1, K)."""
    half = scipy.stats.norm.ppf(scipy.stats.qmc.Sobol(like.shape[-1], seed=0).random(_NUM_POINTS // 2))
    noise = torch.as_tensor(half, dtype=like.dtype, device=like.device)
    return torch.cat([noise, -noise]).unsqueeze(1)


def _log_sum(at: Tensor, z: Tensor, factor: Tensor, terms: Tensor) -> Tensor:
    """Log of the sum of the limit's Gaussians at (P, N, K): (P, N) in nats."""
    each = []
    for point, own, term in zip(z, factor, terms, strict=True):
        whitened = (own.mT @ (at - point).unsqueeze(-1)).squeeze(-1)
        log_det = own.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        density = log_det - 0.5 * whitened.square().sum(-1) - 0.5 * point.shape[-1] * LOG_2PI
        each.append(torch.where(term > -math.inf, term + density, -math.inf))
    return torch.stack(each).logsumexp(0)


@dataclass(frozen=True)
class Limit(Method):
    """Near-deterministic limit of little noise, for models with a decoder, Gaussian noise and a latent ``"z"``.

    Nearest latents are searched from the guide's mean draw where there is a guide, and from draws of the prior.

    Args:
        num_starts: Starts per data point.
    """

    num_starts: int = 16
    name: ClassVar[str] = "limit"

    def __post_init__(self) -> None:
        check_count(self.num_starts, "num_starts")

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            TypeError: If the model is not of that kind, or not float64.
            ValueError: If some data point is out of the limit's domain; the message states how many and how far.
        """
        model, x = problem.call.model, problem.call.args[0]
        if not supports_gaussian_decoder(model):
            raise TypeError(f"expected a model with decode(z), sigma and prior(), got {type(model).__name__}")
        check_arguments((model,), (x,), {})
        with torch.no_grad():
            starts = model.prior().sample(torch.Size((self.num_starts, len(x))))
            if problem.call.guide is not None:
                draw = problem.call.run()
                starts[0] = next(iter(draw.latents.values()))
        terms = limit_terms(model, x, starts)
        bad = ~terms.valid
        if bool(bad.any()):
            n = int(bad.nonzero()[0])
            raise ValueError(
                f"expected gamma^2 lambda_min(J'J) >= {_MIN_STIFFNESS:g} and an error of at most {_MAX_ERROR} nats "
                f"for method='limit', got {int(bad.sum())} of {len(x)} data points beyond, the first, {n}, with "
                f"{float(terms.stiffness[n]):.3g} and {float(terms.error[n]):.2g} nats"
            )
        error = terms.error.clamp(min=1e-12)
        value = terms.log_evidence
        return Evidence(
            value=value,
            lower=value - error,
            upper=value + error,
            standard_error=torch.zeros_like(value),
            guarantee=(NUMERICAL,) * len(value),
            level=1.0,
            method=self.name,
            evaluations=terms.evaluations,
        )
