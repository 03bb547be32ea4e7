r"""How far a guide is from the posterior, per data point: divergences both ways, Wasserstein distance, moments.

.. math:: KL(q \,\|\, p), \quad KL(p \,\|\, q), \quad W_2(N(m_q, S_q), N(m_p, S_p)), \quad
    \frac{m_q - m_p}{\sigma_p}, \quad \log \frac{\sigma_q^2}{\sigma_p^2}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, kl_divergence

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count, check_finite
from inference.core.display import Result
from inference.core.estimates import Estimate
from inference.core.memory import joined
from inference.core.protocols import SupportsPosterior
from inference.core.sources import opened
from inference.distributions.gaussian import FullNormal, as_full_normal
from inference.pair.call import Call, check_same_call
from inference.pair.draw import Draw, flatten, labels
from inference.pair.rows import blocks_of_draws
from inference.pair.run import Program
from inference.pair.simulated import replay
from inference.weights.summary import elbo


@dataclass(frozen=True, kw_only=True, repr=False)
class PosteriorError(Result):
    """Posterior error of a guide: its distances from the posterior, per data point, in float64.

    Attributes:
        names: One name per latent coordinate, P of them.
        kl: KL(q || p) in nats, (N,) and its standard error, zero where it is a closed form; None where no density of
            the posterior is known.
        reverse_kl: KL(p || q) likewise.
        wasserstein: 2-Wasserstein distance of the Gaussians with the moments of both, (N,), in units of z; a lower
            bound on the distance of the distributions themselves.
        mean_error: (mean_q - mean_p) / sigma_p, (N, P).
        log_variance_ratio: log(var_q / var_p), (N, P).
        closed_form: Whether both distributions are Gaussian, so that no number has Monte Carlo error.
        num_samples: Draws of the guide per data point; 0 where ``closed_form``.
    """

    names: tuple[str, ...]
    kl: Estimate | None
    reverse_kl: Estimate | None
    wasserstein: Tensor
    mean_error: Tensor
    log_variance_ratio: Tensor
    closed_form: bool
    num_samples: int


@torch.no_grad()
def posterior_error(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    reference: Mapping[str, Tensor] | None = None,
    log_evidence: Tensor | None = None,
    num_samples: int = 1000,
    block: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> PosteriorError:
    r"""Posterior error: compare a guide with the model's exact posterior, or with samples of it.

    Two Gaussians are compared in closed form. Otherwise the moments are those of samples, and

    .. math:: KL(q \| p) = \log p(x) - E_q \log w, \quad KL(p \| q) = E_p \log w - \log p(x), \quad
        w = \frac{p(x, z)}{q(z \mid x)}

    Warning:
        Sample moments over-state distances: with S draws the squared Wasserstein distance of equal distributions is of
        order trace(covariance) P / S, not zero. KL(p || q) by Monte Carlo misses what samples of p never visit.

    Args:
        model: Pyro model, with ``posterior(x)`` or else with a ``reference``.
        guide: Pyro guide.
        x: Data, (N, D), the first argument of both.
        *args: Further arguments of both; a model with arguments beyond x needs a ``reference``.
        reference: Samples of the posterior by latent site, (S', N, ...), for example those of a long Markov chain.
        log_evidence: log p(x_n), (N,) in nats, from elsewhere: gives the divergences against a ``reference``.
        num_samples: S, draws of the guide, and of an exact posterior that is not Gaussian.
        block: Rows in one run of the pair; None chooses.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        seed: Seed; leaves the global random state as it was.
        **kwargs: Keyword arguments of both.

    Raises:
        TypeError: If the model has no ``posterior(x)`` and there is no reference.
        ValueError: If model and guide are not a valid pair, or the reference or the evidence is of the wrong sites or
            shape.
    """
    check_count(num_samples, "num_samples", minimum=2)
    call = Call(model, guide, opened((x, *args)), kwargs, plate, whole=whole, missing=missing)
    call.check()
    if reference is None and (args or kwargs or not isinstance(model, SupportsPosterior)):
        raise TypeError(f"expected a model with posterior(x), or a reference, got {type(model).__name__} and None")
    with refuse_batch_dependence(model, guide):
        blocks = blocks_of_draws(call, block, num_samples)
        first = blocks[0].probe()
        first.check_latents()
        _check_reference(first, blocks.number or first.layout.num_data, reference, log_evidence)
        own = None if reference is not None else _closed_form(blocks[0])
        closed = own is not None

        def compute(i: int) -> dict[str, Any]:
            found = own if i == 0 or own is None else _closed_form(blocks[i])
            if found is not None:
                return found
            rows = blocks.place(i)
            values = None if reference is None else {name: value[:, rows] for name, value in reference.items()}
            return _by_draws(blocks[i], values, None if log_evidence is None else log_evidence[rows], num_samples)

        check_same_call(call, (num_samples, seed))
        columns = joined(blocks.in_turn(compute, seed), blocks.number)
    return PosteriorError(names=labels(first), closed_form=closed, num_samples=0 if closed else num_samples, **columns)


def _closed_form(call: Call) -> dict[str, Any] | None:
    """The numbers of some rows where guide and posterior are Gaussian; None elsewhere."""
    q, p = _gaussian_guide(call.probe()), as_full_normal(_posterior(call))
    if q is None or p is None:
        return None
    q, p = _double(q), _double(p)
    kl, reverse = (Estimate(value, torch.zeros_like(value)) for value in (kl_divergence(q, p), kl_divergence(p, q)))
    return _columns(kl, reverse, _moments(q), _moments(p))


def _posterior(call: Call) -> Distribution:
    assert isinstance(call.model, SupportsPosterior)
    return call.model.posterior(call.args[0])


def _by_draws(
    call: Call, reference: Mapping[str, Tensor] | None, log_evidence: Tensor | None, num_samples: int
) -> dict[str, Any]:
    """The numbers of some rows by draws of the guide, and of the posterior where there is no reference."""
    first, exact = call.probe(), None if reference is not None else _posterior(call)
    own = call.run(num_samples)
    if reference is None:
        assert exact is not None
        reference = {next(iter(first.latents)): exact.sample(torch.Size([num_samples]))}
    theirs = replay(call, first.layout, reference, len(next(iter(reference.values()))))
    # A guide without a density has no divergences.
    known = getattr(call.guide, "has_density", True)
    kl, reverse = _divergences(own, theirs, exact, log_evidence) if known else (None, None)
    q, p = (
        _sample_moments(run) if distribution is None else _moments(_double(distribution))
        for distribution, run in (
            (_gaussian_guide(first), own),
            (None if exact is None else as_full_normal(exact), theirs),
        )
    )
    return _columns(kl, reverse, q, p)


def _check_reference(
    first: Draw, num_data: int, reference: Mapping[str, Tensor] | None, log_evidence: Tensor | None
) -> None:
    latents, rows = list(first.latents), first.layout.num_data
    if reference is None:
        if len(latents) != 1 or log_evidence is not None:
            raise ValueError(
                f"expected a reference where there are several latents or log_evidence is given, got None for {latents}"
            )
        return
    if log_evidence is not None and log_evidence.shape != (num_data,):
        raise ValueError(f"expected log_evidence of shape ({num_data},), got {tuple(log_evidence.shape)}")
    if set(reference) != set(latents):
        raise ValueError(f"expected a reference for the latent sites {latents}, got {list(reference)}")
    sizes = {len(value) for value in reference.values()}
    for name, value in reference.items():
        expected = first.latents[name].shape
        expected = expected if rows == num_data else torch.Size([num_data, *expected[1:]])
        if len(sizes) != 1 or len(value) < 2 or value.shape[1:] != expected:
            raise ValueError(
                f"expected reference samples of {name!r} of shape (S, *{tuple(expected)}) with one S of at least 2 for "
                f"all sites, got {tuple(value.shape)}"
            )
        check_finite(value, f"reference {name!r}")


def _gaussian_guide(first: Draw) -> MultivariateNormal | None:
    """The guide's distribution where it has one site and that is Gaussian, batch (N,) and event (K,)."""
    site = first.guide_sites[next(iter(first.latents))]
    plain = len(first.latents) == 1 and site.fn.batch_shape == (first.layout.num_data,)
    return as_full_normal(site.fn) if plain and len(site.fn.event_shape) == 1 else None


def _double(distribution: MultivariateNormal) -> FullNormal:
    return FullNormal(distribution.loc.double(), distribution._unbroadcasted_scale_tril.double())


def _divergences(
    own: Draw, theirs: Draw, exact: Distribution | None, log_evidence: Tensor | None
) -> tuple[Estimate | None, Estimate | None]:
    """KL(q || p) and KL(p || q) by Monte Carlo."""

    def log_ratio(run: Draw) -> Tensor:
        """log p(z | x) - log q(z | x), (S, N)."""
        if exact is None:
            assert log_evidence is not None
            return run.log_weights.double() - log_evidence
        (z,) = run.latents.values()
        return (exact.log_prob(z) - run.log_guide).double()

    if exact is None and log_evidence is None:
        return None, None
    return elbo(-log_ratio(own)), elbo(log_ratio(theirs))


def _sample_moments(run: Draw) -> tuple[Tensor, Tensor]:
    parts = [flatten(run.layout, run.guide_sites[name], run.num_samples) for name in run.latents]
    z = torch.cat(parts, -1).double()
    residual = z - z.mean(0)
    return z.mean(0), torch.einsum("sni,snj->nij", residual, residual) / (len(z) - 1)


def _moments(distribution: FullNormal) -> tuple[Tensor, Tensor]:
    return distribution.loc, distribution.covariance_matrix


def _columns(
    kl: Estimate | None, reverse_kl: Estimate | None, q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """What a :class:`PosteriorError` says of each data point, from divergences and moments."""
    var_q, var_p = (cov.diagonal(dim1=-2, dim2=-1) for _, cov in (q, p))
    return {
        "kl": kl,
        "reverse_kl": reverse_kl,
        "wasserstein": gaussian_wasserstein(*q, *p),
        "mean_error": (q[0] - p[0]) / var_p.sqrt(),
        "log_variance_ratio": (var_q / var_p).log(),
    }


def gaussian_wasserstein(mean_q: Tensor, cov_q: Tensor, mean_p: Tensor, cov_p: Tensor) -> Tensor:
    r"""2-Wasserstein distance of Gaussians, (N,).

    .. math:: W_2^2 = |m_q - m_p|^2 + \operatorname{tr}(S_q + S_p - 2 (S_p^{1/2} S_q S_p^{1/2})^{1/2})

    References:
        Dowson, Landau, "The Frechet Distance between Multivariate Normal Distributions", 1982, J. Multivar. Anal. 12.

    Args:
        mean_q: (N, P).
        cov_q: (N, P, P).
        mean_p: (N, P).
        cov_p: (N, P, P).
    """
    values, vectors = torch.linalg.eigh(cov_p)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    # The singular values of S_q^{1/2} S_p^{1/2}: their sum, by the square root of each factor once, cancels least.
    values, vectors = torch.linalg.eigh(cov_q)
    other = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    u, _, v = torch.linalg.svd(other @ root)
    # |A - B O|^2 over rotations O is least at the polar factor of A'B, and a sum of squares cannot cancel.
    spread = (root - other @ (u @ v)).square().sum((-2, -1))
    return ((mean_q - mean_p).square().sum(-1) + spread).sqrt()
