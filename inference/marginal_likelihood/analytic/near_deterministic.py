r"""Near-deterministic limit of the evidence, by the change of variables of the decoder.

.. math::
    \log p(x) \approx \tfrac{D - K}{2} \log \tfrac{\gamma^2}{2\pi} + \log p_0(g) - \tfrac12 \log\det\Bigl(J^\top J
    - \sum_d r_d \nabla^2 f_d\Bigr) - \tfrac{\gamma^2}{2} \|r\|^2

with g the latent whose decoding is nearest to x, r = x - f(g) and J the Jacobian at g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.stats import norm, qmc
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


@dataclass(frozen=True)
class LimitTerms:
    r"""The parts of the near-deterministic limit, per data point.

    Attributes:
        z: Nearest latent g(x), (N, K).
        log_evidence: The limit, (N,) in nats.
        error: Estimated error of the limit, (N,) in nats.
        stiffness: The smallest eigenvalue of gamma^2 J'J, (N,).
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
        Holds for a decoder that is injective near x and data within a few sigma of its image, off the boundary of
        a bounded prior. The error is estimated by the mean of what the log joint density has beyond a quadratic
        function, over 256 antithetic Sobol points of the limit's Gaussian, and by the share of a second point that
        decodes to x, where some start leads to one.

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
    z, sigma = found.z, model.sigma
    jacobian = decoder_jacobian(model.decode, z)
    scaled = jacobian / sigma.unsqueeze(-1)
    hessian = _hessian(model, x, z)
    stiffness = torch.linalg.matrix_norm(scaled, ord=-2).square()
    factor, info = torch.linalg.cholesky_ex(hessian)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_joint = _log_joint(model, x, z)
    value = log_joint + 0.5 * z.shape[1] * LOG_2PI - 0.5 * log_det
    error = _neglected(model, x, z, factor, log_joint) + (-found.margin).exp()
    failed = (info != 0) | ~value.isfinite()
    value, error = value.masked_fill(failed, math.nan), error.masked_fill(failed, math.inf)
    evaluations = found.num_starts * 20.0 * (1 + z.shape[1]) + _NUM_POINTS
    return LimitTerms(z, value, error, stiffness, found.gradient_norm, column_contrast(jacobian), evaluations)


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


def _neglected(model: SupportsGaussianDecoder, x: Tensor, z: Tensor, factor: Tensor, at: Tensor) -> Tensor:
    """|log E exp(what the log joint has beyond the quadratic)| under the limit's Gaussian, and its own spread."""
    half = norm.ppf(qmc.Sobol(z.shape[1], seed=0).random(_NUM_POINTS // 2))
    noise = torch.as_tensor(half, dtype=z.dtype, device=z.device)
    noise = torch.stack([noise, -noise]).flatten(0, 1).unsqueeze(1)
    steps = torch.linalg.solve_triangular(factor.mT, noise.mT.expand(-1, -1, len(z)).mT.unsqueeze(-1), upper=True)
    beyond = _log_joint(model, x, z + steps.squeeze(-1)) - at + 0.5 * noise.square().sum(-1)
    ratio = beyond.exp().nan_to_num(0.0)
    pairs = 0.5 * (ratio[: _NUM_POINTS // 2] + ratio[_NUM_POINTS // 2 :])
    spread = 2 * pairs.std(0) / math.sqrt(len(pairs))
    return pairs.mean(0).log().abs() + spread


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
